"""``icce-ray forget RUN --uris LIST``: remove images from everything in an output.

The listings give the ids of the images; then only the parts that hold these ids are read and written again. Pages that
show images of these listings are removed as a whole; the next run makes them again. Last, the images become
placeholders in the listings, so that a takedown that was killed finds them again: the same command continues it. The
next run trains without them, and no listing takes them up again (:mod:`icce_ray.images.forgotten`).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from icce_ray.config import load_config
from icce_ray.corrections.stage import APPLIED_NAME, KEPT_FOLDER
from icce_ray.embed.embedding_parts import ERRORS_NAME
from icce_ray.embed.finished_parts import DUPLICATES_NAME
from icce_ray.embed.part_hashes import hashes_name
from icce_ray.errors import InputError
from icce_ray.images.forgotten import add_forgotten, placeholder, uri_hash
from icce_ray.images.listing import LISTING_PREFIX, REMOVED
from icce_ray.images.uri_lists import named_images
from icce_ray.pipeline.all_images import ALL_IMAGES_NAME
from icce_ray.pipeline.latest import ASSIGNMENTS_NAME
from icce_ray.pipeline.plan import connect_storage
from icce_ray.store import Artifact, ArtifactWriter, Claim, Folder, Part
from icce_ray.store.artifact import MANIFEST_NAME
from icce_ray.store.cache import cache_folder
from icce_ray.store.output_artifacts import Artifacts, find_artifacts, inputs_of, with_inputs
from icce_ray.store.run_records import LATEST_FOLDER, RUNS_FOLDER, read_records

STAGES = ("embed", "sample", "corrections", "assign", "evaluate")
"""The artifacts that hold ids with URIs or features. Others hold ids at most."""
PAGES = ("report",)
SERIES = re.compile(r"(.*part-)[^/]*\.parquet")
"""Parts whose rows ascend by image id, from part to part."""
ID_COLUMNS = ("image_id", "duplicate_of", "leader")

Ids = npt.NDArray[np.int64]


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forget_images(run: str, uris: str, *, quiet: bool = False) -> Takedown:
    """Remove images from all artifacts of an output, and from this machine's cache. Raises InputError: no such output
    or list, or images that come from ready-made embeddings; BusyError: a job is writing an artifact.

    Args:
        run: any run in the output: its config, its record (``runs/*.json``), or the output itself.
        uris: a .txt or .parquet list (column `uri`) of the images, as the listing names them.
    """
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
    found = {key: _Found.of(listing, wanted) for key, listing in listings.items()}
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
                same, num_written = _forget_in(artifact, found[own])
                same_content, num_parts = same_content | same, num_parts + num_written
        if is_page:
            artifact.folder.clear()
    _forget_in_corrections(root / KEPT_FOLDER, set(wanted.values()))
    _forget_in_latest(root, set(wanted.values()), bool(pages))
    for key in found:
        with Claim(listings[key].folder):
            num_parts += _forget_in_listing(listings[key], wanted)
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


@dataclass(frozen=True)
class _Found:
    """The images of the list that are in one listing."""

    image_ids: Ids
    """Ascending."""
    hashes: tuple[bytes, ...]

    @classmethod
    def of(cls, listing: Artifact, wanted: dict[bytes, str]) -> _Found:
        names = pa.array([*wanted.values(), *map(placeholder, wanted)], pa.string())
        digests = [*wanted, *wanted]
        ids, hashes = list[int](), list[bytes]()
        for name in listing.part_names(LISTING_PREFIX):
            table = _read(listing, name)
            places = pc.index_in(table["uri"], value_set=names)
            rows = places.is_valid()
            ids += table["image_id"].filter(rows).to_pylist()
            hashes += [digests[place] for place in places.drop_null().to_pylist()]
        return cls(np.array(ids, np.int64), tuple(hashes))


def _amend(artifact: Artifact, parts: dict[str, Part], metrics: dict[str, Any], *, revision: int) -> int:
    """Replace parts of an artifact. Returns their number."""
    if parts:
        writer = ArtifactWriter(artifact.folder, amends=True)
        for name in artifact.part_names():
            writer.add(parts.get(name) or artifact.part(name))
        writer.amend(artifact, artifact.metrics | metrics, revision=revision)
    return len(parts)


def _forget_in(artifact: Artifact, found: _Found) -> tuple[set[int], int]:
    """Remove the images from the parts that hold them. Returns the ids of other images with the same bytes, and the
    number of parts."""
    names, parts, same = artifact.part_names(), dict[str, Part](), set[int]()
    series = defaultdict(list)
    for name in names:
        if match := SERIES.fullmatch(name):
            series[match[1]].append(name)
    in_series = {name for group in series.values() for name in group}
    concerned = [name for group in series.values() for name in _parts_with(artifact, group, found.image_ids)]
    concerned += [name for name in names if name.endswith(".parquet") and name not in in_series]
    metrics: dict[str, Any] = {}
    for name in concerned:
        table = _read(artifact, name)
        if name == DUPLICATES_NAME:
            same |= _same_content(table, found.image_ids)
        kept = _without(table, found)
        if name == ERRORS_NAME and artifact.manifest.stage == "embed":
            kept = _with_removed(kept, found)
            total = artifact.metrics["num_images"] + artifact.metrics["num_errors"]
            metrics = {"num_images": total - len(kept), "num_errors": len(kept)}
        if part := _replace(artifact, name, table, kept):
            parts[name] = part
            artifact.folder_of(part).remove(hashes_name(name))  # made again when it is needed
    if APPLIED_NAME in names:
        data = artifact.folder.read_bytes(APPLIED_NAME)
        kept_data = _without_uris(data, lambda uri: uri_hash(uri) in found.hashes)
        if kept_data != data:
            parts[APPLIED_NAME] = ArtifactWriter(artifact.folder, amends=True).write_bytes(APPLIED_NAME, kept_data)
    return same, _amend(artifact, parts, metrics, revision=artifact.manifest.revision)


def _parts_with(artifact: Artifact, names: list[str], image_ids: Ids) -> list[str]:
    """The parts of a series that may hold any of the ids. Only the footers of a few parts are read for each."""

    @cache
    def ends(place: int) -> tuple[float, float]:
        """First and last id; an empty part counts as the start of the next."""
        part = artifact.part(names[place])
        folder = artifact.folder_of(part)
        with folder.filesystem.open_input_file(f"{folder.path}/{part.name}") as file:
            footer = pq.read_metadata(file)
        if not footer.num_rows:
            return (ends(place + 1)[0], -np.inf) if place + 1 < len(names) else (np.inf, -np.inf)
        column = footer.schema.names.index("image_id")
        groups = [footer.row_group(group).column(column).statistics for group in range(footer.num_row_groups)]
        return groups[0].min, groups[-1].max

    places = set[int]()
    for image_id in image_ids.tolist():
        place = bisect_right(range(len(names)), image_id, key=lambda place: ends(place)[0]) - 1
        places.add(place)
        if place < 0 or ends(place)[1] < image_id:
            # It failed, or an interrupted takedown removed it, perhaps from the start of the next part.
            places.add(place + 1)
    return [names[place] for place in sorted(places) if 0 <= place < len(names)]


def _without(table: pa.Table, found: _Found) -> pa.Table:
    """The rows that name none of the images."""
    ids, is_named = pa.array(found.image_ids), pa.array(np.zeros(len(table), dtype=bool))
    for column in ID_COLUMNS:
        if column in table.column_names:
            is_named = pc.or_(is_named, pc.is_in(table[column], ids).combine_chunks())
    if "uri" in table.column_names and "image_id" not in table.column_names:
        hashes = set(found.hashes)
        is_named = pa.array([uri_hash(uri or "") in hashes for uri in table["uri"].to_pylist()], pa.bool_())
    return table.filter(pc.invert(is_named))


def _with_removed(errors: pa.Table, found: _Found) -> pa.Table:
    """The errors with the images as removed ones, so that every id is an embedding or an error."""
    removed = pa.table(
        [pa.array(found.image_ids), pa.array(map(placeholder, found.hashes)), pa.repeat(REMOVED, len(found.hashes))],
        schema=errors.schema,
    )
    return pa.concat_tables([errors, removed]).sort_by("image_id")


def _same_content(duplicates: pa.Table, image_ids: Ids) -> set[int]:
    ids = pa.array(image_ids)
    pair = [duplicates["image_id"], duplicates["duplicate_of"]]
    touched = duplicates.filter(pc.or_(*(pc.is_in(column, ids) for column in pair)))
    named = {*touched["image_id"].to_pylist(), *touched["duplicate_of"].to_pylist()}
    return named - set(image_ids.tolist())


def _forget_in_listing(listing: Artifact, wanted: dict[bytes, str]) -> int:
    """Placeholders instead of the images, which counts as another revision of the listing: the next run trains anew.
    Returns the number of parts."""
    names, parts = pa.array(list(wanted.values()), pa.string()), dict[str, Part]()
    stands_in = pa.array(map(placeholder, wanted), pa.string())
    num_removed = 0
    for name in listing.part_names(LISTING_PREFIX):
        table = _read(listing, name)
        places = pc.index_in(table["uri"], value_set=names)
        is_named = places.is_valid()
        columns = {
            "uri": pc.if_else(is_named, stands_in.take(pc.fill_null(places, 0)), table["uri"]),
            "size_bytes": pc.if_else(is_named, pa.scalar(None, pa.int64()), table["size_bytes"]),
            "etag": pc.if_else(is_named, pa.scalar(None, pa.string()), table["etag"]),
            "problem": pc.if_else(is_named, REMOVED, table["problem"]),
        }
        kept = table
        for column, values in columns.items():
            kept = kept.set_column(kept.column_names.index(column), column, values)
        num_removed += pc.sum(pc.equal(kept["problem"], REMOVED)).as_py() or 0
        if part := _replace(listing, name, table, kept):
            parts[name] = part
    return _amend(listing, parts, {"num_removed": num_removed}, revision=listing.manifest.revision + 1)


def _forget_in_corrections(folder: Folder, uris: Collection[str]) -> None:
    for name in folder.names():
        data = folder.read_bytes(name)
        kept = _without_uris(data, lambda uri: uri in uris)
        if kept != data:
            folder.write_bytes(name, kept)


def _without_uris(data: bytes, is_named: Callable[[str], bool]) -> bytes:
    """Corrections without those of some images."""
    content = json.loads(data)
    kept = [image for image in content.get("images", ()) if not is_named(image["uri"])]
    return data if len(kept) == len(content.get("images", ())) else json.dumps(content | {"images": kept}).encode()


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
                    latest.write_bytes(name, _to_bytes(kept))


def _read(artifact: Artifact, name: str) -> pa.Table:
    """A part, also one that an interrupted takedown has written already."""
    part = artifact.part(name)
    data = artifact.folder_of(part).read_bytes(part.name)
    return pq.read_table(pa.BufferReader(data), page_checksum_verification=True)


def _replace(artifact: Artifact, name: str, table: pa.Table, kept: pa.Table) -> Part | None:
    """Write a part again if it changed now, or in an interrupted takedown; None if it did not."""
    part = artifact.part(name)
    folder = artifact.folder_of(part)
    if kept.equals(table):
        data = folder.read_bytes(part.name)
        if hashlib.sha256(data).hexdigest() == part.sha256:
            return None
    else:
        data = _to_bytes(kept)
        folder.write_bytes(part.name, data)
    shape = None if part.shape is None else (len(kept), *part.shape[1:])
    changes = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": len(kept), "shape": shape}
    return part.model_copy(update=changes)


def _to_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


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
