"""The family: one projector size per language model.

Totals count the language model and the whole of CLIP ViT-L/14, text tower included, as the paper does (arXiv
2410.07062). Averages are its zero-shot averages as printed; recomputed from its own table, two of the four differ
(57.62 for 57.87 and 55.73 for 56.13).
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyemo.errors import ConfigError

CLIP_PARAMETERS = 427_616_513
"""CLIP ViT-L/14 with its text tower."""


@dataclass(frozen=True)
class ModelSize:
    """One member of the family."""

    name: str
    """Name in recipes."""
    llm: str
    """The language model's public name."""
    hidden_size: int
    """Width of its input embeddings, which the projector maps into."""
    encoder_width: int
    """Width of the pooled image features."""
    total_parameters: int
    """Language model and CLIP, without the projector."""
    published_average: float | None
    """Zero-shot top-1 average in the paper, percent; None where the paper has no such size."""
    asset: str | None
    """Asset of the catalogue that holds its real embedding table; None where only a local folder can."""


FAMILY: dict[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize(
            "smollm2-135m",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            hidden_size=576,
            encoder_width=768,
            total_parameters=134_515_008 + CLIP_PARAMETERS,
            published_average=None,
            asset="smollm2-135m",
        ),
        ModelSize(
            "tinyemo-700m",
            "apple/OpenELM-270M-Instruct",
            hidden_size=1280,
            encoder_width=768,
            total_parameters=271_527_168 + CLIP_PARAMETERS,
            published_average=57.87,
            asset=None,
        ),
        ModelSize(
            "tinyemo-880m",
            "apple/OpenELM-450M-Instruct",
            hidden_size=1536,
            encoder_width=768,
            total_parameters=457_179_136 + CLIP_PARAMETERS,
            published_average=55.24,
            asset=None,
        ),
        ModelSize(
            "tinyemo-1.5b",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            hidden_size=2048,
            encoder_width=768,
            total_parameters=1_100_048_384 + CLIP_PARAMETERS,
            published_average=56.13,
            asset=None,
        ),
        ModelSize(
            "tinyemo-3.2b",
            "microsoft/phi-2",
            hidden_size=2560,
            encoder_width=768,
            total_parameters=2_779_683_840 + CLIP_PARAMETERS,
            published_average=56.28,
            asset=None,
        ),
    )
}
"""By name, smallest first."""


def find_size(name: str) -> ModelSize:
    """Return the member of that name.

    Raises:
        ConfigError: the family has none.
    """
    if name not in FAMILY:
        raise ConfigError(f"unknown model size {name!r}: it must be one of {', '.join(FAMILY)}")
    return FAMILY[name]
