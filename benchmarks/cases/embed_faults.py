"""Seconds of the embedding stage on an S3 server over HTTP, with and without faults, side by side.

The server and the faulty proxy are those of the tests, which need moto (the `test` extra). One read in ten is answered
with 503, one in a hundred never; one in fifty is cut off, and one in fifty is too short with a matching length. One
object always fails.
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SETTINGS: dict[str, Any] = {"num_images": 2000, "repeats": 3, "max_ratio": 3.0}


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "integration"))
    import boto3
    from storage_server import ACCESS_KEY, SECRET_KEY, Faults, faulty_proxy, moto_server

    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1"}
    seconds: dict[str, list[float]] = {"undisturbed": [], "faults": []}
    errors: dict[str, int] = {}
    with moto_server() as endpoint:
        s3 = boto3.client("s3", endpoint_url=endpoint)
        for bucket in ("photos", "results"):
            s3.create_bucket(Bucket=bucket)
        for number in range(settings["num_images"]):
            s3.put_object(Bucket="photos", Key=f"all/{number:06d}.png", Body=_png(number))
        _embed(endpoint, "s3://results/warm-up")
        for repeat in range(settings["repeats"]):
            for kind in seconds:
                shares = (0.1, 0.01, 0.02, 0.02) if kind == "faults" else ()
                failing = "/all/000007.png" if kind == "faults" else ""
                # Behind the proxy in both cases, since the proxy costs time, too.
                with faulty_proxy(endpoint, Faults("/photos/all/", *shares, always_failing=failing)) as url:
                    took, errors[kind] = _embed(url, f"s3://results/{kind}-{repeat}")
                seconds[kind].append(took)
                print(f"{kind:<12} {took:6.1f} s, {errors[kind]} errors", flush=True)
    ratio = float(np.median(seconds["faults"]) / np.median(seconds["undisturbed"]))
    bounds = {
        f"with faults below {settings['max_ratio']:g} times the undisturbed seconds": ratio < settings["max_ratio"],
        "all images but the one that always fails are embedded": errors == {"undisturbed": 0, "faults": 1},
    }
    return {"seconds": seconds, "ratio": ratio, "errors": errors}, bounds


def _embed(endpoint: str, output: str) -> tuple[float, int]:
    """(seconds of the stage, failed images)."""
    from icce_ray.config import Config
    from icce_ray.pipeline import run as pipeline
    from icce_ray.store import Artifact

    config = Config(
        output=output,
        num_clusters=2,
        images={"uri": "s3://photos/all/"},
        embed={"backbone": "pixels", "image_size": 32},
        storage={"endpoint": endpoint},
    )
    artifacts: dict[str, Artifact] = {}
    for step in pipeline.plan(config)[:2]:
        began = time.perf_counter()
        artifacts[step.name] = pipeline.run_stage(config, step, artifacts, True)
    return time.perf_counter() - began, artifacts["embed"].metrics["num_errors"]


def _png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()
