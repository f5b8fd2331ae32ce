"""Names of a reasoning model's parts: a preset with random weights, a GGUF file or a folder."""

from __future__ import annotations

from pathlib import Path

from tinyemo.errors import DataError

RANDOM = "random:"
"""Prefix of a source of random weights; the name of a preset follows."""
GGUF_SUFFIX = ".gguf"

Source = Path | str
"""A folder, a GGUF file, or `random:<preset>`."""


def is_random(source: Source) -> bool:
    """Return True if a source stands for random weights."""
    return isinstance(source, str) and source.startswith(RANDOM)


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file at a path, or in its folder if that holds no Hugging Face model; else None."""
    if path.is_file():
        return path
    found = [] if (path / "config.json").is_file() else sorted(path.glob(f"*{GGUF_SUFFIX}"))
    if len(found) > 1:
        raise DataError(f"{path} holds {len(found)} GGUF files: name one")
    return found[0] if found else None


def preset_name(source: Source) -> str:
    """Return the name of the preset of a source that `is_random`."""
    return str(source).removeprefix(RANDOM)
