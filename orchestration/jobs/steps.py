"""One optimizer step of the reasoning model, and a pass that only measures: batches of records become tensors.

Shape letters: B records of a rank, T tokens of a packed row, S side of an image in pixels, A answer tokens.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestration.data.batch import Batch
from orchestration.jobs.worker import Point, require_finite
from orchestration.services.engine import Engine, accumulate, gradient_norm, norm_before_step, state_bytes
from tinyemo.conversation import IGNORED
from tinyemo.distributed import gather_rows
from tinyemo.encoders import Preprocessing
from tinyemo.errors import TrainingError
from tinyemo.losses import alignment
from tinyemo.packing import micro_batches, pack
from tinyemo.reasoner.flops import FlopModel, Work
from tinyemo.vision import normalise


@dataclass(frozen=True)
class MicroBatch:
    """The records of one forward pass, packed into one row; position_ids start from 0 at each.

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
        """Return the nats of each answer token in reading order, (A,) float32."""
        nats: Tensor = engine(
            input_ids=self.input_ids,
            labels=self.labels,
            position_ids=self.position_ids,
            pixel_values=self.pixel_values,
        ).token_nats
        return nats

    def pairs(self, engine: Engine) -> tuple[Tensor, Tensor]:
        """Return the mean token of each record's image and of its answer, (B, H) float twice."""
        found: tuple[Tensor, Tensor] = engine(
            input_ids=self.input_ids,
            labels=self.labels,
            position_ids=self.position_ids,
            pixel_values=self.pixel_values,
            returns_pairs=True,
        ).pairs
        return found


class Inputs:
    """Makes micro-batches out of what the stream hands out."""

    def __init__(
        self, preprocessing: Preprocessing, device: torch.device, image_token_id: int, *, has_images: bool = True
    ) -> None:
        self.device = device
        self.has_images = has_images
        self.image_token_id = image_token_id
        self._preprocessing = preprocessing

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device; a copy to a GPU from pinned memory does not wait for earlier kernels."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def micro_batches(self, batch: Batch, size: int) -> list[MicroBatch]:
        """Return the batch in parts of `size` records."""
        return [self.micro_batch(batch.part(rows)) for rows in micro_batches(len(batch.ids), size)]

    def micro_batch(self, batch: Batch, *, images: Tensor | None = None, has_images: bool | None = None) -> MicroBatch:
        """Return all records of the batch as one forward pass.

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
        assert pixels is not None
        lengths = [len(ids) for ids, _ in pairs]
        return MicroBatch(
            ids=batch.ids,
            input_ids=self._moved(packed.input_ids),
            labels=self._moved(packed.labels),
            position_ids=self._moved(packed.position_ids),
            pixel_values=normalise(self._moved(pixels), self._preprocessing).contiguous() if has_images else None,
            work=Work(
                tokens=sum(lengths),
                answer_tokens=packed.num_answer_tokens,
                images=len(pairs) if has_images else 0,
                context=sum(length**2 for length in lengths),
            ),
        )


def summed(values: list[float], device: torch.device) -> Tensor:
    """Return the sums over all ranks, in float64 on the device."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor


def train_micro_batches(
    engine: Engine,
    micro_batches: list[MicroBatch],
    step: int,
    seed: int,
    *,
    counts_memory: bool = False,
    measures_norm: bool = False,
) -> tuple[Point, Tensor]:
    """Take one optimizer step over the micro-batches of all ranks; return its figures and the counts of its work.

    The loss is the sum of nats over all answer tokens of the step divided by their number, on whichever rank, so
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
    is_cpu = device.type == "cpu"
    work = sum((part.work for part in micro_batches), Work())
    counts = summed([work.tokens, work.answer_tokens, work.images, work.context], device)
    ids = [name for part in micro_batches for name in part.ids]
    if is_cpu and not counts[1]:
        raise TrainingError(f"step {step} has no answer token; this rank's records: {', '.join(ids)}")
    point: Point = {"train/learning_rate": max(engine.get_lr())}
    torch.manual_seed((seed << 40) + step * world_size + torch.distributed.get_rank())
    nats = torch.zeros((), dtype=torch.float64, device=device)

    def before_step() -> None:
        torch.distributed.all_reduce(nats)
        point["train/loss"] = nats / counts[1]
        if is_cpu:  # Reading a loss on a GPU would wait for it: the log does that.
            require_finite(float(point["train/loss"]), step, ids, "Lower the stage's learning_rate")
        if counts_memory:
            point.update({f"memory/{kind}_bytes": float(count) for kind, count in state_bytes(engine).items()})
        if measures_norm:
            point["train/gradient_norm"] = norm_before_step(engine)

    for place, part in enumerate(micro_batches):
        loss = part.forward(engine).sum()
        nats += loss.detach()
        is_last = place == len(micro_batches) - 1
        scale = (world_size / counts[1]).to(loss.dtype)
        accumulate(engine, loss * scale, is_last=is_last, before_step=before_step)
    if measures_norm and point["train/gradient_norm"] is None:
        point["train/gradient_norm"] = gradient_norm(engine)
        if point["train/gradient_norm"] is None:
            del point["train/gradient_norm"]
    return point | {"train/answer_tokens": counts[1], "train/tokens": counts[0]}, counts


def align_micro_batch(engine: Engine, part: MicroBatch, step: int) -> tuple[Point, Tensor]:
    """Take one optimizer step that aligns images with answers over all ranks; return its figures and counts.

    No language model runs, so the counts of tokens are zero.

    Raises:
        TrainingError: the loss is not finite.
    """
    images, texts = part.pairs(engine)
    loss = alignment(gather_rows(images), gather_rows(texts))

    def before_step() -> None:
        require_finite(float(loss.detach()), step, part.ids, "Lower the stage's learning_rate")

    accumulate(engine, loss, is_last=True, before_step=before_step)
    counts = summed([0.0, 0.0, float(part.work.images), 0.0], part.input_ids.device)
    return {"train/loss": loss.detach(), "train/learning_rate": max(engine.get_lr())}, counts


@torch.no_grad()
def mean_loss(engine: Engine, inputs: Inputs, stream: Iterable[Batch], micro_batch_size: int) -> float:
    """Return the nats per token over the answers of every record of a stream, on all ranks."""
    sums = [0.0, 0.0]
    engine.eval()
    for batch in stream:
        for part in inputs.micro_batches(batch, micro_batch_size):
            sums[0] += float(part.forward(engine).sum())
            sums[1] += part.work.answer_tokens
    engine.train()
    nats, num_tokens = summed(sums, inputs.device).tolist()
    return float(nats / num_tokens)


def losses_by_record(part: MicroBatch, nats: Tensor) -> list[tuple[int, float]]:
    """Return (answer tokens, nats of the answer) of each record of a micro-batch.

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


PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the vendor's data sheets."""


class Meter:
    """Rates of a run's steps between two calls of `take`; counts stay on the device until then.

    Attributes:
        flops: of the model, before DeepSpeed shards it.
    """

    def __init__(self, flops: FlopModel, device: torch.device, world_size: int) -> None:
        self.flops = flops
        self._device, self._world_size = device, world_size
        self._counts: list[Tensor] = []

    def add(self, counts: Tensor) -> None:
        """Count the work of a step of all ranks, (4,): tokens, answer tokens, images, squared lengths."""
        self._counts.append(counts)

    def take(self, elapsed_s: float) -> dict[str, float]:
        """Return figures of the steps since the last call, which took `elapsed_s`; none without a step."""
        if not self._counts:
            return {}
        work = Work(*(int(count) for count in torch.stack(self._counts).sum(0)))
        self._counts = []
        rate = self.flops.of_training(work) / elapsed_s
        found = {
            "train/tokens_per_s": work.tokens / elapsed_s,
            "train/model_flops_per_s": rate,
            "train/peak_memory_bytes": float(peak_memory_bytes(self._device)),
        }
        peak = peak_flops(self._device)
        if peak is not None:
            found["train/mfu"] = rate / (peak * self._world_size)
        return found


def peak_flops(device: torch.device) -> float | None:
    """Return a device's dense bf16 FLOP/s; None for a CPU and for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this rank has held, bytes: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
