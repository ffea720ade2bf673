"""The job: ``python -m icce_ray.run [CONFIG] [--set a.b=c ...] [--json]``.

Without CONFIG it runs the built-in demo. Exit codes: 0 done; 2 a user error, explained in one message; 1 any other
error, with the cause on the last line; 130 interrupted.
"""

import argparse
import errno
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any, TextIO

from icce_ray.config import Config, load_config
from icce_ray.errors import UserError, describe_cause, find_cause
from icce_ray.runtime.ray_cluster import disconnect, exit_if_ray_dies, is_connected, lost_ray

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT)
PLACE_ERRORS = (*FULL, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.EACCES)
"""Errors of the file system that the user has to fix."""
OPTIONS: dict[str, dict[str, Any]] = {
    "set": {
        "action": "append",
        "default": [],
        "metavar": "A.B=C",
        "dest": "overrides",
        "help": "override one setting, e.g. heads.num_heads=16; may be repeated",
    },
    "json": {"action": "store_true", "help": "print the result as JSON on the last line of stdout"},
    "quiet": {"action": "store_true", "help": "no progress and no summary on stderr"},
    "debug": {"action": "store_true", "help": "print the traceback of an error"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m icce_ray.run", description=(__doc__ or "").split("\n\n")[0])
    add_arguments(parser)
    return guarded(run_command, parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the job, which ``icce-ray run`` has too."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file; the built-in demo if left out")
    parser.add_argument(
        "--refresh",
        action="store_true",
        help="look for new images: known images keep their ids, new ones get the next (object storage is otherwise "
        "listed once per output; a change on a local disk otherwise numbers all images anew)",
    )
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="try the images of a finished run's errors table again; those that can be read now are added",
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add those options that several commands have; without `names` all of them."""
    for name in names or OPTIONS:
        parser.add_argument(f"--{name}", **OPTIONS[name])


def run_command(arguments: argparse.Namespace) -> Any:
    """Load the config and run it."""
    from icce_ray.pipeline.run import run_pipeline

    if arguments.config is None:
        config = _prepare_demo(arguments)
    else:
        config = load_config(arguments.config, arguments.overrides)
    return run_pipeline(config, refresh=arguments.refresh, retry_errors=arguments.retry_errors, quiet=arguments.quiet)


def guarded(command: Callable[[argparse.Namespace], Any], arguments: argparse.Namespace) -> int:
    """Print what `command` returns on stdout, or turn its exception into a message and an exit code. It returns text,
    or a dataclass: its lines are printed, if it has any, and its JSON with ``--json``."""
    exit_if_ray_dies()
    try:
        # Ray tells drivers of lost machines, and the like, on stdout.
        with _interruptible(), redirect_stdout(_WithoutRay(sys.stderr)):
            output = _call(command, arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; finished work is kept, and the same command resumes", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        mistake = find_cause(error, UserError) or _unusable_place(error)
        print(f"error: {mistake or describe_cause(error)}", file=sys.stderr, flush=True)
        if lost_ray() is not None:  # its own exit would wait for what has died
            os._exit(EXIT_FAILED)
        return EXIT_USER_ERROR if mistake else EXIT_FAILED
    if output:
        try:
            print(output, flush=True)
        except BrokenPipeError:  # such as `icce-ray status ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _unusable_place(error: Exception) -> str | None:
    """The message for an error about a place that the user named, such as a full disk or a file in place of a folder.
    None if the error is another one."""
    cause = find_cause(error, OSError)
    if not isinstance(cause, OSError) or cause.errno not in PLACE_ERRORS:
        return None
    remedy = "free some space, and give the same command again" if cause.errno in FULL else "give another place"
    return f"{' '.join(str(cause).split())}; {remedy}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM interrupts like Ctrl-C. A second one ends the program at once, whatever it is waiting for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        os._exit(EXIT_INTERRUPTED)

    def interrupt(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, leave)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not isinstance(sys.exception(), KeyboardInterrupt):  # then the program ends, and may be told to hurry
            for number, handler in before.items():
                signal.signal(number, handler)


class _WithoutRay:
    """A stream without Ray's own messages, such as ``(raylet) A worker died``: what matters in them reaches us as an
    exception."""

    MESSAGE = re.compile(r"(\x1b\[\d+m)?\(raylet")

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_dropping = False

    def write(self, text: str) -> int:
        if self.MESSAGE.match(text):
            self._is_dropping = True
        elif not self._is_dropping:
            self._stream.write(text)
        elif text.endswith("\n"):  # the end of what a single print has written
            self._is_dropping = False
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _call(command: Callable[[argparse.Namespace], Any], arguments: argparse.Namespace) -> str:
    """Call the command, and leave the Ray that it has connected to. Returns its text: the lines of its result, if that
    has any, and the result as JSON with ``--json``."""
    was_connected = is_connected()
    try:
        result = command(arguments)
    finally:
        if is_connected() and not was_connected:
            disconnect()
    if isinstance(result, str):
        return result
    lines: list[str] = result.lines() if hasattr(result, "lines") else []
    if getattr(arguments, "json", False):
        lines.append(json.dumps(result.to_json() if hasattr(result, "to_json") else asdict(result)))
    return "\n".join(lines)


def _prepare_demo(arguments: argparse.Namespace) -> Config:
    from icce_ray.demo import DEMO_IMAGES, demo_config, write_demo_images

    config = load_config(None, arguments.overrides, base=demo_config())
    if config.images.uri == DEMO_IMAGES:
        num_images = write_demo_images(DEMO_IMAGES)
        what = f"scikit-learn's {num_images:,} handwritten digits, written as PNG files to {DEMO_IMAGES}"
    else:
        what = f"{config.images.uri or config.embeddings.uri} with the demo's settings"
    if not arguments.quiet:
        print(
            f"No config given, so this is the built-in demo: {what}, are clustered by their pixels into "
            f"{'a number of' if config.is_auto else config.num_clusters} clusters; results go to {config.output}",
            file=sys.stderr,
            flush=True,
        )
    return config


if __name__ == "__main__":
    sys.exit(main())
