"""The ``embed`` stage: plan the parts, use what is there, and have the rest embedded, on Ray or in this process.

A resumed run uses the recorded parts; parts of other finished artifacts with the same images are shared; contents that
were embedded before are not embedded again.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from icce_ray.config import Config, EmbeddingsConfig
from icce_ray.embed.backbone_plan import EmbeddingPlan
from icce_ray.embed.embedding_parts import (
    PartRange,
    images_per_item,
    items_per_part,
    part_table,
    plan_parts,
    revision_of,
    rows_per_part,
    source_digest,
    write_part,
)
from icce_ray.embed.feature_matrix import Draw
from icce_ray.embed.finished_parts import ReusableParts, Tally, reuse_parts
from icce_ray.embed.job import embed_on_ray
from icce_ray.embed.part_embedder import EmbedTask, embed_here
from icce_ray.embed.work_items import OpenPart, OpenParts, WorkItems, remove_items
from icce_ray.errors import DamagedArtifactError, InputError
from icce_ray.images.embedding_files import Embeddings, open_embedding_sets
from icce_ray.images.listing import REMOVED, Listing
from icce_ray.images.stage import num_listed
from icce_ray.runtime.cluster_resources import wait_for_machines
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.ray_cluster import connect, runs_here
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, PartRecord, PartRecords


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Embed all images of the ``images`` artifact. Returns metrics: those of :meth:`Tally.finish`; images_per_part;
    with several backbones feature_sets and dims of all. Raises InputError: more failed images than
    `embed.max_error_rate` allows; ConfigError, ResourceError: the backbone cannot be built, as in
    :func:`build_backbone`; WorkerError: workers died, or storage failed, more often than retries could repair."""
    if config.embeddings.uri is not None:
        draw = Draw.of(num_listed(context.inputs["images"]), config.sample.max_images, config.seed)
        return rewrite_embeddings(config.embeddings, context, draw, config.embed.max_error_rate)
    listing = Listing(context.inputs["images"])
    task = _task(config, context, len(listing))
    tally = Tally(context, listing, config.embed.max_error_rate)
    size = images_per_item(len(listing), task.plan.preprocessing)
    num_items = items_per_part(len(listing), size, sum(task.plan.dims))
    missing, done = tally.resume(plan_parts(len(listing), num_items * size), task.records)
    pending = []
    for part, reused in reuse_parts(missing, listing, task.reusable(), task.records):
        if reused is None:
            pending.append(OpenPart(part, WorkItems(part, size)))
        else:
            tally.add_earlier(reused)
    _embed_all(task, OpenParts(pending, done), tally, context.progress, len(listing))
    return _finish(task, tally) | _layout(task.plan, num_items * size)


def retry(config: Config, context: StageContext, artifact: Artifact) -> dict[str, Any] | None:
    """Try the images of a finished artifact's errors table again, and only those: their parts are amended, under new
    names beside the old ones. Returns metrics as :func:`run`, for a manifest that replaces the old one; None if all
    images failed again. Raises DamagedArtifactError: a part of the artifact that is amended is damaged. Otherwise as
    :func:`run`."""
    listing = Listing(context.inputs["images"])
    task = _task(config, context, len(listing))
    tally = Tally(context, listing, config.embed.max_error_rate)
    earlier, size = ReusableParts(artifact, listing), images_per_item(len(listing), task.plan.preprocessing)
    amended: dict[str, OpenPart] = {}
    for part in earlier.parts:
        record = earlier.record(part)
        (file,), failed = record.files, record.metrics["errors"]
        if any(reason != REMOVED for _, reason in failed):
            again = replace(part, revision=revision_of(file.name) + 1)
            items = WorkItems(again, size).with_images([image_id for image_id, _ in failed])
            amended[again.name] = OpenPart(again, items, record)
        else:
            tally.add_earlier(record)
    missing, done = tally.resume([open_part.part for open_part in amended.values()], task.records)
    for part in missing:
        tally.add_untouched(part.num_images - sum(item.num_images for item in amended[part.name].items))
    pending = OpenParts([amended[part.name] for part in missing], done)
    _embed_all(task, pending, tally, context.progress, len(listing))
    metrics = _finish(task, tally) | _layout(task.plan, artifact.metrics["images_per_part"])
    return metrics if metrics["num_errors"] < artifact.metrics["num_errors"] else None


def _layout(plan: EmbeddingPlan, images_per_part: int) -> dict[str, Any]:
    sets = {"feature_sets": plan.names, "dims": plan.dims} if len(plan.names) > 1 else {}
    return sets | {"images_per_part": images_per_part}


def _task(config: Config, context: StageContext, num_images: int) -> EmbedTask:
    images, folder = context.inputs["images"], context.output.folder
    if runs_here(config.resources, num_images):
        return EmbedTask.of(config, images, folder)
    # Both can take seconds: one imports timm if the plan is not known yet, the other waits for Ray's processes.
    with ThreadPoolExecutor(1) as threads:
        task = threads.submit(EmbedTask.of, config, images, folder)
        connect(config.resources)
        return task.result()


def _finish(task: EmbedTask, tally: Tally) -> dict[str, Any]:
    """Sum up, then remove the records: a run that is killed meanwhile has nothing to embed again."""
    try:
        metrics = tally.finish(task.plan.names[0])
    except DamagedArtifactError:
        task.records.discard_damage()
        raise
    remove_items(task.folders[0])
    task.records.clear()
    return metrics


def _embed_all(task: EmbedTask, pending: OpenParts, tally: Tally, progress: Progress, num_images: int) -> None:
    for record in pending.done.values():
        tally.add_earlier(record)
    if not pending.whole and not len(pending):
        return
    resources = task.config.resources
    if runs_here(resources, num_images):
        parts = embed_here(task, pending, tally.show)
    else:
        wait_for_machines(resources, "embed", progress.note)
        parts = embed_on_ray(task, pending, tally.show, progress)
    # Closed, so that a run that stops because of its errors doesn't leave its workers working.
    with closing(parts) as finished:
        for part in finished:
            tally.add(part)


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
