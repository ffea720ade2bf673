from __future__ import annotations

import numpy as np
import pytest

from icce_ray.config import Config
from icce_ray.consensus import job
from icce_ray.consensus.agreement import describe_clusters
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.context import StageContext
from icce_ray.errors import InputError, find_cause
from icce_ray.progress import Progress
from icce_ray.store import ArtifactWriter, Folder

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def label_matrix():
    rng = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(3), [120, 60, 30])
    heads = [rng.permutation(3)[np.where(rng.random(210) < 0.3, rng.integers(0, 3, 210), labels_N)] for _ in range(6)]
    return np.array(heads, dtype=np.int32)


def run_job(tmp_path, label_matrix, losses, **consensus):
    writer = ArtifactWriter(Folder.at(tmp_path / "heads"))
    writer.write_array("label_matrix.npy", label_matrix)
    writer.write_json("training.json", {"head_losses": losses})
    given = {"stage": "heads", "fingerprint": "f", "inputs": {}, "config": {}, "metrics": {}, "seconds": 0.0}
    heads = writer.commit(**given)
    config = Config(output=str(tmp_path), num_clusters=3, seed=5, embeddings={"uri": "unused.npy"}, consensus=consensus)
    output = ArtifactWriter(Folder.at(tmp_path / "consensus"))
    metrics = job.run(config, StageContext(output, {"heads": heads}, Progress("consensus", quiet=True)))
    return metrics, output.commit(**given | {"stage": "consensus"})


def test_the_job_gives_what_one_process_gives(tmp_path, label_matrix):
    metrics, artifact = run_job(tmp_path, label_matrix, [1.0] * 6)
    expected = cluster_ensemble(label_matrix, 3, random_state=5)
    for name in ("labels", "agreement", "vote_entropy", "second_choice"):
        part = artifact.read_array(f"{name}.npy")
        np.testing.assert_array_equal(part, getattr(expected, name))
        assert part.dtype == getattr(expected, name).dtype
    assert metrics == expected.summary()
    clusters = describe_clusters(expected.labels, expected.agreement, expected.second_choice, 3)
    assert artifact.read_json("summary.json") == expected.summary() | {"clusters": clusters}
    assert artifact.part_names() == [
        "agreement.npy",
        "labels.npy",
        "second_choice.npy",
        "summary.json",
        "vote_entropy.npy",
    ]


def test_the_settings_reach_the_ensemble(tmp_path, label_matrix):
    losses = [1.0, 0.2, 1.0, 1.0, 1.0, 1.0]
    metrics, artifact = run_job(tmp_path, label_matrix, losses, methods=["best_head"], refine=False)
    assert metrics["method"] == "best_head"
    np.testing.assert_array_equal(artifact.read_array("labels.npy"), label_matrix[1])


def test_a_label_matrix_that_cannot_be_used_is_the_users_to_mend(tmp_path, label_matrix):
    with pytest.raises(InputError) as raised:
        run_job(tmp_path, np.full_like(label_matrix, -1), [1.0] * 6)
    cause = find_cause(raised.value, InputError)
    assert str(cause) == "head 0 has no label for any image (all are -1); leave it out"
