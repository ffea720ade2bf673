"""The ``embed`` stage for ready-made embeddings, which are only rewritten as parts, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from icce_ray.config import EmbeddingsConfig
from icce_ray.embed.embedding_parts import (
    PartRange,
    part_table,
    plan_parts,
    rows_per_part,
    source_digest,
    write_part,
)
from icce_ray.embed.finished_parts import Tally
from icce_ray.embed.sampled_rows import Draw
from icce_ray.errors import InputError
from icce_ray.images.embedding_files import Embeddings, open_embedding_sets
from icce_ray.images.listing import Listing
from icce_ray.stage import StageContext
from icce_ray.store.part_records import PartRecord, PartRecords


def rewrite_embeddings(config: EmbeddingsConfig, context: StageContext, draw: Draw | None = None) -> dict[str, Any]:
    """Write the parts that are missing, and beside them the rows that `draw` chooses. Metrics as :meth:`Tally.finish`.
    Raises InputError: embeddings that cannot be used, or that have changed since they were listed."""
    listing, sets = Listing(context.inputs["images"]), open_embedding_sets(config)
    if sets[0].num_rows != len(listing):
        raise InputError(f"embeddings.uri: {config.uri} changed while it was being read; run again")
    tally = Tally(context, listing, max_error_rate=0.0)
    records = PartRecords(context.output.folder, source_digest(context.inputs["images"]))
    dims = tuple(found.dim for found in sets)
    size = rows_per_part(sum(dims), max(found.dtype.itemsize for found in sets))
    pending, _ = tally.resume(plan_parts(len(listing), size), records)
    for part in _write_parts(sets, dims, pending, records, draw):
        tally.add(part)
    metrics = tally.finish("ready-made", has_hashes=False)
    records.clear()
    names = ["ready-made", *(f"ready-made {number}" for number in range(2, len(sets) + 1))]
    return metrics | ({"feature_sets": names, "dims": dims} if len(sets) > 1 else {})


def _write_parts(
    sets: list[Embeddings], dims: tuple[int, ...], pending: list[PartRange], records: PartRecords, draw: Draw | None
) -> Iterator[PartRecord]:
    """Each source is read once, in order, from the first of the `pending` parts on."""
    if not pending:
        return
    by_start = {part.start: part for part in pending}
    position = pending[0].start
    for blocks in zip(*(found.blocks(pending[0].num_images, position) for found in sets), strict=True):
        rows_nD = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        part = by_start.get(position)
        if part is not None:
            assert len(rows_nD) == part.num_images
            table = part_table(np.arange(part.start, part.stop), rows_nD, dims=dims)
            yield write_part(records, part, table, draw=draw)
        position += len(rows_nD)
