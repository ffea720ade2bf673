from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.assign.labeling import SCHEMA
from icce_ray.report.page_content import PageContent


def assignments(num_images: int) -> pa.Table:
    rng = np.random.default_rng(0)
    agreement = np.where(rng.random(num_images) < 0.3, np.nan, rng.random(num_images))
    columns: list[Any] = [
        np.arange(num_images),
        [f"/{number}.png" for number in range(num_images)],
        rng.integers(-1, 4, num_images),
        rng.random(num_images).astype(np.float32),
        pa.array(agreement, from_pandas=True).cast(pa.float32()),
        rng.integers(0, 5, num_images),
        rng.random(num_images).astype(np.float32),
        rng.random(num_images) < 0.1,
    ]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True))).cast(SCHEMA)


def content(tables: list[pa.Table]) -> PageContent:
    return PageContent(tables, 5, num_least_certain=7, max_outliers=6)


@pytest.mark.parametrize("rows_per_part", [1, 13, 1000])
def test_any_division_into_parts_gives_what_a_plain_loop_over_the_rows_gives(rows_per_part: int) -> None:
    table = assignments(300)
    found = content([table.slice(start, rows_per_part) for start in range(0, 300, rows_per_part)])
    rows = [row for row in table.to_pylist() if row["cluster"] >= 0]
    assert found.num_noise == 300 - len(rows) > 0
    for row in found.clusters():
        members = [image for image in rows if image["cluster"] == row["cluster"]]
        assert row["size"] == len(members)
        assert row["num_outliers"] == sum(image["is_outlier"] for image in members)
        if members:
            agreements = [image["agreement"] for image in members if image["agreement"] is not None]
            assert row["agreement"] == pytest.approx(np.mean(agreements))
            assert row["confidence"] == pytest.approx(np.mean([image["confidence"] for image in members]))
        else:
            assert row["agreement"] is None is row["confidence"]
    certainty = {
        image["image_id"]: min(value for value in (image["confidence"], image["agreement"]) if value is not None)
        for image in rows
    }
    least = sorted(certainty, key=lambda i: certainty[i])[:7]
    assert [(image.image_id, image.certainty) for image in found.least_certain] == [(i, certainty[i]) for i in least]
    assert [image.image_id for image in found.outliers] == [i["image_id"] for i in rows if i["is_outlier"]][:6]
    agreements = [image["agreement"] for image in rows if image["agreement"] is not None]
    assert found.agreement_bins.tolist() == np.histogram(agreements, 25, (0, 1))[0].tolist()
    assert found.confidence_bins.sum() == len(rows)
    assert found.mean_agreement() == pytest.approx(np.mean(agreements))
    assert found.mean_confidence() == pytest.approx(np.mean([image["confidence"] for image in rows]))


def test_clusters_come_largest_first_and_shares_add_up() -> None:
    rows = content([assignments(300)]).clusters()
    assert [row["size"] for row in rows] == sorted((row["size"] for row in rows), reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows[-1] == {
        "cluster": 4, "size": 0, "share": 0.0, "confidence": None, "agreement": None, "num_outliers": 0
    }  # fmt: skip


def test_no_assignments_at_all_are_fine() -> None:
    found = content([assignments(0)])
    assert found.mean_agreement() is None
    assert found.least_certain == []
