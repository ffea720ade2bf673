"""Partitioning of graphs with METIS and of hypergraphs with Mt-KaHyPar, in a process of its own.

Both are native code that ends or crashes its process on some inputs; a consensus function that fails must not take the
run along. Request and answer travel through pipes: nothing is written into the working directory.

Run as a module this file is that process.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import scipy.sparse as sp

TIMEOUT_S = 3600.0
COMMAND = [sys.executable, "-P", "-m", "icce_ray.consensus.partition"]


class PartitionError(RuntimeError):
    """No partition: the partitioner refused the graph, crashed, answered something else, or is not installed."""


def partition_graph(
    graph: sp.csr_array,
    num_parts: int,
    *,
    vertex_weights: npt.NDArray[Any] | None = None,
    imbalance: float = 1.5,
    seeds: list[int],
) -> npt.NDArray[np.int32]:
    """Cut a graph into parts of about equal weight so that the edges cut weigh little (METIS, k-way).

    Args:
        graph: (V, V) symmetric, positive integer edge weights, nothing on the diagonal.
        num_parts: parts wanted, 2..V.
        vertex_weights: (V,) positive integers; not given: all 1.
        imbalance: how much heavier than the average a part may be.
        seeds: one partition is made for each, deterministic. All but the first see the vertices in a random order:
            METIS's own seed often changes nothing.

    Returns:
        (len(seeds), V) int32 parts 0..num_parts-1. METIS leaves some parts empty at times: the caller looks.

    Raises:
        PartitionError: METIS failed.
    """
    num_vertices = graph.shape[0]
    weights = np.ones(num_vertices, np.int64) if vertex_weights is None else vertex_weights
    arrays = {
        "starts": graph.indptr.astype(np.int64),
        "adjacent": graph.indices.astype(np.int32),
        "edge_weights": graph.data.astype(np.int32),
    }
    return _ask("METIS", arrays, weights, num_parts, imbalance, seeds)


def partition_hypergraph(
    members: sp.csr_array,
    num_parts: int,
    *,
    edge_weights: npt.NDArray[Any],
    vertex_weights: npt.NDArray[Any],
    imbalance: float = 1.5,
    seeds: list[int],
) -> npt.NDArray[np.int32]:
    """Cut a hypergraph into parts of about equal weight so that its edges touch few parts (Mt-KaHyPar, connectivity).

    Args:
        members: (E, V), the vertices of each hyperedge where it is not 0.
        num_parts, imbalance, seeds: as of :func:`partition_graph`.
        edge_weights, vertex_weights: (E,) and (V,) positive integers.

    Returns:
        (len(seeds), V) int32 parts 0..num_parts-1.

    Raises:
        PartitionError: Mt-KaHyPar is not installed, or failed.
    """
    if importlib.util.find_spec("mtkahypar") is None:
        raise PartitionError("Mt-KaHyPar is not installed: pip install 'icce_ray[hgpa]'")
    arrays = {
        "starts": members.indptr.astype(np.int64),
        "pins": members.indices.astype(np.int64),
        "edge_weights": edge_weights.astype(np.int64),
    }
    return _ask("Mt-KaHyPar", arrays, vertex_weights, num_parts, imbalance, seeds)


def _ask(
    tool: str,
    arrays: dict[str, npt.NDArray[Any]],
    vertex_weights: npt.NDArray[Any],
    num_parts: int,
    imbalance: float,
    seeds: list[int],
) -> npt.NDArray[np.int32]:
    num_vertices = len(vertex_weights)
    if not 2 <= num_parts <= num_vertices:
        raise PartitionError(f"a graph of {num_vertices} vertices cannot be cut into {num_parts} parts")
    request = io.BytesIO()
    settings = {
        "vertex_weights": vertex_weights.astype(np.int64),
        "num_parts": np.array(num_parts),
        "imbalance": np.array(imbalance),
        "seeds": np.array(seeds, dtype=np.int64),
    }
    np.savez(request, **arrays, **settings)  # type: ignore[arg-type]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            COMMAND, input=request.getbuffer(), capture_output=True, env=environment, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PartitionError(f"{tool} gave no answer: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise PartitionError(f"{tool} ended with exit code {done.returncode}: {lines[-1] if lines else 'no message'}")
    try:
        parts = np.load(io.BytesIO(done.stdout), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise PartitionError(f"{tool} answered something else than parts") from None
    if parts.shape != (len(seeds), num_vertices) or parts.min() < 0 or parts.max() >= num_parts:
        raise PartitionError(f"{tool} answered parts of shape {parts.shape}, {parts.min()} to {parts.max()}")
    return parts.astype(np.int32)  # type: ignore[no-any-return]


def _main() -> None:
    """Read one request from standard input, write the parts to standard output."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # both partitioners talk on standard output
    request = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    parts = _cut_hypergraph(**request) if "pins" in request else _cut_graph(**request)
    response = io.BytesIO()
    np.save(response, parts.astype(np.int32), allow_pickle=False)
    answer.write(response.getbuffer())
    answer.close()


def _cut_graph(
    starts: npt.NDArray[np.int64],
    adjacent: npt.NDArray[np.int32],
    edge_weights: npt.NDArray[np.int32],
    vertex_weights: npt.NDArray[np.int64],
    num_parts: Any,
    imbalance: Any,
    seeds: npt.NDArray[np.int64],
) -> npt.NDArray[np.int32]:
    import pymetis

    num_vertices = len(vertex_weights)
    ufactor = max(1, round((float(imbalance) - 1) * 1000))
    parts = np.empty((len(seeds), num_vertices), dtype=np.int32)
    for row, seed in enumerate(seeds):
        order = np.arange(num_vertices)
        graph = starts, adjacent, edge_weights
        if row > 0:
            order = np.random.default_rng(int(seed)).permutation(num_vertices)
            graph = _reorder(starts, adjacent, edge_weights, order)
        parts[row, order] = pymetis.part_graph(
            int(num_parts),
            pymetis.CSRAdjacency(graph[0], graph[1]),
            eweights=graph[2],
            vweights=vertex_weights[order],
            recursive=False,
            options=pymetis.Options(seed=int(seed), ufactor=ufactor),
        ).vertex_part
    return parts


def _cut_hypergraph(
    starts: npt.NDArray[np.int64],
    pins: npt.NDArray[np.int64],
    edge_weights: npt.NDArray[np.int64],
    vertex_weights: npt.NDArray[np.int64],
    num_parts: Any,
    imbalance: Any,
    seeds: npt.NDArray[np.int64],
) -> npt.NDArray[np.int32]:
    import mtkahypar

    tool = mtkahypar.initialize(1)
    edges = [edge.tolist() for edge in np.split(pins, starts[1:-1])]
    context = tool.context_from_preset(mtkahypar.PresetType.DETERMINISTIC)
    context.set_partitioning_parameters(int(num_parts), float(imbalance) - 1, mtkahypar.Objective.KM1)
    context.logging = False
    parts = []
    for seed in seeds:
        mtkahypar.set_seed(int(seed))
        hypergraph = tool.create_hypergraph(
            context, len(vertex_weights), len(edges), edges, vertex_weights.tolist(), edge_weights.tolist()
        )
        parts.append(hypergraph.partition(context).get_partition())
    return np.array(parts, dtype=np.int32)


def _reorder(
    starts: npt.NDArray[np.int64],
    adjacent: npt.NDArray[np.int32],
    edge_weights: npt.NDArray[np.int32],
    order: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The same graph with its vertices in another order: new vertex v is the old vertex order[v]."""
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order))
    degrees = np.diff(starts)[order]
    new_starts = np.concatenate([[0], np.cumsum(degrees)])
    edges = np.arange(new_starts[-1]) + np.repeat(starts[:-1][order] - new_starts[:-1], degrees)
    return new_starts, place[adjacent[edges]], edge_weights[edges]


if __name__ == "__main__":
    _main()
