"""Which images are trained on (docs/METHOD.md, "Sample").

Above `sample.max_images` a uniform sample is drawn, and near-duplicates are left out. The `sample` stage writes the
embeddings of the images that remain as an artifact of the same form as `embed`; the stages that train see nothing else.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.config import SampleConfig
from icce_ray.embed.feature_matrix import load_features, read_rows
from icce_ray.random_numbers import id_hashes
from icce_ray.sample.near_duplicates import find_near_duplicates
from icce_ray.sample.unit_features import Ids
from icce_ray.store import Artifact, ArtifactWriter, Part

PART_PREFIX = "part-"
GROUPS_NAME = "duplicate_groups.parquet"
PAIRS_NAME = "duplicate_pairs.parquet"
IMAGE_IDS_NAME = "image_ids.npy"
"""The ids of the images that are trained on, ascending, where these are not all."""
MIN_ROWS_PER_PART = 16_384
IDS_PER_BLOCK = 2**22


@dataclass(frozen=True)
class TrainingPart:
    """One part of the training set: which rows it takes from which parts of another artifact."""

    name: str
    rows: dict[str, Ids]
    """Ascending row numbers within each of these parts."""


def sample_ids(num_images: int, max_images: int | None, seed: int, failed_ids: Ids | None = None) -> Ids | None:
    """The ids with the smallest hashes, ascending, (max_images,) int64; None if there are no more. It is a uniform
    sample without replacement, of which an image more or less changes at most one. `failed_ids`, ascending, cannot be
    drawn; with the `num_images` others they are the numbers from 0 on."""
    if max_images is None or num_images <= max_images:
        return None
    failed = np.empty(0, np.int64) if failed_ids is None else failed_ids
    kept_ids, kept_hashes = np.empty(0, np.int64), np.empty(0, np.uint64)
    for start in range(0, num_images + len(failed), IDS_PER_BLOCK):
        ids = np.arange(start, min(start + IDS_PER_BLOCK, num_images + len(failed)))
        first, last = np.searchsorted(failed, [start, start + IDS_PER_BLOCK])
        ids = np.concatenate([kept_ids, np.delete(ids, failed[first:last] - start)])
        hashes = np.concatenate([kept_hashes, id_hashes(ids[len(kept_ids) :], seed)])
        smallest = np.argpartition(hashes, max_images - 1)[:max_images] if len(ids) > max_images else slice(None)
        kept_ids, kept_hashes = ids[smallest], hashes[smallest]
    return np.sort(kept_ids)


def plan_parts(embed: Artifact, rows: Ids) -> list[TrainingPart]:
    """Parts with the given rows of all rows, ascending: each takes consecutive parts until it has enough rows."""
    parts, taken, first_row = list[TrainingPart](), dict[str, Ids](), 0
    names = embed.part_names(PART_PREFIX)
    for name, num_rows in zip(names, embed.num_rows(PART_PREFIX).tolist(), strict=True):
        first, last = np.searchsorted(rows, [first_row, first_row + num_rows])
        if last > first:
            taken[name] = rows[first:last] - first_row
        first_row += num_rows
        if sum(map(len, taken.values())) >= MIN_ROWS_PER_PART or (name == names[-1] and taken):
            parts.append(TrainingPart(f"{PART_PREFIX}{len(parts):05d}.parquet", taken))
            taken = {}
    return parts


def write_part(part: TrainingPart, embed: Artifact, writer: ArtifactWriter) -> Part:
    """Write one part of the training set; the schema is that of the embeddings."""
    tables = [read_rows(embed, name, rows) for name, rows in part.rows.items()]
    return writer.write_table(part.name, pa.concat_tables(tables))


@dataclass(frozen=True)
class TrainingRows:
    """The training set of a collection: which image each of its rows is, and which row stands for which image."""

    image_ids_n: Ids
    """Ascending."""
    follower_ids_F: Ids
    """Ascending ids of near-duplicates; `leader_ids_F` are the images trained on instead."""
    leader_ids_F: Ids

    def rows_of(self, image_ids: Ids) -> Ids:
        """For each image the row of the training set that stands for it, its own or its leader's; -1: none does."""
        rows = find_ids(self.image_ids_n, image_ids)
        places = find_ids(self.follower_ids_F, image_ids)
        is_follower = places >= 0
        rows[is_follower] = find_ids(self.image_ids_n, self.leader_ids_F[places[is_follower]])
        return rows


def choose_rows(features_ND: npt.NDArray[np.floating[Any]], config: SampleConfig, seed: int) -> TrainingRows | None:
    """The training set of a feature matrix, whose rows count as ids; None if it is the whole matrix. Raises InputError:
    features that are not finite, or fewer than two."""
    drawn = sample_ids(len(features_ND), config.max_images, seed)
    if config.duplicate_threshold is None:
        return None if drawn is None else TrainingRows(drawn, drawn[:0], drawn[:0])
    ids_N = np.arange(len(features_ND)) if drawn is None else drawn
    found = find_near_duplicates(features_ND if drawn is None else features_ND[drawn], config.duplicate_threshold)
    if drawn is None and len(found.leaders) == len(ids_N):
        return None
    return TrainingRows(ids_N[found.leaders], ids_N[found.followers], ids_N[found.leader_N[found.followers]])


def training_set(inputs: Mapping[str, Artifact]) -> Artifact:
    """The embeddings that are trained on: those of the `sample` stage, or all if it left none out."""
    sample = inputs.get("sample")
    return sample if sample is not None and sample.part_names(PART_PREFIX) else inputs["embed"]


def source_digest(embed: Artifact, version: int) -> str:
    """Digest of embeddings and of the version of a stage that works on them: the source of its parts."""
    return hashlib.sha256(json.dumps([embed.checksum(PART_PREFIX), version]).encode()).hexdigest()[:16]


def training_rows(inputs: Mapping[str, Artifact]) -> TrainingRows | None:
    """The training set of a run; None if all images are trained on."""
    sample = inputs.get("sample")
    if sample is None or IMAGE_IDS_NAME not in sample.part_names():
        return None
    image_ids_n = np.asarray(sample.read_array(IMAGE_IDS_NAME))
    if GROUPS_NAME not in sample.part_names():
        return TrainingRows(image_ids_n, image_ids_n[:0], image_ids_n[:0])
    groups = sample.read_table(GROUPS_NAME).sort_by("image_id")
    ids, leaders = groups["image_id"].to_numpy(), groups["leader"].to_numpy()
    is_follower = ids != leaders
    return TrainingRows(image_ids_n, ids[is_follower], leaders[is_follower])


def training_rows_of(inputs: Mapping[str, Artifact], image_ids: Ids) -> Ids:
    """The row of each image (n,) among those trained on, that of its leader for a near-duplicate; -1 for none."""
    training = training_rows(inputs)
    if training is not None:
        return training.rows_of(image_ids)
    return find_ids(load_features(training_set(inputs)).image_ids, image_ids)


def find_ids(sorted_ids: Ids, image_ids: Ids) -> Ids:
    """Place of each image among ascending ids, -1 if it is not there."""
    if not len(sorted_ids):
        return np.full(len(image_ids), -1)
    places = np.minimum(np.searchsorted(sorted_ids, image_ids), len(sorted_ids) - 1)
    return np.where(sorted_ids[places] == image_ids, places, -1)
