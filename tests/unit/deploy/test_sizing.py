"""The page of large sizes: printed by the script, from rates that were measured and sums that the stages check."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from icce_ray.config import HeadsConfig, SampleConfig

from .sizing_page import ROOT, sizing

RESULTS = ROOT / "benchmarks" / "results"
DIM, NUM_CLUSTERS, PLANS, RATES, size = sizing.DIM, sizing.NUM_CLUSTERS, sizing.PLANS, sizing.RATES, sizing.size


def results(name: str, case: str) -> dict[str, Any]:
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return next(result for result in found if result["case"] == case)


def test_the_page_is_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
    assert page == sizing.page(), "run: python benchmarks/sizing.py > docs/sizing.md"


def test_measured_rates_are_those_of_the_results() -> None:
    memory = results("2026-11-21-embed-storage.txt", "embed-memory")
    few, many = (memory["figures"]["seconds"][count][0] for count in ("2000", "20000"))
    assert RATES["job"].value == pytest.approx(18_000 / (many - few) / memory["environment"]["num_cpus"], rel=1e-4)
    consensus = results("2026-11-21-consensus.txt", "consensus")
    labels = consensus["settings"]["num_images"] * consensus["settings"]["num_heads"]
    assert RATES["consensus"].value == pytest.approx(labels / consensus["figures"]["stage"]["seconds"], rel=1e-4)
    heads = results("2026-11-27-gpu.txt", "heads")["figures"]
    parameters = 50 * (DIM * 512 + 512 * 256 + 256 * NUM_CLUSTERS)
    products_s = heads["step_s"] - 40 * parameters / RATES["gpu_memory"].value
    flop = heads["tflop_per_s"] * 1e12 * heads["step_s"]
    assert RATES["heads_share"].value == pytest.approx(flop / products_s / RATES["gpu"].value, rel=5e-3)
    search = results("2026-11-27-gpu.txt", "neighbors-gpu")
    num_images, dim = search["settings"]["num_images"], search["settings"]["dim"]
    search_s = search["figures"]["seconds"]["search"] + search["figures"]["seconds"]["merge"]
    flop = 2 * num_images**2 * dim
    assert RATES["search_share"].value == pytest.approx(flop / search_s / RATES["gpu"].value, rel=5e-3)
    measured = {name for name, rate in RATES.items() if rate.kind == "measured"}
    listing = results("2026-11-29-listing.txt", "listing-scale")
    assert RATES["list"].value == pytest.approx(2 * listing["figures"]["per_cpu_s"], rel=1e-4)
    assert measured == {"job", "consensus", "heads_share", "list", "search_share"}
    for name in measured:
        assert (RESULTS / re.findall(r"[\w-]+\.txt", RATES[name].source)[0]).exists()


def test_the_backbones_work_is_that_of_its_layers() -> None:
    width, tokens = 1024, 1 + 16 * 16
    products = {
        "queries, keys, values": 3 * width * width * tokens,
        "scores": tokens * tokens * width,
        "weighted sums": tokens * tokens * width,
        "projection": width * width * tokens,
        "the two layers of the perceptron": 2 * width * 4 * width * tokens,
    }
    assert sizing.backbone_flop() == 2 * 24 * sum(products.values())


def test_a_pairs_work_is_that_of_the_heads_layers() -> None:
    widths = [DIM // 2, 512, 256, NUM_CLUSTERS]
    flop = 0
    for layer, (rows, columns) in enumerate(itertools.pairwise(widths)):
        forward = 2 * rows * columns
        teacher, student = forward, forward
        weight_gradient, input_gradient = forward, forward if layer > 0 else 0
        flop += 2 * 50 * (teacher + student + weight_gradient + input_gradient)
    assert sizing.flop_per_pair() == flop
    assert sizing.head_parameters() == 50 * sum(rows * columns for rows, columns in itertools.pairwise(widths))


def test_the_memory_of_heads_is_what_training_checks_less_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from icce_ray.methods.heads.training_memory import training_bytes

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
    stated = sizing.memory_bytes(2_000_000, PLANS[0])["method, the GPU"]
    needed = training_bytes(
        HeadsConfig(), num_images=2_000_000, dim=DIM, num_clusters=NUM_CLUSTERS, batch_size=sizing.BATCH_PAIRS,
        device=torch.device("cuda"),
    )  # fmt: skip
    assert 0.9 * stated < needed < 1.2 * stated


def test_what_is_trained_on_stops_growing_and_the_rest_is_linear() -> None:
    assert SampleConfig().max_images == 2_000_000  # as the page says
    small, large = size(100_000_000), size(1_000_000_000)
    assert small.seconds["method"] == large.seconds["method"]
    for stage in ("images", "embed", "assign"):
        assert large.seconds[stage] == pytest.approx(10 * small.seconds[stage])
    assert size(1000).plan is PLANS[0]
    assert size(10**10).plan is PLANS[-1]


def test_the_slowest_of_three_sets_the_pace_of_embedding() -> None:
    seconds = sizing.embed_seconds(1_000_000, PLANS[0])
    assert seconds["CPUs"] == pytest.approx(1e6 * (1 / 513.1 + 1 / 125) / (16 - 2))
    assert seconds["GPUs"] == pytest.approx(1e6 * 1.617e11 / (989e12 * 0.4), rel=1e-3)
    assert size(1_000_000).embed_bound == "CPUs"
    assert max(sizing.embed_seconds(1, replace(PLANS[0], cpus=1000)).values()) == seconds["GPUs"] / 1e6
