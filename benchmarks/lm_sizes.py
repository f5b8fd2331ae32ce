"""The family at its true sizes: a few optimizer steps of each through the real job; a part of benchmarks/lm.py.

Random weights, ZeRO 3, 2 ranks, the OASIS records in S3; the recipes are the same on a CPU (fp32) and on GPUs (bf16,
a device a rank). `TINYEMO_MIRROR` holds tok512, the tokenizer of the sizes whose vocabulary is smaller than SmolLM2's.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from orchestration.recipe import Recipe, parse_recipe
from orchestration.services.tracking import git_state

if TYPE_CHECKING:
    from orchestration.jobs.checkpoints import StageState

WORLD_SIZE = 2
STEPS = 3
TRAINS = {
    "tinyemo-700m": {"trains": "llm", "template": "llama"},
    "tinyemo-880m": {"trains": "lora", "template": "llama"},
    "tinyemo-1.5b": {"trains": "lora", "template": "llama"},
    "tinyemo-3.2b": {"trains": "connector", "template": "phi"},
}
"""By size; LoRA at the published rank 128."""
BYTES_FREE = 20 * 2**30
"""Of the machine, for everything that a size's run starts."""


def size_recipe(size: str) -> Recipe:
    """A stage of a few steps of one record a rank."""
    tok512 = Path(os.environ.get("TINYEMO_MIRROR", "")) / "models" / "stories260k" / "tokenizer.model"
    stage = {
        **TRAINS[size], "global_batch_size": WORLD_SIZE, "micro_batch_size": 1, "num_steps": STEPS,
        "gradient_checkpointing": True,
    }  # fmt: skip
    content = {
        "name": f"bench-{size}",
        "reasoner": {"llm": f"random:{size}", "vision_tower": "random:clip-vit-large-patch14"},
        "records": {
            "datasets": ["s3://tinyemo/datasets/oasis"],
            "tokenizer": "smollm2-135m" if size == "tinyemo-3.2b" else str(tok512.absolute()),
            "end_token": "<|im_end|>" if size == "tinyemo-3.2b" else "</s>",
        },
        "engine": {"zero_stage": 3},
        "workers": {"num_workers": WORLD_SIZE, "cpus_per_worker": 1},
        "stages": {"stage": stage},
    }
    return parse_recipe(content, source="benchmark")


@contextmanager
def peak_use() -> Iterator[dict[str, int]]:
    """Most memory that the machine had in use within the block, above what it had before."""
    found, stop, before = {"bytes": 0}, threading.Event(), psutil.virtual_memory().used

    def watch() -> None:
        while not stop.wait(0.2):
            found["bytes"] = max(found["bytes"], psutil.virtual_memory().used - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def run_without_mlflow(recipe: Recipe, folder: str) -> StageState:
    """Run the stage of a recipe through the real job, without its lease, MLflow run and export."""
    from orchestration.jobs import reasoner
    from orchestration.jobs.job import run_workers
    from orchestration.jobs.reasoning_plan import prepare_reasoning

    stage = reasoner.stage(replace(prepare_reasoning(recipe), validation=None), "stage", {}, folder)
    return run_workers(replace(stage, job=replace(stage.job, model="")), folder, None, None, None)


def measure_size(size: str) -> dict[str, Any]:
    """Seconds a step, bytes a rank by kind, peak memory and, on a GPU, tokens/s and MFU."""
    from orchestration.jobs.checkpoints import read_curve
    from orchestration.services.ray_cluster import connect

    recipe = size_recipe(size)
    connect()
    folder, began_at = f"s3://tinyemo/runs/bench-lm/{int(time.time())}-{size}", time.monotonic()
    with peak_use() as used:
        state = run_without_mlflow(recipe, folder)
    points: dict[str, list[float]] = {}
    for _, point in read_curve(state.folder):
        for key, value in point.items():
            points.setdefault(key, []).append(value)
    assert len(points["train/loss"]) == STEPS
    row = {
        **{key: value for key, value in git_state().items() if key.startswith("git_")},
        "trains": recipe.stages["stage"].trains,
        "weights": "random",
        "losses": points["train/loss"],
        "tokens_a_step": points["train/tokens"],
        "step_s": points["train/step_s"],
        "step_s_median_but_the_first": statistics.median(points["train/step_s"][1:]),
        "whole_run_s": time.monotonic() - began_at,
        "bytes_of_a_rank": {
            key.removeprefix("memory/").removesuffix("_bytes"): int(values[0])
            for key, values in points.items()
            if key.startswith("memory/")
        },
        "peak_memory_bytes_of_rank_0": int(points["train/peak_memory_bytes"][-1]),
        "peak_bytes_of_the_machine": used["bytes"],
        "fits_20_gib": used["bytes"] <= BYTES_FREE,
        **{key.removeprefix("train/"): points[key] for key in ("train/tokens_per_s", "train/mfu") if key in points},
    }
    print(
        f"{size} ({row['trains']}, RANDOM weights): {row['step_s_median_but_the_first']:.1f} s a step, bytes a rank "
        f"{row['bytes_of_a_rank']}, rank 0 peak {row['peak_memory_bytes_of_rank_0'] / 2**30:.1f} GiB, machine "
        f"{used['bytes'] / 2**30:.1f} GiB",
        flush=True,
    )
    return row
