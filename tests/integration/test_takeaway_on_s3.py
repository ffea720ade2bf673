"""What users take away, on a bucket: the newest run as copies, and exports."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import icce_ray
from icce_ray.config import Config, StorageConfig
from icce_ray.export.export_run import export_run
from icce_ray.store import Folder
from icce_ray.store.s3 import use_s3
from tests.unit.export.test_export_run import READABLE, run  # noqa: F401  # a fixture
from tests.unit.pipeline.test_latest import publish_run

from .storage_server import ACCESS_KEY, SECRET_KEY, client, moto_server

OUTPUT = "s3://results/clusters"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with moto_server() as url, pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        client(url).create_bucket(Bucket="results")
        use_s3(StorageConfig(endpoint=url, access_key=ACCESS_KEY, secret_key=SECRET_KEY))
        yield client(url)
        use_s3(Config(images={"uri": "x"}, num_clusters=2, output="x").storage)


def keys(bucket: Any, prefix: str) -> dict[str, bytes]:
    listed = bucket.list_objects_v2(Bucket="results", Prefix=prefix)["Contents"]
    return {
        entry["Key"].removeprefix(prefix): bucket.get_object(Bucket="results", Key=entry["Key"])["Body"].read()
        for entry in listed
    }


def test_the_newest_run_is_copied_and_nothing_of_the_one_before_stays(bucket: Any) -> None:
    for name, num_parts in (("one", 1), ("second", 3), ("one", 1), ("second", 3)):
        places = publish_run(OUTPUT, name, num_parts=num_parts)
        assert places["report"] == f"{OUTPUT}/latest/report"
        found = keys(bucket, "clusters/latest/")
        assert found["report/report.html"] == name.encode()
        table = pq.read_table(io.BytesIO(found["assignments.parquet"]))
        assert table["cluster"].to_pylist() == [len(name)] * 3 * num_parts
        assert icce_ray.load(OUTPUT).description["name"] == name
        assert icce_ray.load(f"{OUTPUT}/latest/model").description["name"] == name
        tables = [key for key in found if "/parts-" in key]
        assert [key.split("/")[0] for key in sorted(tables)] == ["model", "report"]
        of_all = [key for key in found if key.startswith("all_images/")]
        assert {re.findall("source=([^/]+)/", key)[0] for key in of_all} == {name}
        assert set(found) - set(tables) - set(of_all) == {
            "assignments.parquet",
            "report/report.html",
            "report/data/pictures.bin",
            "report/manifest.json",
            "model/classifier.json",
            "model/classifier.safetensors",
            "model/manifest.json",
            "summary.json",
        }


def test_exports_go_to_a_bucket(bucket: Any, run: Path) -> None:  # noqa: F811
    for to in ("csv", "folders", "webdataset", "cleanlab", "fiftyone", "huggingface"):
        export_run(run, to, f"s3://results/{to}", quiet=True)
    assert keys(bucket, "csv/")["assignments.csv"].count(b"\n") == 31
    sorted_by_cluster = keys(bucket, "folders/")
    assert len([name for name in sorted_by_cluster if name.startswith(("cluster-", "noise/"))]) == len(READABLE)
    assert sorted_by_cluster["manifest.csv"].count(b"\n") == len(READABLE) + 1
    shards = keys(bucket, "webdataset/")
    assert set(shards) == {"images-000000.tar", "export.json"}
    with tarfile.open(fileobj=io.BytesIO(shards["images-000000.tar"])) as tar:
        assert len(tar.getnames()) == 3 * len(READABLE)
    assert set(keys(bucket, "cleanlab/")) == {"labels.npy", "pred_probs.npy", "images.csv", "export.json"}
    assert Folder.at("s3://results/cleanlab").size("labels.npy") == 29 * 8 + 128
    fiftyone = keys(bucket, "fiftyone/")
    assert set(fiftyone) == {
        "samples.json", "metadata.json", "brain/icce_map.json", "brain/icce_similarity.json", "export.json"
    }  # fmt: skip
    assert len(json.loads(fiftyone["samples.json"])["samples"]) == 30
    (name,) = (name for name in keys(bucket, "huggingface/") if name.endswith(".parquet"))
    table = pq.read_table(io.BytesIO(keys(bucket, "huggingface/")[name]))
    assert len(table) == len(READABLE)
    assert sorted(len(image["bytes"]) > 0 for image in table["image"].to_pylist()) == [True] * len(READABLE)


def test_fiftyone_gets_copies_of_images_on_a_bucket(bucket: Any, run: Path) -> None:  # noqa: F811
    export_run(run, "fiftyone", "s3://results/fiftyone-copies", copy=True, quiet=True)
    found = keys(bucket, "fiftyone-copies/")
    files = [sample["filepath"] for sample in json.loads(found["samples.json"])["samples"]]
    assert len(files) == len(READABLE)
    assert set(files) < set(found)
