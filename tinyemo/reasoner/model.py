"""The reasoning model: images and text in, text out.

Shape letters: B rows, T tokens, N images, S side of an image in pixels, P patches of an image, D patch width, H width
of the language model, V vocabulary, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from tinyemo.conversation import IGNORED
from tinyemo.encoders import EFFICIENTNET_LITE0
from tinyemo.errors import DataError
from tinyemo.reasoner.config import ReasonerConfig
from tinyemo.vision import FEW_IMAGES_BATCH, Features, build_network, run_network


class Connector(nn.Module):
    """Layers that map (N, P, D) float to (N, P, H) float, each patch by itself.

    Args:
        kind: one of CONNECTORS.
        patch_width: D.
        hidden_size: H.
        patch_grid: rows and columns of the patches.
        image_grid: G; patches are averaged to a grid of G x G first, so that the result is (N, G * G, H). None keeps
            every patch.
    """

    def __init__(
        self,
        kind: str,
        patch_width: int,
        hidden_size: int,
        *,
        patch_grid: tuple[int, int] = (1, 1),
        image_grid: int | None = None,
    ) -> None:
        super().__init__()
        self.patch_grid, self.image_grid = patch_grid, image_grid
        layers: list[nn.Module] = []
        if kind != "identity":
            layers.append(nn.Linear(patch_width, hidden_size))
        if kind == "mlp2x_gelu":
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        if self.image_grid is not None:
            grid = patches.transpose(1, 2).reshape(len(patches), -1, *self.patch_grid)
            patches = F.adaptive_avg_pool2d(grid, self.image_grid).flatten(2).transpose(1, 2)
        embeds: Tensor = self.layers(patches)
        return embeds


class VisionTower(nn.Module):
    """An encoder without gradients that always stays in evaluation mode."""

    def __init__(self, kind: str, network: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.network = network
        self.requires_grad_(requires_grad=False)
        self.eval()

    @classmethod
    def build(cls, kind: str, config: Any | None) -> VisionTower:
        """Build a tower with random weights; `config` is transformers' own, None for EfficientNet-Lite0."""
        return cls(kind, build_network(kind, config))

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in evaluation mode: batch norm and dropout of a frozen tower must not change."""
        super().train(mode=False)
        return self

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Features:
        """Return pooled (N, d) and patch (N, P, D) features of (N, 3, S, S) normalised pixels, in the tower's dtype."""
        pixel_values = pixel_values.to(next(self.network.parameters()).dtype)
        on_cpu = pixel_values.device.type == "cpu" and pixel_values.dtype == torch.float32
        if self.kind != EFFICIENTNET_LITE0 or not on_cpu:
            return run_network(self.kind, self.network, pixel_values)
        # Small batches in channels-last layout stay in a CPU's cache: three times as fast (docs/measurements.md).
        parts = torch.split(pixel_values.contiguous(memory_format=torch.channels_last), FEW_IMAGES_BATCH)
        found = [run_network(self.kind, self.network, part) for part in parts]
        return Features(torch.cat([part.pooled for part in found]), torch.cat([part.patches for part in found]))


@dataclass
class ReasonerOutput(CausalLMOutputWithPast):
    """Output of the model: logits and cache without labels, the loss alone with labels.

    Attributes:
        loss: () float32, nats: `loss_sum` over the number of answer tokens, or over `num_items_in_batch`.
        loss_sum: () float32, nats, over all answer tokens.
        num_answer_tokens: () int64.
        token_nats: (A,) float32, one for each answer token in reading order.
        pairs: with `returns_pairs` only, (N, H) float of images and (N, H) float of answers.
    """

    loss_sum: Tensor | None = None
    num_answer_tokens: Tensor | None = None
    token_nats: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None


def find_answer_positions(labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Return (B, T) bool: positions whose next token is learned; never the last position of a packed record.

    Args:
        labels: (B, T) int64, IGNORED where nothing is learned.
        position_ids: (B, T) int64; 0 where a record begins.
    """
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != IGNORED
    if position_ids is not None:
        positions[:, :-1] &= position_ids[:, 1:] != 0
    return positions


def measure_answers(logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Return the loss of each learned token, (A,) float32, nats.

    Args:
        logits: (A, V) float, at `positions` only.
        labels: (B, T) int64.
        positions: (B, T) bool, of `find_answer_positions`.
    """
    targets = labels.roll(-1, dims=1)[positions]
    return F.cross_entropy(logits.float(), targets, reduction="none")


class Reasoner(PreTrainedModel, GenerationMixin):
    """Vision tower, connector and causal language model; the tower is always frozen."""

    config_class = ReasonerConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers declares it so
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: ReasonerConfig,
        *,
        language_model: PreTrainedModel | None = None,
        vision_tower: VisionTower | None = None,
    ) -> None:
        """Draw random weights, but take given parts as they are, without a copy."""
        super().__init__(config)
        spec = config.encoder_spec
        for part in (language_model, vision_tower):
            for module in part.modules() if part is not None else ():
                module._is_hf_initialized = True  # or post_init would draw its weights anew
        self.vision_tower = vision_tower or VisionTower.build(spec.kind, config.vision_config)
        self.connector = Connector(
            config.connector,
            spec.patch_width,
            config.get_text_config().hidden_size,
            patch_grid=spec.patch_grid,
            image_grid=config.image_grid,
        )
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.generation_config = GenerationConfig.from_dict(self.language_model.generation_config.to_dict())
        self.post_init()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reasoner:
        """Move and cast, as DeepSpeed does for bf16, but keep float32 buffers that no file holds in float32.

        These are rotary frequencies. Rounded to bf16 they turn the token at position 500 by more than a radian too far,
        and an export, which computes them anew, would no longer be the model that was trained.
        """
        kept = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.dtype == torch.float32
        }
        super()._apply(fn, recurse=recurse)
        for (module, name), buffer in kept.items():
            cast = module.get_buffer(name)
            if cast.dtype != torch.float32:
                setattr(module, name, buffer.to(cast.device))
        return self

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def get_decoder(self) -> nn.Module:
        decoder: nn.Module = self.language_model.get_decoder()
        return decoder

    def decoder_layers(self) -> list[nn.Module]:
        """Return the language model's layers, first to last."""
        return list(self.language_model.get_decoder().layers)

    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """Embed (N, 3, S, S) normalised pixels as (N, P, H); gradients reach the connector, never the tower."""
        patches = self.vision_tower(pixel_values).patches
        embeds: Tensor = self.connector(patches.to(self.get_input_embeddings().weight.dtype))
        return embeds

    def merge_images(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Return (B, T, H) float embeddings of the tokens, with those of the images in place of placeholders.

        Args:
            input_ids: (B, T) int64; an image is a run of P times `image_token_id`.
            pixel_values: (N, 3, S, S) float, the images in reading order; None: there are none.

        Raises:
            DataError: there are not N * P placeholders.
        """
        places = input_ids == self.config.image_token_id
        num_images = 0 if pixel_values is None else len(pixel_values)
        expected, found = num_images * self.config.num_image_tokens, int(places.sum())
        if expected != found:
            raise DataError(
                f"{found} image placeholders in input_ids, but {num_images} images of "
                f"{self.config.num_image_tokens} patches need {expected}"
            )
        embeds: Tensor = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if num_images:
            assert pixel_values is not None
            images = self.image_embeds(pixel_values).to(embeds.dtype)
            return embeds.masked_scatter(places[..., None], images)
        if self.training and self.connector_is_trained():
            # Every rank takes part in every parameter's collectives, also with a batch that has no image.
            spec = self.config.encoder_spec
            rows, columns = spec.patch_grid
            embeds = embeds + 0 * self.connector(embeds.new_zeros(1, rows * columns, spec.patch_width)).sum()
        return embeds

    def mean_embeds(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, pixel_values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mean token of each image and of each answer in packed rows of one image each, (N, H) float twice.

        Args:
            input_ids: (1, T) int64.
            labels: (1, T) int64, IGNORED outside of answers.
            position_ids: (1, T) int64; 0 where a record begins.
            pixel_values: (N, 3, S, S) float, normalised, in reading order.
        """
        images = self.image_embeds(pixel_values).mean(1)
        is_answer = labels[0] != IGNORED
        records = ((position_ids[0] == 0).cumsum(0) - 1)[is_answer]
        words: Tensor = self.get_input_embeddings()(input_ids[0][is_answer])
        sums = words.new_zeros(images.shape).index_add(0, records, words)
        return images, sums / torch.bincount(records, minlength=len(images)).clamp(min=1)[:, None]

    def connector_is_trained(self) -> bool:
        """Return True if any parameter of the connector takes gradients."""
        return any(parameter.requires_grad for parameter in self.connector.parameters())

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        returns_pairs: bool = False,
        **kwargs: Any,
    ) -> ReasonerOutput:
        """Compute logits, or the loss where there are labels.

        Args:
            input_ids: (B, T) int64.
            pixel_values: (N, 3, S, S) float, normalised as `config.vision` says, in reading order.
            attention_mask: (B, T), 0 where padding stands; None for packed rows, whose records are told apart by
                `position_ids`.
            position_ids: (B, T) int64; starts at 0 in each packed record.
            past_key_values: transformers' cache.
            inputs_embeds: (B, T, H) float in place of `input_ids` and `pixel_values`.
            labels: (B, T) int64, IGNORED where nothing is learned. The vocabulary is projected onto at answers alone.
            use_cache: None is no: a cache would also hide the boundaries of packed records.
            logits_to_keep: see transformers; used without labels only.
            num_items_in_batch: divides `loss_sum` in place of the number of answer tokens.
            returns_pairs: return `mean_embeds` alone, without running the language model.
        """
        if returns_pairs:
            assert input_ids is not None
            assert labels is not None
            assert position_ids is not None
            assert pixel_values is not None
            return ReasonerOutput(pairs=self.mean_embeds(input_ids, labels, position_ids, pixel_values))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.merge_images(input_ids, pixel_values)
        positions = None
        if labels is not None:
            positions = find_answer_positions(labels, position_ids if attention_mask is None else None)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache) and labels is None,
            logits_to_keep=logits_to_keep if positions is None else positions,
            **kwargs,
        )
        if labels is None or positions is None:
            return ReasonerOutput(logits=outputs.logits, past_key_values=outputs.past_key_values)
        nats = measure_answers(outputs.logits, labels, positions)
        loss_sum, num_answer_tokens = nats.sum(), positions.sum()
        divisor = num_answer_tokens if num_items_in_batch is None else num_items_in_batch
        return ReasonerOutput(
            loss=loss_sum / divisor, loss_sum=loss_sum, num_answer_tokens=num_answer_tokens, token_nats=nats
        )
