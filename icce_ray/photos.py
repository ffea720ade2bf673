"""``icce-ray cluster PHOTOS``: cluster a folder of photos without a config.

It runs the pipeline with settings that suit this machine, and writes them to ``run.yaml`` in the output as a start for
the next step.
"""

import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from icce_ray.config import Config, apply_override, load_config, without_secrets
from icce_ray.config.schema import AUTO
from icce_ray.embed.stage import SMALL_BACKBONE
from icce_ray.errors import InputError
from icce_ray.images.image_files import not_found
from icce_ray.images.uris import is_remote
from icce_ray.methods import METHODS
from icce_ray.pipeline.result import Result
from icce_ray.runtime.machine import num_gpus
from icce_ray.store import Folder
from icce_ray.store.run_records import LATEST_FOLDER

CONFIG_NAME = "run.yaml"
SMALL_NUM_HEADS = 16
HEADER = """\
# Written by `icce-ray cluster`, which writes it anew each time: edit a copy. The same run again:
#
#   icce-ray run {place}
"""


def cluster_photos(
    photos: str,
    *,
    num_clusters: str = AUTO,
    output: str | None = None,
    overrides: Sequence[str] = (),
    open_page: bool = True,
    quiet: bool = False,
) -> Result:
    """Cluster the images of a place with the settings of :func:`photo_settings` and the overrides, such as
    ``embed.backbone=pixels``. Results go to `output`, or ``<photos>-clusters`` beside the photos. `open_page`: show the
    page in a browser if this machine has a screen. Raises UserError: as :func:`icce_ray.run_pipeline`."""
    from icce_ray.pipeline.run import run_pipeline

    settings = photo_settings(photos, num_clusters=num_clusters, output=output, has_gpu=num_gpus() > 0)
    config = load_config(None, list(overrides), base=settings, source="icce-ray cluster")
    # Before anything is written: a folder beside it would only be taken for the one that was meant.
    if not is_remote(photos) and not os.path.exists(photos):
        raise not_found(photos, os.path.abspath(photos), is_local=True)
    place = _write_config(config, settings, overrides)
    result = run_pipeline(config, quiet=quiet)
    if not quiet:
        print(f"config       {place}", file=sys.stderr, flush=True)
    page = Folder.at(config.output) / LATEST_FOLDER / "report"
    if open_page and page.local_path is not None and has_screen():
        webbrowser.open((page.local_path / "report.html").as_uri())
    return result


def photo_settings(photos: str, *, num_clusters: str, output: str | None, has_gpu: bool) -> dict[str, Any]:
    """The settings of ``icce-ray cluster``: with a GPU the defaults on it, else a small backbone and few heads. Raises
    InputError: `output` is None, and nothing can lie beside the photos."""
    place = photos.rstrip("/") if is_remote(photos) else os.path.abspath(photos)
    given = Path(output).absolute() if output is not None and not is_remote(output) else output
    settings: dict[str, Any] = {
        "images": {"uri": place},
        "num_clusters": int(num_clusters) if num_clusters.isdecimal() else num_clusters,
        "output": str(given) if given is not None else _place_beside(place),
    }
    if has_gpu:
        on_gpu = {"gpus_per_worker": 1}
        return settings | {"resources": {stage: dict(on_gpu) for stage in ("embed", "neighbors", "method")}}
    return settings | {"embed": {"backbone": SMALL_BACKBONE}, "heads": {"num_heads": SMALL_NUM_HEADS}}


def has_screen() -> bool:
    """Whether a browser that is started here would be seen."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _place_beside(photos: str) -> str:
    above, _, name = photos.rpartition("/")
    if not name or above.endswith("/"):  # the root of a disk, or a whole bucket
        raise InputError(f"{photos}: nothing can lie beside it; say where the results go: --output PLACE")
    return f"{above}/{os.path.splitext(name)[0]}-clusters"


def _write_config(config: Config, settings: dict[str, Any], overrides: Sequence[str]) -> str:
    """Write the settings, without secrets and without those of a method that is not used."""
    data = dict(settings)
    for override in overrides:
        apply_override(data, override)
    if all(METHODS[method].section != "heads" for method in config.methods):
        data.pop("heads", None)
    output = Folder.at(config.output)
    place = output.file_uri(CONFIG_NAME)
    text = HEADER.format(place=place) + yaml.safe_dump(without_secrets(data), sort_keys=False)
    try:
        output.write_bytes(CONFIG_NAME, text.encode())
    except OSError as error:
        raise InputError(f"output: {config.output!r} cannot be written to: {error}") from None
    return place
