"""The clocks of the loop: ranks that take different times log and save at the same steps, without a collective each."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_groups

from orchestration.jobs import worker
from orchestration.recipe import Recipe, parse_recipe
from tinyemo.errors import TrainingError

NUM_STEPS = 150


def batch(step: int) -> Any:
    return SimpleNamespace(step=step, ids=[f"row-{step}"])


def log_of(chosen: Recipe) -> worker.Log:
    stage: Any = SimpleNamespace(recipe=chosen)
    return worker.Log(stage, torch.device("cpu"), 0)


def ticks(chosen: Recipe, rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Steps at which this rank logged, found a checkpoint due, and what it sent."""
    worker.LOG_EVERY_S = 0.1
    log, logged, saved, sent = log_of(chosen), [], [], 0
    for step in range(NUM_STEPS):
        log.add(batch(step), {"train/loss": torch.tensor(1.0 / (step + 1))})
        time.sleep(0.001 + 0.003 * rank)
        if log.is_due(step + 1):
            log.read(step + 1)
            logged.append(step + 1)
            is_saved = log.is_checkpoint_late
            saved += [step + 1] if is_saved else []
            sent += len(log.take(is_saved=is_saved))
            log.restart()
    return {"logged": logged, "saved": saved, "sent": sent}


def meet_nan(chosen: Recipe, rank: int, world_size: int, folder: Path) -> str:
    """A loss that is only read at the log, as on a GPU."""
    log = log_of(chosen)
    for step in range(5):
        log.add(batch(step), {"train/loss": torch.tensor(float("nan") if step >= 3 else 1.0)})
    with pytest.raises(TrainingError) as caught:
        log.read(5)
    return str(caught.value)


@pytest.mark.slow
def test_ranks_agree_on_logs_and_checkpoints(tmp_path: Path) -> None:
    by_time = parse_recipe({"name": "x", "checkpoint": {"every_minutes": 0.2 / 60}}, source="test")
    by_steps = parse_recipe({"name": "x", "train": {"log_every_steps": 20}}, source="test")
    jobs = {2: {"time": (ticks, by_time), "steps": (ticks, by_steps), "nan": (meet_nan, by_time)}}
    first, second = run_groups(jobs, tmp_path)[2]
    assert first == second
    logged = first["time"]["logged"]
    # The first step is logged at once; after that a log every 0.1 s of about 2.5 ms a step.
    assert logged[0] == 1
    assert 3 < len(logged) < NUM_STEPS / 3
    assert 0 < len(first["time"]["saved"]) < len(logged)
    assert first["time"]["sent"] == logged[-1]
    assert first["steps"]["logged"] == list(range(20, NUM_STEPS + 1, 20))
    assert "train/loss is nan at step 3; this rank's samples: row-3" in first["nan"]
