"""The embed stage against a plain PyTorch loop over the same files: same model, threads, batch size and precision.

Each run is a process of its own. The stage's time is the whole of it: imports, Ray's start, listing, reading, hashing,
decoding, embedding, Parquet, manifest. The loop's is that of the loop alone, without imports and the building of the
model. What the stage costs besides its images is measured with a handful of them, and stated by itself; its rate is
that of the images beyond those.

On a GPU, where there is one, the network runs alone instead, against the matmul peak measured beside it.
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
    "num_images": 1024,
    "few_images": 8,
    "batch_size": 64,
    "precision": "auto",
    "loader_workers": [0, 1],
    "repeats": 2,
}
MIN_SHARE = 0.9
MAX_OVERHEAD_S = 10.0
IMAGE_SIZE = 224


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    import torch

    if torch.cuda.is_available():
        return _run_on_gpu()
    plain: dict[int, list[float]] = {workers: [] for workers in settings["loader_workers"]}
    stage: list[float] = []
    few: list[float] = []
    count, few_images = settings["num_images"], settings["few_images"]
    with tempfile.TemporaryDirectory(prefix="icce_ray-embed-") as folder:
        many, handful = Path(folder) / "many", Path(folder) / "few"
        write_photos(many, count)
        write_photos(handful, few_images)
        for repeat in range(settings["repeats"]):
            for workers, seconds in plain.items():
                seconds.append(_measured("plain", many, settings | {"workers": workers}))
            few.append(_measured("stage", handful, settings | {"output": f"{folder}/few-{repeat}"}))
            stage.append(_measured("stage", many, settings | {"output": f"{folder}/many-{repeat}"}))
            print(f"round {repeat}: plain {plain}, stage {stage}, of {few_images} images {few}", flush=True)
    plain_s = min(float(np.median(seconds)) for seconds in plain.values())
    stage_s, few_s = float(np.median(stage)), float(np.median(few))
    plain_rate = count / plain_s
    stage_rate = (count - few_images) / (stage_s - few_s)
    overhead_s = few_s - few_images / plain_rate
    figures = {
        "plain_images_per_s": plain_rate,
        "stage_images_per_s": stage_rate,
        "share": stage_rate / plain_rate,
        "share_with_overhead": plain_s / stage_s,
        "overhead_s": overhead_s,
        "plain_s": plain,
        "stage_s": stage,
        "few_images_s": few,
    }
    print(
        f"plain loop {plain_rate:.1f} images/s, stage {stage_rate:.1f} ({stage_rate / plain_rate:.2f}; with its fixed "
        f"{overhead_s:.1f} s over {count} images {plain_s / stage_s:.2f})"
    )
    return figures, {
        f"the stage embeds at least {MIN_SHARE} of the plain loop's images/s": stage_rate >= MIN_SHARE * plain_rate,
        f"the stage's fixed overhead is under {MAX_OVERHEAD_S:g} s": overhead_s < MAX_OVERHEAD_S,
    }


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of a photo's size and weight: 500 x 375 pixels, some 50 kB."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + generator.integers(-12, 13, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=85)


def _measured(kind: str, folder: Path, settings: dict[str, Any]) -> float:
    """Seconds of one run in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, kind, str(folder), json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    seconds = time.perf_counter() - started
    return round(float(done.stdout.splitlines()[-1]) if kind == "plain" else seconds, 2)


def _stage(folder: str, settings: dict[str, Any]) -> None:
    from icce_ray.config import Config
    from icce_ray.context import StageContext
    from icce_ray.embed import job, listing
    from icce_ray.progress import Progress
    from icce_ray.store import Artifact, ArtifactWriter, Folder

    embed = {name: settings[name] for name in ("backbone", "batch_size", "precision")}
    config = Config(
        output=settings["output"],
        num_clusters=2,
        images={"uri": folder},  # type: ignore[arg-type]
        embed=embed | {"weights": "random", "features": "cls"},  # type: ignore[arg-type]
    )
    inputs: dict[str, Artifact] = {}
    for name, stage in (("images", listing), ("embed", job)):
        writer = ArtifactWriter(Folder.at(f"{settings['output']}/{name}"))
        metrics = stage.run(config, StageContext(writer, inputs, Progress(name, quiet=True)))
        inputs[name] = writer.commit(
            stage=name, fingerprint="0" * 16, inputs={}, config={}, metrics=metrics, seconds=0.0
        )


def _plain(folder: str, settings: dict[str, Any]) -> None:
    import timm
    import torch
    from timm.data import create_transform, resolve_model_data_config
    from torch.utils.data import DataLoader, Dataset

    from icce_ray.precision import matmul_dtype

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

    started = time.perf_counter()
    rows = []
    loader = DataLoader(Files(), batch_size=settings["batch_size"], num_workers=settings["workers"])
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for images in loader:
            rows.append(model.forward_features(images)[:, 0].to(torch.float16).numpy())
    np.save(f"{folder}.npy", np.concatenate(rows))
    print(time.perf_counter() - started)


def _run_on_gpu() -> tuple[dict[str, Any], dict[str, bool]]:
    """DINOv2's ViT-L/14 at 224 pixels in bfloat16: images/s of the network alone by batch size, plain and compiled, and
    from pixels in memory to features in memory at the batch size that the stage would find."""
    import timm
    import torch

    from cases.peak import matmul_peak
    from icce_ray.embed.networks import TimmBackbone, find_batch_size

    model: Any = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=IMAGE_SIZE)
    width, num_tokens, depth = model.embed_dim, 1 + (IMAGE_SIZE // 14) ** 2, len(model.blocks)
    flop_per_image = depth * (24.0 * width**2 * num_tokens + 4.0 * num_tokens**2 * width)
    peak = matmul_peak("cuda", torch.bfloat16, 8192)
    rates: dict[str, Any] = {}
    for compiled in (False, True):
        backbone = TimmBackbone(model, "cls+patch_mean", 2 * width, "cuda", "bfloat16", compiled=compiled)
        for batch_size in (64, 128, 256, 512):
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
    plain = TimmBackbone(model, "cls+patch_mean", 2 * width, "cuda", "bfloat16", compiled=False)
    batch_size = find_batch_size(plain.embed, (IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    started = time.perf_counter()
    for _ in range(10):
        plain.embed(pixels)
    from_memory = 10 * batch_size / (time.perf_counter() - started)
    figures = {
        "matmul_peak_tflop_per_s": peak / 1e12,
        "network": rates,
        "found_batch_size": batch_size,
        "from_pixels_in_memory_images_per_s": from_memory,
    }
    print(f"matmul peak {peak / 1e12:.0f} TFLOP/s; from pixels in memory {from_memory:.0f} images/s at {batch_size}")
    return figures, {}


if __name__ == "__main__":
    {"stage": _stage, "plain": _plain}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]))
