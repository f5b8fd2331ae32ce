"""Tracking against a real MLflow server: what a run ends as, what it holds, and what the registry gives back."""

from __future__ import annotations

import getpass
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestration.services import storage, tracking
from orchestration.services.tracking import (
    RunLogger,
    download_artifacts,
    end_run,
    find_run,
    find_runs,
    git_state,
    open_run,
    record_run,
    register,
    system_metrics,
)
from tinyemo.errors import AssetError, PlatformError, TrainingError

REPOSITORY = Path(__file__).parents[3]
EXPERIMENT = "tracking tests"


def client(server: str):
    from mlflow.tracking import MlflowClient

    return MlflowClient(server)


def status_of(server: str, run_id: str) -> str:
    return client(server).get_run(run_id).info.status


def test_a_run_holds_the_flat_recipe_and_ends_finished(server, capfd):
    """Nested tables become dotted keys, a value over MLflow's limit is cut, more than 100 params fit."""
    params = {
        "loss": {"name": "nt_xent", "temperature": None, "nested": {"deep": True}},
        "sizes": ["a", "b"],
        "long": "x" * 7000,
        "many": {f"key{i}": i for i in range(150)},
    }
    with open_run(EXPERIMENT, "finished", params=params, tags={"data": "real", "note": "y" * 9000}) as run:
        run.log_metrics({"test/top1_accuracy": 0.75})
        run.set_tags({"llm_weights": "random"})
        assert status_of(server, run.run_id) == "RUNNING"
    assert capfd.readouterr().out == ""
    stored = client(server).get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "finished"
    assert stored.data.params["loss.name"] == "nt_xent"
    assert stored.data.params["loss.temperature"] == "None"
    assert stored.data.params["loss.nested.deep"] == "True"
    assert json.loads(stored.data.params["sizes"]) == ["a", "b"]
    assert stored.data.params["long"] == "x" * 6000
    assert stored.data.params["many.key149"] == "149"
    assert len(stored.data.params) == 155
    assert stored.data.metrics == {"test/top1_accuracy": 0.75}
    assert stored.data.tags["data"] == "real"
    assert stored.data.tags["llm_weights"] == "random"
    assert stored.data.tags["note"] == "y" * 8000
    assert stored.data.tags["git_commit"] == git_state()["git_commit"]
    assert stored.data.tags["git_dirty"] in {"true", "false", "unknown"}
    place = f"experiments/{stored.info.experiment_id}/runs/{run.run_id}"
    assert run.url == f"{server}/#/{place}?workflowType=machine_learning"
    assert stored.data.tags["mlflow.user"] == getpass.getuser()
    experiment = client(server).get_experiment(stored.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_an_exception_leaves_a_failed_run_with_its_reason(server):
    with pytest.raises(OSError, match="disk"), open_run(EXPERIMENT, "failed", params={}, tags={}) as run:
        raise OSError("the disk\nis full")
    stored = client(server).get_run(run.run_id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["error"] == "OSError: the disk is full"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(15), SystemExit(0)], ids=repr)
def test_an_interruption_leaves_a_killed_run(server, error):
    """SystemExit is what Ray's signal handlers raise, with 15 at SIGTERM and with 0 after an aborted training."""
    with pytest.raises(type(error)), open_run(EXPERIMENT, "killed", params={}, tags={}) as run:
        raise error
    assert status_of(server, run.run_id) == "KILLED"


DRIVER = """
import sys, time
from orchestration.services.tracking import open_run
{prepare}
with open_run("{experiment}", "parent of stopped", params={{}}, tags={{}}) as parent:
    with open_run("{experiment}", sys.argv[1], params={{}}, tags={{}}, parent_run_id=parent.run_id) as run:
        try:
            print(parent.run_id, run.run_id, flush=True)
            time.sleep(120)
        finally:
            print("cleaned up", flush=True)
"""


def start_driver(name: str, prepare: str = "") -> tuple[subprocess.Popen[str], list[str]]:
    command = [sys.executable, "-c", DRIVER.format(experiment=EXPERIMENT, prepare=prepare), name]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert driver.stdout is not None
    return driver, driver.stdout.readline().split()


@pytest.mark.timeout(120)
def test_sigterm_to_a_driver_of_ray_ends_parent_and_child_killed(server):
    """Ray's own handler raises; a second signal while the runs are being closed leaves none of them open."""
    connect = "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False)"
    driver, run_ids = start_driver("stopped", connect)
    driver.send_signal(signal.SIGTERM)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "cleaned up\n"
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=60)
    assert driver.returncode != 0
    assert [status_of(server, run_id) for run_id in run_ids] == ["KILLED", "KILLED"]
    assert client(server).get_run(run_ids[1]).data.tags["error"].startswith("SystemExit")


def test_a_run_whose_driver_got_sigkill_is_found_and_resumed(server):
    driver, (_, run_id) = start_driver("lost")
    driver.kill()
    driver.communicate(timeout=60)
    stale = find_run(EXPERIMENT, "lost")
    assert stale is not None
    assert (stale.run_id, stale.status) == (run_id, "RUNNING")
    with open_run(EXPERIMENT, "lost", params={}, tags={}, resume_run_id=stale.run_id) as run:
        run.log_metrics({"train/loss": 1.0}, step=3)
    resumed = find_run(EXPERIMENT, "lost")
    assert resumed is not None
    assert (resumed.run_id, resumed.status, resumed.tags["num_resumes"]) == (run_id, "FINISHED", "1")
    assert resumed.metrics == {"train/loss": 1.0}


def test_a_resumed_run_keeps_its_curve_and_loses_its_error(server):
    with (  # noqa: PT012  # the run holds something before it fails
        pytest.raises(ValueError, match="first"),
        open_run(EXPERIMENT, "again", params={"lr": 1}, tags={}) as run,
    ):
        run.logger.log_curve([(1, {"train/loss": 2.0})])
        raise ValueError("first")
    with open_run(EXPERIMENT, "again", params={"lr": 1, "new": 2}, tags={}, resume_run_id=run.run_id) as again:
        assert again == run
        assert status_of(server, run.run_id) == "RUNNING"
        again.logger.log_curve([(2, {"train/loss": 1.0})])
    stored = client(server).get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert "error" not in stored.data.tags
    assert stored.data.params == {"lr": "1", "new": "2"}
    assert [m.step for m in client(server).get_metric_history(run.run_id, "train/loss")] == [1, 2]


def test_a_resume_with_another_recipe_is_refused_and_changes_nothing(server):
    with open_run(EXPERIMENT, "refuses", params={"lr": 1, "loss": {"name": "a"}}, tags={}) as run:
        pass
    before = client(server).get_run(run.run_id).to_dictionary()
    changed = {"lr": 2, "loss": {"name": "a"}}
    with (
        pytest.raises(TrainingError, match="lr was 1, is 2"),
        open_run(EXPERIMENT, "refuses", params=changed, tags={}, resume_run_id=run.run_id),
    ):
        pass
    assert client(server).get_run(run.run_id).to_dictionary() == before
    with (
        pytest.raises(TrainingError, match="no run 0123456789abcdef"),
        open_run(EXPERIMENT, "refuses", params={}, tags={}, resume_run_id="0123456789abcdef0123456789abcdef"),
    ):
        pass


def test_find_run_takes_the_newest_of_exactly_this_name(server):
    assert find_run("an experiment that nobody made", "x") is None
    assert find_run(EXPERIMENT, "nobody's") is None
    with open_run(EXPERIMENT, "nobody's", params={}, tags={}):
        time.sleep(0.01)  # start times are in ms
    with open_run(EXPERIMENT, "nobody's", params={}, tags={}) as newest:
        pass
    found = find_run(EXPERIMENT, "nobody's")
    assert found is not None
    assert (found.run_id, found.url) == (newest.run_id, newest.url)
    assert find_run(EXPERIMENT, "nobody") is None


def test_a_child_hangs_under_its_parent(server):
    with (
        open_run(EXPERIMENT, "family", params={}, tags={}) as parent,
        open_run(EXPERIMENT, "child", params={}, tags={}, parent_run_id=parent.run_id) as child,
    ):
        pass
    assert client(server).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    found = find_run(EXPERIMENT, "child", parent_run_id=parent.run_id)
    assert found is not None
    assert found.run_id == child.run_id
    assert find_run(EXPERIMENT, "child", parent_run_id=child.run_id) is None


def test_a_long_curve_arrives_whole_also_from_another_process(server):
    """A pickled RunLogger carries the run alone; its process finds the server in its own environment."""
    points = [(step, {"train/loss": 1.0 / (step + 1)}) for step in range(3000)]
    with open_run(EXPERIMENT, "curve", params={}, tags={}) as run:
        run.logger.log_curve(points[:1500])
        code = "import pickle, sys; logger, points = pickle.load(sys.stdin.buffer); logger.log_curve(points)"
        payload = pickle.dumps((run.logger, points[1500:]))
        subprocess.run([sys.executable, "-c", code], input=payload, check=True, cwd=REPOSITORY, timeout=120)
    history = client(server).get_metric_history(run.run_id, "train/loss")
    assert [(m.step, {"train/loss": m.value}) for m in sorted(history, key=lambda m: m.step)] == points


@pytest.mark.timeout(120)
def test_what_mlflow_missed_of_a_phase_is_sent_at_its_end(server, s3_root, silent_port, monkeypatch, caplog):
    """The server is away for one of three reports: S3 has the whole curve, MLflow too at the end, no step twice."""
    from orchestration.jobs.attempts import ReportCallback, run_stage

    with open_run(EXPERIMENT, "gap", params={}, tags={}) as run:
        callback = ReportCallback(f"{s3_root}/refit", run.logger, prefix="refit")
        for step in (2, 4, 6):
            curve = [{"step": s, "train/loss": 1.0 / s} for s in (step - 1, step)]
            report = {"step": step, "num_steps": 6, "is_final": step == 6, "curve": curve}
            with monkeypatch.context() as patch:
                if step == 4:
                    patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent_port}")
                callback.after_report(None, [report], SimpleNamespace(path="tests/checkpoint"))
        assert "give the same command again once it answers" in caplog.text
        assert len(client(server).get_metric_history(run.run_id, "refit/loss")) == 4
        state = run_stage(None, callback)  # all is trained: it has nothing to start
    assert (state.step, state.is_final) == (6, True)
    history = client(server).get_metric_history(run.run_id, "refit/loss")
    assert sorted((entry.step, entry.value) for entry in history) == [(step, 1.0 / step) for step in range(1, 7)]


def test_steps_that_are_trained_again_are_logged_once(server):
    """An attempt that goes on from a checkpoint repeats steps; a key that the run has not seen is logged whole."""
    points = [(step, {"train/loss": float(step), "train/rate": 0.5}) for step in (1, 2, 3)]
    with open_run(EXPERIMENT, "repeats", params={}, tags={}) as run:
        run.logger.log_curve(points)
        run.logger.log_curve(points)
        again = pickle.loads(pickle.dumps(run.logger))
        assert again == RunLogger(run.run_id)
        again.log_curve([(step, {"train/loss": -1.0, "val/loss": 1.0}) for step in (2, 3, 4)])
    for key, steps in {"train/loss": [1, 2, 3, 4], "train/rate": [1, 2, 3], "val/loss": [2, 3, 4]}.items():
        assert sorted(entry.step for entry in client(server).get_metric_history(run.run_id, key)) == steps


def test_a_description_says_what_a_run_is_and_which_command_made_it(server, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tinyemo", "train", "my recipe.toml"])
    with open_run(EXPERIMENT, "described", params={}, tags={}) as run:
        run.describe("A projector on Emotion6.", {"data": "s3://bucket/data", "export": None})
    note = client(server).get_run(run.run_id).data.tags["mlflow.note.content"]
    assert note.startswith("A projector on Emotion6.\n")
    assert "| data | s3://bucket/data |" in note
    assert "export" not in note
    assert note.endswith("Made by `tinyemo train 'my recipe.toml'`")


def test_a_model_in_s3_is_referred_to_and_fetched_from_there(server, s3_root, tmp_path):
    """One copy of the files: the run, its logged model and the registered version all lead to it."""
    storage.write_bytes(f"{s3_root}/model/config.json", b"{}")
    digest = "0123456789abcdef" * 4
    with open_run(EXPERIMENT, "stored", params={}, tags={}) as run:
        run.log_dataset("emotion6-test", digest, f"{s3_root}/data", 306, "test")
        run.refer("model", f"{s3_root}/model")
        model = {"name": "projector", "uri": f"{s3_root}/model", "dataset": ("emotion6-test", digest), "step": 7}
        model_id = run.log_model(**model, metrics={"test/top1_accuracy": 0.5}, params={"loss": {"name": "cosine"}})
        assert run.log_model(**model, metrics={"test/top1_accuracy": 0.5}) == model_id
        register(run.run_id, f"{s3_root}/model", "tinyemo-stored", tags={}, card="From run stored.", model_id=model_id)
        tracking.move_alias("tinyemo-stored", "champion", "1")
    stored = client(server).get_run(run.run_id)
    assert stored.data.metrics == {"test/top1_accuracy": 0.5}
    assert not client(server).list_artifacts(run.run_id)
    wanted = [{"dataset_name": "emotion6-test", "dataset_digest": digest[:36]}]
    (found,) = client(server).search_logged_models([stored.info.experiment_id], datasets=wanted)
    assert (found.model_id, found.name, found.source_run_id, found.status) == (
        model_id, "projector", run.run_id, "READY",
    )  # fmt: skip
    assert (found.params, found.tags["uri"]) == ({"loss.name": "cosine"}, f"{s3_root}/model")
    assert [(m.key, m.value, m.dataset_digest) for m in found.metrics] == [("test/top1_accuracy", 0.5, digest[:36])]
    version = client(server).get_model_version_by_alias("tinyemo-stored", "champion")
    assert (version.description, version.source) == ("From run stored.", f"{s3_root}/model")
    for uri in (f"runs:/{run.run_id}/model", "models:/tinyemo-stored@champion", "models:/tinyemo-stored/1"):
        assert (download_artifacts(uri) / "config.json").read_bytes() == b"{}"
    assert download_artifacts(f"runs:/{run.run_id}/model/config.json", tmp_path).read_bytes() == b"{}"
    with pytest.raises(AssetError, match="cannot load"):
        download_artifacts(f"runs:/{run.run_id}/model/none.json")


def test_runs_are_found_by_condition_and_ended_from_outside(server):
    with open_run(EXPERIMENT, "search", params={}, tags={}) as run:
        times = {"started_at": 1_700_000_000.0, "ended_at": 1_700_000_060.0}
        for number in range(3):
            name, tags = f"search-{number}", {"kind": "trial", "trial": str(number)}
            points = [(1, {"val/loss": 1.0})]
            record_run(run, name, params={"a": {"b": 1}}, tags=tags, points=points, status="FINISHED", **times)
    children = find_runs("tags.kind = 'trial'", parent_run_id=run.run_id)
    assert {child.tags["trial"] for child in children} == {"0", "1", "2"}
    assert [child.params for child in children] == [{"a.b": "1"}] * 3
    assert len(find_runs("tags.kind = 'trial'", experiment=EXPERIMENT, limit=2)) == 2
    stored = client(server).get_run(children[0].run_id)
    assert (stored.info.start_time, stored.info.end_time) == (1_700_000_000_000, 1_700_000_060_000)
    end_run(run.run_id, "KILLED", error="its driver is gone")
    taken = find_run(EXPERIMENT, "search")
    assert taken is not None
    assert (taken.status, taken.tags["error"]) == ("KILLED", "its driver is gone")


def test_a_node_logs_its_system_metrics_while_the_block_runs(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with open_run(EXPERIMENT, "measured", params={}, tags={}) as run:
        for _ in range(2):  # the second attempt goes on after the first one's steps
            with system_metrics(run.run_id, "node-1"):
                time.sleep(1.5)
    with system_metrics(None, "node-1"):
        pass
    history = client(server).get_metric_history(run.run_id, "system/node-1/cpu_utilization_percentage")
    steps = [entry.step for entry in history]
    assert len(steps) > 2
    assert len(set(steps)) == len(steps)


def test_the_data_set_of_a_run_is_its_manifest(server):
    digest = "0123456789abcdef" * 4
    with open_run(EXPERIMENT, "data", params={}, tags={}) as run:
        run.log_dataset("emotion6", digest, "s3://bucket/datasets/emotion6/0123456789ab", 1386, "train")
        run.log_dataset("emotion6-test", digest, "s3://bucket/datasets/emotion6/0123456789ab", 306, "test")
    inputs = {entry.dataset.name: entry for entry in client(server).get_run(run.run_id).inputs.dataset_inputs}
    assert set(inputs) == {"emotion6", "emotion6-test"}
    train = inputs["emotion6"]
    assert train.dataset.digest == digest[:36]
    assert json.loads(train.dataset.source) == {
        "uri": "s3://bucket/datasets/emotion6/0123456789ab",
        "digest": digest,
    }
    assert json.loads(train.dataset.profile) == {"num_rows": 1386, "digest": digest}
    assert [(tag.key, tag.value) for tag in train.tags] == [("mlflow.data.context", "train")]


def test_the_champion_comes_back_byte_by_byte(server, tmp_path):
    """The alias moves to the newer version; every form of address brings the same files."""
    folders = []
    versions = []
    for seed in (1, 2):
        folder = tmp_path / f"projector{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"seed": seed}))
        (folder / "projector.safetensors").write_bytes(bytes([seed]) * 100_000)
        with open_run(EXPERIMENT, f"projector {seed}", params={}, tags={}) as run:
            run.log_artifact(folder, "projector")
            run.log_artifact(folder / "config.json", "recipe")
            versions.append(register(run.run_id, "projector", "tinyemo-test", tags={"data": "real"}))
            tracking.move_alias("tinyemo-test", "champion", versions[-1])
        folders.append(folder)
    assert versions == ["1", "2"]
    artifact_uri = client(server).get_run(run.run_id).info.artifact_uri
    assert artifact_uri.startswith("mlflow-artifacts:/")
    for uri, folder in [
        ("models:/tinyemo-test@champion", folders[1]),
        ("models:/tinyemo-test/1", folders[0]),
        (f"runs:/{run.run_id}/projector", folders[1]),
        (f"{artifact_uri}/projector", folders[1]),
    ]:
        brought = download_artifacts(uri)
        assert {f.name: f.read_bytes() for f in brought.iterdir()} == {f.name: f.read_bytes() for f in folder.iterdir()}
    single = download_artifacts(f"runs:/{run.run_id}/recipe/config.json", tmp_path / "single")
    assert single.read_text() == '{"seed": 2}'
    assert single.is_relative_to(tmp_path / "single")
    version = client(server).get_model_version_by_alias("tinyemo-test", "champion")
    assert (version.version, version.run_id, version.tags) == ("2", run.run_id, {"data": "real"})


@pytest.mark.parametrize(
    "uri",
    [
        "models:/nobody@champion",
        "models:/nobody/7",
        "runs:/0123456789abcdef0123456789abcdef/projector",
        "mlflow-artifacts:/1/none/artifacts/projector",
    ],
)
def test_a_missing_artifact_is_one_line(server, uri):
    with pytest.raises(AssetError) as caught:
        download_artifacts(uri)
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_the_artifact_registers_nothing(server, tmp_path):
    with open_run(EXPERIMENT, "empty", params={}, tags={}) as run:
        with pytest.raises(AssetError, match="no artifact 'projector'"):
            register(run.run_id, "projector", "never-registered", tags={})
        with pytest.raises(FileNotFoundError):
            run.log_artifact(tmp_path / "none.json")
    with pytest.raises(AssetError):
        download_artifacts(f"runs:/{run.run_id}/projector")
    assert not client(server).search_registered_models("name = 'never-registered'")


@pytest.mark.timeout(60)  # a hang, not a timing: MLflow alone retries for minutes
def test_a_server_that_is_gone_is_one_line(silent_port, monkeypatch):
    """The password of the address is never shown."""
    port = silent_port
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    with pytest.raises(PlatformError) as caught, open_run(EXPERIMENT, "never", params={}, tags={}):
        pass
    assert f"no MLflow server answers at http://127.0.0.1:{port} (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.timeout(120)
def test_a_server_that_goes_away_under_a_run_hides_no_error(server, silent_port, monkeypatch, caplog):
    """Writing fails in one line after a few retries; the error of the block comes through where closing fails too."""
    with (  # noqa: PT012  # the address changes within the run
        caplog.at_level(logging.ERROR),
        pytest.raises(PlatformError, match="failed to log metrics") as caught,
        open_run(EXPERIMENT, "cut off", params={}, tags={}) as run,
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent_port}")
        run.log_metrics({"train/loss": 1.0}, step=1)
    assert "\n" not in str(caught.value)
    assert "may still be shown as RUNNING" in caplog.text


def test_git_state_falls_back_to_the_environment(tmp_path):
    """A copy outside any checkout, as in a Ray job's working directory."""
    for file in ("orchestration/__init__.py", "orchestration/services", "tinyemo/__init__.py", "tinyemo/errors.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (REPOSITORY / file).is_dir() else shutil.copy
        copy(REPOSITORY / file, tmp_path / file)
    code = "import json; from orchestration.services.tracking import git_state; print(json.dumps(git_state()))"

    def state(**variables: str) -> dict[str, str]:
        environment = {"PATH": os.environ["PATH"]} | variables
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60
        )
        return json.loads(done.stdout)

    assert state() == {"git_commit": "unknown", "git_dirty": "unknown"}
    submitted = {"TINYEMO_GIT_COMMIT": "abc", "TINYEMO_GIT_DIRTY": "false"}
    assert state(**submitted) == {"git_commit": "abc", "git_dirty": "false"}
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "orchestration", "tinyemo"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    # Python's caches from the runs above are files that git does not know.
    (tmp_path / ".git/info/exclude").write_text("__pycache__\n")
    committed = state(**submitted)
    assert len(committed["git_commit"]) == 40
    assert committed["git_dirty"] == "false"
    (tmp_path / "new.py").touch()
    assert state() == committed | {"git_dirty": "true"}


def test_a_run_is_deleted_once_and_its_models_are_known(server: str) -> None:
    with tracking.open_run("tests", "doomed", params={}, tags={}) as run:
        pass
    mlflow = client(server)
    mlflow.create_registered_model("from-doomed")
    mlflow.create_model_version("from-doomed", f"runs:/{run.run_id}/model", run.run_id)
    assert tracking.registered_versions(run.run_id) == ["from-doomed version 1"]
    assert tracking.registered_versions("0" * 32) == []
    for run_id in (run.run_id, run.run_id, "0" * 32):
        tracking.delete_run(run_id)
    assert mlflow.get_run(run.run_id).info.lifecycle_stage == "deleted"
