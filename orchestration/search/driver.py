"""The search's driver: run the trials, try the best again, train the winner, test it once, record.

Whatever is done stands in S3 under the search's name, so the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orchestration.assets.labels import label_embeddings
from orchestration.jobs.job import train
from orchestration.jobs.lease import write_claim
from orchestration.jobs.prepare import Preparation
from orchestration.jobs.results import TrainResult
from orchestration.recipe import Recipe, to_toml
from orchestration.search.finalists import Finalist, judge_finalists
from orchestration.search.plots import plot_best_so_far, plot_parallel_coordinates
from orchestration.search.records import TrialRecord, pareto_front, rank_trials, read_records, write_record
from orchestration.search.result import OnTrial, TuneResult
from orchestration.search.run import objectives, run_trials
from orchestration.search.tracking import open_trial_log
from orchestration.search.trial import SearchData, read_search_data
from orchestration.search.trial_recipes import first_point, trial_recipe, winner_recipe
from orchestration.services import storage, tracking
from orchestration.services.ray_cluster import connect
from tinyemo.errors import TrainingError

if TYPE_CHECKING:
    from orchestration.jobs.attempts import Progress

logger = logging.getLogger(__name__)


def run_search(
    preparation: Preparation,
    claim: str | None,
    folder: str,
    *,
    on_trial: OnTrial | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Run what `prepare` and `check_search` found, from where an earlier call left it.

    Args:
        claim: the MLflow run that holds the name, None where the name is free.
        folder: of the search in S3.

    Raises:
        TinyEmoError: see `orchestration.search.tune.tune`.
    """
    recipe = preparation.recipe
    data = _read_data(preparation)
    connect()
    with tracking.open_run(
        recipe.experiment,
        recipe.name,
        params=recipe.model_dump(mode="json", exclude={"search": {"space"}}) | {"space": _space_texts(recipe)},
        tags={"kind": "search", "data": preparation.manifest.data, "data.digest": preparation.manifest.digest},
        resume_run_id=claim,
    ) as run:
        if claim is None:
            write_claim(folder, recipe, preparation.data_digests(), run.run_id)
        records, search_s = _search(recipe, data, folder, run, on_trial)
        _log_search(recipe, run, records)
        winner, finalists = _choose(recipe, data, folder, records)
        results, version, winner_uri = _train_winner(recipe, folder, run, winner, progress)
        accuracies = [r.test_top1_accuracy for r in results]
        ends = [record.ended for record in records]
        tuned = TuneResult(
            name=recipe.name,
            run_id=run.run_id,
            run_url=run.url,
            num_finished=ends.count("finished"),
            num_stopped=ends.count("stopped"),
            num_failed=ends.count("failed"),
            search_s=search_s,
            params=winner.params,
            winner_trial=winner.number,
            val_top1_accuracy=finalists[0].mean if finalists else winner.value(objectives(recipe.search)[0]),
            finalists=[asdict(finalist) for finalist in finalists],
            front=[record.number for record in _candidates(recipe, records)] if len(_metrics(recipe)) > 1 else [],
            winner_recipe=winner_uri,
            winners=[asdict(r) for r in results],
            test_top1_mean=statistics.fmean(accuracies),
            test_top1_se=statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else 0.0,
            num_test=results[0].num_test,
            registered_version=version,
        )
        run.log_metrics({"test/top1_accuracy": tuned.test_top1_mean, "test/top1_accuracy_se": tuned.test_top1_se})
        storage.write_json(f"{folder}/result.json", asdict(tuned))
    return tuned


def _metrics(recipe: Recipe) -> list[str]:
    return objectives(recipe.search)


def _space_texts(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The space for MLflow: what is None is left out."""
    return {knob: item.model_dump(mode="json", exclude_defaults=True) for knob, item in recipe.search.knobs().items()}


def _read_data(preparation: Preparation) -> SearchData:
    """Everything a trial reads, with the label embeddings of every template that the space holds."""
    recipe = preparation.recipe
    knob = recipe.search.knobs().get("labels.template")
    templates = [str(value) for value in knob.examples()] if knob else [recipe.labels.template]
    configs = [recipe.labels.model_copy(update={"template": template}) for template in templates]
    return read_search_data(preparation, [label_embeddings(config) for config in configs])


def _search(
    recipe: Recipe, data: SearchData, folder: str, run: tracking.RunHandle, on_trial: OnTrial | None
) -> tuple[list[TrialRecord], float]:
    """Every trial's record, and the seconds that they took over all starts."""
    records = read_records(folder)
    if records:
        logger.warning("%s goes on after %d trials", recipe.name, len(records))
    started_at, before_s = time.monotonic(), _spent_s(folder)

    def write_spent() -> float:
        """After each trial, since a driver that is killed says nothing at its end."""
        search_s = before_s + time.monotonic() - started_at
        storage.write_json(f"{folder}/spent.json", {"search_s": search_s})
        return search_s

    with open_trial_log(run, recipe.name, records) as log:

        def end(record: TrialRecord) -> None:
            write_record(folder, record)
            write_spent()
            records.append(record)
            log.put(record)
            if on_trial is not None:
                on_trial(records)

        run_trials(recipe, data, records, first_point(recipe), end)
        search_s = write_spent()
    return records, search_s


def _spent_s(folder: str) -> float:
    uri = f"{folder}/spent.json"
    return float(storage.read_json(uri)["search_s"]) if storage.exists(uri) else 0.0


def _candidates(recipe: Recipe, records: list[TrialRecord]) -> list[TrialRecord]:
    """Finished trials, best first; with two objectives those of the Pareto front alone."""
    metrics = _metrics(recipe)
    return rank_trials(records, metrics[0]) if len(metrics) == 1 else pareto_front(records, metrics)


def _choose(
    recipe: Recipe, data: SearchData, folder: str, records: list[TrialRecord]
) -> tuple[TrialRecord, list[Finalist]]:
    """The winner, by validation alone, and the finalists it was chosen from.

    Raises:
        TrainingError: no trial finished.
    """
    candidates = _candidates(recipe, records)
    if not candidates:
        errors = sorted({record.error for record in records if record.error})
        raise TrainingError(
            f"none of {len(records)} trials of {recipe.name} finished ({'; '.join(errors[:2]) or 'all were stopped'}): "
            "narrow search.space or raise search.reduction_factor, under another name"
        )
    chosen = candidates[: recipe.search.num_finalists]
    # The recipe's own values are judged beside them, however far ASHA let them come: a search must not end below them.
    own = first_point(recipe)
    chosen += [record for record in records if record.params == own and record not in chosen and not record.error][:1]
    finalists = judge_finalists(recipe, data, folder, chosen)
    by_number = {record.number: record for record in chosen}
    return (by_number[finalists[0].trial] if finalists else candidates[0]), finalists


def _log_search(recipe: Recipe, run: tracking.RunHandle, records: list[TrialRecord]) -> None:
    metric = _metrics(recipe)[0]
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        (here / "search.toml").write_text(to_toml(recipe))
        plot_best_so_far(records, metric, here / "best_so_far.png", f"{recipe.name}: {len(records)} trials")
        knobs = recipe.search.knobs()
        plot_parallel_coordinates(records, knobs, metric, here / "parallel_coordinates.png", recipe.name)
        run.log_artifact(here / "search.toml")
        for plot in ("best_so_far.png", "parallel_coordinates.png"):
            run.log_artifact(here / plot, "plots")
    best = rank_trials(records, metric)
    ends = [record.ended for record in records]
    run.log_metrics({f"search/{ended}": ends.count(ended) for ended in ("finished", "stopped", "failed")})
    if best:
        run.log_metrics({f"best/{metric.removeprefix('val/')}": best[0].value(metric)})


def _train_winner(
    recipe: Recipe, folder: str, run: tracking.RunHandle, winner: TrialRecord, progress: Progress | None
) -> tuple[list[TrainResult], str, str]:
    """Runs of `tinyemo train` by seed, the registered version, and where the recipe lies."""
    chosen = winner_recipe(recipe, winner)
    uri = f"{folder}/winner.toml"
    storage.write_bytes(uri, to_toml(chosen).encode())
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "winner.toml"
        path.write_text(to_toml(chosen))
        run.log_artifact(path)
    results: list[TrainResult] = []
    for offset in range(recipe.search.winner_seeds):
        seed = chosen.train.seed + offset
        seeded = trial_recipe(chosen, {}, name=f"{chosen.name}-seed{seed}", seed=seed)
        results.append(cast("TrainResult", train(seeded, parent_run_id=run.run_id, progress=progress)))
    best = max(results, key=lambda result: result.val_top1_accuracy or 0.0)
    version = tracking.register(
        best.run_id,
        best.model,
        recipe.search.registered_name,
        tags={"search": recipe.name, "recipe": uri, "chosen_by": "val/top1_accuracy", "data": best.data,
              "llm": best.llm, "llm_weights": best.llm_weights},
    )  # fmt: skip
    run.set_tags({"winner.trial": str(winner.number), "winner.version": version})
    return results, version, uri
