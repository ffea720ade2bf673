"""Which files are images or containers of images, by their endings."""

from __future__ import annotations

from collections import Counter

from PIL import features

from icce_ray.images.file_shards import File
from icce_ray.images.folder_walk import UNREADABLE_FOLDER
from icce_ray.images.skipped_files import ending

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".pbm", ".pgm", ".ppm", ".pnm"),
    *((".avif",) if features.check("avif") else ()),
)
TAR_ENDING = ".tar"
PARQUET_ENDINGS = (".parquet", ".pq")


def take_file(file: File, others: Counter[str], tables: list[File]) -> File | None:
    """An image or a tar shard, as it is listed. Parquet files are put into `tables`, what is left is counted."""
    kind = ending(file.uri)
    if file.problem is not None:
        others[file.problem] += 1
        # A broken link without an ending may have led to a folder of images.
        is_listed = kind in (*IMAGE_ENDINGS, TAR_ENDING, "") or file.problem.startswith(UNREADABLE_FOLDER)
        return file if is_listed else None
    if kind in IMAGE_ENDINGS:
        return file
    if kind == TAR_ENDING:
        return file._replace(is_container=True)
    if kind in PARQUET_ENDINGS:
        tables.append(file)
    else:
        others[kind or "no ending"] += 1
    return None
