"""The reasoning model, measured: `python benchmarks/lm.py [speed] [zero] [curves] [offline] [sizes]`.

speed: tokens/s of (a) our job, S3 -> Ray Data -> Ray Train -> DeepSpeed on OASIS' instruct records, and (b) a raw twin,
torchrun and DeepSpeed over the very same micro-batches in memory (benchmarks/lm_twin.py); 2 ranks of one thread,
SmolLM2-135M and EfficientNet-Lite0 with real weights, in turns, warm-up excluded. Neither writes checkpoints meanwhile;
a run of ours that writes one after each window is measured beside them. Needs the platform with OASIS in S3 (`tinyemo
ingest oasis`).

zero: bytes a rank holds of parameters, gradients and optimizer state at ZeRO 0 to 3 on 2 ranks, counted from tensors,
against the formula.

curves: losses of SmolLM2-135M, real weights, full fine-tuning in fp32 without dropout, through the real job at world
size 1 and 2 and at ZeRO 0 and 3.

offline: both stages of the recipe reasoning-offline, its baseline reasoning-text-only, and the two compared.

sizes: optimizer steps of the family at its true sizes (benchmarks/lm_sizes.py).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.lm_sizes import TRAINS, measure_size, run_without_mlflow
from benchmarks.machine import write_results
from orchestration.recipe import Recipe, parse_recipe

WORLD_SIZE = 2
ROUNDS, WINDOWS, STEPS_PER_WINDOW = 2, 3, 4
STAGES = {
    "connector": {"trains": "connector"},
    "lora": {"trains": "lora", "lora": {"rank": 16, "alpha": 32}, "gradient_checkpointing": False},
}


def speed_recipe(trains: str, *, checkpoints: bool = False) -> Recipe:
    """A stage of a few windows, with a checkpoint after each or none; the first one is for warming up."""
    stage = {
        **STAGES[trains], "template": "chatml", "global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-4,
        "num_steps": (WINDOWS + 1) * STEPS_PER_WINDOW,
    }  # fmt: skip
    content = {
        "name": f"bench-lm-{trains}",
        "records": {"datasets": ["s3://tinyemo/datasets/oasis"], "template": "chatml"},
        "engine": {"zero_stage": 1, "precision": "auto"},
        "workers": {"num_workers": WORLD_SIZE, "cpus_per_worker": 1},
        "checkpoint": {"every_steps": STEPS_PER_WINDOW if checkpoints else 0},
        "stages": {"stage": stage},
    }
    return parse_recipe(content, source="benchmark")


def run_job(recipe: Recipe, folder: str) -> tuple[list[float], float]:
    """(tokens/s of each window's steps but the first's, share of the run that waited for data), by the real loop."""
    from orchestration.jobs.checkpoints import read_curve
    from orchestration.services.ray_cluster import connect

    connect()
    state = run_without_mlflow(recipe, folder)
    points = [point for _, point in read_curve(state.folder)]
    steps = [(point["train/tokens"], point["train/step_s"]) for point in points if "train/step_s" in point]
    assert len(steps) == (WINDOWS + 1) * STEPS_PER_WINDOW
    rates = []
    for first in range(STEPS_PER_WINDOW, len(steps), STEPS_PER_WINDOW):
        tokens, seconds = zip(*steps[first : first + STEPS_PER_WINDOW], strict=True)
        rates.append(sum(tokens) / sum(seconds))
    return rates, statistics.mean(point["train/wait_share"] for point in points if "train/wait_share" in point)


class ReadHere:
    """Hands the rows of a rank to a stream as Ray Data does, read in this process."""

    def __init__(self, stream: Any, rank: int) -> None:
        self.stream, self.rank = stream, rank

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        import pyarrow as pa

        for window in self.stream.plan.windows():
            for row in self.stream.read(window):
                if row["rank"] == self.rank:
                    yield pa.Table.from_pylist([row])


def store_batches(recipe: Recipe, folder: Path) -> None:
    """The run's micro-batches as each rank of the job gets them, for the twin."""
    from orchestration.assets.models import describe_sources
    from orchestration.jobs.reasoning_plan import prepare_reasoning
    from orchestration.jobs.steps import Inputs
    from tinyemo.conversation import IMAGE_TOKEN_ID

    sources = describe_sources(recipe)
    plan = prepare_reasoning(recipe).stages["stage"]
    inputs = Inputs(sources.encoder.preprocessing, torch.device("cpu"), IMAGE_TOKEN_ID)
    for rank in range(WORLD_SIZE):
        steps = []
        for batch in plan.batches(ReadHere(plan, rank), rank=rank):
            parts = inputs.micro_batches(batch, recipe.stages["stage"].micro_batch_size)
            steps.append(
                [
                    {
                        "input_ids": part.input_ids,
                        "labels": part.labels,
                        "position_ids": part.position_ids,
                        "pixel_values": part.pixel_values,
                    }
                    for part in parts
                ]
            )
        torch.save(steps, folder / f"batches-{rank}.pt")


def run_twin(recipe: Recipe, folder: Path) -> list[float]:
    """Tokens/s of each window but the first, by torchrun."""
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    twin = Path(__file__).with_name("lm_twin.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    subprocess.run([*command, str(twin), str(folder), str(STEPS_PER_WINDOW)], check=True, capture_output=True)
    rates: list[float] = json.loads((folder / "rates.json").read_text())
    assert len(rates) == WINDOWS + 1
    return rates[1:]


def measure_speed() -> dict[str, Any]:
    """Medians over rounds and windows, the systems in turns."""
    from cluster.environment import load_platform_environment

    load_platform_environment()
    tokens: dict[str, dict[str, float]] = {"ours": {}, "twin": {}, "ours with checkpoints": {}}
    ratios, waits, windows = {}, {}, {}
    for trains in STAGES:
        recipe = speed_recipe(trains)
        found: dict[str, list[float]] = {"ours": [], "twin": [], "ours with checkpoints": []}
        shares = []
        for turn in range(ROUNDS):
            folder = f"s3://tinyemo/runs/bench-lm/{int(time.time())}-{trains}-{turn}"
            rates, share = run_job(recipe, folder)
            found["ours"] += rates
            shares.append(share)
            if turn == 0:
                found["ours with checkpoints"] = run_job(speed_recipe(trains, checkpoints=True), f"{folder}-kept")[0]
            with tempfile.TemporaryDirectory() as name:
                store_batches(recipe, Path(name))
                found["twin"] += run_twin(recipe, Path(name))
        for system, rates in found.items():
            tokens[system][trains] = statistics.median(rates)
        ratios[trains] = tokens["ours"][trains] / tokens["twin"][trains]
        waits[trains], windows[trains] = statistics.mean(shares), found
        print(
            f"{trains}: ours {tokens['ours'][trains]:,.1f}, twin {tokens['twin'][trains]:,.1f} tokens/s, ratio "
            f"{ratios[trains]:.3f}; waiting for data {100 * waits[trains]:.2f} % of the time; with a checkpoint every "
            f"{STEPS_PER_WINDOW} steps {tokens['ours with checkpoints'][trains]:,.1f}",
            flush=True,
        )
    return {"tokens_per_s": tokens, "ours_vs_twin": ratios, "wait_share": waits, "windows": windows}


CURVE_STEPS = 10
CURVES = {"world size 2": (2, 0), "world size 1": (1, 0), "ZeRO 3": (2, 3)}
"""(workers, ZeRO stage) by name; the first is what the others are held against."""


def measure_curves() -> dict[str, Any]:
    """Losses of each run, and the worst difference of a step."""
    from cluster.environment import load_platform_environment

    load_platform_environment()  # before Ray is imported, which reads its token then
    from orchestration.jobs.checkpoints import read_curve
    from orchestration.services.ray_cluster import connect

    connect()
    losses: dict[str, list[float]] = {}
    for name, (num_workers, zero_stage) in CURVES.items():
        content = {
            "name": "bench-lm-curves",
            "records": {"datasets": ["s3://tinyemo/datasets/oasis"], "template": "chatml"},
            "engine": {"zero_stage": zero_stage, "precision": "fp32"},
            "workers": {"num_workers": num_workers, "cpus_per_worker": WORLD_SIZE / num_workers},
            "stages": {
                "stage": {"trains": "llm", "template": "chatml", "global_batch_size": 4, "micro_batch_size": 2,
                          "gradient_checkpointing": False, "num_steps": CURVE_STEPS, "learning_rate": 1e-4},
            },
        }  # fmt: skip
        recipe = parse_recipe(content, source="benchmark")
        folder = f"s3://tinyemo/runs/bench-lm/{int(time.time())}-curves"
        state = run_without_mlflow(recipe, folder)
        losses[name] = [point["train/loss"] for _, point in read_curve(state.folder) if "train/loss" in point]
        print(f"{name}: {losses[name][0]:.6f} -> {losses[name][-1]:.6f}", flush=True)
    first, *others = losses
    worst = {name: max(abs(a - b) for a, b in zip(losses[first], losses[name], strict=True)) for name in others}
    print(f"worst difference from {first}: {worst}", flush=True)
    return {"curves_135m": {"losses": losses, "worst_difference": worst, "aim": 1e-3}}


def zero_row(zero_stage: int) -> dict[str, Any]:
    """Two steps of full fine-tuning on this rank; bytes counted before the second optimizer step."""
    from orchestration.jobs.reasoner import start_stage
    from orchestration.jobs.stage_weights import build_for_stage
    from orchestration.services.engine import accumulate, state_bytes

    content = {
        "name": "zero",
        "engine": {"zero_stage": zero_stage, "precision": "fp32"},
        "stages": {"stage": {"trains": "llm", "global_batch_size": WORLD_SIZE, "micro_batch_size": 1}},
    }
    recipe = parse_recipe(content, source="benchmark")
    model = build_for_stage(recipe, "stage", {})
    numbers = {
        "all": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
    engine = start_stage(model, recipe, recipe.stages["stage"], num_steps=4, world_size=WORLD_SIZE)
    held: dict[str, int] = {}
    ids = torch.arange(3, 19)[None]
    for _ in range(2):  # Adam's moments come with the first step
        loss = engine(input_ids=ids, labels=ids).loss
        accumulate(engine, loss, is_last=True, before_step=lambda: held.update(state_bytes(engine)))
    return {"numbers": numbers, "bytes": held}


def zero_rank(rank: int, port: int, folder: str) -> None:
    """One rank, stage after stage."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    torch.save([zero_row(zero_stage) for zero_stage in range(4)], Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def measure_zero() -> dict[str, Any]:
    """Bytes of rank 0 by ZeRO stage and kind, and by the formula.

    fp32, n numbers of which t are trained, w ranks: parameters 4n (stage 3: 4n/w); gradients 4t, from stage 1 on 4t/w
    (stage 1 holds them all during the backward pass and drops the others' once they are reduced); Adam 8t, from stage
    1 on 8t/w and DeepSpeed's own copy of the trained parameters, 4t/w.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(zero_rank, (port, folder), nprocs=WORLD_SIZE)
        found = torch.load(Path(folder) / "0.pt", weights_only=True)
    rows = {}
    for zero_stage, row in enumerate(found):
        n, t, w = row["numbers"]["all"], row["numbers"]["trained"], WORLD_SIZE
        formula = {
            "parameters": 4 * n // (w if zero_stage == 3 else 1),
            "gradients": 4 * t // (1 if zero_stage == 0 else w),
            "optimizer": 8 * t if zero_stage == 0 else 12 * t // w,
        }
        ratio = {kind: row["bytes"][kind] / formula[kind] for kind in formula}
        rows[f"zero {zero_stage}"] = {"bytes": row["bytes"], "formula": formula, "bytes_vs_formula": ratio}
        print(f"ZeRO {zero_stage}: {row['bytes']}, against the formula {ratio}", flush=True)
    return {"zero_bytes_of_a_rank": rows}


def measure_offline() -> dict[str, Any]:
    """Minutes, stages and held-out losses; TINYEMO_OFFLINE_RUNS names the two runs, and finished ones are only read."""
    model, baseline = os.environ.get("TINYEMO_OFFLINE_RUNS", "bench-offline,bench-text-only").split(",")

    def run(*arguments: str) -> dict[str, Any]:
        command = [str(Path(sys.executable).with_name("tinyemo")), *arguments, "--json"]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return found

    rows = {
        name: run("train", recipe, "--set", f"name={name}")
        for name, recipe in ((model, "reasoning-offline"), (baseline, "reasoning-text-only"))
    }
    compared = run("compare", model, baseline)
    for name, row in rows.items():
        print(f"{name}: {row['duration_s'] / 60:.1f} minutes, held-out {row['evaluation']['loss']}")
    print(f"{model} against {baseline}, over records: {compared['over_records']}")
    kept = ("duration_s", "answers", "llm_weights", "vision_weights", "stages", "evaluation")
    return {"offline": {name: {key: row[key] for key in kept} for name, row in rows.items()} | {"compared": compared}}


def measure_sizes() -> dict[str, Any]:
    """A row for each size; TINYEMO_SIZES names some of them, and the others' rows stay."""
    from benchmarks.machine import RESULTS
    from cluster.environment import load_platform_environment

    load_platform_environment()
    path = RESULTS / "lm.json"
    rows = json.loads(path.read_text()).get("sizes", {}) if path.exists() else {}
    chosen = os.environ.get("TINYEMO_SIZES", ",".join(TRAINS)).split(",")
    for size in chosen:  # each is minutes: what was measured stays if the next one fails
        rows |= {size: measure_size(size)}
        write_results("lm", {"sizes": rows})
    return {"sizes": rows}


if __name__ == "__main__":
    known = {
        "speed": measure_speed, "zero": measure_zero, "curves": measure_curves, "offline": measure_offline,
        "sizes": measure_sizes,
    }  # fmt: skip
    parts = sys.argv[1:] or list(known)
    if unknown := [part for part in parts if part not in known]:
        sys.exit(f"unknown part {', '.join(unknown)}: choose from {', '.join(known)}")
    for part in parts:
        print("written", write_results("lm", known[part]()))
