"""What to start for how many images: counted work over rates, each of which says where it comes from.

Nothing is run: ``icce-ray estimate CONFIG`` measures the machines at hand, this module is for machines that are not
there yet. Its tables are those of docs/sizing.md: ``python -m icce_ray.sizing`` prints them.

The settings are the defaults: N images, D features of the default backbone, H heads, K clusters, n = min(N,
`sample.max_images`) images that are trained on, B pairs a step, P parameters of all heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from icce_ray.config import BackboneConfig, ClassifierConfig, ConsensusConfig, HeadsConfig, SampleConfig
from icce_ray.runtime.progress import format_bytes

NUM_CLUSTERS = 1000
"""K, of a large collection."""
BATCH_PAIRS = 1024
"""B: what `heads.batch_size: auto` is for large collections."""
BACKBONE = "vit_large_patch14_dinov2.lvd142m"
DEPTH, WIDTH, NUM_TOKENS = 24, 1024, 257
"""Of that backbone at 224 pixels: 16 x 16 patches and the class token."""
DIM = 2 * WIDTH
"""D: class token and mean of the patches."""
MEAN_NEIGHBORS = 200
URI_BYTES = 60


@dataclass(frozen=True)
class Rate:
    """A figure that times are computed with."""

    value: float
    unit: str
    kind: Literal["measured", "data sheet", "assumed"]
    """`measured`: in this repository; the source names the result."""
    source: str


RATES = {
    "job": Rate(
        513.1,
        "images/s per CPU: listing, reading, hashing, embedding by `pixels`, writing",
        "measured",
        "`embed-memory`, 2026-11-21-embed-storage.txt: 18,000 images of 64 pixels more in the larger run, 2 CPUs",
    ),
    "consensus": Rate(
        780338.0,
        "labels/s: images times heads",
        "measured",
        "`consensus`, 2026-11-21-consensus.txt: 2 CPUs, shared with other work; taken so whatever the number of CPUs",
    ),
    "decode": Rate(125.0, "photos/s per CPU", "assumed", "8 ms to decode and resize a JPEG of some hundred kB"),
    "image": Rate(1e5, "bytes per image", "assumed", ""),
    "gpu": Rate(989e12, "FLOP/s in bfloat16", "data sheet", "H100 SXM, without sparsity"),
    "gpu_share": Rate(0.4, "of that", "assumed", "of products on GPUs, where nothing was measured"),
    "heads_share": Rate(
        0.237,
        "of `gpu`: products of a training step, beside the update",
        "measured",
        "`heads`, 2026-11-27-gpu.txt: one H200, every head all dimensions",
    ),
    "search_share": Rate(
        0.164,
        "of `gpu`: products of the search",
        "measured",
        "`neighbors-gpu`, 2026-11-27-gpu.txt: one H200 and 16 CPUs, 1024 dimensions; with the merge",
    ),
    "gpu_memory": Rate(3.35e12, "bytes/s", "data sheet", "H100 SXM"),
    "link": Rate(450e9, "bytes/s between GPUs, each way", "data sheet", "NVLink 4"),
    "cpu": Rate(48e9, "FLOP/s in float32 per CPU", "data sheet", "AVX2: 3 GHz x 2 x 16 FLOP, two CPUs a core"),
    "cpu_share": Rate(0.5, "of that", "assumed", "of all products on CPUs"),
    "network": Rate(12.5e9, "bytes/s per machine", "data sheet", "100 Gbit/s"),
    "network_share": Rate(0.5, "of that", "assumed", ""),
    "list": Rate(1e4, "objects/s", "assumed", "one after the other, pages of 1,000 in 0.1 s"),
}


@dataclass(frozen=True)
class Plan:
    """Machines that a config and a manifest under deploy/ describe."""

    config: str
    manifest: str
    max_images: int
    """What it is meant for."""
    machines: str
    num_machines: int
    gpus: int
    cpus: int
    """Of all machines but the head."""
    embed_cpus: int
    """That the embedding workers hold; the others read and decode."""
    search_gpus: int
    """That search neighbours; 0: CPUs do."""
    search_workers: int
    search_machines: int
    search_cpus: int
    assign_cpus: int


PLANS = (
    Plan(
        "one-gpu.yaml", "kubernetes/rayjob-gpu.yaml", 2_000_000, "1 with 1 GPU",
        num_machines=1, gpus=1, cpus=16, embed_cpus=2,
        search_gpus=1, search_workers=1, search_machines=1, search_cpus=8, assign_cpus=12,
    ),
    Plan(
        "eight-gpus.yaml", "aws/cluster.yaml", 30_000_000, "1 with 8 GPUs",
        num_machines=1, gpus=8, cpus=192, embed_cpus=16,
        search_gpus=8, search_workers=8, search_machines=1, search_cpus=128, assign_cpus=160,
    ),
    Plan(
        "sixty-four-gpus.yaml", "kubernetes/raycluster-autoscaling.yaml", 1_000_000_000,
        "8 with 8 GPUs, 64 that decode, 4 with much memory",
        num_machines=76, gpus=64, cpus=2208, embed_cpus=128,
        search_gpus=0, search_workers=4, search_machines=4, search_cpus=440, assign_cpus=512,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What N images take on a plan: seconds, bytes."""

    num_images: int
    plan: Plan
    seconds: dict[str, float]
    """Of each stage; the listing is that of single objects."""
    embed_bound: str
    """What the embedding waits for: CPUs, GPUs or network."""
    storage_bytes: dict[str, int]
    memory_bytes: dict[str, int]

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def lines(self) -> list[str]:
        """For people."""
        stages = ", ".join(f"{name} {_about(value)}" for name, value in self.seconds.items())
        return [
            f"{self.num_images:,} images, {BACKBONE}, {NUM_CLUSTERS:,} clusters; nothing was run, see docs/sizing.md",
            f"start             {self.plan.machines}: deploy/{self.plan.manifest}, deploy/configs/{self.plan.config}",
            f"time              {_about(self.total_s)} ({stages}); the embedding waits for {self.embed_bound}",
            "storage           " + ", ".join(f"{name} {_size(value)}" for name, value in self.storage_bytes.items()),
            "memory            " + ", ".join(f"{name} {_size(value)}" for name, value in self.memory_bytes.items()),
        ]


def size(num_images: int) -> Size:
    """What to start for `num_images`, and what it takes."""
    plan = next((plan for plan in PLANS if num_images <= plan.max_images), PLANS[-1])
    trained = min(num_images, SampleConfig().max_images or num_images)
    embed = embed_seconds(num_images, plan)
    bound = max(embed, key=lambda name: embed[name])
    return Size(
        num_images,
        plan,
        {
            "images": num_images / _rate("list"),
            "embed": embed[bound],
            "neighbors": neighbors_seconds(trained, plan),
            "heads": heads_seconds(trained),
            "consensus": trained * HeadsConfig().num_heads / _rate("consensus"),
            "classifier": classifier_seconds(),
            "assign": assign_seconds(num_images, plan),
        },
        bound,
        storage_bytes(num_images, trained),
        memory_bytes(trained, plan),
    )


def backbone_flop() -> float:
    """Of an image through the backbone: ``depth (24 w^2 T + 4 T^2 w)``, w the width and T the tokens."""
    assert BackboneConfig().backbone == BACKBONE
    return DEPTH * (24.0 * WIDTH**2 * NUM_TOKENS + 4.0 * NUM_TOKENS**2 * WIDTH)


def embed_seconds(num_images: int, plan: Plan) -> dict[str, float]:
    """What each of the three that work at the same time needs; the longest counts."""
    cpu_s = 1 / _rate("job") + 1 / _rate("decode")
    return {
        "CPUs": num_images * cpu_s / (plan.cpus - plan.embed_cpus),
        "GPUs": num_images * backbone_flop() / (plan.gpus * _gpu()),
        "network": num_images * _rate("image") / (plan.num_machines * _network()),
    }


def neighbors_seconds(trained: int, plan: Plan) -> float:
    """At most, all pairs: ``2 n^2 D`` FLOP. The audit before it is not counted."""
    flop = 2.0 * trained**2 * DIM
    return flop / (plan.search_gpus * _rate("gpu") * _rate("search_share") or plan.search_cpus * _cpu())


def head_parameters() -> int:
    """P = H (S M + M p + p K), S the dimensions that a head sees, M and p its widths."""
    heads = HeadsConfig()
    hidden, bottleneck = heads.hidden_dim, heads.bottleneck_dim
    return heads.num_heads * (heads.num_inputs(DIM) * hidden + hidden * bottleneck + bottleneck * NUM_CLUSTERS)


def flop_per_pair() -> float:
    """``4 H (3 S M + 4 (M p + p K))``: two views, each once through the teacher, and through the student and back; the
    features themselves get no gradient."""
    heads = HeadsConfig()
    first = heads.num_inputs(DIM) * heads.hidden_dim * heads.num_heads
    return 4.0 * (3 * first + 4 * (head_parameters() - first))


def step_seconds(num_gpus: int = 1) -> float:
    """A step: products, then 40 P bytes read and written (student, teacher, gradient, two moments), then the gradient's
    way between GPUs."""
    products = BATCH_PAIRS * flop_per_pair() / (num_gpus * _rate("gpu") * _rate("heads_share"))
    update = 2 * 20.0 * head_parameters() / _rate("gpu_memory")
    exchange = 2 * (num_gpus - 1) / num_gpus * 4.0 * head_parameters() / _rate("link")
    return products + update + exchange


def heads_seconds(trained: int) -> float:
    """``epochs n / B`` steps on one GPU."""
    return HeadsConfig().num_epochs * math.ceil(trained / BATCH_PAIRS) * step_seconds()


def classifier_seconds() -> float:
    """On one GPU: ``4 g b D K`` FLOP a step for g learning rates and b images, and 24 g D K bytes of weights,
    gradients and momentum, read and written."""
    from icce_ray.classifier.self_training import MAX_STEPS

    config = ClassifierConfig()
    weights = len(config.learning_rates) * DIM * NUM_CLUSTERS
    step = 4.0 * config.batch_size * weights / _gpu() + 24.0 * weights / _rate("gpu_memory")
    return MAX_STEPS * step


def assign_seconds(num_images: int, plan: Plan) -> float:
    """``2 N D (K + r)`` FLOP on CPUs, r directions of the outlier score, or the way of 2 N D bytes, if that takes
    longer."""
    from icce_ray.classifier.outliers import MAX_DIRECTIONS

    flop = 2.0 * num_images * DIM * (NUM_CLUSTERS + MAX_DIRECTIONS)
    return max(flop / (plan.assign_cpus * _cpu()), 2.0 * num_images * DIM / (plan.num_machines * _network()))


def storage_bytes(num_images: int, trained: int) -> dict[str, int]:
    """Before compression: float16 embeddings with id and hash, listing, assignments; the sample; the graph at most; the
    heads' labels."""
    row = 2 * DIM + 8 + 64
    sample = trained * row if trained < num_images else 0
    return {
        "listing": num_images * (8 + URI_BYTES + 8 + 32),
        "embeddings": num_images * row + sample,
        "graph, at most": trained * (4 * 1000 + 8),
        "labels of heads": 4 * HeadsConfig().num_heads * trained,
        "assignments": num_images * (8 + URI_BYTES + 4 + 4 + 4 + 4 + 1 + 1),
    }


def memory_bytes(trained: int, plan: Plan) -> dict[str, int]:
    """What the stages check before they start, by the same functions where these need no machine; and the features on
    each disk."""
    from icce_ray.neighbors.search_memory import needed_bytes, shard_bytes, worker_bytes

    here = plan.search_workers // plan.search_machines
    heads = HeadsConfig()
    figures = {
        "neighbors, a machine": needed_bytes(
            shard_bytes(trained, DIM), worker_bytes(DIM, MEAN_NEIGHBORS), here, plan.search_workers
        ),
        "neighbors, a GPU": 6 * trained * DIM // plan.search_gpus if plan.search_gpus else 0,
        "heads, the GPU": 4 * trained * DIM + 8 * heads.num_heads * trained + 20 * head_parameters(),
        "consensus, the head": _coordinator_bytes(trained),
        "features on disk": 2 * trained * DIM,
    }
    return {name: value for name, value in figures.items() if value}


def _coordinator_bytes(trained: int) -> int:
    from icce_ray.consensus.consensus_memory import coordinator_bytes

    num_clusters_H = np.full(HeadsConfig().num_heads, NUM_CLUSTERS)
    return coordinator_bytes(trained, num_clusters_H, NUM_CLUSTERS, ConsensusConfig().methods)


def _rate(name: str) -> float:
    return RATES[name].value


def _gpu() -> float:
    return _rate("gpu") * _rate("gpu_share")


def _cpu() -> float:
    return _rate("cpu") * _rate("cpu_share")


def _network() -> float:
    return _rate("network") * _rate("network_share")


def _about(seconds: float) -> str:
    """Two digits: the rates are no better."""
    for unit, length in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length or unit == "s":
            break
    value = seconds / length
    return f"{float(f'{value:.2g}'):g} {unit}"


def _number(value: float) -> str:
    for exponent in (12, 9):
        if value >= 10**exponent:
            return f"{value / 10**exponent:g}e{exponent}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _size(num_bytes: float) -> str:
    return format_bytes(num_bytes, digits=2)


PAGE_IMAGES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)


def tables() -> dict[str, str]:
    """The tables of docs/sizing.md, as Markdown, by the name that stands above each in the page's source."""
    sizes = [size(num_images) for num_images in PAGE_IMAGES]
    names = ["1M", "10M", "100M", "1B"]
    start = [
        ["start", *(found.plan.machines for found in sizes)],
        ["config", *(f"`{found.plan.config}`" for found in sizes)],
        ["GPUs", *(str(found.plan.gpus) for found in sizes)],
        ["CPUs", *(f"{found.plan.cpus:,}" for found in sizes)],
        ["time, all stages", *(_about(found.total_s) for found in sizes)],
        ["without the listing", *(_about(found.total_s - found.seconds["images"]) for found in sizes)],
        ["storage", *(_size(sum(found.storage_bytes.values())) for found in sizes)],
    ]
    times = [[stage, *(_about(found.seconds[stage]) for found in sizes)] for stage in sizes[0].seconds]
    times.append(["the embedding waits for", *(found.embed_bound for found in sizes)])
    emphasis = {"measured": "**measured**"}
    rates = [
        [f"`{name}`", f"{_number(rate.value)} {rate.unit}", emphasis.get(rate.kind, rate.kind), rate.source]
        for name, rate in RATES.items()
    ]
    return {
        "start": _markdown(["images", *names], start),
        "times": _markdown(["stage", *names], times),
        "storage": _markdown(["artifact", *names], _bytes_rows([found.storage_bytes for found in sizes])),
        "memory": _markdown(["memory or disk", *names], _bytes_rows([found.memory_bytes for found in sizes])),
        "gpus": _markdown(
            ["GPUs that train", "1", "2", "4", "8"],
            [["ms a step", *(f"{1000 * step_seconds(gpus):.1f}" for gpus in (1, 2, 4, 8))]],
        ),
        "rates": _markdown(["", "rate", "", "source"], rates),
    }


def _bytes_rows(columns: list[dict[str, int]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [[name, *(_size(column[name]) if name in column else "" for column in columns)] for name in names]


def _markdown(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"<!-- {name} -->\n{table}\n")
