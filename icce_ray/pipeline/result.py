"""The result of a run: its figures, the places of its files, and the closing summary."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from icce_ray.config import Config
from icce_ray.count.stage import CLUSTER_COUNT
from icce_ray.embed.stage import num_failed
from icce_ray.images.stage import num_listed
from icce_ray.pipeline.latest import ASSIGNMENTS_NAME
from icce_ray.pipeline.numbers_kept import changes_line
from icce_ray.runtime.progress import format_seconds
from icce_ray.store import Artifact

HEADLINE_METRICS = ("acc", "nmi", "ari")


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    run: str
    """Name of the run, a hash of everything that determines it."""
    num_images: int
    """Number of images in the listing."""
    num_errors: int
    """Number of images that could not be used; the table `errors` has the reasons."""
    num_clusters: int
    """Number of clusters (K)."""
    anmi: float
    """Average NMI (geometric mean) of the consensus with the clusterings, 0 to 1."""
    assignments: str
    """Folder of Parquet files with a row per image."""
    report: str
    """HTML page."""
    errors: str
    """Parquet table: image_id, uri, reason."""
    metrics: dict[str, float]
    """estimated_accuracy, made without labels; acc, nmi, ari and others if labels were given."""
    seconds: dict[str, float]
    """Seconds spent by this run on each stage; 0 for stages that were finished before."""
    finished_before: tuple[str, ...]
    """Stages that an earlier run had finished."""
    model: str = ""
    """Folder of the model that labels new images, see `icce_ray.load`."""
    num_noise: int = 0
    """Number of images that the method left without a cluster (cluster -1)."""
    num_clusters_range: tuple[int, int] | None = None
    """With ``num_clusters: auto``: the smallest and the largest number that are as good as the chosen one."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sum_up(
    config: Config,
    name: str,
    artifacts: Mapping[str, Artifact],
    seconds: Mapping[str, float],
    finished_before: tuple[str, ...],
) -> Result:
    """The result of a finished run, from its artifacts."""
    corrections, counted = artifacts.get("corrections"), artifacts.get(CLUSTER_COUNT.name)
    low, high = (0, 0) if counted is None else counted.metrics["num_clusters_range"]
    return Result(
        run=name,
        num_images=num_listed(artifacts["images"]),
        num_errors=num_failed(artifacts["embed"]),
        num_clusters=corrections.metrics["num_clusters"] if corrections is not None else config.num_clusters,
        anmi=artifacts["consensus"].metrics["anmi"],
        assignments=artifacts["assign"].folder.file_uri("assignments"),
        report=artifacts["report"].folder.file_uri("report.html"),
        errors=artifacts["embed"].folder.file_uri("errors.parquet"),
        num_noise=artifacts["assign"].metrics.get("num_noise", 0),
        num_clusters_range=None if counted is None else (low, high),
        model=artifacts["classifier"].folder.uri if "classifier" in artifacts else "",
        metrics=artifacts["evaluate"].metrics,
        seconds=dict(seconds),
        finished_before=finished_before,
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def summary(result: Result, artifacts: Mapping[str, Artifact], places: Mapping[str, str], total_s: float) -> str:
    """The closing lines of a run. `places` are those in ``latest``, by name."""
    scores = f"ANMI {result.anmi:.3f}"
    if "estimated_accuracy" in result.metrics:
        scores += f", estimated accuracy {result.metrics['estimated_accuracy']:.0%} (without labels)"
    for key in HEADLINE_METRICS:
        if key in result.metrics:
            scores += f", {key.upper()} {result.metrics[key]:.3f}"
    lines = [
        "",
        f"{_counted(result.num_images, 'image')}, {_counted(result.num_errors, 'error')}, "
        f"{_counted(result.num_clusters, 'cluster')}; {scores}",
        f"run          {result.run}, {format_seconds(total_s)}",
    ]
    if CLUSTER_COUNT.name in artifacts:
        lines.insert(2, f"num_clusters {artifacts[CLUSTER_COUNT.name].metrics['choice']}")
    if (changes := artifacts["consensus"].metrics.get("numbers")) is not None:
        lines.insert(2, f"clusters     {changes_line(changes)}")
    for stage, seconds in result.seconds.items():
        took = f"finished before (took {artifacts[stage].manifest.seconds:.1f} s)"
        spent = took if stage in result.finished_before and not seconds else f"{seconds:.1f} s"
        lines.append(f"  {stage:<13} {spent}")
    if result.num_noise:
        lines.append(f"noise        {_counted(result.num_noise, 'image')} without a cluster (cluster -1)")
    if result.num_errors:
        lines.append(f"errors       {result.errors}")
    if num_duplicates := artifacts["embed"].metrics.get("num_duplicates"):
        place = artifacts["embed"].folder.file_uri("duplicates.parquet")
        lines.append(f"duplicates   {place} ({_counted(num_duplicates, 'image')} with the bytes of another)")
    report = f"{places['report']}/report.html" if "report" in places else result.report
    lines += [
        f"assignments  {places.get(ASSIGNMENTS_NAME, result.assignments)}",
        f"model        {places.get('model', result.model)}",
        f"report       {report}",
    ]
    return "\n".join(lines)
