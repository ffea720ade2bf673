"""Remove images from the parts of an artifact: only the parts that hold them are read and written again."""

from __future__ import annotations

import hashlib
import io
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from icce_ray.corrections.stage import APPLIED_NAME
from icce_ray.embed.embedding_parts import ERRORS_NAME
from icce_ray.embed.finished_parts import DUPLICATES_NAME
from icce_ray.embed.part_hashes import names_beside
from icce_ray.images.forgotten import placeholder, uri_hash
from icce_ray.images.listing import FIRST_ID, LISTING_PREFIX, REMOVED
from icce_ray.store import Artifact, ArtifactWriter, Part

SERIES = re.compile(r"(.*part-)[^/]*\.parquet")
"""Parts whose rows ascend by image id, from part to part."""
ID_COLUMNS = ("image_id", "duplicate_of", "leader")

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """The images of the list that are in one listing."""

    image_ids: Ids
    """Ascending."""
    hashes: tuple[bytes, ...]

    @classmethod
    def of(cls, listing: Artifact, wanted: dict[bytes, str]) -> Found:
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
        writer = ArtifactWriter(artifact.folder)
        for name in artifact.part_names():
            writer.add(parts.get(name) or artifact.part(name))
        writer.amend(artifact, artifact.metrics | metrics, revision=revision)
    return len(parts)


def forget_in(artifact: Artifact, found: Found) -> tuple[set[int], int]:
    """Remove the images from the parts that hold them. Returns the ids of other images with the same bytes, and the
    number of parts."""
    found = replace(found, image_ids=found.image_ids + artifact.metrics.get(FIRST_ID, 0))
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
            for beside in names_beside(name):  # hashes are made again when they are needed
                artifact.folder_of(part).remove(beside)
    if APPLIED_NAME in names:
        data = artifact.folder.read_bytes(APPLIED_NAME)
        kept_data = without_uris(data, lambda uri: uri_hash(uri) in found.hashes)
        if kept_data != data:
            parts[APPLIED_NAME] = ArtifactWriter(artifact.folder).write_bytes(APPLIED_NAME, kept_data)
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


def _without(table: pa.Table, found: Found) -> pa.Table:
    """The rows that name none of the images."""
    ids, is_named = pa.array(found.image_ids), pa.array(np.zeros(len(table), dtype=bool))
    for column in ID_COLUMNS:
        if column in table.column_names:
            is_named = pc.or_(is_named, pc.is_in(table[column], ids).combine_chunks())
    if "uri" in table.column_names and "image_id" not in table.column_names:
        hashes = set(found.hashes)
        is_named = pa.array([uri_hash(uri or "") in hashes for uri in table["uri"].to_pylist()], pa.bool_())
    return table.filter(pc.invert(is_named))


def _with_removed(errors: pa.Table, found: Found) -> pa.Table:
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


def put_placeholders(listing: Artifact, wanted: dict[bytes, str]) -> int:
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


def without_uris(data: bytes, is_named: Callable[[str], bool]) -> bytes:
    """Corrections without those of some images."""
    content = json.loads(data)
    kept = [image for image in content.get("images", ()) if not is_named(image["uri"])]
    return data if len(kept) == len(content.get("images", ())) else json.dumps(content | {"images": kept}).encode()


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
        data = to_bytes(kept)
        folder.write_bytes(part.name, data)
    shape = None if part.shape is None else (len(kept), *part.shape[1:])
    changes = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": len(kept), "shape": shape}
    return part.model_copy(update=changes)


def to_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
