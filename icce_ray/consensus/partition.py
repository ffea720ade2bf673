"""Graph partitioning with METIS, in a process of its own (docs/METHOD.md, "METIS").

METIS is native code that exits or crashes on some inputs, which must not end the run. Request and answer travel through
pipes: nothing is written to the working directory. Run as a module, this file is that process.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from icce_ray.errors import WorkerError

if TYPE_CHECKING:
    import scipy.sparse as sp

Ints = npt.NDArray[np.int32]
LongInts = npt.NDArray[np.int64]

TIMEOUT_S = 3600.0
MAX_ATTEMPTS = 3
COMMAND = [sys.executable, "-P", "-m", "icce_ray.consensus.partition"]


class PartitionError(RuntimeError):
    """A consensus function does not apply, and a retry would not help: its graph is too large, or METIS refused it."""


class _Fault(RuntimeError):
    """METIS was killed, crashed or hung, which may not happen again."""


def partition_graph(
    graph: sp.csr_array, num_parts: int, *, seeds: list[int], vertex_weights: Any = None, imbalance: float = 1.5
) -> Ints:
    """Cut a graph (V, V), symmetric with positive integer weights and an empty diagonal, into parts of about equal
    weight so that the cut edges weigh little (METIS, k-way). Vertices have positive integer weights (V,), or 1.
    `imbalance`: weight of the heaviest part allowed, relative to the average. Returns (len(seeds), V) int32 parts
    0..num_parts-1, which may be empty. All but the first see the vertices in a random order, because METIS's own seed
    often changes nothing.

    Raises PartitionError: METIS refused the graph; WorkerError: METIS was killed, crashed or hung MAX_ATTEMPTS times.
    To go on without it would give other labels.
    """
    num_vertices = graph.shape[0]
    if not 2 <= num_parts <= num_vertices:
        raise PartitionError(f"a graph of {num_vertices} vertices cannot be cut into {num_parts} parts")
    request = io.BytesIO()
    np.savez(
        request,
        starts=graph.indptr.astype(np.int64),
        adjacent=graph.indices.astype(np.int32),
        edge_weights=graph.data.astype(np.int32),
        vertex_weights=np.ones(num_vertices, np.int64) if vertex_weights is None else vertex_weights.astype(np.int64),
        num_parts=np.array(num_parts),
        imbalance=np.array(imbalance),
        seeds=np.array(seeds, dtype=np.int64),
    )
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return _ask_metis(request.getbuffer(), (len(seeds), num_vertices), num_parts)
        except _Fault as fault:
            if attempt == MAX_ATTEMPTS:
                raise WorkerError(
                    f"consensus: METIS failed {MAX_ATTEMPTS} times: {fault}. Usually it is out of memory. The same "
                    "command tries again; consensus.methods without mcla, hbgf and cspa does without METIS"
                ) from None
    raise AssertionError


def _ask_metis(request: memoryview, shape: tuple[int, int], num_parts: int) -> Ints:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            COMMAND, input=request, capture_output=True, env=environment, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Fault(f"no answer: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = f"METIS ended with exit code {done.returncode}: {lines[-1] if lines else 'no message'}"
        is_fault = done.returncode < 0 or "MemoryError" in reason
        raise (_Fault if is_fault else PartitionError)(reason)
    try:
        parts: Ints = np.load(io.BytesIO(done.stdout), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise _Fault("METIS answered something other than parts") from None
    if parts.shape != shape or parts.min() < 0 or parts.max() >= num_parts:
        raise _Fault(f"METIS answered parts of shape {parts.shape}, {parts.min()} to {parts.max()}")
    return parts


def _main() -> None:
    """Read one request from standard input, write the parts to standard output."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # METIS prints to standard output
    request = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    response = io.BytesIO()
    np.save(response, _cut(**request), allow_pickle=False)
    answer.write(response.getbuffer())
    answer.close()


def _cut(
    starts: LongInts, adjacent: Ints, edge_weights: Ints, vertex_weights: LongInts, num_parts: Any, imbalance: Any,
    seeds: LongInts,
) -> Ints:  # fmt: skip
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


def _reorder(starts: LongInts, adjacent: Ints, edge_weights: Ints, order: LongInts) -> tuple[LongInts, Ints, Ints]:
    """The same graph with vertex order[v] at place v. (This process does without SciPy, which starts slowly.)"""
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order))
    degrees = np.diff(starts)[order]
    new_starts = np.concatenate([[0], np.cumsum(degrees)])
    edges = np.arange(new_starts[-1]) + np.repeat(starts[:-1][order] - new_starts[:-1], degrees)
    return new_starts, place[adjacent[edges]], edge_weights[edges]


if __name__ == "__main__":
    _main()
