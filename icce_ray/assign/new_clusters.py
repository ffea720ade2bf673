"""New clusters: the outliers among new images, clustered on their own [ours] (docs/METHOD.md, "New clusters"). They are
offered in a table of their own; the assignments don't change.

Shapes: n images, D dimensions.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.cluster.hierarchy import linkage, to_tree

from icce_ray.classifier.linear import LinearClassifier, center_and_scale
from icce_ray.random_numbers import id_hashes

NEW_CLUSTERS_NAME = "new_clusters.parquet"
MIN_IMAGES = 5
"""Smallest number of images that is offered as a cluster."""
MAX_OUTLIERS = 5_000
"""Outliers that are clustered at most: those whose ids have the smallest hashes."""
MAX_SPREAD = 1.5
"""Mean squared distance of a new cluster's images to their mean, at most, as a multiple of that of a known cluster."""
MIN_GAP = 2.0
"""Mean squared distance of a new cluster's images to the means of the clusters that they were assigned to, at least, as
a multiple of that to their own mean."""
SCHEMA = pa.schema(
    [("new_cluster", pa.int32()), ("image_id", pa.int64()), ("uri", pa.string()), ("cluster", pa.int32())]
)


def outliers_table(
    assignments: pa.Table, features_nD: npt.NDArray[np.floating], classifier: LinearClassifier, seed: int
) -> pa.Table:
    """The outliers among n images: image_id, uri, cluster, and `x`, their centred and scaled features."""
    rows = np.flatnonzero(assignments["is_outlier"].to_numpy())
    rows = _first(assignments["image_id"].to_numpy()[rows], rows, seed)
    x_nD = center_and_scale(features_nD[rows], classifier.mean, classifier.scale)
    x = pa.FixedSizeListArray.from_arrays(pa.array(x_nD.ravel()), features_nD.shape[1])
    return assignments.take(pa.array(rows)).select(["image_id", "uri", "cluster"]).append_column("x", x)


def find_new_clusters(outliers: pa.Table, classifier: LinearClassifier, seed: int) -> pa.Table:
    """The new clusters among outliers, the largest first: SCHEMA, without the images that are in none.

    Ward's hierarchy (J. Am. Stat. Assoc. 58, 1963) is cut from above: a group is one cluster if it is as compact as the
    known ones, else its two halves are looked at.
    """
    rows = _first(outliers["image_id"].to_numpy(), np.arange(len(outliers)), seed)
    outliers = outliers.take(pa.array(rows))
    if len(outliers) < MIN_IMAGES:
        return SCHEMA.empty_table()
    x_nD = outliers["x"].combine_chunks().flatten().to_numpy().reshape(len(outliers), -1)
    gaps_nD = x_nD - classifier.outliers.cluster_means[outliers["cluster"].to_numpy()]
    groups: list[list[int]] = []
    pending = [to_tree(linkage(x_nD, "ward"))]
    while pending:
        node = pending.pop()
        inside = sorted(node.pre_order())
        if len(inside) < MIN_IMAGES:
            continue
        spread = ((x_nD[inside] - x_nD[inside].mean(axis=0)) ** 2).sum() / len(inside)
        if spread > MAX_SPREAD * classifier.outliers.total_variance:
            pending += [node.left, node.right]
        elif (gaps_nD[inside] ** 2).sum() / len(inside) >= MIN_GAP * spread:
            groups.append(inside)
    groups.sort(key=lambda group: (-len(group), group[0]))
    if not groups:
        return SCHEMA.empty_table()
    numbers = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    found = outliers.take(pa.array(np.concatenate(groups)))
    columns = [pa.array(numbers, pa.int32()), found["image_id"], found["uri"], found["cluster"]]
    return pa.table(columns, schema=SCHEMA)


def _first(image_ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """At most MAX_OUTLIERS of the rows, ascending by image id."""
    chosen = np.argsort(id_hashes(image_ids, seed))[:MAX_OUTLIERS]
    return rows[chosen[np.argsort(image_ids[chosen])]]
