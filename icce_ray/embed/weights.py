"""A backbone's weights: a file (safetensors, or a .pth that loads without running code from it), or the hub.

A file on object storage is copied once to each machine that needs it, into the cache folder (ICCE_CACHE).
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit
from urllib.request import getproxies

import pyarrow.fs as pafs

from icce_ray.errors import ConfigError, ResourceError
from icce_ray.store.artifact import cache_folder
from icce_ray.store.filesystem import open_uri
from icce_ray.store.local_files import locked, replacing

WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
"""Keys under which training programs keep the weights in a checkpoint, the best first."""
PREFIXES = ("_orig_mod.", "module.", "backbone.")
UNUSED_PREFIXES = ("head", "fc.", "classifier", "mask_token", "decoder")
"""Layers that a file may hold although features do not need them."""
MAX_KEYS_SHOWN = 5
COPY_BUFFER_BYTES = 16 * 2**20


def check_weights(location: str) -> None:
    """Refuse weights that cannot be a file of weights; nothing of it is read.

    Args:
        location: a path, or the URI of a file on object storage.

    Raises:
        ConfigError: another ending, credentials in the URI, no such file.
        ResourceError: the storage cannot be reached, or refuses.
    """
    if not location.lower().endswith(WEIGHTS_ENDINGS):
        raise ConfigError(f"embed.weights: {_shown(location)} does not end in {' or '.join(WEIGHTS_ENDINGS)}")
    if "@" in urlsplit(location).netloc:
        raise ConfigError(
            f"embed.weights: {_shown(location)} holds credentials, which manifests would repeat; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    with _reading(location):
        filesystem, path = open_uri(location)
        if filesystem.get_file_info(path).type != pafs.FileType.File:
            raise FileNotFoundError


def weights_digest(location: str) -> str:
    """What tells one file of weights from another: SHA-256 of its content, hex. Raises as :func:`local_weights`."""
    with local_weights(location).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_weights(location: str) -> Path:
    """The file on this machine: itself, or for object storage its copy, made once for each content.

    Raises:
        ConfigError: as :func:`check_weights`.
        ResourceError: likewise, or it came incomplete.
    """
    check_weights(location)
    filesystem, path = open_uri(location)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return Path(path)
    with _reading(location), filesystem.open_input_file(path) as remote:
        size = remote.size()
        version = repr((location, size, sorted((remote.metadata() or {}).items())))  # has the ETag, where there is one
        name = hashlib.sha256(version.encode()).hexdigest()[:16]
        copy = cache_folder() / "weights" / name / Path(path).name
        with locked(copy.with_name(".lock")):
            if not copy.exists():
                with replacing(copy) as temporary:
                    with temporary.open("wb") as file:
                        shutil.copyfileobj(remote, file, COPY_BUFFER_BYTES)
                    if temporary.stat().st_size != size:
                        raise OSError(f"{temporary.stat().st_size} bytes came of {size}")
    return copy


def load_weights(create: Callable[..., Any], path: str, name: str) -> Any:
    """Make the model and load the file, by timm's own translation for that model (names, positions of another size).

    Args:
        create: ``create(**options)`` calls ``timm.create_model`` with them.
        path: the weights file, or its URI.
        name: the model's name, for messages.

    Raises:
        ConfigError: the file cannot be read, or does not fit the model: which keys.
    """
    weights = read_weights(path)
    source = {"state_dict": weights, "source": "", "custom_load": False}
    with _recorded_loading() as results:
        try:
            model = create(pretrained=True, pretrained_cfg_overlay=source)
        except ConfigError:
            raise
        except Exception as error:  # timm's translation indexes what it expects to find
            reason = " ".join(str(error).split())[:600]
            raise ConfigError(f"embed.weights: {path} does not fit {name}: {type(error).__name__}: {reason}") from None
    assert results, "timm did not load the weights"
    missing = list(results[-1].missing_keys)
    unexpected = [key for key in results[-1].unexpected_keys if not key.startswith(UNUSED_PREFIXES)]
    if missing or unexpected:
        problems = [_list_keys("lacks", missing)] * bool(missing) + [_list_keys("has unknown", unexpected)] * bool(
            unexpected
        )
        raise ConfigError(f"embed.weights: {path} does not fit {name}: it {'; it '.join(problems)}")
    return model


def read_weights(path: str) -> dict[str, Any]:
    """Tensors by name. Raises ConfigError where the file is damaged, or would run code."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    location = str(local_weights(path))
    try:
        if location.lower().endswith(".safetensors"):
            content: Any = load_file(location)
        else:
            content = torch.load(location, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"embed.weights: {path} holds more than weights and is not opened, as that could run code from it. "
            "Save only the state dict, or use .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise ConfigError(f"embed.weights: {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    while isinstance(content, dict) and (wrapper := next((key for key in WRAPPERS if key in content), None)):
        content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ConfigError(f"embed.weights: {path} holds no tensors by name")
    return {_strip(key): value for key, value in content.items()}


def check_hub(name: str) -> None:
    """Say at once that weights cannot be fetched here, instead of after a minute of retries on every worker.

    Raises:
        ConfigError: the hub has no weights for the model.
        ResourceError: they are not in this machine's cache, and the hub's name does not resolve.
    """
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    settings = timm.get_pretrained_cfg(name)
    repository = settings.hf_hub_id if settings is not None else None
    if ":" in name or (repository is None and settings is not None and settings.url):
        return
    if settings is None or repository is None:
        raise ConfigError(f"embed.weights: the hub has no weights for {name}; name a file (.safetensors or .pth)")
    files = [settings.hf_hub_filename] if settings.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    if constants.HF_HUB_OFFLINE:
        raise no_hub(name, "HF_HUB_OFFLINE is set, and they are not in the cache")
    host = urlsplit(constants.ENDPOINT).hostname
    if getproxies() or host is None:
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise no_hub(name, f"{host}: {error.strerror or error}") from None


def no_hub(name: str, reason: str) -> ResourceError:
    return ResourceError(
        f"embed.weights: the weights of {name} could not be fetched from the model hub ({reason}). Where there is no "
        "network, download them elsewhere and set embed.weights to the .safetensors or .pth file; "
        "`embed.backbone=pixels` needs none"
    )


def _shown(location: str) -> str:
    """`location` without what may be a secret."""
    scheme, separator, rest = location.partition("://")
    place, slash, path = rest.partition("/")
    return location if "@" not in place else f"{scheme}{separator}...@{place.rpartition('@')[2]}{slash}{path}"


@contextmanager
def _reading(location: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"embed.weights: there is no file {location}") from None
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise ResourceError(f"embed.weights: {location} cannot be read: {reason}") from None


def _strip(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.partition(".")[2]
    return key


def _list_keys(verb: str, keys: list[str]) -> str:
    more = f" and {len(keys) - MAX_KEYS_SHOWN} more" if len(keys) > MAX_KEYS_SHOWN else ""
    return f"{verb} {', '.join(keys[:MAX_KEYS_SHOWN])}{more}"


@contextmanager
def _recorded_loading() -> Iterator[list[Any]]:
    """Collects what ``load_state_dict`` reports: timm loads leniently where the classification layer is left out, and
    a file of another model would go in without a word."""
    import torch

    results: list[Any] = []
    original = torch.nn.Module.load_state_dict

    def recording(self: torch.nn.Module, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        results.append(result)
        return result

    with mock.patch.object(torch.nn.Module, "load_state_dict", recording):
        yield results
