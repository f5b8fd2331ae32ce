"""One projector for each size of the family, under one parent run; the best by validation is registered."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from orchestration.assets.labels import label_embeddings
from orchestration.jobs.lease import finish_family, is_finished_family
from orchestration.plots import FamilyRow, plot_family
from orchestration.recipe import Recipe, parse_size, recipes_of_sizes, to_toml
from orchestration.services import tracking
from orchestration.training.result import OnReport, TrainResult, notes
from orchestration.training.train import train
from tinyemo.errors import AssetError, ConfigError
from tinyemo.families import FAMILY

logger = logging.getLogger(__name__)


def recipe_for_size(recipe: Recipe, size: str) -> Recipe:
    """The recipe of one child: the size's LLM and width; seeded random vectors where its table is out of reach.

    Raises:
        AssetError: the table is out of reach and the recipe does not say family.random_weights = true.
        ConfigError: family.overrides of the size are no fields or values of a recipe.
    """
    content = recipe.model_dump(mode="json")
    content["name"] = f"{recipe.name}-{size}"
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


def choose_champion(results: list[TrainResult]) -> TrainResult:
    """The best by validation, never by test; sizes with real weights go before random ones, which no LLM can read."""
    real = [result for result in results if result.llm_weights == "real"]
    return max(real or results, key=lambda result: result.val_top1_accuracy or 0.0)


def train_family(recipe: Recipe, *, on_report: OnReport | None = None) -> list[TrainResult]:
    """Train every size of `recipe.family.sizes` and register the champion.

    Raises:
        AssetError: a size has no weights, see `recipe_for_size`; nothing was started.
        TinyEmoError: see `orchestration.train.train`.
    """
    if not recipe.data.validation_fraction:
        raise ConfigError("data.validation_fraction: a family needs validation rows to choose its champion by")
    children = recipes_of_sizes(recipe, recipe_for_size)
    done = f"{recipe.checkpoint.root}/{recipe.name}/family.json"
    if is_finished_family(done, recipe):
        return [train(child) for child in children]  # finished: each returns its result as it stands
    from orchestration.services.ray_cluster import connect

    connect()  # before the run is opened: Ray's SIGTERM handler is what ends it KILLED
    earlier = tracking.find_run(recipe.experiment, recipe.name)
    with tracking.open_run(
        recipe.experiment,
        recipe.name,
        params=recipe.model_dump(mode="json"),
        tags={"kind": "family"},
        resume_run_id=earlier.run_id if earlier else None,
    ) as run:
        results = [train(child, parent_run_id=run.run_id, on_report=on_report) for child in children]
        for result in results:
            run.log_metrics({f"test/top1_accuracy_{result.llm}": result.test_top1_accuracy})
        champion = choose_champion(results)
        version = tracking.register(
            champion.run_id,
            "projector",
            recipe.family.registered_name,
            tags={
                "llm": champion.llm,
                "llm_weights": champion.llm_weights,
                "data": champion.data,
                "chosen_by": "val/top1_accuracy",
            },
        )
        run.set_tags({"champion": champion.llm, "champion.version": version})
        _log_overview(run, recipe, results)
        finish_family(done, recipe, {"champion": champion.name, "version": version})
    return results


def _log_overview(run: tracking.RunHandle, recipe: Recipe, results: list[TrainResult]) -> None:
    rows: list[FamilyRow] = [
        {"name": r.llm, "top1_accuracy": r.test_top1_accuracy, "num_samples": r.num_test, "note": notes(r)}
        for r in results
    ]
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        (here / "recipe.toml").write_text(to_toml(recipe))
        plot_family(rows, here / "family.png", f"{recipe.name}: test top-1 by size")
        run.log_artifact(here / "recipe.toml")
        run.log_artifact(here / "family.png", "plots")
