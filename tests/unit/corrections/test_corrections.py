from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.config import Config
from icce_ray.corrections.apply_corrections import carry_over, correct_labels
from icce_ray.corrections.stage import Corrections, kept_name, read_corrections
from icce_ray.errors import InputError


def corrections(clusters: list[dict[str, Any]], images: list[dict[str, Any]] | None = None) -> Corrections:
    made_for = {"consensus": "old", "num_clusters": 4, "assign": "a"}
    return Corrections.model_validate({"format": 1, "made_for": made_for, "clusters": clusters, "images": images or []})


def test_merges_are_followed_to_their_end_in_any_order() -> None:
    given = corrections(
        [{"cluster": 3, "merge_into": 1}, {"cluster": 1, "merge_into": 4}, {"cluster": 4, "is_new": True}]
    )
    assert given.num_clusters == 5
    assert given.final_clusters() == [0, 4, 2, 4, 4]


@pytest.mark.parametrize("seed", range(5))
def test_the_labels_are_those_of_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 4, 60)
    image_ids = np.sort(rng.choice(100, 60, replace=False))
    final = np.array([0, 2, 2, 5, 4, 5])
    moved = pa.table({"image_id": np.sort(rng.choice(100, 20, replace=False)), "cluster": rng.integers(-1, 6, 20)})
    wanted = {image: int(final[label]) if label >= 0 else -1 for image, label in zip(image_ids, labels, strict=True)}
    for image, cluster in zip(moved["image_id"].to_pylist(), moved["cluster"].to_pylist(), strict=True):
        if image in wanted:
            wanted[image] = cluster
    assert correct_labels(labels, image_ids, moved, final).tolist() == list(wanted.values())


def test_corrections_follow_their_clusters_into_another_clustering() -> None:
    old = pa.table({"uri": [f"{i}" for i in range(40)], "cluster": np.repeat(np.arange(4), 10)})
    # Other numbers, an image more in each, two old clusters lost in one new, and a cluster of new images only.
    new_clusters = np.repeat([2, 0, 1, 1, 3], 10)
    new = pa.table({"uri": [f"{i}" for i in range(50)], "cluster": new_clusters})
    given = corrections(
        [{"cluster": 0, "name": "zero"}, {"cluster": 1, "merge_into": 0}, {"cluster": 3, "name": "lost"},
         {"cluster": 4, "name": "more", "is_new": True}],
        [{"uri": "5", "cluster": 4}, {"uri": "6", "cluster": None}, {"uri": "7", "cluster": 3}],
    )  # fmt: skip
    carried, lost = carry_over(given, old, new, "new", 4)
    found = {one.cluster: (one.name, one.merge_into, one.is_new) for one in carried.clusters}
    assert lost == [3]
    assert found.items() >= {2: ("zero", None, False), 0: (None, 2, False), 4: ("more", None, True)}.items()
    assert carried.made_for.consensus == "new"
    assert [(image.uri, image.cluster) for image in carried.images][:2] == [("5", 4), ("6", None)]


def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    def refused(data: Any) -> str:
        path = tmp_path / "corrections.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        with pytest.raises(InputError) as caught:
            read_corrections(str(path))
        return str(caught.value)

    good = corrections([]).model_dump(mode="json")
    assert "not a file that the page saved" in refused("{")
    assert "not a file that the page saved" in refused("[" * 100_000)
    assert "at most 1,000,000 are possible" in refused(good | {"made_for": good["made_for"] | {"num_clusters": 10**12}})
    assert "format" in refused(good | {"format": 2})
    assert "names cluster 9" in refused(good | {"images": [{"uri": "a", "cluster": 9}]})
    assert "circle" in refused(good | {"clusters": [{"cluster": 1, "merge_into": 2}, {"cluster": 2, "merge_into": 1}]})
    with pytest.raises(InputError, match="cannot be read"):
        read_corrections("/dev/zero")
    with pytest.raises(InputError, match="cannot be read"):
        read_corrections(str(tmp_path / "nothing.json"))


def test_corrections_are_kept_for_the_settings_that_make_the_clusters() -> None:
    config = Config(images={"uri": "/photos"}, num_clusters=4, output="/out")
    same = Config(
        images={"uri": "/photos"}, num_clusters=4, output="/out", resources={"num_cpus": 2}, report={"title": "x"}
    )
    other = Config(images={"uri": "/photos"}, num_clusters=5, output="/out")
    assert kept_name(config) == kept_name(same) != kept_name(other)
