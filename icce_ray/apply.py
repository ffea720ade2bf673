"""``icce-ray apply RUN corrections.json``: take over what a person changed on the page.

The corrections are kept in the run's output, and the run is repeated from the consensus on: a corrected consensus, a
classifier that learns it, assignments, scores and a page.
"""

from pathlib import Path

from icce_ray.config import build_config, without_secrets
from icce_ray.corrections.stage import KEPT, KEPT_FOLDER, NONE, kept_name, read_bytes, read_corrections
from icce_ray.errors import InputError
from icce_ray.pipeline.find_run import stage_of_run
from icce_ray.pipeline.result import Result
from icce_ray.pipeline.run import run_pipeline
from icce_ray.store import Folder


def apply_corrections(run: str | Path, corrections: str | Path, *, quiet: bool = False) -> Result:
    """Correct a finished run, given by its YAML config, its output folder, or its record (``runs/*.json``). The next
    run with the same settings keeps the corrections, also after images were added. Raises InputError: no such run; a
    file that cannot be used; or a config that names other corrections."""
    read_corrections(str(corrections))
    _, settings = stage_of_run(str(run), "consensus")
    kept = Folder.at(settings["output"]) / KEPT_FOLDER
    named = settings.get("corrections", KEPT)
    if named not in (KEPT, NONE):
        raise InputError(f"{run} names corrections: {named}; save the new ones there, or remove that setting first")
    config = build_config(without_secrets(settings) | {"corrections": KEPT}, str(run))
    kept.write_bytes(kept_name(config), read_bytes(str(corrections)))
    return run_pipeline(config, quiet=quiet)
