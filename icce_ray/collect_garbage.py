"""``icce-ray gc OUTPUT``: remove artifacts that nothing refers to any more.

Kept are the artifacts of every run that is recorded (``runs/*.json``), the assignments of new images, sweeps, the
newest listing of each source, and whatever these were made from or share parts with. What a job is writing is kept, and
for two weeks what a command uses that labels new images, compares or sweeps, also if it was killed.
"""

from contextlib import suppress
from dataclasses import dataclass

from icce_ray.errors import BusyError, InputError
from icce_ray.store import Claim, Folder
from icce_ray.store.artifact import MANIFEST_NAME
from icce_ray.store.run_records import Artifacts, find_artifacts, read_records, take_unfinished, with_inputs

ALWAYS_KEPT = ("sweep", "comparison")
"""Stages whose artifacts are results that no run refers to."""


@dataclass(frozen=True)
class Garbage:
    """Artifacts that nothing refers to."""

    sizes: dict[str, int]
    """Bytes by folder below the output."""
    is_removed: bool

    def lines(self) -> list[str]:
        from icce_ray.runtime.progress import format_bytes

        lines = [f"{format_bytes(num_bytes):>10}  {folder}" for folder, num_bytes in self.sizes.items()]
        what = "removed" if self.is_removed else "to remove; add --delete to do so"
        total = f"{len(self.sizes):,} artifacts, {format_bytes(sum(self.sizes.values()))}: {what}"
        return [*lines, total if self.sizes else "nothing to remove"]


def collect_garbage(output: str, *, delete: bool = False) -> Garbage:
    """Find what nothing refers to, and remove it if `delete`. Raises InputError: there are no runs."""
    root = Folder.at(output)
    records = read_records(output)
    used = take_unfinished(output, remove_old=delete)
    if not records:
        raise InputError(f"{output}: no runs there, so nothing says what is still needed; give the `output` of runs")
    artifacts = find_artifacts(root)  # after the records: what begins from now on is not among them
    wanted = {
        f"{stage}/{fingerprint}" for record in [*records, *used] for stage, fingerprint in record["stages"].items()
    }
    for key, manifest in ((key, one.manifest) for key, one in artifacts.items() if one is not None):
        if manifest.stage in ALWAYS_KEPT or (manifest.stage == "assign" and "consensus" not in manifest.inputs):
            wanted.add(key)
    kept = with_inputs(wanted | _newest_listings(artifacts), artifacts)
    sizes = {}
    for key in sorted(artifacts.keys() - kept):
        folder = root / key
        with suppress(BusyError):
            num_bytes = sum(folder.sizes().values())
            with Claim(folder):
                if delete:
                    folder.remove(MANIFEST_NAME)  # first, so that what is left is no artifact
                    folder.clear()
            sizes[key] = num_bytes
    return Garbage(sizes, delete)


def _newest_listings(artifacts: Artifacts) -> set[str]:
    """The next run continues the ids of the newest listing of its sources."""
    newest: dict[str, tuple[int, str]] = {}
    for key, artifact in artifacts.items():
        if artifact is not None and artifact.manifest.stage == "images":
            source = str(artifact.manifest.config.get("images"))
            newest[source] = max(newest.get(source, (0, "")), (artifact.metrics.get("generation", 0), key))
    return {key for _, key in newest.values()}
