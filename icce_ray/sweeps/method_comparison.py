"""The command `compare`: several methods on the same sample of the same embeddings, side by side.

Every method is a run of its own, with its page and its model. The comparison adds what only shows between them: a
table, and how much their clusters agree.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icce_ray.config import Config
from icce_ray.errors import ConfigError, UserError, WorkerError
from icce_ray.evaluate.method_clusterings import nmi_matrix
from icce_ray.pipeline.plan import finished_artifacts, plan, plan_other_methods
from icce_ray.pipeline.result import HEADLINE_METRICS, Result
from icce_ray.pipeline.run import run_pipeline, run_stages
from icce_ray.runtime.progress import format_seconds
from icce_ray.store import ArtifactWriter, Folder, fingerprint
from icce_ray.sweeps.sweep_files import render_page
from icce_ray.sweeps.trial import SCORES, SPACES, reason_of
from icce_ray.sweeps.trial_table import Row, metric_names, score_names, to_table, to_text

STAGE, VERSION = "comparison", 1
TABLE_NAME, PAGE_NAME = "methods.parquet", "comparison.html"
METHOD, COMBINED = "method", "combined"
OWN_STAGES = ("neighbors", "method", "consensus")
"""Stages whose time counts as the method's."""


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison."""

    methods: list[dict[str, Any]]
    """A row per method: its name, figures and run, or why it failed."""
    agreement: list[list[float]]
    """NMI (geometric) between the clusters of each two methods that finished, in the order of the rows."""
    table: str
    """Parquet: a row per method."""
    report: str
    """An HTML page."""


@dataclass(frozen=True)
class _Outcome:
    row: Row
    result: Result | None = None
    labels_N: npt.NDArray[np.int32] | None = None
    """Clusters of the images trained on, -1 for noise."""


def compare_methods(
    config: Config, methods: Sequence[str], *, combine: bool = False, quiet: bool = False
) -> Comparison:
    """Run `config` once with each of at least two methods, over the same sample, and compare the results; `combine`:
    also make one consensus of all that finish, in which each has the same weight. A method that fails is a row with the
    reason. Whatever is finished is used again. Raises UserError: a method is unknown, or something in the config or the
    input cannot work; WorkerError: no method finished."""
    if len(set(methods)) < max(2, len(methods)):
        raise ConfigError(f"--methods {','.join(methods)}: name at least two methods, each once")
    started = time.monotonic()
    together = config.with_methods(methods)
    outcomes = [_run(method, together.of_method(method), number, quiet) for number, method in enumerate(methods)]
    finished = [outcome.row.parameters[METHOD] for outcome in outcomes if outcome.result is not None]
    if not finished:
        raise WorkerError(f"compare: no method finished; {methods[0]}: {outcomes[0].row.error}")
    if combine and len(finished) > 1:
        outcomes.append(_run(COMBINED, together.with_methods(finished), len(methods), quiet))
    comparison, text = _write(config, outcomes)
    if not quiet:
        took_s = time.monotonic() - started
        lines = ["", text, "", f"{len(finished)} of {len(methods)} methods finished, {format_seconds(took_s)}"]
        lines += [f"table        {comparison.table}", f"report       {comparison.report}"]
        print("\n".join(lines), file=sys.stderr, flush=True)
    return comparison


def _run(name: str, config: Config, number: int, quiet: bool) -> _Outcome:
    if not quiet:
        print(f"\n{name}", file=sys.stderr, flush=True)
    try:
        result = run_pipeline(config, quiet=quiet)
        planned = plan(config)
        scoring = plan(config, (SPACES, SCORES), planned)
        artifacts = finished_artifacts([*planned, *scoring])
        run_stages(config, scoring, artifacts, quiet)
    except (UserError, WorkerError) as error:
        reason = reason_of(error)
        if not quiet:
            print(f"{name} failed: {reason}", file=sys.stderr, flush=True)
        return _Outcome(Row(number, {METHOD: name}, error=reason))
    others = plan_other_methods(config.with_num_clusters(result.num_clusters), planned)
    steps = [step for each in (planned, *(steps for _, steps in others)) for step in each]
    made = {(step.name, step.fingerprint): step.artifact for step in steps if step.artifact is not None}
    metrics = dict(artifacts[SCORES.name].metrics)
    row = Row(
        number,
        {METHOD: name},
        num_clusters_used=metrics.pop("num_clusters_used"),
        metrics=metrics,
        seconds=sum(artifact.manifest.seconds for (stage, _), artifact in made.items() if stage in OWN_STAGES),
        seeds=(config.seed,),
        runs=(result.run,),
        scores={score: result.metrics[score] for score in HEADLINE_METRICS if score in result.metrics},
    )
    return _Outcome(row, result, artifacts["consensus"].read_array("labels.npy"))


def _write(config: Config, outcomes: Sequence[_Outcome]) -> tuple[Comparison, str]:
    """Write methods.parquet and comparison.html. Also returns the table as text."""
    rows = [outcome.row for outcome in outcomes]
    finished = [outcome for outcome in outcomes if outcome.result is not None]
    names = [outcome.row.parameters[METHOD] for outcome in finished]
    matrix_MM = nmi_matrix([outcome.labels_N for outcome in finished if outcome.labels_N is not None])
    runs = {row.parameters[METHOD]: row.runs[0] if row.runs else str(row.error) for row in rows}
    own = fingerprint(STAGE, VERSION, runs, {})
    folder = Folder.at(config.output) / STAGE / own
    writer = ArtifactWriter(folder)
    writer.write_table(TABLE_NAME, to_table(rows, [METHOD]))
    page = render_page(
        "comparison.html",
        title=f"{len(rows)} methods compared",
        rows=rows,
        # Links to the pages of runs under the same output.
        pages={
            outcome.row.trial: "/".join(["..", "..", *outcome.result.report.rsplit("/", 3)[1:]])
            for outcome in finished
            if outcome.result
        },
        metrics=metric_names(rows),
        scores=score_names(rows),
        names=names,
        agreement=matrix_MM.tolist() if len(names) > 1 else None,
    )
    writer.write_bytes(PAGE_NAME, page.encode("utf-8", errors="replace"))
    writer.commit(
        stage=STAGE,
        fingerprint=own,
        inputs={},
        config=config.model_dump(mode="json"),
        metrics={"methods": runs},
        seconds=0.0,
    )
    table = [
        {METHOD: row.parameters[METHOD], "run": row.runs[0] if row.runs else None, "error": row.error}
        | {"num_clusters_used": row.num_clusters_used, "seconds": row.seconds}
        | dict(row.metrics)
        | row.scores
        for row in rows
    ]
    comparison = Comparison(table, matrix_MM.tolist(), folder.file_uri(TABLE_NAME), folder.file_uri(PAGE_NAME))
    return comparison, to_text(rows, [METHOD], "generalization")
