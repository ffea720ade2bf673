from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from icce_ray.config import EmbeddingsConfig, ImagesConfig
from icce_ray.images.first_ids import IDS_PER_SOURCE, first_id


def test_each_source_gets_ids_of_its_own_once_also_if_several_ask_at_a_time(tmp_path: Path) -> None:
    sources = [ImagesConfig(uri=f"/data/day-{number}") for number in range(8)]

    def ask(images: ImagesConfig) -> int:
        return first_id(str(tmp_path), images, EmbeddingsConfig())

    with ThreadPoolExecutor(16) as threads:
        first = list(threads.map(ask, sources * 4))
    assert first == first[:8] * 4
    assert sorted(first[:8]) == [number * IDS_PER_SOURCE for number in range(1, 9)]
    assert [ask(images) for images in sources] == first[:8]
    of_rows = first_id(str(tmp_path), ImagesConfig(), EmbeddingsConfig(uri="/data/rows.npy"))
    assert of_rows == 9 * IDS_PER_SOURCE


def test_outputs_count_for_themselves(tmp_path: Path) -> None:
    images = ImagesConfig(uri="/data/day")
    assert first_id(str(tmp_path / "a"), images, EmbeddingsConfig()) == IDS_PER_SOURCE
    assert first_id(str(tmp_path / "b"), images, EmbeddingsConfig()) == IDS_PER_SOURCE
