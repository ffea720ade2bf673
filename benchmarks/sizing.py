"""The page docs/sizing.md: what to start for 1 million to 1 billion images. Prints it:

    python benchmarks/sizing.py > docs/sizing.md

The work is counted and divided by rates, each of which says where it comes from. Nothing is run: `icce-ray estimate`
measures the machines at hand.

The settings are the defaults. N images, D features of the default backbone, H heads, K clusters, n = min(N,
`sample.max_images`) images that are trained on, B pairs per step, P parameters of all heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from icce_ray.classifier.outliers import MAX_DIRECTIONS
from icce_ray.classifier.self_training import MAX_STEPS
from icce_ray.config import BackboneConfig, ClassifierConfig, ConsensusConfig, HeadsConfig, SampleConfig
from icce_ray.consensus.consensus_memory import coordinator_bytes
from icce_ray.neighbors.search import needed_bytes, shard_bytes, worker_bytes
from icce_ray.runtime.progress import format_bytes

NUM_CLUSTERS = 1000
"""K for a large collection."""
BATCH_PAIRS = 1024
"""B: `heads.batch_size: auto` for large collections."""
BACKBONE = "vit_large_patch14_dinov2.lvd142m"
DEPTH, WIDTH, NUM_TOKENS = 24, 1024, 257
"""The backbone's layers, width and tokens at 224 pixels: 16 x 16 patches and the class token."""
DIM = 2 * WIDTH
"""D: the class token and the mean of the patches."""
ROW_BYTES = 2 * DIM + 8 + 64 + 32
"""An embedding with its id and hash, and the hash once more."""
MEAN_NEIGHBORS = 200
URI_BYTES = 60


@dataclass(frozen=True)
class Rate:
    """A rate that times are computed from."""

    value: float
    unit: str
    kind: Literal["measured", "data sheet", "assumed"]
    """`measured` in this repository: the source names the result."""
    source: str


RATES = {
    "job": Rate(
        513.1,
        "images/s per CPU: listing, reading, hashing, embedding by `pixels`, writing",
        "measured",
        "`embed-memory`, 2026-11-21-embed-storage.txt: the larger run has 18,000 images of 64 pixels more, 2 CPUs",
    ),
    "consensus": Rate(
        780338.0,
        "labels/s: images times heads",
        "measured",
        "`consensus`, 2026-11-21-consensus.txt: 2 CPUs, shared with other work; used for any number of CPUs",
    ),
    "decode": Rate(125.0, "photos/s per CPU", "assumed", "8 ms to decode and resize a JPEG of some hundred kB"),
    "image": Rate(1e5, "bytes per image", "assumed", ""),
    "gpu": Rate(989e12, "FLOP/s in bfloat16", "data sheet", "H100 SXM, without sparsity"),
    "gpu_share": Rate(0.4, "of that", "assumed", "of products on GPUs that were not measured"),
    "heads_share": Rate(
        0.237,
        "of `gpu`: products of a training step, without the update",
        "measured",
        "`heads`, 2026-11-27-gpu.txt: one H200, every head sees all dimensions",
    ),
    "search_share": Rate(
        0.164,
        "of `gpu`: products of the search",
        "measured",
        "`neighbors-gpu`, 2026-11-27-gpu.txt: one H200 and 16 CPUs, 1,024 dimensions, merge included",
    ),
    "gpu_memory": Rate(3.35e12, "bytes/s", "data sheet", "H100 SXM"),
    "collective": Rate(25e-6, "s for a message between all GPUs of a machine", "assumed", ""),
    "cpu": Rate(48e9, "FLOP/s in float32 per CPU", "data sheet", "AVX2: 3 GHz x 2 x 16 FLOP, two CPUs per core"),
    "cpu_share": Rate(0.5, "of that", "assumed", "of all products on CPUs"),
    "network": Rate(12.5e9, "bytes/s per machine", "data sheet", "100 Gbit/s"),
    "network_share": Rate(0.5, "of that", "assumed", ""),
    "list": Rate(
        123801.0,
        "objects/s: ranges of keys, two tasks with a CPU each",
        "measured",
        "`listing-scale`, 2026-11-29-listing.txt: twice the keys of a second of CPU; one process on 2 busy CPUs listed "
        "37,581/s of pages that take 0.1 s",
    ),
}


@dataclass(frozen=True)
class Plan:
    """The machines that a config and a manifest under deploy/ describe."""

    config: str
    manifest: str
    max_images: int
    """The largest collection it is meant for."""
    machines: str
    num_machines: int
    gpus: int
    cpus: int
    """CPUs of all machines but the head."""
    embed_cpus: int
    """CPUs of the embedding workers; the others read and decode."""
    search_gpus: int
    """GPUs that search neighbours; 0 if CPUs do."""
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
    """Seconds and bytes for N images."""

    num_images: int
    plan: Plan
    seconds: dict[str, float]
    """By stage; the images are listed as single objects."""
    embed_bound: str
    """The bottleneck of the embedding: CPUs, GPUs or network."""
    storage_bytes: dict[str, int]
    memory_bytes: dict[str, int]


def size(num_images: int) -> Size:
    """The machines for `num_images`, and what they need."""
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
            "sample": sample_bytes(num_images, trained) / _network(),
            "neighbors": neighbors_seconds(trained, plan),
            "method": heads_seconds(trained),
            "consensus": trained * HeadsConfig().num_heads / _rate("consensus"),
            "classifier": classifier_seconds(),
            "assign": assign_seconds(num_images, plan),
        },
        bound,
        storage_bytes(num_images, trained),
        memory_bytes(trained, plan),
    )


def backbone_flop() -> float:
    """FLOP to embed an image: ``depth (24 w^2 T + 4 T^2 w)``, with width w and T tokens."""
    assert BackboneConfig().backbone == BACKBONE
    return DEPTH * (24.0 * WIDTH**2 * NUM_TOKENS + 4.0 * NUM_TOKENS**2 * WIDTH)


def embed_seconds(num_images: int, plan: Plan) -> dict[str, float]:
    """Seconds of CPUs, GPUs and network, which work at the same time: the longest counts."""
    cpu_s = 1 / _rate("job") + 1 / _rate("decode")
    return {
        "CPUs": num_images * cpu_s / (plan.cpus - plan.embed_cpus),
        "GPUs": num_images * backbone_flop() / (plan.gpus * _gpu()),
        "network": num_images * _rate("image") / (plan.num_machines * _network()),
    }


def neighbors_seconds(trained: int, plan: Plan) -> float:
    """Upper bound, all pairs: ``2 n^2 D`` FLOP. The audit is not counted."""
    flop = 2.0 * trained**2 * DIM
    return flop / (plan.search_gpus * _rate("gpu") * _rate("search_share") or plan.search_cpus * _cpu())


def head_parameters() -> int:
    """P = H (S M + M p + p K), with S input dimensions per head and widths M and p."""
    heads = HeadsConfig()
    hidden, bottleneck = heads.hidden_dim, heads.bottleneck_dim
    return heads.num_heads * (heads.num_inputs(DIM) * hidden + hidden * bottleneck + bottleneck * NUM_CLUSTERS)


def flop_per_pair() -> float:
    """``4 H (3 S M + 4 (M p + p K))``: two views, each forward through the teacher, and forward and backward through
    the student; the features themselves get no gradient."""
    heads = HeadsConfig()
    first = heads.num_inputs(DIM) * heads.hidden_dim * heads.num_heads
    return 4.0 * (3 * first + 4 * (head_parameters() - first))


def step_seconds(num_gpus: int = 1) -> float:
    """A training step: the products, then 40 P bytes read and written (student, teacher, gradient, two moments), both
    for the heads of the fullest GPU; then a message with the agreements of H heads on B pairs, of some kB."""
    products = BATCH_PAIRS * flop_per_pair() / (_rate("gpu") * _rate("heads_share"))
    update = 2 * 20.0 * head_parameters() / _rate("gpu_memory")
    num_heads = HeadsConfig().num_heads
    share = math.ceil(num_heads / num_gpus) / num_heads
    return share * (products + update) + (_rate("collective") if num_gpus > 1 else 0.0)


def heads_seconds(trained: int) -> float:
    """``epochs n / B`` steps on one GPU."""
    return HeadsConfig().num_epochs * math.ceil(trained / BATCH_PAIRS) * step_seconds()


def classifier_seconds() -> float:
    """On one GPU: ``4 g b D K`` FLOP per step for g learning rates and b images, and 24 g D K bytes of weights,
    gradients and momentum, read and written."""
    config = ClassifierConfig()
    weights = len(config.learning_rates) * DIM * NUM_CLUSTERS
    step = 4.0 * config.batch_size * weights / _gpu() + 24.0 * weights / _rate("gpu_memory")
    return MAX_STEPS * step


def assign_seconds(num_images: int, plan: Plan) -> float:
    """``2 N D (K + r)`` FLOP on CPUs for r directions of the outlier score, or the transfer of 2 N D bytes, whichever
    takes longer."""
    flop = 2.0 * num_images * DIM * (NUM_CLUSTERS + MAX_DIRECTIONS)
    return max(flop / (plan.assign_cpus * _cpu()), 2.0 * num_images * DIM / (plan.num_machines * _network()))


def sample_bytes(num_images: int, trained: int) -> int:
    """Bytes of the sample: its rows beside the parts, a tenth more than needed, and the copy that the head makes."""
    return 21 * trained * ROW_BYTES // 10 if trained < num_images else 0


def storage_bytes(num_images: int, trained: int) -> dict[str, int]:
    """Before compression. An embedding is D float16 values with its id and hash, and the hash once more in a file that
    is read without the embeddings."""
    return {
        "listing": num_images * (8 + URI_BYTES + 8 + 32),
        "embeddings": num_images * ROW_BYTES + sample_bytes(num_images, trained),
        "graph, at most": trained * (4 * 1000 + 8),
        "labels of heads": 4 * HeadsConfig().num_heads * trained,
        "assignments": num_images * (8 + URI_BYTES + 4 + 4 + 4 + 4 + 1 + 1),
    }


def memory_bytes(trained: int, plan: Plan) -> dict[str, int]:
    """What the stages check before they start, by their own functions where these need no machine, and the features on
    each disk."""
    here = plan.search_workers // plan.search_machines
    heads = HeadsConfig()
    head_clusters = np.full(heads.num_heads, NUM_CLUSTERS)
    figures = {
        "neighbors, a machine": needed_bytes(
            shard_bytes(trained, DIM), worker_bytes(trained, DIM, MEAN_NEIGHBORS), here, plan.search_workers
        ),
        "neighbors, a GPU": 6 * trained * DIM // plan.search_gpus if plan.search_gpus else 0,
        "method, the GPU": 4 * trained * DIM + 8 * heads.num_heads * trained + 20 * head_parameters(),
        "consensus, the head": coordinator_bytes(trained, head_clusters, NUM_CLUSTERS, ConsensusConfig().methods),
        "features on disk": 2 * trained * DIM,
    }
    return {name: value for name, value in figures.items() if value}


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


PAGE_IMAGES = {"1M": 10**6, "10M": 10**7, "100M": 10**8, "1B": 10**9}
PAGE = """\
# How much to start

What to start for 1 million to 1 billion images with the default settings: DINOv2 ViT-L/14 at 224 pixels (D = 2048), 50
heads, 1,000 clusters, 50 epochs, at most 2 million images to train on (`sample.max_images`).

**None of this has been run at these sizes.** The work is counted by the formulas below. The rates are listed at the
end, each with its source: five were measured in this repository, three of them on two shared CPUs and two on one H200
GPU; the others come from data sheets or are assumed. Take the times as orders of magnitude. `icce-ray estimate
run.yaml` embeds a sample on your own machines and tells you images/s, time, storage and memory. On a GPU,
`benchmarks/run.py embed`, `heads` and `neighbors-scale` measure the rates that are assumed here.

`python benchmarks/sizing.py` prints this page.

{start}

All machines with GPUs have H100s. The configs and manifests are in [`deploy`](../deploy).

## Time

N images, of which n = min(N, 2 million) are trained on; H heads, K clusters, B = 1024 pairs per step. A name in `code`
is a rate.

| stage | counted work | divided by |
| --- | --- | --- |
| images | N objects listed | `list` |
| embed, GPUs | N x depth x (24 w² T + 4 T² w) FLOP, with w = 1024, T = 257, depth 24 | GPUs x `gpu` x `gpu_share` |
| embed, CPUs | N x (1 / `job` + 1 / `decode`) seconds | CPUs not held by embedding workers |
| embed, network | N x `image` bytes | machines x `network` x `network_share` |
| sample | 2.1 n rows read and written, if n < N | `network` x `network_share` of the head |
| neighbors | at most 2 n² D FLOP: all pairs | GPUs that search x `gpu` x `search_share`, or CPUs |
| method | epochs x n / B steps of B x 4 H (3 S M + 4 (M p + p K)) FLOP and 40 P bytes | one GPU x `heads_share`, `gpu_memory` |
| consensus | H n labels | `consensus` |
| classifier | 12,500 steps of 4 g b D K FLOP and 24 g D K bytes, with g = 13 rates and b = 128 images | one GPU |
| assign | 2 N D (K + 128) FLOP, or 2 N D bytes if they take longer | CPUs, or the network |

S = D / 2 is the number of input dimensions per head, M = 512 and p = 256 are a head's widths, and P = H (S M + M p +
p K) is the number of parameters of all heads. The three parts of `embed` work at the same time, so the longest counts.

{times}

Consequences:

- **A billion single objects take hours to list**, once: what was listed is kept, also by a run that is killed. An S3
  Inventory as `images.uri` saves the listing. Better, put images into tar shards of about ten thousand each: 64 GPUs
  take 150,000 images per second, while S3 answers about 5,500 requests per second for each prefix, and neighbouring
  images of a shard are read in one request (1,000 images of 100 kB in 16, **measured**, `tar-reads`). To open shards of
  small images, their bytes are read once more, by tasks on all machines: {opening} for a billion, in place of the
  listing, at `network` x `network_share`.
- **A killed run goes on from records**: a resumed embedding reads 2.7% of its bytes in all (**measured**,
  `resume-scale`), and 16 tasks that list a bucket lose a page for each of their threads (`listing-scale`).
- **Decoding needs about 25 CPUs for each H100.** Machines with fewer CPUs wait for them, hence the machines that only
  decode. `embed.decoder: nvjpeg` moves JPEGs to the GPUs; its speed has not been measured.
- **Training takes the same time from 2 million images on**, and one GPU is enough. More GPUs divide the heads:

{gpus}

- **The config for 64 GPUs searches on CPUs**, so that the GPUs can be released in the meantime. With
  `resources.neighbors: {{num_workers: 8, gpus_per_worker: 1, cpus_per_worker: 16}}` the search takes a quarter of a
  minute instead.
- Not counted: starting machines, the audit of the neighbours, the report (36 s with a million images on two CPUs,
  **measured**, `report`), and Ray's own work for each of the work items
  of 512 images. Where the driver and all workers shared two busy CPUs, 36 items/s went through Ray Data, or 18,600
  images/s (`embed-driver`).

## Storage

Before compression, with URIs of 60 characters. An embedding takes 2 D bytes and 72 for its id and hash; a file of
hashes beside each part takes 32 bytes for each image. Above 2 million images the sample is stored again: as
its own artifact, and, with a tenth more, beside the parts, from where it is copied without reading them. The
graph has at most 1,000 neighbours of 4 bytes for each image that is trained on.

{storage}

The images themselves take N x `image` bytes.

## Memory

The sums that the stages check before they start.

{memory}

- **neighbors**: 4 (D + 1) n x 13/12 bytes divided among the workers, and the buffers of each worker; on GPUs 6 D n
  divided among the GPUs. Four machines with 1,000 GiB hold about 400 million images: that is what they are for, when
  `sample.max_images` is raised.
- **method**: 4 D n bytes of features, if that is at most half of the GPU's free memory, else they are read from disk;
  8 H n bytes of labels; 20 P bytes of parameters, gradients and moments. A step needs some GB on top, which is checked
  before training starts.
- **embed** holds a few parts for any N: the whole job peaked at 1.5 GB with 2,000 and with 20,000 images
  (**measured**, `embed-memory`). The weights of matrix products are held in bfloat16 where the products are: 0.6 GB for
  ViT-L/14. A GPU's batch size is found by trying. Batches do not cross work items, which are divided into equal ones:
  1% of failed images leaves 1% of the rows unused.
- **On disk**: each machine that trains or searches holds the features in one file (2 D n bytes, under `ICCE_CACHE`).
- **The index of contents** holds 32 bytes of memory per image and takes some 3 microseconds of a CPU for each
  (**measured**, `content-index`). Above 100 million images it is divided among several processes on different machines,
  each of which reads 8 bytes per image when a run is resumed.
- **The driver** holds no ids or hashes of the images. Embeddings are joined to parts of at most 65,536 rows or 64 MiB:
  60,000 parts for a billion images. The table of two million parts takes 0.5 s of CPU and 33 MB (**measured**,
  `manifest-scale`). The driver keeps 12 bytes for each image that failed, and
  8 bytes for each work item: 75.0 MB after 50,000 items on Ray Data, 75.4 after 100,000 (**measured**, `embed-driver`).
  It makes the tables of errors and duplicates from hashes that it reads once and sorts on its disk, 40 bytes an image: 1 GB of memory
  for 100 million images, 4 to 7 GB for a billion (1% errors, 10% duplicates; extrapolated from 4 and 8 million in two
  runs, `table-memory`).
- **evaluate** reads a label file some rows at a time. It compares 2 million images, and, of a file that names more, 1 to 2
  million: 2 GB however many there are (**measured** with 2 and 8 million names, `table-memory`).

## Rates

{rates}

The results named by file are in [`benchmarks/results`](../benchmarks/results).
"""  # noqa: E501


def page() -> str:
    """docs/sizing.md."""
    sizes = [size(num_images) for num_images in PAGE_IMAGES.values()]
    start = [
        ["start", *(found.plan.machines for found in sizes)],
        ["config", *(f"`{found.plan.config}`" for found in sizes)],
        ["GPUs", *(str(found.plan.gpus) for found in sizes)],
        ["CPUs", *(f"{found.plan.cpus:,}" for found in sizes)],
        ["time, all stages", *(_about(sum(found.seconds.values())) for found in sizes)],
        ["without the listing", *(_about(sum(found.seconds.values()) - found.seconds["images"]) for found in sizes)],
        ["storage", *(_size(sum(found.storage_bytes.values())) for found in sizes)],
    ]
    times = [[stage, *(_about(found.seconds[stage]) for found in sizes)] for stage in sizes[0].seconds]
    times.append(["the embedding waits for", *(found.embed_bound for found in sizes)])
    gpus = [1, 2, 4, 8]
    steps = [["ms per step", *(f"{1000 * step_seconds(number):.1f}" for number in gpus)]]
    rates = [
        [f"`{name}`", f"{_number(rate.value)} {rate.unit}", _kind(rate), rate.source] for name, rate in RATES.items()
    ]
    return PAGE.format(
        opening=_about(embed_seconds(10**9, sizes[-1].plan)["network"]),
        start=_markdown(["images", *PAGE_IMAGES], start),
        times=_markdown(["stage", *PAGE_IMAGES], times),
        gpus=_markdown(["GPUs that train", *map(str, gpus)], steps),
        storage=_markdown(["artifact", *PAGE_IMAGES], _bytes_rows([found.storage_bytes for found in sizes])),
        memory=_markdown(["memory or disk", *PAGE_IMAGES], _bytes_rows([found.memory_bytes for found in sizes])),
        rates=_markdown(["", "rate", "", "source"], rates),
    )


def _kind(rate: Rate) -> str:
    return "**measured**" if rate.kind == "measured" else rate.kind


def _bytes_rows(columns: list[dict[str, int]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [[name, *(_size(column[name]) if name in column else "" for column in columns)] for name in names]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
