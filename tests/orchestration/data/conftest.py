"""A Ray cluster with an empty folder in S3, and a corpus of broken records."""

from __future__ import annotations

import pytest
from broken_records import Corpus, write_corpus


@pytest.fixture
def s3_folder(cluster: str, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder in S3, and Ray to work on it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return s3_root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))
