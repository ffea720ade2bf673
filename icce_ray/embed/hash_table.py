"""A hash table in arrays: 32 bytes for each content, where a dictionary takes 200."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_LOAD = 0.5
"""Share of the slots in use. One key in a hundred has to look beyond its bucket then."""
BUCKET = 16
"""Slots that are looked at together."""
GROWTH = 1.5
EMPTY = np.uint32(2**32 - 1)
NO_FILE = np.uint32(2**32 - 2)
"""The key has a slot, but no file."""

Keys = npt.NDArray[np.uint64]
"""(n,) 8 of the 32 bytes of a SHA-256. Among a billion, two are equal with a probability of 3%: who finds a content by
its key has to compare its hash."""
Slots = npt.NDArray[np.int64]


class HashTable:
    """Open addressing in buckets, each of which is filled in order; a key whose bucket is full goes into the next one.
    Keys are never removed: one without a file keeps its slot.

    Args:
        num_keys: expected. The table grows beyond, which takes 2.5 times its memory for a moment.
    """

    files: npt.NDArray[np.uint32]
    """(slots,) number of a file, NO_FILE, or EMPTY: the slot has no key."""
    rows: npt.NDArray[np.uint32]
    """(slots,)."""

    def __init__(self, num_keys: int) -> None:
        self._allocate(num_keys)

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self.files.nbytes + self.rows.nbytes

    def find(self, keys: Keys) -> Slots:
        """The slot of each key; -1 for those that have none."""
        return self._slots(keys, insert=False)

    def insert(self, keys: Keys) -> Slots:
        """The slot of each key; new ones get one, with NO_FILE."""
        if self.num_keys + len(keys) > MAX_LOAD * len(self.files):
            used = self.files != EMPTY
            old = self._keys[used], self.files[used], self.rows[used]
            self._allocate(round(GROWTH * (self.num_keys + len(keys))))
            slots = self._slots(old[0], insert=True)
            self.files[slots], self.rows[slots] = old[1:]
        return self._slots(keys, insert=True)

    def _allocate(self, num_keys: int) -> None:
        num_slots = (int(num_keys / MAX_LOAD) // BUCKET + 64) * BUCKET
        self.num_keys = 0
        self._keys = np.zeros(num_slots, np.uint64)
        self.files = np.full(num_slots, EMPTY)
        self.rows = np.zeros(num_slots, np.uint32)

    def _slots(self, keys: Keys, *, insert: bool) -> Slots:
        keys_of_bucket, files_of_bucket = self._keys.reshape(-1, BUCKET), self.files.reshape(-1, BUCKET)
        num_buckets = len(keys_of_bucket)
        buckets = (keys % np.uint64(num_buckets)).astype(np.int64)
        found = np.full(len(keys), -1)
        left = np.arange(len(keys))
        while len(left):
            empty = files_of_bucket.take(buckets, axis=0) == EMPTY
            same = (keys_of_bucket.take(buckets, axis=0) == keys[left, None]) & ~empty
            slots = buckets * BUCKET + same.argmax(axis=1)
            is_here = same.any(axis=1)
            found[left[is_here]] = slots[is_here]
            is_full = ~empty[:, -1]
            is_left = ~is_here if insert else ~is_here & is_full
            new = ~is_here & ~is_full
            if insert and new.any():
                # If several keys want the same slot, the last one gets it; then all look again.
                taken, numbers = buckets[new] * BUCKET + empty[new].argmax(axis=1), np.arange(np.count_nonzero(new))
                self._keys[taken], self.files[taken], self.rows[taken] = keys[left[new]], NO_FILE, numbers
                self.num_keys += int(np.count_nonzero(self.rows[taken] == numbers))
            buckets = np.where(is_full, (buckets + 1) % num_buckets, buckets)[is_left]
            left = left[is_left]
        return found
