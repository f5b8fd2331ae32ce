"""The main job on the session's platform: what a run leaves behind, what stops it, and what it does not depend on."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job_runner import RUNS, Jobs, Outcome

from orchestration.data.manifest import Manifest, read_file
from orchestration.recipe import load_recipe
from orchestration.services import storage, tracking
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import TAXONOMIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Dropout on, so that equal losses show that the random state came back too; every part of the engine is sharded.
EXACT = """
[projector]
dropout = 0.2
[train]
num_epochs = 3
[engine]
zero_stage = 3
precision = "fp32"
"""
FAMILY = """
[data]
num_readers = 1
[projector]
dropout = 0.0
[train]
num_epochs = 2
[engine]
precision = "fp32"
[family]
sizes = ["smollm2-135m", "tinyemo-700m"]
random_weights = true
registered_name = "jobs-projector"
overrides = { tinyemo-700m = ["workers.num_workers=1"] }
"""

AT_ONCE_S = 60.0
"""A hang, not a timing: to train again would take longer."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that went through without a disturbance."""

    recipe: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> FinishedRun:
    """Trained on train, then refitted on train and validation."""
    recipe = jobs.recipe("undisturbed", EXACT)
    outcome = jobs.run("train", recipe, "--set", "train.refit=true", "--json")
    return FinishedRun(recipe, outcome.document[0])


@pytest.fixture(scope="module")
def manifest(jobs: Jobs) -> Manifest:
    return jobs.manifest("emotion6")


@pytest.fixture(scope="module")
def test_parquet(jobs: Jobs, manifest: Manifest) -> Path:
    """The test split as a user's own Parquet file."""
    with jobs.connected():
        parts = [pq.read_table(pa.BufferReader(read_file(manifest, s))) for s in manifest.shards if s.split == "test"]
    path = jobs.folder / "test.parquet"
    pq.write_table(pa.concat_tables(parts).select(["id", "label", "features"]), path)
    return path


@dataclass(frozen=True)
class DisturbedRun:
    """A run that was stopped twice and lost a worker, and what was seen on the way."""

    terminated: Outcome
    interrupted: Outcome
    finished: Outcome
    statuses: list[str]
    """In MLflow, after each command."""
    stopped_at: int
    killed_at: int


@pytest.fixture(scope="module")
def disturbed(jobs: Jobs) -> DisturbedRun:
    """SIGTERM before the first checkpoint, Ctrl-C after one, then SIGKILL to a worker in mid-epoch."""
    recipe = jobs.recipe("disturbed", EXACT)
    arguments = ("train", recipe, "--set", "checkpoint.every_steps=10")
    statuses = []

    command = jobs.start(*arguments)
    jobs.wait_for_run("disturbed", command)
    command.process.send_signal(signal.SIGTERM)
    terminated = command.wait()
    statuses += [run.info.status for run in jobs.mlflow_runs("disturbed")]

    command = jobs.start(*arguments)
    stopped_at = jobs.wait_for_step("disturbed", 1, command)
    command.process.send_signal(signal.SIGINT)
    interrupted = command.wait()
    statuses += [run.info.status for run in jobs.mlflow_runs("disturbed")]

    command = jobs.start(*arguments, "--json")
    killed_at = jobs.wait_for_step("disturbed", stopped_at + 10, command)
    workers = jobs.train_workers()
    assert len(workers) == 2
    workers[0].kill()
    finished = command.wait()
    statuses += [run.info.status for run in jobs.mlflow_runs("disturbed")]
    return DisturbedRun(terminated, interrupted, finished, statuses, stopped_at, killed_at)


def test_every_test_row_is_counted_once(undisturbed: FinishedRun, manifest: Manifest) -> None:
    result = undisturbed.result
    assert result["data"] == manifest.data
    assert result["num_test"] == manifest.splits["test"].rows
    assert result["words"] == list(TAXONOMIES["ekman"].words)
    true_counts = [sum(row) for row in result["test_confusion"]]
    assert true_counts == [manifest.splits["test"].labels[word] for word in result["words"]]
    correct = sum(row[i] for i, row in enumerate(result["test_confusion"]))
    assert result["test_top1_accuracy"] == correct / result["num_test"]
    if manifest.data == "real":
        assert result["num_test"] == 306
        assert result["test_top1_accuracy"] > 0.65


def test_refit_trains_on_validation_too_for_the_best_number_of_epochs(
    jobs: Jobs, undisturbed: FinishedRun, manifest: Manifest
) -> None:
    result = undisturbed.result
    num_train = manifest.splits["train"].rows
    accuracies = [
        metrics["val/top1_accuracy"] for _, metrics in jobs.points("undisturbed") if "val/num_samples" in metrics
    ]
    assert len(accuracies) == 3
    best = max(accuracies)
    assert result["val_top1_accuracy"] == best
    assert result["best_epoch"] == max(i for i, accuracy in enumerate(accuracies, 1) if accuracy == best)
    assert result["num_train"] == num_train
    assert len(jobs.curve("undisturbed", "select")) == (num_train - result["num_validation"]) * 3 // 32
    assert len(jobs.curve("undisturbed", "refit")) == num_train * result["best_epoch"] // 32


def test_mlflow_shows_the_whole_run(jobs: Jobs, undisturbed: FinishedRun, manifest: Manifest, tmp_path: Path) -> None:
    (run,) = jobs.mlflow_runs("undisturbed")
    assert run.info.status == "FINISHED"
    assert run.info.run_id == undisturbed.result["run_id"]
    assert run.data.params["engine.zero_stage"] == "3"
    assert run.data.params["train.refit"] == "True"
    assert run.data.tags["data.digest"] == manifest.digest
    assert run.data.metrics["test/top1_accuracy"] == undisturbed.result["test_top1_accuracy"]
    inputs = {entry.dataset.name: entry.dataset for entry in run.inputs.dataset_inputs}
    assert sorted(inputs) == ["emotion6-test", "emotion6-train"]
    for split, rows in (("train", undisturbed.result["num_train"]), ("test", undisturbed.result["num_test"])):
        dataset = inputs[f"emotion6-{split}"]
        assert json.loads(dataset.source) == {"uri": manifest.uri, "digest": manifest.digest}
        assert json.loads(dataset.profile)["num_rows"] == rows
    with jobs.connected():
        folder = tracking.download_artifacts(f"runs:/{run.info.run_id}/", tmp_path)
    for picture in ("confusion.png", "curves.png"):
        assert (folder / "plots" / picture).read_bytes().startswith(b"\x89PNG")
    stored, given = load_recipe(str(folder / "recipe.toml")), load_recipe(str(undisturbed.recipe), ["train.refit=true"])
    # What is stored names the labels that the data set brought.
    assert stored.labels.resolved(manifest.taxonomy).words == tuple(undisturbed.result["words"])
    assert stored == given.model_copy(update={"labels": stored.labels})
    assert not (folder / "projector").exists()
    with jobs.connected():
        model = MetricProjector.from_pretrained(tracking.download_artifacts(f"runs:/{run.info.run_id}/projector"))
    assert model.card["data_digest"] == manifest.digest
    assert model.card["llm_weights"] == "random"


def test_evaluate_finds_the_accuracy_of_the_run(jobs: Jobs, undisturbed: FinishedRun, test_parquet: Path) -> None:
    projector = f"runs:/{undisturbed.result['run_id']}/projector"
    document = jobs.run("evaluate", "--projector", projector, "--features", test_parquet, "--json").document
    assert document["confusion"] == undisturbed.result["test_confusion"]
    assert document["top1_accuracy"] == undisturbed.result["test_top1_accuracy"]


def test_the_same_command_again_returns_the_result_at_once(jobs: Jobs, undisturbed: FinishedRun) -> None:
    again = jobs.start("train", undisturbed.recipe, "--set", "train.refit=true", "--json")
    assert again.wait(AT_ONCE_S).document == [undisturbed.result]
    assert len(jobs.mlflow_runs("undisturbed")) == 1


def test_a_name_belongs_to_one_recipe(jobs: Jobs, undisturbed: FinishedRun) -> None:
    refused = jobs.run("train", undisturbed.recipe, "--set", "train.refit=true", "--set", "train.seed=1")
    assert "train.seed 0 -> 1" in refused.error
    assert "\n" not in refused.error
    assert len(jobs.mlflow_runs("undisturbed")) == 1


def test_a_stopped_run_is_killed_in_mlflow_and_says_how_to_go_on(disturbed: DisturbedRun) -> None:
    assert disturbed.statuses == ["KILLED", "KILLED", "FINISHED"]
    for outcome in (disturbed.terminated, disturbed.interrupted):
        assert outcome.code == 130
        assert "stopped: the same command continues from the last checkpoint" in outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert "SIGTERM received" not in outcome.stderr  # with which the stack trace of Ray's C++ code begins


def test_a_stopped_run_goes_on_from_its_checkpoint(disturbed: DisturbedRun) -> None:
    resumed_at = [int(step) for step in re.findall(r"going on from step (\d+)", disturbed.finished.stderr)]
    assert len(resumed_at) == 2, disturbed.finished.stderr
    assert 0 < disturbed.stopped_at <= resumed_at[0] < disturbed.killed_at <= resumed_at[1]
    assert "attempt failed (1 of 2 allowed)" in disturbed.finished.stderr


def test_a_disturbed_run_has_the_losses_of_an_undisturbed_one(
    jobs: Jobs, undisturbed: FinishedRun, disturbed: DisturbedRun
) -> None:
    expected, found = jobs.curve("undisturbed"), jobs.curve("disturbed")
    assert list(found) == list(expected) == list(range(len(expected)))
    worst = max(abs(found[step] - expected[step]) for step in expected)
    print(f"worst difference of {len(expected)} losses: {worst}")
    assert worst <= 1e-6
    result = disturbed.finished.document[0]
    assert result["val_top1_accuracy"] == undisturbed.result["val_top1_accuracy"]
    assert result["best_epoch"] == undisturbed.result["best_epoch"]


@pytest.fixture(scope="module")
def family(jobs: Jobs) -> list[dict[str, Any]]:
    """Two sizes, the second with one worker in place of two."""
    results: list[dict[str, Any]] = jobs.run("family", jobs.recipe("pair", FAMILY), "--json").document
    return results


def test_losses_agree_at_world_sizes_one_and_two(jobs: Jobs, family: list[dict[str, Any]]) -> None:
    labels = f'[labels]\nllm_weights = "{family[0]["llm_weights"]}"\n'
    alone = jobs.recipe("alone", f"{FAMILY}{labels}")
    result = jobs.run("train", alone, "--set", "workers.num_workers=1", "--json").document[0]
    one, two = jobs.curve("alone"), jobs.curve("pair-smollm2-135m")
    assert list(one) == list(two)
    assert len(one) >= 50
    worst = max(abs(one[step] - two[step]) for step in range(50))
    print(f"worst difference of 50 losses: {worst}")
    assert worst < 1e-4
    assert result["num_test"] == family[0]["num_test"]


def test_a_family_has_a_parent_children_and_a_champion(
    jobs: Jobs, family: list[dict[str, Any]], test_parquet: Path
) -> None:
    (parent,) = jobs.mlflow_runs("pair")
    assert parent.info.status == "FINISHED"
    assert [result["llm"] for result in family] == ["smollm2-135m", "tinyemo-700m"]
    assert [result["hidden_size"] for result in family] == [576, 1280]
    assert family[1]["llm_weights"] == "random"
    for result in family:
        (child,) = jobs.mlflow_runs(result["name"])
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["llm_weights"] == result["llm_weights"]
        assert child.data.tags["num_workers"] == ("2" if result["llm"] == "smollm2-135m" else "1")
    champion = "models:/jobs-projector@champion"
    document = jobs.run("evaluate", "--projector", champion, "--features", test_parquet, "--json").document
    (chosen,) = [result for result in family if result["llm"] == parent.data.tags["champion"]]
    assert document["card"]["run"] == chosen["name"]
    assert document["confusion"] == chosen["test_confusion"]
    with jobs.connected():
        assert storage.exists(f"{RUNS}/pair/family.json")
