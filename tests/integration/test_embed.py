"""The embed stage on a real Ray: equal to a plain loop, nothing lost, nothing twice, whoever is killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icce_ray.config import Config, ResourcesConfig
from icce_ray.embed import embed_images, embedding_parts, job, part_embedder, work_items
from icce_ray.embed.backbone_plan import plan_backbone
from icce_ray.embed.feature_matrix import feature_set_names, load_features
from icce_ray.embed.networks import build_backbone
from icce_ray.errors import InputError
from icce_ray.images import list_images
from icce_ray.images.decoding import decode_image
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder
from icce_ray.store.part_records import PartRecords

from .stages import run_embed, wait_for, without_ray, workers

REPOSITORY = Path(__file__).parents[2]
PIXELS = {"backbone": "pixels", "image_size": 8}


def build(config: Config, **options: Any) -> Any:
    return build_backbone(config.embed, config.seed, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 readable images of many sizes and kinds."""
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    """Of the module, or fixtures of the module would make larger parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_parts, "MIN_IMAGES_PER_ITEM", 8)
        yield


def write_photos(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        height, width = rng.integers(40, 120, size=2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{number:03d}.{('png', 'jpg', 'webp', 'gif')[number % 4]}")


def config_for(photos: Path, tmp_path: Path, *, num_workers: int = 1, **embed: Any) -> Config:
    """With no workers, for a run in this process."""
    return Config(
        output=str(tmp_path / "output"),
        num_clusters=2,
        images={"uri": str(photos)},
        embed=embed,
        resources={"embed": {"num_workers": num_workers, "cpus_per_worker": 1.0}} if num_workers else {},
    )


def run_stage(config: Config, folder: Path) -> Artifact:
    """The images stage and the embed stage, as the pipeline runs them."""
    inputs: dict[str, Artifact] = {}
    for name, stage in (("images", list_images), ("embed", embed_images)):
        writer = ArtifactWriter(Folder.at(folder / name))
        metrics = stage.run(config, StageContext(writer, inputs, Progress(name, quiet=True)))
        inputs[name] = writer.commit(
            stage=name, fingerprint="0" * 16, inputs={}, config={}, metrics=metrics, seconds=0.0
        )
    return inputs["embed"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "embed").glob("*.parquet"))}


@pytest.mark.slow
def test_several_backbones_in_one_pass_on_ray_give_what_plain_loops_and_passes_of_their_own_give(
    ray_cluster: None, photos: Path, tmp_path: Path
) -> None:
    bad = {"zero.jpg": b"", "text.png": b"not a picture", "cut.jpg": (photos / "001.jpg").read_bytes()[:200]}
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    shared = {"precision": "float32"}
    backbones = [
        {"backbone": "test_vit", "weights": "random", "image_size": 64, "features": "last4"},
        {"backbone": "pixels", "image_size": 8},
    ]
    artifact = run_stage(
        config_for(photos, tmp_path, **backbones[0], extra=backbones[1:], **shared), tmp_path / "together"
    )
    names = ["test_vit:last4", "pixels"]
    assert feature_set_names(artifact) == artifact.metrics["feature_sets"] == names
    assert list(artifact.metrics["dims"]) == [256, 192]
    errors = artifact.read_table("errors.parquet").to_pylist()
    reasons = {Path(row["uri"]).name: row["reason"] for row in errors}
    assert reasons == {"zero.jpg": "zero bytes", "text.png": "not an image", "cut.jpg": "truncated"}
    assert artifact.metrics["num_images"] == 30
    assert artifact.metrics["errors"] == {"zero bytes": 1, "not an image": 1, "truncated": 1}
    assert artifact.part_names("part-") == [f"part-{index:05d}.parquet" for index in range(5)]

    for index, own in enumerate(backbones):
        here = config_for(photos, tmp_path, num_workers=0, **own, **shared)
        backbone, preprocessing = build(here), plan_backbone(here.embed).preprocessing
        expected_ids, expected = [], []
        for image_id, path in enumerate(sorted(photos.iterdir())):
            pixels = decode_image(path.read_bytes(), preprocessing)
            if isinstance(pixels, np.ndarray):
                expected_ids.append(image_id)
                expected.append(backbone.embed(pixels[None])[0])
        together = load_features(artifact, index)
        assert together.image_ids.tolist() == expected_ids
        np.testing.assert_allclose(together.matrix, np.stack(expected), atol=2e-3)
        with without_ray():
            alone = run_stage(here, tmp_path / str(index))
        own_features = load_features(alone)
        assert np.array_equal(together.matrix, own_features.matrix)
        assert together.image_ids.tolist() == own_features.image_ids.tolist()
        assert together.name == own_features.name == names[index]
        assert alone.metrics["dim"] == artifact.metrics["dims"][index] == together.dim
        assert artifact.metrics["num_errors"] == alone.metrics["num_errors"] == 3


def test_a_run_takes_up_what_is_finished_and_redoes_the_rest_to_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "zero.png").touch()
    clear = PartRecords.clear
    monkeypatch.setattr(PartRecords, "clear", lambda records: None)  # as if the run had been killed before its end
    config = config_for(photos, tmp_path, num_workers=0, **PIXELS)
    run_stage(config, tmp_path / "run")
    undisturbed = content(tmp_path / "run")
    folder = tmp_path / "run" / "embed"
    (folder / "manifest.json").unlink()
    (folder / "part-00001.parquet").unlink()
    (folder / "part-00003.parquet").write_bytes(undisturbed["part-00003.parquet"][:500])
    (folder / f".part-00002.parquet.{'0a1b' * 8}").write_bytes(b"an unfinished write")
    before = {name: (folder / name).stat().st_mtime_ns for name in ("part-00000.parquet", "part-00002.parquet")}
    monkeypatch.setattr(PartRecords, "clear", clear)
    artifact = run_stage(config, tmp_path / "run")
    assert not list((folder / "records").glob("*"))
    assert not list(folder.glob(".part-*"))
    assert content(tmp_path / "run") == undisturbed
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert artifact.metrics["num_images"] == 30


def test_more_errors_than_allowed_stop_the_stage_and_its_workers(
    ray_cluster: None, photos: Path, tmp_path: Path
) -> None:
    for number in range(0, 30, 2):
        next(photos.glob(f"{number:03d}.*")).write_bytes(b"no picture")
    config = config_for(photos, tmp_path, **PIXELS)
    with pytest.raises(
        InputError, match=r"of 30 images.*embed\.max_error_rate \(0\.1\).* x not an image \(such as .*photos"
    ):
        run_stage(config, tmp_path / "run")
    wait_for(lambda: not workers("Embedder"))
    kept = content(tmp_path / "run")
    with without_ray():
        patient = config_for(photos, tmp_path, num_workers=0, max_error_rate=0.6, **PIXELS)
        artifact = run_stage(patient, tmp_path / "run")
    assert artifact.metrics["num_errors"] == 15
    assert kept.items() <= content(tmp_path / "run").items()


@pytest.mark.slow
def test_killed_workers_change_nothing(ray_cluster: None, photos: Path, tmp_path: Path) -> None:
    """A process is killed (-9) within the part that it decodes, and the actor that embeds after its first part. In the
    middle of one it dies in the next test. The part is decoded again meanwhile, so that the actor is still there."""
    Image.new("L", (9000, 9000)).save(photos / "017.png")  # takes a second to decode
    with without_ray():
        run_stage(config_for(photos, tmp_path, num_workers=0, **PIXELS), tmp_path / "undisturbed")
    folder = tmp_path / "run" / "embed"
    killed: dict[str, list[int]] = {}

    def kill(task: str) -> None:
        killed[task] = workers(task)
        for pid in killed[task]:
            os.kill(pid, signal.SIGKILL)

    def disturb() -> None:
        wait_for((folder / ".part-00002.decode").exists, poll_s=0.005)
        kill("decode")
        wait_for(lambda: any(folder.glob("part-*.parquet")), poll_s=0.005)
        kill("Embedder")

    with ThreadPoolExecutor(1) as threads:
        disturbed = threads.submit(disturb)
        artifact = run_stage(config_for(photos, tmp_path, **PIXELS), tmp_path / "run")
        disturbed.result()
    assert killed["decode"]
    assert killed["Embedder"]
    assert content(tmp_path / "run") == content(tmp_path / "undisturbed")
    assert load_features(artifact).num_images == 31
    assert not list(folder.glob(".part-*"))


DEADLY = """
import os, signal
from PIL import Image, PpmImagePlugin  # which registers itself when it is imported
from icce_ray.embed.networks import PixelsBackbone

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

Image.register_open("PPM", die, lambda prefix: prefix.startswith(b"DEADLY"))
embed = PixelsBackbone.embed

def deadly_embed(self, images):
    return die() if (images == (255, 0, 255)).all(axis=(1, 2, 3)).any() else embed(self, images)

PixelsBackbone.embed = deadly_embed
"""
RUN = """
import argparse, sys, time
import icce_ray.run as run
from icce_ray.pipeline import run as pipeline
from icce_ray.config import load_config

class Watched(run._WithoutRay):
    said = ""
    def write(self, text):
        Watched.said += text
        return super().write(text)

def command(arguments):
    config = load_config(sys.argv[1])
    artifacts = {}
    for step in pipeline.plan(config)[:2]:
        artifacts[step.name] = pipeline.run_stage(config, step, artifacts, True)
    deadline = time.monotonic() + 200
    while "ray" in sys.modules and "worker died" not in Watched.said and time.monotonic() < deadline:
        time.sleep(0.1)
    told = "worker died" in Watched.said
    open(sys.argv[2], "w").write(f"{artifacts['embed'].folder.uri} {'ray' in sys.modules} {told}")
    return ""

run._WithoutRay = Watched
sys.exit(run.guarded(command, argparse.Namespace(debug=False)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("on_ray", [True, False])
def test_images_that_kill_their_workers_are_isolated_and_the_others_embedded(
    photos: Path, tmp_path: Path, on_ray: bool
) -> None:
    """One file kills (-9) the process that decodes it. On Ray, the pixels of another kill the actor that embeds them;
    it has a single CPU, half for the actor and half for who feeds it; and what it says of dead workers is kept from the
    user of a command. The code that kills is loaded by every Python process of this run. Without Ray, the script has no
    guard for processes that would run it again."""
    deadly = ["012a.png", "020a.png"] if on_ray else ["012a.png"]
    (photos / "012a.png").write_bytes(b"DEADLY to decoders")
    if on_ray:
        Image.new("RGB", (9, 9), (255, 0, 255)).save(photos / "020a.png")
    (tmp_path / "deadly").mkdir()
    (tmp_path / "deadly" / "sitecustomize.py").write_text(DEADLY)
    (tmp_path / "script.py").write_text(RUN)
    config = config_for(photos, tmp_path, **PIXELS)
    resources = config.resources.model_copy(update={"num_cpus": 1}) if on_ray else ResourcesConfig()
    config = config.model_copy(update={"resources": resources})
    (tmp_path / "run.yaml").write_text(config.model_dump_json(exclude={"storage"}))
    paths = os.pathsep.join([str(tmp_path / "deadly"), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run.yaml"), str(tmp_path / "place")],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    place, used_ray, told_of_deaths = (tmp_path / "place").read_text().split()
    assert used_ray == told_of_deaths == str(on_ray)
    artifact = Artifact.find(Folder.at(place))
    assert artifact is not None
    errors = {Path(row["uri"]).name: row["reason"] for row in artifact.read_table("errors.parquet").to_pylist()}
    assert errors == dict.fromkeys(deadly, "killed its worker")
    features = load_features(artifact)
    preprocessing, backbone = plan_backbone(config.embed).preprocessing, build(config)
    good = [path for path in sorted(photos.iterdir()) if path.name not in errors]
    for row, path in zip(features.matrix, good, strict=True):
        pixels = decode_image(path.read_bytes(), preprocessing)
        assert isinstance(pixels, np.ndarray)
        assert np.array_equal(row, backbone.embed(pixels[None])[0])


def test_the_same_bytes_are_embedded_once_in_a_collection_and_across_runs(
    ray_cluster: None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for copy, original in (("003b.jpg", "001.jpg"), ("029b.jpg", "001.jpg"), ("900.png", "028.png")):
        (photos / copy).write_bytes((photos / original).read_bytes())
    with without_ray():
        first = run_embed(config_for(photos, tmp_path, num_workers=0, **PIXELS))
    assert first.metrics["num_embedded"] == 30
    assert first.metrics["num_duplicates"] == 3
    rows = first.read_table("duplicates.parquet").to_pylist()
    names = [path.name for path in sorted(photos.iterdir())]
    assert [(names[row["image_id"]], names[row["duplicate_of"]]) for row in rows] == [
        ("003b.jpg", "001.jpg"), ("029b.jpg", "001.jpg"), ("900.png", "028.png"),
    ]  # fmt: skip
    matrix = dict(zip(names, load_features(first).matrix, strict=True))

    monkeypatch.setattr(embedding_parts, "MIN_IMAGES_PER_ITEM", 7)
    monkeypatch.setattr(embedding_parts, "PARTS_WANTED", 2)
    # Another listing, numbered anew and cut into other parts, of two work items each, which Ray Data is given some at a
    # time: only what is new goes through the backbone.
    monkeypatch.setattr(job, "ITEMS_PER_WAVE", 3)
    limits = watched_limits(monkeypatch)
    Image.new("RGB", (30, 20), (9, 90, 200)).save(photos / "000a.png")
    second = run_embed(config_for(photos, tmp_path, num_workers=2, **PIXELS))
    assert second.metrics["num_embedded"] == 1
    assert len(limits) == 2  # waves
    assert all(options.resource_limits.object_store_memory > at_start for options, at_start in limits)
    assert second.part_names("part-") == [f"part-{index:05d}.parquet" for index in range(3)]
    assert [name for name in second.folder.sizes() if name.startswith(("item-", ".item-", "records/"))] == []
    again = dict(zip([path.name for path in sorted(photos.iterdir())], load_features(second).matrix, strict=True))
    assert all(np.array_equal(again[name], row) for name, row in matrix.items())

    # Another preprocessing is another model.
    with without_ray():
        other = run_embed(config_for(photos, tmp_path, num_workers=0, **PIXELS | {"image_size": 9}))
    assert other.metrics["num_embedded"] == 31


def watched_limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """The options of each execution by Ray Data, and the limit of decoded bytes at its start. CPUs keep joining."""
    from ray.data._internal.execution.interfaces.executor import Executor

    watched, cpus, init = list[tuple[Any, float]](), itertools.count(2), Executor.__init__

    def begin(self: Any, options: Any) -> None:
        watched.append((options, options.resource_limits.object_store_memory))
        init(self, options)

    monkeypatch.setattr(Executor, "__init__", begin)
    monkeypatch.setattr(job, "available_cpus", lambda: next(cpus))
    monkeypatch.setattr(job, "LIMITS_S", 0.0)
    return watched


@pytest.mark.parametrize("num_written", [1, 3, 4])
def test_a_run_killed_at_any_work_item_is_followed_by_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_written: int
) -> None:
    """A part of four work items and one of a single item; the run ends between the items, or while they are joined."""
    (photos / "000a.png").write_bytes((photos / "000.png").read_bytes()[:200])
    monkeypatch.setattr(embedding_parts, "MIN_IMAGES_PER_ITEM", 7)
    monkeypatch.setattr(embedding_parts, "PARTS_WANTED", 1)
    config = config_for(photos, tmp_path, num_workers=0, **PIXELS)
    with without_ray():
        undisturbed = run_stage(config, tmp_path / "undisturbed")
    assert undisturbed.num_rows("part-").tolist() == [27, 3]
    names: list[str] = []

    def dying(records: PartRecords, part: embedding_parts.PartRange, *values: Any, **counts: Any) -> Any:
        names.append(part.name)
        if len(names) > num_written:
            raise KeyboardInterrupt
        return embedding_parts.write_part(records, part, *values, **counts)

    with pytest.MonkeyPatch.context() as patch:
        for module in (part_embedder, work_items):
            patch.setattr(module, "write_part", dying)
        with without_ray(), pytest.raises(KeyboardInterrupt):
            run_stage(config, tmp_path / "run")
    assert len(list((tmp_path / "run" / "embed").glob("item-*.parquet"))) == num_written
    with without_ray():
        artifact = run_stage(config, tmp_path / "run")
    assert artifact.metrics["num_embedded"] == 30
    assert content(tmp_path / "run") == content(tmp_path / "undisturbed")
    assert not list((tmp_path / "run" / "embed").glob("item-*"))


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_ready_made_embeddings_become_the_same_artifact_in_the_same_order(tmp_path: Path, form: str) -> None:
    import pyarrow as pa

    rows = np.random.default_rng(0).standard_normal((500, 12)).astype(np.float32)
    if form == "npy":
        np.save(tmp_path / "e.npy", rows)
    else:
        pq.write_table(pa.table({"e": list(rows)}), tmp_path / "e.parquet")
    config = Config(output=str(tmp_path), num_clusters=2, embeddings={"uri": str(tmp_path / f"e.{form}")})
    artifact = run_stage(config, tmp_path / "run")
    features = load_features(artifact)
    assert np.array_equal(features.matrix, rows)
    assert features.matrix.dtype == np.float32
    assert features.image_ids.tolist() == list(range(500))
    assert artifact.read_table("errors.parquet").num_rows == 0
    assert artifact.read_table("part-00000.parquet")["content_hash"].null_count == 500


def test_ready_made_embeddings_are_taken_up_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartRecords, "clear", lambda records: None)
    monkeypatch.setattr("icce_ray.embed.embedding_parts.MAX_PART_ROWS", 64)
    np.save(tmp_path / "e.npy", np.random.default_rng(0).standard_normal((500, 12)).astype(np.float16))
    config = Config(output=str(tmp_path), num_clusters=2, embeddings={"uri": str(tmp_path / "e.npy")})
    run_stage(config, tmp_path / "run")
    undisturbed = content(tmp_path / "run")
    assert len(undisturbed) == 8 + 3
    for name in ("part-00002.parquet", "part-00003.parquet", "part-00007.parquet"):
        (tmp_path / "run" / "embed" / name).unlink()
    before = (tmp_path / "run" / "embed" / "part-00005.parquet").stat().st_mtime_ns
    artifact = run_stage(config, tmp_path / "run")
    assert content(tmp_path / "run") == undisturbed
    assert (tmp_path / "run" / "embed" / "part-00005.parquet").stat().st_mtime_ns == before
    assert np.array_equal(load_features(artifact).matrix, np.load(tmp_path / "e.npy"))
