"""What a worker that dies leaves behind: a note on storage of what it was at, so that the next one finds the culprit.

The first try of a part goes at full speed and notes only that it began. Once a worker has died at the part, the next
ones are careful: they note what they are about to work on, a batch at first, then single images of a batch at which
one died. An image that is in at least two such notes, once alone, is to blame: after three deaths at most it is left
out and becomes an error. A death from outside (a lost machine, too little memory) blames nobody: the careful try gets
through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from icce_ray.errors import WorkerError
from icce_ray.store import Folder

MAX_IDLE_DEATHS = 3
"""Of careful workers that noted no image: then the images are not the reason."""
KILLER = "killed its worker"
"""Reason in the errors table."""


class Tries:
    """The tries of one step of one part, in one run. Making one begins a try.

    Usage::

        tries = Tries(folder, ".part-00003.parquet.decode", run_id, "images 18 to 23")
        for ids in tries.steps(image_ids, batch_size=64):
            ...          # dies here: the next worker knows at which images
        tries.end()

    Args:
        folder: where the note lies.
        name: of the note.
        run_id: notes of other runs do not count.
        what: the part, for the message.

    Raises:
        WorkerError: worker after worker died before it began with an image.
    """

    def __init__(self, folder: Folder, name: str, run_id: str, what: str) -> None:
        self._folder, self._name, self._run_id = folder, name, run_id
        self._begun, self._idle, self._deaths = 0, 0, list[list[int]]()
        try:
            note = json.loads(folder.read_bytes(name))
            if note["run"] == run_id:
                self._begun, self._idle, self._deaths = note["begun"], note["idle"], note["deaths"]
                if note["at"]:
                    self._deaths.append(note["at"])
                elif self._begun > 1:
                    self._idle += 1
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        if self._idle >= MAX_IDLE_DEATHS:
            raise WorkerError(
                f"embed: {what}: workers died {self._begun} times before they began with an image. Give them more "
                "memory (a smaller embed.batch_size, fewer workers); what is finished stays"
            )
        self._begun += 1
        self._write([])

    @property
    def is_careful(self) -> bool:
        return self._begun > 1

    def blamed(self) -> set[int]:
        """Ids of the images that killed their workers."""
        alone = {ids[0] for ids in self._deaths if len(ids) == 1}
        return {image_id for image_id in alone if sum(image_id in ids for ids in self._deaths) > 1}

    def steps(self, image_ids: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
        """`image_ids` without the blamed ones in batches, in order; noted before each where that may be needed."""
        blamed = self.blamed()
        for start in range(0, len(image_ids), batch_size):
            batch = [image_id for image_id in image_ids[start : start + batch_size] if image_id not in blamed]
            suspected = any(image_id in ids for ids in self._deaths for image_id in batch)
            for step in ([image_id] for image_id in batch) if suspected else [batch]:
                if step:
                    if self.is_careful:
                        self._write(list(step))
                    yield step
        if self.is_careful:
            self._write([])

    def end(self) -> None:
        """The part came to its end: the note goes."""
        self._folder.remove(self._name)

    def _write(self, at: list[int]) -> None:
        note = {"run": self._run_id, "begun": self._begun, "idle": self._idle, "deaths": self._deaths, "at": at}
        self._folder.write_bytes(self._name, json.dumps(note).encode())


class NoTries:
    """Where nothing is noted: tests, and work in one process."""

    is_careful = False

    def blamed(self) -> set[int]:
        return set()

    def steps(self, image_ids: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
        for start in range(0, len(image_ids), batch_size):
            yield image_ids[start : start + batch_size]
