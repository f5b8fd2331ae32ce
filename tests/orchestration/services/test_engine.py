"""Real DeepSpeed engines in real processes: stages and world sizes agree, and optimizer state is sharded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Found, Jobs, run_groups

from orchestration.data.batch import Batch
from orchestration.data.plan import rank_slice
from orchestration.jobs.projector import build_projector, train_batch
from orchestration.recipe import Recipe, parse_recipe
from orchestration.services.engine import (
    build_engine,
    build_optimizer,
    build_schedule,
    full_state_dict,
    load_engine,
    optimizer_state_bytes,
    require_parts,
    save_engine,
)
from tinyemo.errors import TrainingError
from tinyemo.label_embeddings import LabelEmbeddings, known_words
from tinyemo.objective import Objective, build_objective
from tinyemo.taxonomies import TAXONOMIES

BATCH = 16
STAGES = (0, 1, 2, 3)


def recipe(**sections: dict[str, Any]) -> Recipe:
    content = {"name": "x", "train": {"global_batch_size": BATCH}, "projector": {"dropout": 0.0}}
    return parse_recipe({**content, **sections}, source="test")


def objective(recipe: Recipe) -> Objective:
    words = known_words()
    vectors = torch.randn(len(words), 576, generator=torch.Generator().manual_seed(1))
    labels = LabelEmbeddings(words, vectors, "none", "none", "random", "word")
    return build_objective(recipe.loss, labels, TAXONOMIES["ekman"].words, synonyms_probability=0, seed=0)


def batch(step: int, rank: int, world_size: int, *, is_finite: bool = True) -> Batch:
    rng = np.random.default_rng(step)
    features, labels = rng.standard_normal((BATCH, 768)).astype(np.float16), rng.integers(0, 6, BATCH)
    if not is_finite:
        features[BATCH - 1, 5] = np.inf
    part = rank_slice(BATCH, rank, world_size)
    ids, labels = [f"row-{i}" for i in range(BATCH)][part], torch.from_numpy(labels)
    is_real = torch.ones(len(ids), dtype=torch.bool)
    return Batch(0, step, ids, is_real, torch.from_numpy(features[part]), labels[part], labels)


def at_stage(chosen: Recipe, stage: int) -> Recipe:
    return chosen.model_copy(update={"engine": chosen.engine.model_copy(update={"zero_stage": stage})})


def engine_of(chosen: Recipe, world_size: int) -> Any:
    return build_engine(
        build_projector(chosen),
        chosen.engine,
        chosen.optimizer,
        num_steps=20,
        global_batch_size=BATCH,
        world_size=world_size,
    )


def steps(engine: Any, chosen: Recipe, rank: int, world_size: int, first: int, last: int) -> list[float]:
    goal = objective(chosen)
    batches = (batch(step, rank, world_size) for step in range(first, last))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [float(train_batch(engine, goal, one, device)["train/loss"]) for one in batches]


def losses_and_bytes(chosen: Recipe, rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """By ZeRO stage."""
    found = []
    for stage in STAGES:
        engine = engine_of(at_stage(chosen, stage), world_size)
        losses = steps(engine, chosen, rank, world_size, 0, 8)
        found.append({"losses": losses, "bytes": optimizer_state_bytes(engine), "weights": full_state_dict(engine)})
    return found


def save_and_resume(chosen: Recipe, rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """By ZeRO stage."""
    found = []
    for stage in STAGES:
        staged, checkpoint = at_stage(chosen, stage), folder / f"stage-{stage}"
        engine = engine_of(staged, world_size)
        steps(engine, chosen, rank, world_size, 0, 4)
        save_engine(engine, checkpoint)
        torch.distributed.barrier()
        whole = steps(engine, chosen, rank, world_size, 4, 8)
        again = engine_of(staged, world_size)
        load_engine(again, checkpoint)
        found.append({"whole": whole, "resumed": steps(again, chosen, rank, world_size, 4, 8)})
    return found


def resume_in_another_size(chosen: Recipe, rank: int, world_size: int, folder: Path) -> list[str]:
    said = []
    for stage in STAGES[1:]:
        names = [path.name for path in (folder / f"stage-{stage}").rglob("*")]
        engine = engine_of(at_stage(chosen, stage), world_size)
        with pytest.raises(TrainingError) as caught:
            require_parts(engine, names, world_size)
        said.append(str(caught.value))
    return said


def meet_an_infinite_row(chosen: Recipe, rank: int, world_size: int, folder: Path) -> str:
    engine, goal = engine_of(chosen, world_size), objective(chosen)
    with pytest.raises(TrainingError) as caught:
        train_batch(engine, goal, batch(3, rank, world_size, is_finite=False), torch.device("cpu"))
    return str(caught.value)


PLAIN, DROPOUT = recipe(), recipe(projector={"dropout": 0.4})
DISTURBED = recipe(projector={"dropout": 0.2})
AGAINST_THE_LOOP = recipe(projector={"dropout": 0.2}, optimizer={"max_lr": 0.02})
JOBS: Jobs = {
    2: {
        "losses": (losses_and_bytes, PLAIN),
        "dropout": (losses_and_bytes, DROPOUT),
        "resume": (save_and_resume, DISTURBED),
        "infinite": (meet_an_infinite_row, PLAIN),
    },
    1: {
        "losses": (losses_and_bytes, PLAIN),
        "dropout": (losses_and_bytes, DROPOUT),
        "loop": (losses_and_bytes, AGAINST_THE_LOOP),
        "resize": (resume_in_another_size, DISTURBED),
    },
}
"""By world size; one rank meets the checkpoints that two have left."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found, by world size."""
    return run_groups(JOBS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
def test_losses_do_not_depend_on_stage_or_world_size_and_state_is_halved(found: Found) -> None:
    alone, pair = found[1][0]["losses"], found[2][0]["losses"]
    for stage in STAGES:
        assert np.allclose(pair[stage]["losses"], alone[1]["losses"], atol=1e-4), stage
        for name, weight in alone[1]["weights"].items():
            # A bias before batch normalisation has no gradient but rounding, which Adam scales up to a step.
            if name not in ("layers.0.bias", "layers.1.running_mean"):
                assert torch.allclose(pair[stage]["weights"][name].float(), weight.float(), atol=2e-4), (stage, name)
        share = pair[stage]["bytes"] / alone[stage]["bytes"]
        assert share == pytest.approx(1.0 if stage == 0 else 0.5, rel=0.02), stage


@pytest.mark.slow
def test_an_engine_is_the_plain_loop(found: Found) -> None:
    """DeepSpeed's own defaults change a run silently (0.19.8 clips gradients at 1.0): ours may not."""
    chosen = AGAINST_THE_LOOP
    model, goal = build_projector(chosen), objective(chosen)
    optimizer = build_optimizer(model, chosen.optimizer)
    schedule, losses = build_schedule(chosen.optimizer, 20)(optimizer), []
    for step in range(8):
        rows = batch(step, 0, 1)
        loss = goal.step_loss(model, torch.tensor(rows.features), rows.labels, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    for stage in STAGES:
        assert np.allclose(found[1][0]["loop"][stage]["losses"], losses, atol=1e-5), stage


@pytest.mark.slow
def test_dropout_does_not_depend_on_world_size_either(found: Found) -> None:
    alone, pair = found[1][0]["dropout"], found[2][0]["dropout"]
    for stage in STAGES:
        assert np.allclose(pair[stage]["losses"], alone[1]["losses"], atol=1e-4), stage


@pytest.mark.slow
def test_a_restored_engine_goes_on_to_the_same_losses(found: Found) -> None:
    for rank in found[2]:
        for stage in STAGES:
            assert rank["resume"][stage]["resumed"] == rank["resume"][stage]["whole"], stage
    said = found[1][0]["resize"]
    assert len(said) == 3
    assert all(line.startswith("the checkpoint was written by 2 workers and the run has 1") for line in said)


@pytest.mark.slow
def test_an_infinite_loss_stops_every_rank_and_names_its_samples(found: Found) -> None:
    said = [rank["infinite"] for rank in found[2]]
    assert all("train/loss is nan at step 3" in line for line in said)
    assert "row-0" in said[0]
    assert "row-15" in said[1]
    assert "row-15" not in said[0]


@pytest.mark.slow
def test_bf16_at_every_stage_follows_fp32_and_resumes(device: str, tmp_path: Path) -> None:
    rounded = recipe(engine={"precision": "bf16"})
    jobs: Jobs = {
        1: {
            "bf16": (losses_and_bytes, rounded),
            "fp32": (losses_and_bytes, recipe(engine={"precision": "fp32"})),
            "resume": (save_and_resume, rounded),
        }
    }
    found = run_groups(jobs, tmp_path, device)[1][0]
    for stage in STAGES:
        losses, exact = found["bf16"][stage]["losses"], found["fp32"][stage]["losses"]
        assert 0 < abs(losses[0] / exact[0] - 1) < 1e-3, stage  # before any update
        assert np.allclose(losses, exact, rtol=0.1), stage
        assert found["resume"][stage]["resumed"] == found["resume"][stage]["whole"], stage


@pytest.mark.slow
def test_a_process_killed_while_it_compiled_stops_nobody(tmp_path: Path) -> None:
    """Torch's guard file outlives its process, and every later process would wait for it for ever."""
    folder = Path(sys.prefix) / "torch_extensions"
    code = (
        "import os, pathlib, sys; import orchestration.services.engine as engine;"
        "engine._collectives_folder = lambda: pathlib.Path(sys.argv[1]);"
        "import deepspeed.comm.torch; comm = sys.modules['deepspeed.comm.torch'];"
        "comm.build_shm_op = lambda: print(os.environ['TORCH_EXTENSIONS_DIR']);"
        "engine.load_collectives()"
    )
    assert folder.is_dir()
    (tmp_path / "deepspeed_shm_comm").mkdir()
    guard = tmp_path / "deepspeed_shm_comm" / "lock"
    guard.touch()
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout
    assert found.splitlines()[-1] == str(tmp_path / "build-1")
    assert guard.exists()
