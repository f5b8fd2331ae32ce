"""Texts about a finished run of a reasoning model: its model card, and lines for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestration.recipe import to_toml

if TYPE_CHECKING:
    from orchestration.jobs.prepare import ReasoningPlan
    from orchestration.jobs.results import ReasonerResult

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
