from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import Config
from icce_ray.consensus import best_consensus, doubtful_images, graph_cuts, job, label_matrix, neighbor_score
from icce_ray.consensus.aligned_vote import describe_clusters
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.consensus.other_runs import find_heads
from icce_ray.errors import InputError, ResourceError
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import run_here
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder

pytestmark = pytest.mark.usefixtures("ray_cluster")
ARRAYS = ("labels", "agreement", "vote_entropy", "second_choice")


@pytest.fixture
def matrix():
    rng = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(3), [120, 60, 30])
    heads = [rng.permutation(3)[np.where(rng.random(210) < 0.3, rng.integers(0, 3, 210), labels_N)] for _ in range(6)]
    return np.array(heads, dtype=np.int32)


@pytest.fixture(autouse=True)
def _one_try_of_each_function(monkeypatch):
    monkeypatch.setattr(best_consensus, "TRIES_BUDGET", 1)


def commit(root, stage, fingerprint, inputs, **parts):
    writer = ArtifactWriter(Folder.at(root / stage / fingerprint))
    for name, value in parts.items():
        if isinstance(value, np.ndarray):
            writer.write_array(f"{name}.npy", value)
        elif isinstance(value, pa.Table):
            writer.write_table(f"{name}.parquet", value)
        else:
            writer.write_json(f"{name}.json", value)
    return writer.commit(stage=stage, fingerprint=fingerprint, inputs=inputs, config={}, metrics={}, seconds=0.0)


def features_of(matrix):
    """Features (N, 3) that lie about a corner for each cluster of the first head."""
    return (np.eye(3)[matrix[0] % 3] + np.random.default_rng(1).normal(0, 0.4, (matrix.shape[1], 3))).astype(np.float32)


def write_run(root, name, matrix, losses=None, uris=None, failed=(), drawn=None):
    """A run as far as its heads; `drawn` are the ids of the images it was trained on."""
    uris = uris or [f"/photos/{i}.png" for i in range(matrix.shape[1])]
    commit(root, "images", f"images-{name}", {}, images=pa.table({"uri": uris}))
    errors = pa.table({"image_id": pa.array(failed, pa.int64())})
    rows = pa.FixedSizeListArray.from_arrays(pa.array(features_of(matrix).ravel()), 3)
    part = pa.table({"image_id": np.arange(matrix.shape[1]), "embedding": rows})
    parts = {"errors": errors, "part-00000": part}
    commit(root, "embed", f"embed-{name}", {"images": f"images-{name}"}, **parts)
    clusterings = {"losses": losses, "history": []}
    sample = ArtifactWriter(Folder.at(root / "sample" / f"sample-{name}"))
    if drawn is not None:
        sample.write_array("image_ids.npy", np.array(drawn, np.int64))
    sample.commit(stage="sample", fingerprint=f"sample-{name}", inputs={}, config={}, metrics={}, seconds=0.0)
    inputs = {"embed": f"embed-{name}", "sample": f"sample-{name}"}
    heads = commit(root, "method", f"heads-{name}", inputs, label_matrix=matrix, clusterings=clusterings)
    record = {"stages": {"images": f"images-{name}", "embed": f"embed-{name}", "method": f"heads-{name}"}}
    Folder.at(root / "runs").write_bytes(f"{name}.json", json.dumps(record).encode())
    return heads


def run_in_process(config, context):
    with run_here(1):
        return job.run(config, context)


def config_of(root, **consensus):
    return Config(output=str(root), num_clusters=3, seed=5, embeddings={"uri": "unused.npy"}, consensus=consensus)


def run_job(root, heads, run=job.run, nearest=None, relabel=False, **consensus):
    output = ArtifactWriter(Folder.at(root / "consensus"))
    inputs = {"method": heads, "embed": Artifact.find(Folder.at(root / "embed" / heads.manifest.inputs["embed"]))}
    if nearest is not None:
        inputs["neighbors"] = commit(root, "neighbors", "neighbors", {}, **nearest)
    context = StageContext(output, inputs, Progress("consensus"))
    metrics = run(config_of(root, relabel=relabel, **consensus), context)
    return metrics, output.commit(
        stage="consensus", fingerprint="f", inputs={}, config={}, metrics=metrics, seconds=0.0
    )


@pytest.mark.parametrize("run", [job.run, run_in_process], ids=["on Ray", "in one process"])
def test_the_stage_writes_the_consensus_of_the_matrix_whatever_its_parts(tmp_path, matrix, run, monkeypatch):
    nearest_Nk = (np.arange(210)[:, None] + np.arange(1, 11)) % 210
    monkeypatch.setattr(doubtful_images, "MIN_SHARE", 0.05)
    expected = cluster_ensemble(matrix, 3, random_state=5, neighbors=nearest_Nk, features=features_of(matrix))
    assert expected.num_relabelled > 5
    monkeypatch.setattr(doubtful_images, "PART_ELEMENTS", 30)
    monkeypatch.setattr(label_matrix, "PART_LABELS", 700)
    monkeypatch.setattr(neighbor_score, "PART_LABELS", 700)
    nearest = {"part-00000-nearest": nearest_Nk[:90], "part-00001-nearest": nearest_Nk[90:]}
    metrics, artifact = run_job(tmp_path, write_run(tmp_path, "own", matrix), run, nearest, relabel=True)
    assert metrics["method"] == expected.method
    assert metrics["graph_score_by_method"] == expected.graph_scores
    for name in ARRAYS:
        part = artifact.read_array(f"{name}.npy")
        np.testing.assert_array_equal(part, getattr(expected, name))
        assert part.dtype == getattr(expected, name).dtype
    assert metrics == expected.summary() | {"num_heads": 6}
    clusters = describe_clusters(expected.labels, expected.agreement, expected.second_choice, 3)
    assert artifact.read_json("summary.json") == metrics | {"clusters": clusters}
    assert artifact.read_table("hierarchy.parquet").equals(expected.hierarchy.to_table())
    assert artifact.part_names() == [
        "agreement.npy",
        "hierarchy.parquet",
        "image_ids.npy",
        "labels.npy",
        "second_choice.npy",
        "summary.json",
        "vote_entropy.npy",
    ]


def test_the_settings_reach_the_ensemble_and_what_is_left_out_is_said(tmp_path, matrix, capsys, monkeypatch):
    heads = write_run(tmp_path, "own", matrix, losses=[1.0, 0.2, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(graph_cuts, "CSPA_MAX_IMAGES", 10)
    metrics, artifact = run_job(tmp_path, heads, run_in_process, methods=["best_head", "cspa"], refine=False)
    assert metrics["method"] == "best_head"
    reason = "it compares all pairs of images, and 210 images are over the limit of 10"
    assert capsys.readouterr().err == (
        f"consensus: recombined left out: the method has no neighbour graph\nconsensus: cspa left out: {reason}\n"
    )
    np.testing.assert_array_equal(artifact.read_array("labels.npy"), matrix[1])


def test_the_heads_of_other_runs_take_part(tmp_path, matrix):
    coarse = np.minimum(matrix[:2], 1)
    fine = matrix[2:5] * 2 + np.random.default_rng(1).integers(0, 2, (3, 210))
    write_run(tmp_path, "coarse", coarse)
    write_run(tmp_path / "elsewhere", "fine", fine.astype(np.int16))
    elsewhere = str(tmp_path / "elsewhere" / "runs" / "fine.json")
    heads = write_run(tmp_path, "own", matrix)
    metrics, artifact = run_job(tmp_path, heads, methods=["mcla"], extra_runs=["coarse", elsewhere])
    same_weight = np.concatenate([matrix, np.tile(coarse, (3, 1)), np.tile(fine, (2, 1))])
    expected = cluster_ensemble(same_weight, 3, methods="mcla", random_state=5)
    for name in ARRAYS:
        np.testing.assert_array_equal(artifact.read_array(f"{name}.npy"), getattr(expected, name))
    assert metrics["num_heads"] == 18


def test_extra_runs_that_are_not_there_or_have_other_images_are_refused(tmp_path, matrix):
    own = write_run(tmp_path, "own", matrix)
    with pytest.raises(InputError, match=r"no run 'gone'.*runs/gone\.json does not exist"):
        find_heads(["gone"], str(tmp_path))
    write_run(tmp_path, "others", matrix, uris=[f"/others/{i}.png" for i in range(210)])
    write_run(tmp_path, "failed", matrix, failed=[7])
    write_run(tmp_path, "sampled", matrix, drawn=range(0, 420, 2))
    for name in ("others", "failed", "sampled"):
        assert len(find_heads([name], str(tmp_path))) == 1
        with pytest.raises(InputError, match=f"'{name}' has other images"):
            run_job(tmp_path, own, run_in_process, extra_runs=[name])
    (tmp_path / "method" / "heads-others" / "manifest.json").unlink()
    with pytest.raises(InputError, match="'others' are not finished"):
        find_heads(["others"], str(tmp_path))
    (tmp_path / "runs" / "others.json").write_text("{}")
    with pytest.raises(InputError, match="not the record of a run"):
        find_heads(["others"], str(tmp_path))


def test_embeddings_without_image_names_are_matched_by_their_rows(tmp_path, matrix):
    own = write_run(tmp_path, "own", matrix, uris=[f"/a/dino.npy#{i}" for i in range(210)])
    write_run(tmp_path, "other", matrix, uris=[f"/b/mae.npy#{i}" for i in range(210)])
    assert len(find_heads(["other"], str(tmp_path), own)) == 1


def test_too_little_memory_is_said_before_the_work(tmp_path, matrix, monkeypatch):
    monkeypatch.setattr("icce_ray.consensus.consensus_memory.available_memory_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"210 images.*GB"):
        run_job(tmp_path, write_run(tmp_path, "own", matrix), run_in_process)
