"""Outcomes of finished runs, what every table must say beside their figures, and a reasoning model's card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestration.recipe import to_toml

if TYPE_CHECKING:
    from orchestration.jobs.reasoning_plan import ReasoningPlan


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


WARNINGS = {
    "llm_weights": "**The language model's weights are random**: it was never trained, its text means nothing.",
    "vision_weights": "**The vision tower's weights are random**: it has never seen an image.",
    "templates": (
        "**The answers it learned are templates** that a program filled in from ratings: they teach the form of an "
        "explanation, not how to reason about a picture."
    ),
    "generated": "**The data were generated**: nothing that it says is about real images.",
}


CONDITION_NAMES = {
    "right": "own image", "shuffled": "another record's image", "text_only": "no image, no image tokens"
}  # fmt: skip


def warnings_of(result: ReasonerResult) -> list[str]:
    """Return the warnings that belong beside every figure of a run; none where weights and answers are real."""
    said = [WARNINGS[name] for name in ("llm_weights", "vision_weights") if getattr(result, name) == "random"]
    return said + [text for name, text in WARNINGS.items() if name in result.answers.split(",")]


def model_card(plan: ReasoningPlan, result: ReasonerResult) -> str:
    """Return the model card as Markdown: parts, data, stages, evaluation and limits."""
    sources = plan.sources
    lines = [
        "---", "tags: [tinyemo, image-text-to-text]", f"base_model: {sources.llm_name}", "---", "",
        f"# {result.name}", "",
        "A vision tower, a connector and a language model that explains the emotion which a photograph evokes. The "
        "label is chosen by a metric projector and stands in the prompt (after arXiv 2410.07062).", "",
        *(f"> {text}\n" for text in warnings_of(result)),
        "## Parts",
        f"- language model: {sources.llm_name}, {sources.llm_revision}, weights {result.llm_weights}",
        f"- vision tower: {result.vision_tower}, weights {result.vision_weights}, frozen",
        f"- connector: {plan.recipe.reasoner.connector}",
        f"- prompt: template {plan.template}, "
        f"{sources.image_tokens} tokens an image", "",
        "## Data",
        *_data_lines(plan), "",
        "## Stages",
        "| stage | trained | steps | first loss | last loss | validation loss | tokens/s |",
        "|---|---|---|---|---|---|---|",
        *(_stage_line(name, plan.recipe.stages[name].trains, row) for name, row in result.stages.items()), "",
        "Losses are nats a token over answers.", "",
        "## Evaluation",
        *evaluation_lines(result.evaluation), "",
        "## Limits",
        "- The label is given in the prompt: an accuracy read off these answers would measure copying.",
        "- An explanation is text that is likely after this prompt; nothing checks that it is true of the picture.",
        "- It may repeat the biases of its data and of its parts.", "",
        f"MLflow run {result.run_id}. Recipe, sha256 {plan.recipe.digest()}:", "",
        "```toml", to_toml(plan.recipe).rstrip(), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _data_lines(plan: ReasoningPlan) -> list[str]:
    found: dict[str, None] = {}
    for name, stage in (*plan.stages.items(), ("validation", plan.validation), ("test", plan.test)):
        for part in stage.sets if stage is not None else ():
            rows = part.manifest.splits[part.split].rows
            found[
                f"- {name}: {part.manifest.uri}, split {part.split}, {rows} records, digest {part.manifest.digest}"
            ] = None
    return list(found)


def _stage_line(name: str, trains: str, row: dict[str, Any]) -> str:
    validation = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
    trained = trains if trains == "connector" else f"connector, {trains}"
    return (
        f"| {name} | {trained} | {row['num_steps']} | {row['first_loss']:.4f} | {row['last_loss']:.4f} | "
        f"{validation} | {row['tokens_per_s']:,.0f} |"
    )


def evaluation_lines(evaluation: dict[str, Any] | None) -> list[str]:
    """Return the evaluation as lines of Markdown."""
    if evaluation is None:
        return ["The data have no test split: nothing was evaluated."]
    loss = evaluation["loss"]
    lines = [
        f"{evaluation['num_records']} held-out records of {evaluation['num_images']} images, read once. Mean over "
        "records of the nats a token of an answer:", "",
        f"| {' | '.join(CONDITION_NAMES[name] for name in loss)} |", "|---" * len(loss) + "|",
        f"| {' | '.join(f'{value:.4f}' for value in loss.values())} |", "",
    ]  # fmt: skip
    if not evaluation["tests"]:
        return [*lines, "It was trained on text alone, without images."]
    lines += [
        "| own image against | over | pairs | difference | own is lower in | p (Wilcoxon) | p (t) |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for over, key in (("records", "tests"), ("images", "tests_by_image")):
        for name, test in evaluation[key].items():
            lines.append(
                f"| {name} | {over} | {test['num_pairs']} | {test['mean_difference']:+.4f} | "
                f"{100 * test['share_lower']:.1f} % | {test['p_wilcoxon']:.2g} | {test['p_t']:.2g} |"
            )
    return [*lines, "", 'Tests are one-sided for "own is lower"; the records of one image are no independent draws.']
