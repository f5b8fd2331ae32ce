"""How a version of a data set gets into S3: bounded uploads, the manifest after its files, the pointer last."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from orchestration.datasets.manifest import FileRef, M, Manifest, missing_files, parse_manifest
from orchestration.services import storage
from tinyemo.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_WAITING_UPLOADS = 2 * storage.TRANSFER_THREADS
"""Files that may wait in memory for a free upload thread."""

Advance = Callable[[str, int, int], None]
"""Called with (stage, units done, units in all)."""


def check_destination(name: str, root: str) -> None:
    """Fail before the long part where the name, the bucket or the credentials are wrong.

    Raises:
        ConfigError: the name cannot stand in an address.
        StorageError: `root` is no S3 address, or S3 refuses.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise ConfigError(f"name is {name!r}: use lower-case letters, digits, dots, dashes")
    bucket, _ = storage.parse_s3_uri(root)
    storage.exists(f"s3://{bucket}/.tinyemo-probe")


def existing_version(uri: str, digest: str, of: type[M]) -> M | None:
    """The version's manifest where it is there with all its files; None where it has to be (re)built."""
    try:
        manifest = parse_manifest(storage.read_json(f"{uri}/manifest.json"), uri, of)
    except storage.MissingObjectError:
        return None
    missing = missing_files(manifest)
    if manifest.digest != digest or missing:
        logger.warning("%s lacks %s: storing it again", uri, ", ".join(missing) or "its digest")
        return None
    return manifest


def publish(manifest: Manifest) -> None:
    """Write the manifest, whose files are all in S3, and point latest.json at it."""
    storage.write_json(f"{manifest.uri}/manifest.json", manifest.model_dump(mode="json"))
    point_latest_at(manifest)


def point_latest_at(manifest: Manifest) -> None:
    """Make this the version that the data set's plain address leads to."""
    uri = f"{manifest.uri.rsplit('/', 1)[0]}/latest.json"
    pointer = {"version": manifest.version, "digest": manifest.digest}
    try:
        if storage.read_json(uri) == pointer:
            return
    except storage.MissingObjectError:
        logger.debug("%s is new", uri)
    storage.write_json(uri, pointer)


class Uploads:
    """A bounded queue of uploads; the first failure comes out of `put` or at the end of `open_uploads`."""

    def __init__(self, uri: str, pool: ThreadPoolExecutor) -> None:
        self._uri = uri
        self._pool = pool
        self._waiting: set[Future[None]] = set()

    def put(self, path: str, data: bytes) -> FileRef:
        """Queue one file; waits where MAX_WAITING_UPLOADS are queued already."""
        while len(self._waiting) >= MAX_WAITING_UPLOADS:
            self._collect()
        self._waiting.add(self._pool.submit(storage.write_bytes, f"{self._uri}/{path}", data))
        return FileRef(path=path, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def _collect(self) -> None:
        done, self._waiting = wait(self._waiting, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()

    def finish(self) -> None:
        """Wait for all; raises what an upload raised."""
        while self._waiting:
            self._collect()


@contextmanager
def open_uploads(uri: str) -> Iterator[Uploads]:
    """Uploads into the folder `uri`; at the end of the block all are in S3."""
    pool = ThreadPoolExecutor(storage.TRANSFER_THREADS, thread_name_prefix="upload")
    try:
        uploads = Uploads(uri, pool)
        yield uploads
        uploads.finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
