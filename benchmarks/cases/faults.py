"""Runs that are killed, cut off from their storage, or find damaged results: how many end as if nothing had been.

Each case disturbs a whole run over 40 digits and, if that ends early, gives the same command again. It survives if the
run then has every image, no error, and bit by bit the assignments of an undisturbed run. The storage is an S3 server
over HTTP (moto, the `test` extra) behind a proxy. ``--set only=damage`` runs the cases whose names hold that word.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq

from cases.small_run import HERE, write_images

SETTINGS: dict[str, Any] = {"only": "", "num_images": 40, "outage_s": 10.0}
STAGES = ("images", "embed", "sample", "neighbors", "method", "consensus", "classifier", "assign")
TIMEOUT_S = 600.0
MARK = "ICCE_BENCHMARK_RUN"
"""Environment variable by which the processes of a run are known: they inherit it."""


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    survived: dict[str, bool] = {}
    with tempfile.TemporaryDirectory(prefix="icce_ray-faults-") as place, storage() as (endpoint, faults):
        bench = Bench(Path(place), endpoint, faults, settings)
        for name, case in cases(bench).items():
            if settings["only"] not in name:
                continue
            began = time.monotonic()
            problem = case(re.sub(r"\W+", "-", name))
            survived[name] = problem == ""
            print(f"{name:44} {time.monotonic() - began:6.1f} s  {problem or 'survived'}", flush=True)
    print(f"survived {sum(survived.values())} of {len(survived)}", flush=True)
    return {"survived": survived}, {"all survived, with nothing lost": all(survived.values())}


def cases(bench: Bench) -> dict[str, Callable[[str], str]]:
    """What each case does, by name: it returns what went wrong."""
    found: dict[str, Callable[[str], str]] = {}
    for before, stage in pairwise(STAGES):
        if stage != "sample":
            found[f"kill: driver in {stage}"] = lambda name, after=before: bench.kill(name, after, signal.SIGKILL, -9)
    found["kill: driver, SIGTERM"] = lambda name: bench.kill(name, "neighbors", signal.SIGTERM, 130)
    for what, code in (("gcs/gcs_server", 1), ("raylet/raylet", 1), ("ray::", 0)):
        found[f"kill: {what} while heads are trained"] = lambda name, what=what, code=code: bench.kill_below(
            name, what, code
        )
    found["outage: while images are read"] = lambda name: bench.outage(name, "images")
    found["outage: while results are written"] = lambda name: bench.outage(name, "neighbors")
    found["outage: half of all reads are refused"] = bench.throttle
    for stage in STAGES[:-1]:
        if stage != "sample":  # it writes nothing where there are few images
            found[f"damage: a byte of {stage}"] = lambda name, stage=stage: bench.damage(name, stage, flip)
    found["damage: a missing part"] = lambda name: bench.damage(name, "neighbors", Path.unlink)
    found["damage: a part cut off"] = lambda name: bench.damage(name, "embed", lambda path: os.truncate(path, 100))
    return found


class Bench:
    """A folder and a bucket of images, and the undisturbed result."""

    def __init__(self, place: Path, endpoint: str, faults: Any, settings: dict[str, Any]) -> None:
        self.place = place
        self.faults = faults
        self.outage_s = settings["outage_s"]
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.environment |= {"PYTHONPATH": str(HERE), "AWS_ENDPOINT_URL": endpoint, "ICCE_CACHE": str(place / "cache")}
        write_images(place, settings["num_images"])
        self.s3 = boto3.client("s3", endpoint_url=endpoint)
        self.s3.create_bucket(Bucket="digits")
        for path in (place / "images").rglob("*.png"):
            self.s3.put_object(Bucket="digits", Key=str(path.relative_to(place)), Body=path.read_bytes())
        assert self.start("undisturbed", "undisturbed")[0] == 0
        self.expected = self.assignments("undisturbed")

    def config(self, output: str, on_s3: bool = False, **changes: Any) -> Path:
        root = "s3://digits" if on_s3 else str(self.place)
        config = {
            "images": {"uri": f"{root}/images/"},
            "num_clusters": 4,
            "output": f"{root}/{output}",
            "embed": {"backbone": "pixels", "image_size": 8, "grayscale": True},
            "heads": {"num_heads": 4, "num_epochs": 40},
        }
        path = self.place / f"{output}.yaml"
        path.write_text(json.dumps(config | changes))
        return path

    def start(
        self, output: str, name: str, at: str = "", disturb: Callable[[int, str], None] | None = None, **options: Any
    ) -> tuple[int, str]:
        """Run the job, and disturb it when the stage `at` is done; returns its exit code and what it said."""
        command = [sys.executable, "-m", "icce_ray.run", str(self.config(output, **options))]
        mark = f"{name}-{time.monotonic()}"
        job = subprocess.Popen(
            command, cwd=self.place, env=self.environment | {MARK: mark}, stderr=subprocess.PIPE, text=True
        )
        assert job.stderr is not None
        said = ""
        for line in job.stderr:
            said += line
            if disturb is not None and line.startswith(f"{at}: done"):
                disturb(job.pid, mark)
                disturb = None
        return job.wait(TIMEOUT_S), said

    def kill(self, name: str, at: str, number: signal.Signals, code: int) -> str:
        got, said = self.start(name, name, at, lambda pid, mark: os.kill(pid, number))
        return self.wrong(f"exit code {got} instead of {code}: {said}" * (got != code), name)

    def kill_below(self, name: str, what: str, code: int) -> str:
        def disturb(pid: int, mark: str) -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(1)  # let the work begin
                found = [each for each, title in processes(mark) if what in title and each != pid]
                if found:
                    os.kill(found[-1], signal.SIGKILL)
                    return

        resources = {"num_cpus": 2}
        got, said = self.start(name, name, "neighbors", disturb, resources=resources)
        problem = f"exit code {got} instead of {code}: {said}" * (got != code)
        if code and not said.splitlines()[-1].startswith("error: method: Ray has died"):
            problem += f"no last line: {said}"
        return self.wrong(problem, name, resources=resources)

    def outage(self, name: str, at: str) -> str:
        def disturb(pid: int, mark: str) -> None:
            self.faults.away = True
            time.sleep(self.outage_s)
            self.faults.away = False

        got, said = self.start(name, name, at, disturb, on_s3=True)
        return self.wrong(f"exit code {got}: {said}" * (got != 0), name, on_s3=True)

    def throttle(self, name: str) -> str:
        self.faults.error_share = 0.5
        got, said = self.start(name, name, on_s3=True)
        self.faults.error_share = 0.0
        return self.wrong(f"exit code {got}: {said}" * (got != 0), name, on_s3=True)

    def damage(self, name: str, stage: str, harm: Callable[[Path], object]) -> str:
        shutil.copytree(self.place / "undisturbed", self.place / name)
        (folder,) = (self.place / name / stage).iterdir()
        parts = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
        harm(max(parts, key=lambda path: (path.suffix in (".npy", ".safetensors", ".parquet"), path.stat().st_size)))
        for later in (*STAGES[STAGES.index(stage) + 1 :], "evaluate", "report"):
            shutil.rmtree(self.place / name / later, ignore_errors=True)
        shutil.rmtree(self.place / "cache", ignore_errors=True)
        return self.wrong("", name)

    def wrong(self, problem: str, output: str, **options: Any) -> str:
        """Run the same command again, and say what is wrong then, or `problem`."""
        code, said = self.start(output, output, **options)
        if problem or code:
            return problem or f"exit code {code}: {said}"
        return "" if self.assignments(output, **options).equals(self.expected) else "other assignments"

    def assignments(self, output: str, on_s3: bool = False, **_: Any) -> pa.Table:
        if on_s3:
            listed = self.s3.list_objects_v2(Bucket="digits", Prefix=f"{output}/assign/").get("Contents", ())
            keys = [entry["Key"] for entry in listed if "/assignments/" in entry["Key"]]
            files = [self.s3.get_object(Bucket="digits", Key=key)["Body"].read() for key in sorted(keys)]
        else:
            files = [path.read_bytes() for path in sorted((self.place / output).glob("assign/*/assignments/*"))]
        table = pa.concat_tables(pq.read_table(pa.BufferReader(data)) for data in files)
        return table.drop_columns("uri").combine_chunks()


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, whose time stays as it was."""
    data, status = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def processes(mark: str) -> list[tuple[int, str]]:
    """The processes of a run, and their titles."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append((int(path.name), (path / "cmdline").read_text().replace("\0", " ").strip()))
        except OSError:
            continue
    return sorted(found)


@contextmanager
def storage() -> Iterator[tuple[str, Any]]:
    sys.path.insert(0, str(HERE / "tests" / "integration"))
    from storage_server import ACCESS_KEY, SECRET_KEY, Faults, faulty_proxy, moto_server

    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1"}
    faults = Faults("/digits/images/")
    with moto_server() as endpoint, faulty_proxy(endpoint, faults) as url:
        yield url, faults
