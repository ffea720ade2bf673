"""The embed stage against a plain PyTorch loop over the same files: same model, threads, batch size and precision.

Each run is its own process, timed from its start until its result is on disk: imports, building the model, reading,
decoding, embedding and writing, and for the stage also Ray's start, listing, hashing, Parquet and manifests. A run over
a few images measures the fixed costs; rates are those of the images beyond these. The stage's fixed overhead is how
much longer than the loop it takes for the few images. Two costs are shown separately: the first run on a machine, which
has to inspect the network, and stopping Ray, which a run does once, after its last stage.

On a machine with a GPU, the network runs alone instead, against the matmul peak that is measured beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SETTINGS: dict[str, Any] = {
    "backbone": "vit_small_patch14_dinov2",
    "num_images": 512,
    "few_images": 8,
    "batch_size": 64,
    "precision": "auto",
    "loader_workers": [0, 1],
    "repeats": 3,
}
MIN_SHARE = 0.9
MAX_OVERHEAD_S = 10.0
IMAGE_SIZE = 224


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    import torch

    if torch.cuda.is_available():
        return _run_on_gpu()
    count, few = settings["num_images"], settings["few_images"]
    kinds = {f"plain loop, {workers} workers": workers for workers in settings["loader_workers"]} | {"stage": None}
    seconds: dict[str, dict[int, list[float]]] = {name: {few: [], count: []} for name in kinds}
    ending_s: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(prefix="icce_ray-embed-") as folder:
        for size in (few, count):
            write_photos(Path(folder) / str(size), size)
        os.environ["ICCE_CACHE"] = f"{folder}/cache"
        first_s, _ = _measured("stage", f"{folder}/{few}", settings | {"workers": None, "output": f"{folder}/first"})
        for repeat in range(settings["repeats"]):
            for name, workers in kinds.items():
                for size, measured in seconds[name].items():
                    extra = {"workers": workers, "output": f"{folder}/output-{repeat}-{size}"}
                    until_result, until_end = _measured(name.split()[0], f"{folder}/{size}", settings | extra)
                    measured.append(until_result)
                    ending_s[name].append(round(until_end - until_result, 2))
                print(f"round {repeat}: {name}: {seconds[name]} s", flush=True)
    median = {name: {size: float(np.median(runs[size])) for size in runs} for name, runs in seconds.items()}
    rates = {name: (count - few) / (of[count] - of[few]) for name, of in median.items()}
    plain = max((name for name in kinds if name != "stage"), key=lambda name: rates[name])
    share = rates["stage"] / rates[plain]
    overhead_s = median["stage"][few] - median[plain][few]
    share_of_all = median[plain][count] / median["stage"][count]
    first_overhead_s, end_s = first_s - median[plain][few], float(np.median(ending_s["stage"]))
    print(f"images/s: {rates}")
    print(
        f"stage: {share:.2f} of the loop's images/s, {overhead_s:.1f} s more fixed; with that, over {count} images, "
        f"{share_of_all:.2f}; {first_overhead_s:.1f} s on a machine's first run; {end_s:.1f} s to end Ray"
    )
    figures = {
        "images_per_s": rates,
        "share": share,
        "overhead_s": overhead_s,
        "first_overhead_s": first_overhead_s,
        "share_with_overhead": share_of_all,
        "seconds": seconds,
        "ending_s": ending_s,
    }
    return figures, {
        f"the stage embeds at least {MIN_SHARE} of the plain loop's images/s": share >= MIN_SHARE,
        f"the stage's fixed overhead is under {MAX_OVERHEAD_S:g} s": overhead_s < MAX_OVERHEAD_S,
    }


def write_photos(folder: Path, count: int) -> None:
    """JPEGs as large as photos: 500 x 375 pixels, about 50 kB."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + generator.integers(-12, 13, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=85)


def _measured(kind: str, folder: str, settings: dict[str, Any]) -> tuple[float, float]:
    """Seconds of one run in its own process: until its result is on disk, and until its end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = time.time()
    command = [sys.executable, __file__, kind, folder, json.dumps(settings)]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return round(float(done.stdout.split()[-1]) - started, 2), round(time.time() - started, 2)


def _stage(folder: str, settings: dict[str, Any]) -> None:
    from icce_ray.config import Config
    from icce_ray.embed import embed_images
    from icce_ray.images import list_images
    from icce_ray.runtime.progress import Progress
    from icce_ray.runtime.ray_cluster import disconnect
    from icce_ray.stage import StageContext
    from icce_ray.store import Artifact, ArtifactWriter, Folder

    embed = {name: settings[name] for name in ("backbone", "batch_size", "precision")}
    config = Config(
        output=settings["output"],
        num_clusters=2,
        images={"uri": folder},  # type: ignore[arg-type]
        embed=embed | {"weights": "random", "features": "cls"},  # type: ignore[arg-type]
    )
    inputs: dict[str, Artifact] = {}
    for name, stage in (("images", list_images), ("embed", embed_images)):
        writer = ArtifactWriter(Folder.at(f"{settings['output']}/{name}"))
        metrics = stage.run(config, StageContext(writer, inputs, Progress(name, quiet=True)))
        inputs[name] = writer.commit(
            stage=name, fingerprint="0" * 16, inputs={}, config={}, metrics=metrics, seconds=0.0
        )
    print(time.time(), flush=True)
    disconnect()  # as the command does


def _plain(folder: str, settings: dict[str, Any]) -> None:
    import timm
    import torch
    from timm.data import create_transform, resolve_model_data_config
    from torch.utils.data import DataLoader, Dataset

    from icce_ray.runtime.machine import matmul_dtype

    model: Any = timm.create_model(settings["backbone"], num_classes=0, img_size=IMAGE_SIZE).eval()
    data = resolve_model_data_config(model) | {"input_size": (3, IMAGE_SIZE, IMAGE_SIZE)}
    transform = create_transform(**data, is_training=False)
    dtype = matmul_dtype(settings["precision"], torch.device("cpu"))

    class Files(Dataset[torch.Tensor]):
        paths = sorted(Path(folder).iterdir())

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            with Image.open(self.paths[index]) as image:
                pixels: torch.Tensor = transform(image.convert("RGB"))
            return pixels

    rows = []
    loader = DataLoader(Files(), batch_size=settings["batch_size"], num_workers=settings["workers"])
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for images in loader:
            rows.append(model.forward_features(images)[:, 0].to(torch.float16).numpy())
    np.save(f"{folder}.npy", np.concatenate(rows))
    print(time.time(), flush=True)


def _run_on_gpu() -> tuple[dict[str, Any], dict[str, bool]]:
    """DINOv2's ViT-L/14 at 224 pixels in bfloat16: images/s of the network alone by batch size, plain and compiled, and
    images/s from pixels to features in memory at the batch size that the stage would choose."""
    import timm
    import torch

    from cases.peak import matmul_peak
    from icce_ray.embed.networks import TimmBackbone, find_batch_size

    model: Any = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=IMAGE_SIZE)
    width, num_tokens, depth = model.embed_dim, 1 + (IMAGE_SIZE // 14) ** 2, len(model.blocks)
    flop_per_image = depth * (24.0 * width**2 * num_tokens + 4.0 * num_tokens**2 * width)
    peak = matmul_peak("cuda", torch.bfloat16, 8192)
    rates: dict[str, Any] = {}
    backbone = TimmBackbone(model, "cls+patch_mean", "cuda", "bfloat16")
    found_batch_size = find_batch_size(backbone.embed, (IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (found_batch_size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    started = time.perf_counter()
    for _ in range(10):
        backbone.embed(pixels)
    from_memory = 10 * found_batch_size / (time.perf_counter() - started)
    for compiled in (False, True):
        if compiled:
            backbone.compile()
        # Compiling takes a minute: one size shows what it brings.
        for batch_size in (256,) if compiled else (64, 128, 256, 512):
            images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device="cuda")
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                for _ in range(3):
                    backbone._forward(images)
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(10):
                    backbone._forward(images)
                torch.cuda.synchronize()
            rate = 10 * batch_size / (time.perf_counter() - started)
            name = f"batch {batch_size}{', compiled' if compiled else ''}"
            rates[name] = {"images_per_s": rate, "share_of_matmul_peak": rate * flop_per_image / peak}
            print(f"{name}: {rate:.0f} images/s, {rate * flop_per_image / peak:.2f} of the matmul peak", flush=True)
    figures = {
        "matmul_peak_tflop_per_s": peak / 1e12,
        "network": rates,
        "found_batch_size": found_batch_size,
        "from_pixels_in_memory_images_per_s": from_memory,
    }
    print(
        f"matmul peak {peak / 1e12:.0f} TFLOP/s; from pixels in memory {from_memory:.0f} images/s at {found_batch_size}"
    )
    return figures, {}


if __name__ == "__main__":
    {"stage": _stage, "plain": _plain}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]))
