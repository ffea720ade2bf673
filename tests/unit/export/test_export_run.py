"""Exports of a small finished run: each format read back, by the tool it is for where that is installed."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from PIL import Image

import icce_ray.export.image_shards as shards
from icce_ray import cli
from icce_ray.classifier.linear import MODEL_NAME, LinearClassifier
from icce_ray.classifier.self_training import fit_classifier
from icce_ray.config import ClassifierConfig
from icce_ray.corrections.stage import APPLIED_NAME
from icce_ray.embed.embedding_parts import part_table
from icce_ray.errors import InputError
from icce_ray.export.export_run import export_run
from icce_ray.export.selected_images import Selection, file_name
from icce_ray.store import ArtifactWriter, Folder

NUM_IMAGES, NUM_CLUSTERS = 30, 3
MISSING = 4
"""An image whose file is gone."""
FEATURES = np.random.default_rng(0).normal(size=(NUM_IMAGES, 5)).astype(np.float32)
CLUSTERS = np.arange(NUM_IMAGES, dtype=np.int32) % NUM_CLUSTERS
NOISE = 28
CLUSTERS[NOISE] = -1
AGREEMENT = np.where(np.arange(NUM_IMAGES) < 20, np.arange(NUM_IMAGES) / 20, np.nan).astype(np.float32)


def uri_of(folder: Path, image_id: int) -> str:
    return str(folder / "photos" / "ab"[image_id % 2] / f"{image_id} é,%.{'png' if image_id % 3 else 'jpg'}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    uris = [uri_of(folder, image_id) for image_id in range(NUM_IMAGES)]
    for image_id, uri in enumerate(uris):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        if image_id != MISSING:
            Image.new("RGB", (6, 4), (8 * image_id, 0, 0)).save(uri)
    assignments = pa.table(
        {
            "image_id": pa.array(range(NUM_IMAGES), pa.int64()),
            "uri": uris,
            "cluster": CLUSTERS,
            "agreement": pa.array(AGREEMENT, from_pandas=True),
            "is_outlier": [image_id == 7 for image_id in range(NUM_IMAGES)],
        }
    )
    classifier = fit_classifier(
        FEATURES[CLUSTERS >= 0],
        CLUSTERS[CLUSTERS >= 0],
        ClassifierConfig(num_iterations=20),
        num_clusters=NUM_CLUSTERS,
        seed=0,
        outlier_quantile=0.99,
    )
    ids = np.arange(NUM_IMAGES)
    contents: dict[str, dict[str, Any]] = {
        "images": {"images-00000.parquet": assignments.select(["image_id", "uri"])},
        "embed": {
            f"part-{index:05d}.parquet": part_table(ids[10 * index : 10 * index + 10], FEATURES[10 * index :][:10])
            for index in range(3)
        },
        "assign": {"assignments/part-00000.parquet": assignments},
        "classifier": {MODEL_NAME: classifier.to_bytes()},
    }
    for stage, files in contents.items():
        writer = ArtifactWriter(Folder.at(folder / "out" / stage / "f"))
        for name, content in files.items():
            if isinstance(content, pa.Table):
                writer.write_table(name, content)
            else:
                writer.write_bytes(name, content)
        metrics = {"cluster_sizes": [10] * NUM_CLUSTERS}
        writer.commit(stage=stage, fingerprint="f", inputs={}, config={}, metrics=metrics, seconds=0)
    record = {"run": "one", "stages": dict.fromkeys(contents, "f"), "config": {}, "result": None}
    Folder.at(folder / "out" / "runs").write_bytes("one.json", json.dumps(record).encode())
    return folder / "out"


READABLE = [image_id for image_id in range(NUM_IMAGES) if image_id != MISSING]


def pixel(image: Any) -> int:
    """The red of an image, which says which one it is, to within JPEG's error."""
    with Image.open(image) as opened:
        return round(opened.convert("RGB").getpixel((0, 0))[0] / 8)


def test_csv_has_all_columns_and_the_selected_rows(run: Path, tmp_path: Path) -> None:
    written = export_run(run, "csv", tmp_path / "csv", clusters="0,2", min_agreement=0.25, quiet=True)
    table = pacsv.read_csv(tmp_path / "csv" / "assignments.csv")
    expected = [image_id for image_id in range(5, 20) if image_id % 3 != 1]
    assert table["image_id"].to_pylist() == expected
    assert table.column_names == ["image_id", "uri", "cluster", "agreement", "is_outlier"]
    assert written.num_images == len(expected)


@pytest.mark.parametrize("copy", [False, True])
def test_folders_hold_each_image_once_under_its_cluster(run: Path, tmp_path: Path, copy: bool) -> None:
    written = export_run(run, "folders", tmp_path / "sorted", copy=copy, quiet=True)
    assert (written.num_images, written.num_failed) == (29, 1)
    with (tmp_path / "sorted" / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        image_id, path = int(row["image_id"]), tmp_path / "sorted" / row["file"]
        assert path.parent.name == ("noise" if image_id == NOISE else f"cluster-{CLUSTERS[image_id]}")
        assert path.is_symlink() is not copy
        assert pixel(path) == image_id
    assert [int(row["image_id"]) for row in rows] == READABLE
    assert rows[1]["file"] == "cluster-1/1_é-1.png"


def read_tars(folder: Path) -> dict[str, bytes]:
    contents = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                opened = tar.extractfile(member)
                assert opened is not None
                contents[member.name] = opened.read()
    return contents


def test_tar_shards_hold_image_cluster_and_row(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_IMAGES", 8)
    written = export_run(run, "webdataset", tmp_path / "tars", quiet=True)
    assert (written.num_images, written.num_failed) == (29, 1)
    assert written.problem.endswith("4 é,%.png: missing")
    assert len(list((tmp_path / "tars").glob("*.tar"))) == 4
    contents = read_tars(tmp_path / "tars")
    assert len(contents) == 3 * 29
    for image_id in READABLE:
        key = f"{image_id:010d}"
        assert contents[f"{key}.cls"] == str(CLUSTERS[image_id]).encode()
        assert json.loads(contents[f"{key}.json"])["image_id"] == image_id
        assert pixel(io.BytesIO(contents[f"{key}.{'png' if image_id % 3 else 'jpg'}"])) == image_id


def test_an_export_that_was_cut_off_goes_on_behind_its_last_shard(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_IMAGES", 8)
    export_run(run, "webdataset", tmp_path / "whole", quiet=True)
    real, read = shards.read_image, list[str]()

    def killed_at_the_third_shard(uri: str) -> bytes | str:
        if Path(uri).name.startswith("20 "):
            raise KeyboardInterrupt
        return real(uri)

    monkeypatch.setattr(shards, "read_image", killed_at_the_third_shard)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, "webdataset", tmp_path / "resumed", quiet=True)
    assert len(list((tmp_path / "resumed").glob("*.tar"))) == 2  # with the images 0 to 16
    monkeypatch.setattr(shards, "read_image", lambda uri: (read.append(uri), real(uri))[1])
    written = export_run(run, "webdataset", tmp_path / "resumed", quiet=True)
    assert sorted(int(Path(uri).name.split()[0]) for uri in read) == list(range(17, NUM_IMAGES))
    assert read_tars(tmp_path / "resumed") == read_tars(tmp_path / "whole")
    assert (written.num_images, written.num_failed) == (29, 1)
    read.clear()
    assert export_run(run, "webdataset", tmp_path / "resumed", quiet=True) == written
    assert read == []


def test_parquet_holds_the_images_and_says_what_its_columns_are(run: Path, tmp_path: Path) -> None:
    export_run(run, "huggingface", tmp_path / "hub", quiet=True)
    table = pq.read_table(tmp_path / "hub" / "data")
    assert table["image_id"].to_pylist() == READABLE
    assert [pixel(io.BytesIO(image["bytes"])) for image in table["image"].to_pylist()] == READABLE
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["cluster"] == {"names": ["0", "1", "2"], "_type": "ClassLabel"}


def test_cleanlab_gets_the_probabilities_of_the_classifier(run: Path, tmp_path: Path) -> None:
    export_run(run, "cleanlab", tmp_path / "clean", quiet=True)
    labels, probabilities = (np.load(tmp_path / "clean" / f"{name}.npy") for name in ("labels", "pred_probs"))
    rows = pacsv.read_csv(tmp_path / "clean" / "images.csv")["image_id"].to_numpy()
    assert rows.tolist() == [image_id for image_id in range(NUM_IMAGES) if image_id != NOISE]
    assert labels.tolist() == CLUSTERS[rows].tolist()
    classifier = LinearClassifier.from_bytes((run / "classifier" / "f" / MODEL_NAME).read_bytes())
    expected = classifier.predict_proba(FEATURES[rows])
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_fiftyone_gets_fields_embeddings_and_brain_keys(run: Path, tmp_path: Path) -> None:
    export_run(run, "fiftyone", tmp_path / "fo", quiet=True)
    samples = json.loads((tmp_path / "fo" / "samples.json").read_text())["samples"]
    assert [sample["image_id"] for sample in samples] == list(range(NUM_IMAGES))
    assert samples[8]["filepath"] == samples[8]["uri"]
    assert samples[8]["cluster"]["label"] == "2"
    assert samples[25]["agreement"] is None
    drawn = sorted(sample["_rand"] for sample in samples)  # by which FiftyOne shuffles: even within 0..1
    np.testing.assert_allclose(drawn, np.arange(NUM_IMAGES) / NUM_IMAGES, atol=1.5 / NUM_IMAGES)
    metadata = json.loads((tmp_path / "fo" / "metadata.json").read_text())
    assert set(metadata["brain_methods"]) == {"icce_map", "icce_similarity"}
    kinds = {field["name"]: field["ftype"].rpartition(".")[2] for field in metadata["sample_fields"]}
    assert (kinds["agreement"], kinds["is_outlier"], kinds["image_id"]) == ("FloatField", "BooleanField", "IntField")


def test_another_export_and_foreign_files_are_left_alone(run: Path, tmp_path: Path) -> None:
    export_run(run, "csv", tmp_path / "csv", quiet=True)
    with pytest.raises(InputError, match="holds another export"):
        export_run(run, "csv", tmp_path / "csv", clusters="1", quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="is not empty"):
        export_run(run, "csv", tmp_path / "mine", quiet=True)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "zip"], "--to zip: the formats are csv, folders"),
        (["--to", "csv", "--clusters", "3"], "there is no cluster 3; the last one is 2"),
        (["--to", "csv", "--clusters", "all"], "write numbers and ranges, such as 3,7-9"),
        (["--to", "csv", "--min-agreement", "1"], "no image is selected"),
        (["--to", "csv", "--clusters", "0-999999999999"], "a number has at most 6 digits"),
        (["--to", "csv", "--min-agreement", "70"], "--min-agreement 70: allowed is 0 to 1"),
    ],
)
def test_what_cannot_be_exported_is_named(
    run: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run), "--output", str(tmp_path / "x"), "--quiet", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_names_are_safe_and_unique() -> None:
    names = [file_name({"uri": uri, "image_id": 5}) for uri in ("../..", "/a/.hidden.png", "x" * 300 + ".png", "a/CON")]
    assert names == ["image-5", "hidden-5", "x" * 60 + "-5", "CON-5"]


def test_names_from_the_page_are_the_names_of_folders_and_classes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "out")
    writer = ArtifactWriter(Folder.at(tmp_path / "out" / "corrections" / "f"))
    named = [{"cluster": 0, "name": "../Cats & dogs"}, {"cluster": 1, "name": "2"}, {"cluster": 2, "name": None}]
    writer.write_bytes(APPLIED_NAME, json.dumps({"clusters": named}).encode())
    writer.commit(stage="corrections", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0)
    for file, part in (("runs/one.json", "stages"), ("assign/f/manifest.json", "inputs")):
        found = json.loads((tmp_path / "out" / file).read_text())
        found[part]["corrections"] = "f"
        (tmp_path / "out" / file).write_text(json.dumps(found))
    for to in ("folders", "huggingface", "fiftyone"):
        export_run(tmp_path / "out", to, tmp_path / to, quiet=True)
    folders = {path.name for path in (tmp_path / "folders").iterdir() if path.is_dir()}
    assert folders == {"cluster-0-Cats_dogs", "cluster-1-2", "cluster-2", "noise"}
    metadata = pq.read_schema(tmp_path / "huggingface" / "data" / "train-000000.parquet").metadata
    labels = ["../Cats & dogs", "2 (1)", "2 (2)"]
    assert json.loads(metadata[b"huggingface"])["info"]["features"]["cluster"]["names"] == labels
    samples = json.loads((tmp_path / "fiftyone" / "samples.json").read_text())["samples"]
    assert [sample["cluster"]["label"] for sample in samples[:4]] == [*labels, labels[0]]


def test_clusters_are_numbers_and_ranges() -> None:
    assert Selection.parse("9,3-5,4", None).clusters == (3, 4, 5, 9)
    assert Selection.parse(None, None).clusters is None


def test_datasets_reads_the_parquet(run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_run(run, "huggingface", tmp_path / "hub", quiet=True)
    loaded = datasets.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 29
    assert loaded.features["cluster"].names == ["0", "1", "2"]
    assert (loaded[5]["image"].size, loaded[5]["cluster"]) == ((6, 4), READABLE[5] % 3)


def test_webdataset_reads_the_shards(run: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    export_run(run, "webdataset", tmp_path / "tars", quiet=True)
    place = str(tmp_path / "tars" / "images-000000.tar")
    pipeline = webdataset.WebDataset(place, shardshuffle=False).decode("pil").to_tuple("png;jpg", "cls", "json")
    found = list(pipeline)
    assert [row["image_id"] for _, _, row in found] == READABLE
    assert [cluster for _, cluster, _ in found] == CLUSTERS[READABLE].tolist()
    assert found[0][0].size == (6, 4)


def test_cleanlab_finds_label_issues(run: Path, tmp_path: Path) -> None:
    cleanlab = pytest.importorskip("cleanlab")
    export_run(run, "cleanlab", tmp_path / "clean", quiet=True)
    labels, probabilities = (np.load(tmp_path / "clean" / f"{name}.npy") for name in ("labels", "pred_probs"))
    assert cleanlab.filter.find_label_issues(labels, probabilities).shape == (NUM_IMAGES - 1,)


@pytest.mark.parametrize("copy", [False, True])
def test_fiftyone_imports_the_dataset(run: Path, tmp_path: Path, copy: bool) -> None:
    """Needs a MongoDB, which FiftyOne starts or finds at FIFTYONE_DATABASE_URI."""
    fiftyone = pytest.importorskip("fiftyone")
    export_run(run, "fiftyone", tmp_path / "fo", copy=copy, quiet=True)
    try:
        dataset = fiftyone.Dataset.from_dir(
            dataset_dir=str(tmp_path / "fo"), dataset_type=fiftyone.types.FiftyOneDataset
        )
    except (fiftyone.core.config.FiftyOneConfigError, ConnectionError) as error:
        pytest.skip(f"no MongoDB here: {error}")
    sample = dataset.match({"image_id": 8}).first()
    assert (pixel(sample.filepath), sample.cluster.label, sample.is_outlier) == (8, "2", False)
    assert sample.filepath.startswith(str(tmp_path / "fo" / "data")) is copy
    np.testing.assert_allclose(sample.embedding, FEATURES[8])
    assert sample.agreement == pytest.approx(8 / 20)
    assert dataset.count_values("cluster.label") == {"0": 10, "1": 9 - copy, "2": 10, "noise": 1}
    dataset.compute_metadata(skip_failures=True, num_workers=1)
    assert dataset.match({"image_id": 8}).first().metadata.width == 6

    assert dataset.list_brain_runs() == ["icce_map", "icce_similarity"]
    in_map = dataset.load_brain_results("icce_map")
    assert in_map.points.shape == (len(dataset), 2)
    assert in_map.sample_ids.tolist() == dataset.values("id")
    similar = dataset.sort_by_similarity(sample.id, brain_key="icce_similarity", k=5).values("image_id")
    present = np.array(dataset.values("image_id"))
    unit_NE = FEATURES[present] / np.linalg.norm(FEATURES[present], axis=1, keepdims=True)
    assert similar == present[np.argsort(unit_NE @ unit_NE[present == 8][0])[:-6:-1]].tolist()
    dataset.delete()
