"""The assign stage on Ray Data: actors read parts of the embeddings, label them and write the assignments.

Each image is in exactly one part. A part is recorded when its files are written, so a killed run resumes with the
others. With a consensus among its inputs the stage labels a run's own images, without one new images.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from icce_ray.assign.drift import summarize_drift
from icce_ray.assign.embeddings_to_label import AssignPart, EmbeddedImages, EmbeddingFiles, Source
from icce_ray.assign.exemplars import choose_exemplars
from icce_ray.assign.part_labeler import ASSIGNMENTS_FOLDER, CANDIDATES_FOLDER, PartLabeler
from icce_ray.assign.stage import ASSIGN
from icce_ray.assign.totals import Totals
from icce_ray.config import Config, WorkerResources
from icce_ray.errors import DamagedArtifactError, InputError, UserError, WorkerError, describe_cause
from icce_ray.runtime.cluster_resources import available_cpus, wait_for_machines, worker_cpus
from icce_ray.runtime.ray_cluster import connect
from icce_ray.stage import StageContext
from icce_ray.store import Folder, Part, PartRecord, PartRecords
from icce_ray.store.attempts import Attempt

EXEMPLARS_NAME = "exemplars.parquet"
DRIFT_NAME = "drift.json"
READ_THREADS = 16
FREE_CPUS = 1.0
"""CPUs that the actors leave free: with none left, Ray Data cannot feed them."""
NO_PROGRESS_TIMEOUT_S = 1800.0


class Labeler:
    """The actor. It restarts from its arguments alone."""

    def __init__(self, labeler: PartLabeler, records: PartRecords, run_id: str) -> None:
        self.labeler = labeler
        self.records = records
        self.run_id = run_id

    def __call__(self, batch: Any) -> Any:
        fields = json.loads(batch["part"][0].as_py())
        part = AssignPart(**(fields | {"inputs": tuple(fields["inputs"])}))
        try:
            attempt = Attempt(
                self.records.folder,
                f"{part.name}.attempt.json",
                self.run_id,
                f"assign: {part.name} ({part.num_rows:,} images)",
                "lower resources.assign.num_workers",
            )
            files, totals = self.labeler.label(part)
            record = self.records.write(part.name, files, totals.to_json())
            attempt.end()
        except Exception as error:
            # Returned as a row: raised here, it would reach the driver as an error of Ray's, without its cause.
            if isinstance(error, UserError):
                return _row(part.name, user_error=str(error))
            kind = "damaged" if isinstance(error, DamagedArtifactError) else "failed"
            return _row(part.name, **{kind: describe_cause(error)})
        return _row(part.name, record=record.model_dump_json())


def _row(name: str, **values: str) -> pa.Table:
    keys = ("record", "user_error", "damaged", "failed")
    return pa.table({key: [values.get(key, "")] for key in keys} | {"name": [name]})


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Label every image: assignments/part-*.parquet and exemplars.parquet; for new images also drift.json.

    Returns:
        num_images, num_in_consensus, num_outliers, num_exemplars, mean_confidence, num_clusters_used,
        cluster_sizes (images of each of the K).

    Raises:
        InputError: ready-made embeddings that cannot be read.
        DamagedArtifactError: a part of an input is not what its manifest promises.
        WorkerError: workers died, or storage failed, more often than they are retried; finished parts stay.
    """
    connect(config.resources)
    wait_for_machines(config.resources, "assign", context.progress.note)
    inputs, output = context.inputs, context.output
    source: Source
    if "embed" in inputs:
        source = EmbeddedImages(inputs["embed"], inputs["images"])
    else:
        source = EmbeddingFiles(config.embeddings, config.images.uri_column)
    num_exemplars = config.assign.num_exemplars
    labeler = PartLabeler(source, output.folder, inputs, num_exemplars=num_exemplars, seed=config.seed)
    records = PartRecords(output.folder, _digest(source, context, config))
    files, totals = _label_all(config.resources.assign, context, labeler, records)

    assignments = [file for file in files if file.name.startswith(ASSIGNMENTS_FOLDER)]
    candidates = [file for file in files if file.name.startswith(CANDIDATES_FOLDER)]
    exemplars = choose_exemplars(_read_tables(output.folder, candidates), num_exemplars)
    output.write_table(EXEMPLARS_NAME, exemplars)
    if "consensus" not in inputs:
        output.write_json(DRIFT_NAME, summarize_drift(totals, labeler.classifier))
    for file in assignments:
        output.add(file)
    records.clear()
    (output.folder / CANDIDATES_FOLDER.rstrip("/")).clear()
    return totals.metrics() | {"num_exemplars": len(exemplars)}


def _digest(source: Source, context: StageContext, config: Config) -> str:
    """Everything that the parts depend on: a record from something else doesn't count."""
    names = [name for name in ("sample", "consensus", "classifier") if name in context.inputs]
    checksums = [[part.sha256 for part in context.inputs[name].manifest.parts] for name in names]
    content = [ASSIGN.version, source.identity(), checksums, config.assign.num_exemplars, config.seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _label_all(
    workers: WorkerResources, context: StageContext, labeler: PartLabeler, records: PartRecords
) -> tuple[list[Part], Totals]:
    """Label the parts that are not finished. Returns the files and the totals of all."""
    finished = records.read_all()
    parts = labeler.source.plan()
    pending = [part for part in parts if part.name not in finished]
    num_done = sum(part.num_rows for part in parts if part.name in finished)
    num_images = sum(part.num_rows for part in parts)
    context.progress.update(num_done, num_images)
    try:
        if pending:
            num_rows = {part.name: part.num_rows for part in pending}
            for record in _label(workers, labeler, records, pending):
                finished[record.name] = record
                num_done += num_rows[record.name]
                context.progress.update(num_done, num_images)
    except (DamagedArtifactError, UserError):
        raise
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        raise WorkerError(
            "assign: the workers failed for good; finished parts stay, and the same command resumes. "
            f"{describe_cause(error)}"
        ) from error
    ordered = [finished[part.name] for part in parts]
    totals = Totals.add(Totals.from_json(record.metrics) for record in ordered)
    assert totals.num_images == num_images
    return [file for record in ordered for file in record.files], totals


def _label(
    worker: WorkerResources, labeler: PartLabeler, records: PartRecords, pending: Sequence[AssignPart]
) -> Iterator[PartRecord]:
    """Label the `pending` parts; yields each when it is finished, in any order."""
    num_workers = min(worker.num_workers, len(pending))
    total = available_cpus()
    cpus = min(worker_cpus(worker), max(total / 2, total - FREE_CPUS) / num_workers)
    data_context = ray.data.DataContext.get_current().copy()
    data_context.enable_progress_bars = False
    data_context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    rows = [json.dumps(asdict(part)) for part in pending]
    with ray.data.DataContext.current(data_context):
        dataset = ray.data.from_arrow([pa.table({"part": [row]}) for row in rows]).map_batches(
            Labeler,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            fn_constructor_kwargs={"labeler": labeler, "records": records, "run_id": uuid.uuid4().hex},
            num_cpus=int(1000 * cpus) / 1000,
        )
        dataset.set_name("assign")
        for row in dataset.iter_rows():
            if row["user_error"]:
                raise InputError(row["user_error"])
            if row["damaged"]:
                raise DamagedArtifactError(row["damaged"])
            if row["failed"]:
                raise WorkerError(f"{row['name']}: {row['failed']}")
            yield PartRecord.model_validate_json(row["record"])


def _read_tables(folder: Folder, files: Sequence[Part]) -> pa.Table:
    """The candidates of all parts, joined: a few images for each exemplar wanted."""
    with ThreadPoolExecutor(READ_THREADS) as threads:
        data = threads.map(lambda file: folder.read_bytes(file.name), files)
        return pa.concat_tables(pq.read_table(pa.BufferReader(each)) for each in data)
