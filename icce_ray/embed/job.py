"""The ``embed`` stage on Ray Data: read and decode in tasks, embed and write in actors, one row per part.

An actor writes its part to storage itself and hands back a few numbers, so each part is there once and whole, or not at
all, whoever dies. A run that was killed takes up the parts that lie there. Ready-made embeddings are only rewritten,
which needs no Ray.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data

from icce_ray import errors
from icce_ray.cluster import available_cpus, connect, worker_cpus
from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.embed.backbone import PIXELS, make_backbone, plan_embedding
from icce_ray.embed.images import Preprocessing, SeveralViews
from icce_ray.embed.listing import TABLE_NAME
from icce_ray.embed.networks import Backbone
from icce_ray.embed.parts import (
    PartRange,
    PartRecord,
    begin_try,
    decode_part,
    decoded_from_table,
    decoded_to_table,
    embed_part,
    end_tries,
    images_per_part,
    plan_parts,
    ready_made_rows_per_part,
    write_part,
)
from icce_ray.embed.ready_made import open_embeddings
from icce_ray.embed.tally import Tally, convert_ready_made
from icce_ray.store import Folder, Part

VERSION = 2
MAX_TRIES = 3
"""Of a part whose actor dies: Ray Data would restart it and try again for ever."""
NO_PROGRESS_TIMEOUT_S = 1800.0


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Embed all images of the ``images`` artifact.

    Returns:
        Metrics: num_images, num_errors, errors (by reason), dim, dtype, feature_set, images_per_s; where several
        backbones were run, feature_sets and dims of all, and dim that of the first.

    Raises:
        InputError: more failed images than `embed.max_error_rate` allows, or fewer good ones than `num_clusters`.
        ConfigError, ResourceError: the backbone cannot be built, as in :func:`make_backbone`.
        WorkerError: workers died, or storage failed, more often than retries could mend.
    """
    uris = context.inputs["images"].read_table(TABLE_NAME)["uri"]
    if config.embeddings.uri is not None:
        embeddings = open_embeddings(config.embeddings)
        if embeddings.num_rows != len(uris):
            raise errors.InputError(
                f"embeddings.uri: {config.embeddings.uri} changed while it was being read; run again"
            )
        tally = Tally(context, uris, max_error_rate=0.0)
        rows = ready_made_rows_per_part(embeddings.dim, embeddings.dtype.itemsize)
        pending = tally.resume(plan_parts(len(uris), rows))
        convert_ready_made(embeddings, pending, tally, context)
        return tally.finish("ready-made", config.num_clusters)
    plan = plan_embedding(config.embed)
    tally = Tally(context, uris, config.embed.max_error_rate)
    rows = images_per_part(plan.preprocessing, config.embed.images_per_part)
    pending = tally.resume(plan_parts(len(uris), rows))
    if pending:
        # Closed, or a run that stops over its errors would leave the workers at work.
        with closing(_embed(config, context.output.folder, plan.preprocessing, pending, uris)) as records:
            for record in records:
                tally.add(record)
    metrics = tally.finish(plan.names[0], config.num_clusters)
    return metrics | ({"feature_sets": plan.names, "dims": plan.dims} if len(plan.names) > 1 else {})


class Embedder:
    """The actor: holds the backbone, embeds decoded parts and writes them. Restarts from its arguments alone."""

    def __init__(self, config: Config, folder: Folder, run_id: str, num_threads: int, device: str) -> None:
        self.config = config
        self.folder = folder
        self.run_id = run_id
        self.num_threads = num_threads
        self.device = device
        if any(backbone.backbone != PIXELS for backbone in config.embed.backbones):
            import timm  # noqa: F401  # takes seconds, in which the first part is being decoded

    @cached_property
    def backbone(self) -> Backbone:
        return make_backbone(self.config, device=self.device, num_threads=self.num_threads)

    def __call__(self, batch: Any) -> Any:
        part, decoded = decoded_from_table(batch)
        try:
            begin_try(self.folder, part, self.run_id, MAX_TRIES)
            backbone = self.backbone
        except (errors.UserError, errors.WorkerError) as error:
            # As a row: raised here, it would come back inside Ray's own traceback.
            return pa.table({"record": [""], "error": [json.dumps([type(error).__name__, str(error)])]})
        table = embed_part(part, decoded, backbone, backbone.batch_size)
        record = asdict(write_part(self.folder, part, table))
        end_tries(self.folder, part)
        record["part"] = record["part"].model_dump(mode="json")
        return pa.table({"record": [json.dumps(record)], "error": [""]})


def decode(batch: Any, preprocessing: Preprocessing | SeveralViews, max_pixels: int) -> Any:
    """The task: one row that names a part's images -> one row that holds their pixels."""
    row = batch.to_pylist()[0]
    part = PartRange(row["index"], row["start"], row["stop"])
    return decoded_to_table(part, decode_part(part, row["uris"], preprocessing, max_pixels=max_pixels))


def _embed(
    config: Config,
    folder: Folder,
    preprocessing: Preprocessing | SeveralViews,
    pending: list[PartRange],
    uris: pa.ChunkedArray,
) -> Generator[PartRecord, None, None]:
    """Embed the `pending` parts; yields each as it is finished, in any order."""
    connect(config.resources)
    worker = config.resources.embed
    num_workers = min(worker.num_workers, len(pending))
    threads = worker_cpus(worker)
    # A pool that holds every CPU leaves none to read with, and both wait for ever.
    total = available_cpus()
    decode_cpus = min(1.0, total / 2)
    actor_cpus = int(1000 * min(threads, (total - decode_cpus) / num_workers)) / 1000
    if actor_cpus == decode_cpus:
        # Ray Data runs both steps in the actor where they ask for the same. An image that kills its decoder would then
        # kill actors without end, where a task gives up after its retries.
        actor_cpus -= 0.001
    data_context = ray.data.DataContext.get_current().copy()
    data_context.enable_progress_bars = False
    data_context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    try:
        with ray.data.DataContext.current(data_context):
            dataset = (
                ray.data.from_arrow([_row(part, uris) for part in pending])
                .map_batches(
                    cast(Any, decode),
                    batch_size=1,
                    batch_format="pyarrow",
                    fn_kwargs={"preprocessing": preprocessing, "max_pixels": config.embed.max_image_pixels},
                    num_cpus=decode_cpus,
                )
                .map_batches(
                    Embedder,
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(size=num_workers),
                    fn_constructor_kwargs={
                        "config": config,
                        "folder": folder,
                        "run_id": uuid.uuid4().hex,
                        "num_threads": max(1, int(threads)),
                        "device": "cuda" if worker.gpus_per_worker else "cpu",
                    },
                    num_cpus=actor_cpus,
                    num_gpus=worker.gpus_per_worker or None,
                )
            )
            for row in dataset.iter_rows():
                yield _to_record(row)
    except (errors.UserError, errors.WorkerError):
        raise
    except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
        raise errors.WorkerError(
            f"embed: workers failed for good; what is finished stays, and the same command goes on from there. "
            f"{errors.describe_cause(error)}"
        ) from error


def _row(part: PartRange, uris: pa.ChunkedArray) -> pa.Table:
    named = [uris.slice(part.start, part.stop - part.start).to_pylist()]
    return pa.table({"index": [part.index], "start": [part.start], "stop": [part.stop], "uris": named})


def _to_record(row: dict[str, Any]) -> PartRecord:
    if row["error"]:
        kind, message = json.loads(row["error"])
        raise getattr(errors, kind)(message)
    record = json.loads(row["record"])
    failed = [(image_id, reason) for image_id, reason in record["errors"]]
    return PartRecord(Part(**record["part"]), record["num_images"], failed)
