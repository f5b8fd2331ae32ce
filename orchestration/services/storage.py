"""The one module that knows S3: addresses, clients, bounded retries, and one clear line for each failure.

The endpoint and the credentials come from the environment alone: `AWS_ENDPOINT_URL` (absent: AWS itself),
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`. Nothing here logs or returns a secret.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
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
"""A dead endpoint costs at most MAX_ATTEMPTS connect timeouts and two short back-offs: under 15 s."""
TRANSFER_THREADS = 4

_CLIENT_LOCK = threading.Lock()
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
_Result = TypeVar("_Result")


class MissingObjectError(StorageError):
    """The bucket answers, the object is not there."""


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; the key may be empty and never starts or ends with a slash.

    Raises:
        StorageError: where `uri` is no S3 address.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise StorageError(f"{uri!r} is not an S3 address: write s3://bucket/key")
    return parts.netloc, parts.path.strip("/")


def endpoint_url() -> str | None:
    """The endpoint from the environment, None for AWS itself.

    Raises:
        StorageError: where the variable holds no http(s) address.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise StorageError(f"AWS_ENDPOINT_URL is {endpoint!r}: it must look like http://host:port")
    return endpoint


def region() -> str:
    """The region from the environment; us-east-1 where none is set."""
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
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region_name, config=config)


def client() -> Any:
    """A boto3 S3 client for the current environment: built once per process and environment, safe over threads."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    credentials = tuple(os.environ.get(name) for name in names)
    with _CLIENT_LOCK:
        return _build_client(endpoint_url(), region(), credentials, os.getpid())


def filesystem() -> Any:
    """A `pyarrow.fs.S3FileSystem` on the same endpoint; it takes paths without the scheme: `bucket/key`.

    The credentials stay out of it, so it can be pickled to other nodes without a secret inside: each process reads its
    own environment.
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


def _describe_answer(code: str, uri: str, where: str) -> StorageError:
    """The line for an error code that the server answered."""
    if code == "NoSuchBucket":
        bucket = urlsplit(uri).netloc
        return StorageError(f"bucket {bucket!r} does not exist at {where}: create it or name another one")
    if code in _MISSING_CODES:
        return MissingObjectError(f"{uri} does not exist at {where}: check the address")
    if code in _CREDENTIAL_CODES:
        return StorageError(
            f"{where} refuses the credentials for {uri} ({code}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return StorageError(f"{where} answered {code} for {uri}: look into the log of the S3 server")


def _describe(error: Exception, uri: str) -> StorageError:
    """The one line for a failure on `uri`: what was asked, where, and what to do."""
    where = endpoint_url() or f"AWS {region()}"
    if isinstance(error, botocore.exceptions.ClientError):
        return _describe_answer(str(error.response.get("Error", {}).get("Code", "unknown")), uri, where)
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return StorageError(f"no S3 credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, botocore.exceptions.HTTPClientError | botocore.exceptions.ConnectionError):
        return StorageError(
            f"S3 at {where} does not answer for {uri} ({type(error).__name__}): "
            "start it (`tinyemo platform up`) or set AWS_ENDPOINT_URL"
        )
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    return StorageError(f"S3 at {where} failed on {uri}: {type(error).__name__}: {reason}")


@contextlib.contextmanager
def _typed_errors(uri: str) -> Iterator[None]:
    """Turn every failure of boto3 and botocore inside the block into a StorageError about `uri`."""
    try:
        yield
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise _describe(error, uri) from error
    except Boto3Error as error:
        cause = error.__context__
        is_inner = isinstance(cause, botocore.exceptions.BotoCoreError | botocore.exceptions.ClientError)
        raise _describe(cause if is_inner and isinstance(cause, Exception) else error, uri) from error


def read_bytes(uri: str, *, start: int = 0, length: int | None = None) -> bytes:
    """The object's bytes, or up to `length` of them (to its end where None) from offset `start`.

    A body that breaks off is asked for again, MAX_ATTEMPTS times in all.

    Raises:
        MissingObjectError: where the object is not there.
        StorageError: for everything else that S3 can do wrong.
    """
    bucket, key = parse_s3_uri(uri)
    options: dict[str, str] = {}
    if start or length is not None:
        end = "" if length is None else str(start + length - 1)
        options["Range"] = f"bytes={start}-{end}"
    for attempt in range(1, MAX_ATTEMPTS + 1):
        with _typed_errors(uri):
            try:
                body: bytes = client().get_object(Bucket=bucket, Key=key, **options)["Body"].read()
            except botocore.exceptions.ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                    return b""  # nothing is stored behind `start`, for instance in an empty object
                raise
            except (
                botocore.exceptions.IncompleteReadError,
                botocore.exceptions.ResponseStreamingError,
                botocore.exceptions.ReadTimeoutError,
            ) as error:
                if attempt == MAX_ATTEMPTS:
                    raise
                logger.warning("reading %s broke off (%s), attempt %d", uri, type(error).__name__, attempt)
            else:
                return body
    raise AssertionError("unreachable: the last attempt returns or raises")


def write_bytes(uri: str, data: bytes) -> None:
    """Store `data` at `uri`; an object appears whole or not at all."""
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        client().put_object(Bucket=bucket, Key=key, Body=data)


def write_bytes_if_absent(uri: str, data: bytes) -> bool:
    """Store `data` unless something is there already; True where this call stored it.

    An answer that was lost on the way and asked for again counts as "already there": read the object to learn whose.
    """
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
                return False
            raise
    return True


def delete(uri: str) -> None:
    """Remove the object; harmless where there is none."""
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        client().delete_object(Bucket=bucket, Key=key)


def read_json(uri: str) -> Any:
    """The JSON document at `uri`.

    Raises:
        StorageError: also where the object holds no JSON.
    """
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{uri} holds no JSON: write it again") from error


def write_json(uri: str, document: Any) -> None:
    """Store a JSON document, keys sorted, so that equal documents are equal bytes."""
    write_bytes(uri, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())


def bucket_exists(bucket: str) -> bool:
    """Whether the bucket is there and these credentials may see it."""
    with _typed_errors(f"s3://{bucket}"):
        try:
            client().head_bucket(Bucket=bucket)
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") in _MISSING_CODES | {"NoSuchBucket"}:
                return False
            raise
    return True


def _require_bucket(bucket: str) -> None:
    if not bucket_exists(bucket):
        where = endpoint_url() or f"AWS {region()}"
        raise StorageError(f"bucket {bucket!r} does not exist at {where}: create it or name another one")


def exists(uri: str) -> bool:
    """Whether the object is there.

    Raises:
        StorageError: where the bucket is missing, too: that is never the answer "no".
    """
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        try:
            client().head_object(Bucket=bucket, Key=key)
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") not in _MISSING_CODES:
                raise
        else:
            return True
    _require_bucket(bucket)
    return False


def ensure_bucket(bucket: str) -> None:
    """Create the bucket where it is not there yet."""
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
    """Address -> bytes of every object under the folder `uri`, in the order of the addresses."""
    bucket, key = parse_s3_uri(uri)
    prefix = f"{key}/" if key else ""
    found: dict[str, int] = {}
    with _typed_errors(uri):
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # some servers list folders
                    found[f"s3://{bucket}/{item['Key']}"] = int(item["Size"])
    return dict(sorted(found.items()))


def upload_file(path: Path, uri: str) -> None:
    """Store a local file, in parts where it is large."""
    bucket, key = parse_s3_uri(uri)
    with _typed_errors(uri):
        client().upload_file(str(path), bucket, key)


def download_file(uri: str, path: Path) -> None:
    """Fetch an object to `path`, which appears whole or not at all."""
    bucket, key = parse_s3_uri(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _typed_errors(uri):
        client().download_file(bucket, key, str(path))  # writes beside `path` and renames


def _in_threads(work: Callable[[tuple[str, Path]], _Result], items: list[tuple[str, Path]]) -> list[_Result]:
    with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
        return list(pool.map(work, items))


def upload_folder(folder: Path, uri: str) -> int:
    """Store every file under `folder` under `uri`; the number of files.

    Raises:
        StorageError: where the folder is empty or S3 fails.
    """
    files = [(f"{uri.rstrip('/')}/{path.relative_to(folder)}", path) for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise StorageError(f"{folder} holds no file to store at {uri}")
    _in_threads(lambda item: upload_file(item[1], item[0]), sorted(files))
    return len(files)


def download_folder(uri: str, folder: Path) -> int:
    """Fetch every object under `uri` into `folder`; the number of files.

    Raises:
        MissingObjectError: where nothing is under `uri`.
    """
    root = uri.rstrip("/") + "/"
    objects = list_prefix(uri)
    if not objects:
        raise MissingObjectError(f"nothing is stored under {root} at {endpoint_url() or 'AWS'}")
    for address in objects:
        if ".." in address[len(root) :].split("/"):
            raise StorageError(f"{address} would be written outside {folder}: rename it")
    _in_threads(lambda item: download_file(*item), [(item, folder / item[len(root) :]) for item in objects])
    return len(objects)
