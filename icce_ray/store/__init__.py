"""Artifacts on storage: what a stage has finished, where it lies, and whether its bytes are still those it wrote."""

from icce_ray.store.artifact import Artifact, Manifest, fingerprint
from icce_ray.store.artifact_writer import ArtifactWriter
from icce_ray.store.claim import Claim
from icce_ray.store.filesystem import Folder
from icce_ray.store.part_records import PartRecord, PartRecords
from icce_ray.store.parts_table import Part

__all__ = [
    "Artifact", "ArtifactWriter", "Claim", "Folder", "Manifest", "Part", "PartRecord", "PartRecords", "fingerprint",
]  # fmt: skip
