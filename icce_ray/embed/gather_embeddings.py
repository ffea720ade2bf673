"""Gets an embedding for each content of a part: from a file, from the worker that just made it, or by making it."""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.embed.content_index import BUSY, HERE, YOURS, Index, keys_of
from icce_ray.embed.decode_and_embed import Outcome
from icce_ray.embed.embedding_parts import read_part
from icce_ray.embed.feature_matrix import joined_columns
from icce_ray.errors import DamagedArtifactError
from icce_ray.store import Folder

MAX_HELD_PARTS = 4
"""Each has at most MAX_PART_BYTES."""
WAIT_S = 0.05
MAX_WAIT_S = 120.0
"""Longest wait for another worker's embedding of the same content. After that the content is embedded here."""

Vector = npt.NDArray[Any]


def known_hashes(index: Index, hashes: list[str]) -> set[str]:
    """Those of `hashes` that have an embedding on storage."""
    return {value for value, known in zip(hashes, index.known(keys_of(hashes)).tolist(), strict=True) if known}


class VectorReader:
    """Reads single embeddings from parts; keeps the last parts it read. Any thread may call it."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._folders = folders
        self._part = lru_cache(MAX_HELD_PARTS)(self._read_part)

    def _read_part(self, place: int, part: str) -> tuple[pa.ChunkedArray, Vector]:
        table = read_part(self._folders[place], part)
        return table["content_hash"], joined_columns(table)

    def read(self, place: int, part: str, row: int, content_hash: str) -> Vector:
        """Raises DamagedArtifactError: the part is missing or damaged, or has another content there."""
        hashes, vectors = self._part(place, part)
        if row >= len(hashes) or hashes[row].as_py() != content_hash:
            raise DamagedArtifactError(f"{self._folders[place].file_uri(part)}: row {row} has another content")
        vector: Vector = vectors[row]
        return vector


def gather(
    part: str, hashes: list[str], index: Index, reader: VectorReader, embed: Callable[[list[str]], dict[str, Outcome]]
) -> tuple[dict[str, Outcome], list[str]]:
    """Get an outcome for each content of a part, each once: read it if it is on storage, take it from another part, or
    `embed` it here. Returns the outcomes by hash, and the hashes that were embedded here."""
    keys, outcomes, embedded, num_published = keys_of(hashes), dict[str, Outcome](), list[str](), 0
    missing, deadline = np.arange(len(hashes)), time.monotonic() + MAX_WAIT_S
    while len(missing):
        answers = index.claim(part, keys[missing], time.monotonic() > deadline)
        ours = [hashes[i] for i in missing[answers.kinds_n == YOURS]]
        if ours:
            outcomes |= embed(ours)
            embedded += ours
            deadline = time.monotonic() + MAX_WAIT_S
        if num_published < len(embedded) and (answers.kinds_n == BUSY).any():
            # Another part may be waiting for this one, which is not written before it has what it waits for.
            index.publish(part, keys_of(embedded), {value: outcomes[value] for value in embedded})
            num_published = len(embedded)
        for number, source in enumerate(answers.sources):
            here = np.flatnonzero((answers.kinds_n >= HERE) & (answers.sources_n == number))
            values, rows = [hashes[i] for i in missing[here]], answers.rows_n[here].tolist()
            try:
                if answers.kinds_n[here[0]] == HERE:
                    published = index.fetch(source)
                    outcomes |= {value: published[value] for value in values}
                else:
                    (place, name), found = source, zip(values, rows, strict=True)
                    outcomes |= {value: reader.read(place, name, row, value) for value, row in found}
            except DamagedArtifactError:
                index.forget(*source)
            except LookupError:  # its worker is gone
                pass
        missing = missing[[hashes[i] not in outcomes for i in missing]]
        if len(missing) and not ours:
            time.sleep(WAIT_S)
    return outcomes, embedded
