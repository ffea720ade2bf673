"""A sweep on Ray Tune: trials over a search space, judged without labels, then one consensus of the best.

The stages that trials share are made first, each once, by the whole cluster. A trial then takes no CPU itself: it asks
for a Ray task for each of its runs, which trains in one process, or starts Ray Train where `resources.method` says so.
What is finished lies under its fingerprint; Tune's own state, beside the sweep's table, remembers the search. So a
sweep that was killed goes on by the same command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from icce_ray.config import build_config
from icce_ray.errors import ResourceError
from icce_ray.pipeline.plan import plan
from icce_ray.pipeline.run import run_pipeline
from icce_ray.runtime.cluster_resources import STAGES_WITH_WORKERS, check_resources, largest_machine_cpus
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import connect
from icce_ray.store import Artifact, ArtifactWriter, Claim, Folder, fingerprint
from icce_ray.store.artifact import cache_folder
from icce_ray.sweeps import sweep_files as outcome
from icce_ray.sweeps.job import Parameters, draw, key_of, make_searcher, reason_of, run_trials
from icce_ray.sweeps.silhouette_spaces import spaces
from icce_ray.sweeps.sweep_config import Sweep, load_sweep
from icce_ray.sweeps.sweep_files import ENSEMBLE_NAME, SweepResult
from icce_ray.sweeps.trial import Listings, make, shared_stages

VERSION = 1
STAGE = "sweep"
STATE_FOLDER = "tune"


def sweep(path: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> SweepResult:
    """Run the sweep of a YAML file, then the job that pools its best trials. What is finished is used, not redone.

    Raises:
        UserError: something in the sweep, its base or the machine cannot work; raised before the long work where that
            can be known.
        WorkerError: no trial finished.
    """
    return run_sweep(load_sweep(path, list(overrides)), quiet=quiet)


def run_sweep(asked: Sweep, *, quiet: bool = False) -> SweepResult:
    """As :func:`sweep`, of a sweep that was read already."""
    started = time.monotonic()
    base, listings = asked.base_config, Listings()
    images = plan(base, shared_stages(base, listings))[0]
    name = fingerprint(STAGE, VERSION, asked.settings(), {"images": images.fingerprint})
    folder = Folder.at(base.output) / STAGE / name
    artifact = Artifact.find(folder)
    if artifact is None or artifact.metrics["num_failed"]:
        _check(asked)
        connect(base.resources)
        _check_cpus(asked)
        with Claim(folder):
            artifact = _search(asked, listings, folder, name, quiet)
    result = outcome.sum_up(artifact, None)
    if not quiet:
        outcome.print_summary(artifact, result, time.monotonic() - started)
    if asked.config.ensemble is None:
        return result
    settings = _read_config(artifact)
    # Where secrets and machines are concerned, the base of today counts.
    pooled = build_config(settings, ENSEMBLE_NAME).model_copy(
        update={"storage": base.storage, "resources": base.resources}
    )
    return outcome.sum_up(artifact, run_pipeline(pooled, quiet=quiet))


def _search(asked: Sweep, listings: Listings, folder: Folder, name: str, quiet: bool) -> Artifact:
    began = time.monotonic()
    Artifact.discard_damage(folder)
    known = draw(asked)
    failures = _make_shared(asked, known or [{}], listings, quiet)
    progress = Progress(STAGE, "trials", quiet)
    state = state_folder(folder)
    rows = run_trials(asked, known, listings, failures, state, progress)
    if not outcome.lie_there(asked, rows, listings):
        progress.note("what earlier trials made is gone; it is made again")
        state.clear()
        rows = run_trials(asked, known, listings, failures, state, progress)
    writer = ArtifactWriter(folder)
    metrics = outcome.write(asked, rows, listings, writer)
    artifact = writer.commit(
        stage=STAGE,
        fingerprint=name,
        inputs={},
        config=asked.base_config.model_dump(mode="json"),
        metrics=metrics,
        seconds=time.monotonic() - began,
    )
    if not metrics["num_failed"]:
        state.clear()  # needed to go on only
    return artifact


def state_folder(folder: Folder) -> Folder:
    """Where Tune keeps what it needs to go on: beside the sweep's table, or in this machine's cache where the output is
    remote, since Tune would write the credentials of remote storage down. Another machine then goes on with the same
    trials, of which it finds those that are finished; only what a search had learnt is lost."""
    if folder.local_path is not None:
        return folder / STATE_FOLDER
    return Folder.at(cache_folder() / STAGE / folder.path.rpartition("/")[2] / STATE_FOLDER)


def _make_shared(asked: Sweep, trials: list[Parameters], listings: Listings, quiet: bool) -> dict[str, str]:
    """Make the stages that trials share, each once. Returns why it is impossible, for the trials for which it is.

    Raises:
        UserError, WorkerError: it is impossible for all.
    """
    failures: dict[str, str] = {}
    first: Exception | None = None
    for parameters in trials:
        try:
            for config in asked.runs(parameters):
                make(config, shared_stages(config, listings), quiet=quiet)
        except Exception as error:
            first = first or error
            failures[key_of(parameters)] = reason_of(error)
    if first is not None and len(failures) == len(trials):
        raise first
    return failures


def _check(asked: Sweep) -> None:
    """Refuse what can be known to fail before the work starts."""
    base = asked.base_config
    if base.embeddings.uri is None:
        from icce_ray.embed.backbone_plan import check_backbones

        check_backbones(base.embed)
    if base.evaluate.labels is not None:
        from icce_ray.evaluate.labels import check_labels

        check_labels(base.evaluate)
    if asked.config.searcher is not None:
        make_searcher(asked.config.searcher, asked.config.seed)
    if asked.config.metric == "silhouette_umap" and "umap" not in spaces():
        raise ResourceError(
            "metric silhouette_umap needs the package umap-learn: pip install 'icce_ray[umap]', or take silhouette_pca"
        )
    check_resources(base, STAGES_WITH_WORKERS)


def _check_cpus(asked: Sweep) -> None:
    wanted, there = asked.config.cpus_per_run, largest_machine_cpus()
    if asked.is_in_one_process and wanted > there:
        raise ResourceError(
            f"cpus_per_run: {wanted:g} CPUs asked for, but the largest machine has {there:g}; set it to at most that"
        )


def _read_config(artifact: Artifact) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(artifact.read_bytes(ENSEMBLE_NAME))
    return settings
