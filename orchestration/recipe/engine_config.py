"""What a recipe says of the engine. Apart from `engine`, so that a recipe is read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tinyemo.config import Section


class EngineConfig(Section):
    """How DeepSpeed shards and computes."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What is sharded over the ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters. A projector's
    state is megabytes, so sharding it costs more than it saves."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type; auto takes bf16 on a GPU and fp32 on a CPU, and says so."""
    bucket_elements: PositiveInt = 16_777_216
    """Elements of one communication bucket; DeepSpeed's own 5e8 costs gigabytes a rank."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where optimizer state lives while it is not needed: beside the model, or in the host's memory (ZeRO 1 to 3)."""


class OptimizerConfig(Section):
    """AdamW under OneCycle, as published (arXiv 2410.07062): the first rate is max_lr / 25 = 2e-5."""

    max_lr: PositiveFloat = 5e-4
    """Highest learning rate of the cycle."""
    pct_start: float = Field(0.005, gt=0, lt=1)
    """Part of the steps before the highest rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay, per unit of learning rate."""
