"""The choice of the number of clusters on Ray: a task for each part of the sample. A run that was killed keeps the
measures of the parts that it had clustered."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icce_ray.config import Config
from icce_ray.count.choice import METRICS
from icce_ray.count.clustering import PartMeasures, choose_number, measure_part
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.embed.feature_matrix import load_features
from icce_ray.runtime.workers import run_tasks
from icce_ray.sample.training_set import training_set
from icce_ray.stage import StageContext
from icce_ray.store import Artifact
from icce_ray.store.part_records import PartRecord, PartRecords


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Choose the number of clusters: write by_count.parquet and by_seed.parquet.

    Returns:
        num_clusters, num_clusters_range (fewest and most that are as good), choice (in words), num_tried, num_images
        (in the sample), and silhouette, gap and recurring share of the chosen number (means over the parts).

    Raises:
        InputError: fewer images than clusters to choose from.
        WorkerError: tasks died more often than they are retried.
    """
    embed, output, asked = training_set(context.inputs), context.output, config.cluster_count
    num_images = load_features(embed).num_images
    records = PartRecords(output.folder, f"{embed.identity}-{CLUSTER_COUNT.version}")

    def make(parts: Sequence[int], numbers: Sequence[int]) -> Iterator[tuple[int, PartMeasures]]:
        finished = records.read_all()
        yield from ((part, _read(finished[str(part)])) for part in parts if str(part) in finished)
        pending = [part for part in parts if str(part) not in finished]
        shared = (embed, config, numbers, records)
        yield from run_tasks(
            "cluster_count", _measure, pending, shared, resources=config.resources, num_images=num_images
        )

    choice = choose_number(num_images, asked, make, progress=context.progress)
    by_count = choice.by_count()
    output.write_table("by_count.parquet", by_count)
    output.write_table("by_seed.parquet", choice.by_seed())
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


def _measure(part: int, embed: Artifact, config: Config, numbers: Sequence[int], records: PartRecords) -> PartMeasures:
    features = load_features(embed).matrix
    made = measure_part(features, config.cluster_count, numbers, config.neighbors.center, config.seed, part)
    records.write(str(part), [], {name: values.tolist() for name, values in made._asdict().items()})
    return made


def _read(record: PartRecord) -> PartMeasures:
    read = record.metrics
    return PartMeasures(
        np.array(read["silhouettes_C"], np.float64),
        np.array(read["gaps_C"], np.float64),
        np.array(read["labels_Cn"], np.int32),
    )
