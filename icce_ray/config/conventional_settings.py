"""Settings of scikit-learn's clusterers (docs/METHOD.md, "Conventional clusterers")."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from icce_ray.config.section import AtLeastTwo, PositiveFloat, PositiveInt, Section


class ConventionalConfig(Section):
    normalize: bool = True
    """Subtract the mean feature and scale each feature to length 1 first."""
    representation: Literal["raw", "pca", "umap"] = "pca"
    """The representation that is clustered. `raw`: the features, which `spectral` takes if nothing else is set. `pca`:
    their first 50 principal components. `umap`: 50 UMAP dimensions, 30 neighbours, min_dist 0,
    which needs the extra `[umap]`; it is the best of the three for all methods but `spectral`."""
    linkage: Literal["ward", "average", "complete", "single"] = "ward"
    """Distance between two clusters in `agglomerative`."""
    distance_threshold: PositiveFloat | None = None
    """`agglomerative` merges no clusters that are farther apart, and so finds the number of clusters. Not set: it goes
    on until `num_clusters` are left."""
    num_neighbors: PositiveInt = 10
    """Nearest neighbours that connect an image in the graph of `spectral`."""
    preference: Annotated[float, Field(lt=0.0)] | None = None
    """How suitable each image is as an exemplar in `affinity_propagation`: a negative squared distance. Lower values
    make fewer clusters. Not set: the median over all pairs, which makes many."""
    min_cluster_size: AtLeastTwo = 15
    """Smallest group of images that `hdbscan` takes for a cluster; smaller ones are noise."""
    covariance: Literal["full", "tied", "diag", "spherical"] = "full"
    """Shape of a cluster in `gmm`: a covariance of its own, one for all, variances along the axes, or one variance."""
