"""The ``embed`` stage on Ray Data: read and decode in tasks, embed and write in actors, one row per part.

An actor writes its part and the part's record to storage itself and returns a few numbers, so each part is there once
and whole, or not at all, whoever dies. A resumed run uses the recorded parts; parts of other finished artifacts with
the same images are copied; contents that were embedded before are not embedded again.
"""

from __future__ import annotations

import json
import math
import uuid
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data

from icce_ray import errors
from icce_ray.config import PIXELS, Config
from icce_ray.embed.backbone_plan import EmbeddingPlan, embed_settings, model_key, plan_embedding
from icce_ray.embed.build_backbone import build_backbone
from icce_ray.embed.content_index import ContentIndex, VectorReader, gather, siblings
from icce_ray.embed.decode_and_embed import (
    DecodedPart,
    Outcome,
    assemble_part,
    decode_part,
    decoded_from_table,
    decoded_to_table,
    embed_contents,
)
from icce_ray.embed.embedding_parts import (
    FinishedPart,
    PartRange,
    images_per_part,
    plan_parts,
    read_finished,
    read_part,
    revision_of,
    source_digest,
    write_part,
)
from icce_ray.embed.finished_parts import Tally
from icce_ray.embed.networks import Backbone
from icce_ray.embed.ready_made import rewrite_embeddings
from icce_ray.embed.reuse_parts import ReusableParts, copy_parts
from icce_ray.images.listing import REMOVED, Listing
from icce_ray.images.uris import is_remote
from icce_ray.runtime.cluster_resources import (
    available_cpus,
    cpus_beside,
    largest_machine_cpus,
    wait_for_machines,
    worker_cpus,
)
from icce_ray.runtime.ray_cluster import connect
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, Folder
from icce_ray.store.attempts import Attempt
from icce_ray.store.part_records import PartRecord, PartRecords
from icce_ray.store.s3 import use_s3

NO_PROGRESS_TIMEOUT_S = 1800.0
PARTS_PER_ACTOR = 3
"""Decoded parts for each actor: the one it works on, and those that wait."""


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Embed all images of the ``images`` artifact.

    Returns:
        Metrics: those of :meth:`Tally.finish`; images_per_part; with several backbones feature_sets and dims of all.

    Raises:
        InputError: more failed images than `embed.max_error_rate` allows.
        ConfigError, ResourceError: the backbone cannot be built, as in :func:`build_backbone`.
        WorkerError: workers died, or storage failed, more often than retries could repair.
    """
    if config.embeddings.uri is not None:
        return rewrite_embeddings(config.embeddings, context)
    job = _Job.of(config, context)
    listing = Listing(job.images)
    tally = Tally(context, listing, config.embed.max_error_rate)
    size = images_per_part(len(listing), job.plan.preprocessing)
    missing, pending = tally.resume(plan_parts(len(listing), size), job.records), []
    for part, copied in copy_parts(missing, listing, job.reusable(), job.records):
        if copied is None:
            pending.append(part)
        else:
            tally.add_earlier(copied)
    _embed_all(config, job, pending, tally, context)
    job.records.clear()
    return tally.finish(job.plan.names[0]) | _layout(job.plan, size)


def retry(config: Config, context: StageContext, artifact: Artifact) -> dict[str, Any] | None:
    """Try the images of a finished artifact's errors table again, and only those: their parts are amended, under new
    names beside the old ones.

    Returns:
        Metrics as :func:`run`, for a manifest that replaces the old one; None if all images failed again.

    Raises:
        DamagedArtifactError: a part of the artifact is damaged. Otherwise as :func:`run`.
    """
    job = _Job.of(config, context)
    listing = Listing(job.images)
    tally = Tally(context, listing, config.embed.max_error_rate)
    earlier = ReusableParts(artifact, listing)
    amended = []
    for part in earlier.parts:
        record = earlier.record(part)
        (file,), failed = record.files, record.metrics["errors"]
        if any(reason != REMOVED for _, reason in failed):
            only = tuple(image_id for image_id, _ in failed)
            amended.append(replace(part, revision=revision_of(file.name) + 1, previous=file.name, only=only))
            continue
        finished = read_finished(artifact.folder, record)
        if finished is None:
            raise errors.DamagedArtifactError(f"{artifact.folder.file_uri(file.name)}: missing or damaged")
        tally.add_earlier(finished)
    _embed_all(config, job, tally.resume(amended, job.records), tally, context)
    job.records.clear()
    metrics = tally.finish(job.plan.names[0]) | _layout(job.plan, artifact.metrics["images_per_part"])
    if metrics["num_errors"] < artifact.metrics["num_errors"]:
        return metrics
    for part in amended:
        context.output.folder.remove(part.file_name)
    return None


def _layout(plan: EmbeddingPlan, images_per_part: int) -> dict[str, Any]:
    sets = {"feature_sets": plan.names, "dims": plan.dims} if len(plan.names) > 1 else {}
    return sets | {"images_per_part": images_per_part}


@dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    config: Config
    images: Artifact
    folders: list[Folder]
    """Where embeddings of the same model lie; the first is this artifact's."""
    plan: EmbeddingPlan
    model: str
    run_id: str

    @classmethod
    def of(cls, config: Config, context: StageContext) -> _Job:
        # Both can take seconds: one imports timm if the plan is not known yet, the other waits for Ray's processes.
        with ThreadPoolExecutor(1) as threads:
            planned = threads.submit(plan_embedding, config.embed)
            connect(config.resources)
            plan = planned.result()
        model = model_key(embed_settings(config.embed, config.embeddings, config.seed), plan)
        folder = context.output.folder
        folders = [folder, *siblings(Folder.at(config.output) / "embed", folder, model)]
        return cls(config, context.inputs["images"], folders, plan, model, uuid.uuid4().hex)

    @property
    def records(self) -> PartRecords:
        return PartRecords(self.folders[0], source_digest(self.images, self.model))

    def reusable(self) -> list[ReusableParts]:
        """Finished artifacts of the same model with another listing."""
        found = []
        for artifact in filter(None, map(Artifact.find, self.folders[1:])):
            images = Artifact.find(Folder.at(self.config.output) / "images" / artifact.manifest.inputs["images"])
            if images is not None:
                found.append(ReusableParts(artifact, Listing(images)))
        return found

    def attempt(self, part: PartRange, step: str) -> Attempt:
        what = f"embed: images {part.start} to {part.stop - 1}"
        remedy = "use a smaller embed.batch_size, fewer workers on each machine, or machines with more memory"
        return Attempt(self.folders[0], f".{part.name}.{step}", self.run_id, what, remedy)

    def decode(self, part: PartRange, **options: Any) -> DecodedPart:
        images = _listing(self.images).rows(part.start, part.stop)
        max_pixels = self.config.embed.max_image_pixels
        return decode_part(part, images, self.plan.preprocessing, max_pixels=max_pixels, **options)


class Embedder:
    """The actor: holds the backbone, embeds decoded parts and writes them. It can be restarted from its arguments."""

    def __init__(self, job: _Job, index: Any, num_threads: int, device: str) -> None:
        use_s3(job.config.storage)
        self.job = job
        self.index = _RemoteIndex(index)
        self.reader = VectorReader(job.folders)
        self.num_threads = num_threads
        self.device = device
        if any(backbone.backbone != PIXELS for backbone in job.config.embed.backbones):
            import timm  # noqa: F401  # takes seconds, in which the first part is being decoded

    @cached_property
    def backbone(self) -> Backbone:
        config = self.job.config
        return build_backbone(
            config.embed, config.seed, device=self.device, num_threads=self.num_threads, plan=self.job.plan
        )

    def __call__(self, batch: Any) -> Any:
        part, decoded = decoded_from_table(batch)
        try:
            finished = self._embed(part, decoded)
        except (errors.UserError, errors.WorkerError) as error:
            # As a row: raised here, it would come back inside Ray's own traceback.
            return _to_row(error=json.dumps([type(error).__name__, str(error)]))
        return _to_row(finished.record.model_dump_json(), finished.image_ids, finished.hashes)

    def _embed(self, part: PartRange, decoded: DecodedPart) -> FinishedPart:
        attempt = self.job.attempt(part, "embed")

        def embed(hashes: list[str]) -> dict[str, Outcome]:
            nonlocal decoded
            skipped = {content for content, row in zip(decoded.hashes, decoded.rows, strict=True) if row < 0}
            if not skipped.isdisjoint(hashes):  # on storage when decoding was skipped, but no longer
                decoded = self.job.decode(part)
            return embed_contents(part, decoded, hashes, self.backbone, self.backbone.batch_size, attempt)

        contents = list(dict.fromkeys(decoded.hashes))
        outcomes, embedded = gather(part.file_name, contents, self.index, self.reader, embed)
        previous = read_part(self.job.folders[0], part.previous) if part.previous else None
        dims, model = self.job.plan.dims, self.job.model
        table, failed = assemble_part(decoded, outcomes, dims, model=model, previous=previous)
        finished = write_part(self.job.records, part, table, failed, len(embedded))
        self.index.finish(part.file_name, [value for value in embedded if not isinstance(outcomes[value], str)])
        attempt.end()
        return finished


class _RemoteIndex:
    """The content index, which lives in an actor of its own."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **options: ray.get(getattr(self._handle, name).remote(*values, **options))


def decode(batch: Any, job: _Job, index: Any) -> Any:
    """The task: one row that names a part -> one row that holds the pixels of its new contents."""
    use_s3(job.config.storage)
    part = PartRange.from_json(batch["part"][0].as_py())
    attempt = job.attempt(part, "decode")
    decoded = job.decode(part, known=_RemoteIndex(index).known, attempt=attempt)
    attempt.end()
    return decoded_to_table(part, decoded)


_listings: dict[tuple[str, str], Listing] = {}


def _listing(images: Artifact) -> Listing:
    """One per process: it keeps the part it read last."""
    key = (images.folder.uri, images.identity)
    if key not in _listings:
        _listings.clear()
        _listings[key] = Listing(images)
    return _listings[key]


def _embed_all(config: Config, job: _Job, pending: list[PartRange], tally: Tally, context: StageContext) -> None:
    if pending:
        wait_for_machines(config.resources, "embed", context.progress.note)
        # Closed, so that a run that stops because of its errors doesn't leave its workers working.
        with closing(_embed(config, job, pending)) as finished:
            for part in finished:
                tally.add(part)


def _embed(config: Config, job: _Job, pending: list[PartRange]) -> Generator[FinishedPart, None, None]:
    """Embed the `pending` parts; yields each as it is finished, in any order."""
    worker = config.resources.embed
    num_workers = min(worker.num_workers, len(pending))
    decoding_cpus = min(1.0, largest_machine_cpus() / 2)
    actor_cpus = cpus_beside(worker, num_workers, decoding_cpus)
    # While one task waits for the last slow answers of its part, another can use the CPU.
    decode_cpus = decoding_cpus / (2 if any(map(is_remote, config.images.uris)) else 1)
    if actor_cpus == decode_cpus:
        # Ray Data fuses steps that ask for the same resources. An image that kills its decoder would then kill actors,
        # which take longer to come back than tasks.
        actor_cpus -= 0.001
    # If decoding is the faster step, it would fill Ray's object store, the more the more images there are.
    ahead = math.ceil(available_cpus() / decode_cpus) + PARTS_PER_ACTOR * num_workers
    part_bytes = max(part.num_images for part in pending) * math.prod(job.plan.preprocessing.shape)
    data_context = ray.data.DataContext.get_current().copy()
    data_context.enable_progress_bars = False
    data_context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    data_context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=ahead * part_bytes
    )
    index: Any = (
        ray.remote(ContentIndex).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote(job.folders)  # type: ignore[attr-defined]
    )
    try:
        with ray.data.DataContext.current(data_context), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray Data warns of max_retries, which it has no parameter for yet
            dataset = (
                _one_block_per_part(pending, decoding_cpus)
                .map_batches(
                    cast(Any, decode),
                    batch_size=1,
                    batch_format="pyarrow",
                    fn_kwargs={"job": job, "index": index},
                    num_cpus=decode_cpus,
                    max_retries=-1,  # `Attempt` decides when to give up
                )
                .map_batches(
                    Embedder,
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(size=num_workers),
                    fn_constructor_kwargs={
                        "job": job,
                        "index": index,
                        "num_threads": max(1, int(worker_cpus(worker))),
                        "device": "cuda" if worker.gpus_per_worker else "cpu",
                    },
                    num_cpus=actor_cpus,
                    num_gpus=worker.gpus_per_worker or None,
                )
            )
            dataset.set_name("embed")
            for row in dataset.iter_rows():
                yield _from_row(row)
    except (errors.UserError, errors.WorkerError):
        raise
    except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
        raise errors.WorkerError(
            f"embed: workers failed for good; finished parts are kept, and the same command continues from there. "
            f"{errors.describe_cause(error)}"
        ) from error
    finally:
        ray.kill(index)


def _one_block_per_part(parts: list[PartRange], free_cpus: float) -> Any:
    """A dataset with a block for each part. `free_cpus` CPUs must be enough to make it."""
    rows = [{"part": part.to_json()} for part in parts]  # a task would first look at an Arrow table
    if free_cpus < 1:
        # Ray's repartition needs a whole CPU, which a machine with one CPU doesn't have beside an actor.
        return ray.data.from_items(rows, override_num_blocks=len(rows))
    # Saves milliseconds and kilobytes for each part, of which there may be a million.
    return ray.data.from_items(rows, override_num_blocks=1).repartition(target_num_rows_per_block=1)


def _to_row(
    record: str = "", image_ids: Sequence[int] = (), hashes: Sequence[str | None] = (), error: str = ""
) -> pa.Table:
    columns = {
        "record": [record],
        "image_ids": pa.array([image_ids], pa.list_(pa.int64())),
        "hashes": pa.array([hashes], pa.list_(pa.string())),
        "error": [error],
    }
    return pa.table(columns)


def _from_row(row: dict[str, Any]) -> FinishedPart:
    if row["error"]:
        kind, message = json.loads(row["error"])
        raise getattr(errors, kind)(message)
    return FinishedPart(PartRecord.model_validate_json(row["record"]), list(row["image_ids"]), list(row["hashes"]))
