"""Accuracy and speed of the projector: `python benchmarks/projector.py [accuracy] [seeds] [job-seeds] [speed]`.

accuracy: the published schedule (5 epochs over the whole train split, no choice of epoch) through the real job, from S3
through Ray Data and two DeepSpeed workers, 5 seeds a loss; needs the platform with Emotion6 ingested (`make demo`).
Finished runs are not repeated, so an interrupted benchmark goes on.

seeds: the same in a plain in-memory loop, 25 seeds.

job-seeds: the loss that is best in that loop through the real job, over the same 25 seeds.

speed: optimizer steps of DeepSpeed engines on batches in memory, at world size 1 and 2, beside a plain torch loop of
the same model on one thread, interleaved in one process; medians. Label vectors are random, which speed ignores.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.multiprocessing

if TYPE_CHECKING:
    from orchestration.jobs.results import TrainResult

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import RESULTS, write_results
from orchestration.data.batch import Batch
from orchestration.data.plan import rank_slice
from orchestration.jobs.projector import build_projector, train_batch
from orchestration.recipe import Recipe, load_recipe, parse_recipe
from orchestration.services.engine import build_engine, build_optimizer, build_schedule
from orchestration.services.tracking import git_state
from tinyemo.label_embeddings import LabelEmbeddings, known_words
from tinyemo.objective import Objective, build_objective
from tinyemo.taxonomies import TAXONOMIES

LOSSES = ("cosine", "nt_xent", "info_nce", "prototype")
PUBLISHED = LOSSES[:3]
SEEDS, MANY_SEEDS = range(5), range(25)
REFERENCE = {"cosine": 0.730, "nt_xent": 0.735, "info_nce": 0.723}
ROUNDS, STEPS = 5, 8


def train_seeds(loss: str, seeds: range) -> list[TrainResult]:
    """The published schedule with a loss through the real job, seed after seed."""
    from cluster.environment import load_platform_environment

    load_platform_environment()
    from orchestration.jobs.job import train

    commit = git_state()["git_commit"][:8]
    results = []
    for seed in seeds:
        name = f"bench-{commit}-{loss.replace('_', '-')}-{seed}"
        settings = [f"name={name}", f"loss.name={loss}", f"train.seed={seed}", "data.validation_fraction=0.0"]
        results.append(train(load_recipe("emotion6", [*settings, "experiment=benchmarks"])))
        print(f"{name}: {results[-1].test_top1_accuracy:.4f} on {results[-1].num_test} test images", flush=True)
    return results


def measure_job_seeds() -> dict[str, Any]:
    """The best published loss of the plain loop over 25 seeds, through the real job over the same seeds."""
    path = RESULTS / "projector.json"
    loops = json.loads(path.read_text())["test_top1_of_a_plain_loop_over_25_seeds"]
    loss = max(PUBLISHED, key=lambda name: loops[name]["mean"])
    accuracies = [result.test_top1_accuracy for result in train_seeds(loss, MANY_SEEDS)]
    mean, error = statistics.mean(accuracies), statistics.stdev(accuracies) / len(accuracies) ** 0.5
    equal = sum(ours == loop for ours, loop in zip(accuracies, loops[loss]["by_seed"], strict=True))
    print(f"{loss}: real job, {len(accuracies)} seeds {mean:.4f} ({error:.4f}); equal to the plain loop in {equal}")
    found = {"loss": loss, "mean": mean, "standard_error": error, "by_seed": accuracies, "equal_to_plain_loop": equal}
    return {"test_top1_of_the_job_over_25_seeds": found}


def measure_accuracy() -> dict[str, Any]:
    """Test top-1 of every loss and seed, by the real job."""
    means: dict[str, float] = {}
    figures: dict[str, Any] = {"by_seed": {}, "standard_error": {}, "samples_per_s_through_ray": {}}
    for loss in LOSSES:
        results = train_seeds(loss, SEEDS)
        accuracies = [result.test_top1_accuracy for result in results]
        means[loss] = statistics.mean(accuracies)
        figures["by_seed"][loss] = accuracies
        figures["standard_error"][loss] = statistics.stdev(accuracies) / len(accuracies) ** 0.5
        figures["samples_per_s_through_ray"][loss] = statistics.median(r.samples_per_s for r in results)
        figures |= {"num_test": results[0].num_test, "llm_weights": results[0].llm_weights, "data": results[0].data}
        print(
            f"{loss}: mean test top-1 {means[loss]:.4f} (standard error {figures['standard_error'][loss]:.4f}), "
            f"reference code on the same images {REFERENCE.get(loss, 'none')}",
            flush=True,
        )
    best = max(PUBLISHED, key=lambda loss: means[loss])
    verdict = {
        "best_of_the_published": best,
        "best_is_at_least_0.735": means[best] >= 0.735,
        "none_is_below_0.715": min(means[loss] for loss in PUBLISHED) >= 0.715,
    }
    return {"test_top1_mean": means, "accuracy": figures, "verdict": verdict}


def measure_seeds() -> dict[str, Any]:
    """The same schedule in a plain in-memory torch loop over 25 seeds, since 5 seeds leave a standard error of 0.003.

    Its first five seeds must be the real job's: the loop is a check of the engine as well.
    """
    from cluster.environment import load_platform_environment

    load_platform_environment()
    from orchestration.assets.labels import label_embeddings
    from orchestration.data.sets import features_array, read_records
    from orchestration.jobs.prepare import prepare
    from orchestration.jobs.projector import objective_of

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for loss_name in LOSSES:
        accuracies = []
        for seed in MANY_SEEDS:
            settings = [f"loss.name={loss_name}", f"train.seed={seed}", "data.validation_fraction=0.0"]
            recipe = load_recipe("emotion6", settings)
            ready = prepare(recipe)
            streams = ready.streams(num_epochs=recipe.train.num_epochs, is_refit=False, is_tested=False)
            plan = streams["train"].plan
            objective = objective_of(recipe, label_embeddings(recipe.labels), ready.words)
            rows, tested = ready.selection.train, ready.selection.test
            features, test = (
                features_array(read_records(part, np.arange(part.num_rows), ["features"]))
                for part in (ready.record_set(rows), ready.record_set(tested))
            )
            model = build_projector(recipe)
            optimizer = build_optimizer(model, recipe.optimizer)
            schedule = build_schedule(recipe.optimizer, plan.num_steps)(optimizer)
            for step in range(plan.num_steps):
                batch = plan.refs(step, step + 1).row
                loss = objective.step_loss(model, torch.tensor(features[batch]).float(), rows.label[batch], step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                scores = model.eval()(torch.tensor(test).float()) @ objective.label_embeds.T
            accuracies.append(float((scores.argmax(1) == torch.tensor(tested.label)).double().mean()))
        mean, error = statistics.mean(accuracies), statistics.stdev(accuracies) / len(accuracies) ** 0.5
        found[loss_name] = {"mean": mean, "standard_error": error, "by_seed": accuracies}
        first = statistics.mean(accuracies[:5])
        print(f"{loss_name}: plain loop, 25 seeds {mean:.4f} ({error:.4f}); seeds 0 to 4 {first:.4f}", flush=True)
    return {"test_top1_of_a_plain_loop_over_25_seeds": found}


def speed_recipe(loss: str, batch_size: int, llm: str, hidden_size: int) -> Recipe:
    """The published recipe with what is varied here."""
    content = {
        "name": "speed",
        "loss": {"name": loss},
        "train": {"global_batch_size": batch_size},
        "labels": {"llm": llm},
        "projector": {"hidden_size": hidden_size},
    }
    return parse_recipe(content, source="benchmark")


def random_objective(recipe: Recipe) -> Objective:
    """The recipe's loss against random label vectors."""
    words = known_words()
    vectors = torch.randn(len(words), recipe.projector.hidden_size, generator=torch.Generator().manual_seed(1))
    labels = LabelEmbeddings(words, vectors, "random", "random", "random", "word")
    return build_objective(recipe.loss, labels, TAXONOMIES["ekman"].words, synonyms_probability=0, seed=0)


def random_batches(batch_size: int, rank: int, world_size: int) -> list[Batch]:
    """One batch for each step of a round."""
    rng = np.random.default_rng(0)
    part = rank_slice(batch_size, rank, world_size)
    whole = [
        (rng.standard_normal((batch_size, 768)).astype(np.float16), rng.integers(0, 6, batch_size))
        for _ in range(STEPS)
    ]
    ids = [str(i) for i in range(batch_size)][part]
    is_real = torch.ones(len(ids), dtype=torch.bool)
    tensors = [(torch.tensor(features[part]), torch.tensor(labels)) for features, labels in whole]
    return [
        Batch(0, step, ids, is_real, features, labels[part], labels) for step, (features, labels) in enumerate(tensors)
    ]


def plain_steps(recipe: Recipe, objective: Objective, batches: list[Batch]) -> Callable[[], None]:
    """The same model, loss and optimizer without DeepSpeed or a process group's collectives."""
    model = build_projector(recipe)
    optimizer = build_optimizer(model, recipe.optimizer)
    schedule = build_schedule(recipe.optimizer, 10_000)(optimizer)

    def run() -> None:
        for batch in batches:
            loss = objective.step_loss(model, batch.features.float(), batch.global_labels.numpy(), batch.step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            float(loss.detach())

    return run


def engine_steps(recipe: Recipe, objective: Objective, batches: list[Batch], world_size: int) -> Callable[[], None]:
    """The training loop's own step on a DeepSpeed engine."""
    engine = build_engine(
        build_projector(recipe),
        recipe.engine,
        recipe.optimizer,
        num_steps=10_000,
        global_batch_size=recipe.train.global_batch_size,
        world_size=world_size,
    )

    def run() -> None:
        for batch in batches:
            float(train_batch(engine, objective, batch, torch.device("cpu"))["train/loss"])

    return run


def run_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    """Time every combination on one rank; the plain loop beside it at world size 1."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    found = {}
    for llm, hidden_size in (("smollm2-135m", 576), ("tinyemo-1.5b", 2048)):
        for batch_size in (32, 256):
            for loss in LOSSES:
                recipe = speed_recipe(loss, batch_size, llm, hidden_size)
                objective, batches = random_objective(recipe), random_batches(batch_size, rank, world_size)
                runs = {"deepspeed": engine_steps(recipe, objective, batches, world_size)}
                if world_size == 1:
                    runs["plain"] = plain_steps(recipe, objective, batches)
                found[f"{loss}/batch {batch_size}/H {hidden_size}"] = timed(runs, batch_size)
    torch.save(found, Path(folder) / f"{world_size}-{rank}.pt")
    torch.distributed.destroy_process_group()


def timed(runs: dict[str, Callable[[], None]], batch_size: int) -> dict[str, float]:
    """Median samples/s of each run, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            started_at = time.perf_counter()
            run()
            if turn:  # the first is for warming up
                seconds[name].append(time.perf_counter() - started_at)
    return {name: STEPS * batch_size / statistics.median(values) for name, values in seconds.items()}


def measure_speed() -> dict[str, Any]:
    """Samples/s by combination and world size, and the ratio to the plain loop."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for world_size in (1, 2):
        with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            torch.multiprocessing.spawn(run_rank, (world_size, port, folder), nprocs=world_size)
            found[world_size] = torch.load(Path(folder) / f"{world_size}-0.pt", weights_only=True)
    samples: dict[str, dict[str, dict[str, float]]] = {loss: {} for loss in LOSSES}
    ratios: dict[str, float] = {}
    for key, at_one in found[1].items():
        loss, setting = key.split("/", 1)
        two = found[2][key]["deepspeed"]
        samples[loss][setting] = {
            "plain loop": at_one["plain"],
            "world size 1": at_one["deepspeed"],
            "world size 2": two,
        }
        ratios[f"{key}/world size 1"] = at_one["deepspeed"] / at_one["plain"]
        ratios[f"{key}/world size 2"] = two / at_one["plain"]
        print(
            f"{key}: plain {at_one['plain']:,.0f}, DeepSpeed at world size 1 {at_one['deepspeed']:,.0f} "
            f"and 2 {two:,.0f} samples/s",
            flush=True,
        )
    return {"samples_per_s": samples, "ours_vs_plain_loop": ratios}


if __name__ == "__main__":
    known = {
        "accuracy": measure_accuracy, "seeds": measure_seeds, "job-seeds": measure_job_seeds, "speed": measure_speed,
    }  # fmt: skip
    parts = sys.argv[1:] or list(known)
    if unknown := [part for part in parts if part not in known]:
        sys.exit(f"unknown part {', '.join(unknown)}: choose from {', '.join(known)}")
    for part in parts:
        print("written", write_results("projector", known[part]()))
