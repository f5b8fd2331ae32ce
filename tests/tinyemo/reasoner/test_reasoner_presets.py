"""The family at its true sizes, counted without memory."""

from __future__ import annotations

import pytest
import torch
from tiny_reasoners import count_parameters
from transformers import CLIPModel

from tinyemo.errors import ConfigError
from tinyemo.families import CLIP_PARAMETERS, FAMILY
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.presets import clip_preset, preset_config, text_preset, vision_preset

LANGUAGE_MODELS = {
    "smollm2-135m": 134_515_008,
    "tinyemo-700m": 271_527_168,
    "tinyemo-880m": 457_179_136,
    "tinyemo-1.5b": 1_100_048_384,
    "tinyemo-3.2b": 2_779_683_840,
}
VISION_TOWER = 303_179_776
PROJECTION = 1024 * 768
PUBLISHED_BILLIONS = {"tinyemo-700m": 0.70, "tinyemo-880m": 0.88, "tinyemo-1.5b": 1.53, "tinyemo-3.2b": 3.21}


@pytest.mark.parametrize("name", FAMILY)
def test_counts_are_the_published_totals(name: str) -> None:
    """The paper counts the language model and all of CLIP, text tower included; tied parameters count once."""
    with torch.device("meta"):
        model, clip = Reasoner(preset_config(name)), CLIPModel(clip_preset())
    assert count_parameters(model.language_model) == LANGUAGE_MODELS[name]
    assert count_parameters(clip) == CLIP_PARAMETERS
    total, size = LANGUAGE_MODELS[name] + CLIP_PARAMETERS, FAMILY[name]
    assert total == size.total_parameters
    if name in PUBLISHED_BILLIONS:
        assert round(total / 1e9, 2) == PUBLISHED_BILLIONS[name]
    assert count_parameters(model.vision_tower) == VISION_TOWER + PROJECTION
    hidden = size.hidden_size
    assert text_preset(name).hidden_size == hidden
    assert count_parameters(model.connector) == 1024 * hidden + hidden + hidden * hidden + hidden


def test_an_image_is_256_tokens_of_clip_and_49_of_efficientnet() -> None:
    assert preset_config("tinyemo-1.5b").num_image_tokens == 256
    config = preset_config("smollm2-135m", vision="efficientnet-lite0", connector="linear", template="chatml")
    assert (config.num_image_tokens, config.template, config.vision_config) == (49, "chatml", None)
    with torch.device("meta"):
        model = Reasoner(config)
    assert model.image_embeds(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 49, 576)


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown model size 'tinyemo-7b'"):
        text_preset("tinyemo-7b")
    with pytest.raises(ConfigError, match="unknown vision preset 'resnet'"):
        vision_preset("resnet")
