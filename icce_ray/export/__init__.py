FORMATS = {
    "csv": "icce_ray.export.table_files:write_csv",
    "folders": "icce_ray.export.image_folders:write",
    "fiftyone": "icce_ray.export.fiftyone_dataset:write",
    "webdataset": "icce_ray.export.image_shards:write",
    "huggingface": "icce_ray.export.image_shards:write",
    "cleanlab": "icce_ray.export.table_files:write_for_cleanlab",
}
"""The function of each format, from the images and the task to :class:`~icce_ray.export.export_run.Written`."""
