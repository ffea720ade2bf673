"""What a consensus takes, known before it starts.

N images, H heads, K clusters, C head clusters. The coordinating process holds some vectors of N, tables of K x C, and
the graph of the C head clusters; each worker a piece of the label matrix and its votes, or the tables of a few heads.
Nothing grows with N x K, and with N x N only CSPA, up to its limit.
"""

from __future__ import annotations

from icce_ray.config import ConsensusConfig
from icce_ray.consensus.hbgf import MAX_EDGES
from icce_ray.consensus.head_overlaps import tile_heads
from icce_ray.consensus.label_matrix import PIECE_LABELS, Heads
from icce_ray.consensus.votes import BLOCK_VOTES
from icce_ray.errors import ResourceError
from icce_ray.runtime.machine import available_memory_bytes

IMAGE_BYTES = 100
"""Candidates, moves and agreement of an image."""
TABLE_BYTES, NUM_TABLES = 4, 4
"""Of a cell of K x C, and how many of these there are at once: before and after the moves, and pieces under way."""
EDGE_BYTES, PAIR_BYTES = 200, 50
"""Of an edge of METIS's graph, of a pair of images of CSPA, while they are built and cut."""
VOTE_BYTES = 100


def coordinator_bytes(heads: Heads, num_clusters: int, config: ConsensusConfig) -> int:
    """IMAGE_BYTES N + 16 K C, and the largest graph: MCLA's has about C H / 2 edges, one from each head cluster to
    every other head."""
    num_labels = heads.num_images * heads.num_heads
    tables = NUM_TABLES * TABLE_BYTES * num_clusters * heads.num_head_clusters
    graphs = {
        "mcla": EDGE_BYTES * heads.num_head_clusters * heads.num_heads // 2,
        "hbgf": EDGE_BYTES * num_labels if num_labels <= MAX_EDGES else 0,
        "cspa": PAIR_BYTES * heads.num_images**2 if heads.num_images <= config.cspa_max_images else 0,
    }
    return IMAGE_BYTES * heads.num_images + tables + max(graphs.get(method, 0) for method in config.methods)


def worker_bytes(heads: Heads, num_clusters: int) -> int:
    """A piece of the matrix as it is and encoded, and the most of: a block of votes, the tables of a tile of pairs of
    heads, those of a piece of heads against the consensus."""
    largest = int(heads.num_clusters.max())
    heads_per_piece = min(heads.num_heads, max(1, PIECE_LABELS // min(heads.num_images, PIECE_LABELS)))
    tile = tile_heads(heads.num_clusters) ** 2 * 8 * largest**2
    table = (heads_per_piece * TABLE_BYTES + 8) * num_clusters * largest
    return 16 * PIECE_LABELS + max(VOTE_BYTES * BLOCK_VOTES, tile, table)


def check_memory(heads: Heads, num_clusters: int, config: ConsensusConfig, num_workers: int = 1) -> None:
    """Refuse before the work starts. The machines of the workers are taken to be like this one.

    Raises:
        ResourceError: what is needed, what is there, what to change.
    """
    needed = coordinator_bytes(heads, num_clusters, config) + num_workers * worker_bytes(heads, num_clusters)
    available = available_memory_bytes()
    if needed > available:
        raise ResourceError(
            f"consensus: {heads.num_images:,} images, {num_clusters:,} clusters and {heads.num_heads} heads with "
            f"{heads.num_head_clusters:,} clusters need {needed / 1e9:.1f} GB with {num_workers} workers; "
            f"available: {available / 1e9:.1f} GB. Use fewer heads or clusters, or a machine with more memory"
        )
