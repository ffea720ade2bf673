"""A dataset for FiftyOne: the assignments and embeddings of the images, and two brain keys: `icce_map`, the first two
principal components, and `icce_similarity`, for sorting by similarity.

    dataset = fiftyone.Dataset.from_dir(dataset_dir=OUTPUT, dataset_type=fiftyone.types.FiftyOneDataset)

Images on this machine are referred to where they are; others, and all with `copy`, are copied to ``data/``.
"""

import base64
import io
import json
import zlib
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from icce_ray.export.export_run import ExportTask, Written
from icce_ray.export.image_folders import NotReadError, placer
from icce_ray.export.selected_images import Row, SelectedImages, is_local_file, map_rows

FORMAT_VERSION = "1.0.0"
"""FiftyOne's version of this layout; later versions migrate it."""
IMAGES_PER_FOLDER = 10_000
MAX_PCA_ROWS = 20_000
FIELDS = "fiftyone.core.fields"
BASE_FIELDS = {
    "id": "ObjectIdField",
    "filepath": "StringField",
    "tags": "ListField",
    "metadata": "EmbeddedDocumentField",
    "created_at": "DateTimeField",
    "last_modified_at": "DateTimeField",
}
LABEL_FIELDS = {
    "id": "ObjectIdField",
    "tags": "ListField",
    "label": "StringField",
    "consensus_probability": "FloatField",
    "logits": "VectorField",
}
MAP_KEY, SIMILARITY_KEY = "icce_map", "icce_similarity"


def write(source: SelectedImages, task: ExportTask) -> Written:
    num_wanted, problems = source.count(), list[str]()
    mean_D, axes_D2 = _principal_axes(source, num_wanted)
    place = placer(task.output, lambda row: f"data/{row['image_id'] // IMAGES_PER_FOLDER:06d}", link=False)

    def file_of(row: Row) -> str | NotReadError:
        return row["uri"] if is_local_file(row["uri"]) and not task.copy else place(row)

    now = {"$date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")}
    points, sample_ids = list[npt.NDArray[np.float64]](), list[str]()
    with task.output.writing("samples.json") as file:
        file.write(b'{"samples": [')
        for table, features_nD in source.tables_with_features():
            points_n2 = (features_nD.astype(np.float64) - mean_D) @ axes_D2
            for number, (row, name) in enumerate(map_rows(file_of, table.to_pylist())):
                if isinstance(name, NotReadError):
                    problems.append(f"{row['uri']}: {name}")
                    continue
                file.write(b",\n" if sample_ids else b"\n")
                label = source.labels.get(row["cluster"], "noise")
                file.write(json.dumps(_sample(row, label, name, features_nD[number], now)).encode())
                sample_ids.append(_object_id("sample", row["image_id"]))
                points.append(points_n2[number])
            task.progress.update(len(sample_ids) + len(problems), num_wanted, num_errors=len(problems))
        file.write(b"\n]}\n")
    results = {
        MAP_KEY: {
            "cls": "fiftyone.brain.visualization.VisualizationResults",
            "points": _packed(np.array(points).reshape(-1, 2)),
            "sample_ids": _packed(np.array(sample_ids, dtype="<U24")),
            "label_ids": None,
        },
        SIMILARITY_KEY: {"cls": "fiftyone.brain.internal.core.sklearn.SklearnSimilarityIndex"},
    }
    for key, result in results.items():
        task.output.write_bytes(f"brain/{key}.json", json.dumps(result).encode())
    task.output.write_bytes("metadata.json", json.dumps(_metadata(source.schema, now), indent=1).encode())
    return Written(len(sample_ids), len(problems), problems[0] if problems else "")


def _sample(row: Row, label: str, file: str, features_D: npt.NDArray[Any], now: dict[str, str]) -> dict[str, Any]:
    others = {name: value for name, value in row.items() if name not in ("cluster", "uri")}
    cluster = {"_cls": "Classification", "tags": [], "label": label}
    return {
        "_id": {"$oid": _object_id("sample", row["image_id"])},
        "filepath": file,
        "tags": [],
        "_media_type": "image",
        "_rand": row["image_id"] * 0.6180339887 % 1.0,
        "cluster": {"_id": {"$oid": _object_id("label", row["image_id"])}, **cluster},
        "uri": row["uri"],
        **others,
        "embedding": {"$binary": {"base64": _packed(features_D.astype(np.float32)), "subType": "00"}},
        "created_at": now,
        "last_modified_at": now,
    }


def _metadata(schema: pa.Schema, now: dict[str, str]) -> dict[str, Any]:
    """The document of the dataset: its fields and brain keys."""
    kinds = {field.name: _field_type(field.type) for field in schema if field.name != "cluster"}
    fields = [_field(name, kind, now) for name, kind in {**BASE_FIELDS, **kinds, "embedding": "VectorField"}.items()]
    label = _field("cluster", "EmbeddedDocumentField", now)
    label["embedded_doc_type"] = "fiftyone.core.labels.Classification"
    label["fields"] = [_field(name, kind, now) for name, kind in LABEL_FIELDS.items()]
    by_name = {field["name"]: field for field in fields}
    by_name["metadata"]["embedded_doc_type"] = "fiftyone.core.metadata.ImageMetadata"
    visualization = {
        "cls": "fiftyone.brain.visualization.ManualVisualizationConfig",
        "type": "visualization",
        "method": "manual",
        "num_dims": 2,
    }
    similarity = {
        "cls": "fiftyone.brain.internal.core.sklearn.SklearnSimilarityConfig",
        "type": "similarity",
        "method": "sklearn",
        "embeddings_field": "embedding",
        "supports_prompts": False,
        "metric": "cosine",
    }
    return {
        "version": FORMAT_VERSION,
        "media_type": "image",
        "tags": [],
        "info": {"source": "icce_ray"},
        "sample_fields": [*fields, label],
        "brain_methods": {
            key: {"key": key, "version": FORMAT_VERSION, "timestamp": now, "config": config}
            for key, config in ((MAP_KEY, visualization), (SIMILARITY_KEY, similarity))
        },
    }


def _field(name: str, kind: str, now: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "ftype": f"{FIELDS}.{kind}",
        "embedded_doc_type": None,
        "subfield": f"{FIELDS}.StringField" if kind == "ListField" else None,
        "fields": [],
        "db_field": "_id" if name == "id" else name,
        "read_only": kind == "DateTimeField",
        "created_at": now,
    }


def _field_type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "BooleanField"
    if pa.types.is_integer(kind):
        return "IntField"
    return "FloatField" if pa.types.is_floating(kind) else "StringField"


def _object_id(kind: str, image_id: int) -> str:
    """An id of 12 bytes, the same each time."""
    return f"{zlib.crc32(kind.encode()):08x}{image_id:016x}"


def _packed(array: npt.NDArray[Any]) -> str:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return base64.b64encode(zlib.compress(sink.getvalue())).decode()


def _principal_axes(source: SelectedImages, num_images: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean (D,) and first two principal axes (D, 2) of the features, from at most MAX_PCA_ROWS evenly spaced rows."""
    every, start, taken = -(-num_images // MAX_PCA_ROWS), 0, []
    for _, features_nD in source.tables_with_features():
        taken.append(features_nD[-start % every :: every].astype(np.float64))
        start += len(features_nD)
    rows_nD = np.concatenate(taken)
    mean_D = rows_nD.mean(axis=0)
    axes_DD = np.linalg.eigh(np.cov(rows_nD - mean_D, rowvar=False, bias=True).reshape(rows_nD.shape[1], -1))[1]
    axes_D2 = axes_DD[:, :-3:-1]
    signs_2 = np.sign(axes_D2[np.abs(axes_D2).argmax(axis=0), range(axes_D2.shape[1])])
    return mean_D, axes_D2 * signs_2
