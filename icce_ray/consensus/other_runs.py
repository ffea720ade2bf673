"""The other runs that take part in a consensus (`consensus.extra_runs`), found by their names, and the images of a
label matrix."""

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

IMAGE_IDS_NAME = "image_ids.npy"
"""In the artifact of a consensus: the images of its labels, ascending."""


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
