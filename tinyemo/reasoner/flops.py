"""Model FLOPs of a training step, frozen parts counted as what they cost.

A matrix of n numbers costs 2n a token forward; 2n backward for its input, where something before it is trained; 2n for
itself, where it is trained. Attention over a record of T tokens costs 4 T (heads x head width) a token and layer
forward, and twice that backward: with the usual 12 L H T, it is not halved for causality. What gradient checkpointing
computes again does not count, and the vocabulary is projected onto at answer tokens alone. The vision tower is never
trained: one forward pass for an image.

Layers are the unit of what gradients cross: they cross a layer where it, or anything before it, is trained. Inside the
lowest such layer this is an upper bound where its norms are frozen.

Shape letters: T tokens, P patches, L layers, H width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinyemo.reasoner.model import Reasoner, VisionTower


@dataclass(frozen=True)
class Work:
    """Amount of work that steps did, over all ranks.

    Attributes:
        tokens: image tokens included, padding not.
        answer_tokens: number of tokens that are learned.
        images: number of them.
        context: sum over records of T squared.
    """

    tokens: int = 0
    answer_tokens: int = 0
    images: int = 0
    context: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.answer_tokens + other.answer_tokens,
            self.images + other.images,
            self.context + other.context,
        )


@dataclass(frozen=True)
class Passes:
    """Numbers in weight matrices, by the passes that use them.

    Attributes:
        forward: all.
        inputs: those whose input takes a gradient.
        weights: those that take a gradient themselves.
    """

    forward: int
    inputs: int
    weights: int

    @property
    def flops(self) -> int:
        """Return the FLOPs of one token."""
        return 2 * (self.forward + self.inputs + self.weights)


@dataclass(frozen=True)
class FlopModel:
    """Model FLOPs of a model whose trained parameters are selected.

    Attributes:
        decoder: matrices of the language model's layers.
        head: its output matrix.
        connector: matrices of the connector.
        attention_width: sum over layers of heads x head width.
        attention_width_crossed: the part of it in layers that gradients cross.
        patches: P.
        tower: FLOPs of one image.
    """

    decoder: Passes
    head: Passes
    connector: Passes
    attention_width: int
    attention_width_crossed: int
    patches: int
    tower: int

    def of_training(self, work: Work) -> int:
        """Return the FLOPs of the forward and backward passes."""
        attention = 4 * work.context * (self.attention_width + 2 * self.attention_width_crossed)
        return (
            work.tokens * self.decoder.flops
            + work.answer_tokens * self.head.flops
            + work.images * (self.patches * self.connector.flops + self.tower)
            + attention
        )


def flop_model(model: Reasoner) -> FlopModel:
    """Build the FLOP model of a model with its trained parameters selected, on any device, before it is sharded."""
    layers = model.decoder_layers()
    is_connector_trained = _is_trained(model.connector)
    is_input_trained = is_connector_trained or _is_trained(model.get_input_embeddings())
    lowest = next((index for index, layer in enumerate(layers) if _is_trained(layer)), len(layers))
    first_crossed = 0 if is_input_trained else lowest
    crossed = layers[first_crossed:]
    head = model.get_output_embeddings()
    linears = list(_linears([model.connector]))
    widths = _attention_widths(model)
    return FlopModel(
        decoder=Passes(_numbers(layers), _numbers(crossed), _trained_numbers(layers)),
        head=Passes(_numbers([head]), _numbers([head]) if crossed else 0, _trained_numbers([head])),
        # Nothing before the connector is trained: its first matrix hands no gradient on.
        connector=Passes(
            _numbers(linears), _numbers(linears[1:]) if is_connector_trained else 0, _trained_numbers(linears)
        ),
        attention_width=sum(widths),
        attention_width_crossed=sum(widths[first_crossed:]),
        patches=model.config.num_image_tokens,
        tower=_tower_flops(model),
    )


def _linears(modules: Iterable[nn.Module]) -> Iterable[nn.Linear]:
    return (found for module in modules for found in module.modules() if isinstance(found, nn.Linear))


def _numbers(modules: Iterable[nn.Module]) -> int:
    return sum(linear.weight.numel() for linear in _linears(modules))


def _trained_numbers(modules: Iterable[nn.Module]) -> int:
    return sum(linear.weight.numel() for linear in _linears(modules) if linear.weight.requires_grad)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _attention_widths(model: Reasoner) -> list[int]:
    """Return heads x head width of each layer."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_query_heads", None) or [text.num_attention_heads] * text.num_hidden_layers
    return [count * head_dim for count in heads]


def _tower_flops(model: Reasoner) -> int:
    """Return the FLOPs of one image, which torch counts on the meta device without computing."""
    spec = model.config.encoder_spec
    with torch.device("meta"):
        tower = VisionTower.build(spec.kind, model.config.vision_config)
        pixels = torch.empty(1, 3, spec.preprocessing.crop, spec.preprocessing.crop)
    with FlopCounterMode(display=False) as counter:
        tower(pixels)
    return int(counter.get_total_flops())
