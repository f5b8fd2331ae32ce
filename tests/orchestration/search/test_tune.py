"""A trial is the training of `tinyemo train`; a search records every end once, and goes on where it stopped."""

from __future__ import annotations

import base64
import json
import math
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from job_runner import RUNS, Jobs

from orchestration.data.batch import Batch
from orchestration.data.plan import PlannedSet, RowGroups
from orchestration.jobs.projector import build_projector, objective_of, train_batch
from orchestration.recipe import Recipe, load_recipe, parse_recipe
from orchestration.search.trial import FoldTraining, PackedTrial, SearchData, SharedRows
from orchestration.search.trials import (
    SEEN,
    ZERO_SHOT,
    TrialRecord,
    best_trials,
    first_point,
    rank_trials,
    read_records,
    write_record,
)
from orchestration.search.tune import RecordEnds, _scheduler, _searcher, num_slots, run_trials
from orchestration.services import storage
from orchestration.services.engine import build_engine
from tinyemo.errors import ConfigError, TrainingError
from tinyemo.label_embeddings import known_words
from tinyemo.taxonomies import TAXONOMIES

WORDS = TAXONOMIES["ekman"].words
NUM_STEPS = 12


def recipe(**sections: dict[str, Any]) -> Recipe:
    content = {"name": "x", "train": {"global_batch_size": 16, "num_epochs": 4}, "workers": {"num_workers": 1}}
    return parse_recipe({**content, **sections}, source="test")


def search_data(num_rows: int = 90, *, left_out: bool = False, is_finite: bool = True) -> SearchData:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((6, 768))

    def rows(count: int, num_labels: int) -> SharedRows:
        labels = rng.integers(0, num_labels, count)
        features = (0.3 * centres[labels] + rng.standard_normal((count, 768))).astype(np.float16)
        if not is_finite:
            features[:, 3] = np.inf
        hashes = rng.integers(0, 2**60, count).astype(np.uint64)
        return SharedRows(features, labels.astype(np.int64), hashes, np.arange(count) // 40)

    words = known_words()
    names = {"words": words, "llm": "none", "llm_revision": "none", "llm_weights": "random"}
    vectors = rng.standard_normal((len(words), 576)).astype(np.float32)
    seen, unseen = (WORDS[:4], WORDS[4:]) if left_out else (WORDS, ())
    return SearchData(
        seen,
        rows(num_rows, len(seen)),
        PlannedSet("ab" * 32, RowGroups.of([num_rows])),
        unseen,
        rows(20, 2) if left_out else None,
        {"word": vectors},
        names,
    )


def engine_losses(rank: int, port: int, path: str, content: dict[str, Any]) -> None:
    """A process of its own: the steps of the recipe by a DeepSpeed engine, as the main job takes them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    chosen, data = parse_recipe(content, source="test"), search_data()
    plan = FoldTraining(chosen, data, torch.device("cpu"))
    engine = build_engine(
        build_projector(chosen),
        chosen.engine,
        chosen.optimizer,
        num_steps=plan.plan.num_steps,
        global_batch_size=16,
        world_size=1,
    )
    objective, losses = objective_of(chosen, data.labels("word"), data.words), []
    for step in range(NUM_STEPS):
        places = plan.order[step]
        features = torch.from_numpy(data.train.features[plan.rows.row[places]])
        labels = torch.from_numpy(plan.rows.label[places])
        ids = [str(place) for place in places]
        batch = Batch(0, step, ids, torch.ones(16, dtype=torch.bool), features, labels, global_labels=labels)
        point = train_batch(engine, objective, batch, torch.device("cpu"))
        losses.append(float(point["train/loss"]))
    Path(path).write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_trial_has_the_losses_of_a_deepspeed_engine(tmp_path: Path) -> None:
    chosen = recipe(
        loss={"name": "info_nce", "mixup_alpha": 0.5},
        labels={"taxonomy_augmentation": 0.5, "synonyms_probability": 0.5},
        projector={"hidden_width": 100, "normalize_features": True, "dropout": 0.3},
        optimizer={"max_lr": 0.01},
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "losses.json"
    torch.multiprocessing.spawn(engine_losses, (port, str(path), chosen.model_dump(mode="json")), nprocs=1)
    training = FoldTraining(chosen, search_data(), torch.device("cpu"))
    training.train_to(NUM_STEPS)
    losses = [loss for _, loss in training.curve]
    assert np.allclose(losses, json.loads(path.read_text()), atol=1e-4)
    assert losses[0] != pytest.approx(losses[-1], abs=1e-2)


def test_folds_never_overlap_and_their_metrics_are_averaged() -> None:
    chosen = recipe(data={"validation_fraction": 0.3})
    trial = PackedTrial(chosen, search_data(), num_folds=3, device="cpu")
    validation = [set(fold.validation.row.tolist()) for fold in trial.folds]
    assert all(not a & b for i, a in enumerate(validation) for b in validation[:i])
    assert all(not v & set(fold.rows.row.tolist()) for v, fold in zip(validation, trial.folds, strict=True))
    metrics = trial.train_epoch()
    assert metrics[SEEN] == pytest.approx(np.mean([fold.validate()[SEEN] for fold in trial.folds]))
    while not trial.is_finished:
        metrics = trial.train_epoch()
    assert trial.epoch == 4
    assert metrics[SEEN] > 0.4


def test_labels_left_out_are_measured_and_never_trained_on() -> None:
    trial = PackedTrial(recipe(), search_data(left_out=True), num_folds=1, device="cpu")
    assert len(trial.folds[0].objective.label_embeds) == 4
    assert 0 <= trial.train_epoch()[ZERO_SHOT] <= 1


def test_a_loss_that_is_not_finite_says_the_step() -> None:
    trial = PackedTrial(recipe(), search_data(is_finite=False), num_folds=1, device="cpu")
    with pytest.raises(TrainingError, match="train/loss is nan at step 0"):
        trial.train_epoch()


def test_shared_arrays_may_be_read_only() -> None:
    data = search_data()
    for array in (data.train.features, data.train.labels, data.train.id_hash, data.label_vectors["word"]):
        array.setflags(write=False)
    assert math.isfinite(PackedTrial(recipe(), data, num_folds=1, device="cpu").train_epoch()["train/loss"])


def record(number: int, value: float, ended: Any = "finished", zero_shot: float = 0.5, epochs: int = 4) -> TrialRecord:
    curve = [{SEEN: value, ZERO_SHOT: zero_shot, "val/cross_entropy": 1.0}] * epochs
    return TrialRecord(number, {"projector.dropout": 0.1 + number / 100}, curve, ended, "", 1.0, 2.0)


def test_the_best_is_a_finished_trial() -> None:
    records = [record(0, 0.7), record(1, 0.9, "stopped"), record(2, 0.8), record(3, 0.8), record(4, 0.9, "failed")]
    assert [r.number for r in rank_trials(records, SEEN)] == [2, 3, 0]
    assert records[4].value(SEEN) == 0.0


def test_the_front_holds_what_no_other_trial_beats() -> None:
    records = [record(0, 0.7, zero_shot=0.9), record(1, 0.8, zero_shot=0.8), record(2, 0.75, zero_shot=0.7)]
    assert [r.number for r in best_trials(records, [SEEN, ZERO_SHOT])] == [1, 0]


def test_records_come_back_from_s3(s3_root: str) -> None:
    records = [record(0, 0.7), record(1, 0.5, "stopped", epochs=1)]
    for item in records:
        write_record(s3_root, item)
    assert read_records(s3_root) == records


def test_every_end_is_recorded_once_with_its_reason() -> None:
    ended: list[TrialRecord] = []
    callback = RecordEnds(2, 5, ended.append)

    def run(name: str, epochs: int, failure: str = "") -> Any:
        trial = SimpleNamespace(trial_id=name, config={"loss.name": name})
        callback.on_trial_start(0, [], trial)
        for _ in range(epochs):
            callback.on_trial_result(0, [], trial, {SEEN: 0.5, "time_total_s": 1.0})
        if failure:
            callback.on_trial_result(0, [], trial, {SEEN: 0.0, "failure": failure})
        callback.on_trial_complete(0, [], trial)
        callback.on_trial_complete(0, [], trial)

    run("whole", 2)
    run("cut", 1)
    run("infinite", 1, "train/loss is nan at step 3")
    assert [(r.number, r.ended, len(r.curve)) for r in ended] == [
        (5, "finished", 2),
        (6, "stopped", 1),
        (7, "failed", 1),
    ]
    assert ended[2].error == "train/loss is nan at step 3"
    assert ended[0].curve[0] == {SEEN: 0.5}


def test_a_search_that_goes_on_knows_its_records() -> None:
    chosen = recipe(search={"space": {"projector": {"dropout": {"low": 0.0, "high": 0.5}}}})
    records = [record(0, 0.7), record(1, 0.5, "failed"), record(2, 0.8, "stopped", epochs=1)]
    searcher = _searcher(chosen.search, records, {"projector.dropout": 0.2})
    assert [trial.value for trial in searcher._ot_study.trials[:3]] == [0.7, 0.0, 0.8]
    # The recipe's own values come first until a record has them: the trial that had them may have died with its driver.
    assert searcher.suggest("new") == {"projector.dropout": 0.2}
    known = [*records, replace(records[0], number=3, params={"projector.dropout": 0.2})]
    assert _searcher(chosen.search, known, {"projector.dropout": 0.2}).suggest("new") != {"projector.dropout": 0.2}
    assert _searcher(chosen.search, [], {"projector.dropout": 0.2}).suggest("new") == {"projector.dropout": 0.2}
    scheduler = _scheduler(chosen.search, 4, records)
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"training_iteration": 1, SEEN: 0.4}) == "STOP"
    assert scheduler.on_trial_result(None, trial, {"training_iteration": 1, SEEN: 0.9}) == "CONTINUE"


def test_two_objectives_reach_the_sampler_and_their_records_too() -> None:
    space = {"projector": {"dropout": {"low": 0.0, "high": 0.5}}}
    chosen = recipe(search={"objective": "seen_and_zero_shot", "space": space})
    searcher = _searcher(chosen.search, [record(0, 0.7, zero_shot=0.4)], None)
    assert searcher.suggest("new")
    searcher.on_trial_result("new", {SEEN: 0.5, ZERO_SHOT: 0.6, "training_iteration": 1})
    searcher.on_trial_complete("new", {SEEN: 0.5, ZERO_SHOT: 0.6, "training_iteration": 1})
    assert [trial.values for trial in searcher._ot_study.trials] == [[0.7, 0.4], [0.5, 0.6]]


def test_a_search_leaves_no_s3_key_in_rays_logs(cluster: str, s3_root: str) -> None:
    """Ray Tune would copy the driver's keys into the actors' runtime environment, which Ray logs."""
    import ray

    search = {"num_trials": 3, "space": {"projector": {"dropout": {"low": 0.0, "high": 0.5}}}}
    chosen = recipe(train={"global_batch_size": 16, "num_epochs": 1}, search=search)
    run_trials(chosen, search_data(), [], first_point(chosen), lambda record: write_record(s3_root, record))
    assert [item.ended for item in read_records(s3_root)] == ["finished"] * 3  # written with the driver's keys
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    session = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1]
    texts = {path: path.read_bytes() for path in (session / "logs").rglob("*") if path.is_file()}
    assert any(b"PL_DISABLE_FORK" in text for text in texts.values()), "runtime environments are logged elsewhere now"
    for form in (secret.encode(), base64.b64encode(secret.encode())):
        assert [str(path) for path, text in texts.items() if form in text] == []


def test_a_trial_that_fits_no_node_is_one_line(cluster: str) -> None:
    chosen = recipe(search={"cpus_per_trial": 64, "space": {"projector": {"dropout": {"low": 0.0, "high": 0.5}}}})
    with pytest.raises(ConfigError, match=r"search\.cpus_per_trial: a trial of x needs") as caught:
        num_slots(chosen)
    assert "\n" not in str(caught.value)
    assert num_slots(recipe(search={"cpus_per_trial": 0.5, "num_trials": 9})) == 4
    assert num_slots(recipe(search={"cpus_per_trial": 0.5, "max_concurrent": 3, "num_trials": 9})) == 3


SEARCH = """
[workers]
num_workers = 1
[data]
validation_fraction = 0.2
num_readers = 1
[train]
num_epochs = 2
[search]
num_trials = 12
num_startup_trials = 4
num_finalists = 2
finalist_seeds = 1
winner_seeds = 1
registered_name = "tests-tuned"
[search.space]
optimizer.max_lr = { low = 1e-4, high = 1e-2, log = true }
loss.name = { choices = ["cosine", "nt_xent", "prototype"] }
"""


def wait_for_records(jobs: Jobs, name: str, count: int, command: Any) -> list[TrialRecord]:
    deadline = time.monotonic() + 180
    while True:
        with jobs.connected():
            records = read_records(f"{RUNS}/{name}")
        if len(records) >= count:
            return records
        assert command.process.poll() is None, command.wait().stderr
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_search_goes_on_and_leaves_children_a_winner_and_its_recipe(jobs: Jobs, tmp_path: Path) -> None:
    path = jobs.recipe("searched", SEARCH)
    command = jobs.start("tune", path)
    wait_for_records(jobs, "searched", 3, command)
    command.process.kill()
    command.wait()
    with jobs.connected():
        before = read_records(f"{RUNS}/searched")
        spent_s = storage.read_json(f"{RUNS}/searched/spent.json")["search_s"]
    result = jobs.run("tune", path, "--json").document
    assert result["search_s"] > spent_s > 0
    with jobs.connected():
        after = read_records(f"{RUNS}/searched")
    assert after[: len(before)] == before
    assert [item.number for item in after] == list(range(12))
    assert result["num_finished"] + result["num_stopped"] + result["num_failed"] == 12
    (parent,) = jobs.mlflow_runs("searched")
    children = [run for run in jobs.mlflow_runs() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    trials = [run for run in children if run.data.tags.get("kind") == "trial"]
    assert sorted(int(run.data.tags["trial"]) for run in trials) == list(range(12))
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    assert {run.data.tags["ended"] for run in trials} <= {"finished", "stopped by ASHA"}
    # The recipe's own values are judged beside the best, on every fold, and the best of these is the winner.
    finalists = result["finalists"]
    assert first_point(load_recipe(str(path))) in [after[finalist["trial"]].params for finalist in finalists]
    assert result["winner_trial"] == finalists[0]["trial"]
    assert result["val_top1_accuracy"] == max(fmean(finalist["values"]) for finalist in finalists)
    # The winner's recipe trains as it is, and the run has the losses that a trial has.
    winner = tmp_path / "winner.toml"
    with jobs.connected():
        winner.write_bytes(storage.read_bytes(result["winner_recipe"]))
    assert load_recipe(str(winner)).name == "searched-winner"
    assert len(result["winners"]) == 1
    assert jobs.run("tune", path, "--json").document == result


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_nothing_running(jobs: Jobs) -> None:
    path = jobs.recipe("interrupted-search", SEARCH.replace("num_trials = 12", "num_trials = 400"))
    command = jobs.start("tune", path)
    wait_for_records(jobs, "interrupted-search", 2, command)
    deadline = time.monotonic() + 60
    while not any("Trainable" in title for title in ray_titles(jobs)):  # between two trials no actor has the title
        assert time.monotonic() < deadline, "no actor of the search was ever seen"
        assert command.process.poll() is None, command.wait().stderr
    command.process.send_signal(signal.SIGINT)
    outcome = command.wait()
    assert outcome.code == 130, outcome.stderr
    (parent,) = jobs.mlflow_runs("interrupted-search")
    assert parent.info.status == "KILLED"
    children = [run for run in jobs.mlflow_runs() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    with jobs.connected():
        assert len(children) == len(read_records(f"{RUNS}/interrupted-search"))
    assert {run.info.status for run in children} <= {"FINISHED", "FAILED"}
    deadline = time.monotonic() + 30
    while any("Trainable" in title for title in ray_titles(jobs)):
        assert time.monotonic() < deadline, "an actor of the search lives on"
        time.sleep(0.5)


def ray_titles(jobs: Jobs) -> list[str]:
    """Titles of the processes that this platform's Ray runs."""
    import psutil

    titles = []
    for process in psutil.process_iter():
        try:
            raylets = " ".join(" ".join(parent.cmdline()) for parent in process.parents())
            if str(jobs.state_folder) in raylets:
                titles.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return titles
