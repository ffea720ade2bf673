from __future__ import annotations

import pytest

from icce_ray.errors import WorkerError
from icce_ray.sweeps.sweep_config import EnsembleConfig
from icce_ray.sweeps.trial_table import (
    Row,
    choose_best,
    choose_pool,
    ranked,
    to_table,
    to_text,
)

NAMES = ("neighbors.similarity_threshold", "heads.num_heads")


def row(trial: int, value: float | None, **changes: object) -> Row:
    parameters = {NAMES[0]: "auto" if trial % 2 else 0.4, NAMES[1]: 8 + trial}
    given = {"metrics": {"anmi": value, "anmi_std": 0.1}, "seconds": 1.5} | changes
    return Row(trial, parameters, **given)  # type: ignore[arg-type]


ROWS = [
    row(0, 0.5, scores={"acc": 0.3}),
    row(1, 0.9, error="killed"),
    row(2, 0.8),
    row(3, None, metrics={}, error="the loss of heads 0 is not finite"),
    row(4, 0.8),
    row(5, float("nan")),
    row(6, None),
]


def test_the_best_is_a_finished_trial_and_the_first_of_equals() -> None:
    assert choose_best(ROWS, "anmi").trial == 2
    assert [each.trial for each in ranked(ROWS, "anmi")] == [2, 4, 0]
    alike = [row(trial, None, metrics={"peers": 0.5, "silhouette_pca": 0.1 * trial}) for trial in range(2)]
    assert choose_best(alike, "peers").trial == 1, "the peers of two trials are the same"


def test_without_a_finished_trial_the_first_reason_is_said() -> None:
    with pytest.raises(
        WorkerError, match="no trial of 2 has the metric anmi; trial 3: the loss of heads 0 is not finite"
    ):
        choose_best([ROWS[3], ROWS[1]], "anmi")


@pytest.mark.parametrize(
    ("settings", "trials"),
    [
        ({}, [2, 4, 0]),
        ({"top": 1}, [2]),
        ({"top": 2}, [2, 4]),
        ({"quantile": 0.5}, [2, 4]),
        ({"quantile": 0.0}, [2, 4, 0]),
    ],
)
def test_the_pool_is_the_top_or_what_is_above_a_quantile(settings: dict[str, float], trials: list[int]) -> None:
    pooled = choose_pool(ROWS, "anmi", EnsembleConfig.model_validate(settings))
    assert [each.trial for each in pooled] == trials


def test_the_table_has_a_row_for_every_trial_and_a_column_for_every_setting() -> None:
    table = to_table(ROWS, NAMES, pooled=[2, 4], best=2)
    data = table.to_pydict()
    assert data["trial"] == list(range(7))
    assert data["status"] == ["failed" if trial in (1, 3) else "finished" for trial in range(7)]
    assert data[NAMES[0]][:2] == ["0.4", '"auto"'], "numbers and words together are JSON"
    assert data[NAMES[1]] == [8 + trial for trial in range(7)]
    assert data["anmi"][:5] == [0.5, 0.9, 0.8, None, 0.8]
    assert data["acc"] == [0.3, *[None] * 6]
    assert data["is_pooled"] == [trial in (2, 4) for trial in range(7)]
    assert data["is_best"].index(True) == 2
    assert data["error"][3] == "the loss of heads 0 is not finite"


def test_the_printed_table_is_best_first_and_ends_with_what_failed() -> None:
    lines = to_text(ROWS, NAMES, "anmi").splitlines()
    assert lines[0].split() == ["trial", *NAMES, "anmi", "acc"]
    assert [line.split()[0] for line in lines[1:4]] == ["2", "4", "0"]
    assert lines[1].endswith("best")
    assert lines[-1].startswith("trial 3 failed (neighbors.similarity_threshold=auto, heads.num_heads=11): the loss")
