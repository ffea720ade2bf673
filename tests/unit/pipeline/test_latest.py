"""The newest run under names that a person can guess: as links on a local disk, as copies elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import icce_ray
import icce_ray.pipeline.latest as latest_module
from icce_ray.classifier.linear import DESCRIPTION_NAME, MODEL_NAME
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig
from icce_ray.errors import InputError
from icce_ray.pipeline.latest import add_new_images, publish
from icce_ray.store import Artifact, ArtifactWriter, Folder
from icce_ray.store.run_records import read_latest

FEATURES = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)


def write_run(output: Path | str, name: str, num_parts: int = 1) -> dict[str, Artifact]:
    """The artifacts that people take away. The run `name` has its name in its page, and its length as cluster."""
    labels = np.arange(40) % 2
    classifier = fit_classifier(
        FEATURES, labels, ClassifierConfig(num_iterations=20), num_clusters=2, seed=0, outlier_quantile=0.99
    )
    part = pa.table({"image_id": [0, 1, 2], "cluster": [len(name)] * 3})
    contents: dict[str, dict[str, Any]] = {
        "assign": {f"assignments/part-{index:05d}.parquet": part for index in range(num_parts)},
        "report": {"report.html": name.encode(), "data/pictures.bin": b"p"},
        "classifier": {MODEL_NAME: classifier.to_bytes(), DESCRIPTION_NAME: json.dumps({"name": name}).encode()},
    }
    artifacts = {}
    for stage, files in contents.items():
        folder = Folder.at(output) / stage / name
        finished = Artifact.find(folder)
        if finished is not None:
            artifacts[stage] = finished
            continue
        writer = ArtifactWriter(folder)
        for file, content in files.items():
            if isinstance(content, pa.Table):
                writer.write_table(file, content)
            else:
                writer.write_bytes(file, content)
        artifacts[stage] = writer.commit(stage=stage, fingerprint=name, inputs={}, config={}, metrics={}, seconds=0.0)
    return artifacts


def publish_run(output: Path | str, name: str, *, is_new: bool = True, num_parts: int = 1) -> dict[str, str]:
    return publish(str(output), name, write_run(output, name, num_parts), {"anmi": 0.5}, is_new=is_new)


def shown(output: Path) -> dict[str, Any]:
    """What a person finds in ``latest``."""
    folder = output / "latest"
    return {
        "page": (folder / "report" / "report.html").read_text(),
        "pictures": (folder / "report" / "data" / "pictures.bin").read_bytes(),
        "cluster": set(pq.read_table(folder / "assignments.parquet")["cluster"].to_pylist()),
        "model": icce_ray.load(output).description["name"],
        "summary": json.loads((folder / "summary.json").read_text())["run"],
    }


def expected(name: str) -> dict[str, Any]:
    return {"page": name, "pictures": b"p", "cluster": {len(name)}, "model": name, "summary": name}


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As disks do that have no links."""

    def refuse(*_: object) -> None:
        raise PermissionError("this disk has no links")

    monkeypatch.setattr(Path, "symlink_to", refuse)


@pytest.fixture(params=["links", "copies"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "copies":
        refuse_links(monkeypatch)
    return tmp_path


def test_the_run_that_finished_last_is_the_latest(output: Path) -> None:
    places = publish_run(output, "one")
    assert shown(output) == expected("one")
    assert places["report"] == str(output / "latest" / "report")
    publish_run(output, "second")
    assert shown(output) == expected("second")
    publish_run(output, "one", is_new=False)
    assert shown(output) == expected("one")


def test_parts_open_as_one_table(output: Path) -> None:
    publish_run(output, "many", num_parts=3)
    assert pq.read_table(output / "latest" / "assignments.parquet").num_rows == 9
    publish_run(output, "one")
    assert pq.read_table(output / "latest" / "assignments.parquet").num_rows == 3


def label_new(output: Path, model: str, name: str) -> Artifact:
    """Images 3 and 4, in a listing of their own, labelled by a model."""
    folder = Folder.at(output) / "assign" / name
    if (finished := Artifact.find(folder)) is not None:
        return finished
    writer = ArtifactWriter(folder)
    writer.write_table("assignments/part-00000.parquet", pa.table({"image_id": [3, 4], "cluster": [1, 1]}))
    inputs = {"classifier": f"{model}.1", "embed": "e", "images": f"listing-of-{name}"}
    return writer.commit(stage="assign", fingerprint=name, inputs=inputs, config={}, metrics={}, seconds=0.0)


def test_new_images_join_those_of_the_latest_run_if_its_model_labelled_them(output: Path) -> None:
    assert add_new_images(str(output), label_new(output, "one", "early")) is None  # there is no latest run
    publish_run(output, "one")
    place = output / "latest" / "all_images"
    assert add_new_images(str(output), label_new(output, "another", "other")) is None
    assert sorted(pq.read_table(place)["image_id"].to_pylist()) == [0, 1, 2]
    for _ in range(2):  # done again, it changes nothing
        assert add_new_images(str(output), label_new(output, "one", "new")) == str(place)
        rows = pq.read_table(place).sort_by("image_id").to_pydict()
        assert rows["image_id"] == [0, 1, 2, 3, 4]
        assert rows["source"] == ["one"] * 3 + ["listing-of-new"] * 2
        assert rows["model"] == ["none"] * 3 + ["one.1"] * 2
    assert shown(output) == expected("one")


def test_an_output_that_was_moved_still_opens(tmp_path: Path) -> None:
    publish_run(tmp_path / "out", "one")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert shown(tmp_path / "moved") == expected("one")
    assert icce_ray.load(tmp_path / "moved" / "latest" / "model").description["name"] == "one"


def test_a_run_that_did_nothing_keeps_its_summary(output: Path) -> None:
    publish_run(output, "one")
    publish(str(output), "one", write_run(output, "one"), {"anmi": 0.0}, is_new=False)
    assert json.loads((output / "latest" / "summary.json").read_text())["anmi"] == 0.5


def test_links_that_cannot_be_finished_leave_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_run(tmp_path, "one")
    linked: list[Path] = []
    real = Path.symlink_to

    def dies_at_the_third(path: Path, target: str) -> None:
        linked.append(path)
        if len(linked) == 3:
            raise KeyboardInterrupt
        real(path, target)

    monkeypatch.setattr(Path, "symlink_to", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        publish_run(tmp_path, "second")
    assert shown(tmp_path) == expected("one")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".latest")]


def test_copies_that_were_cut_off_are_no_latest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch)
    publish_run(tmp_path, "one")
    with monkeypatch.context() as patch:
        patch.setattr(latest_module, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish_run(tmp_path, "second")
    with pytest.raises(InputError, match="no model there; give the output of a finished run"):
        icce_ray.load(tmp_path)
    publish_run(tmp_path, "second", is_new=False)
    assert shown(tmp_path) == expected("second")


def test_a_summary_that_is_none_is_no_latest_run(tmp_path: Path) -> None:
    publish_run(tmp_path, "one")
    for text in ("{", "[]", "{}", '{"run": "one"}'):
        (tmp_path / "latest" / "summary.json").write_text(text)
        assert read_latest(str(tmp_path)) is None, text


def test_copies_stay_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refuse_links(patch)
        publish_run(tmp_path, "one")
    publish_run(tmp_path, "second")
    assert shown(tmp_path) == expected("second")
    assert not (tmp_path / "latest").is_symlink()


def test_what_is_too_large_to_copy_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch)
    publish_run(tmp_path, "one")
    monkeypatch.setattr(latest_module, "MAX_COPIED_BYTES", 300)
    for is_new in (True, False):
        places = publish_run(tmp_path, "second", is_new=is_new)
        assert places == {
            "assignments.parquet": str(tmp_path / "assign" / "second" / "assignments"),
            "report": str(tmp_path / "latest" / "report"),
            "model": str(tmp_path / "classifier" / "second"),
        }
        assert not (tmp_path / "latest" / "assignments.parquet").exists()
        assert list((tmp_path / "latest" / "model").glob("*")) == []
        assert icce_ray.load(tmp_path).description["name"] == "second"
