"""A backbone's weights: a file (safetensors, or a .pth that loads without running code from it), or the model hub.

A file on object storage is copied once to each machine that needs it, into the cache folder (ICCE_CACHE).
"""

import hashlib
import pickle
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from icce_ray.errors import ConfigError, ResourceError, message_of
from icce_ray.store.cache import cache_entry, is_sealed, locked, replacing, seal, sha256_of
from icce_ray.store.filesystem import open_uri, redacted

WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
"""Keys under which training programs keep the weights in a checkpoint, best first."""
PREFIXES = re.compile(r"^(_orig_mod\.|module\.|backbone\.)*")
UNUSED_PREFIXES = ("head", "fc.", "classifier", "mask_token", "decoder")
"""Layers that a file may hold but features do not need."""
MAX_LINES, MAX_SHOWN = 3, 300
"""Lines of an error that are shown, and characters of each."""
COPY_BUFFER_BYTES = 16 * 2**20


def check_weights(location: str) -> None:
    """Refuse what cannot be the path or the URI of a file of weights. The file is not read. Raises ConfigError: another
    ending, credentials in the URI, no such file; ResourceError: the storage cannot be reached, or refuses."""
    if not location.lower().endswith(WEIGHTS_ENDINGS):
        raise ConfigError(f"embed.weights: {redacted(location)} does not end in {' or '.join(WEIGHTS_ENDINGS)}")
    if "@" in urlsplit(location).netloc:
        raise ConfigError(
            f"embed.weights: {redacted(location)} holds credentials, which manifests would repeat; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    with _reading(location):
        filesystem, path = open_uri(location)
        if filesystem.get_file_info(path).type != pafs.FileType.File:
            raise FileNotFoundError


def weights_digest(location: str) -> str:
    """SHA-256 of the file's content, hex. Raises what :func:`local_weights` raises."""
    return sha256_of(local_weights(location))


def local_weights(location: str) -> Path:
    """The file on this machine: the file itself, or a copy of the remote file, made once for each content. Raises
    ConfigError: as :func:`check_weights`; ResourceError: as :func:`check_weights`, or the copy is incomplete."""
    check_weights(location)
    filesystem, path = open_uri(location)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return Path(path)
    with _reading(location), filesystem.open_input_file(path) as remote:
        size = remote.size()
        version = repr((location, size, filesystem.handler.metadata(path)))  # includes the ETag, if any
        name = hashlib.sha256(version.encode()).hexdigest()[:16]
        copy = cache_entry("weights", name) / Path(path).name
        with locked(copy.with_name(".lock")):
            if not is_sealed(copy):
                with replacing(copy) as temporary:
                    with temporary.open("wb") as file:
                        shutil.copyfileobj(remote, file, COPY_BUFFER_BYTES)
                    if temporary.stat().st_size != size:
                        raise OSError(f"{temporary.stat().st_size} bytes came of {size}")
                seal(copy)
    return copy


def load_model(name: str, size: int, path: str) -> Any:
    """Build the timm model `name` for square inputs of `size`, and load the file with timm's own translation for that
    model (names, positions of another image size). Raises ConfigError: the file cannot be read, or does not fit the
    model: which keys."""
    from icce_ray.embed.timm_models import create_model, parameter_names

    weights, needed = read_weights(path), parameter_names(name, size)
    kept = {key: value for key, value in weights.items() if key in needed or not key.startswith(UNUSED_PREFIXES)}
    # timm loads strictly only if the file seems to have as many classes as the model: otherwise a file of another model
    # would load without a word.
    source = {"state_dict": kept, "source": "", "custom_load": False, "num_classes": 0}
    try:
        return create_model(name, size, pretrained=True, pretrained_cfg_overlay=source)
    except ConfigError:
        raise
    except Exception as error:  # timm's translation expects certain keys; torch lists those that are wrong
        reason = " ".join(shorten(line, MAX_SHOWN) for line in str(error).splitlines()[:MAX_LINES])
        raise ConfigError(f"embed.weights: {path} does not fit {name}: {type(error).__name__}: {reason}") from None


def read_weights(path: str) -> dict[str, Any]:
    """Tensors by name. Raises ConfigError if the file is damaged or would run code."""
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
    return {PREFIXES.sub("", key): value for key, value in content.items()}


def check_hub(name: str) -> None:
    """Say at once that weights cannot be downloaded here, instead of after a minute of retries on every worker. Raises
    ConfigError: the hub has no weights for the model; ResourceError: they are not in this machine's cache, and the
    hub's name does not resolve."""
    from urllib.request import getproxies

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
        f"embed.weights: the weights of {name} could not be fetched from the model hub ({reason}). Without a "
        "network, download them elsewhere and name the .safetensors or .pth file (--set embed.weights=FILE); "
        "--set embed.backbone=pixels needs none"
    )


@contextmanager
def _reading(location: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"embed.weights: there is no file {location}") from None
    except OSError as error:
        raise ResourceError(f"embed.weights: {location} cannot be read: {message_of(error)}") from None
