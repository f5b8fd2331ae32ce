"""A finished run as a Hugging Face folder: safetensors with adapters merged, tokenizer, model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from orchestration.reasoning.model_card import model_card
from orchestration.reasoning.prepare import ReasoningPlan
from orchestration.reasoning.sources import Sources, tokenizer_source
from orchestration.reasoning.weights import build_trained
from tinyemo.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    from orchestration.reasoning.result import ReasonerResult


def export_model(
    plan: ReasoningPlan, sources: Sources, weights: dict[str, str], result: ReasonerResult, folder: Path
) -> None:
    """Write a folder that `Reasoner.from_pretrained` and `tinyemo explain` read.

    One model is in memory: it is built from its sources, and what was trained is copied into it tensor by tensor.

    Args:
        plan: of the run.
        sources: of the model's parts.
        weights: S3 folder of each stage's trained weights, by its name.
        result: for the card.
        folder: made where there is none.
    """
    recipe = plan.recipe
    model = build_trained(recipe, weights)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=open_tokenizer(tokenizer_source(recipe.records.tokenizer)),
        eos_token=recipe.records.end_token,
    )
    model.config.template = list(plan.stages.values())[-1].config.template
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(recipe.records.end_token)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(plan, sources, result), encoding="utf-8")
