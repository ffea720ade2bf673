"""Attempts at a part by workers that may die: a note on storage tells the next worker what the last one died at.

The first attempt runs at full speed and notes only that it began. After a death, the next attempts are careful: before
each batch they note which images they are about to work on, and they take the images of a batch that killed a worker
one by one. An image is to blame if at least two workers died at it, one of them while working on it alone. So an image
that kills its worker is found after at most three deaths; it is left out and listed as an error. A death with another
cause (a lost machine, too little memory) blames no image: the next attempt succeeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from icce_ray.errors import WorkerError
from icce_ray.store.filesystem import Folder

MAX_UNEXPLAINED_DEATHS = 3
"""Deaths of workers that had noted no image, after which the part is given up."""
KILLER = "killed its worker"
"""Reason in the errors table."""


class Attempt:
    """One attempt at one step of one part, in one run. Creating it looks at the last attempt.

    Usage::

        attempt = Attempt(folder, ".part-00003.parquet.decode", run_id, "embed: images 18 to 23", "Use fewer workers")
        attempt.begin()
        for ids in attempt.steps(image_ids, batch_size=64):
            ...          # if the worker dies here, the next one knows at which images
        attempt.end()

    Work that isn't done image by image leaves out ``steps``: the part is then given up after MAX_UNEXPLAINED_DEATHS.
    Raises WorkerError: MAX_UNEXPLAINED_DEATHS workers died without having noted an image.

    Args:
        folder: where the note lies; None: there is none, for work in a single process.
        name: file name of the note.
        run_id: identifies the run; notes of other runs don't count.
        what: stage and part, for the message.
        remedy: what the user can do, for the message.
    """

    def __init__(
        self, folder: Folder | None = None, name: str = "", run_id: str = "", what: str = "", remedy: str = ""
    ) -> None:
        self._folder, self._name, self._run_id = folder, name, run_id
        self._number, self._unexplained, self._deaths = 1, 0, list[list[int]]()
        if folder is None:
            return
        try:
            note = json.loads(folder.read_bytes(name))
            if note["run"] == run_id:
                self._number, self._unexplained, self._deaths = note["number"] + 1, note["unexplained"], note["deaths"]
                if note["at"]:
                    self._deaths.append(note["at"])
                else:
                    self._unexplained += 1
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        if self._unexplained >= MAX_UNEXPLAINED_DEATHS:
            raise WorkerError(
                f"{what}: the workers died {self._number - 1} times. Out of memory is the usual cause: {remedy}. "
                "Finished parts are kept"
            )

    def begin(self) -> Attempt:
        """Note that the attempt begins. Returns itself."""
        self._write([])
        return self

    @property
    def is_careful(self) -> bool:
        return self._number > 1

    def blamed(self) -> set[int]:
        """Ids of the images that killed their workers."""
        alone = {ids[0] for ids in self._deaths if len(ids) == 1}
        return {image_id for image_id in alone if sum(image_id in ids for ids in self._deaths) > 1}

    def steps(self, image_ids: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
        """Batches of `image_ids` in order, without the blamed ones; a careful attempt notes each first."""
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
        """The attempt succeeded: remove the note."""
        if self._folder is not None:
            self._folder.remove(self._name)

    def _write(self, at: list[int]) -> None:
        if self._folder is not None:
            note = {"run": self._run_id, "number": self._number, "unexplained": self._unexplained}
            self._folder.write_bytes(self._name, json.dumps(note | {"deaths": self._deaths, "at": at}).encode())
