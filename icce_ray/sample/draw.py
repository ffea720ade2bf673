"""Which images take part in training (METHOD section 8).

Neighbours, heads, consensus and classifier need no more than a few million images; all others are labelled by the
classifier in a stream. Above `heads.max_images` the stage before them draws a uniform sample and writes its embeddings
as an artifact of the same form, so that they need not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.store import Artifact, ArtifactWriter, Part

PART_PREFIX = "part-"
MIN_ROWS_PER_PART = 16_384


@dataclass(frozen=True)
class SamplePart:
    """One part of the sample: what it takes from which embedding parts."""

    name: str
    sources: tuple[str, ...]
    rows: tuple[npt.NDArray[np.int64], ...]
    """Ascending row numbers within each of the sources."""

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows in self.rows)


def sample_rows(num_images: int, max_images: int | None, seed: int) -> npt.NDArray[np.int64] | None:
    """Rows drawn uniformly without replacement, ascending, (max_images,) int64; None where all take part."""
    if max_images is None or num_images <= max_images:
        return None
    generator = np.random.default_rng([seed, num_images])
    return np.sort(generator.choice(num_images, max_images, replace=False, shuffle=False))


def plan_parts(embed: Artifact, rows: npt.NDArray[np.int64]) -> list[SamplePart]:
    """The sample's parts: consecutive embedding parts, together until they hold enough drawn rows."""
    parts: list[SamplePart] = []
    sources: list[str] = []
    taken: list[npt.NDArray[np.int64]] = []
    names = embed.part_names(PART_PREFIX)
    first_row = 0
    for name in names:
        num_rows = embed.part(name).rows or 0
        first, last = np.searchsorted(rows, [first_row, first_row + num_rows])
        if last > first:
            sources.append(name)
            taken.append(rows[first:last] - first_row)
        first_row += num_rows
        if sum(map(len, taken)) >= MIN_ROWS_PER_PART or (name == names[-1] and taken):
            parts.append(SamplePart(f"{PART_PREFIX}{len(parts):05d}.parquet", tuple(sources), tuple(taken)))
            sources, taken = [], []
    return parts


def write_part(part: SamplePart, embed: Artifact, writer: ArtifactWriter) -> Part:
    """Write one part of the sample; the schema is that of the embeddings."""
    tables = [embed.read_table(name).take(pa.array(rows)) for name, rows in zip(part.sources, part.rows, strict=True)]
    return writer.write_table(part.name, pa.concat_tables(tables))


def training_set(inputs: Mapping[str, Artifact]) -> Artifact:
    """The embeddings that training sees: the sample's, or all where none was drawn."""
    sample = inputs.get("sample")
    return sample if sample is not None and sample.part_names(PART_PREFIX) else inputs["embed"]


def sampled_ids(inputs: Mapping[str, Artifact]) -> npt.NDArray[np.int64] | None:
    """Ascending image ids of the sample, (n,) int64; None where all images take part."""
    sample = inputs.get("sample")
    names = sample.part_names(PART_PREFIX) if sample is not None else []
    if sample is None or not names:
        return None
    return np.concatenate([sample.read_table(name)["image_id"].to_numpy() for name in names])


def spread(
    values_n: npt.NDArray[Any], ids_n: npt.NDArray[np.int64], image_ids: npt.NDArray[np.int64], fill: Any
) -> npt.NDArray[Any]:
    """`values_n` of the sampled images `ids_n` (ascending) at `image_ids`; `fill` for those that were not drawn."""
    position = np.minimum(np.searchsorted(ids_n, image_ids), len(ids_n) - 1)
    return np.where(ids_n[position] == image_ids, values_n[position], fill).astype(values_n.dtype)
