"""The ``evaluate`` stage: scores without labels, and against true labels. No other stage is told where these are."""

from icce_ray.config import Config
from icce_ray.runtime.machine import check_umap
from icce_ray.stage import Settings, Stage
from icce_ray.store.filesystem import open_uri


def _settings(config: Config) -> Settings:
    labels = config.evaluate.labels
    identity = None
    if labels not in (None, "folder", "cls"):
        filesystem, path = open_uri(str(labels))
        info = filesystem.get_file_info(path)
        identity = {"num_bytes": info.size, "modified_ns": info.mtime_ns}
    return {"evaluate": config.evaluate.model_dump(), "file": identity, "seed": config.seed}


def _check(config: Config) -> None:
    if config.evaluate.silhouette_umap:
        check_umap("evaluate.silhouette_umap: true")
    if config.evaluate.labels is not None:
        from icce_ray.evaluate.labels import check_labels

        check_labels(config.evaluate)


EVALUATE = Stage(
    "evaluate",
    "icce_ray.evaluate.run_scores",
    5,
    ("images", "embed", "sample", "method", "consensus", "corrections", "assign"),
    _settings,
    "heads",
    check=_check,
    sees_labels=True,
)
