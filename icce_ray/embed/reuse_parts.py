"""Reuse the parts of finished ``embed`` artifacts, for a new listing with the same images or to try errors again."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from icce_ray.embed.embedding_parts import ERRORS_NAME, PartRange, plan_parts, read_hashes
from icce_ray.embed.feature_matrix import PART_PREFIX
from icce_ray.embed.part_hashes import write_hashes
from icce_ray.errors import DamagedArtifactError
from icce_ray.images.listing import REMOVED, Listing
from icce_ray.store import Artifact, PartRecord, PartRecords
from icce_ray.store.claim import check_claim

REUSE_THREADS = 8
SAME = ["uri", "size_bytes", "etag", "problem"]
"""Columns of the listing: images that agree in them are the same file."""


class ReusableParts:
    """The parts of a finished ``embed`` artifact."""

    def __init__(self, artifact: Artifact, listing: Listing) -> None:
        self.parts = plan_parts(len(listing), artifact.metrics["images_per_part"])
        self._artifact = artifact
        self._listing = listing
        self._files = dict(zip(self.parts, artifact.part_names(PART_PREFIX), strict=True))
        errors = artifact.read_table(ERRORS_NAME)
        self._failed_ids = errors["image_id"].to_numpy()
        self._reasons = errors["reason"]

    def record(self, part: PartRange) -> PartRecord:
        """The record that the part had."""
        first, last = np.searchsorted(self._failed_ids, [part.start, part.stop])
        errors = list(zip(self._failed_ids[first:last].tolist(), self._reasons[first:last].to_pylist(), strict=True))
        metrics = {"start": part.start, "num_images": part.num_images, "errors": errors, "num_embedded": 0}
        return PartRecord(name=part.name, files=(self._artifact.part(self._files[part]),), metrics=metrics)

    def reuse(self, part: PartRange, listing: Listing, records: PartRecords) -> PartRecord | None:
        """Take over a part, if there is one of the same images, for another artifact with this listing and these
        records: that refers to its file, and nothing is read. A part with images that may be tried again is copied,
        since that writes its file anew."""
        if part not in self._files:
            return None
        here, there = (images.table(part.start, part.stop).select(SAME) for images in (listing, self._listing))
        if not here.equals(there):
            return None
        record = self.record(part)
        (file,) = record.files
        owner = self._artifact.folder_of(file)
        if all(reason == REMOVED for _, reason in record.metrics["errors"]):
            if owner.size(file.name) != file.num_bytes:
                return None
            folder = file.folder or f"{owner.parent.path.rpartition('/')[2]}/{owner.path.rpartition('/')[2]}"
            return records.write(part.name, [file.model_copy(update={"folder": folder})], record.metrics)
        try:
            data = self._artifact.read_bytes(file.name)
        except DamagedArtifactError:
            return None
        check_claim(records.folder)
        if hashes := read_hashes(owner, file.name):
            write_hashes(records.folder, part.file_name, hashes)
        records.folder.write_bytes(part.file_name, data)
        file = file.model_copy(update={"name": part.file_name, "folder": None})
        return records.write(part.name, [file], record.metrics)


def reuse_parts(
    parts: Sequence[PartRange], listing: Listing, sources: Sequence[ReusableParts], records: PartRecords
) -> Iterator[tuple[PartRange, PartRecord | None]]:
    """Take over what the sources have of `parts`; each part, with None if no source has it."""

    def reuse(part: PartRange) -> PartRecord | None:
        found = (source.reuse(part, listing, records) for source in sources)
        return next((record for record in found if record is not None), None)

    with ThreadPoolExecutor(REUSE_THREADS) as threads:
        yield from zip(parts, threads.map(reuse, parts), strict=True)
