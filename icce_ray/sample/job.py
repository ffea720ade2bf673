"""The sample stage on Ray: tasks look for near-duplicates and copy the rows that are trained on.

A killed run resumes with the parts that it has. Intermediate results lie in a folder of their own, which is removed at
the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from icce_ray.config import Config, ResourcesConfig
from icce_ray.embed.embedding_parts import ERRORS_NAME
from icce_ray.embed.feature_matrix import load_features
from icce_ray.runtime.progress import Progress
from icce_ray.runtime.workers import run_tasks
from icce_ray.sample import near_duplicates as near
from icce_ray.sample.stage import SAMPLE
from icce_ray.sample.training_set import (
    GROUPS_NAME,
    IMAGE_IDS_NAME,
    PAIRS_NAME,
    PART_PREFIX,
    TrainingPart,
    plan_parts,
    sample_ids,
    source_digest,
    write_part,
)
from icce_ray.sample.unit_features import Ids
from icce_ray.stage import StageContext
from icce_ray.store import Artifact, ArtifactWriter, Folder, PartRecord, PartRecords

ROWS_PER_TASK = 65_536
"""Rows projected by a task."""

Setting = float | Literal["auto"]
R = TypeVar("R")


def run(config: Config, context: StageContext) -> dict[str, Any]:
    """Write the lists of near-duplicates and, unless all images are trained on, the embeddings of those that are.

    Returns the metrics of the embeddings, with num_images (trained on), num_embedded and, if near-duplicates are looked
    for, duplicate_threshold, num_duplicate_pairs, num_left_out (near-duplicates of images that are trained on). Raises
    InputError: features that are not finite, or fewer than two; WorkerError: as :func:`run_tasks`."""
    embed, output, threshold = context.inputs["embed"], context.output, config.sample.duplicate_threshold
    num_embedded = int(embed.num_rows(PART_PREFIX).sum())
    metrics = dict(embed.metrics) | {"num_embedded": num_embedded, "num_images": num_embedded}
    failed_ids = np.sort(embed.read_table(ERRORS_NAME)["image_id"].to_numpy())
    drawn_ids = sample_ids(num_embedded, config.sample.max_images, config.seed, failed_ids)
    if drawn_ids is None and threshold is None:
        return metrics
    rows = None if drawn_ids is None else drawn_ids - np.searchsorted(failed_ids, drawn_ids)
    num_images = num_embedded if rows is None else len(rows)
    work = Tasks(config.resources, num_embedded, context.progress)
    temporary = output.folder / "search"
    source = embed
    if threshold is not None:
        if rows is not None:
            source = _drawn(embed, rows, temporary / "drawn", work)
        found = _find_near_duplicates(source, threshold, temporary, work)
        image_ids = load_features(source).image_ids
        output.write_table(PAIRS_NAME, near.pair_table(found.pairs, image_ids))
        output.write_table(GROUPS_NAME, near.group_table(found.leader_N, image_ids))
        if rows is not None or len(found.followers):
            rows = found.leaders
            drawn_ids = image_ids[rows]
        num_images = len(found.leaders)
        metrics |= {"duplicate_threshold": found.threshold, "num_duplicate_pairs": len(found.pairs)}
        metrics |= {"num_left_out": len(found.followers)}
    if rows is not None and drawn_ids is not None:
        output.write_array(IMAGE_IDS_NAME, drawn_ids)
        records = PartRecords(output.folder, source_digest(source, SAMPLE.version))
        for record in _copy_rows(source, rows, records, work):
            for file in record.files:
                output.add(file)
        records.clear()
    temporary.clear()
    return metrics | {"num_images": num_images}


@dataclass
class Tasks:
    """Calls a function with several items, in Ray tasks or in this process; keeps the progress informed."""

    resources: ResourcesConfig
    num_images: int
    progress: Progress

    def map(self, what: str, function: Callable[..., R], items: Sequence[Any], *shared: Any) -> list[R]:
        """``function(item, *shared)`` for each item, in their order."""
        results: list[R] = []
        for _, result in run_tasks(
            SAMPLE.name, function, items, shared,
            resources=self.resources, num_images=self.num_images, name=what, in_order=True,
        ):  # fmt: skip
            results.append(result)
            self.progress.update(self.num_images * len(results) // len(items), self.num_images, what)
        return results


def _drawn(embed: Artifact, rows: Ids, folder: Folder, work: Tasks) -> Artifact:
    """The drawn rows as an artifact, so that every machine can load them as a matrix."""
    Artifact.discard_damage(folder)
    finished, source = Artifact.find(folder), source_digest(embed, SAMPLE.version)
    if finished is not None:
        if finished.fingerprint == source:
            return finished
        folder.clear()  # of other embeddings
    writer = ArtifactWriter(folder)
    for record in _copy_rows(embed, rows, PartRecords(folder, source), work):
        writer.add(record.files[0])
    return writer.commit(
        stage=SAMPLE.name, fingerprint=source, inputs={}, config={}, metrics=embed.metrics, seconds=0.0
    )


def _copy_rows(source: Artifact, rows: Ids, records: PartRecords, work: Tasks) -> list[PartRecord]:
    finished, parts = records.read_all(), plan_parts(source, rows)
    missing = [part for part in parts if part.name not in finished]
    finished |= {record.name: record for record in work.map("copy", _copy_part, missing, source, records)}
    return [finished[part.name] for part in parts]


def _copy_part(part: TrainingPart, source: Artifact, records: PartRecords) -> PartRecord:
    return records.write(part.name, [write_part(part, source, ArtifactWriter(records.folder))], {})


def _find_near_duplicates(source: Artifact, setting: Setting, folder: Folder, work: Tasks) -> near.NearDuplicates:
    records = PartRecords(folder, source_digest(source, SAMPLE.version))
    record = records.read("projected")
    projected = (
        _project(source, setting, records, work)
        if record is None
        else near.from_bytes(near.ProjectedRows, folder.read_bytes(record.files[0].name))
    )
    finished = records.read_all()
    parts = {f"pairs-{number:05d}": ends for number, ends in enumerate(projected.parts)}
    missing = [(name, *ends) for name, ends in parts.items() if name not in finished]
    work.map("near-duplicates", _find_pairs, missing, source, projected, records)
    found = [near.from_bytes(near.DuplicatePairs, folder.read_bytes(f"{name}.npz")) for name in parts]
    return near.group(projected, found)


def _project(source: Artifact, setting: Setting, records: PartRecords, work: Tasks) -> near.ProjectedRows:
    (plan,) = work.map("measure", _plan_search, [setting], source)
    num_images = load_features(source).num_images
    starts = range(0, num_images, ROWS_PER_TASK)
    made = work.map("project", _project_rows, [(start, start + ROWS_PER_TASK) for start in starts], source, plan)
    projected_NM, digests_N = (np.concatenate(column) for column in zip(*made, strict=True))
    projected = near.sort_rows(plan, projected_NM, digests_N)
    # Written down, since another machine might round the coordinates otherwise and cut other parts.
    file = ArtifactWriter(records.folder).write_bytes("projected.npz", near.to_bytes(projected))
    records.write("projected", [file], {})
    return projected


def _plan_search(setting: Setting, source: Artifact) -> near.SearchPlan:
    return near.plan_search(load_features(source).matrix, setting)


def _project_rows(ends: tuple[int, int], source: Artifact, plan: near.SearchPlan) -> Any:
    return near.project_rows(load_features(source).matrix, plan, *ends)


def _find_pairs(
    part: tuple[str, int, int], source: Artifact, projected: near.ProjectedRows, records: PartRecords
) -> None:
    name, start, stop = part
    pairs = near.find_pairs(load_features(source).matrix, projected, start, stop)
    records.write(name, [ArtifactWriter(records.folder).write_bytes(f"{name}.npz", near.to_bytes(pairs))], {})
