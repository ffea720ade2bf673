"""The choice of the number of clusters on Ray: a task for each number and seed. A run that was killed keeps the
clusterings that it had made."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icce_ray.config import Config, HeadsConfig, NeighborsConfig
from icce_ray.count.choice import METRICS
from icce_ray.count.clustering import Clustering, Sample, Task, choose_number, draw_sample, make_clustering
from icce_ray.count.stage import CLUSTER_COUNT, small_heads
from icce_ray.embed.feature_matrix import load_features
from icce_ray.runtime.workers import run_tasks
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter
from icce_ray.store.part_records import PartRecord, PartRecords

FOLDER = "clusterings"


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Choose the number of clusters: write by_count.parquet and by_seed.parquet.

    Returns:
        num_clusters, num_clusters_range (fewest and most that are as good), choice (in words), num_tried, num_images
        (in the sample), and stability, generalization and silhouette of the chosen number (means over seeds).

    Raises:
        InputError: fewer images than clusters to choose from.
        WorkerError: tasks died more often than they are retried, or a loss was not finite.
    """
    embed, output, asked = training_set(context.inputs), context.output, config.cluster_count
    num_images = load_features(embed).num_images
    heads = small_heads(config.heads, asked)
    records = PartRecords(output.folder, f"{embed.identity}-{CLUSTER_COUNT.version}")
    finished = records.read_all()
    sample: list[Sample] = []

    def distribute(function: Any, items: Sequence[Any], *shared: Any) -> Iterator[tuple[Any, Any]]:
        return run_tasks(
            "cluster_count", function, items, shared, resources=config.resources, num_images=num_images,
            name=function.__name__.strip("_"),
        )  # fmt: skip

    def make(tasks: Sequence[Task]) -> Iterator[tuple[Task, Clustering]]:
        pending = []
        for task in tasks:
            if (record := finished.get(_name(task))) is not None:
                yield task, _read(records, record)
            else:
                pending.append(task)
        if not pending:
            return
        if not sample:
            ((_, drawn),) = distribute(_draw, [embed], asked.max_images, config.neighbors, config.seed)
            sample.append(drawn)
        yield from distribute(_make, pending, *sample, heads, records)

    choice = choose_number(num_images, asked, make, seed=config.seed, progress=context.progress)
    by_count = choice.by_count()
    output.write_table("by_count.parquet", by_count)
    output.write_table("by_seed.parquet", choice.by_seed())
    (output.folder / FOLDER).clear()
    records.clear()
    context.progress.note(choice.sentence())
    chosen = next(row for row in by_count.to_pylist() if row["chosen"])
    return {
        "num_clusters": choice.num_clusters,
        "num_clusters_range": [choice.low, choice.high],
        "choice": choice.sentence(),
        "num_tried": len(choice.curve),
        "num_images": min(num_images, asked.max_images),
        **{metric: chosen[metric] for metric in METRICS},
    }


def _draw(embed: Artifact, max_images: int, neighbors: NeighborsConfig, seed: int) -> Sample:
    return draw_sample(load_features(embed).matrix, max_images, neighbors, seed)


def _make(task: Task, sample: Sample, heads: HeadsConfig, records: PartRecords) -> Clustering:
    made = make_clustering(sample, *task, heads, num_threads=1)
    part = ArtifactWriter(records.folder).write_array(f"{FOLDER}/{_name(task)}.npy", made.heads_Hn)
    metrics = {name: getattr(made, name) for name in ("num_clusters_used", "generalization", "silhouette")}
    records.write(_name(task), [part], metrics)
    return made


def _read(records: PartRecords, record: PartRecord) -> Clustering:
    heads_Hn = np.load(io.BytesIO(records.folder.read_bytes(record.files[0].name)), allow_pickle=False)
    return Clustering(heads_Hn, **record.metrics)


def _name(task: Task) -> str:
    return "{}-{}".format(*task)
