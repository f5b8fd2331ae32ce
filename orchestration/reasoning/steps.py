"""One optimizer step of the reasoning model, and a pass that only measures: batches of records become tensors.

Shape letters: B records of a rank, T tokens of a packed row, S side of an image in pixels, A answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestration.services.engine import Engine, accumulate, state_bytes
from orchestration.streaming.record_batches import RecordBatch
from tinyemo.conversation import IGNORED
from tinyemo.encoders import Preprocessing
from tinyemo.errors import TrainingError
from tinyemo.packing import micro_batches, pack
from tinyemo.reasoner.flops import Work


@dataclass(frozen=True)
class MicroBatch:
    """The records of one forward pass, packed into one row; position_ids start anew at each.

    Attributes:
        ids: of the records.
        input_ids: (1, T) int64.
        labels: (1, T) int64, -100 where nothing is learned.
        position_ids: (1, T) int64.
        pixel_values: (B, 3, S, S) float, normalised; None where the rows have no image tokens.
    """

    ids: list[str]
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    work: Work

    def forward(self, engine: Engine) -> Tensor:
        """(A,) float32 nats of each answer token, in reading order."""
        nats: Tensor = engine(
            input_ids=self.input_ids,
            labels=self.labels,
            position_ids=self.position_ids,
            pixel_values=self.pixel_values,
        ).token_nats
        return nats


class Inputs:
    """Makes micro-batches out of what the stream hands out."""

    def __init__(
        self, preprocessing: Preprocessing, device: torch.device, image_token_id: int, *, has_images: bool = True
    ) -> None:
        self.device = device
        self.has_images = has_images
        self.image_token_id = image_token_id
        self._preprocessing = preprocessing

    def micro_batches(self, batch: RecordBatch, size: int) -> list[MicroBatch]:
        """The batch in parts of `size` records."""
        return [self.micro_batch(batch.part(rows)) for rows in micro_batches(len(batch.ids), size)]

    def micro_batch(
        self, batch: RecordBatch, *, images: Tensor | None = None, has_images: bool | None = None
    ) -> MicroBatch:
        """All records of the batch in one forward pass.

        Args:
            batch: of a rank, or a part of it.
            images: (B, S, S, 3) uint8 in place of the records' own.
            has_images: off leaves out images and their tokens; None as the object was made.
        """
        assert batch.tokens is not None
        has_images = self.has_images if has_images is None else has_images
        pairs = batch.tokens
        if not has_images:
            kept = [ids != self.image_token_id for ids, _ in pairs]
            pairs = [(ids[k], labels[k]) for (ids, labels), k in zip(pairs, kept, strict=True)]
        packed = pack(pairs)
        pixels = batch.pixel_values if images is None else images
        lengths = [len(ids) for ids, _ in pairs]
        return MicroBatch(
            ids=batch.ids,
            input_ids=packed.input_ids.to(self.device),
            labels=packed.labels.to(self.device),
            position_ids=packed.position_ids.to(self.device),
            pixel_values=normalise(pixels.to(self.device), self._preprocessing) if has_images else None,
            work=Work(
                tokens=sum(lengths),
                answer_tokens=packed.num_answer_tokens,
                images=len(pairs) if has_images else 0,
                context=sum(length**2 for length in lengths),
            ),
        )


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, 3, S, S) float, as the tower takes them, of (B, S, S, 3) uint8."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device)
    std = torch.tensor(preprocessing.std, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def summed(values: list[float], device: torch.device) -> list[float]:
    """The sums over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return [float(value) for value in tensor]


def take_step(
    engine: Engine, micro_batches: list[MicroBatch], step: int, seed: int, *, counts_memory: bool = False
) -> tuple[dict[str, float], Work]:
    """One optimizer step over the micro-batches of all ranks: its figures and its work.

    The loss is the sum of nats over all answer tokens of the step divided by their number, whoever computed them, so
    that curves do not depend on the number of workers or on how long the answers of a micro-batch are.

    Args:
        engine: of the stage.
        micro_batches: of this rank.
        step: counted from 0.
        seed: of dropout, with the step and the rank.
        counts_memory: adds the bytes that this rank holds of parameters, gradients and optimizer state to the figures.

    Raises:
        TrainingError: the loss is not finite, on every rank at the same step, with the records of this rank.
    """
    device, world_size = micro_batches[0].input_ids.device, torch.distributed.get_world_size()
    work = sum((part.work for part in micro_batches), Work())
    counts = summed([work.tokens, work.answer_tokens, work.images, work.context], device)
    work = Work(*(int(count) for count in counts))
    ids = [name for part in micro_batches for name in part.ids]
    if not work.answer_tokens:
        raise TrainingError(f"step {step} has no answer token; this rank's records: {', '.join(ids)}")
    rate = max(engine.get_lr())
    torch.manual_seed((seed << 40) + step * world_size + torch.distributed.get_rank())
    nats, losses, held = 0.0, [], {}

    def check() -> None:
        (total,) = summed([nats], device)
        losses.append(total / work.answer_tokens)
        if not math.isfinite(total):
            raise TrainingError(
                f"train/loss is {losses[0]} at step {step}; this rank's records: {', '.join(ids)}. "
                "Lower the stage's learning_rate or look at these records"
            )
        if counts_memory:
            held.update({f"memory/{kind}_bytes": float(count) for kind, count in state_bytes(engine).items()})

    for place, part in enumerate(micro_batches):
        loss = part.forward(engine).sum()
        nats += float(loss.detach())
        is_last = place == len(micro_batches) - 1
        accumulate(engine, loss * (world_size / work.answer_tokens), is_last=is_last, before_step=check)
    point = {"train/loss": losses[0], "train/learning_rate": rate, "train/answer_tokens": float(work.answer_tokens)}
    point["train/tokens"] = float(work.tokens)
    return {"step": step, **point, **held}, work


@torch.no_grad()
def mean_loss(engine: Engine, inputs: Inputs, stream: Iterable[RecordBatch], micro_batch_size: int) -> float:
    """Nats a token over the answers of every record of a stream, on all ranks."""
    sums = [0.0, 0.0]
    engine.eval()
    for batch in stream:
        for part in inputs.micro_batches(batch, micro_batch_size):
            sums[0] += float(part.forward(engine).sum())
            sums[1] += part.work.answer_tokens
    engine.train()
    nats, num_tokens = summed(sums, inputs.device)
    return nats / num_tokens


def losses_by_record(part: MicroBatch, nats: Tensor) -> list[tuple[int, float]]:
    """(answer tokens, nats of the answer) of each record of a micro-batch.

    Args:
        part: the micro-batch.
        nats: (A,) as `MicroBatch.forward` gives them.
    """
    position_ids, labels = part.position_ids[0], part.labels[0]
    learned = (labels != IGNORED) & (position_ids != 0)
    owner = ((position_ids == 0).cumsum(0) - 1)[learned]
    counts = torch.bincount(owner, minlength=len(part.ids))
    sums = nats.new_zeros(len(part.ids)).index_add(0, owner, nats)
    return list(zip(counts.tolist(), sums.tolist(), strict=True))
