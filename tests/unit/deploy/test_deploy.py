"""The files under deploy/ parse, name the pinned versions, and fit together.

Nothing is started: Ray is imported for its own check of resources and of the launcher's file.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from icce_ray import __version__
from icce_ray.config import Config, load_config

from .kuberay_schema import RESOURCES_BY_KIND
from .sizing_page import ROOT, sizing

DEPLOY = ROOT / "deploy"
KUBERAY = ("rayjob-cpu.yaml", "rayjob-gpu.yaml", "raycluster-autoscaling.yaml")
GOES_WITH = {
    "cpu-cluster.yaml": "kubernetes/rayjob-cpu.yaml",
    "one-gpu.yaml": "kubernetes/rayjob-gpu.yaml",
    "eight-gpus.yaml": "aws/cluster.yaml",
    "sixty-four-gpus.yaml": "kubernetes/raycluster-autoscaling.yaml",
}
CONFIGS = (*GOES_WITH, "laptop.yaml")
STAGES = ("embed", "neighbors", "method", "classifier", "assign")
UNITS = {"Gi": 2**30, "Mi": 2**20}
ACTION_OF = {
    "list_objects_v2": "s3:ListBucket",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "put_object": "s3:PutObject",
    "delete_object": "s3:DeleteObject",
}


@dataclass(frozen=True)
class Group:
    """Machines of one kind."""

    name: str
    image: str
    cpus: float
    gpus: float
    memory_bytes: float
    at_start: int
    at_most: int


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def cluster_of(manifest: Any) -> Any:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def container_of(group: Any) -> Any:
    (container,) = group["template"]["spec"]["containers"]
    return container


def groups(path: str) -> list[Group]:
    """The workers; what the head has is not work's."""
    manifest = read(path)
    if "available_node_types" in manifest:
        workers = {name: kind for name, kind in manifest["available_node_types"].items() if name != "head"}
        image = manifest["docker"]["worker_image"]
        return [
            Group(name, image, kind["resources"]["CPU"], kind["resources"].get("GPU", 0), 2 * 2**40,
                  kind["min_workers"], kind["max_workers"])
            for name, kind in workers.items()
        ]  # fmt: skip
    found = []
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        container = container_of(group)
        limits = container["resources"]["limits"]
        memory = int(limits["memory"][:-2]) * UNITS[limits["memory"][-2:]]
        gpus = float(limits.get("nvidia.com/gpu", 0))
        name, replicas = group["groupName"], group["replicas"]
        found.append(
            Group(name, container["image"], float(limits["cpu"]), gpus, memory, replicas, group["maxReplicas"])
        )
    return found


def machines(path: str) -> list[tuple[float, float]]:
    """The largest number of machines; the autoscaler adds those that are missing at the start."""
    return [(group.cpus, group.gpus) for group in groups(path) for _ in range(group.at_most)]


def shortfalls(config: Config, there: list[tuple[float, float]]) -> list[str]:
    from icce_ray.runtime.cluster_resources import shortfall

    found = [shortfall(stage, getattr(config.resources, stage), there) for stage in STAGES]
    return [problem for problem in found if problem is not None]


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix(f"{package}==") for line in lines if line.startswith(f"{package}=="))


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments), lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], " ".join(line.split(maxsplit=1)[1].split())) for line in joined.splitlines()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's stages by name."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, arguments in dockerfile():
        if instruction == "FROM":
            name = arguments.split(" AS ")[1]
            found[name] = []
        if name:
            found[name].append((instruction, arguments))
    return found


@pytest.mark.parametrize("path", sorted(str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*.yaml")))
def test_every_file_parses_and_is_tested_here(path: str) -> None:
    assert isinstance(read(path), dict)
    others = {"kubernetes/service-account.yaml", "kubernetes/network-policy.yaml"}
    assert path in {f"configs/{name}" for name in CONFIGS} | set(GOES_WITH.values()) | others


@pytest.mark.parametrize("name", KUBERAY)
def test_manifests_follow_the_resource_definition(name: str) -> None:
    manifest = read(f"kubernetes/{name}")
    schema = RESOURCES_BY_KIND[manifest["kind"]]
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(manifest)] == []
    for path, wrong in (("rayStartParams", {"num-cpus": 0}), ("tempalte", {})):
        broken = copy.deepcopy(manifest)
        cluster_of(broken)["headGroupSpec"][path] = wrong
        assert not validator.is_valid(broken)


def test_the_launchers_file_passes_rays_own_check_and_installs_nothing() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read("aws/cluster.yaml"))
    validate_config(config)
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert kind["node_config"]["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::")
        assert kind["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert "0.0.0.0/0" not in str(rule)


@pytest.mark.parametrize("path", GOES_WITH.values())
def test_images_name_the_pinned_versions_and_fit_the_machine(path: str) -> None:
    ray, version = pinned("ray"), __version__
    tag = f"icce-ray:{version}-ray{ray}"
    for group in groups(path):
        assert group.image == f"{tag}-{'cuda' if group.gpus else 'cpu'}"
    text = (DEPLOY / path).read_text(encoding="utf-8")
    assert set(re.findall(r"icce-ray:[\w.-]+", text)) <= {f"{tag}-cpu", f"{tag}-cuda"}
    if path.startswith("kubernetes"):
        assert cluster_of(read(path))["rayVersion"] == ray


def test_the_dockerfile_builds_on_the_tested_python_with_the_pinned_versions() -> None:
    settings = project()
    assert ("ARG", f"PYTHON_VERSION={settings['tool']['mypy']['python_version']}") in dockerfile()
    names = stages()
    assert list(names) == ["build", "base", "cpu", "cuda"]
    assert [names[name][0][1].split(" AS ")[0] for name in names] == ["python:${PYTHON_VERSION}-slim"] * 2 + [
        "base"
    ] * 2
    installs = re.findall(r"pip install [^;]*", " ; ".join(line for _, line in dockerfile()))
    assert len(installs) == 2
    for line in installs:
        assert "-c constraints.txt" in line
        assert "://" not in line
    assert installs[-1].split()[-1] == "."  # the package, without extras
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    version = f"{__version__}-ray{pinned('ray')}"
    assert re.findall(r"-t icce-ray:(\S+)", text) == [f"{version}-cpu", f"{version}-cuda"]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_containers_do_not_run_as_root(target: str) -> None:
    instruction, user = stages()[target][-1]
    assert instruction == "USER"
    assert int(user) > 0
    assert any(f"--uid {user} " in line for _, line in stages()["base"])


def test_what_the_dockerfile_copies_exists_and_is_sent_to_it() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = [line.split()[:-1] for kind, line in dockerfile() if kind == "COPY" and "--from" not in line]
    names = {name.removeprefix("./") for line in copied for name in line}
    assert names == sent
    assert all((ROOT / name).exists() for name in names)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_load(name: str) -> None:
    config = load_config(DEPLOY / "configs" / name)
    assert config.num_clusters >= 2
    assert config.storage.access_key is None


def test_the_laptops_config_needs_one_cpu() -> None:
    assert shortfalls(load_config(DEPLOY / "configs" / "laptop.yaml"), [(1.0, 0.0)]) == []


@pytest.mark.parametrize(("name", "path"), GOES_WITH.items())
def test_a_config_fits_its_machines_and_uses_them(name: str, path: str) -> None:
    config, there = load_config(DEPLOY / "configs" / name), machines(path)
    assert shortfalls(config, there) == []
    workers = {stage: getattr(config.resources, stage) for stage in STAGES}
    assert all(worker.cpus_per_worker is not None for worker in workers.values())
    embed = config.resources.embed
    assert embed.num_workers * embed.gpus_per_worker == sum(gpus for _, gpus in there)
    assert sum(cpus for cpus, _ in there) - embed.num_workers * embed.cpus_per_worker >= len(there)  # to decode
    # Without the last machine of any kind something no longer fits, but for machines that only decode.
    for group in groups(path):
        if group.name != "cpu-decode":
            fewer = list(there)
            fewer.remove((group.cpus, group.gpus))
            assert shortfalls(config, fewer) != []
        autoscales = not path.startswith("kubernetes") or "enableInTreeAutoscaling" in cluster_of(read(path))
        assert group.at_start <= group.at_most if autoscales else group.at_start == group.at_most


def test_only_machines_with_much_memory_can_hold_the_search() -> None:
    from icce_ray.neighbors.search import needed_bytes, shard_bytes, worker_bytes

    path = "kubernetes/raycluster-autoscaling.yaml"
    config = load_config(DEPLOY / "configs" / "sixty-four-gpus.yaml")
    kinds = {group.name: group for group in groups(path)}
    search = config.resources.neighbors
    assert {name for name, kind in kinds.items() if kind.cpus >= (search.cpus_per_worker or 0)} == {"high-memory"}
    assert search.num_workers == kinds["high-memory"].at_most
    images = 400_000_000  # as docs/sizing.md says
    needed = needed_bytes(
        shard_bytes(images, sizing.DIM), worker_bytes(images, sizing.DIM, sizing.MEAN_NEIGHBORS), 1, search.num_workers
    )
    assert 0.7 * kinds["high-memory"].memory_bytes < needed < kinds["high-memory"].memory_bytes
    assert kinds["high-memory"].memory_bytes > max(
        kind.memory_bytes for name, kind in kinds.items() if name != "high-memory"
    )


@pytest.mark.parametrize("plan", sizing.PLANS, ids=lambda plan: plan.config)
def test_the_sizing_pages_plans_are_these_machines(plan: Any) -> None:
    assert GOES_WITH[plan.config] == plan.manifest
    there, resources = machines(plan.manifest), load_config(DEPLOY / "configs" / plan.config).resources
    assert plan.num_machines == len(there)
    assert plan.gpus == sum(gpus for _, gpus in there)
    assert plan.cpus == sum(cpus for cpus, _ in there)
    assert plan.embed_cpus == resources.embed.num_workers * (resources.embed.cpus_per_worker or 0)
    search = resources.neighbors
    assert plan.search_workers == search.num_workers
    assert plan.search_gpus == search.num_workers * search.gpus_per_worker
    assert plan.search_cpus == search.num_workers * (search.cpus_per_worker or 0)
    assert plan.assign_cpus == resources.assign.num_workers * (resources.assign.cpus_per_worker or 0)
    assert resources.method.num_workers == resources.method.gpus_per_worker == 1
    for group in groups(plan.manifest):
        what = {"cpu-decode": "that decode", "high-memory": "with much memory"}.get(
            group.name, f"with {group.gpus:g} GPU{'s' * (group.gpus > 1)}"
        )
        assert f"{group.at_most} {what}" in plan.machines


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_few_rights_and_heads_no_work(name: str) -> None:
    manifest = read(f"kubernetes/{name}")
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    account = read("kubernetes/service-account.yaml")["metadata"]["name"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod, container = group["template"]["spec"], container_of(group)
        assert pod["serviceAccountName"] == account
        assert pod["securityContext"]["runAsNonRoot"]
        assert f"--uid {pod['securityContext']['runAsUser']} " in str(dockerfile())
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"] == container["resources"]["requests"]
        starts_pods = bool(cluster.get("enableInTreeAutoscaling")) and group is cluster["headGroupSpec"]
        assert pod.get("automountServiceAccountToken", True) == starts_pods
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/cache" in mounts  # ICCE_CACHE of the image
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    if manifest["kind"] == "RayJob":
        (path,) = re.findall(r"python -m icce_ray\.run (\S+)", manifest["spec"]["entrypoint"])
        mounts = {mount["mountPath"] for mount in container_of(cluster["headGroupSpec"])["volumeMounts"]}
        assert str(Path(path).parent) in mounts
    assert any("ICCE_CACHE=/cache" in line for _, line in stages()["base"])


def test_only_the_dashboards_port_is_open_to_others() -> None:
    policy = read("kubernetes/network-policy.yaml")["spec"]
    pods, others = policy["ingress"]
    assert pods == {"from": [{"podSelector": policy["podSelector"]}]}
    assert others["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert policy["policyTypes"] == ["Ingress"]


def test_the_launched_cluster_asks_for_the_token_and_hides_its_dashboard() -> None:
    config = read("aws/cluster.yaml")
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert any("--dashboard-host=127.0.0.1" in line for line in config["head_start_ray_commands"])
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}


def allowed() -> list[tuple[str, str]]:
    """(action, resource) of the bucket policy."""
    policy = json.loads((DEPLOY / "aws" / "bucket-policy.json").read_text(encoding="utf-8"))
    assert all(statement["Effect"] == "Allow" for statement in policy["Statement"])
    return [
        (action, resource)
        for statement in policy["Statement"]
        for action in statement["Action"]
        for resource in statement["Resource"]
    ]


def test_the_bucket_policy_allows_what_the_code_calls_and_no_more() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "icce_ray").rglob("*.py"))
    name = "(?:list|get|head|put|delete|copy|upload|create|abort|restore)_(?:object|bucket|file)[a-z0-9_]*"
    called = set(re.findall(rf'(?:client\b[^\n]*\.|(?:_ask_s3|get_paginator)\(")({name})', sources))
    assert called == set(ACTION_OF)
    # pyarrow may have to abort a multipart upload.
    assert {action for action, _ in allowed()} == set(ACTION_OF.values()) | {"s3:AbortMultipartUpload"}


@pytest.mark.parametrize("name", GOES_WITH)
def test_the_bucket_policy_fits_the_configs(name: str) -> None:
    config = load_config(DEPLOY / "configs" / name)

    def actions(uri: str) -> set[str]:
        path = uri.removeprefix("s3://")
        return {action for action, where in allowed() if fnmatch(f"arn:aws:s3:::{path}", where)}

    assert config.embed.weights is not None
    for uri in (f"{config.images.uris[0]}/a.jpg", config.embed.weights):
        assert actions(uri) == {"s3:GetObject"}
        assert actions(f"s3://{uri.split('/')[2]}") == {"s3:ListBucket"}
    assert actions(f"{config.output}/embed/x") >= {"s3:GetObject", "s3:PutObject", "s3:DeleteObject"}
    assert actions(f"s3://{config.output.split('/')[2]}") == {"s3:ListBucket"}


TEXTS = [path for path in DEPLOY.rglob("*") if path.is_file()] + sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_that_are_named_exist_and_no_secrets_or_registries_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:deploy|docs|benchmarks|icce_ray)/[\w./-]+\w", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
    addresses = re.findall(r"https?://[^\s`'\"]+", text)
    assert all(address.startswith(("http://127.0.0.1:", "https://arxiv.org/")) for address in addresses), addresses
    assert not re.search(r"AKIA[0-9A-Z]{16}|(secret_key|password|auth_token)\s*[:=]\s*[^\s}|)~]", text)


def test_every_benchmark_is_listed_and_has_a_module() -> None:
    path = ROOT / "benchmarks"
    said = subprocess.check_output([sys.executable, path / "run.py", "--help"], text=True).partition("cases:")[2]
    listed = re.findall(r"^  ([a-z-]+)  ", said, re.MULTILINE)
    helpers = {"__init__", "datasets", "peak", "plain_heads", "plain_turtle", "process_memory"}
    modules = {file.stem for file in (path / "cases").glob("*.py")} - helpers
    assert {name.replace("-", "_") for name in listed} == modules
