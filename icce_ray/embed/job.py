"""The ``embed`` stage on Ray Data: read and decode in tasks, embed and write in actors, one row per part.

An actor writes its part to storage itself and hands back a few numbers, so each part is there once and whole, or not at
all, whoever dies. A run that was killed takes up the parts that lie there; parts of the same files that another listing
had are copied, and contents that were embedded before are not embedded again. Ready-made embeddings are only rewritten,
which needs no Ray.
"""

from __future__ import annotations

import json
import math
import re
import uuid
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data

from icce_ray import errors
from icce_ray.config import Config
from icce_ray.embed.backbone import PIXELS, EmbeddingPlan, embed_settings, make_backbone, plan_embedding
from icce_ray.embed.content_index import KnownContent, VectorReader, gather, model_key, siblings
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
    PartRange,
    PartRecord,
    copy_part,
    images_per_part,
    plan_parts,
    read_part,
    read_record,
    ready_made_rows_per_part,
    with_source,
    write_part,
)
from icce_ray.embed.finished_parts import ERRORS_NAME, Tally, convert_ready_made
from icce_ray.embed.networks import Backbone
from icce_ray.images.embedding_files import open_embeddings
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
from icce_ray.store import Artifact, Folder, Part
from icce_ray.store.attempts import Attempt
from icce_ray.store.s3 import use_s3

NO_PROGRESS_TIMEOUT_S = 1800.0
COPY_THREADS = 8
PARTS_PER_ACTOR = 3
"""Decoded parts for each actor: the one it works on, and what waits."""
REVISED_NAME = re.compile(r"part-.*\.r(\d+)\.parquet")


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Embed all images of the ``images`` artifact.

    Returns:
        Metrics: those of :meth:`Tally.finish`; where several backbones were run, feature_sets and dims of all.

    Raises:
        InputError: more failed images than `embed.max_error_rate` allows, or fewer good ones than `num_clusters`.
        ConfigError, ResourceError: the backbone cannot be built, as in :func:`make_backbone`.
        WorkerError: workers died, or storage failed, more often than retries could mend.
    """
    listing = Listing(context.inputs["images"])
    if config.embeddings.uri is not None:
        embeddings = open_embeddings(config.embeddings)
        if embeddings.num_rows != len(listing):
            raise errors.InputError(
                f"embeddings.uri: {config.embeddings.uri} changed while it was being read; run again"
            )
        tally = Tally(context, listing, max_error_rate=0.0)
        rows = ready_made_rows_per_part(embeddings.dim, embeddings.dtype.itemsize)
        pending = tally.resume(plan_parts(len(listing), rows))
        convert_ready_made(embeddings, pending, tally, context)
        return tally.finish("ready-made", *config.needed_images)
    plan = _plan_and_connect(config)
    tally = Tally(context, listing, config.embed.max_error_rate)
    job = _Job.of(config, context, plan)
    pending = tally.resume(_parts(config, listing, plan))
    pending = list(_not_copied(pending, job.folders, tally))
    _embed_all(config, job, pending, tally, context)
    return tally.finish(plan.names[0], *config.needed_images) | _sets(plan)


def retry(config: Config, context: StageContext, artifact: Artifact) -> dict[str, Any] | None:
    """Try the images of a finished artifact's errors table again, and only those: their parts are amended, under new
    names beside the old ones.

    Returns:
        Metrics as :func:`run`, for a manifest that takes the old one's place; None where all of them failed again.

    Raises:
        As :func:`run`.
    """
    listing = Listing(context.inputs["images"])
    failed = artifact.read_table(ERRORS_NAME)
    ids = [
        i for i, why in zip(failed["image_id"].to_pylist(), failed["reason"].to_pylist(), strict=True) if why != REMOVED
    ]
    plan = _plan_and_connect(config)
    tally = Tally(context, listing, config.embed.max_error_rate)
    job = _Job.of(config, context, plan)
    amended = []
    names = artifact.part_names("part-")
    for part, name in zip(_parts(config, listing, plan), names, strict=True):
        revised = REVISED_NAME.fullmatch(name)
        there = replace(part, revision=int(revised[1]) if revised else 0)
        only = tuple(image_id for image_id in ids if part.start <= image_id < part.stop)
        if only:
            amended.append(replace(there, revision=there.revision + 1, previous=name, only=only))
            continue
        record = read_record(artifact.folder, there)
        if record is None:
            raise errors.DamagedArtifactError(f"{artifact.folder.file_uri(name)}: missing or damaged")
        tally.add_finished(record)
    _embed_all(config, job, tally.resume(amended), tally, context)
    metrics = tally.finish(plan.names[0], *config.needed_images) | _sets(plan)
    if metrics["num_errors"] < len(failed):
        return metrics
    for part in amended:
        context.output.folder.remove(part.name)
    return None


def _plan_and_connect(config: Config) -> EmbeddingPlan:
    """Both can take seconds: one imports the networks' libraries where their plan is not known yet, the other waits for
    Ray's processes."""
    with ThreadPoolExecutor(1) as threads:
        planned = threads.submit(plan_embedding, config.embed)
        connect(config.resources)
        return planned.result()


def _sets(plan: EmbeddingPlan) -> dict[str, Any]:
    return {"feature_sets": plan.names, "dims": plan.dims} if len(plan.names) > 1 else {}


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
    def of(cls, config: Config, context: StageContext, plan: EmbeddingPlan) -> _Job:
        model, folder = model_key(embed_settings(config), plan), context.output.folder
        folders = [folder, *siblings(Folder.at(config.output) / "embed", folder, model)]
        return cls(config, context.inputs["images"], folders, plan, model, uuid.uuid4().hex)

    def tries(self, part: PartRange, step: str) -> Attempt:
        what = f"embed: images {part.start} to {part.stop - 1}"
        remedy = "use a smaller embed.batch_size, fewer workers on each machine, or machines with more memory"
        return Attempt(self.folders[0], f".{part.name}.{step}", self.run_id, what, remedy)

    def decode(self, part: PartRange, **options: Any) -> DecodedPart:
        images = _listing(self.images).rows(part.start, part.stop)
        max_pixels = self.config.embed.max_image_pixels
        return decode_part(part, images, self.plan.preprocessing, max_pixels=max_pixels, **options)


class Embedder:
    """The actor: holds the backbone, embeds decoded parts and writes them. Restarts from its arguments alone."""

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
        job = self.job
        return make_backbone(job.config, device=self.device, num_threads=self.num_threads, plan=job.plan)

    def __call__(self, batch: Any) -> Any:
        part, decoded = decoded_from_table(batch)
        try:
            record = asdict(self._embed(part, decoded))
        except (errors.UserError, errors.WorkerError) as error:
            # As a row: raised here, it would come back inside Ray's own traceback.
            return pa.table({"record": [""], "error": [json.dumps([type(error).__name__, str(error)])]})
        record["part"] = record["part"].model_dump(mode="json")
        return pa.table({"record": [json.dumps(record)], "error": [""]})

    def _embed(self, part: PartRange, decoded: DecodedPart) -> PartRecord:
        folder = self.job.folders[0]
        tries = self.job.tries(part, "embed")

        def embed(hashes: list[str]) -> dict[str, Outcome]:
            nonlocal decoded
            skipped = {content for content, row in zip(decoded.hashes, decoded.rows, strict=True) if row < 0}
            if not skipped.isdisjoint(hashes):  # was on storage when it was not decoded, and is no more
                decoded = self.job.decode(part)
            return embed_contents(part, decoded, hashes, self.backbone, self.backbone.batch_size, tries)

        contents = list(dict.fromkeys(decoded.hashes))
        outcomes, embedded = gather(part.name, contents, self.index, self.reader, embed)
        previous = read_part(folder, part.previous) if part.previous else None
        table = assemble_part(part, decoded, outcomes, self.job.plan.dims, model=self.job.model, previous=previous)
        record = write_part(folder, part, table)
        self.index.finish(part.name, [value for value in embedded if not isinstance(outcomes[value], str)])
        tries.end()
        return replace(record, num_embedded=len(embedded))


class _RemoteIndex:
    """The index of contents, which lives in an actor of its own."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **options: ray.get(getattr(self._handle, name).remote(*values, **options))


def decode(batch: Any, job: _Job, index: Any) -> Any:
    """The task: one row that names a part -> one row that holds the pixels of its new contents."""
    use_s3(job.config.storage)
    part = PartRange.from_json(batch["part"][0].as_py())
    tries = job.tries(part, "decode")
    decoded = job.decode(part, known=_RemoteIndex(index).known, tries=tries)
    tries.end()
    return decoded_to_table(part, decoded)


_listings: dict[tuple[str, str], Listing] = {}


def _listing(images: Artifact) -> Listing:
    """One per process: it keeps the shard it read last."""
    key = (images.folder.uri, images.identity)
    if key not in _listings:
        _listings.clear()
        _listings[key] = Listing(images)
    return _listings[key]


def _parts(config: Config, listing: Listing, plan: EmbeddingPlan) -> list[PartRange]:
    rows = images_per_part(len(listing), plan.preprocessing)
    return [with_source(part, listing.table(part.start, part.stop)) for part in plan_parts(len(listing), rows)]


def _not_copied(parts: list[PartRange], folders: list[Folder], tally: Tally) -> Iterator[PartRange]:
    """The parts that no other artifact has; the tally gets the others."""

    def copy(part: PartRange) -> PartRecord | None:
        copies = (copy_part(source, folders[0], part) for source in folders[1:])
        return next((record for record in copies if record is not None), None)

    with ThreadPoolExecutor(COPY_THREADS) as threads:
        for part, record in zip(parts, threads.map(copy, parts), strict=True):
            if record is None:
                yield part
            else:
                tally.add_finished(record)


def _embed_all(config: Config, job: _Job, pending: list[PartRange], tally: Tally, context: StageContext) -> None:
    if pending:
        wait_for_machines(config.resources, "embed", context.progress.note)
        # Closed, or a run that stops over its errors would leave the workers at work.
        with closing(_embed(config, job, pending)) as records:
            for record in records:
                tally.add(record)


def _embed(config: Config, job: _Job, pending: list[PartRange]) -> Generator[PartRecord, None, None]:
    """Embed the `pending` parts; yields each as it is finished, in any order."""
    worker = config.resources.embed
    num_workers = min(worker.num_workers, len(pending))
    threads = worker_cpus(worker)
    total = available_cpus()
    decoding_cpus = min(1.0, largest_machine_cpus() / 2)
    actor_cpus = cpus_beside(worker, num_workers, decoding_cpus)
    # While one task waits for the last slow answers of its part, another has the CPU.
    decode_cpus = decoding_cpus / (2 if any(map(is_remote, config.images.uris)) else 1)
    if actor_cpus == decode_cpus:
        # Ray Data runs both steps in the actor where they ask for the same. An image that kills its decoder would then
        # kill actors, which are slower to come back than tasks.
        actor_cpus -= 0.001
    data_context = ray.data.DataContext.get_current().copy()
    data_context.enable_progress_bars = False
    data_context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    # Where decoding is the faster of the two, it would fill Ray's object store, the more the more images there are.
    ahead = math.ceil(total / decode_cpus) + PARTS_PER_ACTOR * num_workers
    part_bytes = max(part.stop - part.start for part in pending) * math.prod(job.plan.preprocessing.shape)
    data_context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=ahead * part_bytes
    )
    index: Any = (
        ray.remote(KnownContent).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote(job.folders)  # type: ignore[attr-defined]
    )
    try:
        with ray.data.DataContext.current(data_context), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_retries has no name of its own in Ray Data yet
            dataset = (
                _one_by_one([part.to_json() for part in pending], decoding_cpus)
                .map_batches(
                    cast(Any, decode),
                    batch_size=1,
                    batch_format="pyarrow",
                    fn_kwargs={"job": job, "index": index},
                    num_cpus=decode_cpus,
                    max_retries=-1,  # `Attempt` says when to give up
                )
                .map_batches(
                    Embedder,
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(size=num_workers),
                    fn_constructor_kwargs={
                        "job": job,
                        "index": index,
                        "num_threads": max(1, int(threads)),
                        "device": "cuda" if worker.gpus_per_worker else "cpu",
                    },
                    num_cpus=actor_cpus,
                    num_gpus=worker.gpus_per_worker or None,
                )
            )
            dataset.set_name("embed")
            for row in dataset.iter_rows():
                yield _to_record(row)
    except (errors.UserError, errors.WorkerError):
        raise
    except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
        raise errors.WorkerError(
            f"embed: workers failed for good; what is finished stays, and the same command goes on from there. "
            f"{errors.describe_cause(error)}"
        ) from error
    finally:
        ray.kill(index)


def _one_by_one(parts: list[str], free_cpus: float) -> Any:
    """A dataset with a block for each part, made of what `free_cpus` CPUs can make."""
    rows = [{"part": part} for part in parts]  # an Arrow table would first be looked at by a task
    if free_cpus < 1:
        # Ray's repartition asks for a whole CPU, which machines of one CPU do not have beside an actor.
        return ray.data.from_items(rows, override_num_blocks=len(rows))
    # Milliseconds and kilobytes less for each part, of which there may be a million.
    return ray.data.from_items(rows, override_num_blocks=1).repartition(target_num_rows_per_block=1)


def _to_record(row: dict[str, Any]) -> PartRecord:
    if row["error"]:
        kind, message = json.loads(row["error"])
        raise getattr(errors, kind)(message)
    record = json.loads(row["record"])
    failed = [(image_id, reason) for image_id, reason in record["errors"]]
    return PartRecord(**{**record, "part": Part(**record["part"]), "errors": failed})
