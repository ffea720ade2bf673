"""The assign stage on Ray: actors read parts of the embeddings, label them and write the assignments.

Each image is in exactly one part. A part is recorded when its files are written, so a killed run resumes with the
others. With a consensus among its inputs the stage labels a run's own images, without one new images.
"""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.assign.drift import Totals, summarize_drift
from icce_ray.assign.embeddings_to_label import AssignPart, EmbeddedImages, EmbeddingFiles, Source
from icce_ray.assign.exemplars import choose_exemplars
from icce_ray.assign.new_clusters import NEW_CLUSTERS_NAME, find_new_clusters
from icce_ray.assign.part_labeler import (
    ASSIGNMENTS_FOLDER,
    CANDIDATES_FOLDER,
    ERRORS_FOLDER,
    OUTLIERS_FOLDER,
    PartLabeler,
)
from icce_ray.assign.stage import ASSIGN
from icce_ray.config import Config, ResourcesConfig
from icce_ray.embed.embedding_parts import ERRORS_NAME
from icce_ray.embed.finished_parts import ERRORS_SCHEMA, too_many_errors
from icce_ray.images.listing import FIRST_ID, first_id
from icce_ray.runtime.workers import run_on_actors
from icce_ray.stage import StageContext
from icce_ray.store import Folder, Part, PartRecord, PartRecords
from icce_ray.store.attempts import Attempt

EXEMPLARS_NAME = "exemplars.parquet"
DRIFT_NAME = "drift.json"
READ_THREADS = 16


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Label every image: assignments/part-*.parquet and exemplars.parquet; for new images also drift.json and
    new_clusters.parquet; for ready-made embeddings also errors.parquet.

    Returns num_images, num_in_consensus, num_noise, num_outliers, num_exemplars, mean_consensus_probability,
    num_clusters_used, cluster_sizes (images of each of the K); for new images new_cluster_sizes and first_id, which was
    added to the ids of the listing or the rows. Raises InputError: ready-made embeddings that cannot be read, or more
    bad rows than `embed.max_error_rate` allows; DamagedArtifactError: a part of an input is not what its manifest
    promises; WorkerError: workers died, or storage failed, more often than they are retried; finished parts stay.
    """
    inputs, output = context.inputs, context.output
    source: Source
    if "embed" in inputs:
        source = EmbeddedImages(inputs["embed"], inputs["images"])
    else:
        source = EmbeddingFiles(config.embeddings, config.images.uri_column)
    is_new, num_exemplars = "consensus" not in inputs, config.assign.num_exemplars
    start = first_id(config.output, config.images, config.embeddings) if is_new else 0
    labeler = PartLabeler(source, output.folder, inputs, num_exemplars=num_exemplars, seed=config.seed, first_id=start)
    records = PartRecords(output.folder, _digest(source, context, config))
    files, totals = _label_all(config.resources, context, labeler, records, config.embed.max_error_rate)

    assignments = [file for file in files if file.name.startswith(ASSIGNMENTS_FOLDER)]
    candidates = [file for file in files if file.name.startswith(CANDIDATES_FOLDER)]
    exemplars = choose_exemplars(_read_tables(output.folder, candidates), num_exemplars)
    output.write_table(EXEMPLARS_NAME, exemplars)
    metrics = totals.metrics() | {"num_exemplars": len(exemplars)}
    if is_new:
        metrics[FIRST_ID] = start
        output.write_json(DRIFT_NAME, summarize_drift(totals, labeler.classifier))
        outliers = [file for file in files if file.name.startswith(OUTLIERS_FOLDER)]
        found = find_new_clusters(_read_tables(output.folder, outliers), labeler.classifier, config.seed)
        output.write_table(NEW_CLUSTERS_NAME, found)
        if "embed" not in inputs:
            output.write_table(ERRORS_NAME, _errors(output.folder, files))
        metrics["new_cluster_sizes"] = np.bincount(found["new_cluster"].to_numpy()).tolist()
    for file in assignments:
        output.add(file)
    records.clear()
    for folder in (CANDIDATES_FOLDER, OUTLIERS_FOLDER, ERRORS_FOLDER):
        (output.folder / folder.rstrip("/")).clear()
    return metrics


def _label_part(part: AssignPart, labeler: PartLabeler, records: PartRecords, run_id: str) -> PartRecord:
    """Label and record a part, in one of the processes."""
    what, remedy = f"assign: {part.name} ({part.num_rows:,} images)", "lower resources.assign.num_workers"
    attempt = Attempt(records.folder, f"{part.name}.attempt.json", run_id, what, remedy).begin()
    files, totals = labeler.label(part)
    record = records.write(part.name, files, totals.to_json())
    attempt.end()
    return record


def _digest(source: Source, context: StageContext, config: Config) -> str:
    """Everything that the parts depend on: a record from something else doesn't count."""
    names = [name for name in ("sample", "consensus", "corrections", "classifier") if name in context.inputs]
    checksums = [context.inputs[name].checksum() for name in names]
    content = [ASSIGN.version, source.identity(), checksums, config.assign.num_exemplars, config.seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _label_all(
    resources: ResourcesConfig, context: StageContext, labeler: PartLabeler, records: PartRecords, max_error_rate: float
) -> tuple[list[Part], Totals]:
    """Label the parts that are not finished. Returns the files and the totals of all. Raises InputError: more rows of
    ready-made embeddings cannot be used than `max_error_rate` allows."""
    finished = records.read_all()
    parts = labeler.source.plan()
    pending = [part for part in parts if part.name not in finished]
    num_done = sum(part.num_rows for part in parts if part.name in finished)
    num_images = sum(part.num_rows for part in parts)
    context.progress.update(num_done, num_images)
    work = partial(_label_part, labeler=labeler, records=records, run_id=uuid.uuid4().hex)
    num_errors = sum(map(_num_errors, finished.values()))
    for part, record in run_on_actors(
        "assign", lambda: work, pending, resources=resources, progress=context.progress, num_images=num_images
    ):
        finished[part.name] = record
        num_done += part.num_rows
        num_errors += _num_errors(record)
        context.progress.update(num_done, num_images, num_errors=num_errors)
        if num_errors > max_error_rate * num_images:
            break
    if num_errors > max_error_rate * num_images:
        files = [file for record in finished.values() for file in record.files]
        errors = _errors(records.folder, files)
        reasons, uris = errors["reason"].to_pylist(), errors["uri"].to_pylist()
        examples = dict(zip(reversed(reasons), reversed(uris), strict=True))  # the first of each
        common = Counter(reasons).most_common()
        raise too_many_errors(num_errors, num_images, max_error_rate, common, examples.__getitem__)
    ordered = [finished[part.name] for part in parts]
    totals = Totals.add(Totals.from_json(record.metrics) for record in ordered)
    assert totals.num_images + num_errors == num_images
    return [file for record in ordered for file in record.files], totals


def _num_errors(record: PartRecord) -> int:
    return sum(file.rows or 0 for file in record.files if file.name.startswith(ERRORS_FOLDER))


def _errors(folder: Folder, files: Iterable[Part]) -> pa.Table:
    """The rows of all parts that cannot be used."""
    found = [file for file in files if file.name.startswith(ERRORS_FOLDER)]
    return _read_tables(folder, found) if found else ERRORS_SCHEMA.empty_table()


def _read_tables(folder: Folder, files: Sequence[Part]) -> pa.Table:
    """The tables of all parts, joined: candidates, a few images for each exemplar wanted, or outliers."""
    with ThreadPoolExecutor(READ_THREADS) as threads:
        data = threads.map(lambda file: folder.read_bytes(file.name), files)
        return pa.concat_tables(pq.read_table(pa.BufferReader(each)) for each in data)
