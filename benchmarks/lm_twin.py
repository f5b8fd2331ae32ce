"""The raw twin of our language-model job: torchrun, DeepSpeed, batches in memory; started by benchmarks/lm.py.

It shares the model and the stored micro-batches with ours; loop, engine options and data path are its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from orchestration.jobs.stage_weights import build_for_stage
from orchestration.recipe import Recipe
from orchestration.services.engine import load_collectives


def main(folder: Path, steps_per_window: int) -> None:
    """Train over the stored batches; rank 0 writes the tokens/s of each window over all ranks."""
    torch.set_num_threads(1)
    load_collectives()
    deepspeed.init_distributed("gloo" if not torch.cuda.is_available() else "nccl", auto_mpi_discovery=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    stage = recipe.stages["stage"]
    model = build_for_stage(recipe, "stage", {})
    steps = torch.load(folder / f"batches-{rank}.pt", weights_only=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=stage.learning_rate, fused=True),
        config={
            "train_micro_batch_size_per_gpu": stage.micro_batch_size,
            "gradient_accumulation_steps": len(steps[0]),
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": recipe.engine.zero_stage},
            "bf16": {"enabled": torch.cuda.is_available()},
            "steps_per_print": 2**31,
        },
    )
    rates = []
    for first in range(0, len(steps), steps_per_window):
        num_tokens, began_at = 0, time.perf_counter()
        for micro_batches in steps[first : first + steps_per_window]:
            for batch in micro_batches:
                moved = {name: value.to(engine.device) for name, value in batch.items()}
                loss = engine(**moved).loss
                engine.backward(loss)
                engine.step()
                num_tokens += batch["input_ids"].numel()
        counts = torch.tensor(float(num_tokens), device=engine.device)
        torch.distributed.all_reduce(counts)
        rates.append(float(counts) / (time.perf_counter() - began_at))
    assert world_size == torch.distributed.get_world_size()
    if rank == 0:
        (folder / "rates.json").write_text(json.dumps(rates))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
