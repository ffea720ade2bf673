"""The other runs whose heads take part in a consensus (`consensus.extra_runs`): found by name, over the same images."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from icce_ray.errors import InputError
from icce_ray.images.listing import Listing
from icce_ray.methods.clusterings import LABELS_NAME
from icce_ray.sample.training_set import training_rows
from icce_ray.store import Artifact, Folder
from icce_ray.store.run_records import RUNS_FOLDER

IMAGES, EMBED, SAMPLE, METHOD = "images", "embed", "sample", "method"


def find_heads(names: Sequence[str], output: str, own: Artifact | None = None) -> list[Artifact]:
    """The clusterings of every extra run. Raises InputError: there is no such run, its clusterings are not finished, or
    it has other images.

    Args:
        names: names of runs under `output`, or places of their records.
        own: this run's clusterings, if they are finished: then it is checked that the images are the same.
    """
    found = []
    for name in names:
        record, root = read_record(name, output, "consensus.extra_runs")
        heads = Artifact.find(root / METHOD / record["stages"][METHOD])
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
        record["stages"][METHOD]
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
    embeds = [input_of(heads, EMBED) for heads in (one, other)]
    failed = [sorted(embed.read_table("errors.parquet")["image_id"].to_pylist()) for embed in embeds]
    training = [training_rows({SAMPLE: input_of(heads, SAMPLE)}) for heads in (one, other)]
    ours, theirs = (np.empty(0) if rows is None else rows.image_ids_n for rows in training)
    if failed[0] != failed[1] or not np.array_equal(ours, theirs):
        return False
    if embeds[0].manifest.inputs[IMAGES] == embeds[1].manifest.inputs[IMAGES]:
        return True
    listings = [Listing(input_of(embed, IMAGES)) for embed in embeds]
    names = [listing.table(0, len(listing))["uri"] for listing in listings]
    rows = [pc.replace_substring_regex(uris, pattern=r"^.*(#\d+)$", replacement=r"\1") for uris in names]
    return bool(rows[0].combine_chunks().equals(rows[1].combine_chunks()))


def trained_ids(heads: Artifact) -> npt.NDArray[np.int64]:
    """The ascending ids of the images of a label matrix."""
    training = training_rows({SAMPLE: input_of(heads, SAMPLE)})
    if training is not None:
        return training.image_ids_n
    failed = input_of(heads, EMBED).read_table("errors.parquet")["image_id"].to_numpy()
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
