"""The stage around the work on items, which a fake does here: what a run, a retry and a resumed run embed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import Config, EmbeddingsConfig
from icce_ray.embed import embed_images, finished_parts, job
from icce_ray.embed.decode_and_embed import NOTHING_DECODED, decoded_to_table
from icce_ray.embed.embed_images import rewrite_embeddings
from icce_ray.embed.embedding_parts import PartRange, part_table, write_part
from icce_ray.embed.feature_matrix import load_features
from icce_ray.embed.part_hashes import hashes_name
from icce_ray.embed.work_items import OpenParts, join_items, joined
from icce_ray.errors import ConfigError, DamagedArtifactError, InputError, WorkerError
from icce_ray.images.listing import Entry, entry_tables, numbered
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder, PartRecords

NUM_IMAGES, IMAGES_PER_ITEM, ITEMS_PER_PART = 40, 4, 2


def commit(writer: ArtifactWriter, metrics: dict[str, Any]) -> Artifact:
    return writer.commit(stage="x", fingerprint="0", inputs={}, config={}, metrics=metrics, seconds=0.0)


class FakeEmbed:
    """Runs the stage at `root`. `bad` images fail; a run dies after `dies_after` items."""

    def __init__(self, root: Path) -> None:
        self.folder = Folder.at(root / "embed")
        self.records = PartRecords(self.folder, "source")
        self.bad: dict[int, str] = {}
        self.dies_after = NUM_IMAGES
        self.done: list[str] = []
        writer = ArtifactWriter(Folder.at(root / "images"))
        entries = [Entry(f"/{number}.png", 100, "now") for number in range(NUM_IMAGES)]
        writer.write_table("images-00000.parquet", numbered(pa.concat_tables(entry_tables(entries))))
        self.images = commit(writer, {})
        embed = {"backbone": "pixels", "image_size": 4, "max_error_rate": 1.0}
        self.config = Config(images={"uri": "x"}, num_clusters=2, output=str(root), embed=embed)

    def task(self, *arguments: Any) -> Any:
        plan = SimpleNamespace(names=["pixels"], dims=(3,), preprocessing=None)
        return SimpleNamespace(
            config=self.config, plan=plan, records=self.records, folders=[self.folder], reusable=lambda: []
        )

    def embed(self, task: Any, pending: OpenParts, on_batch: Any) -> Any:
        index: Any = SimpleNamespace(finish=lambda *values: None)
        return joined(self._items(pending), pending, partial(join_items, self.records, None, index))

    def _items(self, pending: OpenParts) -> Any:
        self.done = []
        for item in pending:
            if len(self.done) == self.dies_after:
                raise KeyboardInterrupt
            self.done.append(item.name)
            covered = item.only or range(item.start, item.stop)
            ids = np.array([i for i in covered if i not in self.bad], np.int64)
            hashes = pa.array([f"{image_id:064x}" for image_id in ids], pa.string())
            table = part_table(ids, np.repeat(ids[:, None], 3, axis=1).astype(np.float16), hashes)
            yield write_part(self.records, item, table, [(i, self.bad[i]) for i in covered if i in self.bad])

    def context(self) -> StageContext:
        progress: Any = SimpleNamespace(update=lambda *values, **named: None, note=lambda text: None)
        return StageContext(ArtifactWriter(self.folder), {"images": self.images}, progress)

    def run(self) -> Artifact:
        context = self.context()
        return commit(context.output, embed_images.run(self.config, context))

    def retry(self, artifact: Artifact) -> Any:
        return embed_images.retry(self.config, self.context(), artifact)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEmbed:
    found = FakeEmbed(tmp_path)
    monkeypatch.setattr(embed_images, "_task", found.task)
    monkeypatch.setattr(embed_images, "runs_here", lambda *values: True)
    monkeypatch.setattr(embed_images, "embed_here", found.embed)
    monkeypatch.setattr(embed_images, "images_per_item", lambda *values: IMAGES_PER_ITEM)
    monkeypatch.setattr(embed_images, "items_per_part", lambda *values: ITEMS_PER_PART)
    return found


def killed(*values: Any) -> Any:
    raise KeyboardInterrupt


def change_a_byte(folder: Folder, name: str) -> None:
    data = bytearray(folder.read_bytes(name))
    data[len(data) // 2] ^= 1
    folder.write_bytes(name, bytes(data))


def test_images_that_failed_are_tried_again_where_parts_have_several_items(fake: FakeEmbed) -> None:
    fake.bad = {3: "truncated", 21: "missing", 22: "missing"}
    artifact = fake.run()
    assert artifact.metrics["num_errors"] == 3
    fake.bad = {21: "missing"}
    metrics = fake.retry(artifact)
    assert fake.done == ["item-00000.r1", "item-00005.r1"]
    assert (metrics["num_images"], metrics["num_errors"]) == (39, 1)


def test_a_run_that_is_killed_at_its_end_embeds_nothing_again(fake: FakeEmbed, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.bad = {3: "truncated"}
    with monkeypatch.context() as patched:
        patched.setattr(finished_parts, "find_duplicates", killed)
        with pytest.raises(KeyboardInterrupt):
            fake.run()
    assert len(fake.done) == 10
    fake.done = []
    artifact = fake.run()
    assert fake.done == []
    assert not fake.records.read_all()
    fake.bad, fake.done = {}, []
    with monkeypatch.context() as patched:
        patched.setattr(finished_parts, "find_duplicates", killed)
        with pytest.raises(KeyboardInterrupt):
            fake.retry(artifact)
    assert fake.done == ["item-00000.r1"]
    fake.done = []
    assert fake.retry(artifact)["num_errors"] == 0
    assert fake.done == []


def test_a_part_that_is_found_damaged_at_the_end_is_made_again_by_the_next_run(
    fake: FakeEmbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(finished_parts, "find_duplicates", killed)
        with pytest.raises(KeyboardInterrupt):
            fake.run()
    change_a_byte(fake.folder, "part-00002.parquet")
    fake.folder.remove(hashes_name("part-00002.parquet"))
    with pytest.raises(DamagedArtifactError, match="part-00002"):
        fake.run()
    assert fake.run().metrics["num_images"] == NUM_IMAGES
    assert fake.done == ["item-00004", "item-00005"]


def test_an_item_that_was_damaged_is_made_again(fake: FakeEmbed) -> None:
    fake.dies_after = 5
    with pytest.raises(KeyboardInterrupt):
        fake.run()
    fake.dies_after = NUM_IMAGES
    change_a_byte(fake.folder, "item-00004.parquet")
    assert fake.run().metrics["num_images"] == NUM_IMAGES
    assert fake.done == [f"item-{number:05d}" for number in range(4, 10)]


def test_a_damaged_item_is_told_as_such_by_a_worker_that_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    def join(*values: Any) -> Any:
        raise DamagedArtifactError("item-00001.parquet: damaged")

    for name, replacement in (
        ("join_items", join),
        ("use_s3", lambda storage: None),
        ("_sharded", lambda shards: None),
    ):
        monkeypatch.setattr(job, name, replacement)
    task: Any = SimpleNamespace(config=SimpleNamespace(storage=None), records=None, draw=None)
    whole: Any = None
    (row,) = job._join(task, [], whole, []).to_pylist()
    with pytest.raises(DamagedArtifactError, match="item-00001"):
        job._from_row(row)


def test_ready_made_embeddings_are_not_read_again_after_a_kill_at_the_end(
    fake: FakeEmbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "rows.npy", np.ones((NUM_IMAGES, 3), np.float32))
    monkeypatch.setattr(finished_parts.Tally, "finish", lambda *values, **named: killed())
    with pytest.raises(KeyboardInterrupt):
        rewrite_embeddings(EmbeddingsConfig(uri=str(tmp_path / "rows.npy")), fake.context())
    assert (tmp_path / "embed" / "records" / "part-00000.json").exists()


def test_bad_rows_of_ready_made_embeddings_are_errors_up_to_the_limit(
    fake: FakeEmbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icce_ray.embed.embedding_parts.MAX_PART_ROWS", 16)
    first, second = np.random.default_rng(0).standard_normal((2, NUM_IMAGES, 3)).astype(np.float32)
    first[[0, 17], 1], second[[17, 39], 0] = np.nan, np.inf
    np.save(tmp_path / "first.npy", first)
    np.save(tmp_path / "second.npy", second)
    given = EmbeddingsConfig(uri=str(tmp_path / "first.npy"), extra=(str(tmp_path / "second.npy"),))
    with pytest.raises(InputError, match=r"2 of 40 images cannot be used .*max_error_rate \(0.049\).* 2 x NaN"):
        rewrite_embeddings(given, fake.context(), max_error_rate=0.049)
    context = fake.context()
    metrics = rewrite_embeddings(given, context, max_error_rate=0.1)
    artifact = commit(context.output, metrics)
    assert (metrics["num_images"], metrics["num_errors"]) == (37, 3)
    errors = artifact.read_table("errors.parquet").to_pylist()
    reason = "NaN, null or infinite values, as float32"
    assert [tuple(row.values()) for row in errors] == [
        (0, "/0.png", reason),
        (17, "/17.png", reason),
        (39, "/39.png", f"embeddings.extra[0]: {reason}"),
    ]
    good = [i for i in range(NUM_IMAGES) if i not in (0, 17, 39)]
    features = load_features(artifact, 1)
    assert features.image_ids.tolist() == good
    assert np.array_equal(features.matrix, second[good])


@pytest.mark.parametrize("step", ["decode", "embed"])
@pytest.mark.parametrize("kind", [ConfigError, WorkerError])
def test_an_error_in_a_worker_comes_back_as_it_is(kind: type[Exception], step: str) -> None:
    """Ray would raise it inside an error of its own."""
    error, part = kind("embed.weights: w.safetensors does not fit test_vit"), PartRange(0, 0, 8)

    def fail(*_: Any) -> None:
        raise error

    actor = object.__new__(job.Embedder)
    actor.task = SimpleNamespace(attempt=lambda *_: None)
    actor.embedder = SimpleNamespace(embed=fail)
    problem = job._to_text(error) if step == "decode" else ""
    row = actor(decoded_to_table(part, NOTHING_DECODED, problem)).to_pylist()[0]
    with pytest.raises(kind, match=r"^embed\.weights: w\.safetensors does not fit test_vit$"):
        job._from_row(row)
