"""Sections of a recipe about its data. They import neither pyarrow nor Ray, so a recipe is read at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

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
