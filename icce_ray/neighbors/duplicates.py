"""Near-duplicates: the same picture again, rescaled or saved anew. Each group counts once as a neighbour [ours].

Ten copies of a picture are its ten most similar images, and nothing is learnt from them: they would fill its list and
those of its neighbours; and a picture that is trained on ten times an epoch bends the balance of the clusters. So a
group of near-duplicates is represented by its leader, the lowest id: only leaders have neighbours and are neighbours.
The heads then label all. A group holds images that are near-duplicates of the leader
itself: likeness is not passed on along chains, at whose ends images may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.neighbors.faiss_engine import RESOLUTION
from icce_ray.neighbors.unit_features import Ids

AUTO_SHARE_OF_DISTANCE = 0.01
"""`auto`: near-duplicates are this much nearer to each other, in 1 - cosine, than an image to the last of its
`min_neighbors` most similar. Digits, CIFAR-10 and Fashion-MNIST have no such pairs."""
MIN_DISTANCE = 1e-5
"""Below, float32 features cannot tell a copy from a neighbour."""


@dataclass(frozen=True)
class DuplicatePairs:
    """P pairs of images: higher_P are near-duplicates of lower_P (lower ids), units_P their cosine in units of
    `RESOLUTION`. Ascending by (higher, lower); of an image only the lowest `MAX_DUPLICATES_PER_IMAGE` are listed."""

    higher_P: Ids
    lower_P: Ids
    units_P: Ids

    def __len__(self) -> int:
        return len(self.higher_P)

    @staticmethod
    def join(lists: Sequence[DuplicatePairs]) -> DuplicatePairs:
        """One after the other: lists of consecutive images give a list in order."""
        return DuplicatePairs(
            np.concatenate([np.empty(0, np.int64), *(pairs.higher_P for pairs in lists)]),
            np.concatenate([np.empty(0, np.int64), *(pairs.lower_P for pairs in lists)]),
            np.concatenate([np.empty(0, np.int64), *(pairs.units_P for pairs in lists)]),
        )


def auto_threshold(last_similarity_Q: npt.NDArray[np.floating]) -> float | None:
    """Cosine from which on images are near-duplicates, or None where similarities are too alike to tell.

    Args:
        last_similarity_Q: cosine of sampled images with the last of their `min_neighbors` most similar ones.
    """
    distance = AUTO_SHARE_OF_DISTANCE * (1.0 - float(np.median(last_similarity_Q)))
    return 1.0 - distance if distance >= MIN_DISTANCE else None


def leaders(num_images: int, pairs: DuplicatePairs, min_leaders: int) -> Ids | None:
    """The leader of each image, (N,) int64, itself where it has none; None where no image has one.

    By ascending id, an image follows the lowest leader that it is a near-duplicate of, or becomes one itself.

    Args:
        num_images: N.
        pairs: the near-duplicates.
        min_leaders: where fewer would remain, the collection has too little variety to leave anything out: None.
    """
    leader_N = np.arange(num_images)
    for higher, lower in zip(pairs.higher_P.tolist(), pairs.lower_P.tolist(), strict=True):
        if leader_N[higher] == higher and leader_N[lower] == lower:
            leader_N[higher] = lower
    num_leaders = int((leader_N == np.arange(num_images)).sum())
    return leader_N if min_leaders <= num_leaders < num_images else None


def pair_table(pairs: DuplicatePairs, image_ids_N: Ids) -> pa.Table:
    """image_id, duplicate_of, similarity: every pair, with the ids of the images."""
    return pa.table(
        {
            "image_id": image_ids_N[pairs.higher_P],
            "duplicate_of": image_ids_N[pairs.lower_P],
            "similarity": (pairs.units_P * RESOLUTION).astype(np.float32),
        }
    )


def group_table(leader_N: Ids | None, image_ids_N: Ids) -> pa.Table:
    """image_id, leader: every image of a group of at least two, by group."""
    leader_N = np.arange(len(image_ids_N)) if leader_N is None else leader_N
    sizes_N = np.bincount(leader_N, minlength=len(leader_N))
    members = np.flatnonzero(sizes_N[leader_N] > 1)
    members = members[np.argsort(leader_N[members], kind="stable")]
    return pa.table({"image_id": image_ids_N[members], "leader": image_ids_N[leader_N[members]]})
