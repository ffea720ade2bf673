"""Run a benchmark case: ``python benchmarks/run.py CASE [--set key=value ...]``.

It prints a table as it goes. The last line of standard output is one JSON object with the case, its settings, figures,
bounds and the machine. The exit code is 1 if a bound fails. Trust ratios that were measured side by side in one run:
absolute seconds depend on the machine and on what else it was doing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

CASES = {
    "accuracy": "ICCE's consensus against TEMI and k-means, real features, several seeds",
    "assign": "rows/s of `icce-ray assign --embeddings` against a bare torch matmul over the same Parquet",
    "cluster-count": "the number of clusters that `auto` chooses, for 7, 20 and 60 planted ones and for real features",
    "consensus": "the consensus at ImageNet's size and a tenth of it: seconds, memory, NMI to planted labels",
    "content-index": "the index of image contents, per image: time, bytes, memory and its start, before and now",
    "daily-arrival": "bytes of the base that a day's new images read, and bytes written for each new one, counted",
    "defaults": "the trainer's settings varied one at a time around their defaults, and the ablation, on real features",
    "demo": "the demo: seconds by stage, and its accuracy against k-means, Ward and spectral clustering",
    "embed": "the embed stage against a plain PyTorch loop over the same files; on a GPU, a ViT-L against its peak",
    "embed-driver": "memory of the driver for each work item of an embedding on Ray Data, over 100,000 of them",
    "embed-memory": "peak memory of the whole embedding job, driver and Ray included, at 2,000 and at 20,000 images",
    "embed-spot": "an embedding whose actors, index and driver are killed: the same bytes, and what is done twice",
    "estimate": "what `icce-ray estimate` says of every stage of the demo against what the run takes",
    "estimated-accuracy": "the accuracy that a run estimates without labels against the true one, on real features",
    "faults": "runs that are killed, cut off from their storage, or find damage: how many lose nothing",
    "gpu-overlap": "how busy an embedding actor keeps a device of given speed, on storage of given latency",
    "heads": "the trainer against a plain PyTorch loop over heads",
    "heads-scale": "training on 1, 2 and 4 workers: bytes, collectives, step time against the work divided, memory",
    "kmeans": "k-means on two shards against faiss.Kmeans with two threads, and what it costs at 100M and 1B images",
    "manifest-scale": "memory and time of finding an artifact of two million parts",
    "listing-scale": "keys/s of listing a bucket that takes 100 ms a page, and what a kill costs",
    "neighbors": "the neighbors stage on two shards against faiss's own knn with two threads",
    "neighbors-gpu": "the exact graph of 1.28 million images on a GPU: seconds by step, equality with a CPU's",
    "neighbors-scale": "counted operations, bytes and predicted time of the graph for 10M to 1B images",
    "proxies": "how well scores without labels rank clusterings of all methods by their true AMI and ACC",
    "recipe": "the whole recipe, one setting at a time around the defaults, on half of the sets of `accuracy`",
    "refit-ids": "a refit with 1% new images and a new class: which images keep their cluster's number, what is found",
    "report": "the page for 100 to 100,000 images: time to make it, size, and frame time of the map in Chromium",
    "resume-scale": "bytes that a resumed embedding reads, the time to plan a retry, and what its driver keeps",
    "small-run": "CPU seconds of a run over 40 images, all processes together, and of the same command again",
    "sweep-metrics": "how well metrics without labels rank a sweep's trials by ACC, and the consensus of the best",
    "table-memory": "peak memory of tables of errors and duplicates, and of named labels, for 100 million images",
    "tar-reads": "requests and bytes of 1,000 images in tar shards on object storage, counted",
    "turtle": "a run of TURTLE against a plain transcription of the paper in PyTorch",
}


def main() -> int:
    """Run one case. Returns the exit code."""
    cases = "\n".join(f"  {name:18}  {text}" for name, text in CASES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"cases:\n{cases}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES, metavar="CASE", help="one of those below")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the case")
    arguments = parser.parse_args()
    module = importlib.import_module(f"cases.{arguments.case.replace('-', '_')}")
    settings = dict(module.SETTINGS)
    for item in arguments.set:
        key, separator, value = item.partition("=")
        if not separator or key not in settings:
            parser.error(f"--set {item}: this case has the settings {', '.join(settings)}")
        settings[key] = yaml.safe_load(value)
    figures, bounds = module.run(settings)
    report = {
        "case": arguments.case,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "settings": settings,
        "figures": figures,
        "bounds": bounds,
        "passed": all(bounds.values()),
        "environment": environment(),
    }
    for text, holds in bounds.items():
        print(f"{'holds ' if holds else 'FAILS '} {text}")
    print(json.dumps(report))
    return 0 if report["passed"] else 1


def environment() -> dict[str, Any]:
    """The machine and the versions of the libraries."""
    import numpy
    import sklearn
    import torch

    cpu = torch.cpu.get_capabilities()
    return {
        "cpu": cpu.get("cpu_name", platform.processor()),
        "num_cpus": len(os.sched_getaffinity(0)),
        "has_bfloat16_units": bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
