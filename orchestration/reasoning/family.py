"""One reasoning model for each size of the family, side by side under one parent run."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from orchestration.jobs.lease import finish_family, is_finished_family
from orchestration.jobs.stage_state import read_curve
from orchestration.plots import SizeRow, plot_sizes
from orchestration.reasoning.result import OnReport, ReasonerResult
from orchestration.reasoning.train import train_reasoner
from orchestration.recipe import Recipe, parse_size, recipes_of_sizes
from orchestration.services import tracking
from tinyemo.errors import AssetError
from tinyemo.families import FAMILY

logger = logging.getLogger(__name__)

DRAWN = (
    ("speed", "tokens_per_s", 1, "tokens/s"),
    ("memory", "peak_memory_bytes", 2**30, "GiB a rank, peak"),
    ("compute", "model_flops_per_s", 1e9, "model GFLOP/s"),
    ("utilisation", "mfu", 0.01, "% of the GPU's peak"),
)
"""Panels of the plot: name, figure, what it is divided by, unit; one that no stage has, as on a CPU the last, is left
out."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
FIGURES = ("train/tokens_per_s", "train/peak_memory_bytes", "train/model_flops_per_s", "train/mfu")


def recipe_for_size(recipe: Recipe, size: str) -> Recipe:
    """The recipe of one child: the size's language model, seeded random weights where its own are out of reach, the
    tokenizer that lies beside its weights, and what family.overrides says.

    Raises:
        AssetError: the weights are out of reach, and the recipe does not say family.random_weights = true.
        ConfigError: its overrides are no fields or values of a recipe.
    """
    content = recipe.model_dump(mode="json")
    content["name"] = f"{recipe.name}-{size}"
    mirror = os.environ.get("TINYEMO_MIRROR")
    folder = Path(mirror) / "llms" / size if mirror else None
    asset = FAMILY[size].asset
    if folder is not None and folder.is_dir():
        source = str(folder)
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
    if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        content["records"]["tokenizer"] = str(folder)
    return parse_size(recipe, size, content)


def train_reasoner_family(recipe: Recipe, *, on_report: OnReport | None = None) -> list[ReasonerResult]:
    """Train the stages of a recipe at every size of `recipe.family.sizes`.

    Raises:
        AssetError: a size has no weights, see `recipe_for_size`; nothing was started.
        TinyEmoError: see `train_reasoner`.
    """
    children = recipes_of_sizes(recipe, recipe_for_size)
    done = f"{recipe.checkpoint.root}/{recipe.name}/family.json"
    if is_finished_family(done, recipe):
        return [train_reasoner(child) for child in children]  # finished: each returns its result as it stands
    from orchestration.services.ray_cluster import connect

    connect()  # before the run is opened: Ray's SIGTERM handler is what ends it KILLED
    earlier = tracking.find_run(recipe.experiment, recipe.name)
    with tracking.open_run(
        recipe.experiment,
        recipe.name,
        params=recipe.model_dump(mode="json"),
        tags={"kind": "reasoner-family"},
        resume_run_id=earlier.run_id if earlier else None,
    ) as run:
        results = [train_reasoner(child, parent_run_id=run.run_id, on_report=on_report) for child in children]
        rows = [size_row(child, size) for child, size in zip(children, recipe.family.sizes, strict=True)]
        for row in rows:
            run.log_metrics({f"{row['size']}/{key}": value for key, value in row["figures"].items()})
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "sizes.json"
            path.write_text(json.dumps(rows, indent=1))
            run.log_artifact(path)
            for stage in recipe.stages:
                plot = Path(name) / f"sizes-{stage}.png"
                drawn = [drawn_row(row, stage, result) for row, result in zip(rows, results, strict=True)]
                plot_sizes(drawn, plot, f"{recipe.name}, {stage}: answers {results[0].answers}")
                run.log_artifact(plot, "plots")
        finish_family(done, recipe, {"sizes": list(recipe.family.sizes)})
    return results


def size_row(child: Recipe, size: str) -> dict[str, Any]:
    """What a size's stages say, side by side: newest figures of each stage, and its loss against tokens seen."""
    figures: dict[str, float] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for stage in child.stages:
        tokens, curve = 0.0, []
        for _, point in read_curve(f"{child.checkpoint.root}/{child.name}/{stage}"):
            tokens += point.get("train/tokens", 0.0)
            if "train/loss" in point:
                curve.append((tokens, point["train/loss"]))
                figures[f"{stage}/loss"] = point["train/loss"]
            figures |= {f"{stage}/{key.removeprefix('train/')}": point[key] for key in FIGURES if key in point}
        figures[f"{stage}/tokens"] = tokens
        curves[stage] = curve
    return {"size": size, "llm": child.reasoner.llm, "figures": figures, "loss_against_tokens": curves}


def drawn_row(row: dict[str, Any], stage: str, result: ReasonerResult) -> SizeRow:
    """A size's row of `size_row` for the plot of one stage."""
    weights = {"random LLM": result.llm_weights, "random tower": result.vision_weights}
    figures = {}
    for name, key, scale, unit in DRAWN:
        value = row["figures"].get(f"{stage}/{key}")
        if value is not None:
            figures[name] = (value / scale, unit)
    return SizeRow(
        name=row["size"],
        note=", ".join(said for said, kind in weights.items() if kind == "random"),
        loss_against_tokens=row["loss_against_tokens"][stage],
        figures=figures,
    )
