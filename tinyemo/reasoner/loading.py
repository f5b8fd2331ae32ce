"""Construction of reasoning models from weights in local folders, or with random weights.

Whoever asks fetches the weights, pinned by revision; nothing here downloads and no code of a model's folder runs.
"""

from __future__ import annotations

import copy
import logging
import struct
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinyemo.encoder_folders import WEIGHTS_MARK, describe_encoder, read_vision_config
from tinyemo.errors import DataError, one_line
from tinyemo.families import FAMILY
from tinyemo.local_files import read_config
from tinyemo.reasoner.config import LANGUAGE_MODELS, ReasonerConfig
from tinyemo.reasoner.model import Reasoner, VisionTower
from tinyemo.reasoner.presets import text_preset, vision_preset
from tinyemo.reasoner.sources import Source, find_gguf, is_random, preset_name
from tinyemo.vision import load_network

logger = logging.getLogger(__name__)


def build_reasoner(
    llm_source: Source,
    vision_source: Source,
    *,
    connector: str = "mlp2x_gelu",
    image_grid: int | None = None,
    template: str = "plain",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    llm_name: str | None = None,
    vision_name: str | None = None,
    vision_revision: str | None = None,
) -> Reasoner:
    """Build a reasoning model in evaluation mode: both parts from their sources, the connector with random weights.

    Each part is loaded once and taken as it is, so the peak is one copy of the model in `dtype`, and for a GGUF file
    its tensors in float32.

    Args:
        llm_source: `random:<member of the family>`, a GGUF file or the folder of one, or a Hugging Face folder.
        vision_source: `random:<vision preset>` or an encoder's folder.
        connector: identity, linear or mlp2x_gelu.
        image_grid: side of the grid that patches are averaged to; None keeps every patch.
        template: chat template, kept in the configuration.
        dtype: type of every parameter.
        seed: seed of the connector and of random weights.
        llm_name: public name of the language model; None takes the name of its folder.
        vision_name: public name of the encoder; None takes the name of its folder.
        vision_revision: revision of the encoder's weights; None takes their digest.

    Raises:
        ConfigError: no such preset, or parts that do not fit each other.
        DataError: a folder holds something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language_model, llm_weights = load_language_model(llm_source, dtype)
        if is_random(vision_source):
            spec, vision_config = vision_preset(preset_name(vision_source))
            tower = None
        else:
            folder = Path(vision_source)
            spec = describe_encoder(folder, name=vision_name or folder.name, revision=vision_revision)
            vision_config = None if spec.kind == "efficientnet-lite0" else read_vision_config(folder)
            tower = VisionTower(spec.kind, load_network(folder, spec).to(dtype))
        config = ReasonerConfig(
            text_config=copy.deepcopy(language_model.config),  # it takes the copy's kind of attention away
            vision_config=vision_config,
            vision=spec.model_dump(mode="json"),
            connector=connector,
            image_grid=image_grid,
            template=template,
            llm_name=llm_name or _language_model_name(llm_source),
            llm_weights=llm_weights,
            vision_weights=spec.info.weights,
        )
        model = Reasoner._from_config(config, dtype=dtype, language_model=language_model, vision_tower=tower)
    assert isinstance(model, Reasoner)
    model.eval()
    return model


def load_language_model(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, Literal["real", "random"]]:
    """Load a causal language model and say whether its weights were trained; random ones use torch's generator.

    Raises:
        ConfigError: no such preset.
        DataError: no language model that we know, or one that lacks weights.
    """
    if is_random(source):
        model = AutoModelForCausalLM.from_config(text_preset(preset_name(source)), dtype=dtype)
        return model, "random"
    path = Path(source)
    gguf = find_gguf(path)
    if gguf is not None:
        return load_gguf(gguf, dtype), "real"
    config = read_config(path, "language model")
    model = _load_pretrained(path, dtype)
    return model, "random" if config.get(WEIGHTS_MARK) == "random" else "real"


def load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the language model in a GGUF file, dequantised.

    transformers puts llama.cpp's order of query and key rows right, ties the output layer and reads the
    configuration from the file.

    Raises:
        DataError: it is no such file, or one of another architecture.
    """
    model = _load_pretrained(path.parent, dtype, gguf_file=path.name)
    # From here on these are ordinary weights: without this, saving would call them quantised.
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    # The file holds 1e-5 as float32.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    return model


def _load_pretrained(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise DataError(f"{folder} holds no language model that can be loaded: {one_line(error)}") from error
    if model.config.model_type not in LANGUAGE_MODELS:
        raise DataError(
            f"{folder} holds a model of type {model.config.model_type!r}: known are {', '.join(LANGUAGE_MODELS)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills these with noise and only warns
        raise DataError(f"{folder} lacks {len(missing)} weights of its language model, the first is {missing[0]}")
    assert isinstance(model, PreTrainedModel)
    return model


def _language_model_name(source: Source) -> str:
    if is_random(source):
        return FAMILY[preset_name(source)].llm
    return Path(source).stem
