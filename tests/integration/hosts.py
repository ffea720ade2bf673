"""Machines for tests: each runs one Ray node, in a working folder, a temporary folder and a home of its own.

Where this machine lets us, they are hosts as far as Linux can make them: with a network stack, an address, a name,
processes, /tmp and /dev/shm of their own, joined by a bridge. Elsewhere they are groups of processes.

Whoever makes isolated hosts must run in namespaces of its own: see `in_namespaces`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]  # fmt: skip  # noqa: E501
HOST = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
SUBNET = "10.77.0"
FAST_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 3,
}
REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90.0
KILL_TIMEOUT_S = 30.0


def in_namespaces(command: Sequence[str]) -> list[str]:
    """`command` in a network and a process table of its own, which end with it."""
    return [*NAMESPACES, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def can_isolate() -> bool:
    """Whether this machine lets its user make namespaces, bridges and mounts."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    attempt = "ip link add br0 type bridge && ip link add v0 type veth peer name v1 && exec unshare -num true"
    command = in_namespaces(["sh", "-c", f"mount -t tmpfs tmpfs /dev/shm && {attempt}"])
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass
class Host:
    """A machine with one Ray node on it."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    folder: Path

    def processes(self, table: dict[int, int]) -> list[int]:
        """Process ids of all that runs on it. `table`: as `process_table` says."""
        return descendants(self.process.pid, table)


@dataclass
class Hosts:
    """The machines of one test, and the Ray cluster they form. The first is its head."""

    isolated: bool
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of all hosts that start from now on."""
    running: dict[str, Host] = field(default_factory=dict)
    num_started: int = 0
    port: int = 6379
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ih-", dir="/tmp")))

    def __enter__(self) -> Hosts:
        if self.isolated:
            run(["ip", "link", "add", "br0", "type", "bridge"])
            run(["ip", "address", "add", f"{SUBNET}.1/24", "dev", "br0"])
            run(["ip", "link", "set", "br0", "up"])
        else:
            self.port = free_port()
        return self

    def __exit__(self, *_: object) -> None:
        for host in list(self.running.values()):
            self.kill(host.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def own_address(self) -> str:
        """At which the hosts reach who started them."""
        return f"{SUBNET}.1" if self.isolated else "127.0.0.1"

    @property
    def head(self) -> Host:
        return next(iter(self.running.values()))

    def start(self, name: str, *, num_cpus: int, options: Sequence[str] = ()) -> Host:
        """Start a machine. The node joins the cluster when it is ready, which is not waited for.

        Args:
            name: of the machine.
            num_cpus: that its node offers.
            options: more of ``ray start``.
        """
        self.num_started += 1
        is_head = self.num_started == 1
        address = f"{SUBNET}.{self.num_started + 1}" if self.isolated else "127.0.0.1"
        folder = Path("/tmp/host") if self.isolated else self.folder / name
        where = ["--head", f"--port={self.port}", f"--system-config={json.dumps(FAST_TO_NOTICE)}"]
        where += ["--include-dashboard=false"]
        node = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            *(where if is_head else [f"--address={self.head.address}:{self.port}"]),
            f"--node-ip-address={address}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}/ray",
            "--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0",
            "--dashboard-agent-listen-port=0", "--include-log-monitor=false", *options,
        ]  # fmt: skip
        environment = os.environ | {
            "HOME": str(folder),
            "TMPDIR": f"{folder}/tmp",
            "ICCE_CACHE": f"{folder}/cache",
            "RAY_AUTH_MODE": "disabled",
            "RAY_BACKEND_LOG_LEVEL": "fatal",
            **self.environment,
        }
        # Ray gives a node half a minute to join, which on a busy machine may not do. One that gave up is started again.
        prepare = f'mkdir -p {folder}/tmp && cd {folder} && until "$@"; do sleep 1; done'
        command = ["sh", "-c", prepare, "sh", *node]
        if self.isolated:
            mounts = " && ".join(own_temporary_folders())
            network = f"ip link set lo up && ip address add {address}/24 dev eth0 && ip link set eth0 up"
            wait = "until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done"
            command = [*HOST, "sh", "-c", f'hostname {name} && {mounts} && {wait}; {network} && exec "$@"', "sh", *command]  # fmt: skip  # noqa: E501
        log = (self.folder / f"{name}.log").open("wb")
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        if self.isolated:
            self._plug_in(process.pid)
        host = Host(name, address, process, environment, folder)
        self.running[name] = host
        return host

    def wait_until_joined(self) -> None:
        """All nodes that were started are part of the cluster."""
        deadline = time.monotonic() + START_TIMEOUT_S
        for name in self.running:
            while "Ray runtime started" not in (log := (self.folder / f"{name}.log").read_text()):
                assert time.monotonic() < deadline, f"{name} did not start: {log}"
                time.sleep(0.05)

    def command_on(self, host: Host, command: Sequence[str]) -> list[str]:
        """What runs `command` on `host`, in its folder."""
        there = ["sh", "-c", f'cd {host.folder} && exec "$@"', "sh", *command]
        if not self.isolated:
            return there
        children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text().split()
        return ["nsenter", f"--target={children[0]}", "--net", "--uts", "--mount", "--pid", "--", *there]

    def kill(self, name: str) -> list[int]:
        """The machine loses power: SIGKILL to every process of it. Returns which they were."""
        host = self.running.pop(name)
        pids = host.processes(process_table())
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        host.process.wait()
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while any(map(title, pids)):
            assert time.monotonic() < deadline, f"{name}: processes outlive SIGKILL"
            time.sleep(0.01)
        return pids

    def _plug_in(self, pid: int) -> None:
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{pid}/ns/net") == own:
            time.sleep(0.01)
        cable = f"host{self.num_started}"
        run(["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid)])
        run(["ip", "link", "set", cable, "master", "br0", "up"])


def own_temporary_folders() -> list[str]:
    """Commands that give a host an empty /tmp and /dev/shm; of the old /tmp it keeps what it runs from."""
    needed = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)]
    kept = sorted({path for path in needed if path.is_relative_to("/tmp")})
    # Made where the other comes afterwards: what is mounted on /tmp hides what is to be kept.
    tmpfs = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm"
    keep = [
        f"mkdir -p '{to}' && mount --rbind '{path}' '{to}'"
        for path in kept
        for to in [f"/dev/shm/{path.relative_to('/tmp')}"]
    ]
    return [tmpfs, *keep, "mount --rbind /dev/shm /tmp", tmpfs]


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def free_port() -> int:
    """At which nothing listens on this machine now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def process_table() -> dict[int, int]:
    """The parent of each process."""
    table = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                table[int(entry.name)] = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
    return table


def descendants(pid: int, table: dict[int, int]) -> list[int]:
    """A process and all that descend from it. `table`: as `process_table` says."""
    children: dict[int, list[int]] = {}
    for child, parent in table.items():
        children.setdefault(parent, []).append(child)
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def title(pid: int) -> str:
    """What a process says it does: Ray's workers name the task they are at."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


class Workers:
    """The Ray workers of some hosts, looked at again and again. Where a process belongs is found out once: to read the
    whole table of processes takes milliseconds."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._known: set[int] = set()
        self._host_of: dict[int, Host] = {}

    def at_work(self) -> list[tuple[Host, int, str]]:
        """Host, process and task of each worker."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        if not pids <= self._known:
            table = process_table()
            running = list(self._hosts.running.values())
            self._host_of = {pid: host for host in running for pid in host.processes(table)}
        self._known = pids
        titles = [(host, pid, title(pid)) for pid, host in self._host_of.items()]
        return [(host, pid, what.removeprefix("ray::")) for host, pid, what in titles if what.startswith("ray::")]
