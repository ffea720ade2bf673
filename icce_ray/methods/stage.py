"""The ``method`` stage: clusterings of the images by the method that the config names."""

from importlib import import_module

from icce_ray.config import AUTO, Config
from icce_ray.methods import METHODS
from icce_ray.stage import Settings, Stage


def method_stage(name: str, *, chooses_number: bool = False) -> Stage:
    """The stage that runs the method `name`. Methods with the same section and settings share their artifacts, unless
    their result depends on the name. `chooses_number`: whether the method finds the number of clusters of the run."""
    method = METHODS[name]

    def settings(config: Config) -> Settings:
        own = getattr(config, method.section).model_dump(exclude=set(method.free_settings))
        found = method.finds_num_clusters(getattr(config, method.section))
        asked = {"num_clusters": AUTO if found else config.num_clusters, "seed": config.seed, method.section: own}
        return asked | ({"method": name} if method.depends_on_name else {})

    def check(config: Config) -> None:
        if method.has_check:
            import_module(method.job).check(config)

    inputs = ("embed", "sample", "neighbors") if method.needs_graph else ("embed", "sample")
    return Stage(
        "method",
        method.job,
        method.version,
        inputs,
        settings,
        method.unit,
        check,
        chooses_number=chooses_number,
        shortcut=_fewer_heads if method.section == "heads" else None,
    )


def _fewer_heads(config: Config) -> str:
    given = config.heads
    hints = [
        f"fewer heads (heads.num_heads, now {given.num_heads})",
        f"fewer epochs (heads.num_epochs, now {given.num_epochs})",
    ]
    gpu = "a GPU (resources.method.gpus_per_worker=1)"
    return ", ".join(hints if config.resources.method.gpus_per_worker else [*hints, gpu])
