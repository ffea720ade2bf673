"""Memory that a consensus needs, known before it starts.

The coordinating process holds some vectors of N, tables of K x C, and the graph of the C head clusters. A worker holds
a part of the label matrix and its votes, or the tables of a few heads. Nothing grows with N x K; CSPA alone grows with
N x N, up to its limit.

Shape letters: N images, H heads, K clusters, C head clusters.
"""

from collections.abc import Sequence

from icce_ray.consensus import graph_cuts, recombination
from icce_ray.consensus.graph_cuts import tile_heads
from icce_ray.consensus.label_matrix import PART_LABELS, Counts, Heads
from icce_ray.runtime.machine import available_memory_bytes, require_memory

IMAGE_BYTES = 100
"""For each image: candidates, moves and agreement."""
CELL_BYTES, NUM_TABLES = 4, 4
"""For each cell of K x C, and the number of such tables at a time: before and after the moves, and parts under way."""
EDGE_BYTES, PAIR_BYTES = 200, 50
"""For each edge of METIS's graph, and for each pair of images of CSPA, while the graph is built and cut."""
VOTE_BYTES = 100
GRAPH_IMAGE_BYTES, CELL_TABLE_BYTES = 250, 40
"""For each image, if the graph judges: weights of its edges, and the clusterings that are recombined. For each two
cells of an overlay."""


def coordinator_bytes(
    num_images: int, num_clusters_H: Counts, num_clusters: int, methods: Sequence[str], has_graph: bool = False
) -> int:
    """IMAGE_BYTES N + 16 K C, and the largest graph. MCLA's has about C H / 2 edges: from each head cluster, one to
    every other head. `has_graph`: whether the neighbour graph judges the result."""
    num_heads, num_head_clusters = len(num_clusters_H), int(num_clusters_H.sum())
    num_labels = num_images * num_heads
    tables = NUM_TABLES * CELL_BYTES * num_clusters * num_head_clusters
    graphs = {
        "mcla": EDGE_BYTES * num_head_clusters * num_heads // 2,
        "hbgf": EDGE_BYTES * num_labels if num_labels <= graph_cuts.HBGF_MAX_EDGES else 0,
        "cspa": PAIR_BYTES * num_images**2 if num_images <= graph_cuts.CSPA_MAX_IMAGES else 0,
    }
    largest = max(graphs.get(method, 0) for method in methods)
    if has_graph:
        num_cells = max(recombination.MAX_CELLS, 2 * num_clusters)
        largest = max(largest, GRAPH_IMAGE_BYTES * num_images + CELL_TABLE_BYTES * num_cells**2)
    return IMAGE_BYTES * num_images + tables + largest


def worker_bytes(num_images: int, num_clusters_H: Counts, num_clusters: int) -> int:
    """A part of the matrix as it is and encoded, and the largest of: its votes, the tables of a tile of pairs of heads,
    the tables of a part's heads against the consensus."""
    largest = int(num_clusters_H.max())
    part = min(PART_LABELS, num_images * len(num_clusters_H))
    heads_per_part = min(len(num_clusters_H), PART_LABELS // min(num_images, PART_LABELS))
    tile = tile_heads(num_clusters_H) ** 2 * 8 * largest**2
    table = (heads_per_part * CELL_BYTES + 8) * num_clusters * largest
    return 16 * part + max(VOTE_BYTES * part, tile, table)


def check_memory(
    heads: Heads, num_clusters: int, methods: Sequence[str], num_workers: int = 1, has_graph: bool = False
) -> None:
    """Check, before the work starts, that it fits. Other machines are assumed to have as much memory as this one.
    Raises ResourceError: it does not; the message says what is needed, what is available, and what to change."""
    needed = coordinator_bytes(heads.num_images, heads.num_clusters, num_clusters, methods, has_graph)
    needed += num_workers * worker_bytes(heads.num_images, heads.num_clusters, num_clusters)
    require_memory(
        needed,
        available_memory_bytes(),
        f"consensus: {heads.num_images:,} images, {num_clusters:,} clusters and {heads.num_heads} heads with "
        f"{heads.num_head_clusters:,} clusters",
        "Use fewer heads or clusters, or a machine with more memory",
        f" with {num_workers} workers",
    )
