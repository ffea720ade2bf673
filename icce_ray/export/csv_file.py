"""``assignments.csv``: all columns of the assignments, a row per image."""

import pyarrow.csv as pacsv

from icce_ray.export.export_run import ExportTask, Written
from icce_ray.export.selected_images import SelectedImages
from icce_ray.export.streams import written_whole


def write(source: SelectedImages, task: ExportTask) -> Written:
    num_images, num_wanted = 0, source.count()
    with written_whole(task.output, "assignments.csv") as file, pacsv.CSVWriter(file, source.schema) as writer:
        for table in source.tables():
            writer.write_table(table)
            num_images += len(table)
            task.progress.update(num_images, num_wanted)
    return Written(num_images)
