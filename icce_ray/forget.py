"""``icce-ray forget RUN --uris LIST``: remove images from everything in an output.

The listings give the ids of the images; then only the parts that hold these ids are read and written again. Pages that
show images of these listings are removed as a whole; the next run makes them again. Last, the images become
placeholders in the listings, so that a takedown that was killed finds them again: the same command continues it. The
next run trains without them, and no listing takes them up again (:mod:`icce_ray.images.forgotten`).
"""

import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from icce_ray.config import load_config
from icce_ray.corrections.stage import KEPT_FOLDER
from icce_ray.errors import InputError
from icce_ray.forget_parts import Found, forget_in, put_placeholders, to_bytes, without_uris
from icce_ray.images.forgotten import add_forgotten, uri_hash
from icce_ray.images.uris import named_images
from icce_ray.pipeline.latest import ALL_IMAGES_NAME, ASSIGNMENTS_NAME
from icce_ray.pipeline.plan import connect_storage
from icce_ray.store import Claim, Folder
from icce_ray.store.artifact import MANIFEST_NAME
from icce_ray.store.cache import cache_folder
from icce_ray.store.run_records import (
    LATEST_FOLDER,
    RUNS_FOLDER,
    Artifacts,
    find_artifacts,
    inputs_of,
    read_records,
    with_inputs,
)

STAGES = ("embed", "sample", "corrections", "assign", "evaluate")
"""The artifacts that hold ids with URIs or features. Others hold ids at most."""
PAGES = ("report",)


@dataclass(frozen=True)
class Takedown:
    """The result of a takedown."""

    num_images: int
    """Images of the list that a listing in the output has or had."""
    num_unknown: int
    """URIs of the list that no listing has."""
    num_same_content: int
    """Other images with the bytes of one of them: they are still there."""
    num_parts: int
    """Files that were written again."""
    pages: tuple[str, ...]
    """Pages that were removed."""

    def lines(self) -> list[str]:
        lines = [f"{self.num_images:,} images forgotten; {self.num_parts:,} files written again"]
        if self.num_unknown:
            lines.append(f"{self.num_unknown:,} URIs of the list are in no listing; none will take them up")
        if self.num_same_content:
            lines.append(
                f"{self.num_same_content:,} other images have the same bytes as one of them, and are still there"
            )
        lines += [f"removed {page}: the next run makes it again" for page in self.pages]
        lines.append("The models were trained with these images; run again to train without them.")
        return lines


def forget_images(run: str, uris: str, *, quiet: bool = False) -> Takedown:
    """Remove images from all artifacts of an output, and from this machine's cache. The output is given by the config
    or the record (``runs/*.json``) of any run in it, or as such; the images by a .txt or .parquet list (column `uri`),
    as the listing names them. Raises InputError: no such output or list, or images that come from ready-made
    embeddings; BusyError: a job is writing an artifact."""
    output = _output_of(run)
    root, wanted = Folder.at(output), {uri_hash(uri): uri for uri in named_images(uris, "uri")}
    artifacts = find_artifacts(root)
    if not any(key.startswith("images/") for key in artifacts):
        raise InputError(f"{output}: no listing of images there; give a run's config, output folder or record")
    for key in [key for key, artifact in artifacts.items() if artifact is None]:
        with Claim(root / key):
            (root / key).clear()  # nothing continues it once the listings have changed
    add_forgotten(output, wanted)
    listings = {key: one for key, one in artifacts.items() if one is not None and one.manifest.stage == "images"}
    found = {key: Found.of(listing, wanted) for key, listing in listings.items()}
    found = {key: one for key, one in found.items() if len(one.image_ids)}
    for key in found:
        if listings[key].manifest.config["embeddings"]["uri"] is not None:
            raise InputError(f"{key}: these images come from ready-made embeddings; remove their rows there, then run")
    pages, same_content, num_parts = list[str](), set[int](), 0
    for key, artifact in artifacts.items():
        if artifact is None:
            continue
        own = _listing_of(key, artifacts)
        is_page = artifact.manifest.stage in PAGES and not found.keys().isdisjoint(with_inputs({key}, artifacts))
        if not is_page and (artifact.manifest.stage not in STAGES or own not in found):
            continue
        shutil.rmtree(cache_folder() / artifact.manifest.stage / artifact.fingerprint, ignore_errors=True)
        if not quiet:
            print(f"forget: {key}", file=sys.stderr, flush=True)
        with Claim(artifact.folder):
            if is_page:
                pages.append(artifact.folder.uri)
                artifact.folder.remove(MANIFEST_NAME)
            else:
                same, num_written = forget_in(artifact, found[own])
                same_content, num_parts = same_content | same, num_parts + num_written
        if is_page:
            artifact.folder.clear()
    _forget_in_corrections(root / KEPT_FOLDER, set(wanted.values()))
    _forget_in_latest(root, set(wanted.values()), bool(pages))
    for key in found:
        with Claim(listings[key].folder):
            num_parts += put_placeholders(listings[key], wanted)
    num_found = len({uri for one in found.values() for uri in one.hashes})
    return Takedown(num_found, len(wanted) - num_found, len(same_content), num_parts, tuple(pages))


def _listing_of(key: str, artifacts: Artifacts) -> str:
    """The listing that an artifact's ids belong to, "" if there is none: the nearest of its inputs. Assignments of new
    images are also made from a model, whose images another listing has."""
    keys = [key]
    while keys:
        for one in keys:
            if one.startswith("images/"):
                return one
        keys = [one for key in keys if (artifact := artifacts.get(key)) is not None for one in inputs_of(artifact)]
    return ""


def _forget_in_corrections(folder: Folder, uris: Collection[str]) -> None:
    for name in folder.names():
        data = folder.read_bytes(name)
        kept = without_uris(data, lambda uri: uri in uris)
        if kept != data:
            folder.write_bytes(name, kept)


def _forget_in_latest(root: Folder, uris: Collection[str], without_page: bool) -> None:
    """Copies that a run left for people; links that lead to a page that is gone."""
    latest, names = root / LATEST_FOLDER, pa.array(sorted(uris), pa.string())
    if root.local_path is not None:
        for link in (root.local_path / RUNS_FOLDER).glob("*/*"):
            if link.is_symlink() and not link.exists():
                link.unlink()
    if root.local_path is None or not (root.local_path / LATEST_FOLDER).is_symlink():
        for name in list(latest.sizes()):
            if name.startswith("report/") and without_page:
                latest.remove(name)
            elif name == ASSIGNMENTS_NAME or name.startswith(ALL_IMAGES_NAME):
                table = pq.read_table(pa.BufferReader(latest.read_bytes(name)))
                kept = table.filter(pc.invert(pc.is_in(table["uri"], names)))
                if len(kept) < len(table):
                    latest.write_bytes(name, to_bytes(kept))


def _output_of(run: str) -> str:
    if run.endswith((".yaml", ".yml")):
        config = load_config(run)
        connect_storage(config)
        return config.output
    if run.endswith(".json"):
        return run.rpartition(f"{RUNS_FOLDER}/")[0].rstrip("/") or "."
    if not read_records(run):
        raise InputError(f"{run}: no runs there; give a run's config, output folder or record")
    return run
