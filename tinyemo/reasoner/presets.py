"""Configurations of the family's parts at their true sizes, without download or allocation.

The published totals count a language model and the whole of CLIP ViT-L/14, text tower included, without the connector.
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig, PhiConfig, PreTrainedConfig

from tinyemo.encoder_folders import describe_random_efficientnet
from tinyemo.encoders import EFFICIENTNET_LITE0, EncoderInfo, EncoderSpec, Preprocessing
from tinyemo.errors import ConfigError
from tinyemo.families import find_size
from tinyemo.reasoner.config import ReasonerConfig
from tinyemo.reasoner.openelm import OpenELMConfig

CLIP_VIT_L14 = "clip-vit-large-patch14"
_CLIP_PREPROCESSING = Preprocessing(
    resize="shortest_edge",
    size=224,
    crop=224,
    interpolation="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


def text_preset(name: str) -> PreTrainedConfig:
    """Return the configuration of a family member's language model, at its true size.

    Raises:
        ConfigError: the family has no such member.
    """
    find_size(name)
    match name:
        case "smollm2-135m":
            return LlamaConfig(
                vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
                rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
                tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
        case "tinyemo-700m":
            return OpenELMConfig(model_dim=1280, num_transformer_layers=16)
        case "tinyemo-880m":
            return OpenELMConfig(model_dim=1536, num_transformer_layers=20)
        case "tinyemo-1.5b":
            return LlamaConfig(
                vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5,
                bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
        case "tinyemo-3.2b":
            return PhiConfig(
                vocab_size=51_200, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=32,
                num_attention_heads=32, partial_rotary_factor=0.4, max_position_embeddings=2048,
                resid_pdrop=0.1, bos_token_id=50_256, eos_token_id=50_256,
            )  # fmt: skip
    raise ConfigError(f"the family's member {name!r} has no preset of its language model")


def clip_preset() -> CLIPConfig:
    """Return the configuration of all of CLIP ViT-L/14."""
    text = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768,
    }  # fmt: skip
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224, "projection_dim": 768,
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)


def vision_preset(name: str) -> tuple[EncoderSpec, CLIPVisionConfig | None]:
    """Return an encoder with random weights at its true size: its description and transformers' configuration.

    Raises:
        ConfigError: no such encoder.
    """
    if name == EFFICIENTNET_LITE0:
        return describe_random_efficientnet(), None
    if name != CLIP_VIT_L14:
        raise ConfigError(f"unknown vision preset {name!r}: it must be {EFFICIENTNET_LITE0} or {CLIP_VIT_L14}")
    config = clip_preset().vision_config
    side = config.image_size // config.patch_size
    spec = EncoderSpec(
        info=EncoderInfo(
            name=f"openai/{name}", revision="random", preprocessing=_CLIP_PREPROCESSING.digest(), weights="random"
        ),
        kind="clip",
        preprocessing=_CLIP_PREPROCESSING,
        feature_width=config.projection_dim,
        patch_grid=(side, side),
        patch_width=config.hidden_size,
    )
    return spec, config


def preset_config(
    name: str, *, vision: str = CLIP_VIT_L14, connector: str = "mlp2x_gelu", **fields: Any
) -> ReasonerConfig:
    """Return the configuration of a family member's reasoning model at its true size, tagged as random.

    Args:
        name: name of the member.
        vision: preset of the vision tower.
        connector: kind of connector.
        fields: other fields of ReasonerConfig.
    """
    spec, vision_config = vision_preset(vision)
    return ReasonerConfig(
        text_config=text_preset(name),
        vision_config=vision_config,
        vision=spec.model_dump(mode="json"),
        connector=connector,
        llm_name=find_size(name).llm,
        llm_weights="random",
        vision_weights="random",
        **fields,
    )
