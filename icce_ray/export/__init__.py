FORMATS = {
    "csv": "icce_ray.export.csv_file",
    "folders": "icce_ray.export.image_folders",
    "fiftyone": "icce_ray.export.fiftyone_dataset",
    "webdataset": "icce_ray.export.image_shards",
    "huggingface": "icce_ray.export.image_shards",
    "cleanlab": "icce_ray.export.cleanlab_files",
}
"""The module of each format. Its ``write(source, task) -> Written`` does the work."""
