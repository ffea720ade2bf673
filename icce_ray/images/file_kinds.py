"""Which files are images or containers of images, by their endings; and what lies among them and is not taken: counted
by ending, and said with the remedy."""

from collections import Counter

from icce_ray.images.file_shards import File
from icce_ray.images.folder_walk import UNREADABLE_FOLDER
from icce_ray.images.image_formats import HEIC_REMEDY, IMAGE_ENDINGS, RAW_REMEDY
from icce_ray.images.parquet_columns import PARQUET_ENDINGS
from icce_ray.images.uris import PARQUET_MEMBER, TAR_MEMBER

MAX_SHOWN = 6
COMPRESSED_TARS = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
ARCHIVES = (*COMPRESSED_TARS, ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar")
HEIC_ENDINGS = (".heic", ".heif", ".hif")
RAW_ENDINGS = (".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw")
OTHER_IMAGES = (".dcm", ".dds", ".exr", ".fits", ".hdr", ".ico", ".jxl", ".nii", ".psd", ".tga")
DRAWINGS = (".ai", ".eps", ".pdf", ".svg")
VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")
PLACE_LIKE = "name that reads like a place in a container"
REMEDIES = (
    (HEIC_ENDINGS, HEIC_REMEDY),
    (RAW_ENDINGS, RAW_REMEDY),
    (ARCHIVES, "unpack it, or repack it as a plain .tar"),
    (OTHER_IMAGES, "not supported; convert to PNG or TIFF"),
    ((".avif",), "this Pillow cannot decode AVIF; install a newer one"),
    ((".parquet without images",), "name it in images.uri if it is a list, or images.bytes_column"),
    (DRAWINGS, "not supported; render to PNG"),
    (VIDEOS, "not supported; extract frames"),
    ((PLACE_LIKE,), "rename it"),
)


def ending(name: str) -> str:
    """The ending of a file's name in lower case, ``.tar.gz`` as a whole; empty if there is none."""
    base = name.rpartition("/")[2].lower()
    if base.endswith(COMPRESSED_TARS):
        return next(compressed for compressed in COMPRESSED_TARS if base.endswith(compressed))
    stem, dot, last = base.rpartition(".")
    return f".{last}" if dot and stem else ""


def remedy(kind: str) -> str | None:
    """What to do about files with this ending, or None if nothing is known."""
    return next((text for endings, text in REMEDIES if kind in endings), None)


def describe(skipped: Counter[str]) -> str:
    """``3 x .heic (HEIC: not supported; ...), 2 x .csv``: those with a remedy first, then the most frequent."""
    kinds = sorted(skipped, key=lambda kind: (remedy(kind) is None, -skipped[kind], kind))
    shown = [f"{skipped[kind]} x {kind}" + (f" ({text})" if (text := remedy(kind)) else "") for kind in kinds]
    more = [f"{len(kinds) - MAX_SHOWN} other kinds"] if len(kinds) > MAX_SHOWN else []
    return ", ".join(shown[:MAX_SHOWN] + more)


TAR_ENDING = ".tar"


def take_file(file: File, others: Counter[str], tables: list[File]) -> File | None:
    """An image or a tar shard, as it is listed. Parquet files are put into `tables`, what is left is counted."""
    kind = ending(file.uri)
    if file.problem is not None:
        others[file.problem] += 1
        # A broken link without an ending may have led to a folder of images.
        is_listed = kind in (*IMAGE_ENDINGS, TAR_ENDING, "") or file.problem.startswith(UNREADABLE_FOLDER)
        return file if is_listed else None
    if "#" in file.uri and (TAR_MEMBER.match(file.uri) or PARQUET_MEMBER.match(file.uri)):
        others[PLACE_LIKE] += 1  # on remote storage; local ones are percent-encoded
        return None
    if kind in IMAGE_ENDINGS:
        return file
    if kind == TAR_ENDING:
        return file._replace(is_container=True)
    if kind in PARQUET_ENDINGS:
        tables.append(file)
    else:
        others[kind or "no ending"] += 1
    return None
