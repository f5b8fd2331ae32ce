"""Access to S3: addresses, clients, bounded retries, and one clear line for each failure.

The endpoint and the credentials come from the environment alone: `AWS_ENDPOINT_URL` (absent: AWS itself),
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`. No function here logs or returns a secret.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
from boto3.exceptions import Boto3Error
from botocore.config import Config

from tinyemo.errors import StorageError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 20.0
MAX_ATTEMPTS = 3
"""Attempts for one request; a dead endpoint costs that many connect timeouts and two short pauses, under 15 s."""
MAX_CLOCK_ERROR_S = 14 * 60.0
"""S3 refuses requests that were signed 15 minutes before or after it gets them; to HEAD it does not say why."""
TRANSFER_THREADS = 4
MAX_KEYS_PER_DELETE = 1000
"""Most keys that S3's DeleteObjects takes."""

_CLIENT_LOCK = threading.Lock()
_COUNT_LOCK = threading.Lock()
_fetched_bytes = 0
_MISSING_CODES = frozenset({"NoSuchKey", "NotFound", "404"})
_CREDENTIAL_CODES = frozenset(
    {
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "AuthorizationHeaderMalformed",
        "Forbidden",
        "403",
    }
)


class MissingObjectError(StorageError):
    """Error for an object that does not exist in a bucket that does."""


class NoAnswerError(StorageError):
    """Error for a server that does not answer: the same request may succeed later."""


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key; the key may be empty and never starts or ends with a slash.

    Raises:
        StorageError: where `uri` is not an S3 address.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise StorageError(f"{uri!r} is not an S3 address: write s3://bucket/key")
    return parts.netloc, parts.path.strip("/")


def endpoint_url() -> str | None:
    """Return the endpoint from the environment, or None for AWS itself.

    Raises:
        StorageError: where the variable does not hold an http(s) address.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise StorageError(f"AWS_ENDPOINT_URL is {endpoint!r}: it must look like http://host:port")
    return endpoint


def region() -> str:
    """Return the region from the environment, or us-east-1 where none is set."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


@cache
def _build_client(endpoint: str | None, region_name: str, _credentials: tuple[str | None, ...], _pid: int) -> Any:
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
        max_pool_connections=4 * TRANSFER_THREADS,
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    built = boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region_name, config=config)
    built.meta.events.register("after-call.s3.GetObject", _count_fetched)
    return built


def _count_fetched(parsed: dict[str, Any], **_: Any) -> None:
    """Add the size of one GetObject answer; boto3 calls this also for the parts of a large download."""
    global _fetched_bytes  # noqa: PLW0603  # one figure per process
    with _COUNT_LOCK:
        _fetched_bytes += int(parsed.get("ContentLength", 0))


def fetched_bytes() -> int:
    """Return how many bytes of objects this process has asked boto3 for so far, retries included; pyarrow not."""
    return _fetched_bytes


def client() -> Any:
    """Return a boto3 S3 client for this environment, built once per process and environment; threads may share it."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    credentials = tuple(os.environ.get(name) for name in names)
    with _CLIENT_LOCK:
        return _build_client(endpoint_url(), region(), credentials, os.getpid())


def filesystem() -> Any:
    """Return a `pyarrow.fs.S3FileSystem` on the same endpoint; its paths have no scheme: `bucket/key`.

    It holds no credentials and can be pickled to other nodes: each process reads its own environment.
    """
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    options: dict[str, Any] = {
        "region": region(),
        "allow_bucket_creation": False,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "request_timeout": READ_TIMEOUT_S,
        "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    }
    endpoint = endpoint_url()
    if endpoint is not None:
        parts = urlsplit(endpoint)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    return S3FileSystem(**options)


def _where() -> str:
    return endpoint_url() or f"AWS {region()}"


def _error_code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _clock_error_s(error: botocore.exceptions.ClientError) -> float:
    """Return how many seconds the clock that signs requests here is ahead of that of the server that answered."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return (_now() - parsedate_to_datetime(date)).total_seconds() if date else 0.0


def _now() -> datetime:
    return datetime.now(UTC)


def _describe_answer(code: str, uri: str, where: str, ahead_s: float = 0.0) -> StorageError:
    if code == "RequestTimeTooSkewed" or (code == "403" and abs(ahead_s) > MAX_CLOCK_ERROR_S):
        return StorageError(
            f"the clock of {socket.gethostname()} is {abs(ahead_s) / 60:.0f} minutes "
            f"{'ahead of' if ahead_s > 0 else 'behind'} that of S3 at {where}, which refuses its requests: set it"
        )
    if code == "NoSuchBucket":
        bucket = urlsplit(uri).netloc
        return StorageError(f"bucket {bucket!r} does not exist at {where}: create it or name another one")
    if code in _MISSING_CODES:
        return MissingObjectError(f"{uri} does not exist at {where}: check the address")
    if code in _CREDENTIAL_CODES:
        # A key of least rights gets this answer also where the bucket does not exist.
        return StorageError(
            f"{where} refuses the credentials for {uri} ({code}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"and that the bucket {urlsplit(uri).netloc!r} exists and admits them"
        )
    return StorageError(f"{where} answered {code} for {uri}: look into the log of the S3 server")


def _describe(error: Exception, uri: str) -> StorageError:
    where = _where()
    if isinstance(error, botocore.exceptions.ClientError):
        return _describe_answer(_error_code(error), uri, where, _clock_error_s(error))
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return StorageError(f"no S3 credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, botocore.exceptions.HTTPClientError | botocore.exceptions.ConnectionError):
        return NoAnswerError(
            f"S3 at {where} does not answer for {uri} ({type(error).__name__}): "
            "start it (`tinyemo platform up`) or set AWS_ENDPOINT_URL"
        )
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    return StorageError(f"S3 at {where} failed on {uri}: {type(error).__name__}: {reason}")


@contextlib.contextmanager
def _typed_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise _describe(error, uri) from error
    except Boto3Error as error:
        cause = error.__context__
        is_inner = isinstance(cause, botocore.exceptions.BotoCoreError | botocore.exceptions.ClientError)
        raise _describe(cause if is_inner and isinstance(cause, Exception) else error, uri) from error


def _get(uri: str, **options: str) -> tuple[bytes, str]:
    bucket, key = parse_s3_uri(uri)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        with _typed_errors(uri):
            try:
                answer = client().get_object(Bucket=bucket, Key=key, **options)
                return answer["Body"].read(), str(answer["ETag"])
            except botocore.exceptions.ClientError as error:
                if _error_code(error) in ("InvalidRange", "416"):
                    return b"", ""  # the object ends before the range starts, for instance because it is empty
                raise
            except (
                botocore.exceptions.IncompleteReadError,
                botocore.exceptions.ResponseStreamingError,
                botocore.exceptions.ReadTimeoutError,
            ) as error:
                if attempt == MAX_ATTEMPTS:
                    raise
                logger.warning("reading %s broke off (%s), attempt %d", uri, type(error).__name__, attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _put(uri: str, data: bytes, **condition: str) -> str | None:
    """Store an object, whole or not at all; return its ETag, or None where the condition does not hold."""
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        try:
            return str(client().put_object(Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
        except botocore.exceptions.ClientError as error:
            # AWS answers 404 to IfMatch where there is no object, and 409 where another conditional write is under way.
            if condition and _error_code(error) in (
                "PreconditionFailed",
                "412",
                "NoSuchKey",
                "ConditionalRequestConflict",
            ):
                return None
            raise


def read_bytes(uri: str, *, start: int = 0, length: int | None = None) -> bytes:
    """Return the object's bytes, or up to `length` of them (None: to its end) from offset `start`.

    Raises:
        MissingObjectError: where the object does not exist.
        StorageError: for every other failure of S3.
    """
    if not start and length is None:
        return _get(uri)[0]
    return _get(uri, Range=f"bytes={start}-{'' if length is None else start + length - 1}")[0]


def read_with_etag(uri: str) -> tuple[bytes, str]:
    """Return the object's bytes and its ETag, which `write_bytes_if_match` takes.

    Raises:
        MissingObjectError: where the object does not exist.
    """
    return _get(uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Store `data` at `uri`; the object appears whole or not at all."""
    _put(uri, data)


def write_bytes_if_absent(uri: str, data: bytes) -> bool:
    """Store `data` where no object exists yet; return True where this call stored it.

    A write whose answer was lost and that boto3 sent again returns False: read the object to learn who wrote it.
    """
    return _put(uri, data, IfNoneMatch="*") is not None


def write_bytes_if_match(uri: str, data: bytes, etag: str) -> str | None:
    """Replace the object if it still has this ETag; return the new ETag, or None where the object has changed.

    Put something unique into `data`, for instance a token and a counter: a write whose answer was lost is recognised
    by its content.
    """
    written = _put(uri, data, IfMatch=etag)
    if written is None:
        with contextlib.suppress(MissingObjectError):
            found, found_etag = read_with_etag(uri)
            return found_etag if found == data else None
    return written


def delete(uri: str) -> None:
    """Remove the object; do nothing where there is none."""
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        client().delete_object(Bucket=bucket, Key=key)


def delete_prefix(uri: str) -> int:
    """Remove every object under the folder `uri`; return how many there were.

    Raises:
        StorageError: where an object cannot be removed, or `uri` is a whole bucket.
    """
    bucket, prefix = parse_s3_uri(uri)
    if not prefix:
        raise StorageError(f"{uri} is a whole bucket: name a folder in it")
    keys = [address.removeprefix(f"s3://{bucket}/") for address in list_prefix(uri)]
    with _typed_errors(uri):
        for first in range(0, len(keys), MAX_KEYS_PER_DELETE):
            objects = [{"Key": key} for key in keys[first : first + MAX_KEYS_PER_DELETE]]
            answer = client().delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
            for failure in answer.get("Errors", []):
                raise _describe_answer(failure["Code"], f"s3://{bucket}/{failure['Key']}", _where())
    return len(keys)


def read_json(uri: str) -> Any:
    """Return the JSON document at `uri`.

    Raises:
        StorageError: also where the object is not JSON.
    """
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{uri} holds no JSON: write it again") from error


def write_json(uri: str, document: Any) -> None:
    """Store a JSON document with sorted keys, so that equal documents are equal bytes."""
    write_bytes(uri, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())


def bucket_exists(bucket: str) -> bool:
    """Return True where the bucket exists and these credentials may see it."""
    with _typed_errors(f"s3://{bucket}"):
        try:
            client().head_bucket(Bucket=bucket)
        except botocore.exceptions.ClientError as error:
            if _error_code(error) in _MISSING_CODES | {"NoSuchBucket"}:
                return False
            raise
    return True


def age_s(uri: str) -> float:
    """Return how many seconds ago the object was written, by the clock of the S3 server alone; whole seconds.

    Raises:
        MissingObjectError: where the object does not exist.
    """
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        answer = client().head_object(Bucket=bucket, Key=key)
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - answer["LastModified"]).total_seconds())


def newest_age_s(uri: str) -> float:
    """Return how many seconds ago anything under the folder `uri` was written last, by the S3 server's clock."""
    bucket, key = parse_s3_uri(uri)
    ages = []
    with _typed_errors(uri):
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/"):
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            ages += [(now - item["LastModified"]).total_seconds() for item in page.get("Contents", [])]
    return min(ages, default=float("inf"))


def exists(uri: str) -> bool:
    """Return True where the object exists.

    Raises:
        StorageError: also where the bucket does not exist.
    """
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        try:
            client().head_object(Bucket=bucket, Key=key)
        except botocore.exceptions.ClientError as error:
            if _error_code(error) not in _MISSING_CODES:
                raise
        else:
            return True
    if not bucket_exists(bucket):
        raise _describe_answer("NoSuchBucket", uri, _where())
    return False


def ensure_bucket(bucket: str) -> None:
    """Create the bucket where it does not exist yet."""
    if bucket_exists(bucket):
        return
    options: dict[str, Any] = {}
    if endpoint_url() is None and region() != "us-east-1":
        options["CreateBucketConfiguration"] = {"LocationConstraint": region()}
    with _typed_errors(f"s3://{bucket}"):
        try:
            client().create_bucket(Bucket=bucket, **options)
        except client().exceptions.BucketAlreadyOwnedByYou:
            logger.debug("bucket %s was created by someone else meanwhile", bucket)


def list_prefix(uri: str) -> dict[str, int]:
    """Return the address and the bytes of every object under the folder `uri`, in the order of the addresses."""
    return {address: int(item["Size"]) for address, item in _list_objects(uri)}


def list_etags(uri: str) -> dict[str, str]:
    """Return the address and the ETag of every object under the folder `uri`; an ETag changes with the content."""
    return {address: str(item["ETag"]) for address, item in _list_objects(uri)}


def _list_objects(uri: str) -> list[tuple[str, Any]]:
    bucket, key = parse_s3_uri(uri)
    prefix = f"{key}/" if key else ""
    found: list[tuple[str, Any]] = []
    with _typed_errors(uri):
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            items = page.get("Contents", [])
            # Some servers list folders.
            found += [(f"s3://{bucket}/{item['Key']}", item) for item in items if not item["Key"].endswith("/")]
    return sorted(found, key=lambda pair: pair[0])


def upload_file(path: Path, uri: str) -> None:
    """Store a local file; a large one travels in parts."""
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        client().upload_file(str(path), bucket, key)


def download_file(uri: str, path: Path) -> None:
    """Fetch an object to `path`; the file appears whole or not at all."""
    bucket, key = parse_s3_uri(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _typed_errors(uri):
        client().download_file(bucket, key, str(path))  # writes beside `path` and renames


def upload_folder(folder: Path, uri: str) -> int:
    """Store every file of `folder` under `uri`; return the number of files.

    Raises:
        StorageError: where the folder is empty or S3 fails.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise StorageError(f"{folder} holds no file to store at {uri}")
    with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
        list(pool.map(upload_file, files, [f"{uri.rstrip('/')}/{path.relative_to(folder)}" for path in files]))
    return len(files)


def download_folder(uri: str, folder: Path) -> int:
    """Fetch every object under `uri` into `folder`; return the number of files.

    Raises:
        MissingObjectError: where no object is under `uri`.
        StorageError: where a key would lead out of `folder`.
    """
    root = uri.rstrip("/") + "/"
    targets = {address: folder / address[len(root) :] for address in list_prefix(uri)}
    if not targets:
        raise MissingObjectError(f"nothing is stored under {root} at {_where()}")
    for address, path in targets.items():
        if not path.resolve().is_relative_to(folder.resolve()):  # "..", a double slash, or a link in the folder
            raise StorageError(f"{address} would be written outside {folder}: rename it")
    with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
        list(pool.map(download_file, targets.keys(), targets.values()))
    return len(targets)
