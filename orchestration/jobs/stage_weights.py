"""A reasoning model built from the sources of its parts and from what earlier stages trained.

The first rank alone reads it. DeepSpeed sends every parameter from there when an engine starts, at ZeRO 3 one by one
into the shards, so the other ranks need a model of the same shape and nothing in it: a machine that holds several ranks
never holds as many copies, because memory that was set aside and not yet written to takes no room.
"""

from __future__ import annotations

import ctypes
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from orchestration.assets.model_files import CONFIG_FILES, WEIGHT_FILES, choose_encoder, describe_choice, fetch
from orchestration.assets.models import fetch_llm, public_name
from orchestration.recipe import Recipe
from orchestration.recipe.sections import StageConfig
from orchestration.services import storage
from tinyemo.errors import DataError, TinyEmoError
from tinyemo.reasoner.loading import build_reasoner
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.sources import is_random
from tinyemo.reasoner.trained import merge_adapters, select_trained

logger = logging.getLogger(__name__)

TRAINED_WEIGHTS = "trained.safetensors"
"""In the last checkpoint of a stage: the parameters that it trained, whole."""


def build_start(recipe: Recipe) -> Reasoner:
    """Return the fp32 model before its first stage: parts from their sources, the connector seeded, equal anywhere."""
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
        image_grid=source.image_grid,
        template=recipe.records.template,
        seed=recipe.train.seed,
        llm_name=public_name(source.llm),
        vision_name=None if spec is None else spec.info.name,
        vision_revision=None if spec is None else spec.info.revision,
    )


def build_for_stage(recipe: Recipe, stage: str, weights: dict[str, str]) -> Reasoner:
    """Return the model as a stage begins with it: earlier stages' weights in place, what this one trains unfrozen.

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
    """Return the model after its last stage, adapters merged and frozen."""
    model = build_start(recipe)
    for name, config in recipe.stages.items():
        model = finish_stage(model, config, weights[name], recipe.train.seed)
    model.requires_grad_(requires_grad=False).eval()
    return model


def prepare_stage(model: Reasoner, stage: StageConfig, seed: int) -> Reasoner:
    """Return the model in training mode with seeded adapters and what the stage trains unfrozen."""
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
    """Return the model with what a finished stage trained, adapters merged, as the next stage begins with it."""
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


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""


def give_freed_memory_back(*, at_once: bool) -> None:
    """Set whether a tensor of a mebibyte or more that this process frees goes back to the machine at once.

    glibc keeps freed blocks of up to 32 MiB for later, so that a rank which takes in a model parameter by parameter and
    keeps its shard of each would end up holding the whole; off are the rules that glibc itself arrives at.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(_MMAP_THRESHOLD, 2**20 if at_once else 32 * 2**20)
    mallopt(_TRIM_THRESHOLD, 2**17 if at_once else 64 * 2**20)


def build_on_first_rank(build: Callable[[], Reasoner], stage: StageConfig, seed: int) -> Reasoner:
    """Return the model of `build` on the first rank; elsewhere a model of its shape and buffers, without weights.

    Args:
        build: the model as the stage begins with it, see `build_for_stage`; called on the first rank alone.
        stage: that it is prepared for.
        seed: of the stage's adapters.

    Raises:
        TinyEmoError: what `build` raises, on every rank.
    """
    model: Reasoner | None = None
    sent: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            model = build()
            sent = [(model.config, dict(model.named_buffers()), _shapes(model))]
        except TinyEmoError as error:
            sent = [error]
    torch.distributed.broadcast_object_list(sent)
    if isinstance(sent[0], TinyEmoError):
        raise sent[0]
    if model is not None:
        return model
    config, buffers, shapes = sent[0]
    with no_init_weights():
        model = Reasoner._from_config(config, dtype=torch.float32)
    assert isinstance(model, Reasoner)
    model.tie_weights()
    prepare_stage(model, stage, seed)
    assert _shapes(model) == shapes, "a model built from its configuration has the parameters of the first rank's"
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def _shapes(model: Reasoner) -> list[tuple[str, torch.Size, bool]]:
    return [(name, parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()]
