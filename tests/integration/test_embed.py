"""The embed stage on a real Ray: equal to a plain loop, nothing lost, nothing twice, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.embed import job, listing
from icce_ray.embed.backbone import make_backbone, plan_backbone
from icce_ray.embed.features import feature_set_names, load_features
from icce_ray.embed.images import decode_image
from icce_ray.errors import ConfigError, InputError, WorkerError
from icce_ray.progress import Progress
from icce_ray.store import Artifact, ArtifactWriter, Folder

PIXELS = {"backbone": "pixels", "image_size": 8, "images_per_part": 8}
VIT = {"backbone": "test_vit", "weights": "random", "image_size": 64, "images_per_part": 8, "batch_size": 5}
VIT |= {"precision": "float32"}  # whose rounding does not depend on the batch so much
SLOW_VIT = {"backbone": "vit_tiny_patch16_224", "weights": "random", "image_size": 160, "images_per_part": 6}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 readable images of many sizes and kinds."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        height, width = rng.integers(40, 120, size=2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{number:03d}.{('png', 'jpg', 'webp', 'gif')[number % 4]}")
    return folder


def config_for(photos: Path, tmp_path: Path, *, num_workers: int = 1, **embed: Any) -> Config:
    return Config(
        output=str(tmp_path / "output"),
        num_clusters=2,
        images={"uri": str(photos)},
        embed=embed,
        resources={"embed": {"num_workers": num_workers, "cpus_per_worker": 1.0}},
    )


def run_stage(config: Config, folder: Path) -> Artifact:
    """The images stage and the embed stage, as the pipeline runs them."""
    inputs: dict[str, Artifact] = {}
    for name, stage in (("images", listing), ("embed", job)):
        writer = ArtifactWriter(Folder.at(folder / name))
        metrics = stage.run(config, StageContext(writer, inputs, Progress(name, quiet=True)))
        inputs[name] = writer.commit(
            stage=name, fingerprint="0" * 16, inputs={}, config={}, metrics=metrics, seconds=0.0
        )
    return inputs["embed"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "embed").glob("*.parquet"))}


@pytest.mark.parametrize("embed", [PIXELS, pytest.param(VIT, marks=pytest.mark.slow)])
def test_the_stage_gives_what_a_plain_loop_over_the_files_gives(
    ray_cluster: None, photos: Path, tmp_path: Path, embed: dict[str, Any]
) -> None:
    bad = {"zero.jpg": b"", "text.png": b"not a picture", "cut.jpg": (photos / "001.jpg").read_bytes()[:200]}
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    config = config_for(photos, tmp_path, num_workers=2, **embed)
    artifact = run_stage(config, tmp_path / "run")

    backbone, preprocessing = make_backbone(config), plan_backbone(config.embed).preprocessing
    expected_ids, expected = [], []
    for image_id, path in enumerate(sorted(photos.iterdir())):
        pixels = decode_image(path.read_bytes(), preprocessing)
        if isinstance(pixels, np.ndarray):
            expected_ids.append(image_id)
            expected.append(backbone.embed(pixels[None])[0])
    features = load_features(artifact)
    assert features.image_ids.tolist() == expected_ids
    np.testing.assert_allclose(features.matrix, np.stack(expected), atol=2e-3)

    errors = artifact.read_table("errors.parquet").to_pylist()
    reasons = {Path(row["uri"]).name: row["reason"] for row in errors}
    assert reasons == {"zero.jpg": "zero bytes", "text.png": "not an image", "cut.jpg": "truncated"}
    assert artifact.metrics["num_images"] == 30
    assert artifact.metrics["errors"] == {"zero bytes": 1, "not an image": 1, "truncated": 1}
    assert artifact.metrics["dim"] == features.dim
    assert artifact.part_names("part-") == [f"part-{index:05d}.parquet" for index in range(5)]


@pytest.mark.slow
def test_several_backbones_in_one_pass_give_what_each_gives_alone(
    ray_cluster: None, photos: Path, tmp_path: Path
) -> None:
    (photos / "zero.jpg").touch()
    shared = {"images_per_part": 8, "precision": "float32"}
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
    for index, backbone in enumerate(backbones):
        alone = run_stage(config_for(photos, tmp_path, **backbone, **shared), tmp_path / str(index))
        expected, together = load_features(alone), load_features(artifact, index)
        assert np.array_equal(together.matrix, expected.matrix)
        assert together.image_ids.tolist() == expected.image_ids.tolist()
        assert together.name == expected.name == names[index]
        assert artifact.metrics["num_errors"] == alone.metrics["num_errors"] == 1


def test_a_run_takes_up_what_is_finished_and_redoes_the_rest_to_the_same_bytes(
    ray_cluster: None, photos: Path, tmp_path: Path
) -> None:
    (photos / "zero.png").touch()
    config = config_for(photos, tmp_path, **PIXELS)
    run_stage(config, tmp_path / "run")
    undisturbed = content(tmp_path / "run")
    folder = tmp_path / "run" / "embed"
    (folder / "manifest.json").unlink()
    (folder / "part-00001.parquet").unlink()
    (folder / "part-00003.parquet").write_bytes(undisturbed["part-00003.parquet"][:500])
    (folder / ".part-00002.parquet.0a1b2c").write_bytes(b"an unfinished write")
    before = {name: (folder / name).stat().st_mtime_ns for name in ("part-00000.parquet", "part-00002.parquet")}
    artifact = run_stage(config, tmp_path / "run")
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
        InputError, match=r"of 30 images.*embed\.max_error_rate \(0\.1\).* x not an image \(such as .*000"
    ):
        run_stage(config, tmp_path / "run")
    wait_for(lambda: not embedders())
    kept = content(tmp_path / "run")
    artifact = run_stage(
        config.model_copy(update={"embed": config.embed.model_copy(update={"max_error_rate": 0.6})}), tmp_path / "run"
    )
    assert artifact.metrics["num_errors"] == 15
    assert kept.items() <= content(tmp_path / "run").items()


@pytest.mark.slow
def test_a_backbone_that_fails_in_the_worker_comes_back_as_the_users_own_error(
    ray_cluster: None, photos: Path, tmp_path: Path
) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    config = config_for(photos, tmp_path, **VIT | {"weights": str(tmp_path / "w.safetensors")})
    with pytest.raises(ConfigError, match=r"embed\.weights: .* does not fit test_vit"):
        run_stage(config, tmp_path / "run")


@pytest.mark.slow
def test_killing_a_worker_changes_nothing(ray_cluster: None, photos: Path, tmp_path: Path) -> None:
    config = config_for(photos, tmp_path, **SLOW_VIT)
    run_stage(config, tmp_path / "undisturbed")
    folder = tmp_path / "run" / "embed"

    def when() -> bool:
        return len(list(folder.glob("part-*.parquet"))) in (1, 2, 3)

    killed: list[int] = []
    with killing(when, limit=1, killed=killed):
        artifact = run_stage(config, tmp_path / "run")
    assert len(killed) == 1
    assert content(tmp_path / "run") == content(tmp_path / "undisturbed")
    assert load_features(artifact).num_images == 30
    assert not list(folder.glob(".*.tries"))


@pytest.mark.slow
def test_a_part_that_kills_every_worker_ends_the_stage_and_keeps_the_rest(
    ray_cluster: None, photos: Path, tmp_path: Path
) -> None:
    config = config_for(photos, tmp_path, **SLOW_VIT)
    run_stage(config, tmp_path / "undisturbed")
    folder = tmp_path / "run" / "embed"
    note = folder / ".part-00003.parquet.tries"
    killed: list[int] = []

    def when() -> bool:
        return note.exists() and json.loads(note.read_bytes())[1] > len(killed)

    with (
        killing(when, limit=10, killed=killed),
        pytest.raises(WorkerError, match="images 18 to 23 killed their worker 3 times"),
    ):
        run_stage(config, tmp_path / "run")
    assert len(killed) == 3
    wait_for(lambda: not embedders())
    run_stage(config, tmp_path / "run")
    assert content(tmp_path / "run") == content(tmp_path / "undisturbed")


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
    monkeypatch.setattr("icce_ray.embed.parts.READY_MADE_PART_ROWS", 64)
    np.save(tmp_path / "e.npy", np.random.default_rng(0).standard_normal((500, 12)).astype(np.float16))
    config = Config(output=str(tmp_path), num_clusters=2, embeddings={"uri": str(tmp_path / "e.npy")})
    run_stage(config, tmp_path / "run")
    undisturbed = content(tmp_path / "run")
    assert len(undisturbed) == 8 + 1
    for name in ("part-00002.parquet", "part-00003.parquet", "part-00007.parquet"):
        (tmp_path / "run" / "embed" / name).unlink()
    before = (tmp_path / "run" / "embed" / "part-00005.parquet").stat().st_mtime_ns
    artifact = run_stage(config, tmp_path / "run")
    assert content(tmp_path / "run") == undisturbed
    assert (tmp_path / "run" / "embed" / "part-00005.parquet").stat().st_mtime_ns == before
    assert np.array_equal(load_features(artifact).matrix, np.load(tmp_path / "e.npy"))


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def embedders() -> list[int]:
    """Processes of this test's Ray that are embedding actors."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes()
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if title.startswith(b"ray::") and b"Embedder" in title:
            found.append(int(entry.name))
    return [pid for pid in found if _descends_from_us(pid, parents)]


def _descends_from_us(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid > 1:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


@contextmanager
def killing(when: Callable[[], bool], limit: int, killed: list[int]) -> Iterator[None]:
    """In the background: kill -9 the embedding actors whenever `when` holds, each once, at most `limit` of them; their
    process ids go into `killed`."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002) and len(killed) < limit:
            if not when():
                continue
            for pid in embedders():
                if pid not in killed and len(killed) < limit and when():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
