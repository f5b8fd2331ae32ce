"""Sections of a recipe about the engine. They import no torch, so a recipe is read at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tinyemo.config import Section


class EngineConfig(Section):
    """How DeepSpeed shards the model and in which precision it computes."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """State sharded over the ranks: 0 none, 1 optimizer state, 2 also gradients, 3 also parameters. Use 0 for a
    projector: its state is a few megabytes, so sharding costs more than it saves."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type; auto takes bf16 on a GPU and fp32 on a CPU, and logs which."""
    bucket_elements: PositiveInt = 16_777_216
    """Elements of one communication bucket; DeepSpeed's default of 5e8 takes gigabytes on each rank."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Memory that holds optimizer state between steps: the device's, or the host's (needs ZeRO 1 to 3)."""


class OptimizerConfig(Section):
    """AdamW with a OneCycle schedule, as published (arXiv 2410.07062): the first rate is max_lr / 25 = 2e-5."""

    max_lr: PositiveFloat = 5e-4
    """Highest learning rate of the cycle."""
    pct_start: float = Field(0.005, gt=0, lt=1)
    """Share of the steps before the highest rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, per unit of learning rate."""
    gradient_clipping: NonNegativeFloat = 0.0
    """Largest L2 norm of the gradient over all parameters; a larger gradient is scaled down to it. 0: no clipping."""
