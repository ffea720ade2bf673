"""Shards of images with their clusters: tar files in WebDataset's layout, or Parquet as Hugging Face's datasets reads
it.

Each shard is made in memory, written at once and recorded, so an export that was cut off resumes after its last shard.
"""

import io
import json
import tarfile
from collections.abc import Callable
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from icce_ray.export.export_run import ExportTask, Written
from icce_ray.export.selected_images import Row, SelectedImages, extension, map_rows
from icce_ray.images.read_images import read_image
from icce_ray.store import ArtifactWriter, PartRecords

MAX_SHARD_IMAGES = 10_000
MAX_SHARD_BYTES = 256 * 2**20
VALUE_TYPES = {"double": "float64", "float": "float32"}
"""Arrow types that datasets calls by another name."""

Encode = Callable[[list[tuple[Row, bytes]]], bytes]


def write(source: SelectedImages, task: ExportTask) -> Written:
    name_of, encode = {
        "webdataset": ("images-{:06d}.tar", encode_tar),
        "huggingface": ("data/train-{:06d}.parquet", parquet_encoder(source)),
    }[task.to]
    writer, records = ArtifactWriter(task.output), PartRecords(task.output, task.digest)
    finished = [record.metrics for record in records.read_all().values()]
    num_done, num_wanted = sum(metrics["num_rows"] for metrics in finished), source.count()
    num_errors = sum(len(metrics["problems"]) for metrics in finished)
    shard, problems, num_rows, num_bytes = list[tuple[Row, bytes]](), list[str](), 0, 0

    def end_shard() -> None:
        nonlocal num_rows, num_bytes
        index = len(finished)
        part = writer.write_bytes(name_of.format(index), encode(shard))
        finished.append({"num_rows": num_rows, "num_images": len(shard), "problems": [*problems]})
        records.write(f"shard-{index:06d}", [part], finished[-1])
        shard.clear()
        problems.clear()
        num_rows = num_bytes = 0

    for row, data in map_rows(lambda row: read_image(row["uri"]), islice(source.rows(), num_done, None)):
        if isinstance(data, str):
            problems.append(f"{row['uri']}: {data}")
            num_errors += 1
        else:
            if shard and (len(shard) == MAX_SHARD_IMAGES or num_bytes + len(data) > MAX_SHARD_BYTES):
                end_shard()
            shard.append((row, data))
            num_bytes += len(data)
        num_rows += 1
        num_done += 1
        task.progress.update(num_done, num_wanted, num_errors=num_errors)
    if num_rows:
        end_shard()
    records.clear()
    said = [problem for metrics in finished for problem in metrics["problems"]]
    return Written(sum(metrics["num_images"] for metrics in finished), len(said), said[0] if said else "")


def encode_tar(shard: list[tuple[Row, bytes]]) -> bytes:
    """For each image three files: ``<image_id>.<ending>``, ``.cls`` with its cluster, ``.json`` with its row."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for row, data in shard:
            files = {
                extension(row["uri"], data): data,
                "cls": str(row["cluster"]).encode(),
                "json": json.dumps(row).encode(),
            }
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{row['image_id']:010d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def parquet_encoder(source: SelectedImages) -> Encode:
    """Encodes images as Parquet with the features that datasets reads from its metadata: `image`, `cluster` as a class
    label, and the other columns of the assignments."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [field.with_type(pa.int64()) if field.name == "cluster" else field for field in source.schema]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for field in columns:
        kind = str(field.type)
        features[field.name] = {"dtype": VALUE_TYPES.get(kind, kind), "_type": "Value"}
    features["cluster"] = {"names": [*source.labels.values()], "_type": "ClassLabel"}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = pa.schema([pa.field("image", image), *columns], metadata=metadata)

    def encode(shard: list[tuple[Row, bytes]]) -> bytes:
        rows = [
            {"image": {"bytes": data, "path": f"{row['image_id']}.{extension(row['uri'], data)}"}, **row}
            for row, data in shard
        ]
        sink = io.BytesIO()
        # Small row groups, so that a viewer can show some images without reading them all.
        pq.write_table(pa.Table.from_pylist(rows, schema), sink, row_group_size=100)
        return sink.getvalue()

    return encode
