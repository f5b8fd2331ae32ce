"""The reasoning model's task: one stage of training, and the finished model's export from the engine that holds it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestration.assets.models import tokenizer_source
from orchestration.jobs.checkpoints import Done, read_curve
from orchestration.jobs.evaluation import CONDITIONS, ROWS, EvaluationJob, summarise, with_partners
from orchestration.jobs.results import ReasonerResult, StageResult, model_card
from orchestration.jobs.stage_weights import (
    TRAINED_WEIGHTS,
    build_for_stage,
    build_on_first_rank,
    give_freed_memory_back,
)
from orchestration.jobs.steps import Inputs, Meter, align_micro_batch, mean_loss, train_micro_batches
from orchestration.jobs.worker import Point, Stage
from orchestration.recipe import Recipe
from orchestration.recipe.sections import StageConfig
from orchestration.services import storage, tracking
from orchestration.services.engine import Engine, gathered, start_engine, trained_state_dict
from tinyemo.errors import TrainingError
from tinyemo.reasoner.flops import flop_model
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.trained import parameter_groups
from tinyemo.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    from orchestration.jobs.reasoning_plan import ReasoningPlan

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingJob:
    """Inputs of a training stage beside its streams.

    Attributes:
        weights: S3 folder of each earlier stage's trained weights, by its name.
        model: S3 folder that the last stage exports the finished model to; empty in the others.
        template: chat template of the exported model.
    """

    weights: dict[str, str]
    model: str = ""
    template: str = ""


@dataclass
class ReasonerState:
    """State of a rank while a stage trains."""

    engine: Engine
    inputs: Inputs
    meter: Meter
    stage: StageConfig
    seed: int


def build(stage: Stage, device: torch.device) -> ReasonerState:
    """Return the engine around the model as the stage begins with it; the first rank alone reads its weights."""
    recipe, config = stage.recipe, stage.recipe.stages[stage.name]
    world_size = torch.distributed.get_world_size()
    if device.type == "cpu":
        give_freed_memory_back(at_once=True)
    model = build_on_first_rank(
        lambda: build_for_stage(recipe, stage.name, stage.job.weights), config, recipe.train.seed
    )
    logger.info("attention of the language model: %s", model.language_model.config._attn_implementation)
    meter = Meter(flop_model(model), device, world_size)
    engine = start_stage(model, recipe, config, num_steps=stage.num_steps, world_size=world_size)
    if device.type == "cpu":
        # ZeRO 3 is for those who are short of memory: on a CPU this saves 40 % of it for a fifth more time.
        give_freed_memory_back(at_once=recipe.engine.zero_stage == 3)
    inputs = Inputs(
        model.config.encoder_spec.preprocessing, device, model.config.image_token_id, has_images=config.images
    )
    return ReasonerState(engine, inputs, meter, config, recipe.train.seed)


def start_stage(model: Reasoner, recipe: Recipe, stage: StageConfig, *, num_steps: int, world_size: int) -> Engine:
    """Return the engine of a stage: AdamW over what it trains, the connector at its own rate, under the schedule."""
    groups = parameter_groups(
        model, learning_rate=stage.learning_rate, connector_learning_rate=stage.connector_learning_rate
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=stage.weight_decay, fused=True)

    def schedule(wrapped: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(wrapped, lambda step: stage.rate_factor(step, num_steps))

    return start_engine(
        model,
        recipe.engine,
        optimizer,
        schedule,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        world_size=world_size,
        gradient_clipping=stage.gradient_clipping,
    )


def take_step(state: ReasonerState, batch: Any, *, is_logged: bool) -> Point:
    """Take one optimizer step; see `train_micro_batches`."""
    parts = state.inputs.micro_batches(batch, state.stage.micro_batch_size)
    if state.stage.objective == "align":
        point, counts = align_micro_batch(state.engine, parts[0], batch.step)
        state.meter.add(counts)
        return point
    # Adam's moments exist from the second step on.
    point, counts = train_micro_batches(
        state.engine, parts, batch.step, state.seed, counts_memory=batch.step == 1, measures_norm=is_logged
    )
    state.meter.add(counts)
    return point


def rates(state: ReasonerState, elapsed_s: float) -> dict[str, float]:
    """Return tokens and model FLOPs per second, the peak memory of this rank and, on known GPUs, MFU."""
    return state.meter.take(elapsed_s)


def measure(state: ReasonerState, stage: Stage, epoch: int, step: int) -> dict[str, float]:
    """Return the loss of the validation records, nats per token."""
    if "validation" not in stage.streams:
        return {}
    return {
        "val/loss": mean_loss(state.engine, state.inputs, stage.batches("validation"), state.stage.micro_batch_size)
    }


def save(state: ReasonerState, folder: Path) -> None:
    """Write nothing: the engine holds everything."""


def load(state: ReasonerState, folder: Path) -> None:
    """Read nothing."""


def finish(state: ReasonerState, stage: Stage, folder: Path) -> dict[str, Any]:
    """Write the trained weights; the last stage also exports the finished model."""
    weights = trained_state_dict(state.engine)
    if weights:
        save_file(weights, folder / TRAINED_WEIGHTS)
    del weights
    if stage.job.model:
        export(state, stage.recipe, stage.job)
    return {}


def export(state: ReasonerState, recipe: Recipe, job: TrainingJob) -> None:
    """Store the model with adapters merged as a Hugging Face folder in S3; every rank calls it.

    Parameters are gathered one layer at a time and leave in shards, so no rank holds more than one shard and one layer
    beside its own part of the engine.
    """
    dtype = DTYPES[recipe.reasoner.export_dtype]
    is_first = torch.distributed.get_rank() == 0
    shard: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    num_bytes = total = 0
    for name, tensor in exported_tensors(state.engine):
        if not is_first:
            continue
        held = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        shard[name] = held
        num_bytes += held.nbytes
        if num_bytes > SHARD_BYTES:
            total, num_bytes = total + num_bytes, 0
            _store_shard(shard, job.model, files)
    if is_first:
        _store_shard(shard, job.model, files)
        _store_settings(state, recipe, job, dtype, files, total + num_bytes)


def exported_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the finished model on every rank, tied parameters once, adapters merged.

    The tensors are whole while the loop's body runs; under ZeRO 3 a layer is gathered at a time.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen: set[int] = set()
    inside: tuple[str, ...] = ()
    for prefix, module in engine.module.named_modules():
        if prefix.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{prefix}.")
            with gathered(engine, list(module.parameters())):
                base: Any = module.get_base_layer()
                merged: Any = module
                yield f"{prefix}.weight", base.weight.float() + merged.get_delta_weight("default").float()
                if base.bias is not None:
                    yield f"{prefix}.bias", base.bias
            continue
        yield from _own_tensors(engine, prefix, module, seen)


def _own_tensors(engine: Engine, prefix: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    dot = f"{prefix}." if prefix else ""
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        with gathered(engine, [parameter]):
            yield f"{dot}{name}", parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield f"{dot}{name}", buffer


def _store_shard(shard: dict[str, Tensor], uri: str, files: dict[str, str]) -> None:
    name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        save_file(shard, Path(folder) / name, metadata={"format": "pt"})
        storage.upload_file(Path(folder) / name, f"{uri}/{name}")
    files |= dict.fromkeys(shard, name)
    shard.clear()


def _store_settings(
    state: ReasonerState, recipe: Recipe, job: TrainingJob, dtype: torch.dtype, files: dict[str, str], num_bytes: int
) -> None:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    model, records = state.engine.module, recipe.records
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=open_tokenizer(tokenizer_source(records.tokenizer)), eos_token=records.end_token
    )
    config = type(model.config).from_dict(model.config.to_dict())
    config.template, config.architectures, config.dtype = job.template, [type(model).__name__], dtype
    generation = GenerationConfig.from_dict(model.generation_config.to_dict())
    generation.eos_token_id = tokenizer.convert_tokens_to_ids(records.end_token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        index = {"metadata": {"total_size": num_bytes}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        storage.upload_folder(folder, job.model)


# What the driver asks of a task, in this order.


def tags(plan: ReasoningPlan) -> dict[str, str]:
    """Return the tags of the MLflow run and of its stages."""
    sources, recipe = plan.sources, plan.recipe
    return {
        "kind": "reasoner",
        "llm": sources.llm_name,
        "llm.revision": sources.llm_revision,
        "llm_weights": sources.llm_weights,
        "encoder": str(sources.encoder.info),
        "vision_weights": sources.encoder.info.weights,
        "data": plan.answers,
        "data.digest": ",".join(sorted(set(plan.data_digests().values()))),
        "zero_stage": str(recipe.engine.zero_stage),
        "num_workers": str(recipe.workers.num_workers),
    }


def log_inputs(run: tracking.RunHandle, plan: ReasoningPlan) -> None:
    """Name every data set that the run reads in MLflow."""
    for records in (*plan.stages.values(), plan.validation, plan.test):
        for part in records.sets if records is not None else ():
            manifest = part.manifest
            rows = manifest.splits[part.split].rows
            run.log_dataset(f"{manifest.name}-{part.split}", manifest.digest, manifest.uri, rows, part.split)


def stages(plan: ReasoningPlan) -> list[str]:
    """Return the names of the stages, in order; the evaluation reads what the last training stage exported."""
    if plan.test is None:
        split = plan.recipe.evaluation.test
        logger.warning("%s: nothing is evaluated", f"no split {split!r}" if split else "evaluation.test is empty")
    return [*plan.recipe.stages, *(["evaluation"] if plan.test is not None else [])]


def stage(plan: ReasoningPlan, name: str, done: dict[str, Done], folder: str) -> Stage:
    """Return a stage, given the outcomes of earlier ones."""
    recipe, last = plan.recipe, list(plan.recipe.stages)[-1]
    if plan.test is not None and name == "evaluation":
        conditions = CONDITIONS if recipe.stages[last].images else ("text_only",)
        job = EvaluationJob(f"{folder}/model", conditions, recipe.stages[last].micro_batch_size)
        streams = {"train": with_partners(plan.test) if "shuffled" in job.conditions else plan.test}
        return Stage("orchestration.jobs.evaluation", name, recipe, streams, job, prefix="")
    streams = {"train": plan.stages[name]}
    if plan.validation is not None:
        streams["validation"] = plan.validation
    stage_tags = {**tags(plan), "kind": "stage", "stage": name}
    if done:
        before, earlier = list(done.items())[-1]
        stage_tags |= {
            "starts_from": before,
            "starts_from.run_id": earlier.run_id,
            "starts_from.checkpoint": earlier.state.checkpoint,
        }
    training = TrainingJob(
        weights={key: one.state.checkpoint for key, one in done.items()},
        model=f"{folder}/model" if name == last else "",
        template=plan.template,
    )
    params = recipe.stages[name].model_dump(mode="json")
    return Stage(__name__, name, recipe, streams, training, params=params, tags=stage_tags)


def conclude(plan: ReasoningPlan, run: tracking.RunHandle, done: dict[str, Done], folder: str) -> ReasonerResult:
    """Log the evaluation and the card of the exported model; return the result."""
    recipe, sources = plan.recipe, plan.sources
    evaluation = _log_evaluation(plan, run, done["evaluation"]) if "evaluation" in done else None
    result = ReasonerResult(
        name=recipe.name,
        run_id=run.run_id,
        run_url=run.url,
        model=f"{folder}/model",
        llm=sources.llm_name,
        llm_weights=sources.llm_weights,
        vision_tower=str(sources.encoder.info),
        vision_weights=sources.encoder.info.weights,
        answers=plan.answers,
        stages={name: asdict(_stage_result(done[name])) for name in recipe.stages},
        evaluation=evaluation,
        duration_s=sum(one.duration_s for one in done.values()),
    )
    card = model_card(plan, result)
    storage.write_bytes(f"{result.model}/README.md", card.encode())
    run.log_text(card, "README.md")
    run.set_tags({"model": result.model})
    run.refer("model", result.model)
    measured = "not evaluated" if evaluation is None else f"test loss {evaluation['loss']} nats per token"
    run.describe(
        f"Reasoning model on {result.llm} ({result.llm_weights} weights), answers {result.answers}: {measured}.",
        {"data": ", ".join(sorted(plan.data_digests())), "export": result.model},
    )
    return result


def _stage_result(done: Done) -> StageResult:
    points = [metrics for _, metrics in read_curve(done.state.folder)]

    def values(key: str) -> list[float]:
        return [metrics[key] for metrics in points if key in metrics]

    losses, validations = values("train/loss"), values("val/loss")
    tail = losses[-max(1, len(losses) // 10) :]
    return StageResult(
        run_id=done.run_id,
        checkpoint=done.state.checkpoint,
        num_steps=done.state.step,
        first_loss=losses[0],
        last_loss=sum(tail) / len(tail),
        val_loss=validations[-1] if validations else None,
        tokens_per_s=values("train/tokens_per_s")[-1],
        duration_s=done.duration_s,
    )


def _log_evaluation(plan: ReasoningPlan, run: tracking.RunHandle, done: Done) -> dict[str, Any]:
    assert plan.test is not None
    rows = storage.read_json(f"{done.state.checkpoint}/{ROWS}")
    expected = sum(part.manifest.splits[part.split].rows for part in plan.test.sets)
    if len({row["id"] for row in rows}) != expected:
        raise TrainingError(f"the evaluation has {len(rows)} rows for {expected} records; please report it")
    document = asdict(summarise(rows))
    figures = {f"test/loss_{name}": value for name, value in document["loss"].items()}
    for name, test in document["tests"].items():
        figures |= {f"test/right_vs_{name}_difference": test["mean_difference"]}
        figures |= {f"test/right_vs_{name}_p_wilcoxon": test["p_wilcoxon"]}
    part = plan.test.sets[0]
    run.log_model(
        "model",
        f"{done.state.folder.rsplit('/', 1)[0]}/model",
        figures,
        dataset=(f"{part.manifest.name}-{part.split}", part.manifest.digest),
    )
    run.log_text(json.dumps(rows, indent=1), f"evaluation/{ROWS}")
    run.log_text(json.dumps(document, indent=1), "evaluation/evaluation.json")
    return document
