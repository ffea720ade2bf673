"""Which run's cluster numbers a run keeps with `consensus.numbers_from: auto`: a file in the output says it, one for
all runs with the same settings.

It names the newest of them, its listing, and the run whose numbers that one kept. Over another listing, a run keeps the
numbers of that newest run; over the same listing, those that it kept, so that the same run has the same result again.
"""

import json
from typing import Any, TypeVar

from icce_ray.config import Config
from icce_ray.consensus.stage import AUTO, NONE
from icce_ray.corrections.stage import OTHER_SETTINGS
from icce_ray.store import Folder, fingerprint
from icce_ray.store.run_records import RUNS_FOLDER

NUMBERS_FOLDER = "numbers_kept"
C = TypeVar("C", bound=Config)


def with_numbers_from(config: C, asked: Config, images: str) -> C:
    """`config`, whose number of clusters is known, with the run whose numbers it keeps, or none. `asked` is the config
    as the user gave it, `images` the fingerprint of its listing."""
    if config.consensus.numbers_from != AUTO:
        return config
    last = _read(asked)
    if last is None:
        run = NONE
    elif last["images"] == images:
        run = last["numbers_from"]  # also if that run was removed since: the result stays the same
    else:
        there = (Folder.at(config.output) / RUNS_FOLDER).exists(f"{last['run']}.json")
        run = last["run"] if there else NONE
    return config.model_copy(update={"consensus": config.consensus.model_copy(update={"numbers_from": run})})


def remember(asked: Config, run: str, images: str, numbers_from: str) -> None:
    """Note a finished run as the newest with its settings."""
    if asked.consensus.numbers_from == AUTO:
        value = {"run": run, "images": images, "numbers_from": numbers_from}
        if _read(asked) != value:
            folder, name = _place(asked)
            folder.write_bytes(name, json.dumps(value).encode())


def changes_line(changes: dict[str, Any]) -> str:
    """The changes in one sentence."""
    parts = [f"{changes['num_kept']:,} clusters keep their numbers"]
    parts += [f"{len(changes['new'])} new ({', '.join(map(str, changes['new']))})"] if changes["new"] else []
    parts += [f"{new} split off from {old}" for new, old in changes["split"]]
    parts += [f"{old} merged into {new}" for old, new in changes["merged"]]
    parts += [f"{len(changes['gone'])} gone ({', '.join(map(str, changes['gone']))})"] if changes["gone"] else []
    parts += [f"{old} is now {new}" for old, new in changes["renumbered"]]
    return f"{', '.join(parts)}; compared with the run {changes['run']}"


def _read(asked: Config) -> dict[str, Any] | None:
    folder, name = _place(asked)
    try:
        value = json.loads(folder.read_bytes(name))
        return {key: str(value[key]) for key in ("run", "images", "numbers_from")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing or damaged
        return None


def _place(asked: Config) -> tuple[Folder, str]:
    """The folder and the name of the file for these settings."""
    settings = asked.model_dump(mode="json", exclude=OTHER_SETTINGS | {"given_num_clusters"})
    return Folder.at(asked.output) / NUMBERS_FOLDER, fingerprint("numbers", 1, settings, {}) + ".json"
