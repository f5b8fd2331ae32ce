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
    llm_parameters: int
    """Parameters of the language model."""
    published_average: float | None
    """Zero-shot top-1 average in the paper, percent; None where the paper has no such size."""
    asset: str | None = None
    """Asset of the catalogue that holds its real embedding table; None where only a local folder can."""

    @property
    def total_parameters(self) -> int:
        """Parameters of language model and CLIP, without the projector."""
        return self.llm_parameters + CLIP_PARAMETERS


FAMILY: dict[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 576, 134_515_008, None, "smollm2-135m"),
        ModelSize("tinyemo-700m", "apple/OpenELM-270M-Instruct", 1280, 271_527_168, 57.87),
        ModelSize("tinyemo-880m", "apple/OpenELM-450M-Instruct", 1536, 457_179_136, 55.24),
        ModelSize("tinyemo-1.5b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 2048, 1_100_048_384, 56.13),
        ModelSize("tinyemo-3.2b", "microsoft/phi-2", 2560, 2_779_683_840, 56.28),
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
