"""State folder of the local platform: record of the servers, credentials and logs, readable by the owner alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, ValidationError

from cluster.process import ProcessRecord
from tinyemo.config import Section
from tinyemo.errors import PlatformError

DEFAULT_FOLDER = ".tinyemo"
FOLDER_VARIABLE = "TINYEMO_STATE"


class PlatformPorts(Section):
    """First port of each server; SeaweedFS takes eight ports in a row, Ray two."""

    s3: PositiveInt = 8333
    mlflow: PositiveInt = 5000
    ray: PositiveInt = 6379
    dashboard: PositiveInt = 8265


class PlatformState(Section):
    """Record of the servers that `tinyemo platform up` has started and of their addresses; content of platform.json."""

    format: Literal[1] = 1
    platform_id: str
    """Random text that marks the processes of this platform."""
    bucket: str
    ports: PlatformPorts
    num_cpus: PositiveInt
    """Logical CPUs that Ray hands out."""
    object_store_bytes: PositiveInt
    ray_folder: Path
    """Folder of Ray's sessions; short, because a socket's path has at most 107 bytes."""
    environment: dict[str, str]
    """Variables that a driver needs to reach the servers, credentials included."""
    processes: dict[str, ProcessRecord]
    """Process of each service, by the name of the service."""


def resolve_folder(state: Path | None = None) -> Path:
    """Return the absolute state folder: the argument, else TINYEMO_STATE, else .tinyemo in the current folder."""
    return Path(state or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).absolute()


def load_state(folder: Path) -> PlatformState | None:
    """Return the recorded platform, or None where there is none.

    Raises:
        PlatformError: where the record cannot be read.
    """
    path = folder / "platform.json"
    try:
        return PlatformState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise PlatformError(f"{folder} is a file: name a folder with --state or {FOLDER_VARIABLE}") from error
    except PermissionError as error:
        raise PlatformError(f"{path} belongs to another user: name your own folder with --state") from error
    except ValidationError as error:
        raise PlatformError(f"{path} is damaged: end what it names by hand, then delete the file") from error


def save_state(folder: Path, state: PlatformState) -> None:
    """Write platform.json for the commands and platform.env for a shell's `source`, both with mode 0600."""
    write_private(folder / "platform.json", state.model_dump_json(indent=2))
    # With the state folder in the environment, `platform status` and `down` work from every folder.
    variables = {**state.environment, FOLDER_VARIABLE: str(folder)}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in sorted(variables.items())]
    write_private(folder / "platform.env", "".join(lines))


def forget_state(folder: Path) -> None:
    """Remove the record of the servers; data, logs and credentials stay."""
    for name in ("platform.json", "platform.env"):
        (folder / name).unlink(missing_ok=True)


def make_private_folder(folder: Path) -> Path:
    """Create the folder where it is missing, give it mode 0700, and return it.

    Raises:
        PlatformError: where it cannot be created or belongs to another user.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise PlatformError(f"cannot use {folder} ({error.strerror}): name another folder with --state") from error
    return folder


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step; only its owner can read it, at every moment."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder inside the block; a second `up` or `down` waits for it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
