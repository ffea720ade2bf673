"""S3 and compatible stores through boto3, for what pyarrow lacks: conditional puts, listings in pages, one request per
read, time limits and retries. While a store is away, calls wait for it, at most OUTAGE_S.

Access to S3 is a setting of the process (:func:`use_s3`): the `storage` section of the config, and the environment for
everything that it leaves open. A :class:`~icce_ray.store.Folder` keeps the options it was created with, so that a
worker needs no setup. Secrets appear in no ``repr`` and in no message.
"""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from icce_ray.config import StorageConfig
from icce_ray.errors import ConfigError, InputError, WorkerError, one_line
from icce_ray.store import object_lists

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
"""Time without a byte after which a request is sent again."""
MAX_ATTEMPTS = 8
OUTAGE_S = 600.0
"""Longest wait for a store that is away."""
OUTAGE_POLL_S = 2.0
MIN_BYTES_PER_S = 20_000
"""A body that arrives more slowly is given up after a while."""
CHUNK_BYTES = 2**20
BODY_ATTEMPTS = 4
"""Attempts to read a body that has another length than expected."""
MISSING = ("NoSuchKey", "404", "NotFound")
REFUSED = (
    *("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401"),
    "RequestTimeTooSkewed",  # the clock of this machine
)
ELSEWHERE = ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
CONDITION_FAILED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
THROTTLED = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded")
BUSY = (408, 429)
"""Status of the answer, besides those from 500 on."""

T = TypeVar("T")


class AwayError(OSError):
    """The store does not answer, or is too busy: this says nothing about the object."""


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


def credentials(options: StorageConfig) -> dict[str, str | None]:
    """Those of the config, by setting; None where the environment has them."""
    secrets = {name: getattr(options, name) for name in ("access_key", "secret_key", "session_token")}
    return {name: secret and secret.get_secret_value() for name, secret in secrets.items()}


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, key) of ``s3://bucket/key``. A key may hold any character, including ``?`` and ``#``. Raises
    ConfigError: the URI holds credentials, which would end up in manifests, or no bucket."""
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
    secrets = credentials(options)
    with _making:  # boto3's default session is not thread-safe
        made = boto3.client(
            "s3",
            endpoint_url=url,
            region_name=region_name(options),
            aws_access_key_id=secrets["access_key"],
            aws_secret_access_key=secrets["secret_key"],
            aws_session_token=secrets["session_token"],
            config=settings,
        )
    made.meta.events.register_first(object_lists.EVENT, object_lists.take_contents)
    return made


_making = threading.Lock()


def client(options: StorageConfig, *, read_timeout_s: float = READ_TIMEOUT_S, attempts: int = MAX_ATTEMPTS) -> Any:
    """A boto3 client, one per process and kind, which threads may share."""
    return _client_of(os.getpid(), options, endpoint_url(options), read_timeout_s, attempts)


def check_bucket(uri: str, options: StorageConfig) -> None:
    """See :func:`icce_ray.store.filesystem.check_store`."""
    bucket, _ = split_uri(uri)
    try:
        with translated(f"s3://{bucket}"):
            client(options, read_timeout_s=CONNECT_TIMEOUT_S, attempts=3).list_objects_v2(Bucket=bucket, MaxKeys=1)
    except OSError as error:
        raise InputError(f"s3://{bucket} cannot be reached: {error}") from None


def answers(uri: str, options: StorageConfig) -> bool:
    """Whether the store answers now, whatever it answers, to a request for one byte of the object `uri`; for a bucket,
    to a listing."""
    bucket, key = split_uri(uri)
    store = client(options, read_timeout_s=CONNECT_TIMEOUT_S, attempts=1)
    try:
        with translated(uri):
            if key:
                get_once(uri, store, 0, 1)
            else:
                store.list_objects_v2(Bucket=bucket, MaxKeys=1)
    except AwayError:
        return False
    except (OSError, InputError):
        pass
    return True


def patiently(uri: str, call: Callable[[], T], max_wait_s: float | None = None) -> T:
    """`call()`, again and again while the store is away. Raises what :func:`translated` raises; WorkerError: the store
    has been away for `max_wait_s`, OUTAGE_S if None. `uri` is for messages."""
    max_wait_s = OUTAGE_S if max_wait_s is None else max_wait_s
    began = time.monotonic()
    while True:
        try:
            with translated(uri):
                return call()
        except AwayError as error:
            if time.monotonic() - began >= max_wait_s:
                raise given_up(uri, error) from None
        time.sleep(OUTAGE_POLL_S)


def given_up(uri: str, error: object) -> WorkerError:
    return WorkerError(
        f"the storage has been away for {OUTAGE_S / 60:.0f} min ({error}). What is finished is kept: run the same "
        f"command again when {'/'.join(uri.split('/')[:3])} can be reached"
    )


def list_pages(uri: str, options: StorageConfig, **settings: str) -> Iterator[dict[str, Any]]:
    """The pages of a listing. `settings` are those of boto3's ``list_objects_v2``."""
    bucket, prefix = split_uri(uri)
    while True:
        page = patiently(uri, lambda: client(options).list_objects_v2(Bucket=bucket, Prefix=prefix, **settings))
        yield page
        if not page.get("IsTruncated"):
            return
        settings["ContinuationToken"] = page["NextContinuationToken"]


def get_object(uri: str, options: StorageConfig, num_bytes: int | None = None) -> bytes:
    """Content of an object. If it is not as long as expected, that is accepted only if it comes repeatedly. Raises
    FileNotFoundError if there is none."""
    for _ in range(BODY_ATTEMPTS):
        data = patiently(uri, lambda: get_once(uri, client(options)))
        if num_bytes in (None, len(data)):
            break
    return data


def get_once(
    uri: str,
    client: Any,
    start: int = 0,
    num_bytes: int | None = None,
    *,
    max_slow_s: float = READ_TIMEOUT_S,
    max_bytes: int | None = None,
    etag: str | None = None,
) -> bytes:
    """Content of an object, or `num_bytes` of it from `start` on, in one request. Call it within :func:`translated`.
    An object with another `etag` (without its quotes) is not read. Raises AwayError: the body broke off, or took longer
    than `max_slow_s` and a second for each MIN_BYTES_PER_S; ValueError: over `max_bytes`."""
    bucket, key = split_uri(uri)
    options = {} if num_bytes is None else {"Range": f"bytes={start}-{start + num_bytes - 1}"}
    options |= {"IfMatch": f'"{etag}"'} if etag else {}
    answer = client.get_object(Bucket=bucket, Key=key, **options)
    wanted = int(answer["ContentLength"])
    if max_bytes is not None and wanted > max_bytes:
        answer["Body"].close()
        raise ValueError(f"over the limit of {max_bytes} bytes")
    data, began = bytearray(), time.monotonic()
    # The only read that returns what has arrived: with all others, a byte a second keeps a timeout from ever coming.
    read = answer["Body"]._raw_stream.read1
    with answer["Body"]:
        while chunk := read(CHUNK_BYTES):
            data += chunk
            seconds = time.monotonic() - began
            if len(data) < wanted and seconds > max_slow_s + len(data) / MIN_BYTES_PER_S:
                raise AwayError(f"{uri}: only {len(data)} of {wanted} bytes arrived in {seconds:.0f} s")
    if len(data) != wanted or num_bytes not in (None, wanted):
        raise AwayError(f"{uri}: {len(data)} of {num_bytes or wanted} bytes arrived")
    return bytes(data)


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn boto3's errors into FileNotFoundError, FileExistsError (of a condition), InputError (bucket, credentials),
    AwayError, or OSError (others)."""
    try:
        yield
    except Exception as error:
        if (ours := _translation(error, uri)) is None:
            raise
        raise ours from None


def _translation(error: Exception, uri: str) -> Exception | None:
    """Our error for one of boto3's."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        bucket = uri.removeprefix("s3://").partition("/")[0]
        if code in MISSING:
            return FileNotFoundError(f"{uri}: there is no such object")
        if code == "NoSuchBucket":
            return InputError(f"there is no bucket s3://{bucket}; check its name, and storage.endpoint")
        if code in REFUSED:
            return InputError(
                f"access to s3://{bucket} was refused ({code}); check the credentials (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the storage section) and what they may do"
            )
        if code in CONDITION_FAILED:
            return FileExistsError(f"{uri}: exists already, or was changed by another job")
        if code in ELSEWHERE:
            region = region_name(_current)
            return InputError(f"s3://{bucket} is not in the region {region} ({code}); set storage.region or AWS_REGION")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        is_away = code in THROTTLED or status >= 500 or status in BUSY
        return (AwayError if is_away else OSError)(f"{uri}: the storage answered {code}")
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return InputError(
            f"{uri}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the "
            "storage section (storage.anonymous: true for a public bucket)"
        )
    connection_errors = boto.HTTPClientError, boto.ConnectionError, ConnectionError, TimeoutError
    if isinstance(error, connection_errors) or type(error).__module__.startswith(("urllib3", "http")):
        return AwayError(f"{uri}: {one_line(error)}")
    return OSError(f"{uri}: {one_line(error)}") if isinstance(error, boto.BotoCoreError) else None
