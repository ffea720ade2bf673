"""The ``embed`` stage for ready-made embeddings, which are only rewritten as parts, in one process."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from icce_ray.config import EmbeddingsConfig
from icce_ray.embed.embedding_parts import PartRange, part_table, plan_parts, rows_per_part, source_digest, write_part
from icce_ray.embed.feature_matrix import Draw
from icce_ray.embed.finished_parts import Tally
from icce_ray.errors import InputError
from icce_ray.images.embedding_files import Embeddings, open_embedding_sets
from icce_ray.images.listing import Listing
from icce_ray.stage import StageContext
from icce_ray.store.part_records import PartRecord, PartRecords


def rewrite_embeddings(
    config: EmbeddingsConfig, context: StageContext, draw: Draw | None = None, max_error_rate: float = 0.0
) -> dict[str, Any]:
    """Write the parts that are missing, and beside them the rows that `draw` chooses. A row that is null, not finite or
    of another length in any of the sources is an error. Metrics as :meth:`Tally.finish`. Raises InputError: embeddings
    that cannot be used, more errors than `max_error_rate` allows, or files that have changed since they were listed."""
    listing, sets = Listing(context.inputs["images"]), open_embedding_sets(config)
    if sets[0].num_rows != len(listing):
        raise InputError(f"embeddings.uri: {config.uri} changed while it was being read; run again")
    tally = Tally(context, listing, max_error_rate)
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
        rows_nD = blocks[0].rows_nD if len(blocks) == 1 else np.concatenate([each.rows_nD for each in blocks], axis=1)
        part = by_start.get(position)
        position += len(rows_nD)
        if part is not None:
            assert len(rows_nD) == part.num_images
            problems: dict[int, str] = {}
            for number, block in reversed(list(enumerate(blocks))):
                place = f"embeddings.extra[{number - 1}]: " if number else ""
                problems |= {row: f"{place}{problem}" for row, problem in block.problems().items()}
            ids = np.arange(part.start, part.stop)
            if problems:
                ids, rows_nD = np.delete(ids, list(problems)), np.delete(rows_nD, list(problems), axis=0)
            errors = [(part.start + row, problem) for row, problem in sorted(problems.items())]
            yield write_part(records, part, part_table(ids, rows_nD, dims=dims), errors, draw)
