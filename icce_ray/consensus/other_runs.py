"""The other runs that take part in a consensus: those whose heads do (`consensus.extra_runs`), and the earlier one
whose cluster numbers are kept (docs/METHOD.md, "Cluster numbers"). They are found by name.

Shape letters: K clusters of the earlier run, L of this one, n images of both, N images of this one.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from icce_ray.consensus.best_consensus import EnsembleResult
from icce_ray.errors import InputError
from icce_ray.images.listing import Listing, has_ids_of
from icce_ray.methods.clusterings import LABELS_NAME
from icce_ray.metrics.contingency import as_array, count_table, largest_share, match_clusters
from icce_ray.sample.training_set import training_rows
from icce_ray.store import Artifact, Folder
from icce_ray.store.run_records import RUNS_FOLDER

IMAGE_IDS_NAME = "image_ids.npy"
"""In the artifact of a consensus: the images of its labels."""
Labels = npt.NDArray[np.integer[Any]]
Changes = dict[str, Any]


def find_heads(names: Sequence[str], output: str, own: Artifact | None = None) -> list[Artifact]:
    """The clusterings of every extra run, given by its name under `output`, or the place of its record. If those of
    this run, `own`, are finished, it is checked that the images are the same. Raises InputError: there is no such run,
    its clusterings are not finished, or it has other images."""
    found = []
    for name in names:
        record, root = read_record(name, output, "consensus.extra_runs")
        heads = Artifact.find(root / "method" / record["stages"]["method"])
        if heads is None:
            raise InputError(
                f"consensus.extra_runs: the heads of the run {name!r} are not finished; finish that run first"
            )
        if own is not None and not have_same_images(heads, own):
            raise InputError(
                f"consensus.extra_runs: the run {name!r} has other images than this one; only runs that list the same "
                "images, and could use the same of them, can be combined"
            )
        found.append(heads)
    return found


def read_record(name: str, output: str, setting: str) -> tuple[dict[str, Any], Folder]:
    """The record of a run, and the folder of its artifacts; `setting` names it."""
    place = name if "/" in name else f"{output.rstrip('/')}/{RUNS_FOLDER}/{name}.json"
    folder, _, file = place.rpartition("/")
    root = folder.rpartition("/")[0]
    try:
        record: dict[str, Any] = json.loads(Folder.at(folder).read_bytes(file))
        record["stages"]["method"]
    except FileNotFoundError:
        raise InputError(
            f"{setting}: there is no run {name!r}: {place} does not exist. Give the name of a run under "
            f"{output!r}, or the place of its record, <output>/{RUNS_FOLDER}/<name>.json"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{setting}: {place} is not the record of a run: {error}") from None
    return record, Folder.at(root or "/")


def have_same_images(one: Artifact, other: Artifact) -> bool:
    """Whether the columns of two label matrices are the same images: listed in the same order, with the same ones
    unusable and the same ones drawn into the sample. Ready-made embeddings that name no images are compared by row
    number."""
    embeds = [input_of(heads, "embed") for heads in (one, other)]
    failed = [sorted(embed.read_table("errors.parquet")["image_id"].to_pylist()) for embed in embeds]
    training = [training_rows({"sample": input_of(heads, "sample")}) for heads in (one, other)]
    ours, theirs = (np.empty(0) if rows is None else rows.image_ids_n for rows in training)
    if failed[0] != failed[1] or not np.array_equal(ours, theirs):
        return False
    if embeds[0].manifest.inputs["images"] == embeds[1].manifest.inputs["images"]:
        return True
    listings = [Listing(input_of(embed, "images")) for embed in embeds]
    names = [listing.table(0, len(listing))["uri"] for listing in listings]
    rows = [pc.replace_substring_regex(uris, pattern=r"^.*(#\d+)$", replacement=r"\1") for uris in names]
    return bool(rows[0].combine_chunks().equals(rows[1].combine_chunks()))


def trained_ids(heads: Artifact) -> npt.NDArray[np.int64]:
    """The ascending ids of the images of a label matrix."""
    training = training_rows({"sample": input_of(heads, "sample")})
    if training is not None:
        return training.image_ids_n
    failed = input_of(heads, "embed").read_table("errors.parquet")["image_id"].to_numpy()
    _, num_images = heads.part(LABELS_NAME).shape or (0, 0)
    return np.delete(np.arange(num_images + len(failed)), failed)


def input_of(artifact: Artifact, stage: str) -> Artifact:
    """The artifact of `stage` that `artifact` was made from, which lies under the same folder."""
    folder = artifact.folder
    root = folder.parent.parent
    found = Artifact.find(root / stage / artifact.manifest.inputs[stage].partition(".")[0])
    if found is None:
        raise InputError(f"{root.uri}/{stage} no longer has what {folder.uri} was made from")
    return found


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
