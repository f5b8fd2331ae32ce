"""Reasoning models of a few thousand numbers: every kind of language model and of vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinyemo.conversation import IGNORED
from tinyemo.encoders import EncoderInfo, EncoderSpec, Preprocessing
from tinyemo.packing import TokenRecord
from tinyemo.reasoner.config import ReasonerConfig
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.openelm import OpenELMConfig
from tinyemo.reasoner.presets import vision_preset

LANGUAGE_MODELS = ("llama", "phi", "qwen2", "openelm")
TOWERS = ("clip", "siglip", "dinov2", "efficientnet-lite0")
VOCABULARY = 96
WIDTH = 32
IMAGE = -200

_TEXT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3}
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip


def text_config(kind: str) -> hf.PreTrainedConfig:
    """Three layers; weights wide enough that every part of the network shows in the logits."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.2}
    if kind == "openelm":
        # Heads differ from layer to layer: 2 and 1, 4 and 2, 4 and 2.
        return OpenELMConfig(
            vocab_size=VOCABULARY, model_dim=WIDTH, num_transformer_layers=3, head_dim=8, num_gqa_groups=2,
            ffn_dim_divisor=8, **ends,
        )  # fmt: skip
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "llama":
        return hf.LlamaConfig(**_TEXT, **heads, **ends)
    if kind == "qwen2":
        return hf.Qwen2Config(**_TEXT, **heads, **ends, tie_word_embeddings=True)
    return hf.PhiConfig(**_TEXT, **heads, **ends, resid_pdrop=0.0)


def vision_parts(kind: str) -> tuple[EncoderSpec, hf.PreTrainedConfig | None]:
    """A tower of 2 x 2 patches; EfficientNet-Lite0 comes in one size, 7 x 7."""
    if kind == "efficientnet-lite0":
        return vision_preset(kind)
    classes = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig, "dinov2": hf.Dinov2Config}
    config = classes[kind](**_VISION, **({"projection_dim": 24} if kind == "clip" else {}))
    preprocessing = Preprocessing(
        resize="exact", size=32, crop=32, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    info = EncoderInfo(name="tiny", revision="0", preprocessing=preprocessing.digest(), weights="random")
    spec = EncoderSpec(
        info=info,
        kind=kind,
        preprocessing=preprocessing,
        feature_width=24 if kind == "clip" else 32,
        patch_grid=(2, 2),
        patch_width=32,
    )
    return spec, config


def tiny_config(llm: str = "llama", tower: str = "clip", connector: str = "mlp2x_gelu") -> ReasonerConfig:
    spec, vision_config = vision_parts(tower)
    return ReasonerConfig(
        text_config=text_config(llm),
        vision_config=vision_config,
        vision=spec.model_dump(mode="json"),
        connector=connector,
        llm_weights="random",
        vision_weights="random",
    )


def tiny_reasoner(llm: str = "llama", tower: str = "clip", connector: str = "mlp2x_gelu", seed: int = 0) -> Reasoner:
    torch.manual_seed(seed)
    model = Reasoner(tiny_config(llm, tower, connector))
    with torch.no_grad():  # zero biases and unit norms would hide a part that is left out
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.startswith("vision_tower"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pixels(model: Reasoner, num_images: int, seed: int = 0) -> Tensor:
    side = model.config.encoder_spec.preprocessing.crop
    return torch.randn(num_images, 3, side, side, generator=torch.Generator().manual_seed(seed))


def prompt(model: Reasoner, before: list[int], after: list[int]) -> list[int]:
    """Ids with one image between `before` and `after`."""
    return [*before, *[IMAGE] * model.config.num_image_tokens, *after]


@dataclass(frozen=True)
class PaddedBatch:
    """One record per row, padded at its end.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64; the first column is IGNORED, for nothing stands before it.
        attention_mask: (B, T) bool.
        num_answer_tokens: labels that count.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    num_answer_tokens: int


def pad(records: Sequence[TokenRecord] | None) -> PaddedBatch:
    """Pad the records to one row each, in their order: what packed rows are compared with."""
    assert records is not None
    learned = [torch.cat([labels.new_full((min(1, len(labels)),), IGNORED), labels[1:]]) for _, labels in records]
    labels = pad_sequence(learned, batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(input_ids) for input_ids, _ in records])
    return PaddedBatch(
        input_ids=pad_sequence([input_ids for input_ids, _ in records], batch_first=True),
        labels=labels,
        attention_mask=torch.arange(labels.shape[1])[None, :] < lengths[:, None],
        num_answer_tokens=int((labels != IGNORED).sum()),
    )


def count_parameters(module: torch.nn.Module) -> int:
    """Count the elements of all parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
