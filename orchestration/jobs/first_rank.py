"""A model is read by one rank, however many there are.

DeepSpeed sends every parameter from the first rank when an engine starts, at ZeRO 3 one by one into the shards. So the
others need a model of the same shape and nothing in it, and a machine that holds several ranks never holds as many
copies: memory that was set aside and not yet written to takes no room.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from transformers.initialization import no_init_weights

from orchestration.jobs.stage_weights import prepare_stage
from orchestration.recipe.stage_config import StageConfig
from tinyemo.errors import TinyEmoError
from tinyemo.reasoner.model import Reasoner

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""


def give_freed_memory_back(*, at_once: bool) -> None:
    """Set whether a tensor of a mebibyte or more that this process frees goes back to the machine at once.

    glibc keeps freed blocks of up to 32 MiB for later, so that a rank which takes in a model parameter by parameter and
    keeps its shard of each would end up holding the whole; off are the rules that glibc itself arrives at.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(_MMAP_THRESHOLD, 2**20 if at_once else 32 * 2**20)
    mallopt(_TRIM_THRESHOLD, 2**17 if at_once else 64 * 2**20)


def build_on_first_rank(build: Callable[[], Reasoner], stage: StageConfig, seed: int) -> Reasoner:
    """Return the model of `build` on the first rank; elsewhere a model of its shape and buffers, without weights.

    Args:
        build: the model as the stage begins with it, see `build_for_stage`; called on the first rank alone.
        stage: that it is prepared for.
        seed: of the stage's adapters.

    Raises:
        TinyEmoError: what `build` raises, on every rank.
    """
    model: Reasoner | None = None
    sent: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            model = build()
            sent = [(model.config, dict(model.named_buffers()), _shapes(model))]
        except TinyEmoError as error:
            sent = [error]
    torch.distributed.broadcast_object_list(sent)
    if isinstance(sent[0], TinyEmoError):
        raise sent[0]
    if model is not None:
        return model
    config, buffers, shapes = sent[0]
    with no_init_weights():
        model = Reasoner._from_config(config, dtype=torch.float32)
    assert isinstance(model, Reasoner)
    model.tie_weights()
    prepare_stage(model, stage, seed)
    assert _shapes(model) == shapes, "a model built from its configuration has the parameters of the first rank's"
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def _shapes(model: Reasoner) -> list[tuple[str, torch.Size, bool]]:
    return [(name, parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()]
