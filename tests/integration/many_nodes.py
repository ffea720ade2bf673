"""A whole run on a cluster of several hosts, of which one after the other loses power; what was seen, as JSON on the
last line. Run by test_many_nodes.py, in namespaces of its own where that is possible.

Images and output lie in a bucket, on an S3 endpoint that all hosts reach; nothing else is shared. The driver runs on
the head, which has no CPUs; the work lands on the others. Each of the stages in `KILLED_IN` costs the host that was
found at work on it, and a fresh host joins in its place.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from icce_ray.config import Config
from icce_ray.embed.feature_matrix import load_features
from icce_ray.methods.clusterings import read_losses
from icce_ray.pipeline.plan import PlannedStage, plan, run_name
from icce_ray.pipeline.status import find_status
from icce_ray.store import Folder

from .hosts import Host, Hosts, Workers, process_table, title
from .storage_server import ACCESS_KEY, SECRET_KEY, client, moto_server

AT_WORK = {
    "embed": r"MapBatches\(decode\)|MapWorker\(MapBatches\(Embedder\)\)\.submit",
    "method": r"RayTrainWorker.*",  # it trains beside what it is asked by Ray
}
"""What Ray's workers call themselves while they work for a stage: of Ray Data, and of Ray Train."""
KILLED_IN = tuple(AT_WORK)
LOOK_EVERY_S = {"embed": 0.05, "method": 0.3}
"""A part is embedded in no time."""
NUM_HOSTS = 2
"""Beside the head. Until another joins in the place of one that is lost, there are too few."""
NUM_IMAGES, NUM_CLUSTERS = 240, 3
SETTINGS: dict[str, Any] = {
    "num_clusters": NUM_CLUSTERS,
    "images": {"uri": "s3://photos/"},
    "embed": {"backbone": "pixels", "image_size": 8},
    "sample": {"max_images": 200},
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
    "consensus": {"methods": ["vote"]},
    "classifier": {"num_iterations": 100},
    "resources": {
        "embed": {"num_workers": NUM_HOSTS, "cpus_per_worker": 1},
        "neighbors": {"cpus_per_worker": 1},
        "method": {"num_workers": NUM_HOSTS, "cpus_per_worker": 1},
        "assign": {"cpus_per_worker": 1},
    },
}
RUN_TIMEOUT_S = 420.0


def main(isolated: bool) -> None:
    with Hosts(isolated) as hosts, moto_server(hosts.own_address) as endpoint:
        hosts.environment |= {"AWS_EC2_METADATA_DISABLED": "true"}
        hosts.start("head", num_cpus=0, options=["--no-monitor"])  # nothing grows here
        for number in range(NUM_HOSTS):
            hosts.start(f"host-{number}", num_cpus=1)
        write_images(endpoint)
        hosts.wait_until_joined()
        disturbed = Run(hosts, endpoint)
        disturbed.finish()
        print(json.dumps({"isolated": isolated} | disturbed.seen()), flush=True)


def write_images(endpoint: str) -> None:
    s3 = client(endpoint)
    for bucket in ("photos", "results"):
        s3.create_bucket(Bucket=bucket)
    for name, content in images():
        s3.put_object(Bucket="photos", Key=name, Body=content)


def images() -> Iterator[tuple[str, bytes]]:
    """Name and content of each image."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (NUM_CLUSTERS, 8, 8, 3))
    for number in range(NUM_IMAGES):
        pixels = np.clip(patterns[number % NUM_CLUSTERS] + rng.normal(0, 160, (8, 8, 3)), 0, 255).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        yield f"{number:03d}.png", sink.getvalue()


class Run:
    """One run of the pipeline, started on the head as its user would."""

    def __init__(self, hosts: Hosts, endpoint: str) -> None:
        self.hosts = hosts
        self.workers = Workers(hosts)
        # In the config, from which the workers of every stage get them.
        storage = {"endpoint": endpoint, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        self.settings = SETTINGS | {"output": "s3://results/disturbed", "storage": storage}
        self.config = Config.model_validate(self.settings)
        self.storage = client(endpoint)
        self.worked: set[tuple[str, str]] = set()
        self.kills: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}
        self.seconds = 0.0

    def finish(self) -> None:
        """Run it to its end, and disturb it meanwhile."""
        head = self.hosts.head
        write = f"cat > run.yaml <<'END'\n{json.dumps(self.settings)}\nEND\n"
        job = f"{sys.executable} -m icce_ray.run run.yaml --json"
        environment = head.environment | {"RAY_ADDRESS": f"{head.address}:{self.hosts.port}"}
        command = self.hosts.command_on(head, ["sh", "-c", f"{write}exec {job}"])
        ended = threading.Event()
        beside = threading.Thread(target=self.kill_in_every_stage, args=(ended,))
        started = time.monotonic()
        beside.start()
        try:
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                try:
                    said, _ = process.communicate(timeout=RUN_TIMEOUT_S)
                finally:
                    process.kill()  # one that takes too long would be waited for
        finally:
            ended.set()
            beside.join()
        assert process.returncode == 0, f"the run ended with {process.returncode}"
        assert said.splitlines()[-1].startswith("{"), said
        self.result = json.loads(said.splitlines()[-1])
        self.seconds = time.monotonic() - started

    def tasks(self) -> list[tuple[Host, int, str]]:
        """Host, process and task of each that is at work now. Notes which hosts work for which stage."""
        found = self.workers.at_work()
        self.worked |= {(stage, host.name) for host, _, what in found for stage in AT_WORK if is_at_work(what, stage)}
        return found

    def kill_in_every_stage(self, ended: threading.Event) -> None:
        """Wait for a host that works for the next stage, kill it, start another, and so on; then look on."""
        steps, root = {step.name: step for step in plan(self.config)}, Folder.at(self.config.output)
        for stage in KILLED_IN:
            victim = None
            while victim is None and not ended.wait(LOOK_EVERY_S[stage]):
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
        while not ended.wait(LOOK_EVERY_S["method"]):
            self.tasks()

    def stopped_at_work(self, step: PlannedStage) -> tuple[Host, int, str] | None:
        """A host that is at work on `step` at this moment. The process that is, is stopped, so it cannot end first."""
        for host, pid, what in self.tasks():
            if host is not self.hosts.head and is_at_work(what, step.name) and has_begun(step):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    if title(pid) == f"ray::{what}":
                        return host, pid, what
                    os.kill(pid, signal.SIGCONT)
        return None

    def seen(self) -> dict[str, Any]:
        root = Folder.at(self.config.output)
        report = self.result["report"].removeprefix(f"{self.config.output}/")
        heads = next(step.artifact for step in plan(self.config) if step.name == "method")
        assert heads is not None
        contents = {name: root.read_bytes(name) for name in root.sizes()}
        return {
            "seconds": round(self.seconds, 1),
            "worked": sorted(self.worked),
            "kills": self.kills,
            "status_at_kills": self.told,
            "report": contents[report].decode(),
            "with_a_secret": [name for name, content in contents.items() if SECRET_KEY.encode() in content],
            "num_workers": heads.metrics["num_workers"],
            "history": heads.read_json("clusterings.json")["history"],
            "epochs_told": [json.loads(line) for line in heads.folder.read_bytes("metrics.jsonl").splitlines()],
            "left_behind": [name for name in contents if name.rpartition("/")[2].startswith(".")],
        } | made_by(self.config, self.result)


def made_by(config: Config, result: dict[str, Any]) -> dict[str, Any]:
    """What a run's artifacts hold, JSON-able, but for where its images lay."""
    artifacts = {step.name: step.artifact for step in plan(config)}
    embed, heads, consensus, assign = (artifacts[name] for name in ("embed", "method", "consensus", "assign"))
    assert embed is not None
    assert heads is not None
    assert consensus is not None
    assert assign is not None
    arrays = {
        "features": load_features(embed).matrix,
        "label_matrix": heads.read_array("label_matrix.npy"),
        "consensus": consensus.read_array("labels.npy"),
    }
    found = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    tables = [assign.read_table(name) for name in assign.part_names("assignments/")]
    rows = pa.concat_tables(tables).sort_by("image_id").to_pydict()
    found |= {"losses": read_losses(heads).tolist(), "anmi": result["anmi"]}
    return found | {"names": [uri.rpartition("/")[2] for uri in rows.pop("uri")], "rows": rows}


def is_at_work(what: str, stage: str) -> bool:
    """Whether a task of this name is a stage's, and work."""
    return re.fullmatch(AT_WORK[stage], what) is not None


def has_begun(step: PlannedStage) -> bool:
    """Whether a stage has something to lose: the first of the pieces that it writes."""
    return any(name.endswith((".parquet", ".safetensors")) for name in step.folder.sizes())


if __name__ == "__main__":
    main(isolated=sys.argv[1] == "isolated")
