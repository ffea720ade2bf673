from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from icce_ray.config import EmbeddingsConfig, ImagesConfig
from icce_ray.images import listing
from icce_ray.images.listing import IDS_PER_SOURCE, first_id
from icce_ray.store import Folder

SOURCES = [ImagesConfig(uri=f"/data/day-{number}") for number in range(8)]


def test_each_source_gets_ids_of_its_own_once_also_if_several_ask_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "FEW_SOURCES", 4)  # so that most numbers are taken already

    def ask(images: ImagesConfig) -> int:
        return first_id(str(tmp_path), images, EmbeddingsConfig())

    with ThreadPoolExecutor(16) as threads:
        first = list(threads.map(ask, SOURCES * 4))
    assert first == first[:8] * 4
    assert len(set(first)) == 8
    assert all(start > 0 and start % IDS_PER_SOURCE == 0 for start in first)
    assert [ask(images) for images in SOURCES] == first[:8]
    assert first_id(str(tmp_path), ImagesConfig(), EmbeddingsConfig(uri="/data/rows.npy")) not in first


def test_outputs_count_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "FEW_SOURCES", 1)
    for output in (tmp_path / "a", tmp_path / "b"):
        assert first_id(str(output), SOURCES[0], EmbeddingsConfig()) == IDS_PER_SOURCE
    assert first_id(str(tmp_path / "a"), SOURCES[1], EmbeddingsConfig()) > IDS_PER_SOURCE


def test_a_year_of_days_costs_no_more_requests_than_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Counter[str]()

    def counted(method: str, call: Any) -> Any:
        return lambda *values: (requests.update([method]), call(*values))[1]

    for method in ("create_bytes", "read_bytes", "names", "sizes", "exists"):
        monkeypatch.setattr(Folder, method, counted(method, getattr(Folder, method)))
    sources = [ImagesConfig(uri=f"/data/day-{number}") for number in range(365)]
    first = [first_id(str(tmp_path), images, EmbeddingsConfig()) for images in sources]
    assert requests.total() < 365 * 1.1
    requests.clear()
    assert [first_id(str(tmp_path), images, EmbeddingsConfig()) for images in sources] == first
    assert requests.total() < 365 * 2.1
    assert max(first) + IDS_PER_SOURCE <= 2**53
    assert len(set(first)) == 365
