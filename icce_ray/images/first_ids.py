"""One space of ids for all images of an output: those of a run count from 0, those of each source of new images from a
multiple of IDS_PER_SOURCE.

``ids/000003`` holds the settings of the third source, so that a source that is listed again keeps its ids.
"""

from __future__ import annotations

import json

from icce_ray.config import EmbeddingsConfig, ImagesConfig
from icce_ray.store import Folder

IDS_FOLDER = "ids"
FIRST_ID = "first_id"
"""The metric of assignments that says where their ids start."""
IDS_PER_SOURCE = 2**40


def first_id(output: str, images: ImagesConfig, embeddings: EmbeddingsConfig) -> int:
    """The id of the first image of a source of new images. A source without an id gets one, once, whoever asks."""
    own = json.dumps([images.model_dump(mode="json"), embeddings.model_dump(mode="json")], sort_keys=True).encode()
    folder, number = Folder.at(output) / IDS_FOLDER, 1
    while True:
        name = f"{number:06d}"
        try:
            if folder.read_bytes(name) == own:
                return number * IDS_PER_SOURCE
            number += 1
        except FileNotFoundError:
            try:
                folder.create_bytes(name, own)
            except FileExistsError:  # another job was quicker: look what it is
                continue
            return number * IDS_PER_SOURCE
