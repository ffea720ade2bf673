"""Attach to Ray, or start it here, quietly and quickly.

A Ray that was already running is joined and left running. A Ray that we started ends with this process. A run that is
small enough uses neither: see :func:`runs_here`.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from icce_ray.config import ResourcesConfig
from icce_ray.errors import ResourceError
from icce_ray.runtime.machine import total_memory_bytes, usable_cpus
from icce_ray.runtime.ray_watch import Place, RayWatch, connect_to

MAX_IMAGES_HERE = 2_000
"""Starting Ray takes about as long as the work on so many small images."""
CONNECT_TIMEOUT_S = 10.0
MAX_OBJECT_STORE_BYTES = 2_000_000_000
MIN_OBJECT_STORE_BYTES = 100_000_000
OBJECT_STORE_MEMORY_FRACTION = 0.3

# Settings that make Ray quiet and quick. They are set when we connect, unless the user has set them, because Ray reads
# them in this process and hands them to its workers.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise two threads of a new worker may import pydantic at once, and one of them fails half-way.
    "RAY_preload_python_modules": "pydantic.main",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # otherwise Ray Data's way of creating actors logs an error about itself
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # its errors reach us as exceptions
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # otherwise each report of a worker waits two seconds for its answer
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor that tells workers what they would learn by their death
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # otherwise every worker without a GPU warns
}

_threads_here: int | None = None
"""Set inside :func:`run_here`."""
_started_here = False
"""Whether the Ray that this process is connected to was started by :func:`connect`."""
_watch: RayWatch | None = None


def runs_here(resources: ResourcesConfig, num_images: int) -> bool:
    """Whether a stage runs in this process, without Ray: inside :func:`run_here`, or if there are at most
    MAX_IMAGES_HERE images, `resources` asks for nothing, and there is no Ray to join. The result is the same."""
    if _threads_here is not None:
        return True
    return num_images <= MAX_IMAGES_HERE and resources == ResourcesConfig() and not joins_ray(resources)


@contextmanager
def run_here(num_threads: int) -> Iterator[None]:
    """While the block runs, stages run in this process, with this many threads: for a process that Ray started, such as
    one of several trials of a sweep."""
    global _threads_here
    _threads_here = num_threads
    try:
        yield
    finally:
        _threads_here = None


def threads_here() -> int:
    """Threads of a stage that runs in this process."""
    return _threads_here or usable_cpus()


def joins_ray(resources: ResourcesConfig) -> bool:
    """Whether this process uses a Ray that it did not start, or would by :func:`connect`."""
    return (is_connected() and not _started_here) or resources.ray_address is not None or "RAY_ADDRESS" in os.environ


def is_connected() -> bool:
    """Whether this process is connected to Ray. Does not import it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def connect(resources: ResourcesConfig) -> None:
    """Make Ray usable in this process. Calling it again changes nothing.

    Joined, in this order: the Ray this process is already connected to; the one at `resources.ray_address`; the one
    that RAY_ADDRESS names (inside a `ray job` it always does). If there is none, one is started here, and ends with
    this process. Raises ResourceError: nothing answers at the address."""
    global _started_here
    if is_connected():
        return
    for key, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(key, value)

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # in case it was imported before its variable was set
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = resources.ray_address or os.environ.get("RAY_ADDRESS")
    if resources.ray_address is not None:
        options["address"] = address
    elif not joins_ray(resources):
        options |= {
            "address": "local",
            "num_cpus": resources.num_cpus or usable_cpus(),
            "include_dashboard": False,
            "object_store_memory": resources.object_store_bytes or _object_store_bytes(),
        }
    try:
        if address is not None:
            _check_listens(address)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        with _stderr_only_on_failure():
            _init(options)
            _started_here = options.get("address") == "local"
        if threading.current_thread() is threading.main_thread():
            if callable(on_sigterm):  # Ray has put its own in its place
                signal.signal(signal.SIGTERM, on_sigterm)
            _watch_ray()
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        raise ResourceError(
            f"no Ray answers at {address!r}: {error}. Start one there (`ray start --head`), or unset "
            "resources.ray_address and RAY_ADDRESS to run on this machine alone"
        ) from None


def _init(options: dict[str, Any]) -> None:
    """Start or join Ray; try once more if it does not start in time. Raises ResourceError: it has not started in the
    last attempt either."""
    import ray

    for last in (False, True):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises a plain one
            if "timed out" not in str(error) or options.get("address") != "local":
                raise
            ray.shutdown()
            if last:
                raise ResourceError(
                    "Ray did not start in time: the machine is busy, or short of memory or disk. Run the same command "
                    "again later, stop other programs, or set resources.num_cpus to fewer CPUs"
                ) from None


def disconnect() -> None:
    """Leave the Ray that :func:`connect` joined, or end the one it started. Left to the interpreter's exit, Ray takes
    half a second longer for its log."""
    if _watch is not None:
        _watch.end()
    if is_connected() and lost_ray() is None:  # otherwise it would wait for what has died
        import ray

        ray.shutdown()


def lost_ray() -> str | None:
    """A message, if the Ray that this process is connected to has died."""
    return None if _watch is None else _watch.lost


def exit_if_ray_dies() -> None:
    """For a program that has nothing else to do: Ray that has died may leave the main thread waiting."""
    RayWatch.may_exit = True


def _watch_ray() -> None:
    import ray

    global _watch
    context = ray.get_runtime_context()
    address = context.gcs_address
    host, _, port = address.rpartition(":")
    places = {"GCS": (host, int(port))}
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    for node in nodes:
        if node["NodeID"] == context.get_node_id():
            places["raylet"] = (node["NodeManagerAddress"], node["NodeManagerPort"])

    def ask(place: Place) -> None:
        if is_connected() and ray.get_runtime_context().gcs_address == address:
            connect_to(place)
        else:  # the program has left that Ray by itself
            watch.end()

    if _watch is not None:
        _watch.end()
    watch = _watch = RayWatch(places, ask=ask)
    watch.start()


def _check_listens(address: str) -> None:
    """Fail at once if nothing listens at the address: Ray itself would try for many minutes."""
    host, separator, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


@contextmanager
def _stderr_only_on_failure() -> Iterator[None]:
    """Hold back what Ray's C++ writes to stderr while it starts, such as that it was told to be quiet."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(original, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)


def _object_store_bytes() -> int:
    wanted = min(MAX_OBJECT_STORE_BYTES, int(OBJECT_STORE_MEMORY_FRACTION * total_memory_bytes()))
    try:
        shared = int(0.9 * shutil.disk_usage("/dev/shm").free)
    except OSError:
        return wanted
    # A store larger than /dev/shm goes to disk and is slow; one below Ray's minimum does not start.
    return min(wanted, shared) if shared >= MIN_OBJECT_STORE_BYTES else wanted
