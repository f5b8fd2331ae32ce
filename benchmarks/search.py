"""Measure the cost of a search and its winner: `python benchmarks/search.py [--set section.key=value ...]`.

Needs the platform with Emotion6 ingested (`make demo`). It runs `search-emotion6` under a new name: a hundred trials on
shared features, the finalists, and the winner through `tinyemo train` over 5 seeds; then 3 trials of it as one
`tinyemo train` job each, for the ratio; then the published schedule's three losses in memory, on the same test images.
The search's own name is printed first: give it with --set name=... to go on with a benchmark that was interrupted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import write_results
from cluster.environment import load_platform_environment

PUBLISHED = ("cosine", "nt_xent", "info_nce")
SEEDS = range(5)
NUM_JOBS = 3
SAMPLE_S = 0.5
SEARCH_PROCESSES = ("ray::ResourceTrainable", "ray::IDLE", "ray::final_accuracy")


class Watch:
    """Samples memory while trials run: (trials ended, MiB of this process and Ray's workers, object store MiB)."""

    def __init__(self) -> None:
        self.num_trials = 0
        self.samples: list[tuple[int, float, float]] = []
        self.children: set[int] = set()
        self.is_over = threading.Event()

    def run(self) -> None:
        """Sample until `is_over`."""
        import ray

        while not self.is_over.wait(SAMPLE_S):
            if not ray.is_initialized():
                continue
            total = ray.cluster_resources().get("object_store_memory", 0.0)
            store = total - ray.available_resources().get("object_store_memory", total)
            self.samples.append((self.num_trials, _search_mib(), store / 2**20))


def _search_mib() -> float:
    """Return the proportional memory (MiB) of this process and of Ray's worker processes that may run trials."""
    total = 0
    for process in [psutil.Process(), *psutil.process_iter()]:
        try:
            title = " ".join(process.cmdline())
            if process.pid == os.getpid() or title.startswith(SEARCH_PROCESSES):
                total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


@contextmanager
def watching() -> Iterator[Watch]:
    """Sample memory while the block runs."""
    watch = Watch()
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.is_over.set()
        thread.join()


def run_search(overrides: list[str]) -> tuple[Any, Any, dict[str, Any]]:
    """Run the search; return its recipe, result and figures."""
    from orchestration.recipe import load_recipe
    from orchestration.search.search import tune
    from orchestration.search.trials import read_records

    recipe = load_recipe("search-emotion6", [f"name=bench-search-{int(time.time())}", *overrides])
    print(f"search {recipe.name}", flush=True)
    with watching() as watch:

        def on_trial(records: list[Any]) -> None:
            watch.num_trials = len(records)
            if len(records) >= recipe.search.num_trials:
                watch.is_over.set()  # what comes next is `tinyemo train`
            print(f"trial {len(records)}: {records[-1].ended} after {len(records[-1].curve)} epochs", flush=True)

        result = tune(recipe, on_trial=on_trial)
    records = read_records(f"{recipe.checkpoint.root}/{recipe.name}")
    figures: dict[str, Any] = {
        "search": recipe.name,
        "num_trials": len(records),
        "num_folds": recipe.search.num_folds,
        "finished": result.num_finished,
        "stopped_by_asha": result.num_stopped,
        "failed": result.num_failed,
        "epochs_trained": sum(len(record.curve) for record in records),
        "search_seconds": round(result.search_s, 1),
        "trials_per_minute": round(60 * len(records) / result.search_s, 2),
    }
    thirds = [[s for s in watch.samples if low <= s[0] < low + 0.34 * len(records)] for low in (0, 0.66 * len(records))]
    if all(thirds):
        figures |= {
            "search_peak_memory_mib": round(max(mib for _, mib, _ in watch.samples)),
            "object_store_mib_in_first_third_of_trials": round(max(store for *_, store in thirds[0]), 2),
            "object_store_mib_in_last_third_of_trials": round(max(store for *_, store in thirds[1]), 2),
        }
    return recipe, result, figures


def time_jobs(recipe: Any) -> dict[str, Any]:
    """Time one `tinyemo train` job for each of the first finished trials, in seconds."""
    from orchestration.recipe import to_toml
    from orchestration.search.trials import SEEN, rank_trials, read_records, trial_recipe

    trials = rank_trials(read_records(f"{recipe.checkpoint.root}/{recipe.name}"), SEEN)[:NUM_JOBS]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for trial in trials:
            name = f"{recipe.name}-job{trial.number}-{int(time.time())}"
            # One fold and one phase, which is less than the trial did.
            job = trial_recipe(recipe, {**trial.params, "train.refit": False}, name=name)
            path = Path(folder) / f"{name}.toml"
            path.write_text(to_toml(job))
            command = [str(Path(sys.executable).parent / "tinyemo"), "train", str(path), "--json"]
            started_at = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started_at)
            print(f"one tinyemo train job: {seconds[-1]:.1f} s", flush=True)
    return {"job_seconds": [round(s, 1) for s in seconds]}


def published_schedule() -> dict[str, Any]:
    """Return test top-1 of the published losses after 5 epochs on the whole train split, trained in memory."""
    from orchestration.assets.labels import label_embeddings
    from orchestration.jobs.prepare import prepare
    from orchestration.recipe import load_recipe
    from orchestration.search.trial import FoldTraining, read_search_data, shared_rows
    from orchestration.search.trials import trial_recipe

    torch.set_num_threads(1)
    recipe = load_recipe("emotion6", ["data.validation_fraction=0"])
    preparation = prepare(recipe)
    data = read_search_data(preparation, [label_embeddings(recipe.labels)])
    test = shared_rows(preparation.record_set(preparation.selection.test), preparation.selection.test)
    figures: dict[str, Any] = {}
    for loss in PUBLISHED:
        found = []
        for seed in SEEDS:
            training = FoldTraining(trial_recipe(recipe, {"loss.name": loss}, seed=seed), data, torch.device("cpu"))
            training.train_to(training.plan.num_steps)
            found.append(training.accuracy(test, data.words))
        figures[loss] = {"mean": fmean(found), "se": standard_error(found), "by_seed": found}
    return figures


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean; 0 for one value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    """Run all parts and write benchmarks/results/search.json."""
    load_platform_environment()
    overrides = [text for text in sys.argv[1:] if text != "--set"]
    recipe, result, figures = run_search(overrides)
    figures["load_average_after_search"] = os.getloadavg()[2]
    figures |= time_jobs(recipe)
    figures["load_average_after_jobs"] = os.getloadavg()[2]
    per_trial_s = figures["search_seconds"] / figures["num_trials"]
    figures |= {
        "packed_vs_job_ratio": round(median(figures["job_seconds"]) / per_trial_s, 1),
        "winner_params": result.params,
        "winner_val_top1": result.val_top1_accuracy,
        "winner_test_top1_mean": result.test_top1_mean,
        "winner_test_top1_se": result.test_top1_se,
        "winner_test_top1_by_seed": [winner["test_top1_accuracy"] for winner in result.winners],
        "num_test": result.num_test,
        "published_schedule_test_top1": published_schedule(),
    }
    best = max(figures["published_schedule_test_top1"].items(), key=lambda item: item[1]["mean"])
    gain = figures["winner_test_top1_mean"] - best[1]["mean"]
    figures |= {
        "best_published_loss": best[0],
        "gain_over_best_published_points": round(100 * gain, 2),
        "gain_se_points": round(100 * (result.test_top1_se**2 + best[1]["se"] ** 2) ** 0.5, 2),
    }
    for key, value in figures.items():
        print(f"{key}: {value}")
    write_results("search", figures)


if __name__ == "__main__":
    main()
