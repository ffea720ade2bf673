"""Find a run that the user names by its config, its output folder or its record."""

from typing import Any

from icce_ray.config import load_config
from icce_ray.errors import InputError
from icce_ray.pipeline.plan import plan
from icce_ray.store import Artifact, Folder
from icce_ray.store.run_records import RUNS_FOLDER, read_latest, read_records


def find_stage(
    run: str, stage: str, *, what: str = "", several: str = "runs"
) -> tuple[Artifact, dict[str, Any]] | None:
    """The finished artifact of one stage of a run, and the run's settings; None if no such run is recorded. Raises
    InputError: the stage is not finished, or a folder has several that are. `what` is the artifact's name in messages,
    and `several` its plural.

    `run` is a YAML config, a record (``runs/*.json``), or an output folder, which means its newest run. If the folder
    does not say which that is, all its finished runs must have the artifact in common."""
    what = what or stage
    if run.endswith((".yaml", ".yml")):
        config = load_config(run)
        step = next((step for step in plan(config, lists=False) if step.name == stage), None)
        if step is None or step.artifact is None:
            raise InputError(f"{run}: this run has no {what} yet; finish it first: icce-ray run {run}")
        return step.artifact, config.to_record()
    output, wanted = run, None
    if run.endswith(".json"):
        before, _, wanted = run.rpartition(f"{RUNS_FOLDER}/")
        output = before.rstrip("/") or "."
    elif (latest := read_latest(output)) is not None:
        wanted = f"{latest['run']}.json"
    root = Folder.reachable(output)
    records = [record for record in read_records(output) if wanted in (None, f"{record['run']}.json")]
    found = [(record, Artifact.find(root / stage / record["stages"].get(stage, "none"))) for record in records]
    finished = [(record, artifact) for record, artifact in found if artifact is not None]
    if len({artifact.fingerprint for _, artifact in finished}) > 1:
        names = ", ".join(root.file_uri(f"{RUNS_FOLDER}/{record['run']}.json") for record, _ in finished)
        raise InputError(f"{run} holds several {several}: give the record of one run ({names}), or its config")
    if records and not finished:
        raise InputError(f"{run}: the run has no {what} yet; finish it first")
    if not finished:
        return None
    record, artifact = finished[-1]
    return artifact, record["config"] | {"output": output}


def stage_of_run(run: str, stage: str, *, what: str = "") -> tuple[Artifact, dict[str, Any]]:
    """As :func:`find_stage`. Raises InputError: also if no such run is recorded."""
    found = find_stage(run, stage, what=what)
    if found is None:
        raise InputError(f"{run}: there is no such run; give a run's config, output folder or record")
    return found
