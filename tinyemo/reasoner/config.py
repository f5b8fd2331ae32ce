"""Configuration of a reasoning model, complete enough to build it from its export alone."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from tinyemo.conversation import IMAGE_TOKEN_ID
from tinyemo.encoders import EFFICIENTNET_LITE0, EncoderSpec, count_image_tokens
from tinyemo.errors import ConfigError

# Importing it makes transformers know the model type.
from tinyemo.reasoner.openelm import OpenELMConfig

LANGUAGE_MODELS = ("llama", "phi", "qwen2", OpenELMConfig.model_type)
"""Model types of language models that we stand behind; each is tested."""
WEIGHTS = ("real", "random")
CONNECTORS = ("identity", "linear", "mlp2x_gelu")
"""TinyLLaVA Factory's names."""


class ReasonerConfig(PreTrainedConfig):
    """Configuration of a vision tower, a connector and a causal language model."""

    model_type = "tinyemo_reasoner"
    sub_configs_defaults = {  # noqa: RUF012 - transformers declares it so
        "text_config": SubConfigSpec(AutoConfig, "llama"),
        "vision_config": SubConfigSpec(AutoConfig, "clip_vision_model", optional=True),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    """Configuration of the language model."""
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    """Configuration of transformers' vision tower; None for EfficientNet-Lite0, which has none."""
    vision: dict[str, Any] | None = None
    """An EncoderSpec: kind, preprocessing, patch grid and width, name and revision."""
    connector: str = "mlp2x_gelu"
    """identity, linear or mlp2x_gelu."""
    image_grid: int | None = None
    """Side of the square grid that patches are averaged to before the connector; None keeps every patch."""
    image_token_id: int = IMAGE_TOKEN_ID
    """Stands in `input_ids` once for each patch of an image; outside of every vocabulary."""
    template: str = "plain"
    """Chat template that it was trained with."""
    llm_name: str = "unknown"
    """The language model's public name."""
    llm_weights: str = "real"
    """random: a language model that was never trained, for tests and measurements."""
    vision_weights: str = "real"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.vision is not None:
            self._check()

    def _check(self) -> None:
        # transformers builds an empty configuration to find what differs from the defaults: that one has no vision.
        spec, text = self.encoder_spec, self.text_config
        assert isinstance(text, PreTrainedConfig)
        if text.model_type not in LANGUAGE_MODELS:
            raise ConfigError(f"language model of type {text.model_type!r}: it must be one of {LANGUAGE_MODELS}")
        if self.connector not in CONNECTORS:
            raise ConfigError(f"connector is {self.connector!r}: it must be one of {', '.join(CONNECTORS)}")
        if self.connector == "identity" and spec.patch_width != text.hidden_size:
            raise ConfigError(
                f"connector is 'identity', but patches are {spec.patch_width} wide and the language model "
                f"{text.hidden_size}: use linear or mlp2x_gelu"
            )
        if (self.vision_config is None) != (spec.kind == EFFICIENTNET_LITE0):
            raise ConfigError(f"a {spec.kind} tower with vision_config {self.vision_config}: only one of both can be")
        if 0 <= self.image_token_id < text.vocab_size:
            raise ConfigError(f"image_token_id is {self.image_token_id}: it must lie outside of {text.vocab_size} ids")
        count_image_tokens(spec, self.image_grid)
        for name in ("llm_weights", "vision_weights"):
            if getattr(self, name) not in WEIGHTS:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be one of {WEIGHTS}")
        # A tied language model ties itself; here it tells transformers that the whole has tied weights.
        self.tie_word_embeddings = bool(text.tie_word_embeddings)

    @property
    def encoder_spec(self) -> EncoderSpec:
        """Validated description of the vision tower."""
        return EncoderSpec.model_validate(self.vision)

    @property
    def num_image_tokens(self) -> int:
        """Number of placeholder tokens of one image: P."""
        return count_image_tokens(self.encoder_spec, self.image_grid)


AutoConfig.register(ReasonerConfig.model_type, ReasonerConfig, exist_ok=True)
