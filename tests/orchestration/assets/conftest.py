"""An empty cache and no mirror for every test of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no mirror."""
    monkeypatch.setenv("TINYEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYEMO_MIRROR", raising=False)
    return tmp_path / "cache"
