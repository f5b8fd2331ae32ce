"""Tracking where there is no MLflow server: one line says so, and nothing of MLflow is imported."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestration.services import tracking
from orchestration.services.tracking import RunLogger, download_artifacts, require_server
from tinyemo.errors import ConfigError, PlatformError

REPOSITORY = Path(__file__).parents[3]


def test_an_address_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="runs:/, models:/"):
        download_artifacts("s3://bucket/projector")


def test_without_an_address_one_line_says_what_to_do(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="tinyemo platform up"):
        require_server()
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
        RunLogger("run").log_curve([(1, {"train/loss": 1.0})])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(ConfigError, match="http or https"):
        require_server()


def test_a_stranger_on_the_port_is_no_mlflow(monkeypatch):
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # http.server's name
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    stranger = HTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{stranger.server_port}")
    with pytest.raises(PlatformError, match="is no MLflow server"):
        require_server()
    stranger.shutdown()
    stranger.server_close()


def test_the_limits_are_mlflows():
    from mlflow.store.tracking import SEARCH_MAX_RESULTS_THRESHOLD
    from mlflow.utils import validation

    assert tracking.METRICS_PER_REQUEST == validation.MAX_METRICS_PER_BATCH
    assert tracking.TEXTS_PER_REQUEST == validation.MAX_PARAMS_TAGS_PER_BATCH
    assert tracking.PARAM_CHARACTERS == validation.MAX_PARAM_VAL_LENGTH
    assert tracking.TAG_CHARACTERS == validation.MAX_TAG_VAL_LENGTH
    assert tracking.MAX_RUNS == SEARCH_MAX_RESULTS_THRESHOLD
    assert tracking.DIGEST_CHARACTERS == validation.MAX_DATASET_DIGEST_SIZE


def test_importing_tracking_does_not_import_mlflow():
    code = "import sys, orchestration.services.tracking; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=60)
