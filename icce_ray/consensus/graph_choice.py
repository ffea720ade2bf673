"""Makes clusterings with the neighbour graph that the heads weigh, and chooses which one is kept (docs/METHOD.md,
"Choice on the graph"): a spectral clustering (docs/METHOD.md, "Spectral cut"), and a recombination, whose loose
clusters give way to splits of others (docs/METHOD.md, "Loose clusters").

Where heads use fewer clusters than asked for, a consensus makes up the rest with single images. The graph finds groups
that no head separates. It is read as a whole in one place for this, so inputs are of limited size.

Shape letters: N images, n images of a graph or a cluster, K clusters, V eigenvectors.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix, csr_matrix, diags
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from threadpoolctl import threadpool_limits

from icce_ray.consensus.label_matrix import Heads, Labels, anmi
from icce_ray.consensus.neighbor_score import NeighborScore, Shares
from icce_ray.consensus.partition import PartitionError
from icce_ray.consensus.recombination import recombine
from icce_ray.metrics.contingency import MAX_SIZED_IMAGES, MIN_SIZE_AGREEMENT, size_agreement

RECOMBINED, SPECTRAL = "recombined", "spectral"
"""Names of the results that the graph takes part in: the best recombination of all others, and its cut."""
MAX_LEAVING = 0.06
"""The graph is a good witness if at most this share of its weight leaves the clusters that hold together."""
MAX_LEFT_BY_CUT = 0.75
"""The cut is preferred if at most this part of what leaves the clusters of the others leaves its own."""
LOSS_MARGIN = 0.05
"""Heads whose loss lies farther above the lowest are left out where heads agree on sizes."""
MAX_WORK = 50_000_000
"""Images times clusters squared: some seconds on one core."""
MAX_EDGES = 5_000_000
"""Edges of a graph that is read as a whole: half a gigabyte."""
NUM_STARTS = 10
"""Starts of k-means."""
TOLERANCE = 1e-5
"""Relative error of the eigenvalues."""
MAX_DENSE_IMAGES = 5_000
"""Up to so many images, all eigenvectors are computed if the iteration doesn't find the largest: some minutes."""
MIN_SHARE = 0.5
"""A cluster holds together if at least this share of the weight at it stays within it."""
DENSE_IMAGES = 200
"""Up to so many images, all eigenvectors are found at once."""
Floats = npt.NDArray[np.float64]
Images = npt.NDArray[np.int64]


class GraphChoice(NamedTuple):
    """Clusterings that the graph took part in, by method, and the choice among all."""

    made: dict[str, Labels]
    scores: dict[str, float]
    """By method, of the consensuses too: the share of a cluster's weight that stays within it, in the mean over
    clusters."""
    chosen: str
    skipped: dict[str, str]


def choose_on_graph(
    score: NeighborScore,
    consensuses: dict[str, Labels],
    best: str,
    num_clusters: int,
    *,
    seed: int,
    losses_H: npt.NDArray[np.float64] | None = None,
) -> GraphChoice:
    """`consensuses`: labels (N,) 0..num_clusters-1 by method; `best`: the one with the highest ANMI."""
    recombined_N = recombine(score, [consensuses[best], *consensuses.values()], num_clusters, seed=seed).labels_N
    made, skipped = {RECOMBINED: recombined_N}, {}
    (shares_K,) = score.shares([recombined_N], num_clusters)
    agree, is_good = _agree_on_sizes(score.heads), _is_good_witness(shares_K)
    try:
        if not is_good:
            raise PartitionError(f"over {MAX_LEAVING:.0%} of the edges leave the clusters")
        made[RECOMBINED] = replace_loose_clusters(score, recombined_N, shares_K)
        if not agree:
            raise PartitionError("the heads don't agree which clusters are large")
        made[SPECTRAL] = spectral_cut(score, len(np.unique(consensuses[best])), seed=seed)
    except PartitionError as error:
        skipped[SPECTRAL] = str(error)
    scores = score.mean_shares([*consensuses.values(), *made.values()], num_clusters)
    by_method = dict(zip((*consensuses, *made), scores, strict=True))
    chosen = best_score(by_method, best) if is_good else RECOMBINED if agree else best
    if losses_H is not None and not is_good and not agree:
        head = score.heads.select([int(np.nan_to_num(losses_H, nan=np.inf).argmin())])
        chosen = max(best, RECOMBINED, key=lambda method: anmi((consensuses | made)[method], head, num_clusters))
    return GraphChoice(made, by_method, chosen, skipped)


def trusted_heads(heads: Heads, losses_H: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The heads whose loss is near the lowest, at least half; all, if they don't agree on sizes or leave out images."""
    order = np.argsort(losses_H, kind="stable")  # NaN is last
    near = order[: max(-(-len(order) // 2), int((losses_H <= losses_H[order[0]] + LOSS_MARGIN).sum()))]
    labels_all = heads.head_cluster_sizes().sum() == heads.num_heads * heads.num_images
    return np.sort(near if labels_all and _agree_on_sizes(heads) else order)


def best_score(scores: dict[str, float], best: str) -> str:
    """The higher one of `best` and the recombination, or the cut, if that has a clear lead."""
    chosen = max(best, RECOMBINED, key=scores.__getitem__)
    if SPECTRAL in scores and 1 - scores[SPECTRAL] <= MAX_LEFT_BY_CUT * (1 - scores[chosen]):
        return SPECTRAL
    return chosen


def _is_good_witness(shares_K: Shares) -> bool:
    firm = np.sort(shares_K[shares_K >= MIN_SHARE])
    return len(firm) > 0 and 1 - float(firm.mean()) <= MAX_LEAVING


def _agree_on_sizes(heads: Heads) -> bool:
    compared_n = np.linspace(0, heads.num_images - 1, min(heads.num_images, MAX_SIZED_IMAGES)).astype(np.int64)
    labels_Hn = np.stack([heads.labels_of(head)[compared_n] for head in range(heads.num_heads)])
    return size_agreement(labels_Hn) >= MIN_SIZE_AGREEMENT


def spectral_cut(score: NeighborScore, num_clusters: int, *, seed: int) -> Labels:
    """Clusters 0..num_clusters-1 of all images (N,). Raises PartitionError: the input is too large, or the eigenvectors
    weren't found."""
    from sklearn.cluster import KMeans  # takes two seconds, and most processes of the consensus do not need it

    num_images = score.num_images
    if (work := num_images * num_clusters**2) > MAX_WORK:
        input_size = f"{num_images:,} images and {num_clusters:,} clusters"
        raise PartitionError(f"{input_size}: {work:,} are over the limit of {MAX_WORK:,}")
    if num_images <= num_clusters:
        raise PartitionError(f"{num_images:,} images are too few for {num_clusters:,} clusters")
    scale_N = 1 / np.sqrt(np.maximum(score.degree_N, 1))
    graph = diags(scale_N) @ to_matrix(score) @ diags(scale_N)
    with threadpool_limits(1):  # several threads may round a sum differently
        rng = np.random.default_rng(seed)
        _, vectors_NK = largest_eigenvectors(graph, num_clusters, rng.uniform(-1, 1, num_images))
        rows_NK, starts = vectors_NK * scale_N[:, None], rng.integers(0, 2**31, NUM_STARTS)
        found = [KMeans(num_clusters, n_init=1, random_state=int(start)).fit_predict(rows_NK) for start in starts]
    clusterings = [labels_N.astype(np.int32) for labels_N in found]
    shares = score.mean_shares(clusterings, num_clusters)
    best_N: Labels = clusterings[int(np.argmax(shares))]
    return best_N


def to_matrix(score: NeighborScore) -> csr_matrix:
    """The weights of the edges, in both directions (N, N). Raises PartitionError: there are too many."""
    num_images = score.num_images
    if (num_edges := num_images * score.num_neighbors) > MAX_EDGES:
        raise PartitionError(f"{num_edges:,} edges are over the limit of {MAX_EDGES:,}")
    sources = np.repeat(np.arange(num_images), score.num_neighbors)
    targets_Nk, weights_Nk = score.edges.read(0, num_images)
    edges = (weights_Nk.ravel().astype(np.float64), (sources, targets_Nk.ravel()))
    directed = coo_matrix(edges, shape=(num_images, num_images)).tocsr()
    return directed + directed.T


def largest_eigenvectors(graph: csr_matrix | LinearOperator, number: int, start_n: Floats) -> tuple[Floats, Floats]:
    """The largest eigenvalues of a symmetric matrix (V,), in any order, and their eigenvectors (n, V). The iteration
    begins with `start_n`. Raises PartitionError: they weren't found."""
    try:
        values_V, vectors_nV = eigsh(graph, k=number, which="LA", v0=start_n, tol=TOLERANCE)
    except ArpackNoConvergence as error:
        if len(start_n) > MAX_DENSE_IMAGES:
            raise PartitionError(f"the eigenvectors were not found: {error}") from error
        values_V, vectors_nV = np.linalg.eigh(graph @ np.identity(len(start_n)))
    return values_V[-number:], vectors_nV[:, -number:]


def replace_loose_clusters(score: NeighborScore, labels_N: Labels, shares_K: Shares) -> Labels:
    """The labels (N,), with each loose cluster joined to another one, and its number given to a part of a third.

    `shares_K` are those of `labels_N`; at least one cluster holds together. Raises PartitionError: the input is too
    large, or the eigenvectors weren't found.
    """
    firm = np.flatnonzero(shares_K >= MIN_SHARE)
    loose = np.setdiff1d(labels_N, firm)
    if not len(loose):
        return labels_N
    matrix = to_matrix(score)
    owner_K = np.arange(len(shares_K), dtype=np.int32)
    owner_K[loose] = firm[score.between(labels_N, len(shares_K))[np.ix_(loose, firm)].argmax(axis=1)]
    joined_N = owner_K[labels_N]

    def split(cluster: int) -> tuple[float, Images]:
        return best_split(matrix, score.degree_N, np.flatnonzero(joined_N == cluster))

    splits = {cluster: split(cluster) for cluster in firm.tolist()}
    for number in loose.tolist():
        cluster = max(splits, key=lambda one: splits[one][0])
        joined_N[splits[cluster][1]] = number
        splits |= {one: split(one) for one in (cluster, number)}
    return joined_N


def best_split(matrix: csr_matrix, degree_N: npt.NDArray[np.int64], images_n: Images) -> tuple[float, Images]:
    """By how much the sum of the clusters' shares rises if a cluster is split, and the images of one part: the best of
    all cuts of the images in the order of the second eigenvector (Shi and Malik). A single image: -inf."""
    if len(images_n) < 2:
        return -np.inf, images_n
    within = matrix[images_n][:, images_n]
    order = np.argsort(_second_eigenvector(within), kind="stable")
    edges, volumes_n = within[order][:, order].tocoo(), degree_N[images_n[order]]
    ends = np.maximum(edges.row, edges.col), np.minimum(edges.row, edges.col)
    last_n, first_n = (np.bincount(one, weights=edges.data, minlength=len(images_n)) for one in ends)
    left, right = np.cumsum(last_n)[:-1], first_n.sum() - np.cumsum(first_n)[:-1]
    volume, volume_left = max(int(volumes_n.sum()), 1), np.cumsum(volumes_n)[:-1]
    shares = left / np.maximum(volume_left, 1) + right / np.maximum(volume - volume_left, 1)
    cut = int(shares.argmax())
    return float(shares[cut] - edges.data.sum() / volume), images_n[order[: cut + 1]]


def _second_eigenvector(within: csr_matrix) -> Floats:
    """The second eigenvector (n,) of the random walk on the edges (n, n) of one cluster. The first one, which is
    constant, is projected out."""
    degree_n = np.asarray(within.sum(axis=1)).ravel()
    scale_n = 1 / np.sqrt(np.maximum(degree_n, 1))
    normal, first_n = diags(scale_n) @ within @ diags(scale_n), np.sqrt(degree_n)
    first_n /= max(float(np.linalg.norm(first_n)), 1.0)
    with threadpool_limits(1):  # several threads may round a sum differently
        if len(first_n) <= DENSE_IMAGES:
            vector_n = np.linalg.eigh(normal.toarray() - np.outer(first_n, first_n))[1][:, -1]
        else:
            rest = LinearOperator(normal.shape, lambda x: normal @ x - first_n * (first_n @ x), dtype=np.float64)
            start_n = np.random.default_rng(0).uniform(-1, 1, len(first_n))
            vector_n = largest_eigenvectors(rest, 1, start_n)[1][:, 0]
    found_n: Floats = vector_n * scale_n
    return found_n
