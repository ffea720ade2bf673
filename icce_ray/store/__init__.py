"""Artifacts on storage: what a stage has finished, where it lies, and whether its bytes are still those it wrote."""

from icce_ray.store.artifact import Artifact, ArtifactWriter, Manifest, Part, fingerprint
from icce_ray.store.claim import Claim
from icce_ray.store.filesystem import Folder

__all__ = ["Artifact", "ArtifactWriter", "Claim", "Folder", "Manifest", "Part", "fingerprint"]
