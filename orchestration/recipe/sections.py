"""Sections of a recipe: data, engine, optimizer, and a reasoning model's parts, stages and evaluation.

This module imports neither torch, pyarrow nor Ray, so a recipe is read at once.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tinyemo.chat_templates import TemplateName
from tinyemo.config import Section


class DataConfig(Section):
    """The features that a projector trains on, and their order."""

    dataset: str = Field("s3://tinyemo/datasets/emotion6", pattern=r"^s3://[^/]+/.+")
    """S3 address of a feature data set; reads its newest version, or one version with `/<version>` at the end."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the train split that is kept for validation, taken from each label by id hash; 0 for no validation."""
    validation_fold: NonNegativeInt = 0
    """Index of the share that is kept: fold k is the k-th part of the train split."""
    validation_split: str | None = None
    """Split of the data set to validate on. If set, fraction and fold have no effect."""
    leave_out: tuple[str, ...] = ()
    """Labels to leave out of training, validation and test, so that zero-shot accuracy can be measured on them."""
    pool_mib: PositiveFloat = 64.0
    """MiB of stored rows that are shuffled together; a split with fewer is permuted as a whole."""
    num_readers: PositiveInt = 2
    """Ray Data tasks that read at the same time."""


class RecordsConfig(Section):
    """The instruct records that a reasoning model trains on, their order and their form."""

    datasets: tuple[str, ...] = ()
    """S3 addresses of instruct data sets, or of one version each with `/<version>` at the end."""
    weights: tuple[PositiveFloat, ...] = ()
    """Share of each data set in an epoch, relative to the others; empty reads every record once per epoch."""
    split: str = "train"
    """Split to train on."""
    pool_mib: PositiveFloat = 64.0
    """MiB of stored records that are shuffled together, as whole row groups; one reading task fetches a pool."""
    tail: Literal["drop", "pad"] = "drop"
    """Last short batch of an epoch: drop it, or pad it with masked records, on every rank alike."""
    decode: Literal["reader", "worker"] = "worker"
    """Process that decodes images: reading tasks (pixels travel) or training workers (compressed files travel)."""
    image_size: PositiveInt = 224
    """Side of the square images, pixels; a run with a vision tower uses the tower's own preprocessing."""
    image_tokens: PositiveInt = 1
    """Placeholder ids per image; a run with a vision tower uses the tower's number of patches."""
    tokenizer: str = "smollm2-135m"
    """Asset name, or a folder with a Hugging Face tokenizer; empty to read images alone."""
    template: TemplateName = "plain"
    """Chat template: plain (which leaves out a caption's question), llama, phi or chatml."""
    end_token: str = "<|im_end|>"
    """Token that closes an answer; one of the tokenizer's tokens."""
    max_length: PositiveInt = 2048
    """Longest conversation, tokens, including those of the image; longer ones are cut."""
    num_readers: PositiveInt = 2
    """Ray Data tasks that read at the same time."""
    batches_ahead: PositiveInt = 2
    """Batches that a worker prepares before they are needed."""


class EngineConfig(Section):
    """How DeepSpeed shards the model and in which precision it computes."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """State sharded over the ranks: 0 none, 1 optimizer state, 2 also gradients, 3 also parameters. Use 0 for a
    projector: its state is a few megabytes, so sharding costs more than it saves."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type; auto takes bf16 on a GPU and fp32 on a CPU, and logs which."""
    bucket_elements: PositiveInt = 16_777_216
    """Elements of one communication bucket; DeepSpeed's default of 5e8 takes gigabytes on each rank."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Memory that holds optimizer state between steps: the device's, or the host's (needs ZeRO 1 to 3)."""


class OptimizerConfig(Section):
    """AdamW with a OneCycle schedule, as published (arXiv 2410.07062): the first rate is max_lr / 25 = 2e-5."""

    max_lr: PositiveFloat = 5e-4
    """Highest learning rate of the cycle."""
    pct_start: float = Field(0.005, gt=0, lt=1)
    """Share of the steps before the highest rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, per unit of learning rate."""
    gradient_clipping: NonNegativeFloat = 0.0
    """Largest L2 norm of the gradient over all parameters; a larger gradient is scaled down to it. 0: no clipping."""


Trains = Literal["connector", "llm", "lora", "last_layers"]

PUBLISHED: dict[Trains, dict[str, Any]] = {
    "connector": {"global_batch_size": 256, "learning_rate": 1e-3, "gradient_checkpointing": False},
    "llm": {"global_batch_size": 128, "learning_rate": 2e-5, "gradient_checkpointing": True},
    "last_layers": {"global_batch_size": 128, "learning_rate": 2e-5, "gradient_checkpointing": True},
    "lora": {"global_batch_size": 128, "learning_rate": 2e-4, "gradient_checkpointing": True},
}
"""Defaults of a stage by what it trains: the values of TinyLLaVA Factory, since TinyEmo's own are not published."""


class ReasonerSource(Section):
    """The parts of the reasoning model."""

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
    """Module that maps patch features to the language model's input embeddings."""
    image_grid: PositiveInt | None = None
    """Side of the square grid that patches are averaged to before the connector, so that an image takes image_grid
    squared tokens; not set keeps every patch."""
    export_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the finished model is stored."""


class LoraConfig(Section):
    """Low-rank adapters on every linear layer of the language model's blocks."""

    rank: PositiveInt = 128
    """Rank of each adapter."""
    alpha: PositiveFloat = 256
    """Scale: the output of an adapter is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on an adapter's input. Above 0, losses depend on the number of workers."""


class StageConfig(Section):
    """One stage of training. The vision tower is frozen in every stage."""

    trains: Trains = "connector"
    """Parameters trained beside the connector, which every stage trains: none (connector), the whole language model
    (llm), adapters on it (lora), or its last layers (last_layers)."""
    objective: Literal["answers", "align"] = "answers"
    """What the stage learns from: the next token of each answer (answers), or the mean embedding of each answer's
    tokens, which the mean of its image's tokens should be near and far from those of other records (align). align
    trains the connector without running the language model, so one step takes milliseconds."""
    num_layers: PositiveInt = 4
    """Number of last layers of the language model that `trains = "last_layers"` trains."""
    lora: LoraConfig = LoraConfig()
    """Adapters of `trains = "lora"`."""
    datasets: tuple[str, ...] = ()
    """S3 addresses of instruct data sets; empty takes records.datasets."""
    images: bool = True
    """Whether the model sees images. false leaves out images and their tokens and does not train the connector, for a
    text-only baseline."""
    template: TemplateName | None = None
    """Chat template; not set takes records.template."""
    global_batch_size: PositiveInt = 256
    """Records per optimizer step, over all ranks. Default: 256 for a connector, else 128."""
    micro_batch_size: PositiveInt = 8
    """Records per forward pass on one rank."""
    num_epochs: PositiveFloat = 1
    """Passes over the data sets."""
    num_steps: PositiveInt | None = None
    """Optimizer steps; if set, num_epochs has no effect."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate after warm-up. Default: 1e-3 for a connector, 2e-4 for adapters, else 2e-5."""
    connector_learning_rate: PositiveFloat | None = None
    """Learning rate of the connector; not set takes learning_rate."""
    warm_up: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the rate rises; after that it follows half a cosine down to 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, per unit of learning rate."""
    gradient_clipping: NonNegativeFloat = 0.0
    """Largest L2 norm of the gradient over all trained parameters; a larger gradient is scaled down to it. 0: no
    clipping."""
    gradient_checkpointing: bool = False
    """Whether the backward pass recomputes the activations of the language model's blocks, which saves memory. Default:
    false for a connector, else true."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_published(cls, content: Any) -> Any:
        trains = content.get("trains", "connector") if isinstance(content, dict) else None
        return {**PUBLISHED[trains], **content} if trains in PUBLISHED else content

    def rate_factor(self, step: int, num_steps: int) -> float:
        """Learning-rate multiplier at `step`: linear warm-up, then half a cosine; in [0, 1]."""
        num_warm_up = math.ceil(self.warm_up * num_steps)
        if step < num_warm_up:
            return (step + 1) / num_warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - num_warm_up) / max(1, num_steps - num_warm_up)))


class EvaluationConfig(Section):
    """Splits that are held out of training."""

    validation: str = "validation"
    """Split to measure after each epoch; empty for none."""
    test: str = "test"
    """Split to measure once, after the last stage; empty for none."""


def stage_problems(stages: dict[str, StageConfig], source: ReasonerSource, world_size: int) -> list[str]:
    """Return one line for each value of the stages that cannot work."""
    found = []
    for name, stage in stages.items():
        per_step = stage.micro_batch_size * world_size
        if stage.global_batch_size % per_step:
            found.append(
                f"stages.{name}.global_batch_size: {stage.global_batch_size} does not divide by micro_batch_size x "
                f"workers.num_workers = {stage.micro_batch_size} x {world_size} = {per_step}"
            )
        if stage.trains == "connector" and not stage.images:
            found.append(f"stages.{name}.images: false leaves the connector, which this stage trains, without input")
        if stage.objective == "align":
            if stage.trains != "connector" or not stage.images:
                found.append(f'stages.{name}.objective: align needs trains = "connector" and images = true')
            if stage.global_batch_size != per_step:
                found.append(
                    f"stages.{name}.micro_batch_size: align compares all records of a step, so global_batch_size "
                    f"{stage.global_batch_size} must be micro_batch_size x workers.num_workers, here {per_step}"
                )
        if stage.trains == "connector" and source.connector == "identity":
            found.append(f"stages.{name}.trains: connector, but reasoner.connector identity has no parameters")
    for field, revision in (("llm", source.llm_revision), ("vision", source.vision_revision)):
        if revision is not None and not (len(revision) == 40 and set(revision) <= set("0123456789abcdef")):
            found.append(f"reasoner.{field}_revision: {revision!r} is not a commit of 40 hexadecimal digits")
    return found
