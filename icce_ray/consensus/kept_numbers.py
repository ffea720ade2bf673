"""A consensus takes over the cluster numbers of an earlier run (docs/METHOD.md, "Cluster numbers").

Shape letters: K clusters of the earlier run, L of this one, n images of both, N images of this one.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from icce_ray.consensus.best_consensus import EnsembleResult
from icce_ray.consensus.other_runs import IMAGE_IDS_NAME, input_of, read_record, trained_ids
from icce_ray.errors import InputError
from icce_ray.images.listing import Listing, has_ids_of
from icce_ray.metrics.contingency import as_array, count_table, largest_share, match_clusters
from icce_ray.store import Artifact

Labels = npt.NDArray[np.integer[Any]]
Changes = dict[str, Any]


def keep_numbers(
    result: EnsembleResult, num_clusters: int, heads: Artifact, run: str, output: str
) -> tuple[EnsembleResult, Changes]:
    """The result of a consensus of `heads`, with L clusters, with the numbers of an earlier run, given by its name or
    the place of its record; and what became of its clusters, as :func:`number_clusters`. Raises InputError: there is no
    such run, or it has no consensus."""
    record, root = read_record(run, output, "consensus.numbers_from")
    earlier = Artifact.find(root / "consensus" / record["stages"].get("consensus", "none"))
    if earlier is None or IMAGE_IDS_NAME not in earlier.part_names():
        raise InputError(
            f"consensus.numbers_from: the clusters of the run {run!r} are no longer there; finish that run again, or "
            "set consensus.numbers_from: none"
        )
    before_n, now_n = _labels_of_both(earlier, heads, result.labels)
    labels_N = result.labels
    sizes_L = np.bincount(labels_N[labels_N >= 0], minlength=num_clusters)
    num_before = 1 + int(earlier.read_array("labels.npy").max())
    number_L, changes = number_clusters(before_n, now_n, num_before, sizes_L)
    second = result.second_choice
    renumbered = replace(
        result,
        labels=np.where(labels_N >= 0, number_L[labels_N], labels_N),
        second_choice=np.where(second >= 0, number_L[second], second),
        hierarchy=result.hierarchy.renumbered(number_L),
    )
    return renumbered, {"run": record["run"]} | changes


def number_clusters(
    before_n: Labels, now_n: Labels, num_before: int, sizes_L: npt.NDArray[np.integer[Any]]
) -> tuple[npt.NDArray[np.int32], Changes]:
    """Numbers for the clusters of a run, so that those that persist keep theirs, from the labels of the images of both
    runs, -1 for noise, and all images of each of this run's clusters (L,).

    Returns the number of each cluster (L,), and what became of the clusters by their numbers, JSON-able: num_kept; new;
    split, pairs of a new one and the old one that most of its images are from; merged, pairs of an old one and the new
    one that most of its images are in; gone; renumbered, pairs (old, new) of those that persist, but had a number that
    is too large now.
    """
    num_now = len(sizes_L)
    table_KL = as_array(count_table(before_n, now_n, num_before, num_now))
    matched = match_clusters(table_KL)
    numbers = {now: before for before, now in matched.items() if before < num_now}
    # Numbers that no cluster had come first.
    free = sorted(set(range(num_now)) - set(numbers.values()), key=lambda number: (number < num_before, number))
    others = [cluster for cluster in range(num_now) if cluster not in numbers]
    numbers |= dict(zip(others, free, strict=True))
    number_L = np.array([numbers[cluster] for cluster in range(num_now)], dtype=np.int32)
    source_L, is_split_L = largest_share(table_KL.T, sizes_L)
    target_K, is_merged_K = largest_share(table_KL, table_KL.sum(axis=1))
    found = {number: cluster for cluster, number in numbers.items()}
    unmatched = [cluster for cluster in set(range(num_now)) - set(matched.values()) if sizes_L[cluster]]
    gone = [cluster for cluster in range(num_before) if cluster not in matched and table_KL[cluster].any()]
    changes = {
        "num_kept": sum(found[number] == matched.get(number) for number in range(num_now)),
        "new": sorted(numbers[cluster] for cluster in unmatched if not is_split_L[cluster]),
        "split": sorted([numbers[cluster], int(source_L[cluster])] for cluster in unmatched if is_split_L[cluster]),
        "merged": [[cluster, numbers[int(target_K[cluster])]] for cluster in gone if is_merged_K[cluster]],
        "gone": [cluster for cluster in gone if not is_merged_K[cluster]],
        "renumbered": [[before, numbers[now]] for before, now in matched.items() if numbers[now] != before],
    }
    return number_L, changes


def _labels_of_both(earlier: Artifact, heads: Artifact, labels_N: Labels) -> tuple[Labels, Labels]:
    """Labels of the images that were trained on in both runs: (n,) of the earlier one, (n,) of this one."""
    before, ids, ids_before = earlier.read_array("labels.npy"), trained_ids(heads), earlier.read_array(IMAGE_IDS_NAME)
    images, images_before = (input_of(input_of(one, "embed"), "images") for one in (heads, input_of(earlier, "method")))
    if has_ids_of(images, images_before):
        _, places, places_before = np.intersect1d(ids, ids_before, assume_unique=True, return_indices=True)
    else:
        found = pc.index_in(
            Listing(images).uris(ids), value_set=Listing(images_before).uris(ids_before).combine_chunks()
        )
        places = np.flatnonzero(found.is_valid())
        places_before = found.drop_null().to_numpy()
    return before[places_before], labels_N[places]
