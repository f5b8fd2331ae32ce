"""Files on this machine: atomic writes, digests, and the configuration of a model folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyemo.errors import DataError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename it into place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a result is as readable as any other new file.
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in a model folder's config.json.

    Args:
        folder: folder of the model.
        what: kind of model that the folder should hold, for the error.

    Raises:
        DataError: the file cannot be read, or holds no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no {what}: config.json cannot be read") from error
    if not isinstance(config, dict):
        raise DataError(f"{folder} holds no {what}: config.json is no JSON object")
    return config


def revision_of_files(folder: Path, patterns: Sequence[str]) -> str:
    """Return `sha256-...` over the names and bytes of the folder's files of these patterns."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    lines = "".join(f"{path.name}\0{sha256_of_file(path)}\0" for path in files)
    return f"sha256-{hashlib.sha256(lines.encode()).hexdigest()}"
