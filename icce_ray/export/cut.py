"""Merge the clusters of a finished run into fewer groups, along the hierarchy that its consensus wrote."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.consensus.hierarchy import HIERARCHY_NAME, Hierarchy
from icce_ray.errors import InputError
from icce_ray.pipeline.find_run import stage_of_run
from icce_ray.pipeline.result import Result
from icce_ray.store.filesystem import open_uri
from icce_ray.store.run_records import RUNS_FOLDER

SCHEMA = pa.schema([("image_id", pa.int64()), ("uri", pa.string()), ("cluster", pa.int32()), ("group", pa.int32())])


def cut_hierarchy(run: str | Path | Result, num_clusters: int) -> npt.NDArray[np.int32]:
    """The group of each cluster, (K,) int32, after merging the most confused clusters into `num_clusters` groups.

    Groups are numbered from 0, in the order of their lowest cluster.

    Args:
        run: the result of `icce_ray.run_pipeline`; or a run's YAML config, its output folder, or its record
            (``runs/*.json``).
        num_clusters: number of groups, 1 to K.

    Raises:
        InputError: there is no such run, its consensus is not finished, or `num_clusters` is out of range.
    """
    if isinstance(run, Result):
        output = run.report.rsplit("/", 3)[0]  # .../<stage>/<fingerprint>/report.html
        run = f"{output}/{RUNS_FOLDER}/{run.run}.json"
    consensus, _ = stage_of_run(str(run), "consensus")
    if not consensus.part_names(HIERARCHY_NAME):
        raise InputError(f"{consensus.folder.uri}: this consensus has no hierarchy; run again with this version")
    return Hierarchy.from_table(consensus.read_table(HIERARCHY_NAME)).cut(num_clusters)


def write_cut(run: str | Path, num_clusters: int, output: str | Path) -> int:
    """Write the group of every image to a Parquet file: image_id, uri, cluster, group (both -1 for noise). Returns the
    number of images. Raises InputError: as :func:`cut_hierarchy`, or the file cannot be written."""
    group_of_K = cut_hierarchy(run, num_clusters)
    assign, _ = stage_of_run(str(run), "assign", what="assignments")
    filesystem, path = open_uri(str(output))
    num_images = 0
    try:
        with filesystem.open_output_stream(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for name in assign.part_names("assignments/"):
                table = assign.read_table(name).select(SCHEMA.names[:-1])
                cluster_n = table["cluster"].to_numpy()
                groups = pa.array(np.where(cluster_n >= 0, group_of_K[cluster_n], -1))
                writer.write_table(table.append_column(SCHEMA.field("group"), groups).cast(SCHEMA))
                num_images += len(table)
    except OSError as error:
        raise InputError(f"{output}: cannot be written to: {error}") from None
    return num_images
