"""The main job: what is asked for is checked first, then run, or its result shown where it is finished."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestration import storage, tracking
from orchestration.claims import read_claim
from orchestration.recipe import Recipe
from orchestration.training.prepare import prepare

if TYPE_CHECKING:
    from orchestration.fit import PhaseState

logger = logging.getLogger(__name__)

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


def train(recipe: Recipe, *, parent_run_id: str | None = None, on_report: OnReport | None = None) -> TrainResult:
    """Train a recipe to its end, from where an earlier call of the same name and recipe left it.

    Raises:
        TrainingError: a run of this name exists with another recipe or other data, or training failed.
        TinyEmoError: see `prepare`, and what the servers say.
    """
    preparation = prepare(recipe)
    folder = f"{recipe.checkpoint.root}/{recipe.name}"
    claim = read_claim(folder, recipe, preparation.data_digests())
    if claim is not None and storage.exists(f"{folder}/result.json"):
        logger.warning("%s is finished already; its result stands in %s", recipe.name, folder)
        return TrainResult(**storage.read_json(f"{folder}/result.json"))
    tracking.require_server()
    # Torch, Ray and DeepSpeed take seconds to import: what is wrong with a recipe or its data has been said by now.
    from orchestration.training.run import run_training

    return run_training(preparation, claim, folder, parent_run_id=parent_run_id, on_report=on_report)


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
