"""A reasoning model built from its parts' sources and from what earlier stages trained."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import logging as hf_logging

from orchestration.assets.encoder_files import CONFIG_FILES, WEIGHT_FILES, choose_encoder, describe_choice, fetch
from orchestration.assets.models import fetch_llm, public_name
from orchestration.recipe import Recipe
from orchestration.recipe.stage_config import StageConfig
from orchestration.services import storage
from tinyemo.errors import DataError
from tinyemo.reasoner.loading import build_reasoner
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.sources import is_random
from tinyemo.reasoner.trained import merge_adapters, select_trained

logger = logging.getLogger(__name__)

TRAINED_WEIGHTS = "trained.safetensors"
"""In the last checkpoint of a stage: the parameters that it trained, whole."""


def build_start(recipe: Recipe) -> Reasoner:
    """The model as no stage has seen it yet, fp32: parts from their sources, the connector seeded, equal anywhere."""
    source = recipe.reasoner
    hf_logging.disable_progress_bar()
    if is_random(source.vision_tower):
        vision: Path | str = source.vision_tower
        spec = None
    else:
        choice = choose_encoder(source.vision_tower, source.vision_revision)
        vision, spec = fetch(choice, CONFIG_FILES + WEIGHT_FILES), describe_choice(choice)
    return build_reasoner(
        source.llm if is_random(source.llm) else fetch_llm(recipe),
        vision,
        connector=source.connector,
        template=recipe.records.template,
        seed=recipe.train.seed,
        llm_name=public_name(source.llm),
        vision_name=None if spec is None else spec.info.name,
        vision_revision=None if spec is None else spec.info.revision,
    )


def build_for_stage(recipe: Recipe, stage: str, weights: dict[str, str]) -> Reasoner:
    """The model as a stage begins with it: earlier stages' weights in place, what this one trains unfrozen.

    Args:
        recipe: of the run.
        stage: name.
        weights: S3 folder of each earlier stage's trained weights, by its name.
    """
    model = build_start(recipe)
    for name, config in recipe.stages.items():
        if name == stage:
            return prepare_stage(model, config, recipe.train.seed)
        model = finish_stage(model, config, weights[name], recipe.train.seed)
    raise AssertionError(f"no stage {stage}")


def build_trained(recipe: Recipe, weights: dict[str, str]) -> Reasoner:
    """The model after its last stage, adapters merged, nothing trained any more."""
    model = build_start(recipe)
    for name, config in recipe.stages.items():
        model = finish_stage(model, config, weights[name], recipe.train.seed)
    model.requires_grad_(requires_grad=False).eval()
    return model


def prepare_stage(model: Reasoner, stage: StageConfig, seed: int) -> Reasoner:
    """The model with what the stage trains unfrozen, in training mode; its adapters are in, seeded."""
    select_trained(
        model,
        stage.trains,
        num_layers=stage.num_layers,
        rank=stage.lora.rank,
        alpha=stage.lora.alpha,
        dropout=stage.lora.dropout,
        seed=seed,
    )
    if not stage.images:
        model.connector.requires_grad_(requires_grad=False)
    if stage.gradient_checkpointing:
        # Without re-entering, gradients also reach a checkpointed block whose input needs none.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def finish_stage(model: Reasoner, stage: StageConfig, uri: str, seed: int) -> Reasoner:
    """The model with what a finished stage trained, adapters merged, as the next stage begins with it."""
    prepare_stage(model, stage, seed)
    load_trained(model, uri)
    merge_adapters(model)
    model.activation_checkpointing_disable()
    return model


@torch.no_grad()
def load_trained(model: Reasoner, uri: str) -> None:
    """Copy a stage's trained weights into the model, tensor by tensor.

    Raises:
        DataError: they are not those of the parameters that are trained.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / TRAINED_WEIGHTS
        storage.download_file(f"{uri}/{TRAINED_WEIGHTS}", path)
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(trained):
                odd = sorted(set(file.keys()) ^ set(trained))
                raise DataError(f"{uri} holds other parameters than the stage trains, the first is {odd[0]}")
            for key, parameter in trained.items():
                parameter.copy_(file.get_tensor(key))
