"""Selection of the parameters that a stage trains: the connector, and none, all, adapters or last layers of the LLM.

The adapters are LoRA (arXiv 2106.09685) through peft: each linear layer of the language model but its output layer
gets one, y = W x + alpha / rank * B A x, with B zero at first.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from tinyemo.errors import ConfigError
from tinyemo.reasoner.model import Reasoner

Trains = Literal["connector", "llm", "lora", "last_layers"]

ADAPTER = "default"
"""peft's name of the only adapter."""


def select_trained(
    model: Reasoner,
    trains: Trains,
    *,
    num_layers: int = 4,
    rank: int = 128,
    alpha: float = 256,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Enable gradients for the parameters that a stage trains and no others; `lora` inserts adapters.

    Args:
        model: changed in place.
        trains: what is trained beside the connector.
        num_layers: number of layers that `last_layers` trains, counted from the output, without last norm and output.
        rank: rank of an adapter, > 0.
        alpha: an adapter counts alpha / rank times.
        dropout: dropout on an adapter's input, in [0, 1).
        seed: seed of the adapters' weights.

    Raises:
        ConfigError: unknown `trains`, more layers than there are, or adapters that are in already.
    """
    if trains not in get_args(Trains):
        raise ConfigError(f"unknown stage {trains!r}: it must train one of {', '.join(get_args(Trains))}")
    model.requires_grad_(requires_grad=False)
    model.connector.requires_grad_(requires_grad=True)
    if trains == "llm":
        model.language_model.requires_grad_(requires_grad=True)
    elif trains == "last_layers":
        layers = model.decoder_layers()
        if not 0 < num_layers <= len(layers):
            raise ConfigError(f"last_layers of {num_layers} layers: the language model has {len(layers)}")
        for layer in layers[-num_layers:]:
            layer.requires_grad_(requires_grad=True)
    elif trains == "lora":
        _insert_adapters(model, rank=rank, alpha=alpha, dropout=dropout, seed=seed)


def adapted_layers(model: Reasoner) -> list[str]:
    """Return the names, inside the language model, of the linear layers that get adapters."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def _insert_adapters(model: Reasoner, *, rank: int, alpha: float, dropout: float, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    if has_adapters(model):
        raise ConfigError("the language model has adapters already: merge them before a stage puts in new ones")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=adapted_layers(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.language_model, adapter_name=ADAPTER)
    # A new layer is in training mode, whatever the model is in.
    model.train(model.training)


def has_adapters(model: Reasoner) -> bool:
    """Return True if the language model's layers have adapters."""
    return bool(_adapters(model))


def _adapters(model: Reasoner) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (name, module) for name, module in model.language_model.named_modules() if isinstance(module, BaseTunerLayer)
    ]


def merge_adapters(model: Reasoner) -> None:
    """Merge the adapters into the weights and remove them, in place.

    One matrix at a time, so memory rises by one matrix only. Nothing happens to a model without adapters.
    """
    for name, adapter in _adapters(model):
        adapter.merge()
        model.language_model.set_submodule(name, adapter.get_base_layer())
    # peft leaves its own configuration behind, with which transformers would save adapters in place of a model.
    model.language_model.__dict__.pop("peft_config", None)


def parameter_groups(
    model: Reasoner, *, learning_rate: float, connector_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: the connector's, at their own rate, and the others.

    Args:
        model: after `select_trained`.
        learning_rate: learning rate of the language model.
        connector_learning_rate: None is `learning_rate`.

    Raises:
        ConfigError: nothing is trained, as with an identity connector alone.
    """
    connector = [parameter for parameter in model.connector.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in model.language_model.parameters() if parameter.requires_grad]
    if not connector and not rest:
        raise ConfigError("nothing is trained: an identity connector has no parameters")
    rate = learning_rate if connector_learning_rate is None else connector_learning_rate
    groups = [
        {"name": "connector", "params": connector, "lr": rate},
        {"name": "language_model", "params": rest, "lr": learning_rate},
    ]
    return [group for group in groups if group["params"]]
