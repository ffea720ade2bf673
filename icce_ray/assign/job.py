"""The assign stage on Ray Data: actors read embedding parts, label them and write the assignments, one row per part.

Each image is in exactly one part, a part is written whole or not at all, and a run that was killed takes up the
finished ones. The exemplars are picked beforehand, by one task, from the images of the consensus.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data

from icce_ray.assign.exemplars import pick_exemplars
from icce_ray.assign.parts import AssignPart, FinishedPart, Tally, UriReader, begin_try, plan_parts, write_part
from icce_ray.classifier.job import MODEL_NAME
from icce_ray.classifier.linear import LinearClassifier
from icce_ray.cluster import available_cpus, connect, worker_cpus
from icce_ray.config import Config
from icce_ray.context import StageContext
from icce_ray.embed.features import load_features
from icce_ray.embed.listing import SHARD_PREFIX
from icce_ray.errors import DamagedArtifactError, WorkerError, describe_cause
from icce_ray.store import Artifact, Folder

VERSION = 1
MAX_TRIES = 3
"""Of a part whose actor died: a part that kills every actor must not do so for ever."""
FREE_CPUS = 1.0
"""Not held by the actors: a pool that holds every CPU leaves none to feed it with."""
NO_PROGRESS_TIMEOUT_S = 1800.0


class Labeler:
    """The actor: holds the classifier, labels and writes parts. Restarts from its arguments alone."""

    def __init__(self, inputs: dict[str, Artifact], folder: Folder, run_id: str, exemplar_rows: Any) -> None:
        self.inputs = inputs
        self.folder = folder
        self.run_id = run_id
        # A copy: what comes out of the object store is shared with every process.
        self.exemplar_rows = np.array(exemplar_rows, dtype=np.int64)

    @cached_property
    def classifier(self) -> LinearClassifier:
        return LinearClassifier.from_bytes(self.inputs["classifier"].read_bytes(MODEL_NAME))

    @cached_property
    def uris(self) -> UriReader:
        return UriReader(self.inputs["images"])

    def __call__(self, batch: Any) -> Any:
        row = json.loads(batch["part"][0].as_py())
        wanted = AssignPart(**(row | {"inputs": tuple(row["inputs"])}))
        try:
            begin_try(wanted, self.folder, self.run_id, MAX_TRIES)
            finished = write_part(
                wanted,
                self.folder,
                embed=self.inputs["embed"],
                uris=self.uris,
                classifier=self.classifier,
                consensus_N=self.inputs["consensus"].read_array("labels.npy"),
                agreement_N=self.inputs["consensus"].read_array("agreement.npy"),
                exemplar_rows=self.exemplar_rows,
            )
        except Exception as error:
            # As a row: raised here, it would come back as Ray's own error, which has lost what went wrong.
            kind = "damaged" if isinstance(error, DamagedArtifactError) else "failed"
            return _row(wanted.name, **{kind: describe_cause(error)})
        return _row(wanted.name, finished=json.dumps(finished.to_json(wanted.source)))


def _row(name: str, **values: str) -> pa.Table:
    return pa.table({key: [values.get(key, "")] for key in ("finished", "damaged", "failed")} | {"name": [name]})


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Label every embedded image: assignments/part-*.parquet.

    Returns:
        num_images, num_in_consensus, num_outliers, num_exemplars, mean_confidence, num_clusters_used,
        cluster_sizes (images of each of the K).

    Raises:
        DamagedArtifactError: a part of an input is not what its manifest promises.
        WorkerError: workers died, or storage failed, more often than retries could mend; finished parts stay.
    """
    connect(config.resources)
    inputs, folder = dict(context.inputs), context.output.folder
    parts = plan_parts(inputs["embed"], config.assign.rows_per_part, _source(config, inputs))
    found = {part.name: FinishedPart.find(folder, part) for part in parts}
    finished = {name: part for name, part in found.items() if part is not None}
    pending = [part for part in parts if part.name not in finished]
    num_images = sum(part.num_rows for part in parts)
    context.progress.update(sum(part.tally.num_images for part in finished.values()), num_images)
    try:
        if pending:
            rows = _pick_exemplars(config, inputs)
            for name, part in _label(config, inputs, folder, pending, rows):
                finished[name] = part
                context.progress.update(sum(part.tally.num_images for part in finished.values()), num_images)
    except DamagedArtifactError:
        raise
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        raise WorkerError(
            "assign: workers failed for good; what is finished stays, and the same command goes on from there. "
            f"{describe_cause(error)}"
        ) from error
    total = Tally()
    for name in sorted(finished):
        context.output.add(finished[name].part)
        total += finished[name].tally
    assert total.num_images == num_images
    return total.metrics(config.num_clusters)


def _source(config: Config, inputs: dict[str, Artifact]) -> list[str]:
    consensus = inputs["consensus"]
    return [
        f"version {VERSION}, exemplars {config.assign.num_exemplars}, seed {config.seed}",
        *(inputs["images"].part(name).sha256 for name in inputs["images"].part_names(SHARD_PREFIX)),
        inputs["classifier"].part(MODEL_NAME).sha256,
        consensus.part("labels.npy").sha256,
        consensus.part("agreement.npy").sha256,
    ]


def _pick_exemplars(config: Config, inputs: dict[str, Artifact]) -> npt.NDArray[np.int64]:
    task = ray.remote(_exemplar_rows).options(num_cpus=1, max_retries=MAX_TRIES - 1)
    rows: npt.NDArray[np.int64] = ray.get(task.remote(inputs, config.assign.num_exemplars, config.seed))
    return rows


def _exemplar_rows(inputs: dict[str, Artifact], num_exemplars: int, seed: int) -> npt.NDArray[np.int64]:
    picked = pick_exemplars(
        load_features(inputs["embed"]).matrix,
        inputs["consensus"].read_array("labels.npy"),
        inputs["consensus"].read_array("agreement.npy"),
        LinearClassifier.from_bytes(inputs["classifier"].read_bytes(MODEL_NAME)),
        num_exemplars=num_exemplars,
        seed=seed,
    )
    return np.sort(np.concatenate(picked))


def _label(
    config: Config, inputs: dict[str, Artifact], folder: Folder, pending: list[AssignPart], exemplar_rows: Any
) -> Iterator[tuple[str, FinishedPart]]:
    """Label the `pending` parts; yields each as it is finished, in any order."""
    worker = config.resources.assign
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
            fn_constructor_kwargs={
                "inputs": inputs,
                "folder": folder,
                "run_id": uuid.uuid4().hex,
                "exemplar_rows": exemplar_rows,
            },
            num_cpus=int(1000 * cpus) / 1000,
        )
        for row in dataset.iter_rows():
            if row["damaged"]:
                raise DamagedArtifactError(row["damaged"])
            if row["failed"]:
                raise WorkerError(f"{row['name']}: {row['failed']}")
            yield row["name"], FinishedPart.from_json(json.loads(row["finished"]))
