"""A collection that lives: refits that keep the numbers of the clusters, takedowns, and what is left over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import icce_ray
from icce_ray.assign.new_images import assign_images
from icce_ray.collect_garbage import collect_garbage
from icce_ray.config import Config
from icce_ray.errors import BusyError
from icce_ray.forget import forget_images
from icce_ray.pipeline.run import run_pipeline
from icce_ray.store import Artifact, Claim, Folder
from icce_ray.store.cache import cache_folder
from tests.integration.stages import artifact

COLORS = {"red": (220, 40, 30), "green": (40, 190, 60), "blue": (30, 60, 210), "grey": (120, 120, 120)}
pytestmark = pytest.mark.slow


def write_images(folder: Path, colors: list[str], numbers: range, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in colors:
        for number in numbers:
            pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}-{name}.png")


def settings(folder: Path, num_clusters: int = 3, seed: int = 0) -> Config:
    return Config.model_validate(
        {
            "images": {"uri": str(folder / "images")},
            "num_clusters": num_clusters,
            "seed": seed,
            "output": str(folder / "out"),
            "method": "kmeans",
            "embed": {"backbone": "pixels", "image_size": 4},
            "classifier": {"num_iterations": 100},
        }
    )


def clusters(config: Config) -> dict[str, int]:
    assign = artifact(config, "assign")
    table = pa.concat_tables([assign.read_table(name) for name in assign.part_names("assignments/")])
    names = [uri.rpartition("/")[2] for uri in table["uri"].to_pylist()]
    return dict(zip(names, table["cluster"].to_pylist(), strict=True))


@pytest.mark.parametrize("refresh", [True, False])
def test_a_refit_keeps_the_numbers_and_names_the_new_cluster(tmp_path: Path, refresh: bool) -> None:
    write_images(tmp_path / "images", ["red", "green", "blue"], range(10, 30))
    config = settings(tmp_path)
    first = run_pipeline(config, quiet=True)
    before = clusters(config)
    assert "numbers" not in artifact(config, "consensus").metrics
    # Names that sort first: without a refresh, all ids change.
    write_images(tmp_path / "images", ["grey"], range(8), seed=1)
    grown = settings(tmp_path, num_clusters=4)
    second = run_pipeline(grown, refresh=refresh, quiet=True)
    after = clusters(grown)
    assert {name: after[name] for name in before} == before
    assert {after[f"{number:02d}-grey.png"] for number in range(8)} == {3}
    changes = artifact(grown, "consensus").metrics["numbers"]
    assert changes["run"] == first.run
    assert changes["num_kept"] == 3
    assert changes["new"] == [3]
    # The same again is the same run.
    again = run_pipeline(grown, quiet=True)
    assert again.run == second.run
    assert len(again.finished_before) == len(again.seconds)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 images, a run over them, and the assignments of 8 more."""
    folder = tmp_path_factory.mktemp("living")
    write_images(folder / "images", ["red", "green", "blue"], range(10, 30))
    write_images(folder / "day", ["red"], range(40, 48), seed=2)
    run_pipeline(settings(folder), quiet=True)
    assign_images(folder / "out", images=folder / "day", quiet=True)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of its output; the images stay where they are."""
    shutil.copytree(finished / "out", tmp_path / "out", symlinks=True)
    return tmp_path


def config_of(finished: Path, copied: Path) -> Config:
    return settings(finished).model_copy(update={"output": str(copied / "out")})


def names_of(finished: Path) -> list[str]:
    """The images by id."""
    return sorted(path.name for path in (finished / "images").iterdir())


def list_of(folder: Path, uris: list[str]) -> str:
    (folder / "takedown.txt").write_text("\n".join(uris))
    return str(folder / "takedown.txt")


def texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Everything that lies in an output, Parquet unpacked."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes().decode("latin-1")
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                yield path, str(table.select([c for c in table.column_names if "embedding" not in c]).to_pylist())


def traces(output: Path, uris: list[str]) -> set[str]:
    return {str(path) for path, text in texts(output) for uri in uris if uri.rpartition("/")[2] in text}


def check_all(output: Path) -> None:
    """Every finished artifact has the bytes that its manifest promises."""
    for folder in output.glob("*/*"):
        if (folder / "manifest.json").exists():
            found = Artifact.find(Folder.at(folder))
            assert found is not None, folder
            for name in found.part_names():
                found.read_bytes(name)


def embeddings(output: Path) -> dict[int, list[float]]:
    """By id, of the run itself; the folder of the day has ids of its own."""
    found = [Artifact.find(Folder.at(folder)) for folder in (output / "embed").iterdir()]
    (one,) = (one for one in found if one is not None and one.metrics["num_images"] > 30)
    tables = [one.read_table(name) for name in one.part_names("part-")]
    return {row["image_id"]: row["embedding"] for table in tables for row in table.to_pylist()}


def test_a_takedown_leaves_no_trace_and_the_next_run_does_without_the_images(finished: Path, copied: Path) -> None:
    config, output = config_of(finished, copied), copied / "out"
    ids, names = [3, 17], names_of(finished)
    uris = [str(finished / "images" / names[image_id]) for image_id in ids] + [str(finished / "day" / "41-red.png")]
    before, vectors = clusters(config), embeddings(output)
    assert len(traces(output, uris)) > 5
    cached = [cache_folder() / stage / folder.name for stage in ("embed", "sample")
              for folder in (output / stage).iterdir()]  # fmt: skip
    assert any(path.exists() for path in cached)
    found = forget_images(str(output), list_of(copied, [*uris, "/no/such.png"]), quiet=True)
    assert (found.num_images, found.num_unknown, len(found.pages)) == (3, 1, 1)
    assert traces(output, uris) == set()
    assert embeddings(output) == {image_id: row for image_id, row in vectors.items() if image_id not in ids}
    assert not [path for path in cached if path.exists()]
    check_all(output)
    # The files are still there. The next run uses the other embeddings again, and keeps ids and numbers.
    result = run_pipeline(config, refresh=True, quiet=True)
    gone = [names[image_id] for image_id in ids]
    assert clusters(config) == {name: cluster for name, cluster in before.items() if name not in gone}
    assert artifact(config, "embed").metrics["num_embedded"] == 0
    assert result.num_errors == 2
    assert traces(output, uris) == set()
    again = forget_images(str(output), list_of(copied, uris), quiet=True)
    assert (again.num_images, again.num_parts) == (3, 0)
    # Parts that two artifacts share are right in both.
    assert artifact(config, "embed").part_folders()
    uris = [str(finished / "images" / names[40])]
    forget_images(str(output), list_of(copied, uris), quiet=True)
    assert traces(output, uris) == set()
    check_all(output)


def test_only_parts_that_hold_the_images_are_read(
    finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, read_bytes = list[str](), Folder.read_bytes

    def counted(folder: Folder, name: str, num_bytes: int | None = None) -> bytes:
        read.append(f"{folder.path.rpartition('/out/')[2]}/{name}")
        return read_bytes(folder, name, num_bytes)

    monkeypatch.setattr(Folder, "read_bytes", counted)
    uri = str(finished / "images" / names_of(finished)[20])
    forget_images(str(copied / "out"), list_of(copied, [uri]), quiet=True)
    assert {name.rpartition("/")[2] for name in read if name.startswith("embed/") and "/part-" in name} == {
        "part-00001.parquet"
    }
    of_models = [name for name in read if name.startswith(("method/", "consensus/", "classifier/"))]
    assert not [name for name in of_models if not name.endswith("manifest.json") and "/parts-" not in name]


def test_a_takedown_that_is_killed_anywhere_is_continued(
    finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = names_of(finished)
    # The first of its part, the last of another, and one in the middle.
    uris = [str(finished / "images" / names[image_id]) for image_id in (16, 47, 20)]
    takedown, write_bytes, remove = list_of(copied, uris), Folder.write_bytes, Folder.remove
    for allowed in range(0, 100, 2):
        output, done = copied / f"out-{allowed}", list[str]()
        shutil.copytree(copied / "out", output, symlinks=True)

        with monkeypatch.context() as patched:
            patched.setattr(Folder, "write_bytes", stopping(write_bytes, done, allowed))
            patched.setattr(Folder, "remove", stopping(remove, done, allowed))
            try:
                forget_images(str(output), takedown, quiet=True)
            except KeyboardInterrupt:
                pass
            else:
                assert len(done) > 10
                return
        forget_images(str(output), takedown, quiet=True)
        assert traces(output, uris) == set(), allowed
        check_all(output)
        shutil.rmtree(output)
    raise AssertionError("it never ended")


def stopping(method: Callable[..., None], done: list[str], allowed: int) -> Callable[..., None]:
    """A method that fails once so many calls were made."""

    def call(folder: Folder, name: str, *data: bytes) -> None:
        done.append(name)
        if len(done) > allowed:
            raise KeyboardInterrupt
        method(folder, name, *data)

    return call


def test_one_table_holds_the_images_of_the_run_and_of_the_day_with_their_lineage(finished: Path, copied: Path) -> None:
    table = pd.read_parquet(copied / "out" / "latest" / "all_images")
    assert len(table) == 68
    run, day = table[table["source"] == "run"], table[table["source"] != "run"]
    assert sorted(Path(uri).name for uri in run["uri"]) == names_of(finished)
    assert sorted(Path(uri).name for uri in day["uri"]) == sorted(path.name for path in (finished / "day").iterdir())
    assert table["image_id"].is_unique
    assert day["image_id"].min() > run["image_id"].max()
    # One model labelled both; each has embeddings and a listing of its own, which lie under these names.
    assert set(table["model"]) == {path.name for path in (copied / "out" / "classifier").iterdir()}
    assert set(table["embedding"]) == {path.name for path in (copied / "out" / "embed").iterdir()}
    assert set(day["source"]) < {path.name for path in (copied / "out" / "images").iterdir()}
    assert set(table["code"]) == {icce_ray.__version__}


def test_gc_removes_what_no_run_refers_to_and_nothing_else(finished: Path, copied: Path) -> None:
    config, output = config_of(finished, copied), copied / "out"
    assert collect_garbage(str(output)).sizes == {}
    stray = output / "consensus" / "0123456789abcdef"
    shutil.copytree(next((output / "consensus").iterdir()), stray)
    unfinished = output / "method" / "fedcba9876543210"
    unfinished.mkdir()
    (unfinished / "part").write_bytes(b"12345")
    num_bytes = sum(path.stat().st_size for path in stray.iterdir())
    found = collect_garbage(str(output))
    assert found.sizes == {"consensus/0123456789abcdef": num_bytes, "method/fedcba9876543210": 5}
    assert stray.exists()
    with Claim(Folder.at(unfinished)):
        assert list(collect_garbage(str(output), delete=True).sizes) == ["consensus/0123456789abcdef"]
        with pytest.raises(BusyError):
            forget_images(str(output), list_of(copied, ["/a.png"]), quiet=True)
    assert list(collect_garbage(str(output), delete=True).sizes) == ["method/fedcba9876543210"]
    assert not stray.exists()
    again = run_pipeline(config, quiet=True)
    assert len(again.finished_before) == len(again.seconds)
    day = assign_images(output, images=finished / "day", quiet=True)
    assert set(day.seconds.values()) == {0.0}
