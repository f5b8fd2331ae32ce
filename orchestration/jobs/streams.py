"""Streams of today's plans behind one interface: `dataset`, `batches`, `num_steps`, `epoch_ends`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestration.streaming.feature_stream import Batch, StreamPlan, build_dataset, open_stream
from orchestration.streaming.record_stream import RecordPlan, build_record_dataset, open_record_stream

if TYPE_CHECKING:
    import ray.data


@dataclass(frozen=True)
class FeatureStream:
    """Feature rows of one split."""

    plan: StreamPlan

    @property
    def num_steps(self) -> int:
        return self.plan.train.num_steps

    @property
    def global_batch_size(self) -> int:
        return self.plan.train.global_batch_size

    def epoch_ends(self) -> list[int]:
        return self.plan.train.steps_of_epoch_ends()

    def dataset(self, start_step: int = 0) -> ray.data.Dataset:
        return build_dataset(self.plan, start_step)

    def batches(self, shard: Any, *, rank: int, start_step: int = 0) -> Iterator[Any]:
        return map(as_tensors, open_stream(shard, self.plan, rank=rank, start_step=start_step))


def as_tensors(batch: Batch) -> Any:
    """Return a batch whose arrays are tensors."""
    import torch

    labels = torch.from_numpy(np.array(batch.labels))
    return SimpleNamespace(
        step=batch.step,
        ids=batch.ids,
        features=torch.from_numpy(np.array(batch.features)),
        labels=labels,
        global_labels=labels,
        is_real=torch.ones(len(batch.ids), dtype=torch.bool),
    )


@dataclass(frozen=True)
class RecordStream:
    """Instruct records."""

    plan: RecordPlan

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps.steps_per_epoch

    @property
    def global_batch_size(self) -> int:
        return self.plan.steps.global_batch_size

    def epoch_ends(self) -> list[int]:
        per_epoch = self.plan.steps.steps_per_epoch
        return sorted({*range(per_epoch, self.num_steps + 1, per_epoch), self.num_steps})

    def dataset(self, start_step: int = 0) -> ray.data.Dataset:
        return build_record_dataset(self.plan, start_step)

    def batches(self, shard: Any, *, rank: int, start_step: int = 0) -> Iterator[Any]:
        return open_record_stream(shard, self.plan, rank=rank, start_step=start_step)
