"""Stages on real DeepSpeed engines in real processes: what is trained does not depend on ZeRO, ranks or a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Found, Jobs, run_groups
from tiny_reasoners import IMAGE, VOCABULARY, pad, tiny_reasoner

from orchestration.data.batch import Batch
from orchestration.data.plan import rank_slice
from orchestration.jobs.reasoner import start_stage
from orchestration.jobs.stage_weights import build_on_first_rank, prepare_stage
from orchestration.jobs.steps import (
    Inputs,
    MicroBatch,
    align_micro_batch,
    losses_by_record,
    mean_loss,
    train_micro_batches,
)
from orchestration.recipe import Recipe, parse_recipe
from orchestration.recipe.sections import StageConfig
from orchestration.services.engine import accumulate, load_engine, save_engine, state_bytes, trained_state_dict
from tinyemo.errors import DataError, TrainingError
from tinyemo.reasoner.model import Reasoner

pytestmark = pytest.mark.slow

BATCH, MICRO, STEPS = 8, 2, 4
STAGES = (0, 1, 2, 3)


def recipe(trains: str, **fields: Any) -> Recipe:
    stage = {
        "trains": trains, "global_batch_size": BATCH, "micro_batch_size": MICRO, "learning_rate": 3e-3, "num_layers": 1,
        "connector_learning_rate": 1e-2, "weight_decay": 0.1, "lora": {"rank": 4, "alpha": 8}, **fields,
    }  # fmt: skip
    return parse_recipe({"name": "x", "stages": {"stage": stage}}, source="test")


def at_zero_stage(chosen: Recipe, zero_stage: int) -> Recipe:
    return chosen.model_copy(update={"engine": chosen.engine.model_copy(update={"zero_stage": zero_stage})})


def global_batch(step: int, *, num_padded: int = 0, num_patches: int = 4, side: int = 32) -> Batch:
    """Records of different lengths; how many of an answer's tokens a rank gets differs from rank to rank."""
    rng = np.random.default_rng(step)
    tokens, ids = [], []
    for place in range(BATCH):
        question, answer = rng.integers(3, VOCABULARY, 2 + place), rng.integers(3, VOCABULARY, 1 + int(rng.integers(9)))
        input_ids = torch.tensor([1, *[IMAGE] * num_patches, *question, *answer])
        is_real = place < BATCH - num_padded
        labels = torch.tensor(
            [-100] * (1 + num_patches + len(question)) + (list(answer) if is_real else [-100] * len(answer))
        )
        tokens.append((input_ids, labels))
        ids.append(f"record-{place}" if is_real else "")
    pixels = torch.from_numpy(rng.integers(0, 256, (BATCH, side, side, 3), dtype=np.uint8))
    is_real = torch.tensor([bool(name) for name in ids])
    return Batch(0, step, ids, is_real, pixel_values=pixels, tokens=tokens)


def inputs_of(model: Reasoner) -> Inputs:
    return Inputs(model.config.encoder_spec.preprocessing, torch.device("cpu"), model.config.image_token_id)


def parts(inputs: Inputs, batch: Batch, rank: int, world_size: int) -> list[MicroBatch]:
    return inputs.micro_batches(batch.part(rank_slice(BATCH, rank, world_size)), MICRO)


def stage_of(chosen: Recipe) -> StageConfig:
    return chosen.stages["stage"]


def start(chosen: Recipe, world_size: int, tower: str = "clip") -> tuple[Any, Inputs]:
    def build() -> Reasoner:
        assert torch.distributed.get_rank() == 0
        return prepare_stage(tiny_reasoner(tower=tower), stage_of(chosen), 0)

    model = build_on_first_rank(build, stage_of(chosen), 0)
    return start_stage(model, chosen, stage_of(chosen), num_steps=2 * STEPS, world_size=world_size), inputs_of(model)


def steps(engine: Any, inputs: Inputs, rank: int, world_size: int, first: int, last: int) -> list[float]:
    batches = ((step, parts(inputs, global_batch(step), rank, world_size)) for step in range(first, last))
    return [float(train_micro_batches(engine, micro, step, 0)[0]["train/loss"]) for step, micro in batches]


def curves(chosen: Recipe, rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """By ZeRO stage."""
    found = []
    for zero_stage in STAGES:
        engine, inputs = start(at_zero_stage(chosen, zero_stage), world_size)
        losses = steps(engine, inputs, rank, world_size, 0, STEPS)
        held_out = [global_batch(99, num_padded=3).part(rank_slice(BATCH, rank, world_size))]
        loss = mean_loss(engine, inputs, held_out, MICRO)
        found.append({"losses": losses, "val": loss, "weights": trained_state_dict(engine), "bytes": held(engine)})
    return found


def aligned(chosen: Recipe, rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """By ZeRO stage, the connector alone, all records of a step in one forward pass."""
    found = []
    for zero_stage in STAGES:
        stage = stage_of(chosen).model_copy(update={"micro_batch_size": BATCH // world_size})
        sized = chosen.model_copy(update={"stages": {"stage": stage}})
        engine, inputs = start(at_zero_stage(sized, zero_stage), world_size)
        losses = []
        for step in range(STEPS):
            part = inputs.micro_batch(global_batch(step).part(rank_slice(BATCH, rank, world_size)))
            losses.append(float(align_micro_batch(engine, part, step)[0]["train/loss"]))
        found.append({"losses": losses, "weights": trained_state_dict(engine)})
    return found


def held(engine: Any) -> dict[str, int]:
    """Bytes between the last backward pass of a step and the step itself."""
    ids, found = torch.arange(3, 9)[None], {}
    for left in reversed(range(engine.gradient_accumulation_steps())):
        loss = engine(input_ids=ids, labels=ids).loss
        accumulate(engine, loss, is_last=not left, before_step=lambda: found.update(state_bytes(engine)))
    return found


def with_batch_norm(chosen: Recipe, rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """By ZeRO stage, with a tower that has batch norms: losses before and after a restart; in fp32 those before."""
    found = []

    def losses(engine: Any, inputs: Inputs, first: int, last: int) -> list[float]:
        batches = [global_batch(step, num_patches=49, side=224) for step in range(first, last)]
        return [
            float(train_micro_batches(engine, parts(inputs, batch, rank, world_size), step, 0)[0]["train/loss"])
            for step, batch in enumerate(batches, first)
        ]

    if chosen.engine.precision == "fp32":
        engine, inputs = start(at_zero_stage(chosen, 0), world_size, tower="efficientnet-lite0")
        return [{"begun": losses(engine, inputs, 0, 2)}]
    for zero_stage in STAGES:
        staged, checkpoint = at_zero_stage(chosen, zero_stage), folder / f"bf16-{zero_stage}"
        engine, inputs = start(staged, world_size, tower="efficientnet-lite0")
        begun = losses(engine, inputs, 0, 2)
        save_engine(engine, checkpoint)
        torch.distributed.barrier()
        whole = losses(engine, inputs, 2, 3)
        again, inputs = start(staged, world_size, tower="efficientnet-lite0")
        load_engine(again, checkpoint)
        dtypes = sorted({str(parameter.dtype) for parameter in again.module.parameters()})
        found.append({"begun": begun, "whole": whole, "resumed": losses(again, inputs, 2, 3), "dtypes": dtypes})
    return found


def resume(chosen: Recipe, rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """By ZeRO stage: two steps after a restart, for the second's loss shows what Adam's moments did in the first."""
    found = []
    for zero_stage in STAGES:
        staged, checkpoint = at_zero_stage(chosen, zero_stage), folder / f"{stage_of(chosen).trains}-{zero_stage}"
        engine, inputs = start(staged, world_size)
        steps(engine, inputs, rank, world_size, 0, 2)
        save_engine(engine, checkpoint)
        torch.distributed.barrier()
        whole = steps(engine, inputs, rank, world_size, 2, 4)
        num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        again, inputs = start(staged, world_size)
        load_engine(again, checkpoint)
        resumed = steps(again, inputs, rank, world_size, 2, 4)
        found.append({"whole": whole, "resumed": resumed, "bytes": num_bytes})
    return found


def offloaded(chosen: Recipe, rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """By ZeRO stage from 1 on, with the optimizer's state in the host's memory."""
    found = []
    for zero_stage in STAGES[1:]:
        staged = at_zero_stage(chosen, zero_stage)
        staged = staged.model_copy(update={"engine": staged.engine.model_copy(update={"offload_optimizer": "cpu"})})
        engine, inputs = start(staged, world_size)
        # DeepSpeed's own word for it, at stages 1 and 2 and at stage 3.
        is_offloaded = getattr(engine.optimizer, "cpu_offload" if zero_stage < 3 else "offload_optimizer")
        losses = steps(engine, inputs, rank, world_size, 0, STEPS)
        found.append({"is_offloaded": bool(is_offloaded), "losses": losses})
    return found


def meet_a_bad_record(chosen: Recipe, rank: int, world_size: int, folder: Path) -> str:
    engine, inputs = start(chosen, world_size)
    batch = global_batch(3)
    micro = parts(inputs, batch, rank, world_size)
    if rank == world_size - 1:
        pixels = micro[-1].pixel_values
        assert pixels is not None
        pixels[-1, 0, 0, 0] = torch.inf
    before = [parameter.detach().clone() for parameter in engine.module.connector.parameters()]
    with pytest.raises(TrainingError) as caught:
        train_micro_batches(engine, micro, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.connector.parameters(), strict=True))
    return str(caught.value)


def meet_no_model(chosen: Recipe, rank: int, world_size: int, folder: Path) -> str:
    def build() -> Reasoner:
        raise DataError("no such model")

    with pytest.raises(DataError) as caught:
        build_on_first_rank(build, stage_of(chosen), 0)
    return str(caught.value)


def in_precision(precision: str) -> Recipe:
    chosen = recipe("lora")
    return chosen.model_copy(update={"engine": chosen.engine.model_copy(update={"precision": precision})})


DROPOUT = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.3}}
CURVES = {
    "curves/llm": (curves, recipe("llm")),
    "curves/lora": (curves, recipe("lora")),
    "aligned": (aligned, recipe("connector", objective="align", micro_batch_size=BATCH // 2)),
}
JOBS: Jobs = {
    1: {**CURVES, "resume/connector": (resume, recipe("connector"))},
    2: {
        **CURVES,
        "resume/lora": (resume, recipe("lora", **DROPOUT)),
        "fp32": (with_batch_norm, in_precision("fp32")),
        "bf16": (with_batch_norm, in_precision("bf16")),
        "offloaded": (offloaded, recipe("llm")),
        "bad": (meet_a_bad_record, recipe("connector")),
        "no model": (meet_no_model, recipe("connector")),
    },
}
"""By world size."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found, by world size."""
    return run_groups(JOBS, tmp_path_factory.mktemp("ranks"))


def plain_loop(chosen: Recipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Torch alone: each step's whole batch, padded and not packed, in one forward pass."""
    stage = stage_of(chosen)
    model = prepare_stage(tiny_reasoner(), stage, 0)
    inputs = inputs_of(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "lr": stage.connector_learning_rate if n.startswith("connector") else stage.learning_rate}
            for n, p in named
        ],
        weight_decay=stage.weight_decay,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * stage.rate_factor(step, 2 * STEPS)
        batch = global_batch(step)
        padded = pad(batch.tokens)
        logits = model(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            pixel_values=inputs.micro_batch(batch).pixel_values,
        ).logits
        labels = padded.labels
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach() for name, parameter in named}


@pytest.mark.parametrize("trains", ["llm", "lora"])
def test_curves_do_not_depend_on_zero_or_world_size(trains: str, found: Found) -> None:
    (alone,), (pair, other) = ([rank[f"curves/{trains}"] for rank in found[size]] for size in (1, 2))
    losses, weights = plain_loop(recipe(trains))
    assert losses[-1] < losses[0]
    for zero_stage in STAGES:
        for ours in (alone[zero_stage], pair[zero_stage]):
            assert np.allclose(ours["losses"], losses, atol=1e-5), zero_stage
            assert ours["val"] == pytest.approx(alone[0]["val"], abs=1e-5)
            assert set(ours["weights"]) == set(weights)
            for name, weight in weights.items():
                assert torch.allclose(ours["weights"][name], weight, atol=1e-4), (zero_stage, name)
        assert other[zero_stage]["weights"] == {}


def test_alignment_does_not_depend_on_zero_or_world_size(found: Found) -> None:
    (alone,), (pair, _) = ([rank["aligned"] for rank in found[size]] for size in (1, 2))
    assert alone[0]["losses"][-1] < alone[0]["losses"][0]
    for zero_stage in STAGES:
        for ours in (alone[zero_stage], pair[zero_stage]):
            assert np.allclose(ours["losses"], alone[0]["losses"], atol=1e-4), zero_stage
            assert all(name.startswith("connector.") for name in ours["weights"])
            for name, weight in alone[0]["weights"].items():
                assert torch.allclose(ours["weights"][name], weight, atol=1e-4), (zero_stage, name)


def test_an_offloaded_optimizer_takes_the_same_steps(found: Found) -> None:
    for rank in found[2]:
        for zero_stage, row in enumerate(rank["offloaded"], start=1):
            assert row["is_offloaded"], zero_stage
            assert np.allclose(row["losses"], rank["curves/llm"][zero_stage]["losses"], atol=1e-5), zero_stage


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_holds_the_bytes_of_the_formula(world_size: int, found: Found) -> None:
    model = prepare_stage(tiny_reasoner(), stage_of(recipe("llm")), 0)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for zero_stage, row in enumerate(found[world_size][0]["curves/llm"]):
        formula = {
            "parameters": 4 * numbers / (world_size if zero_stage == 3 else 1),
            # DeepSpeed drops other ranks' gradients at stage 1 too, once they are reduced.
            "gradients": 4 * trained / (1 if zero_stage == 0 else world_size),
            # Two moments; under ZeRO the rank's share of them and of DeepSpeed's own copy of the weights.
            "optimizer": 8 * trained if zero_stage == 0 else 12 * trained / world_size,
        }
        assert row["bytes"] == {kind: pytest.approx(count, rel=0.06) for kind, count in formula.items()}, zero_stage


@pytest.mark.parametrize(("trains", "world_size"), [("connector", 1), ("lora", 2)])
def test_a_restored_stage_goes_on_to_the_same_losses(trains: str, world_size: int, found: Found) -> None:
    for rank in found[world_size]:
        for zero_stage, row in enumerate(rank[f"resume/{trains}"]):
            assert row["resumed"] == row["whole"], zero_stage


def test_bf16_trains_as_fp32_does_but_for_rounding(found: Found) -> None:
    """As on a GPU, where it is the default."""
    exact = found[2][0]["fp32"][0]
    for zero_stage, row in enumerate(found[2][0]["bf16"]):
        assert row["dtypes"] == ["torch.bfloat16"]
        assert row["begun"][0] == pytest.approx(exact["begun"][0], rel=0.002), zero_stage
        # Adam's first step has the sign of each gradient alone, so rounding counts most there.
        assert row["begun"][1] == pytest.approx(exact["begun"][1], rel=0.04), zero_stage
        assert row["begun"] != exact["begun"], zero_stage
        assert row["resumed"] == row["whole"], zero_stage


def test_a_checkpoint_holds_what_is_trained_alone(found: Found) -> None:
    model = tiny_reasoner()
    frozen = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("connector")) * 4
    trained = sum(p.numel() for p in model.connector.parameters()) * 4
    for zero_stage, row in enumerate(found[1][0]["resume/connector"]):
        # Weights and two moments, under ZeRO an fp32 copy, and what pickle and the tower's buffers add.
        assert row["bytes"] < 5 * trained + frozen / 2, zero_stage


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step(found: Found) -> None:
    said = [rank["bad"] for rank in found[2]]
    assert all("train/loss is nan at step 3" in line for line in said)
    assert "record-0" in said[0]
    assert "record-7" in said[1]
    assert "record-7" not in said[0]


def test_a_model_that_the_first_rank_cannot_read_is_every_ranks_error(found: Found) -> None:
    assert [rank["no model"] for rank in found[2]] == ["no such model"] * 2


def test_losses_by_record_are_those_of_the_records_alone() -> None:
    model, batch = tiny_reasoner(), global_batch(5, num_padded=2)
    inputs = inputs_of(model)
    whole = inputs.micro_batch(batch)
    together = losses_by_record(whole, whole.forward(model))
    for place in range(BATCH):
        one = inputs.micro_batch(batch.part(slice(place, place + 1)))
        ((count, nats),) = losses_by_record(one, one.forward(model))
        assert together[place][0] == count == int((batch.tokens[place][1] != -100).sum())
        assert together[place][1] == pytest.approx(nats, abs=1e-4)
