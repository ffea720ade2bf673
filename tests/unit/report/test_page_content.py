from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.assign.part_labeler import SCHEMA
from icce_ray.report import page_content
from icce_ray.report.page_content import PageContent, images_per_cluster


def assignments(num_images: int) -> pa.Table:
    rng = np.random.default_rng(0)
    agreement = np.where(rng.random(num_images) < 0.3, np.nan, rng.random(num_images))
    columns: list[Any] = [
        np.arange(num_images),
        [f"/{number}.png" for number in range(num_images)],
        rng.integers(-1, 4, num_images),
        pa.array(agreement, from_pandas=True).cast(pa.float32()),
        rng.random(num_images).astype(np.float32),
        rng.integers(0, 5, num_images),
        rng.random(num_images).astype(np.float32),
        rng.random(num_images) < 0.1,
    ]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True))).cast(SCHEMA)


def content(tables: list[pa.Table], wanted: tuple[int, ...] = ()) -> PageContent:
    return PageContent(tables, 5, 10, np.array(wanted, dtype=np.int64))


@pytest.mark.parametrize("rows_per_part", [1, 13, 1000])
def test_any_division_into_parts_gives_what_a_plain_loop_over_the_rows_gives(
    rows_per_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_content, "NUM_LISTED", 7)
    table = assignments(300)
    found = content([table.slice(start, rows_per_part) for start in range(0, 300, rows_per_part)], (5, 252))
    rows = [image for image in table.to_pylist() if image["cluster"] >= 0]
    assert found.num_noise == 300 - len(rows) > 0
    votes: dict[tuple[int, int], float] = {}
    for row in found.clusters():
        members = [image for image in rows if image["cluster"] == row["cluster"]]
        assert row["size"] == len(members)
        assert row["num_outliers"] == sum(image["is_outlier"] for image in members)
        if members:
            agreements = [image["agreement"] for image in members if image["agreement"] is not None]
            assert row["agreement"] == pytest.approx(np.mean(agreements))
            mean = np.mean([image["consensus_probability"] for image in members])
            assert row["consensus_probability"] == pytest.approx(mean)
        else:
            assert row["agreement"] is None is row["consensus_probability"]
    for image in rows:
        sure = image["consensus_probability"] if image["agreement"] is None else image["agreement"]
        pair = (image["cluster"], image["second_choice"])
        votes[pair] = votes.get(pair, 0) + (1 - sure) / found.sizes[pair[0]]
    assert {(a, b): pytest.approx(share) for a, b, share in found.confusion(100)} == votes

    def doubt(image: dict[str, Any]) -> tuple[float, float, int]:
        agreement = 2.0 if image["agreement"] is None else image["agreement"]
        return agreement, image["consensus_probability"], image["image_id"]

    assert found.least_certain == [image["image_id"] for image in sorted(rows, key=doubt)[:7]]
    outliers = sorted((i for i in rows if i["is_outlier"]), key=lambda i: (-i["outlier_score"], i["image_id"]))
    assert found.outliers == [image["image_id"] for image in outliers[:7]]
    agreements = [image["agreement"] for image in rows if image["agreement"] is not None]
    assert found.agreement_bins.tolist() == np.histogram(agreements, 25, (0, 1))[0].tolist()
    probabilities = [image["consensus_probability"] for image in rows]
    assert found.probability_bins.tolist() == np.histogram(probabilities, 25, (0, 1))[0].tolist()
    assert found.mean_agreement() == pytest.approx(np.mean(agreements))
    probabilities = [image["consensus_probability"] for image in rows]
    assert found.mean_consensus_probability() == pytest.approx(np.mean(probabilities))
    whole = content([table], (5, 252))
    assert found.shown.equals(whole.shown.combine_chunks())
    shown = found.shown["image_id"].to_pylist()
    assert set(shown) >= {5, 252, *found.least_certain, *found.outliers}
    extra = {5, 252, *found.least_certain, *found.outliers}
    drawn = [image for image in table.to_pylist() if image["image_id"] in set(shown) - extra]
    assert all(sum(image["cluster"] == k for image in drawn) <= 10 for k in range(5))
    assert all(image["agreement"] is not None for image in drawn if image["cluster"] >= 0)
    assert 5 < sum(image["cluster"] == -1 for image in drawn) <= 10


def test_clusters_come_largest_first_and_shares_add_up() -> None:
    rows = content([assignments(300)]).clusters()
    assert [row["size"] for row in rows] == sorted((row["size"] for row in rows), reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows[-1] == {
        "cluster": 4, "size": 0, "share": 0.0, "agreement": None, "consensus_probability": None, "num_outliers": 0
    }  # fmt: skip


def test_no_assignments_at_all_are_fine() -> None:
    found = content([assignments(0)])
    assert found.mean_agreement() is None
    assert found.least_certain == []


@pytest.mark.parametrize("seed", range(20))
def test_the_images_per_cluster_fill_the_page_and_no_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 50, 8)
    most = int(rng.integers(8, 300))
    number = images_per_cluster(sizes, most)
    assert np.minimum(sizes, number).sum() <= most or number == 1
    assert np.minimum(sizes, number + 1).sum() > most or number >= sizes.max()
