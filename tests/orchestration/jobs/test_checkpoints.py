"""What ranks fetch at a restart, counted at the S3 client; old attempts go."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ranks import run_groups

from orchestration.jobs.attempts import ReportCallback, attempt_name, run_stage
from orchestration.jobs.checkpoints import StageState, delete_old_attempts, read_state, restored
from orchestration.jobs.lease import Lease
from orchestration.jobs.worker import Stage
from orchestration.recipe import Recipe, parse_recipe
from orchestration.services import storage
from orchestration.services.engine import build_engine, full_state_dict, save_engine
from tinyemo.errors import LostLeaseError, TrainingError

SHARED = 1000
WORLD_SIZE = 2


def engine_of(chosen: Recipe, world_size: int) -> Any:
    from orchestration.jobs.projector import build_projector

    return build_engine(
        build_projector(chosen), chosen.engine, chosen.optimizer, num_steps=4, global_batch_size=32,
        world_size=world_size,
    )  # fmt: skip


def restart(chosen: Recipe, rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Store a checkpoint as Ray Train does, each rank its part, and restore it into a new engine."""
    uri = f"{chosen.checkpoint.root}/stage-{chosen.engine.zero_stage}"
    engine = engine_of(chosen, world_size)
    save_engine(engine, folder / f"{rank}")
    if rank == 0:
        (folder / "0" / "task.json").write_text("x" * SHARED)
    storage.upload_folder(folder / f"{rank}", uri)
    torch.distributed.barrier()
    again = engine_of(chosen, world_size)
    before = storage.fetched_bytes()
    with restored(uri, again, rank=rank, local_rank=rank, world_size=world_size) as found:
        is_shared = (found / "task.json").stat().st_size == SHARED
    first, second = full_state_dict(engine), full_state_dict(again)
    return {
        "fetched": storage.fetched_bytes() - before,
        "stored": sum(storage.list_prefix(uri).values()),
        "is_shared": is_shared,
        "is_equal": all(torch.equal(first[name], second[name]) for name in first),
    }


def refuse(chosen: Recipe, rank: int, world_size: int, folder: Path) -> str:
    """Restore with another number of workers."""
    uri = f"{chosen.checkpoint.root}/stage-3"
    engine = engine_of(chosen, world_size)
    with pytest.raises(TrainingError) as caught, restored(uri, engine, rank=0, local_rank=0, world_size=1):
        pass
    return str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_is_fetched_once_by_all_ranks_together(s3_root: str, tmp_path: Path) -> None:
    chosen = parse_recipe(
        {"name": "x", "engine": {"zero_stage": 3, "precision": "fp32"}, "checkpoint": {"root": s3_root}}, source="test"
    )
    found = run_groups({WORLD_SIZE: {"restart": (restart, chosen)}, 1: {"refuse": (refuse, chosen)}}, tmp_path)
    ranks = [rank["restart"] for rank in found[WORLD_SIZE]]
    assert all(rank["is_equal"] and rank["is_shared"] for rank in ranks)
    assert sum(rank["fetched"] for rank in ranks) == ranks[0]["stored"]
    assert max(rank["fetched"] for rank in ranks) < 0.6 * ranks[0]["stored"]
    assert found[1][0]["refuse"].startswith("the checkpoint was written by 2 workers and the run has 1")


def test_attempts_that_are_over_leave_no_checkpoint_but_the_newest(s3_root: str) -> None:
    kept = f"{s3_root}/attempt-2/checkpoint_7"
    for name in ("attempt-1/checkpoint_3/a", "attempt-2/checkpoint_5/a", "attempt-2/checkpoint_7/a", "curve/1.json"):
        storage.write_bytes(f"{s3_root}/{name}", b"{}")
    storage.write_json(f"{s3_root}/latest.json", vars(StageState(s3_root, kept, 7, False, {})))
    delete_old_attempts(s3_root, read_state(s3_root))
    left = [uri.removeprefix(f"{s3_root}/") for uri in storage.list_prefix(s3_root)]
    assert left == ["attempt-2/checkpoint_7/a", "curve/1.json", "latest.json"]


def test_a_driver_that_lost_its_lease_deletes_no_checkpoint(s3_root: str) -> None:
    class LostLease:
        def check(self) -> None:
            raise LostLeaseError("another driver has the run")

    storage.write_bytes(f"{s3_root}/select/attempt-1/checkpoint_3/a", b"{}")
    callback = ReportCallback(f"{s3_root}/select", None, lease=cast(Lease, LostLease()))
    with pytest.raises(LostLeaseError):
        run_stage(cast(Stage, None), callback)
    assert storage.exists(f"{s3_root}/select/attempt-1/checkpoint_3/a")


def test_an_attempt_sorts_after_earlier_ones_where_the_clock_is_behind(s3_root: str) -> None:
    in_an_hour = int((time.time() + 3600) * 1000)
    storage.write_bytes(f"{s3_root}/ledger/attempt-{in_an_hour}-000000000-rank0.parquet", b"")
    assert attempt_name(f"{s3_root}/read") == f"attempt-{in_an_hour + 1}"
