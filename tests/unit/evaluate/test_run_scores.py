from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_rand_score

from icce_ray.config import Config
from icce_ray.embed.embedding_parts import part_table
from icce_ray.evaluate import labels, run_scores
from icce_ray.evaluate.labels import TrueLabels
from icce_ray.evaluate.run_scores import evaluate, run
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

TRUE = np.repeat([0, 1, 2], 20)
CLUSTERS = (TRUE + 1) % 3
LABELS = TrueLabels(np.arange(len(TRUE)), TRUE, ("a", "b", "c"))


def test_the_metrics_are_those_of_the_assigned_clusters_and_of_each_head() -> None:
    clusters = CLUSTERS.copy()
    clusters[:6] = clusters[-1]
    heads = np.stack([clusters, CLUSTERS, np.zeros(60, dtype=int)])
    metrics = evaluate(LABELS, clusters, np.ones(60), heads, np.array([0.2, 0.3, 0.1]))
    assert metrics["acc"] == pytest.approx(54 / 60)
    assert metrics["ari"] == pytest.approx(adjusted_rand_score(TRUE, clusters))
    assert metrics["head_acc_best"] == 1.0
    assert metrics["head_acc_lowest_loss"] == pytest.approx(1 / 3)
    assert metrics["head_acc_mean"] == pytest.approx((0.9 + 1 + 1 / 3) / 3)
    assert metrics["num_classes"] == 3


def test_agreement_that_knows_is_seen_in_the_halves() -> None:
    clusters = CLUSTERS.copy()
    wrong = np.arange(0, 60, 5)
    clusters[wrong] = (clusters[wrong] + 1) % 3
    agreement = np.full(60, 0.9)
    agreement[wrong] = 0.3
    metrics = evaluate(LABELS, clusters, agreement, CLUSTERS[None], np.zeros(1))
    assert metrics["acc_high_agreement"] == 1.0
    assert metrics["acc_low_agreement"] == pytest.approx(18 / 30)


def test_images_outside_the_consensus_and_heads_without_labels_are_left_out() -> None:
    agreement = np.where(np.arange(60) % 2, np.nan, 0.5)
    heads = np.stack([np.where(np.arange(60) % 2, -1, CLUSTERS), np.full(60, -1)])
    metrics = evaluate(LABELS, CLUSTERS, agreement, heads, np.array([0.5, 0.1]))
    assert metrics["head_acc_best"] == metrics["head_acc_mean"] == metrics["head_acc_lowest_loss"] == 1.0
    assert metrics["acc_high_agreement"] == 1.0
    nobody = evaluate(LABELS, CLUSTERS, np.full(60, np.nan), np.full((2, 60), -1), np.zeros(2))
    assert "acc_high_agreement" not in nobody
    assert "head_acc_best" not in nobody


def planted(root: Path, labels: str | None) -> tuple[Config, StageContext]:
    config = Config.model_validate(
        {"images": {"uri": "/i"}, "output": str(root), "num_clusters": 3, "evaluate": {"labels": labels}}
    )
    inputs: dict[str, Artifact] = {}

    def commit(writer: ArtifactWriter, stage: str) -> None:
        inputs[stage] = writer.commit(stage=stage, fingerprint=stage, inputs={}, config={}, metrics={}, seconds=0)

    writer = ArtifactWriter(Folder.at(root / "images"))
    uris = [f"/i/{'abc'[label]}/{number}.png" for number, label in enumerate(TRUE)]
    writer.write_table("images.parquet", pa.table({"image_id": range(60), "uri": uris}))
    commit(writer, "images")
    # The first image failed: rows are not image ids.
    writer = ArtifactWriter(Folder.at(root / "assign"))
    for name, rows in (
        ("assignments/part-00000.parquet", slice(1, 30)),
        ("assignments/part-00001.parquet", slice(30, 60)),
    ):
        agreement = pa.array([None, *np.ones(60)[rows][1:]], pa.float32())
        ids = np.arange(60)[rows]
        table = pa.table({"image_id": ids, "cluster": CLUSTERS[rows].astype(np.int32), "agreement": agreement})
        writer.write_table(name, table)
    commit(writer, "assign")
    writer = ArtifactWriter(Folder.at(root / "method"))
    writer.write_array("label_matrix.npy", np.stack([CLUSTERS[1:]] * 2).astype(np.int32))
    writer.write_json("clusterings.json", {"losses": [0.1, 0.2]})
    commit(writer, "method")
    writer = ArtifactWriter(Folder.at(root / "consensus"))
    writer.write_array("labels.npy", CLUSTERS[1:].astype(np.int32))
    commit(writer, "consensus")
    features = np.eye(3, 5, dtype=np.float32)[CLUSTERS] + np.random.default_rng(0).normal(0, 0.1, (60, 5))
    writer = ArtifactWriter(Folder.at(root / "embed"))
    writer.write_table("part-00000.parquet", part_table(np.arange(1, 60), features[1:].astype(np.float32)))
    commit(writer, "embed")
    output = ArtifactWriter(Folder.at(root / "evaluate"))
    return config, StageContext(output, inputs, Progress("evaluate", quiet=True))


def test_the_stage_compares_the_assignments_with_the_labels(tmp_path: Path) -> None:
    config, context = planted(tmp_path, "folder")
    metrics = run(config, context)
    assert [metrics[key] for key in ("acc", "nmi", "ari", "many_to_one")] == pytest.approx([1.0] * 4)
    assert '"acc": 1.0' in context.output.folder.read_bytes("metrics.json").decode()


def test_labels_of_some_images_score_these_and_their_heads(tmp_path: Path) -> None:
    named = [3, 17, 31, 40, 59]
    rows = "\n".join(f"{number}.png,{TRUE[number % 60]}" for number in [0, *named, 100])
    (tmp_path / "labels.csv").write_text(f"uri,label\n{rows}\n")
    config, context = planted(tmp_path, str(tmp_path / "labels.csv"))
    of_names = config.evaluate.model_copy(update={"uri_column": "uri"})
    metrics = run(config.model_copy(update={"evaluate": of_names}), context)
    table = pq.read_table(tmp_path / "evaluate" / "labels.parquet")
    assert table["image_id"].to_pylist() == named
    assert [int(label) for label in table["label"].to_pylist()] == TRUE[named].tolist()
    assert (metrics["num_labelled"], metrics["acc"], metrics["head_acc_best"]) == (5, 1.0, 1.0)


def test_of_many_images_a_sample_drawn_by_their_ids_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_scores, "MAX_SCORED", 12)
    config, context = planted(tmp_path, "folder")
    metrics = run(config, context)
    ids = pq.read_table(tmp_path / "evaluate" / "labels.parquet")["image_id"].to_pylist()
    assert 4 < len(ids) == metrics["num_labelled"] < 25
    assert ids == sorted(set(ids))
    assert metrics["acc"] == metrics["head_acc_best"] == 1.0


def test_the_few_images_with_a_label_are_all_found_among_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_scores, "MAX_SCORED", 12)
    monkeypatch.setattr(labels, "ROWS_AT_ONCE", 7)
    named = [3, 17, 31, 40, 59]
    names = [f"{'abc'[TRUE[number]]}/{number}.png" if number < 31 else f"{number}.png" for number in named]
    rows = "\n".join(f"{name},{TRUE[number]}" for name, number in zip(names, named, strict=True))
    (tmp_path / "labels.csv").write_text(f"uri,label\n{rows}\n")
    config, context = planted(tmp_path, str(tmp_path / "labels.csv"))
    of_names = config.evaluate.model_copy(update={"uri_column": "uri"})
    read, times = labels.read_labels, list[object]()
    monkeypatch.setattr(labels, "read_labels", lambda settings: times.append(settings) or read(settings))
    metrics = run(config.model_copy(update={"evaluate": of_names}), context)
    assert len(times) == 1
    assert pq.read_table(tmp_path / "evaluate" / "labels.parquet")["image_id"].to_pylist() == named
    assert (metrics["num_labelled"], metrics["acc"]) == (5, 1.0)


def test_the_labels_of_some_images_name_the_classes_that_occur_there() -> None:
    whole = TrueLabels(np.array([2, 5, 7, 9]), np.array([1, 0, 2, 1]), ("a", "b", "c"))
    some = whole.only(np.array([2, 7]))
    assert (some.image_ids.tolist(), some.classes.tolist(), some.names) == ([2, 7], [0, 1], ("b", "c"))


def test_without_labels_there_is_an_estimate_only(tmp_path: Path) -> None:
    config, context = planted(tmp_path, None)
    metrics = run(config, context)
    assert list(metrics) == ["generalization", "silhouette_pca", "estimated_accuracy"]
    assert metrics["estimated_accuracy"] == metrics["generalization"] == 1.0
    assert 0.5 < metrics["silhouette_pca"] < 1
    assert not context.output.folder.exists("labels.parquet")


def test_the_labels_are_kept_for_the_report(tmp_path: Path) -> None:
    config, context = planted(tmp_path, "folder")
    run(config, context)
    table = pq.read_table(tmp_path / "evaluate" / "labels.parquet")
    assert table["image_id"].to_pylist() == list(range(1, 60))
    assert table["label"].cast(pa.string()).to_pylist() == ["abc"[label] for label in TRUE[1:]]


def test_noise_is_wrong_in_the_accuracy_and_one_more_cluster_in_the_index() -> None:
    clusters = CLUSTERS.copy()
    clusters[::6] = -1
    metrics = evaluate(LABELS, clusters, np.where(clusters >= 0, 1.0, np.nan), clusters[None], None)
    assert metrics["acc"] == metrics["many_to_one"] == pytest.approx(50 / 60)
    assert (metrics["num_noise"], metrics["acc_without_noise"]) == (10, 1.0)
    assert metrics["ari"] == pytest.approx(adjusted_rand_score(TRUE, clusters))
    assert metrics["acc_high_agreement"] == metrics["acc_low_agreement"] == 1.0
    nothing = evaluate(LABELS, np.full(60, -1), np.full(60, np.nan), np.full((1, 60), -1), None)
    assert (nothing["acc"], nothing["num_noise"]) == (0.0, 60)
