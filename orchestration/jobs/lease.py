"""Leases on run names.

A run name in S3 belongs to one recipe and one version of the data (`run.json`, the claim), and at any moment to one
driver (`lease.json`, the lease). The driver that holds a lease renews it every few seconds. A second driver waits,
takes over when it has seen no renewal for OLD_AFTER_S by its own clock, or is refused. Every write of S3 here is
conditional, so of two drivers exactly one wins.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.process import read_start
from orchestration.data.plan import ORDER_VERSION
from orchestration.recipe import Recipe
from orchestration.services import storage, tracking
from tinyemo.errors import LostLeaseError, StorageError, TrainingError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
OLD_AFTER_S = 30.0
"""A lease without a renewal for so long is free to take, as seen by the clock of the driver that waits for it."""
WAIT_S = 180.0
"""Longest wait for a driver that is alive."""
POLL_S = 1.0
SECONDS_PER_LINE = 15.0

Digests = Mapping[str, str]
"""Name of a data set that a run reads -> digest of its manifest."""


def run_folder(recipe: Recipe) -> str:
    """Return the S3 folder that holds a run's files."""
    return f"{recipe.checkpoint.root}/{recipe.name}"


class Holder(BaseModel, frozen=True):
    """The driver that holds a lease."""

    user: str
    host: str
    pid: int
    started_at: str
    process: str
    """Namespace, boot and start of the process: another driver on the same machine can tell that it has ended."""

    @classmethod
    def this_process(cls) -> Holder:
        """Describe this process."""
        pid = os.getpid()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(user=tracking.user_name(), host=socket.gethostname(), pid=pid, started_at=now, process=_process(pid))

    def __str__(self) -> str:
        """Return `USER on HOST (pid 1, since TIME)`."""
        return f"{self.user} on {self.host} (pid {self.pid}, since {self.started_at})"

    def has_ended(self) -> bool:
        """Return True if the process ran on this machine and has ended; False also where that cannot be known."""
        here = _process(os.getpid()).split("/")[:2]
        return self.process.split("/")[:2] == here and self.process != _process(self.pid)


class LeaseDocument(BaseModel, frozen=True):
    """The content of lease.json."""

    token: int
    """Counts the drivers that have held this name."""
    lease_id: str
    """Random; one for each time that a driver took the lease."""
    nonce: str
    """Random; changes with every renewal, and the object's ETag with it."""
    holder: Holder | None
    """None once the holder has given the lease back."""


@dataclass(frozen=True)
class LeaseInfo:
    """A lease as others see it."""

    holder: str
    """Empty where nobody holds the lease."""
    token: int
    age_s: float
    """Seconds since the last renewal, both by the clock of the S3 server."""
    is_alive: bool


@dataclass(frozen=True)
class Lease:
    """A lease that this driver took; a pickled copy checks and writes from another process."""

    folder: str
    """S3 folder of the run."""
    recipe: Recipe | None
    """None for a job whose name belongs to no recipe: it has no claim."""
    data: dict[str, str]
    kind: str
    token: int
    lease_id: str
    run_id: str | None
    """MLflow run of the driver before, None where the name was never claimed."""
    device: str | None
    """Device that was chosen at the first start."""

    def check(self) -> None:
        """Return if this driver still holds the lease.

        Raises:
            LostLeaseError: another driver took over, or the run was removed.
        """
        document, etag = _read(self.folder)
        if document is not None and document.lease_id == self.lease_id:
            return
        holder = document.holder if document is not None else None
        reason = "its lease was removed" if etag is None else f"{holder or 'another driver'} took it over"
        raise LostLeaseError(f"{_name(self.folder)} is no longer this driver's: {reason}; nothing more was written")

    def write(self, uri: str, data: bytes) -> None:
        """Store a file of the run, unless the lease was lost.

        The write is conditional on the file as it was before the check. A driver that was stopped between check and
        write cannot overwrite what its successor has written.

        Raises:
            LostLeaseError: see `check`.
        """
        etag = None
        with suppress(storage.MissingObjectError):
            _, etag = storage.read_with_etag(uri)
        self.check()
        if etag is None:
            is_stored = storage.write_bytes_if_absent(uri, data)
        else:
            is_stored = storage.write_bytes_if_match(uri, data, etag) is not None
        if not is_stored and storage.read_bytes(uri) != data:
            self.check()
            raise LostLeaseError(f"{uri} was written by another process: {_name(self.folder)} stops")

    def write_json(self, uri: str, document: Any) -> None:
        """Store a JSON document of the run; see `write`."""
        self.write(uri, (json.dumps(document, indent=1) + "\n").encode())

    def write_claim(self, run_id: str, device: str | None = None) -> None:
        """Bind the name to this recipe, these data and this MLflow run.

        Args:
            run_id: the MLflow run.
            device: as chosen for the whole run.
        """
        assert self.recipe is not None
        self.check()
        write_claim(self.folder, self.recipe, self.data, run_id, kind=self.kind, device=device)


@contextmanager
def hold_lease(
    folder: str,
    recipe: Recipe | None,
    data: Digests,
    *,
    kind: str = "train",
    progress: Callable[[str], None] = logger.warning,
) -> Iterator[Lease]:
    """Hold the lease of a run name for the length of a with-block; renew it in a thread and give it back at the end.

    Look for the run's result again inside the block: another driver may have finished it during the wait.

    Args:
        folder: S3 folder of the run.
        recipe: the recipe that asks for the name; None for a job whose name belongs to no recipe.
        data: the data that it would read.
        kind: of the job; stored in the claim.
        progress: gets a line at a bounded rate while another driver is waited for.

    Raises:
        TrainingError: the name belongs to another recipe or other data, or another driver is at work.
    """
    if recipe is not None:
        read_claim(folder, recipe, data)
    document = _acquire(folder, progress)
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(folder, document, stop), name="lease", daemon=True)
    thread.start()
    try:
        claim = (read_claim(folder, recipe, data) if recipe is not None else None) or {}
        run_id, device = claim.get("mlflow_run_id"), claim.get("device")
        yield Lease(folder, recipe, dict(data), kind, document.token, document.lease_id, run_id, device)
    finally:
        stop.set()
        thread.join()
        _release(folder, document)


def read_lease(folder: str) -> LeaseInfo | None:
    """Return who holds a run's name; None where nobody ever has, or the object cannot be read."""
    document, etag = _read(folder)
    if document is None or etag is None:
        return None
    age_s, holder = storage.age_s(f"{folder}/lease.json"), document.holder
    is_alive = holder is not None and age_s < OLD_AFTER_S and not holder.has_ended()
    return LeaseInfo(str(holder or ""), document.token, age_s, is_alive)


def _acquire(folder: str, progress: Callable[[str], None]) -> LeaseDocument:
    name, uri = _name(folder), f"{folder}/lease.json"
    began_at = changed_at = time.monotonic()
    next_line_at, seen, token, holder = began_at, None, 0, "another driver"
    while True:
        document, etag = _read(folder)
        now = time.monotonic()
        if document is not None and document.nonce != seen:  # an object that cannot be read is no sign of life
            seen, changed_at, token = document.nonce, now, max(token, document.token)
        if document is not None and document.holder is not None:
            holder = str(document.holder)
        is_free = document is not None and (document.holder is None or document.holder.has_ended())
        if etag is None or is_free or now - changed_at >= OLD_AFTER_S:
            identity = secrets.token_hex(8)
            own = LeaseDocument(token=token + 1, lease_id=identity, nonce=identity, holder=Holder.this_process())
            if etag is not None:
                storage.write_bytes_if_match(uri, own.model_dump_json().encode(), etag)
            else:
                storage.write_bytes_if_absent(uri, own.model_dump_json().encode())
            if _read(folder)[0] == own:  # also where the answer to the write was lost
                if etag is not None and not (document is not None and document.holder is None):
                    progress(f"took {name} over from {holder}, which no longer renews its lease")
                return own
            continue
        if now - began_at >= WAIT_S:
            raise TrainingError(
                f"{name} is being run by {holder}, which is alive: wait for it, stop it, or choose another name with "
                "--set name=..."
            )
        if now >= next_line_at:
            progress(f"{name} is being run by {holder}: waiting up to {began_at + WAIT_S - now:.0f} s more")
            next_line_at = now + SECONDS_PER_LINE
        time.sleep(POLL_S)


def _renew(folder: str, document: LeaseDocument, stop: threading.Event) -> None:
    etag, renewed_at = _read(folder)[1] or "", time.monotonic()
    while not stop.wait(HEARTBEAT_S):
        content = document.model_copy(update={"nonce": secrets.token_hex(8)}).model_dump_json()
        try:
            written = storage.write_bytes_if_match(f"{folder}/lease.json", content.encode(), etag)
        except StorageError as error:
            silent_s = time.monotonic() - renewed_at
            logger.warning("the lease of %s was not renewed for %.0f s: %s", _name(folder), silent_s, error)
            continue
        if written is None:
            logger.error("the lease of %s was lost to another driver", _name(folder))
            return
        etag, renewed_at = written, time.monotonic()


def _release(folder: str, own: LeaseDocument) -> None:
    try:
        document, etag = _read(folder)
        if document is not None and etag is not None and document.lease_id == own.lease_id:
            free = document.model_copy(update={"holder": None})
            storage.write_bytes_if_match(f"{folder}/lease.json", free.model_dump_json().encode(), etag)
    except StorageError as error:
        logger.warning("the lease of %s was not given back and ends by itself: %s", _name(folder), error)


def _read(folder: str) -> tuple[LeaseDocument | None, str | None]:
    """Return the lease and its ETag; no lease where the object is torn, neither where there is none."""
    try:
        content, etag = storage.read_with_etag(f"{folder}/lease.json")
    except storage.MissingObjectError:
        return None, None
    try:
        return LeaseDocument.model_validate_json(content), etag
    except ValidationError:
        return None, etag


def _name(folder: str) -> str:
    return folder.rstrip("/").rpartition("/")[2]


def _process(pid: int) -> str:
    """Return `NAMESPACE/BOOT/START` of a process, so that processes of one machine can be compared."""
    namespace = Path("/proc/self/ns/pid")
    return f"{os.readlink(namespace) if namespace.exists() else ''}/{(read_start(pid) or '').replace(':', '/')}"


def read_claim(folder: str, recipe: Recipe, data: Digests) -> dict[str, Any] | None:
    """Return what `write_claim` stored for this name, or None where the name is free.

    Args:
        folder: S3 folder of the run.
        recipe: the recipe that asks for the name.
        data: the data that it would read.

    Raises:
        TrainingError: the name belongs to another recipe or other data; the message names the fields.
    """
    try:
        claim: dict[str, Any] = storage.read_json(f"{folder}/run.json")
    except storage.MissingObjectError:
        return None
    stored, before = claim.get("recipe", {}), claim.get("data", {})
    earlier = _validated(stored)
    order = int(claim.get("order_version", 1))
    if earlier is not None and earlier.digest() == recipe.digest() and before == dict(data) and order == ORDER_VERSION:
        return claim
    new = tracking.flatten(recipe.model_dump(mode="json"))
    old = tracking.flatten(earlier.model_dump(mode="json") if earlier is not None else stored)
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in {**new, **old} if new.get(key) != old.get(key)]
    if list(recipe.stages) != list(stored.get("stages", {})):
        changed.append(f"stages {', '.join(stored.get('stages', {}))} -> {', '.join(recipe.stages)}")
    changed += [
        f"data version of {name} {str(before.get(name))[:12]} -> {str(data.get(name))[:12]}"
        for name in sorted({*before, *data})
        if before.get(name) != data.get(name)
    ]
    if order != ORDER_VERSION:
        changed.append(f"order of records version {order} -> {ORDER_VERSION}")
    raise TrainingError(
        f"a run named {recipe.name} exists with another recipe ({'; '.join(changed)}): "
        "choose another name with --set name=..., or undo the change to go on with it"
    )


def write_claim(
    folder: str, recipe: Recipe, data: Digests, run_id: str, *, kind: str = "train", device: str | None = None
) -> None:
    """Bind a run name to a recipe, its data and an MLflow run.

    Raises:
        TrainingError: another driver did so at the same moment.
    """
    claim = {
        "data": dict(data),
        "device": device,
        "kind": kind,
        "mlflow_run_id": run_id,
        "order_version": ORDER_VERSION,
        "recipe": recipe.model_dump(mode="json"),
    }
    if not storage.write_bytes_if_absent(f"{folder}/run.json", json.dumps(claim, indent=1).encode()):
        raise TrainingError(f"another job started {recipe.name} just now: wait for it, or choose another name")


def _validated(content: dict[str, Any]) -> Recipe | None:
    """Return a stored recipe, with defaults for fields that are newer than it; None where it is not valid any more."""
    try:
        return Recipe.model_validate(content)
    except ValidationError:
        return None
