"""Outcomes of finished runs, and what every table must say beside their figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a finished run of a projector.

    Attributes:
        test_confusion: (C, C) counts in the order of `words`; rows are true labels.
        samples_per_s: optimizer steps alone, median over logs.
        model: S3 folder of the exported projector.
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
    model: str
    encoder_weights: str = "real"


def notes(result: TrainResult) -> str:
    """Return what every table and plot must say beside a result's figures; empty where weights and data are real."""
    found = []
    if result.llm_weights == "random":
        found.append("random LLM weights")
    if result.encoder_weights == "random":
        found.append("random vision encoder")
    if result.data == "generated":
        found.append("generated data")
    return ", ".join(found)


@dataclass(frozen=True)
class StageResult:
    """Outcome of a finished stage of a reasoning model.

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
    """Outcome of a finished run of a reasoning model.

    Attributes:
        model: S3 folder of the exported model.
        answers: "templates" where the data's manifest says so, else "real" or "generated".
        evaluation: see `orchestration.jobs.evaluation.Evaluation`; None without a test split.
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


@dataclass(frozen=True)
class StreamResult:
    """Outcome of a finished reading.

    Attributes:
        num_steps: over all epochs.
        num_samples: records that the last attempt handed out.
        samples_per_s: over all ranks and the second half of the last attempt's steps.
        first_batch_s: seconds from opening the stream to the first batch.
        shuffle: see `orchestration.data.plan.shuffle_quality`.
        ledger: see `orchestration.data.ledger.LedgerCheck`; None without a ledger.
    """

    name: str
    folder: str
    num_steps: int
    num_samples: int
    samples_per_s: float
    first_batch_s: float
    shuffle: dict[str, float]
    ledger: dict[str, int] | None


Result = TrainResult | ReasonerResult
