"""`icce-ray compare`: several methods on the same digits, and one consensus of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.datasets import load_digits

from icce_ray.cli import main
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.embed.feature_matrix import load_features
from icce_ray.metrics.true_label_scores import normalized_mutual_info
from icce_ray.store import Artifact, Folder
from icce_ray.store.run_records import read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a comparison of two methods and their combination, and its result."""
    folder = tmp_path_factory.mktemp("compare")
    digits, labels = load_digits(return_X_y=True)
    np.save(folder / "digits.npy", digits[:150].astype(np.float32))
    np.save(folder / "labels.npy", labels[:150])
    config = {
        "embeddings": str(folder / "digits.npy"),
        "evaluate": {"labels": str(folder / "labels.npy")},
        "num_clusters": 10,
        "output": str(folder / "out"),
        "heads": {"num_heads": 3, "num_epochs": 4},
        "classifier": {"num_iterations": 50},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder, run(folder, "icce,temi", "--combine")


def run(folder: Path, methods: str, *options: str) -> dict[str, Any]:
    command = ["compare", str(folder / "run.yaml"), "--methods", methods, "--quiet", "--json", *options]
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *values, **_: found.extend(map(str, values)))
        assert main(command) == 0, found
    result: dict[str, Any] = json.loads(found[-1])
    return result


def consensus_of(folder: Path, run: str) -> np.ndarray:
    (record,) = (record for record in read_records(str(folder / "out")) if record["run"] == run)
    labels: np.ndarray = np.load(folder / "out" / "consensus" / record["stages"]["consensus"] / "labels.npy")
    return labels


def test_every_method_has_a_row_with_its_scores_and_its_page(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, result = compared
    rows = pq.read_table(result["table"]).to_pylist()
    assert [row["method"] for row in rows] == ["icce", "temi", "combined"]
    for row in rows:
        assert {"anmi", "generalization", "silhouette_pca", "acc", "nmi", "ari", "seconds"} <= row.keys()
    page = Path(result["report"])
    links = [part.split('"')[0] for part in page.read_text().split('<a href="')[1:]]
    assert [(page.parent / link).resolve().is_file() for link in links] == [True] * 3
    clusters = [consensus_of(folder, row["runs"][0]) for row in rows]
    expected = [[normalized_mutual_info(one, other) for other in clusters] for one in clusters]
    np.testing.assert_allclose(result["agreement"], expected)


def test_the_combination_is_the_consensus_of_the_methods_rows_with_equal_weight(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    folder, result = compared
    combined = consensus_of(folder, result["methods"][2]["run"])
    records = {record["run"]: record for record in read_records(str(folder / "out"))}
    matrices = [
        np.load(folder / "out" / "method" / records[row["run"]]["stages"]["method"] / "label_matrix.npy")
        for row in result["methods"][:2]
    ]
    stages = records[result["methods"][2]["run"]]["stages"]
    parts = sorted((folder / "out" / "neighbors" / stages["neighbors"]).glob("*-nearest.npy"))
    nearest = np.concatenate([np.load(part) for part in parts])
    embed = Artifact.find(Folder.at(folder / "out" / "embed" / stages["embed"]))
    features = load_features(embed).matrix
    expected = cluster_ensemble(matrices, 10, neighbors=nearest, features=features, random_state=0)
    np.testing.assert_array_equal(combined, expected.labels)


def test_a_run_with_a_list_of_methods_is_that_combination(compared: tuple[Path, dict[str, Any]], capsys: Any) -> None:
    folder, result = compared
    assert main(["run", str(folder / "run.yaml"), "--set", "method=[icce, temi]", "--quiet", "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["run"] == result["methods"][2]["run"]
    assert set(again["finished_before"]) == set(again["seconds"])
    assert main(["status", str(folder / "run.yaml"), "--set", "method=[icce, temi]"]) == 0
    assert again["run"] in capsys.readouterr().out


def test_its_record_is_enough_to_correct_it_and_the_next_run_keeps_that(
    compared: tuple[Path, dict[str, Any]], capsys: Any
) -> None:
    folder, _ = compared
    command = ["run", str(folder / "run.yaml"), "--set", "method=[icce, temi]", "--quiet", "--json"]
    assert main(command) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])
    (record,) = (record for record in read_records(str(folder / "out")) if record["run"] == before["run"])
    made_for = {"consensus": record["stages"]["consensus"], "num_clusters": 10}
    changes = {"format": 1, "made_for": made_for, "clusters": [{"cluster": 3, "merge_into": 4}], "images": []}
    (folder / "corrections.json").write_text(json.dumps(changes))
    assert main(["apply", str(folder / "out"), str(folder / "corrections.json"), "--quiet", "--json"]) == 0
    applied = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "corrections" in applied["seconds"]
    assert {"method", "consensus"} <= set(applied["finished_before"])
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["run"] == applied["run"]


def test_a_single_method_is_nothing_to_compare(compared: tuple[Path, dict[str, Any]], capsys: Any) -> None:
    folder, _ = compared
    assert main(["compare", str(folder / "run.yaml"), "--methods", "icce"]) == 2
    assert "name at least two methods" in capsys.readouterr().err
