"""What a recipe says about the reasoning model: where it starts from, and its stages."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from tinyemo.chat_templates import TemplateName
from tinyemo.config import Section

Trains = Literal["connector", "llm", "lora", "last_layers"]

PUBLISHED: dict[Trains, dict[str, Any]] = {
    "connector": {"global_batch_size": 256, "learning_rate": 1e-3, "gradient_checkpointing": False},
    "llm": {"global_batch_size": 128, "learning_rate": 2e-5, "gradient_checkpointing": True},
    "last_layers": {"global_batch_size": 128, "learning_rate": 2e-5, "gradient_checkpointing": True},
    "lora": {"global_batch_size": 128, "learning_rate": 2e-4, "gradient_checkpointing": True},
}
"""TinyLLaVA Factory's values (TinyEmo's own are not published): what a stage has where the recipe says nothing."""


class ReasonerSource(Section):
    """What the reasoning model is made of."""

    llm: str = "smollm2-135m"
    """An asset's name, an absolute folder, s3://bucket/folder, owner/name on the hub, or random:PRESET for seeded
    random weights of a family preset."""
    llm_revision: str | None = None
    """Commit of a hub repository, 40 hexadecimal digits."""
    vision_tower: str = "efficientnet-lite0"
    """efficientnet-lite0, an absolute folder, owner/name on the hub, or random:PRESET."""
    vision_revision: str | None = None
    """Commit of a hub repository, 40 hexadecimal digits."""
    connector: Literal["identity", "linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """Between patches and the language model's input embeddings."""


class LoraConfig(Section):
    """Low-rank adapters on every linear layer of the language model's blocks."""

    rank: PositiveInt = 128
    """Columns of an adapter."""
    alpha: PositiveFloat = 256
    """An adapter counts alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of an adapter's input. Above 0, losses depend on the number of workers."""


class StageConfig(Section):
    """One stage of training; the vision tower is frozen in each."""

    trains: Trains = "connector"
    """Beside the connector, which every stage trains: nothing, the whole language model, adapters on it, or its last
    layers."""
    num_layers: PositiveInt = 4
    """Last layers of the language model that `last_layers` trains."""
    lora: LoraConfig = LoraConfig()
    """Of `lora`."""
    datasets: tuple[str, ...] = ()
    """S3 addresses of instruct data sets; empty for those of records.datasets."""
    images: bool = True
    """Off: images and their tokens are left out and the connector is not trained, for a model of text alone to measure
    against."""
    template: TemplateName | None = None
    """Chat template; none for that of records.template."""
    global_batch_size: PositiveInt = 256
    """Records per optimizer step, over all ranks. Default: published, 256 for a connector, 128 for the rest."""
    micro_batch_size: PositiveInt = 8
    """Records of one forward pass on one rank."""
    num_epochs: PositiveFloat = 1
    """Passes over the data sets."""
    num_steps: PositiveInt | None = None
    """Optimizer steps instead of num_epochs."""
    learning_rate: PositiveFloat = 1e-3
    """Highest, after warm-up. Default: published, 1e-3 for a connector, 2e-4 for adapters, 2e-5 for the rest."""
    connector_learning_rate: PositiveFloat | None = None
    """Of the connector; none for learning_rate."""
    warm_up: float = Field(0.03, ge=0, lt=1)
    """Part of the steps before the highest rate; behind it the rate follows a half cosine down to 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay, per unit of learning rate."""
    gradient_checkpointing: bool = False
    """Activations of the language model's blocks are computed again in the backward pass. Default: off for a connector,
    on for the rest."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_published(cls, content: Any) -> Any:
        trains = content.get("trains", "connector") if isinstance(content, dict) else None
        return {**PUBLISHED[trains], **content} if trains in PUBLISHED else content

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per optimizer step on one rank; `stage_problems` says where they do not divide."""
        return self.global_batch_size // (self.micro_batch_size * world_size)

    def rate_factor(self, step: int, num_steps: int) -> float:
        """What of the highest rate step `step` of `num_steps` has: linear warm-up, then half a cosine; in [0, 1]."""
        num_warm_up = math.ceil(self.warm_up * num_steps)
        if step < num_warm_up:
            return (step + 1) / num_warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - num_warm_up) / max(1, num_steps - num_warm_up)))


class EvaluationConfig(Section):
    """Records that are held out of training."""

    validation: str = "validation"
    """Split that each epoch ends with; empty for none."""
    test: str = "test"
    """Split that is read once, when the last stage has ended; empty for none."""


def stage_problems(stages: dict[str, StageConfig], source: ReasonerSource, world_size: int) -> list[str]:
    """What the stages of a recipe say that cannot be, one line each."""
    found = []
    for name, stage in stages.items():
        per_step = stage.micro_batch_size * world_size
        if stage.global_batch_size % per_step:
            found.append(
                f"stages.{name}.global_batch_size: {stage.global_batch_size} does not divide by micro_batch_size x "
                f"workers.num_workers = {stage.micro_batch_size} x {world_size} = {per_step}"
            )
        if stage.trains == "connector" and not stage.images:
            found.append(
                f"stages.{name}.images: off leaves the connector, which this stage trains, nothing to learn from"
            )
        if stage.trains == "connector" and source.connector == "identity":
            found.append(f"stages.{name}.trains: the connector, and reasoner.connector identity has nothing to train")
    for field, revision in (("llm", source.llm_revision), ("vision", source.vision_revision)):
        if revision is not None and not (len(revision) == 40 and set(revision) <= set("0123456789abcdef")):
            found.append(f"reasoner.{field}_revision: {revision!r} is no commit, 40 hexadecimal digits")
    return found
