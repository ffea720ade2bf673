"""One space of ids for all images of an output: those of a run count from 0, those of each source of new images from a
multiple of IDS_PER_SOURCE.

``ids/004711`` holds the settings of the source whose ids count from 4711 x IDS_PER_SOURCE, so that a source that is
listed again keeps its ids. A hash of the settings chooses the number, so nothing else has to be read.
"""

import hashlib
import json
from itertools import count

from icce_ray.config import EmbeddingsConfig, ImagesConfig
from icce_ray.store import Folder

IDS_FOLDER = "ids"
FIRST_ID = "first_id"
"""The metric of assignments that says where their ids start."""
IDS_PER_SOURCE = 2**40
FEW_SOURCES = 2**13 - 1
"""Numbers to choose from at first: with them all ids are below 2^53, which float64 holds exactly."""
MAX_SOURCES = 2**22


def first_id(output: str, images: ImagesConfig, embeddings: EmbeddingsConfig) -> int:
    """The id of the first image of a source of new images. A source without an id gets one, once, whoever asks."""
    own = json.dumps([images.model_dump(mode="json"), embeddings.model_dump(mode="json")], sort_keys=True).encode()
    folder = Folder.at(output) / IDS_FOLDER
    for attempt in count():  # another number if this one is taken; after each eight from twice as many
        digest = hashlib.sha256(b"%d" % attempt + own).digest()
        number = 1 + int.from_bytes(digest[:8], "big") % min(FEW_SOURCES << attempt // 8, MAX_SOURCES)
        name = f"{number:06d}"
        try:
            folder.create_bytes(name, own)
            break
        except FileExistsError:
            if folder.read_bytes(name) == own:
                break
    return number * IDS_PER_SOURCE
