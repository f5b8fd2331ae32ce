"""The command line on the session's platform, each command a process of its own: its environment is set before Ray's
import, and it can be stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestration.data.manifest import Manifest, load_manifest
from orchestration.jobs.checkpoints import Curve, StageState, read_curve, read_state
from orchestration.services import storage

DEADLINE_S = 400.0
POLL_S = 0.2
RUNS = "s3://tinyemo/runs"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind when it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """What --json printed."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """The one error of a command that ended with exit code 2: a line, or a line for each field below it."""
        assert self.code == 2, f"exit {self.code}: {self.stderr[-2000:]}"
        assert "Traceback" not in self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        error = self.stderr[self.stderr.index("error: ") :].strip()
        assert all(line.startswith("  ") for line in error.splitlines()[1:]), error
        return error


@dataclass(frozen=True)
class RunningCommand:
    """A command that runs."""

    process: subprocess.Popen[str]

    def wait(self, timeout_s: float = DEADLINE_S) -> Outcome:
        """Until it ends; a command that does not is killed and fails the test."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            stdout, stderr = self.process.communicate()
            pytest.fail(f"still running after {timeout_s} s: {stderr[-2000:]}")
        return Outcome(self.process.returncode, stdout, stderr)


@dataclass(frozen=True)
class Jobs:
    """Starts commands and looks at what they leave in S3 and MLflow."""

    folder: Path
    environment: dict[str, str] = field(repr=False)
    state_folder: Path
    """Of the platform; its Ray processes name it in their command lines."""

    def start(self, *arguments: object, **environment: str) -> RunningCommand:
        """Start `tinyemo ARGUMENTS` with variables laid over the platform's."""
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "tinyemo"), *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment | environment,
            # A suite in the background of a script ignores Ctrl-C, and children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # one call, no lock
        )  # fmt: skip
        return RunningCommand(process)

    def run(self, *arguments: object, **environment: str) -> Outcome:
        """`tinyemo ARGUMENTS` from start to end."""
        return self.start(*arguments, **environment).wait()

    def recipe(self, name: str, text: str) -> Path:
        """A recipe file; label embeddings are random ones unless it says otherwise, so that no asset is needed."""
        path = self.folder / f"{name}.toml"
        labels = "" if "[labels]" in text else '\n[labels]\nllm_weights = "random"\n'
        path.write_text(f'name = "{name}"\n{text}{labels}')
        return path

    @contextmanager
    def connected(self) -> Iterator[None]:
        """This process sees the platform's S3 and MLflow within the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
                patch.delenv(name, raising=False)
            for name, value in self.environment.items():
                if name.startswith(("AWS_", "MLFLOW_")):
                    patch.setenv(name, value)
            yield

    def manifest(self, dataset: str) -> Manifest:
        """Of a data set in the platform's bucket."""
        with self.connected():
            return load_manifest(f"s3://tinyemo/datasets/{dataset}", "features")

    def curve(self, name: str, phase: str = "select") -> dict[int, float]:
        """train/loss by step of a run's phase; each step must be there once."""
        points = self.points(name, phase)
        steps = [step for step, metrics in points if "train/loss" in metrics]
        assert steps == sorted(set(steps))
        return {step: metrics["train/loss"] for step, metrics in points if "train/loss" in metrics}

    def points(self, name: str, phase: str = "select") -> Curve:
        """Every figure that a run's phase reported."""
        with self.connected():
            return read_curve(f"{RUNS}/{name}/{phase}")

    def state(self, name: str, phase: str = "select") -> StageState | None:
        """How far a run's phase is."""
        with self.connected():
            return read_state(f"{RUNS}/{name}/{phase}")

    def wait_for_step(self, name: str, step: int, command: RunningCommand, phase: str = "select") -> int:
        """Until a checkpoint at or after `step` is in S3 while the command runs; its step."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            state = self.state(name, phase)
            if state is not None and state.step >= step:
                assert not state.is_final, "the run was over before the test could disturb it"
                return state.step
            assert command.process.poll() is None, command.wait().stderr
            assert time.monotonic() < deadline, f"no checkpoint at step {step} within {DEADLINE_S} s"
            time.sleep(POLL_S)

    def wait_for_run(self, name: str, command: RunningCommand) -> None:
        """Until MLflow shows the run as RUNNING with its data: training begins."""
        deadline = time.monotonic() + DEADLINE_S
        while not any(run.info.status == "RUNNING" and run.inputs.dataset_inputs for run in self.mlflow_runs(name)):
            assert command.process.poll() is None, command.wait().stderr
            assert time.monotonic() < deadline, f"no run {name} within {DEADLINE_S} s"
            time.sleep(POLL_S)

    def train_workers(self) -> list[psutil.Process]:
        """The ranks that Ray Train runs on this platform, and on no other that may be up on this machine."""
        found = []
        for process in psutil.process_iter():
            try:
                if not process.cmdline()[:1] or not process.cmdline()[0].startswith("ray::RayTrainWorker"):
                    continue
                raylets = (" ".join(parent.cmdline()) for parent in process.parents())
                if any(str(self.state_folder) in raylet for raylet in raylets):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def mlflow_runs(self, name: str | None = None) -> list[Any]:
        """MLflow's runs of this name, or all, in every experiment."""
        from mlflow.tracking import MlflowClient

        with self.connected():
            client = MlflowClient()
            ids = [experiment.experiment_id for experiment in client.search_experiments()]
            return list(client.search_runs(ids, f"attributes.run_name = '{name}'" if name else ""))

    def overwrite_byte(self, uri: str, position: int) -> None:
        """Flip one byte of an object in S3."""
        with self.connected():
            data = bytearray(storage.read_bytes(uri))
            data[position] ^= 0xFF
            storage.write_bytes(uri, bytes(data))


def platform_environment(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """What a command gets: this process's variables without those of foreign services, and the platform's."""
    foreign = ("AWS_", "MLFLOW_", "RAY_", "TINYEMO_STATE")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TINYEMO_STATE": str(folder / "no-platform")}
    return ours | environment | settings
