"""What a finished run over the reasoning model says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestration.jobs.stage_state import PhaseState

OnReport = Callable[[str, "PhaseState"], None]
"""Called with the stage and its newest state."""


@dataclass(frozen=True)
class StageResult:
    """What a finished stage says of itself.

    Attributes:
        run_id: its MLflow run, a child of the recipe's.
        checkpoint: S3 folder of what it trained.
        num_steps: optimizer steps.
        first_loss: nats a token, of the first step.
        last_loss: nats a token, mean over the last tenth of the steps.
        val_loss: nats a token, after the last step; None without a validation split.
        tokens_per_s: of the last report, over all ranks.
        duration_s: wall clock in this call, waiting for workers included; 0 where it was finished before.
    """

    run_id: str
    checkpoint: str
    num_steps: int
    first_loss: float
    last_loss: float
    val_loss: float | None
    tokens_per_s: float
    duration_s: float


@dataclass(frozen=True)
class ReasonerResult:
    """What a finished run says of itself.

    Attributes:
        model: S3 folder of the exported model.
        answers: "templates" where the data's manifest says so, else "real" or "generated".
        evaluation: see `orchestration.reasoning.evaluate.Evaluation`; None without a test split.
    """

    name: str
    run_id: str
    run_url: str
    model: str
    llm: str
    llm_weights: str
    vision_tower: str
    vision_weights: str
    answers: str
    stages: dict[str, dict[str, Any]]
    evaluation: dict[str, Any] | None
    duration_s: float
