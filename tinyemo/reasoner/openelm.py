"""OpenELM (arXiv 2404.14619): a causal language model whose layers widen with depth.

transformers has no class for it, and remote code stays off. Ours is written from the paper's facts, reads the published
configuration and weights under their own names, and leaves cache, masks and attention kernels to transformers.

Shape letters: B batch, T tokens, H model width, A query heads of a layer, K its key/value heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep

from tinyemo.errors import ConfigError


def round_to_multiple(value: float, divisor: int) -> int:
    """Return the multiple of `divisor` nearest to `value`, at least one, and never more than 10 % below `value`."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * value else nearest + divisor


def scale_evenly(first: float, last: float, num_layers: int) -> list[float]:
    """Return one multiplier per layer, evenly spaced from `first` to `last`, rounded to two decimals."""
    if num_layers == 1:
        return [round(first, 2)]
    return [round(first + (last - first) * layer / (num_layers - 1), 2) for layer in range(num_layers)]


class OpenELMConfig(PreTrainedConfig):
    """Fields of the published config.json; layer-wise scaling fills missing lists of one value per layer."""

    model_type = "openelm"
    attribute_map = {  # noqa: RUF012 - transformers declares it so
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32_000
    model_dim: int = 1280
    """H."""
    num_transformer_layers: int = 16
    head_dim: int = 64
    """d."""
    num_gqa_groups: int = 4
    """Query heads to one key/value head."""
    qkv_multipliers: list[float] | None = None
    """Attention width as a multiple of H, in the first and last layer; None is 0.5 and 1.0."""
    ffn_multipliers: list[float] | None = None
    """FFN width as a multiple of H, one for each layer or first and last; None is 0.5 and 4.0."""
    ffn_dim_divisor: int = 256
    num_query_heads: list[int] | None = None
    """A of each layer; None is scaled."""
    num_kv_heads: list[int] | None = None
    """K of each layer; None is scaled."""
    max_context_length: int = 2048
    rope_freq_constant: int = 10_000
    rope_max_length: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    share_input_output_layers: bool = True
    tie_word_embeddings: bool = True
    normalize_qk_projections: bool = True
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        layers = self.num_transformer_layers
        first, last = self.qkv_multipliers or (0.5, 1.0)
        widths = [
            round_to_multiple(self.model_dim * scale, self.head_dim * self.num_gqa_groups)
            for scale in scale_evenly(first, last, layers)
        ]
        if self.num_query_heads is None:
            self.num_query_heads = [width // self.head_dim for width in widths]
        if self.num_kv_heads is None:
            self.num_kv_heads = [heads // self.num_gqa_groups for heads in self.num_query_heads]
        multipliers = self.ffn_multipliers or [0.5, 4.0]
        if len(multipliers) == 2 and layers != 2:
            multipliers = scale_evenly(multipliers[0], multipliers[1], layers)
        self.ffn_multipliers = multipliers
        for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
            if len(getattr(self, name)) != layers:
                raise ConfigError(f"OpenELM's {name} has {len(getattr(self, name))} values for {layers} layers")
        expected = {
            "share_input_output_layers": True, "normalize_qk_projections": True, "ffn_with_glu": True,
            "activation_fn_name": "swish", "normalization_layer_name": "rms_norm",
        }  # fmt: skip
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ConfigError(f"OpenELM's {name} is {getattr(self, name)!r}: ours knows {value!r} alone")
        # Multi-head code of transformers asks for one number: the widest layer's.
        self.num_attention_heads = max(self.num_query_heads)
        super().__post_init__(**kwargs)

    @property
    def ffn_dims(self) -> list[int]:
        """Return the FFN width of each layer."""
        assert self.ffn_multipliers is not None
        return [round_to_multiple(scale * self.model_dim, self.ffn_dim_divisor) for scale in self.ffn_multipliers]


class OpenELMRMSNorm(nn.Module):
    """RMS norm: x / rms(x), computed in float32, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, values: Tensor) -> Tensor:
        wide = values.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(values.dtype) * self.weight


class OpenELMRotaryEmbedding(nn.Module):
    """Rotary angles, computed in float32 at each call: no buffer that a checkpoint or a cast could spoil."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.base = float(config.rope_freq_constant)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, 1, T, d) float32 cosines and sines of (B, T) int64 positions."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=position_ids.device)
        angles = position_ids[:, None, :, None].float() * self.base ** (-steps / self.head_dim)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(values: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Apply the rotary embedding to (B, heads, T, d), in float32; dimension i pairs with i + d/2."""
    wide = values.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cosines + torch.cat((-right, left), dim=-1) * sines).to(values.dtype)


def attend_eagerly(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention step by step, adding `attention_mask` to the scores; return (B, T, A, d) and the weights."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OpenELMAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        assert config.num_query_heads is not None
        assert config.num_kv_heads is not None
        self.config = config
        self.layer_idx = layer
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.model_dim, width, bias=False)
        self.q_norm = OpenELMRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = OpenELMRMSNorm(self.head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any | None,
        **kwargs: Any,
    ) -> Tensor:
        batch, tokens, _ = hidden.shape
        heads = self.qkv_proj(hidden).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        query, key = rotate(self.q_norm(query), *rotary), rotate(self.k_norm(key), *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend_eagerly)
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        outputs: Tensor = self.out_proj(mixed.reshape(batch, tokens, -1))
        return outputs


class OpenELMFeedForward(nn.Module):
    """Feed-forward layer: swish(gate) * value, from one projection, and a projection back."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        width = config.ffn_dims[layer]
        self.proj_1 = nn.Linear(config.model_dim, 2 * width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, value = self.proj_1(hidden).chunk(2, dim=-1)
        outputs: Tensor = self.proj_2(F.silu(gate) * value)
        return outputs


class OpenELMDecoderLayer(GradientCheckpointingLayer):
    """Attention and FFN, each after a norm and beside a residual."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer)
        self.ffn = OpenELMFeedForward(config, layer)
        self.attn_norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)
        self.ffn_norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)

    def forward(self, hidden: Tensor, **attention_options: Any) -> Tensor:
        hidden = hidden + self.attn(self.attn_norm(hidden), **attention_options)
        outputs: Tensor = hidden + self.ffn(self.ffn_norm(hidden))
        return outputs


class OpenELMPreTrainedModel(PreTrainedModel):
    """Settings that transformers needs for both classes below."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenELMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class OpenELMModel(OpenELMPreTrainedModel):
    """Token embeddings, layers and the last norm."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim, config.pad_token_id)
        layers = range(config.num_transformer_layers)
        self.layers = nn.ModuleList([OpenELMDecoderLayer(config, layer) for layer in layers])
        self.norm = OpenELMRMSNorm(config.model_dim, config.rms_norm_eps)
        self.rotary_emb = OpenELMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.token_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states after the last norm, (B, T, H); packed rows are found as in transformers' models."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                rotary=rotary,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """OpenELM with its output layer, which is its token embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, vocabulary) of the next token, or those that `logits_to_keep` names."""
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=outputs.past_key_values)


# Built from here alone: with this, transformers resolves `openelm` without any code of a model's folder.
AutoConfig.register(OpenELMConfig.model_type, OpenELMConfig, exist_ok=True)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
