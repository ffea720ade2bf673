"""Weights from object storage (moto's S3 server over HTTP) and from a hub (a small HTTP server that answers as one)."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file

from icce_ray.config import Config
from icce_ray.embed import weights
from icce_ray.embed.backbone_plan import check_backbones, embed_settings
from icce_ray.embed.networks import build_backbone
from icce_ray.embed.weights import check_weights, local_weights, weights_digest
from icce_ray.errors import ConfigError, ResourceError
from icce_ray.store.cache import cache_folder

BUCKET = "models"


def build(config: Config, **options: Any) -> Any:
    return build_backbone(config.embed, config.seed, **options)


def settings_of(config: Config) -> dict[str, Any]:
    return embed_settings(config.embed, config.embeddings, config.seed)


def check(config: Config) -> None:
    check_backbones(config.embed)


def config_for(location: str | None, backbone: str = "test_vit") -> Config:
    embed = {"backbone": backbone, "weights": location, "image_size": 64}
    return Config(output="x", num_clusters=2, images={"uri": "x"}, embed=embed)


def vit_weights(seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model("test_vit", num_classes=0, img_size=64).state_dict()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Any]:
    """A client of a real S3 endpoint, which pyarrow finds by the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        client.create_bucket(Bucket=BUCKET)
        yield client
    server.stop()


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICCE_CACHE", str(tmp_path / "cache"))


def test_weights_on_s3_give_what_the_same_file_here_gives(s3_server: Any, tmp_path: Path) -> None:
    save_file(vit_weights(0), tmp_path / "w.safetensors")
    s3_server.upload_file(str(tmp_path / "w.safetensors"), BUCKET, "vit/w.safetensors")
    here, there = config_for(str(tmp_path / "w.safetensors")), config_for(f"s3://{BUCKET}/vit/w.safetensors")
    check(there)
    assert not (cache_folder() / "weights").exists(), "a check reads no weights"
    assert settings_of(there) == settings_of(here)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    assert np.array_equal(build(there).embed(images), build(here).embed(images))


def test_a_remote_file_is_copied_once_and_again_when_it_was_replaced(
    s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{BUCKET}/replaced.safetensors"
    copies = []
    original = weights.shutil.copyfileobj
    monkeypatch.setattr(weights.shutil, "copyfileobj", lambda *args: copies.append(1) or original(*args))
    for seed in (1, 2):  # the same size, and perhaps the same second
        data = save(vit_weights(seed))
        s3_server.put_object(Bucket=BUCKET, Key="replaced.safetensors", Body=data)
        for _ in range(2):
            assert weights_digest(uri) == hashlib.sha256(data).hexdigest()
        assert len(copies) == seed
    assert not [path for path in cache_folder().rglob(".*") if path.name != ".lock" and path.suffix != ".sha256"]


def test_remote_weights_that_are_not_there_are_refused_before_any_work(s3_server: Any) -> None:
    for uri in (f"s3://{BUCKET}/gone.pth", f"s3://{BUCKET}/vit"):
        with pytest.raises(ConfigError, match=r"embed\.weights: there is no file|does not end in"):
            check(config_for(uri))


def test_a_secret_in_the_uri_is_refused_and_not_repeated() -> None:
    for uri in ("s3://key:hush@bucket/w.safetensors", "s3://key:hush@bucket/w.npz"):
        with pytest.raises(ConfigError) as caught:
            check_weights(uri)
        assert "hush" not in str(caught.value)


def test_weights_that_break_off_on_the_way_are_not_used(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.put_object(Bucket=BUCKET, Key="cut.safetensors", Body=save(vit_weights(3)))
    monkeypatch.setattr(weights.shutil, "copyfileobj", lambda source, sink, size: sink.write(source.read(1000)))
    with pytest.raises(ResourceError, match=r"embed\.weights: s3://models/cut\.safetensors cannot be read: 1000 bytes"):
        local_weights(f"s3://{BUCKET}/cut.safetensors")
    monkeypatch.undo()
    assert local_weights(f"s3://{BUCKET}/cut.safetensors").stat().st_size > 1000


class _Hub(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        self.asked.append(f"{self.command} {self.path}")
        data = self.files.get(self.path)
        self.send_response(200 if data is not None else 404)
        data = data or b""
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_weights_of_the_hub_are_fetched_once_as_safetensors_and_then_found_without_it(tmp_path: Path) -> None:
    _Hub.files = {"/timm/test_vit.r160_in1k/resolve/main/model.safetensors": save(vit_weights(4))}
    save_file(vit_weights(4), tmp_path / "w.safetensors")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys, numpy as np\n"
        "from icce_ray.config import Config\n"
        "from icce_ray.embed.backbone_plan import check_backbones\n"
        "from icce_ray.embed.networks import build_backbone\n"
        "def features(backbone, weights):\n"
        "    embed = {'backbone': backbone, 'weights': weights, 'image_size': 64}\n"
        "    config = Config(output='x', num_clusters=2, images={'uri': 'x'}, embed=embed)\n"
        "    check_backbones(config.embed)\n"
        "    images = np.arange(2 * 64 * 64 * 3, dtype=np.int64).astype(np.uint8).reshape(2, 64, 64, 3)\n"
        "    return build_backbone(config.embed, config.seed).embed(images)\n"
        "given = features('test_vit', sys.argv[1])\n"
        "assert np.array_equal(features('test_vit.r160_in1k', None), given)\n"
        "print('fetched', flush=True)\n"
        "input()\n"
        "from huggingface_hub import constants\n"
        "constants.HF_HUB_OFFLINE = True\n"
        "assert np.array_equal(features('test_vit.r160_in1k', None), given)\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", code, str(tmp_path / "w.safetensors")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "fetched\n"
        assert [asked for asked in _Hub.asked if asked.startswith("GET") and asked.endswith("model.safetensors")]
        server.shutdown()
        server.server_close()
        process.communicate("\n")
    assert process.returncode == 0
