"""The only module that knows DeepSpeed: a model becomes an engine, an engine becomes a checkpoint and back."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestration.recipe.sections import EngineConfig, OptimizerConfig
from tinyemo.errors import TrainingError

logger = logging.getLogger(__name__)

TAG = "engine"
Engine = Any
"""A `deepspeed.DeepSpeedEngine`, which is untyped."""


def compute_dtype(config: EngineConfig) -> torch.dtype:
    """Return the type that parameters compute in on this machine."""
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over all parameters."""
    return torch.optim.AdamW(model.parameters(), lr=config.max_lr / 25, weight_decay=config.weight_decay, fused=True)


def build_schedule(config: OptimizerConfig, num_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Makes the OneCycle schedule of a run of `num_steps` optimizer steps."""

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=config.max_lr, total_steps=max(num_steps, 2), pct_start=config.pct_start
        )

    return schedule


def build_engine(
    model: nn.Module,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    num_steps: int,
    global_batch_size: int,
    world_size: int,
) -> Engine:
    """Return a DeepSpeed engine over the initialised process group, with the published optimizer and schedule."""
    return start_engine(
        model,
        engine,
        build_optimizer(model, optimizer),
        build_schedule(optimizer, num_steps),
        global_batch_size=global_batch_size,
        micro_batch_size=global_batch_size // world_size,
        world_size=world_size,
        gradient_clipping=optimizer.gradient_clipping,
    )


def start_engine(
    model: nn.Module,
    engine: EngineConfig,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[torch.optim.Optimizer], Any],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    gradient_clipping: float = 0.0,
) -> Engine:
    """Return a DeepSpeed engine over the initialised process group.

    Args:
        model: whose frozen parameters have requires_grad off; they are in no parameter group and in no checkpoint.
        engine: how it shards and computes.
        optimizer: over the parameters that are trained.
        schedule: stepped once an optimizer step.
        global_batch_size: micro_batch_size * world_size * the micro-batches of a step.
        micro_batch_size: samples of one forward pass on one rank.
        world_size: ranks.
        gradient_clipping: norm that gradients are scaled down to; 0 for no clipping.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed reads files written by this run alone; torch still unpickles nothing but tensors and plain types.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    _allow_deepspeed_types()
    dtype = compute_dtype(engine)
    if not torch.cuda.is_available():
        load_collectives()
    if torch.distributed.get_rank() == 0:
        logger.info("computing in %s on %s, ZeRO stage %d", dtype, _device_name(), engine.zero_stage)
    config = _deepspeed_config(engine, dtype, global_batch_size, micro_batch_size, world_size, gradient_clipping)
    if engine.zero_stage == 3:
        # `initialize` would send the whole model to every rank before it shards it.
        deepspeed.init_distributed(dist_init_required=False)
        deepspeed.zero.Init(module=model.to(dtype), config_dict_or_path=config, dtype=dtype)
    built, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=config,
        dist_init_required=False,
    )
    return built


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _deepspeed_config(
    engine: EngineConfig,
    dtype: torch.dtype,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    gradient_clipping: float,
) -> dict[str, Any]:
    is_gpu = torch.cuda.is_available()
    offload = {"offload_optimizer": {"device": "cpu"}} if engine.offload_optimizer == "cpu" else {}
    return {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": global_batch_size // (micro_batch_size * world_size),
        # DeepSpeed 0.19.8 clips at 1.0 where nothing is said.
        "gradient_clipping": gradient_clipping,
        # Sums of many bf16 gradients lose what a single one adds. Without ZeRO, DeepSpeed 0.19.8 has no other sums.
        "data_types": {"grad_accum_dtype": "fp32"} if engine.zero_stage else {},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        # Ours is torch's AdamW, fused, also where its state lies in the host's memory.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": engine.bucket_elements,
            "allgather_bucket_size": engine.bucket_elements,
            "stage3_prefetch_bucket_size": engine.bucket_elements,
            "stage3_max_live_parameters": 4 * engine.bucket_elements,
            # By default a billion elements that backward will want again stay gathered.
            "stage3_max_reuse_distance": 4 * engine.bucket_elements,
            "sub_group_size": 4 * engine.bucket_elements,
            # On a CPU there is no other stream to overlap with, and copying gradients into one buffer only costs.
            "contiguous_gradients": is_gpu or engine.zero_stage == 3,
            "overlap_comm": is_gpu,
            **offload,
        },
    }


def _allow_deepspeed_types() -> None:
    """Name the classes of DeepSpeed's own that its checkpoints hold, so that loading stays `weights_only`."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def train_step(engine: Engine, loss: Tensor, *, measures_norm: bool = False) -> float | Tensor | None:
    """Take one backward pass and one optimizer step; return the gradient's norm where it is measured."""
    engine.backward(loss)
    norm = norm_before_step(engine) if measures_norm else None
    engine.step()
    return norm if norm is not None or not measures_norm else gradient_norm(engine)


def norm_before_step(engine: Engine) -> Tensor | None:
    """Return the norm of reduced gradients that DeepSpeed does not measure itself, () float32; None where it does."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def gradient_norm(engine: Engine) -> float | Tensor | None:
    """Return the norm of all gradients at the last optimizer step, before clipping; None where it is not known."""
    norm: float | Tensor | None = engine.get_global_grad_norm()
    return norm


def accumulate(engine: Engine, loss: Tensor, *, is_last: bool, before_step: Callable[[], None]) -> None:
    """Take the backward pass of one micro-batch and, after the last one of a step, the optimizer step.

    DeepSpeed averages over ranks and nothing else here: sums over micro-batches and ranks want `world_size` times
    themselves.

    Args:
        engine: with as many micro-batches a step as it was started with.
        loss: () of this micro-batch.
        is_last: of this step on this rank.
        before_step: called between the last backward pass and the step; what it raises leaves the weights alone.
    """
    engine.backward(loss, scale_wrt_gas=False)
    if is_last:
        before_step()
    engine.step()


def save_engine(engine: Engine, folder: Path) -> None:
    """Write this rank's part of the engine to its own folder, frozen parameters left out; every rank calls it."""
    (folder / TAG).mkdir(parents=True, exist_ok=True)
    # DeepSpeed's own exclusion forgets the second name of a tied weight, the largest one of a small model.
    hook = engine.module.register_state_dict_post_hook(_drop_frozen)
    try:
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    finally:
        hook.remove()


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(f"{prefix}{name}", None)


def is_part_of(name: str) -> int | None:
    """Return the rank that a file of a checkpoint belongs to; None for a file that all ranks share."""
    found = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(found.group(1)) if found else None


def require_parts(engine: Engine, names: Iterable[str], world_size: int) -> None:
    """Raise TrainingError where a checkpoint with these files was written by another number of workers."""
    parts = sum(name.endswith("optim_states.pt") for name in names)
    if engine.zero_optimization() and parts != world_size:
        raise TrainingError(
            f"the checkpoint was written by {parts} workers and the run has {world_size}; "
            f"resume with workers.num_workers={parts}"
        )


def load_engine(engine: Engine, folder: Path) -> None:
    """Restore model, optimizer and schedule from a folder with this rank's part and what all ranks share.

    Raises:
        TrainingError: the folder lacks this rank's part.
    """
    is_whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    path, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=is_whole)
    if path is None:
        raise TrainingError(f"the checkpoint in {folder} holds no engine; resume from an older one or start afresh")


def gathered(engine: Engine, parameters: list[nn.Parameter]) -> Any:
    """Return a context in which parameters are whole on every rank, also where ZeRO 3 shards them."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3)


def full_state_dict(engine: Engine) -> dict[str, Tensor]:
    """Return every parameter and buffer whole, on the CPU in fp32 (counters keep their type); every rank calls it.

    Under bf16 this rounds the fp32 master weights as the forward pass does.
    """
    module: nn.Module = engine.module
    with gathered(engine, list(module.parameters())):
        return {
            name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().clone()
            for name, value in module.state_dict().items()
        }


def trained_state_dict(engine: Engine) -> dict[str, Tensor]:
    """Return the trained parameters whole on rank 0, on the CPU in fp32, none on the others; every rank calls it.

    They are gathered one by one, so that no rank ever holds more than one of them beside its own part.
    """
    is_first = torch.distributed.get_rank() == 0
    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        with gathered(engine, [parameter]):
            if is_first:
                found[name] = parameter.detach().float().cpu().clone()
    return found


def optimizer_state_bytes(engine: Engine) -> int:
    """Return the bytes of this rank's optimizer state: moments and, where DeepSpeed keeps one, the fp32 master copy."""
    states = [
        value
        for state in _inner(engine.optimizer).state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in states if tensor.dim() > 0)


def state_bytes(engine: Engine) -> dict[str, int]:
    """Return the bytes that this rank holds, counted from tensors: "parameters", "gradients" and "optimizer".

    Frozen parameters are among the parameters, DeepSpeed's own copy of the trained ones is among the optimizer's. Call
    it between the last backward pass and the step, where gradients are there.
    """
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    is_sharded = engine.zero_optimization_stage() == 3
    kinds: dict[str, list[Any]] = {
        "parameters": [parameter.ds_tensor if is_sharded else parameter for parameter in parameters],
        "gradients": [parameter.grad for parameter in parameters],
        "optimizer": [value for state in _inner(optimizer).state.values() for value in state.values()],
    }
    for kind, names in (
        ("gradients", ("averaged_gradients", "grad_partitions_flat_buffer")),
        ("optimizer", ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")),
    ):
        kinds[kind] += [getattr(optimizer, name, None) for name in names]
    seen: set[int] = set()
    return {kind: _bytes_of(held, seen) for kind, held in kinds.items()}


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def _bytes_of(held: Any, seen: set[int]) -> int:
    if isinstance(held, dict):
        held = list(held.values())
    if isinstance(held, list | tuple):
        return sum(_bytes_of(item, seen) for item in held)
    if not isinstance(held, Tensor) or held.dim() == 0 or held.untyped_storage().data_ptr() in seen:
        return 0
    seen.add(held.untyped_storage().data_ptr())
    return held.untyped_storage().nbytes()


def load_collectives() -> None:
    """Load the collectives that DeepSpeed uses on a CPU; the first caller of an environment compiles them.

    Torch guards its build folder by a file that outlives a killed process, and every later process would wait for it
    without end. So builds happen in a folder of the environment's own, under a lock that the kernel releases when its
    holder dies. A guard found under that lock belongs to a dead process: the next folder is used.
    """
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import CPUAdamBuilder  # noqa: F401  (imports register the builders)

    folder = _collectives_folder()
    if folder is None:
        build_shm_op()
        return
    # Another ninja does not trust this one's log and compiles everything again: always the environment's own.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    with (folder / "in_use").open("w") as in_use:
        fcntl.flock(in_use, fcntl.LOCK_EX)
        builds, number = folder, 0
        while list(builds.glob("*/lock")):
            number += 1
            builds = folder / f"build-{number}"
        builds.mkdir(exist_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(builds)
        build_shm_op()


def _collectives_folder() -> Path | None:
    folder = Path(sys.prefix) / "torch_extensions"
    if not Path(os.environ.get("TORCH_EXTENSIONS_DIR", folder)).is_relative_to(folder):
        return None
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


if __name__ == "__main__":
    load_collectives()
