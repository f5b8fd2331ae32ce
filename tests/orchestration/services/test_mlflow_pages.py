"""The pages of MLflow's UI that a user opens, looked at in a browser."""

from __future__ import annotations

import getpass
import sys
import time
from pathlib import Path

import pytest
from browser import SCREENSHOTS, look_at, require_chromium

from orchestration.services.tracking import move_alias, open_run, register, system_metrics

DIGEST = "0123456789abcdef" * 4
EXPERIMENT = "pages"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_ui_shows_runs_their_descriptions_and_their_models(server: str, tmp_path: Path, monkeypatch) -> None:
    """A family with one size: experiment, family, run, logged model and registered version."""
    require_chromium()
    monkeypatch.setattr(sys, "argv", ["/bin/tinyemo", "family", "emotion6"])
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with open_run(EXPERIMENT, "family", params={"loss": {"name": "nt_xent"}}, tags={"kind": "family"}) as family:
        with open_run(EXPERIMENT, "family-small", params={}, tags={}, parent_run_id=family.run_id) as run:
            run.log_dataset("emotion6-test", DIGEST, "s3://bucket/emotion6", 306, "test")
            with system_metrics(run.run_id, "node-1"):
                run.logger.log_curve([(step, {"train/loss": 3.0 / step}) for step in range(1, 60)])
                time.sleep(3)  # a sample, and the request that publishes it
            metrics, dataset = {"test/top1_accuracy": 0.71}, ("emotion6-test", DIGEST)
            model_id = run.log_model("projector", "s3://bucket/runs/small/projector", metrics, dataset=dataset, step=59)
            run.describe(
                "Projector with test top-1 71.0 %.", {"data": "emotion6", "export": "`s3://bucket/runs/small`"}
            )
        card = f"Made by run [family-small]({run.url}) from data `{DIGEST[:12]}`."
        register(run.run_id, "s3://bucket/runs/small/projector", "pages-model", tags={}, card=card, model_id=model_id)
        move_alias("pages-model", "champion", "1")
        family.log_metrics({"test/top1_accuracy_small": 0.71})
        family.describe("One size.", {"small": "test top-1 71.0 %"})

    def page(name: str, address: str, *expected: str) -> str:
        return look_at(address, name, list(expected), tmp_path / "profile")

    experiment, query = f"{server}/#/experiments/{run.experiment_id}", "?workflowType=machine_learning"
    shown = page("experiment", experiment + query, "Model training", "family", "2 matching runs")
    assert "Evaluation runs" not in shown
    page("family", family.url, "One size.", "test top-1 71.0 %", "test/top1_accuracy_small", "tinyemo family emotion6")
    shown = page("run", run.url, "Projector with test top-1 71.0 %.", "emotion6-test", DIGEST[:12], "pages-model")
    assert f"Created by {getpass.getuser()}" in shown
    assert "Parent run family" in shown
    page("run_charts", f"{experiment}/runs/{run.run_id}/model-metrics{query}", "train/loss")
    page("run_system", f"{experiment}/runs/{run.run_id}/system-metrics{query}", "node-1/cpu_utilization_percentage")
    page("models", f"{experiment}/models{query}", "projector", "Ready")
    page("logged_model", f"{experiment}/models/{model_id}{query}", "projector", "test/top1_accuracy", "emotion6-test")
    page("version", f"{server}/#/models/pages-model/versions/1{query}", "Made by run", "family-small", "champion")
    assert {path.stem for path in SCREENSHOTS.glob("*.png")} >= {"experiment", "family", "run", "version"}
