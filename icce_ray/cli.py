"""The command ``icce-ray``: cluster, run, sweep, compare, estimate, assign, apply, cut, export, forget, gc, status."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from icce_ray import __version__
from icce_ray.config import load_config
from icce_ray.errors import InputError
from icce_ray.export import FORMATS
from icce_ray.methods import METHODS
from icce_ray.pipeline.status import find_status
from icce_ray.run import add_arguments, add_options, guarded, run_command
from icce_ray.store import Folder
from icce_ray.store.run_records import read_records

OF_THE_PROGRAM = ("command", "function", "json", "debug")
"""Arguments that are not those of the command's function."""
RUN = "a run's YAML config, its output folder, or its record (runs/*.json)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    parsed = _parser().parse_args(arguments)
    return guarded(parsed.function, parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="icce-ray", description="Cluster image collections without labels.")
    parser.add_argument("--version", action="version", version=f"icce_ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], Any], purpose: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        added.set_defaults(function=function)
        return added

    run = command("run", run_command, "cluster the images of a config, or of the built-in demo")
    add_arguments(run)

    cluster = command("cluster", _call("photos:cluster_photos"), "cluster a folder of photos, without a config")
    cluster.add_argument("photos", metavar="PHOTOS", help="a folder, a bucket prefix, or a list of images")
    number = "number of clusters, or auto (the default)"
    cluster.add_argument("--clusters", dest="num_clusters", default="auto", metavar="N", help=number)
    cluster.add_argument(
        "--output", metavar="URI", help="where the results go (default: PHOTOS-clusters, beside the photos)"
    )
    cluster.add_argument("--no-open", dest="open_page", action="store_false", help="don't open the page in a browser")
    add_options(cluster)

    sweep = command("sweep", _sweep, "try settings of a config, judge the results without labels, pool the best")
    sweep.add_argument(
        "sweep", metavar="SWEEP", help="a YAML file with a base config, a search space and how to search it"
    )
    add_options(sweep)

    compare = command("compare", _compare, "run several methods on the same images, and compare their clusters")
    compare.add_argument("config", metavar="CONFIG", help="a YAML file")
    compare.add_argument("--methods", required=True, metavar="A,B,...", help=f"two or more of {', '.join(METHODS)}")
    compare.add_argument("--combine", action="store_true", help="also make one consensus of all methods")
    add_options(compare)

    assign = command("assign", _call("assign.new_images:assign_images"), "label new images with a finished run's model")
    assign.add_argument("run", metavar="RUN", help=f"{RUN}; or the folder of its model")
    source = assign.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="URI", help="a folder of images, or a list of them (.txt, .parquet)")
    source.add_argument(
        "--embeddings", metavar="URI", help="ready-made embeddings: .npy, or Parquet with a list column"
    )
    assign.add_argument("--output", metavar="URI", help="where the results go (default: the output of the run)")
    add_options(assign)

    apply = command(
        "apply", _call("apply:apply_corrections"), "take over corrections that were made on the page of a run"
    )
    apply.add_argument("run", metavar="RUN", help=RUN)
    apply.add_argument("corrections", metavar="FILE", help="the corrections.json that the page saved")
    add_options(apply, "json", "quiet", "debug")

    cut = command("cut", _cut, "merge a finished run's most confused clusters until N groups are left")
    cut.add_argument("run", metavar="RUN", help=RUN)
    cut.add_argument(
        "--clusters", type=int, required=True, metavar="N", help="number of groups, at most the number of clusters"
    )
    cut.add_argument(
        "--output", required=True, metavar="FILE", help="Parquet file to write: image_id, uri, cluster, group"
    )
    add_options(cut, "debug")

    export = command("export", _export, "take a finished run's images and clusters into other tools")
    export.add_argument("run", metavar="RUN", help=RUN)
    export.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    export.add_argument("--output", required=True, metavar="URI", help="an empty folder or prefix")
    export.add_argument("--clusters", metavar="3,7-9", help="only these clusters")
    export.add_argument("--min-agreement", type=float, metavar="X", help="only images at least this agreed on, 0 to 1")
    export.add_argument(
        "--copy", action="store_true", help="folders, fiftyone: copy image files on this machine instead of linking"
    )
    add_options(export, "quiet", "debug")

    forget = command(
        "forget", _call("forget:forget_images"), "remove images from a finished run and everything beside it"
    )
    forget.add_argument("run", metavar="RUN", help=RUN)
    forget.add_argument("--uris", required=True, metavar="FILE", help=".txt or .parquet list of the images")
    add_options(forget, "json", "quiet", "debug")

    gc = command(
        "gc", _call("collect_garbage:collect_garbage"), "list artifacts that no run refers to any more, or remove them"
    )
    gc.add_argument("output", metavar="OUTPUT", help="the output folder of runs")
    gc.add_argument("--delete", action="store_true", help="remove them")
    add_options(gc, "debug")

    estimate = command("estimate", _estimate, "say what each stage of a run will take: time, memory, storage")
    estimate.add_argument("config", metavar="CONFIG", help="a YAML file")
    estimate.add_argument(
        "--samples", type=int, default=256, metavar="N", help="number of images to embed (default: 256)"
    )
    add_options(estimate, "set", "json", "debug")

    status = command("status", _status, "show how far a run is and where its artifacts are")
    status.add_argument("target", metavar="CONFIG|OUTPUT", help="a YAML config, or an output folder")
    add_options(status, "set", "json", "debug")
    return parser


def _call(function: str) -> Callable[[argparse.Namespace], Any]:
    """A command that gives its arguments to a function, ``module:name``, by name. The module is imported when the
    command is run."""

    def call(arguments: argparse.Namespace) -> Any:
        given = {name: value for name, value in vars(arguments).items() if name not in OF_THE_PROGRAM}
        return resolve_name(f"icce_ray.{function}")(**given)

    return call


def _sweep(arguments: argparse.Namespace) -> Any:
    from icce_ray.sweeps.sweep import run_sweep
    from icce_ray.sweeps.sweep_config import load_sweep

    return run_sweep(load_sweep(arguments.sweep, arguments.overrides), quiet=arguments.quiet)


def _compare(arguments: argparse.Namespace) -> Any:
    from icce_ray.sweeps.method_comparison import compare_methods

    methods = [name.strip() for name in arguments.methods.split(",")]
    # The config may have settings of any of them, whatever its own method is.
    config = load_config(arguments.config, [*arguments.overrides, f"method=[{arguments.methods}]"])
    return compare_methods(config, methods, combine=arguments.combine, quiet=arguments.quiet)


def _cut(arguments: argparse.Namespace) -> str:
    from icce_ray.export.cut import write_cut

    num_images = write_cut(arguments.run, arguments.clusters, arguments.output)
    return f"{num_images:,} images in {arguments.clusters} groups: {arguments.output}"


def _export(arguments: argparse.Namespace) -> str:
    written = _call("export.export_run:export_run")(arguments)
    return str(written.sentence(arguments.output))


def _estimate(arguments: argparse.Namespace) -> Any:
    from icce_ray.pipeline.estimate import estimate

    if arguments.samples < 1:
        raise InputError(f"--samples {arguments.samples}: needed is at least 1")
    return estimate(load_config(arguments.config, arguments.overrides), num_samples=arguments.samples)


def _status(arguments: argparse.Namespace) -> str:
    root, runs = _find_runs(arguments)
    found = [find_status(root, name, folders) for name, folders in runs.items()]
    lines = [line for status in found for line in status.lines()]
    if arguments.json:
        lines.append(json.dumps([status.to_json() for status in found]))
    return "\n".join(lines)


def _find_runs(arguments: argparse.Namespace) -> tuple[Folder, dict[str, dict[str, Folder]]]:
    """The output folder, and for each run in it the folders of its artifacts by stage."""
    if arguments.target.endswith((".yaml", ".yml")) or Path(arguments.target).is_file():
        from icce_ray.pipeline.plan import plan, run_name

        config = load_config(arguments.target, arguments.overrides)
        planned = plan(config, lists=False)
        return Folder.at(config.output), {run_name(planned): {step.name: step.folder for step in planned}}
    records = read_records(arguments.target)
    if not records:
        raise InputError(f"{arguments.target}: no runs there; give the `output` of a run, or its config (.yaml)")
    root = Folder.reachable(arguments.target)
    return root, {
        record["run"]: {stage: root / stage / fingerprint for stage, fingerprint in record["stages"].items()}
        for record in records
    }
