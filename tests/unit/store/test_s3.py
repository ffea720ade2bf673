from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
)

from icce_ray.config import Config, StorageConfig, load_config
from icce_ray.errors import ConfigError, InputError
from icce_ray.store import Folder, s3
from icce_ray.store.s3 import endpoint_url, region_name, split_uri, use_s3
from tests.integration.storage_server import ACCESS_KEY, SECRET_KEY, client, moto_server

SECRET = "do-not-print-this"


def test_secrets_are_in_no_dump_and_no_repr_but_travel_to_workers() -> None:
    storage = {"access_key": "id", "secret_key": SECRET, "session_token": SECRET, "endpoint": "http://127.0.0.1:9"}
    config = Config(images={"uri": "s3://b/x"}, num_clusters=2, output="s3://b/o", storage=storage)
    use_s3(config.storage)
    folder = Folder.at("s3://b/o")
    use_s3(StorageConfig())
    assert SECRET not in config.model_dump_json() + repr(config) + repr(folder) + str(config.model_dump())
    travelled = pickle.loads(pickle.dumps(folder))
    assert travelled.s3_options.secret_key.get_secret_value() == SECRET
    assert travelled == folder


@pytest.mark.parametrize(
    "setting",
    [
        f"storage.secret_key=[{SECRET}]",
        f"storage.secret_key={SECRET}",
        f"storage={SECRET}",
        f"images.uri=s3://id:{SECRET}@bucket/x",
        f"output=s3://id:{SECRET}@bucket/x",
    ],
)
def test_a_mistake_with_a_secret_does_not_repeat_it(tmp_path: Path, setting: str) -> None:
    (tmp_path / "run.yaml").write_text("{images: {uri: x}, num_clusters: 2, output: y}")
    with pytest.raises(ConfigError) as caught:
        Folder.at(load_config(tmp_path / "run.yaml", [setting]).output)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", ["a/b.png", "a?b.png", "a#b c%20.png", ""])
def test_a_key_may_hold_any_character(key: str) -> None:
    assert split_uri(f"s3://bucket/{key}") == ("bucket", key)


@pytest.mark.parametrize("uri", ["s3:///x", "s3://bucket?region=x/y"])
def test_a_uri_without_a_plain_bucket_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="write it as s3://bucket/prefix"):
        split_uri(uri)


def test_what_the_config_leaves_open_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert (endpoint_url(StorageConfig()), region_name(StorageConfig())) == (None, None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert (endpoint_url(StorageConfig()), region_name(StorageConfig())) == ("http://store:9000", "eu-west-1")
    given = StorageConfig(endpoint="other.example", region="x")
    assert (endpoint_url(given), region_name(given)) == ("https://other.example", "x")


@pytest.mark.parametrize(
    "kind", [ConnectTimeoutError, EndpointConnectionError, ConnectionClosedError, ReadTimeoutError]
)
def test_a_store_that_cannot_be_reached_is_away(kind: type[Exception]) -> None:
    with pytest.raises(s3.AwayError, match=f"s3://b/x: {kind.__name__}"), s3.translated("s3://b/x"):
        raise kind(endpoint_url="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("code", "status", "kind", "message"),
    [
        ("TooManyRequests", 429, s3.AwayError, "the storage answered TooManyRequests"),
        ("SlowDown", 503, s3.AwayError, "the storage answered SlowDown"),
        ("RequestTimeout", 400, s3.AwayError, "the storage answered RequestTimeout"),
        (
            "PermanentRedirect",
            301,
            InputError,
            r"s3://b is not in the region .*\(PermanentRedirect\); set storage.region",
        ),
        ("AuthorizationHeaderMalformed", 400, InputError, r"set storage\.region or AWS_REGION"),
        ("RequestTimeTooSkewed", 403, InputError, r"access to s3://b was refused \(RequestTimeTooSkewed\)"),
        ("PreconditionFailed", 412, FileExistsError, "changed by another job"),
        ("InvalidObjectState", 400, OSError, "the storage answered InvalidObjectState"),
    ],
)
def test_what_the_storage_answers_is_the_users_the_stores_or_the_objects(
    code: str, status: int, kind: type[Exception], message: str
) -> None:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(kind, match=message) as caught, s3.translated("s3://b/x"):
        raise ClientError(answer, "GetObject")
    assert type(caught.value) is kind


def test_a_store_that_refuses_connections_is_waited_for_but_not_by_the_first_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3, "OUTAGE_POLL_S", 0.05)
    monkeypatch.setitem(s3.client.__kwdefaults__, "attempts", 1)  # boto3 would wait longer and longer in between
    with moto_server() as url:  # whose buckets outlive it
        client(url).create_bucket(Bucket="photos")
        port = int(url.rpartition(":")[2])
    endpoint = f"http://127.0.0.1:{port}"
    use_s3(StorageConfig(endpoint=endpoint, access_key=ACCESS_KEY, secret_key=SECRET_KEY))
    with pytest.raises(InputError, match="s3://photos cannot be reached"):
        Folder.reachable("s3://photos/folder")
    folder = Folder.at("s3://photos/folder")
    use_s3(StorageConfig())
    with ThreadPoolExecutor(1) as thread:
        written = thread.submit(folder.write_bytes, "x", b"there")
        with pytest.raises(TimeoutError):
            written.result(timeout=1.0)
        with moto_server(port=port):
            written.result(timeout=30)
            assert folder.read_bytes("x") == b"there"
