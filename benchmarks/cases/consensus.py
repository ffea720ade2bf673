"""The consensus at ImageNet's size and at a tenth of it, for planted labels, neighbours and features with noise.

The stage runs on Ray with all CPUs of the machine (two on the reference machine), and `cluster_ensemble` gets the same
matrix in one process: the labels must be equal. Memory is that of all processes, shared pages counted once (PSS). The
memory that the stage says it needs is compared with what it uses beyond an idle Ray.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cases.process_memory import MemoryWatch
from icce_ray.config import Config, ConsensusConfig
from icce_ray.consensus.consensus_memory import coordinator_bytes, worker_bytes
from icce_ray.consensus.ensemble import cluster_ensemble
from icce_ray.embed.feature_matrix import load_features
from icce_ray.metrics.true_label_scores import evaluate_clustering, normalized_mutual_info
from icce_ray.neighbors.graph import NUM_NEAREST
from icce_ray.runtime.progress import Progress
from icce_ray.stage import StageContext
from icce_ray.store import ArtifactWriter, Folder

SETTINGS: dict[str, Any] = {
    "num_images": 1_281_167,
    "num_heads": 50,
    "num_clusters": 1000,
    "small_num_images": 100_000,
    "small_num_clusters": 100,
    "noise": 0.3,
    "purity": 0.7,
    "num_dims": 256,
}
MAX_SECONDS, MAX_SMALL_SECONDS = 180.0, 20.0
MAX_BYTES = 4_000_000_000


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    noise, num_heads = settings["noise"], settings["num_heads"]
    labels_N, heads_HN = planted_heads(settings["small_num_images"], num_heads, settings["small_num_clusters"], noise)
    nearest_Nk = planted_neighbors(labels_N, NUM_NEAREST, settings["purity"])
    started = time.perf_counter()
    features_ND = planted_features(labels_N, settings["num_dims"])
    small = cluster_ensemble(
        heads_HN, settings["small_num_clusters"], random_state=0, neighbors=nearest_Nk, features=features_ND
    )
    small_s = time.perf_counter() - started
    print(f"{heads_HN.shape[1]:,} images, one process: {small_s:.1f} s, {small.method}", flush=True)
    for method, reason in small.skipped.items():
        print(f"  {method} left out: {reason}")
    figures: dict[str, Any] = {"small_s": small_s, "small_nmi": normalized_mutual_info(labels_N, small.labels)}
    bounds = {f"{heads_HN.shape[1]:,} images in at most {MAX_SMALL_SECONDS:.0f} s": small_s <= MAX_SMALL_SECONDS}

    num_clusters = settings["num_clusters"]
    labels_N, heads_HN = planted_heads(settings["num_images"], num_heads, num_clusters, noise)
    nearest_Nk = planted_neighbors(labels_N, NUM_NEAREST, settings["purity"])
    features_ND = planted_features(labels_N, settings["num_dims"])
    stage, consensus_N = run_stage(heads_HN, nearest_Nk, features_ND, num_clusters)
    started = time.perf_counter()
    metrics = evaluate_clustering(labels_N, consensus_N)
    stage["metrics_s"] = time.perf_counter() - started
    seconds = stage["seconds"] + stage["metrics_s"]
    best_head = max(normalized_mutual_info(labels_N, head_N) for head_N in heads_HN)
    started = time.perf_counter()
    local = cluster_ensemble(heads_HN, num_clusters, random_state=0, neighbors=nearest_Nk, features=features_ND)
    figures |= {
        "stage": stage,
        "metrics": metrics,
        "best_head_nmi": best_head,
        "one_process_s": time.perf_counter() - started,
        "num_relabelled": local.num_relabelled,
    }
    gigabytes = [stage[name] / 1e9 for name in ("bytes", "idle_bytes", "stated_bytes")]
    print(
        f"{heads_HN.shape[1]:,} images, the stage on Ray: {stage['seconds']:.1f} s, {gigabytes[0]:.1f} GB "
        f"({gigabytes[1]:.1f} idle, stated besides {gigabytes[2]:.1f}); metrics {stage['metrics_s']:.1f} s; "
        f"one process {figures['one_process_s']:.1f} s"
    )
    print(
        f"NMI to the planted labels {metrics['nmi']:.4f}, best head {best_head:.4f}; "
        f"{local.num_relabelled:,} images placed by their features"
    )
    bounds |= {
        f"{heads_HN.shape[1]:,} images in at most {MAX_SECONDS:.0f} s, metrics included": seconds <= MAX_SECONDS,
        f"in at most {MAX_BYTES / 1e9:.0f} GB": stage["bytes"] <= MAX_BYTES,
        "in at most the memory that was stated": stage["bytes"] - stage["idle_bytes"] <= stage["stated_bytes"],
        "NMI to the planted labels above every head's": metrics["nmi"] > best_head,
        "the labels of the stage are those of one process": bool(np.array_equal(local.labels, consensus_N)),
    }
    return figures, bounds


def run_stage(heads_HN: Any, nearest_Nk: Any, features_ND: Any, num_clusters: int) -> tuple[dict[str, Any], Any]:
    """Seconds and bytes of the stage on Ray, and its labels."""
    from icce_ray.consensus import job
    from icce_ray.methods.clusterings import LABELS_NAME
    from icce_ray.runtime.ray_cluster import connect, disconnect
    from icce_ray.sample.training_set import IMAGE_IDS_NAME

    with tempfile.TemporaryDirectory(prefix="icce_ray-consensus-") as folder:
        writer = ArtifactWriter(Folder.at(Path(folder) / "sample" / "f"))
        writer.write_array(IMAGE_IDS_NAME, np.arange(heads_HN.shape[1]))
        writer.commit(stage="sample", fingerprint="f", inputs={}, config={}, metrics={}, seconds=0.0)
        writer = ArtifactWriter(Folder.at(Path(folder) / "method" / "f"))
        writer.write_array(LABELS_NAME, heads_HN)
        writer.write_json("clusterings.json", {"history": [], "losses": [0.0] * len(heads_HN)})
        made_from = {"sample": "f"}
        heads = writer.commit(stage="method", fingerprint="f", inputs=made_from, config={}, metrics={}, seconds=0.0)
        writer = ArtifactWriter(Folder.at(Path(folder) / "neighbors"))
        writer.write_array("part-00000-nearest.npy", nearest_Nk)
        graph = writer.commit(stage="neighbors", fingerprint="g", inputs={}, config={}, metrics={}, seconds=0.0)
        writer = ArtifactWriter(Folder.at(Path(folder) / "embed"))
        rows = pa.FixedSizeListArray.from_arrays(pa.array(features_ND.ravel()), features_ND.shape[1])
        writer.write_table("part-00000.parquet", pa.table({"image_id": np.arange(len(rows)), "embedding": rows}))
        embed = writer.commit(stage="embed", fingerprint="e", inputs={}, config={}, metrics={}, seconds=0.0)
        load_features(embed)  # copied once per machine, by the stages before this one
        inputs = {"embed": embed, "method": heads, "neighbors": graph}
        config = Config(output=folder, num_clusters=num_clusters, embeddings={"uri": "unused.npy"})
        connect(config.resources)
        output = ArtifactWriter(Folder.at(Path(folder) / "consensus"))
        started = time.perf_counter()
        with MemoryWatch() as memory:
            job.run(config, StageContext(output, inputs, Progress("consensus")))
        seconds = time.perf_counter() - started
        disconnect()
        labels_N = np.load(Path(folder) / "consensus" / "labels.npy")
    num_images, num_clusters_H = heads_HN.shape[1], np.full(len(heads_HN), num_clusters)
    stated = coordinator_bytes(num_images, num_clusters_H, num_clusters, ConsensusConfig().methods, has_graph=True)
    stated += len(os.sched_getaffinity(0)) * worker_bytes(num_images, num_clusters_H, num_clusters)
    return {
        "seconds": seconds,
        "bytes": memory.peak(),
        "idle_bytes": memory.seen[0][1],
        "stated_bytes": stated,
    }, labels_N


def planted_heads(num_images: int, num_heads: int, num_clusters: int, noise: float, seed: int = 0) -> tuple[Any, Any]:
    """True labels (N,) and heads (H, N) int32. Each head permutes the clusters and gives a share `noise` of the images
    a random one."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, num_clusters, num_images, dtype=np.int32)
    heads_HN = np.empty((num_heads, num_images), dtype=np.int32)
    for head_N in heads_HN:
        head_N[:] = rng.permutation(num_clusters)[labels_N]
        is_noise = rng.random(num_images) < noise
        head_N[is_noise] = rng.integers(0, num_clusters, int(is_noise.sum()))
    return labels_N, heads_HN


def planted_features(labels_N: Any, dim: int, seed: int = 0) -> Any:
    """Features (N, D) float16 about a centre for each label."""
    rng = np.random.default_rng(seed)
    centres_KD = rng.standard_normal((int(labels_N.max()) + 1, dim), dtype=np.float32)
    features_ND = np.empty((len(labels_N), dim), dtype=np.float16)
    for start in range(0, len(labels_N), 65_536):
        rows = slice(start, start + 65_536)
        noise_nD = rng.standard_normal((len(labels_N[rows]), dim), dtype=np.float32)
        features_ND[rows] = centres_KD[labels_N[rows]] + 2 * noise_nD
    return features_ND


def planted_neighbors(labels_N: Any, num_neighbors: int, purity: float, seed: int = 0) -> Any:
    """Neighbours (N, k) int32: each of the same cluster with probability `purity`, else any image."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels_N, kind="stable")
    sizes = np.bincount(labels_N)
    first_N, size_N = (np.cumsum(sizes) - sizes)[labels_N], sizes[labels_N]
    shape = len(labels_N), num_neighbors
    same_Nk = order[first_N[:, None] + (rng.random(shape) * size_N[:, None]).astype(np.int64)]
    anyone_Nk = rng.integers(0, len(labels_N), shape)
    return np.where(rng.random(shape) < purity, same_Nk, anyone_Nk).astype(np.int32)
