"""S3 and compatible stores through boto3, for what pyarrow lacks: conditional puts, listings in pages, one request per
read, time limits and retries.

Access to S3 is a setting of the process (:func:`use_s3`): the `storage` section of the config, and the environment for
everything that it leaves open. A :class:`~icce_ray.store.Folder` keeps the options it was created with, so that a
worker needs no setup. Secrets appear in no ``repr`` and in no message.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

from pydantic import SecretStr

from icce_ray.config import StorageConfig
from icce_ray.errors import ConfigError, InputError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
"""Time without a byte after which a request is sent again."""
MAX_ATTEMPTS = 8
BODY_ATTEMPTS = 4
"""Attempts to read a body that breaks off, which boto3 does not retry."""
MISSING = ("NoSuchKey", "404", "NotFound")
REFUSED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401")
CONDITION_FAILED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


_current = StorageConfig()


def use_s3(options: StorageConfig) -> None:
    """Use `options` for S3 in this process from now on."""
    global _current
    _current = options


def current_options() -> StorageConfig:
    return _current


def endpoint_url(options: StorageConfig) -> str | None:
    """The endpoint with its scheme, or None for AWS."""
    url = options.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return url if not url or "://" in url else f"https://{url}"


def region_name(options: StorageConfig) -> str | None:
    region = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return region or ("us-east-1" if endpoint_url(options) else None)


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, key) of ``s3://bucket/key``. A key may hold any character, including ``?`` and ``#``.

    Raises:
        ConfigError: the URI holds credentials, which would end up in manifests, or no bucket.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise ConfigError(
            f"s3://...@{bucket.rpartition('@')[2]}: credentials do not belong in a URI, which manifests repeat; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or storage.access_key and storage.secret_key"
        )
    if not bucket or "?" in bucket:
        raise ConfigError(f"{uri}: write it as s3://bucket/prefix; endpoint and region belong in the storage section")
    return bucket, key


@functools.lru_cache(maxsize=16)
def _client_of(process: int, options: StorageConfig, url: str | None, read_timeout_s: float, attempts: int) -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    settings = Config(
        connect_timeout=min(CONNECT_TIMEOUT_S, read_timeout_s),
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=64,
        s3={"addressing_style": "path"} if url else None,
        **({"signature_version": UNSIGNED} if options.anonymous else {}),
    )
    with _making:  # boto3's default session is not thread-safe
        return boto3.client(
            "s3",
            endpoint_url=url,
            region_name=region_name(options),
            aws_access_key_id=_plain(options.access_key),
            aws_secret_access_key=_plain(options.secret_key),
            aws_session_token=_plain(options.session_token),
            config=settings,
        )


_making = threading.Lock()


def client(options: StorageConfig, *, read_timeout_s: float = READ_TIMEOUT_S, attempts: int = MAX_ATTEMPTS) -> Any:
    """A boto3 client, one per process and kind, which threads may share."""
    return _client_of(os.getpid(), options, endpoint_url(options), read_timeout_s, attempts)


def filesystem(options: StorageConfig) -> Any:
    """The same store as a pyarrow filesystem."""
    import pyarrow.fs as pafs

    url = endpoint_url(options)
    parts = urlsplit(url) if url else None
    return pafs.S3FileSystem(
        access_key=_plain(options.access_key),
        secret_key=_plain(options.secret_key),
        session_token=_plain(options.session_token),
        anonymous=options.anonymous,
        region=region_name(options),
        scheme=parts.scheme if parts else None,
        endpoint_override=parts.netloc + parts.path.rstrip("/") if parts else None,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        allow_delayed_open=True,
    )


def check_bucket(uri: str, options: StorageConfig, setting: str) -> None:
    """Fail within seconds if a bucket cannot be reached.

    Raises:
        InputError: there is no such bucket, credentials are refused or missing, or nothing answers.
    """
    bucket, _ = split_uri(uri)
    try:
        with translated(f"s3://{bucket}"):
            client(options, read_timeout_s=CONNECT_TIMEOUT_S, attempts=3).list_objects_v2(Bucket=bucket, MaxKeys=1)
    except InputError as error:
        raise InputError(f"{setting}: {error}") from None
    except OSError as error:
        raise InputError(f"{setting}: s3://{bucket} cannot be reached: {error}") from None


def list_objects(uri: str, options: StorageConfig, *, recursive: bool = True) -> Iterator[tuple[str, int, str]]:
    """(key, size, etag) of each object under the prefix, in the order of the keys' UTF-8 bytes, page by page."""
    bucket, prefix = split_uri(uri)
    extra = {} if recursive else {"Delimiter": "/"}
    with translated(uri):
        pages = client(options).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **extra)
        for page in pages:
            for entry in page.get("Contents", ()):
                yield entry["Key"], entry["Size"], entry["ETag"].strip('"')


def get_object(uri: str, options: StorageConfig, num_bytes: int | None = None) -> bytes:
    """Content of an object. Raises FileNotFoundError if there is none.

    Args:
        uri: the object.
        options: access to S3.
        num_bytes: its expected size. Another length is accepted only if it comes repeatedly.
    """
    for last in [False] * (BODY_ATTEMPTS - 1) + [True]:
        try:
            with translated(uri):
                data = get_once(uri, client(options))
            if last or num_bytes in (None, len(data)):
                return data
        except FileNotFoundError:
            raise
        except OSError:
            if last:
                raise
    raise AssertionError


def get_once(uri: str, client: Any, start: int = 0, num_bytes: int | None = None) -> bytes:
    """Content of an object, or `num_bytes` of it from `start` on, in one request. Call it within :func:`translated`."""
    bucket, key = split_uri(uri)
    span = {} if num_bytes is None else {"Range": f"bytes={start}-{start + num_bytes - 1}"}
    answer = client.get_object(Bucket=bucket, Key=key, **span)
    data: bytes = answer["Body"].read()
    if num_bytes is not None and len(data) != num_bytes:
        raise OSError(f"{uri}: {len(data)} of {num_bytes} bytes arrived")
    return data


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn boto3's errors into FileNotFoundError, InputError (bucket, credentials) or OSError (all others)."""
    try:
        yield
    except Exception as error:
        raise_translated(error, uri)


def raise_translated(error: BaseException, uri: str) -> NoReturn:
    """Raise our error for one of boto3's, and any other error unchanged."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        bucket = uri.removeprefix("s3://").partition("/")[0]
        if code in MISSING:
            raise FileNotFoundError(f"{uri}: there is no such object") from None
        if code == "NoSuchBucket":
            raise InputError(f"there is no bucket s3://{bucket}; check its name, and storage.endpoint") from None
        if code in REFUSED:
            raise InputError(
                f"access to s3://{bucket} was refused ({code}); check the credentials (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the storage section) and what they may do"
            ) from None
        if code in CONDITION_FAILED:
            raise FileExistsError(f"{uri}: exists already, or was changed by another job") from None
        raise OSError(f"{uri}: the storage answered {code}") from None
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        raise InputError(
            f"{uri}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the "
            "storage section (storage.anonymous: true for a public bucket)"
        ) from None
    if isinstance(error, BotoCoreError) or type(error).__module__.startswith(("urllib3", "botocore")):
        raise OSError(f"{uri}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    raise error
