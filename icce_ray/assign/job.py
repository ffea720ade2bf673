"""The assign stage on Ray Data: actors read parts of the embeddings, label them and write the assignments.

Each image is in exactly one part, a part is written whole or not at all, and a run that was killed takes up the
finished ones. With a consensus among its inputs this is the stage of a run: the images are the run's own, and exemplars
are picked beforehand, by one task. Without one, a finished run's model labels new images.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from icce_ray.assign.assignment_parts import AssignPart, FinishedPart, Tally, begin_try
from icce_ray.assign.drift import summarize_drift
from icce_ray.assign.exemplar_candidates import choose_exemplars
from icce_ray.assign.exemplars import pick_exemplars
from icce_ray.assign.sources import EmbeddedImages, EmbeddingFiles, Source
from icce_ray.assign.stage import ASSIGN
from icce_ray.assign.writers import NewWriter, RunWriter, Writer
from icce_ray.classifier.linear import MODEL_NAME, LinearClassifier
from icce_ray.config import Config, WorkerResources
from icce_ray.embed.feature_matrix import load_features
from icce_ray.errors import DamagedArtifactError, InputError, UserError, WorkerError, describe_cause
from icce_ray.runtime.ray_cluster import available_cpus, connect, wait_for_machines, worker_cpus
from icce_ray.sample.draw import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact

EXEMPLARS_NAME = "exemplars.parquet"
DRIFT_NAME = "drift.json"
MAX_TRIES = 3
"""Of a part whose actor died: a part that kills every actor must not do so for ever."""
FREE_CPUS = 1.0
"""Not held by the actors: a pool that holds every CPU leaves none to feed it with."""
NO_PROGRESS_TIMEOUT_S = 1800.0


class Labeler:
    """The actor: labels and writes parts. Restarts from its arguments alone."""

    def __init__(self, writer: Writer, run_id: str) -> None:
        self.writer = writer
        self.run_id = run_id

    def __call__(self, batch: Any) -> Any:
        row = json.loads(batch["part"][0].as_py())
        wanted = AssignPart(**(row | {"inputs": tuple(row["inputs"])}))
        try:
            begin_try(wanted, self.writer.folder, self.run_id, MAX_TRIES)
            finished = self.writer.write(wanted)
        except Exception as error:
            # As a row: raised here, it would come back as Ray's own error, which has lost what went wrong.
            if isinstance(error, UserError):
                return _row(wanted.name, mistake=str(error))
            kind = "damaged" if isinstance(error, DamagedArtifactError) else "failed"
            return _row(wanted.name, **{kind: describe_cause(error)})
        return _row(wanted.name, finished=json.dumps(finished.to_json(wanted.source)))


def _row(name: str, **values: str) -> pa.Table:
    keys = ("finished", "mistake", "damaged", "failed")
    return pa.table({key: [values.get(key, "")] for key in keys} | {"name": [name]})


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Label every image: assignments/part-*.parquet; for new images also exemplars.parquet and drift.json.

    Returns:
        num_images, num_in_consensus, num_outliers, num_exemplars, mean_confidence, num_clusters_used,
        cluster_sizes (images of each of the K).

    Raises:
        InputError: ready-made embeddings that cannot be read.
        DamagedArtifactError: a part of an input is not what its manifest promises.
        WorkerError: workers died, or storage failed, more often than retries could mend; finished parts stay.
    """
    connect(config.resources)
    wait_for_machines(config.resources, "assign", context.progress.note)
    if "consensus" in context.inputs:
        return _label_run(config, context).metrics(config.num_clusters)
    return _label_new(config, context)


def _label_run(config: Config, context: StageContext) -> Tally:
    inputs = context.inputs
    source = EmbeddedImages(inputs["embed"], inputs["images"])
    made_from = [
        f"version {ASSIGN.version}, exemplars {config.assign.num_exemplars}, seed {config.seed}",
        inputs["classifier"].part(MODEL_NAME).sha256,
        inputs["consensus"].part("labels.npy").sha256,
        inputs["consensus"].part("agreement.npy").sha256,
    ]
    parts = source.plan(config.assign.rows_per_part, made_from)

    def writer() -> Writer:
        rows = _pick_exemplars(config, dict(inputs))
        return RunWriter(
            source, context.output.folder, inputs["classifier"], inputs["consensus"], rows, inputs.get("sample")
        )

    tally, _ = _label_all(config, context, parts, writer)
    return tally


def _label_new(config: Config, context: StageContext) -> dict[str, Any]:
    model, num_exemplars = context.inputs["classifier"], config.assign.num_exemplars
    classifier = LinearClassifier.from_bytes(model.read_bytes(MODEL_NAME))
    source: Source
    if config.embeddings.uri is not None:
        source = EmbeddingFiles(config.embeddings, config.images.uri_column)
    else:
        source = EmbeddedImages(context.inputs["embed"], context.inputs["images"])
    made_from = [
        f"version {ASSIGN.version}, exemplars {num_exemplars}, seed {config.seed}",
        model.part(MODEL_NAME).sha256,
    ]
    parts = source.plan(config.assign.rows_per_part, made_from)
    num_images = sum(part.num_rows for part in parts)
    writer = NewWriter(
        source,
        context.output.folder,
        model,
        num_images=num_images,
        num_exemplars=num_exemplars,
        seed=config.seed,
    )
    tally, finished = _label_all(config, context, parts, lambda: writer)
    # Bounded: together the parts keep a few candidates for each exemplar wanted.
    folder = context.output.folder
    shortlists = [folder.read_bytes(part.beside.name) for part in finished if part.beside is not None]
    candidates = pa.concat_tables(pq.read_table(pa.BufferReader(data)) for data in shortlists)
    exemplars = choose_exemplars(candidates, num_exemplars)
    context.output.write_table(EXEMPLARS_NAME, exemplars)
    context.output.write_json(DRIFT_NAME, summarize_drift(tally, classifier))
    return tally.metrics(classifier.num_clusters) | {"num_exemplars": len(exemplars)}


def _label_all(
    config: Config, context: StageContext, parts: list[AssignPart], make_writer: Any
) -> tuple[Tally, list[FinishedPart]]:
    """Label what is not finished; the figures of all parts, and the parts in order."""
    folder = context.output.folder
    found = {part.name: FinishedPart.find(folder, part) for part in parts}
    finished = {name: part for name, part in found.items() if part is not None}
    pending = [part for part in parts if part.name not in finished]
    num_images = sum(part.num_rows for part in parts)
    context.progress.update(sum(part.tally.num_images for part in finished.values()), num_images)
    try:
        if pending:
            for name, part in _label(config.resources.assign, make_writer(), pending):
                finished[name] = part
                context.progress.update(sum(part.tally.num_images for part in finished.values()), num_images)
    except (DamagedArtifactError, UserError):
        raise
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        raise WorkerError(
            "assign: workers failed for good; what is finished stays, and the same command goes on from there. "
            f"{describe_cause(error)}"
        ) from error
    total = Tally()
    ordered = [finished[name] for name in sorted(finished)]
    for part in ordered:
        for file in part.files:
            context.output.add(file)
        total += part.tally
    assert total.num_images == num_images
    return total, ordered


def _pick_exemplars(config: Config, inputs: dict[str, Artifact]) -> npt.NDArray[np.int64]:
    task = ray.remote(_exemplar_rows).options(name="assign: pick exemplars", num_cpus=1, max_retries=MAX_TRIES - 1)
    rows: npt.NDArray[np.int64] = ray.get(task.remote(inputs, config.assign.num_exemplars, config.seed))
    return rows


def _exemplar_rows(inputs: dict[str, Artifact], num_exemplars: int, seed: int) -> npt.NDArray[np.int64]:
    picked = pick_exemplars(
        load_features(training_set(inputs)).matrix,
        inputs["consensus"].read_array("labels.npy"),
        inputs["consensus"].read_array("agreement.npy"),
        LinearClassifier.from_bytes(inputs["classifier"].read_bytes(MODEL_NAME)),
        num_exemplars=num_exemplars,
        seed=seed,
    )
    return np.sort(np.concatenate(picked))


def _label(worker: WorkerResources, writer: Writer, pending: list[AssignPart]) -> Iterator[tuple[str, FinishedPart]]:
    """Label the `pending` parts; yields each as it is finished, in any order."""
    num_workers = min(worker.num_workers, len(pending))
    total = available_cpus()
    cpus = min(worker_cpus(worker), max(total / 2, total - FREE_CPUS) / num_workers)
    data_context = ray.data.DataContext.get_current().copy()
    data_context.enable_progress_bars = False
    data_context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    rows = [json.dumps({**vars(part), "inputs": list(part.inputs)}) for part in pending]
    with ray.data.DataContext.current(data_context):
        dataset = ray.data.from_arrow([pa.table({"part": [row]}) for row in rows]).map_batches(
            Labeler,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            fn_constructor_kwargs={"writer": writer, "run_id": uuid.uuid4().hex},
            num_cpus=int(1000 * cpus) / 1000,
        )
        dataset.set_name("assign")
        for row in dataset.iter_rows():
            if row["mistake"]:
                raise InputError(row["mistake"])
            if row["damaged"]:
                raise DamagedArtifactError(row["damaged"])
            if row["failed"]:
                raise WorkerError(f"{row['name']}: {row['failed']}")
            yield row["name"], FinishedPart.from_json(json.loads(row["finished"]))
