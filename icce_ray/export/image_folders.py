"""A folder for each cluster with its images, linked to or copied, and ``manifest.csv``: file, then all columns of the
assignments."""

import csv
import io
import os
from collections.abc import Callable

from icce_ray.export.export_run import ExportTask, Written
from icce_ray.export.selected_images import (
    Row,
    SelectedImages,
    extension,
    file_name,
    is_local_file,
    map_rows,
    safe_name,
)
from icce_ray.images.read_images import read_image
from icce_ray.store import Folder


class NotReadError(Exception):
    """An image that cannot be read, and why."""


def write(source: SelectedImages, task: ExportTask) -> Written:
    digits = len(str(source.num_clusters - 1))

    def folder_of(row: Row) -> str:
        cluster = row["cluster"]
        name = safe_name(source.names.get(cluster, ""))
        return "noise" if cluster < 0 else f"cluster-{cluster:0{digits}d}{name and f'-{name}'}"

    place = placer(task.output, folder_of, link=not task.copy)
    num_images, num_wanted, problems = 0, source.count(), list[str]()
    with task.output.writing("manifest.csv") as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        manifest = csv.DictWriter(text, ["file", *source.schema.names])
        manifest.writeheader()
        for row, name in map_rows(place, source.rows()):
            if isinstance(name, NotReadError):
                problems.append(f"{row['uri']}: {name}")
            else:
                manifest.writerow({"file": name, **row})
                num_images += 1
            task.progress.update(num_images + len(problems), num_wanted, num_errors=len(problems))
        text.detach()
    return Written(num_images, len(problems), problems[0] if problems else "")


def placer(output: Folder, folder_of: Callable[[Row], str], *, link: bool) -> Callable[[Row], str | NotReadError]:
    """A function that puts an image into its folder in `output` and returns its name there. Existing files are kept.
    `link`: link to files on this machine, if the output is there too; all others are copied."""
    there = {name.rpartition(".")[0]: name for name in output.sizes()}

    def place(row: Row) -> str | NotReadError:
        uri = row["uri"]
        name = f"{folder_of(row)}/{file_name(row)}"
        if name in there:
            return there[name]
        if link and is_local_file(uri) and output.local_path is not None:
            if not os.path.isfile(uri):
                return NotReadError("missing")
            name += f".{extension(uri)}"
            path = output.local_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a link that leads nowhere
            path.symlink_to(uri)
            return name
        data = read_image(uri)
        if isinstance(data, str):
            return NotReadError(data)
        name += f".{extension(uri, data)}"
        output.write_bytes(name, data)
        return name

    return place
