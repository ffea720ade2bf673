"""A whole run on a cluster of several hosts, then the same while one host after the other loses power; what was seen,
as JSON on the last line. Run by test_many_nodes.py, in namespaces of its own where that is possible.

Images and output lie in a bucket, on an S3 endpoint that all hosts reach; nothing else is shared. The driver runs on
the head, which has no CPUs; the work lands on the others. In the second run, each of the stages in `KILLED_IN` costs
the host that was found at work on it, and a fresh host joins in its place.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from icce_ray.config import Config
from icce_ray.pipeline import PlannedStage, plan, run_name
from icce_ray.status import find_status
from icce_ray.store import Folder

from .hosts import Host, Hosts, at_work, process_table, title
from .storage_server import ACCESS_KEY, SECRET_KEY, client, moto_server

AT_WORK = {
    "embed": r"MapBatches\(decode\)|MapWorker\(MapBatches\(Embedder\)\)\.submit",
    "neighbors": r"ShardWorker\.(audit|answer|make)",
    "heads": r"RayTrainWorker.*",  # it trains beside what it is asked by Ray
    "consensus": r"consensus: .+",
    "assign": r"MapWorker\(MapBatches\(Labeler\)\)\.submit",
}
"""What Ray's workers call themselves while they work for a stage."""
KILLED_IN = tuple(AT_WORK)
NUM_IMAGES, NUM_CLUSTERS = 240, 3
SETTINGS: dict[str, Any] = {
    "num_clusters": NUM_CLUSTERS,
    "images": {"uri": "s3://photos/"},
    "embed": {"backbone": "pixels", "image_size": 8, "images_per_part": 16},
    "neighbors": {"min_neighbors": 10, "max_neighbors": 60},
    "heads": {
        "num_heads": 4,
        "num_epochs": 15,
        "batch_size": 64,
        "warmup_epochs": 1,
        "hidden_dim": 64,
        "bottleneck_dim": 32,
        "learning_rate": 0.002,
        "precision": "float32",
        "checkpoint_interval_s": 0.2,
    },
    "classifier": {"num_iterations": 100},
    "assign": {"rows_per_part": 20},
    "resources": {
        "embed": {"num_workers": 3, "cpus_per_worker": 1},
        "neighbors": {"num_workers": 3, "cpus_per_worker": 1},
        "heads": {"num_workers": 2, "cpus_per_worker": 1},
        "classifier": {"num_workers": 1, "cpus_per_worker": 1},
        "assign": {"num_workers": 3, "cpus_per_worker": 1},
    },
}
RUN_TIMEOUT_S = 420.0


def main(isolated: bool) -> None:
    with Hosts(isolated) as hosts, moto_server(hosts.own_address) as endpoint:
        hosts.environment |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        hosts.start("head", num_cpus=0)
        for number in range(3):
            hosts.start(f"host-{number}", num_cpus=1)
        write_images(endpoint)
        hosts.wait_until_joined()
        undisturbed = Run("undisturbed", hosts, endpoint)
        undisturbed.finish(undisturbed.watch)
        disturbed = Run("disturbed", hosts, endpoint)
        disturbed.finish(disturbed.kill_in_every_stage)
        print(json.dumps({"isolated": isolated, "runs": [undisturbed.seen(), disturbed.seen()]}), flush=True)


def write_images(endpoint: str) -> None:
    s3 = client(endpoint)
    for bucket in ("photos", "results"):
        s3.create_bucket(Bucket=bucket)
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (NUM_CLUSTERS, 8, 8, 3))
    for number in range(NUM_IMAGES):
        pixels = np.clip(patterns[number % NUM_CLUSTERS] + rng.normal(0, 160, (8, 8, 3)), 0, 255).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        s3.put_object(Bucket="photos", Key=f"{number:03d}.png", Body=sink.getvalue())


class Run:
    """One run of the pipeline, started on the head as its user would."""

    def __init__(self, name: str, hosts: Hosts, endpoint: str) -> None:
        self.name = name
        self.hosts = hosts
        storage = {"endpoint": endpoint, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        self.config = Config.model_validate(SETTINGS | {"output": f"s3://results/{name}", "storage": storage})
        self.storage = client(endpoint)
        self.worked: set[tuple[str, str]] = set()
        self.kills: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}
        self.seconds = 0.0

    def finish(self, meanwhile: Callable[[threading.Event], None]) -> None:
        """Run it to its end; `meanwhile` goes on beside it, until its event is set."""
        head = self.hosts.head
        settings = json.dumps(SETTINGS | {"output": self.config.output})
        write = f"cat > run.yaml <<'END'\n{settings}\nEND\n"
        job = f"{sys.executable} -m icce_ray.run run.yaml --json"
        environment = head.environment | {"RAY_ADDRESS": f"{head.address}:{self.hosts.port}"}
        command = self.hosts.command_on(head, ["sh", "-c", f"{write}exec {job}"])
        ended = threading.Event()
        beside = threading.Thread(target=meanwhile, args=(ended,))
        started = time.monotonic()
        beside.start()
        try:
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                said, _ = process.communicate(timeout=RUN_TIMEOUT_S)
        finally:
            ended.set()
            beside.join()
        assert process.returncode == 0, f"the run {self.name} ended with {process.returncode}"
        assert said.splitlines()[-1].startswith("{"), said
        self.result = json.loads(said.splitlines()[-1])
        self.seconds = time.monotonic() - started

    def watch(self, ended: threading.Event) -> None:
        """Note which hosts work for which stage."""
        while not ended.wait(0.02):
            for host, _, what in at_work(list(self.hosts.running.values())):
                for stage in AT_WORK:
                    if is_at_work(what, stage):
                        self.worked.add((stage, host.name))

    def kill_in_every_stage(self, ended: threading.Event) -> None:
        """Wait for a host that works for the next stage, kill it, start another, and so on."""
        steps, root = {step.name: step for step in plan(self.config)}, Folder.at(self.config.output)
        for stage in KILLED_IN:
            victim = None
            while victim is None and not ended.wait(0.004):
                victim = self.stopped_at_work(steps[stage])
            if victim is None:
                return
            host, pid, what = victim
            unfinished = not steps[stage].folder.exists("manifest.json")
            told = find_status(
                root, run_name(list(steps.values())), {name: step.folder for name, step in steps.items()}
            )
            self.told.append(told.to_json())
            raylets = [pid for pid in host.processes(process_table()) if "/raylet/raylet " in title(pid)]
            killed = self.hosts.kill(host.name)
            self.kills.append(
                {
                    "stage": stage,
                    "host": host.name,
                    "task": what,
                    "unfinished": unfinished,
                    "task_is_dead": pid in killed and not title(pid),
                    "raylet_is_dead": len(raylets) == 1 and raylets[0] in killed and not title(raylets[0]),
                    "results_before": sorted(steps[stage].folder.sizes()),
                }
            )
            print(f"killed {host.name} at {what} in {stage}", file=sys.stderr, flush=True)
            self.hosts.start(f"host-{self.hosts.num_started}", num_cpus=1)

    def stopped_at_work(self, step: PlannedStage) -> tuple[Host, int, str] | None:
        """A host that is at work on `step` at this moment. The process that is, is stopped, so it cannot end first."""
        workers = [host for host in self.hosts.running.values() if host is not self.hosts.head]
        for host, pid, what in at_work(workers):
            if is_at_work(what, step.name) and has_begun(step):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    if title(pid) == f"ray::{what}":
                        return host, pid, what
                    os.kill(pid, signal.SIGCONT)
        return None

    def seen(self) -> dict[str, Any]:
        stages = plan(self.config)
        artifacts = {step.name: step.artifact for step in stages}
        assign = artifacts["assign"]
        assert assign is not None
        tables = [assign.read_table(name) for name in assign.part_names("assignments/")]
        rows = pa.concat_tables(tables).sort_by("image_id").to_pydict()
        left = [name for name in Folder.at(self.config.output).sizes() if name.rpartition("/")[2].startswith(".")]
        return {
            "name": self.name,
            "seconds": round(self.seconds, 1),
            "result": self.result,
            "worked": sorted(self.worked),
            "kills": self.kills,
            "status_at_kills": self.told,
            "rows": rows,
            "left_behind": left,
            "checksums": {
                f"{name}/{part.name}": part.sha256
                for name in ("embed", "neighbors", "heads", "consensus", "assign")
                if (artifact := artifacts[name]) is not None
                for part in artifact.manifest.parts
            },
        }


def is_at_work(what: str, stage: str) -> bool:
    """Whether a task of this name is a stage's, and work."""
    return re.fullmatch(AT_WORK[stage], what) is not None


def has_begun(step: PlannedStage) -> bool:
    """Whether a stage has something to lose: where it writes in pieces, the first of them."""
    if step.name in ("embed", "heads"):
        return any(name.endswith((".parquet", ".safetensors")) for name in step.folder.sizes())
    return True


if __name__ == "__main__":
    main(isolated=sys.argv[1] == "isolated")
