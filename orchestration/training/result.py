"""What a finished run over the projector says of itself, and what every table must say beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestration.jobs.stage_state import PhaseState

OnReport = Callable[[str, "PhaseState"], None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run says of itself.

    Attributes:
        test_confusion: (C, C) counts in the order of `words`; rows are true labels.
        samples_per_s: of the last epoch, optimizer steps alone.
    """

    name: str
    run_id: str
    run_url: str
    llm: str
    llm_weights: str
    hidden_size: int
    data: str
    num_train: int
    num_validation: int
    num_test: int
    best_epoch: int
    val_top1_accuracy: float | None
    test_top1_accuracy: float
    test_confusion: list[list[int]]
    words: list[str]
    samples_per_s: float
    encoder_weights: str = "real"


def notes(result: TrainResult) -> str:
    """What every table and plot must say of a result beside its figures; empty where weights and data are real."""
    said = []
    if result.llm_weights == "random":
        said.append("random LLM weights")
    if result.encoder_weights == "random":
        said.append("random vision encoder")
    if result.data == "generated":
        said.append("generated data")
    return ", ".join(said)
