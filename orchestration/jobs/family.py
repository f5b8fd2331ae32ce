"""A run for each size of the family under one parent run in MLflow; the best projector is registered."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orchestration.jobs.checkpoints import read_curve
from orchestration.jobs.job import train
from orchestration.jobs.lease import hold_lease, read_claim, run_folder
from orchestration.jobs.results import ReasonerResult, Result, TrainResult, notes
from orchestration.plots import SizeRow, plot_sizes
from orchestration.recipe import Recipe, parse_size, recipes_of_sizes, to_toml
from orchestration.report.promotion import promote_first
from orchestration.services import storage, tracking
from tinyemo.errors import AssetError, ConfigError
from tinyemo.families import FAMILY

if TYPE_CHECKING:
    from orchestration.jobs.attempts import Progress

logger = logging.getLogger(__name__)

DRAWN = (
    ("speed", "tokens_per_s", 1, "tokens/s"),
    ("memory", "peak_memory_bytes", 2**30, "GiB a rank, peak"),
    ("compute", "model_flops_per_s", 1e9, "model GFLOP/s"),
    ("utilisation", "mfu", 0.01, "% of the GPU's peak"),
)
"""Panels of the plot: name, figure, divisor, unit. A panel without figures, as MFU on a CPU, is left out."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
FIGURES = ("train/tokens_per_s", "train/peak_memory_bytes", "train/model_flops_per_s", "train/mfu")


def train_family(recipe: Recipe, *, progress: Progress | None = None) -> list[Result]:
    """Train a recipe at every size of `recipe.family.sizes`, one after the other.

    Raises:
        AssetError: a size has no weights, see `recipe_for_size`; nothing was started.
        TinyEmoError: see `orchestration.jobs.job.train`.
    """
    if not recipe.stages and not recipe.has_validation():
        raise ConfigError("data.validation_fraction: a family needs validation rows to choose its champion by")
    children = recipes_of_sizes(recipe, recipe_for_size)
    folder = run_folder(recipe)
    if read_claim(folder, recipe, {}) is not None and storage.exists(f"{folder}/family.json"):
        return [train(child) for child in children]  # Each returns its stored result.
    tracking.require_server()
    from orchestration.services.ray_cluster import connect

    connect()
    with (
        hold_lease(folder, recipe, {}, kind="family") as lease,
        tracking.open_run(
            recipe.experiment,
            recipe.name,
            params=recipe.model_dump(mode="json"),
            tags={"kind": "reasoner-family" if recipe.stages else "family", "folder": folder},
            resume_run_id=lease.run_id,
        ) as run,
    ):
        if lease.run_id is None:
            lease.write_claim(run.run_id)
        results = [train(child, parent_run_id=run.run_id, progress=progress) for child in children]
        if recipe.stages:
            facts = _compare_sizes(run, recipe, children, cast("list[ReasonerResult]", results))
        else:
            facts = _register_champion(run, recipe, cast("list[TrainResult]", results))
        lease.write_json(f"{folder}/family.json", {"recipe": recipe.model_dump(mode="json"), **facts})
    return results


def recipe_for_size(recipe: Recipe, size: str) -> Recipe:
    """Return the recipe of one child: the size's language model, seeded random weights where its own are out of reach.

    Raises:
        AssetError: the weights are out of reach, and the recipe does not say family.random_weights = true.
        ConfigError: family.overrides of the size are no fields or values of a recipe.
    """
    content = recipe.model_dump(mode="json")
    content["name"] = f"{recipe.name}-{size}"
    return _reasoner_of_size(recipe, size, content) if recipe.stages else _projector_of_size(recipe, size, content)


def _projector_of_size(recipe: Recipe, size: str, content: dict[str, Any]) -> Recipe:
    from orchestration.assets.labels import label_embeddings  # imports torch

    content["labels"] |= {"llm": size, "llm_weights": "real"}
    content["projector"]["hidden_size"] = FAMILY[size].hidden_size
    child = parse_size(recipe, size, content)
    try:
        label_embeddings(child.labels)
    except AssetError as error:
        if not recipe.family.random_weights:
            raise AssetError(f"{error}; or set family.random_weights = true, and every table says so") from error
        logger.warning("%s: its embedding table is out of reach, going on with RANDOM vectors", size)
        content["labels"]["llm_weights"] = "random"
        child = parse_size(recipe, size, content)
    return child


def _reasoner_of_size(recipe: Recipe, size: str, content: dict[str, Any]) -> Recipe:
    mirror, asset = os.environ.get("TINYEMO_MIRROR"), FAMILY[size].asset
    folder = Path(mirror) / "llms" / size if mirror else None
    if folder is not None and folder.is_dir():
        source = str(folder)
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            content["records"]["tokenizer"] = str(folder)
    elif asset is not None:
        source = asset
    elif recipe.family.random_weights:
        logger.warning("%s: its weights are out of reach, going on with RANDOM ones", size)
        source = f"random:{size}"
    else:
        raise AssetError(
            f"no source of the weights of {size} answers: put {FAMILY[size].llm} at TINYEMO_MIRROR/llms/{size}, or set "
            "family.random_weights = true, and every table says so"
        )
    content["reasoner"] |= {"llm": source, "llm_revision": None}
    return parse_size(recipe, size, content)


def choose_champion(results: list[TrainResult]) -> TrainResult:
    """Return the best by validation, never by test; real weights go before random ones, which no LLM can read."""
    real = [result for result in results if result.llm_weights == "real"]
    return max(real or results, key=lambda result: result.val_top1_accuracy or 0.0)


def _register_champion(run: tracking.RunHandle, recipe: Recipe, results: list[TrainResult]) -> dict[str, Any]:
    for result in results:
        run.log_metrics({f"test/top1_accuracy_{result.llm}": result.test_top1_accuracy})
    champion = choose_champion(results)
    facts = {"llm": champion.llm, "llm_weights": champion.llm_weights, "data": champion.data}
    version = tracking.register(
        champion.run_id,
        champion.model,
        recipe.family.registered_name,
        tags={**facts, "chosen_by": "val/top1_accuracy"},
        card=f"Projector of run [{champion.name}]({champion.run_url}), the best by validation of the family "
        f"[{recipe.name}]({run.url}). Its files are in `{champion.model}`; the run holds its data and code.",
    )
    promoted = promote_first(recipe.family.registered_name, version, runs=recipe.checkpoint.root)
    if promoted is None:
        logger.warning("%s version %s is registered; `tinyemo promote models:/%s/%s` compares it with the champion",
                       recipe.family.registered_name, version, recipe.family.registered_name, version)  # fmt: skip
    run.describe(
        f"Projectors of {len(results)} sizes. The best by validation is {champion.name}.",
        {r.llm: f"test top-1 {100 * r.test_top1_accuracy:.1f} % {notes(r)} ([run]({r.run_url}))" for r in results},
    )
    run.set_tags({"champion": champion.llm, "champion.version": version})
    rows = [
        SizeRow(
            name=r.llm,
            note=notes(r),
            loss_against_tokens=[],
            figures={"test top-1 accuracy": (100 * r.test_top1_accuracy, f"% of {r.num_test} images")},
        )
        for r in results
    ]
    run.log_text(to_toml(recipe), "recipe.toml")
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        plot_sizes(rows, here / "family.png", f"{recipe.name}: test top-1 by size")
        run.log_artifact(here / "family.png", "plots")
    return {"champion": champion.name, "version": version}


def _compare_sizes(
    run: tracking.RunHandle, recipe: Recipe, children: list[Recipe], results: list[ReasonerResult]
) -> dict[str, Any]:
    rows = [size_row(child, size) for child, size in zip(children, recipe.family.sizes, strict=True)]
    last = list(recipe.stages)[-1]
    losses = [f"last {last}/loss {row['figures'].get(f'{last}/loss', float('nan')):.4f}" for row in rows]
    table = {r.name: f"{loss} ([run]({r.run_url}))" for r, loss in zip(results, losses, strict=True)}
    run.describe(f"Reasoning models of {len(results)} sizes, trained in the stages {', '.join(recipe.stages)}.", table)
    for row in rows:
        run.log_metrics({f"{row['size']}/{key}": value for key, value in row["figures"].items()})
    run.log_text(json.dumps(rows, indent=1), "sizes.json")
    with tempfile.TemporaryDirectory() as name:
        for stage in recipe.stages:
            plot = Path(name) / f"sizes-{stage}.png"
            drawn = [drawn_row(row, stage, result) for row, result in zip(rows, results, strict=True)]
            plot_sizes(drawn, plot, f"{recipe.name}, {stage}: answers {results[0].answers}")
            run.log_artifact(plot, "plots")
    return {"sizes": list(recipe.family.sizes)}


def size_row(child: Recipe, size: str) -> dict[str, Any]:
    """Return the newest figures of each stage of a size, and its loss against tokens seen."""
    figures: dict[str, float] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for stage in child.stages:
        tokens, curve = 0.0, []
        for _, point in read_curve(f"{run_folder(child)}/{stage}"):
            tokens += point.get("train/tokens", 0.0)
            if "train/loss" in point:
                curve.append((tokens, point["train/loss"]))
                figures[f"{stage}/loss"] = point["train/loss"]
            figures |= {f"{stage}/{key.removeprefix('train/')}": point[key] for key in FIGURES if key in point}
        figures[f"{stage}/tokens"] = tokens
        curves[stage] = curve
    return {"size": size, "llm": child.reasoner.llm, "figures": figures, "loss_against_tokens": curves}


def drawn_row(row: dict[str, Any], stage: str, result: ReasonerResult) -> SizeRow:
    """Return a row of `size_row` for the plot of one stage."""
    weights = {"random LLM": result.llm_weights, "random tower": result.vision_weights}
    figures = {}
    for name, key, scale, unit in DRAWN:
        value = row["figures"].get(f"{stage}/{key}")
        if value is not None:
            figures[name] = (value / scale, unit)
    return SizeRow(
        name=row["size"],
        note=", ".join(part for part, kind in weights.items() if kind == "random"),
        loss_against_tokens=row["loss_against_tokens"][stage],
        figures=figures,
    )
