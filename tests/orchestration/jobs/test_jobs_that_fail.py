"""Input that no run can use, and services that go: one clear line, exit code 2, and no run left RUNNING."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from breaking_proxy import BreakingProxy
from job_runner import Jobs

from orchestration.services import storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ALONE = ("--set", "workers.num_workers=1")
"""One rank is up sooner than two, where their number makes no difference."""
CLOSED = "127.0.0.1:9"
GIVE_UP_S = 90.0
"""A hang, not a timing: clients alone would retry for minutes."""
SHORT = """
[data]
num_readers = 1
[train]
num_epochs = 2
[checkpoint]
every_steps = 10
"""


@pytest.fixture(autouse=True)
def no_run_is_left_running(jobs: Jobs) -> Iterator[None]:
    yield
    assert [run.info.run_name for run in jobs.mlflow_runs() if run.info.status == "RUNNING"] == []


def test_a_recipe_gets_all_its_errors_at_once(jobs: Jobs) -> None:
    recipe = jobs.recipe("wrong", '[train]\nnum_epochs = "many"\ncolour = 3\nglobal_batch_size = 33\n')
    header, *fields = jobs.run("train", recipe).error.splitlines()
    assert header.endswith(": 3 errors")
    found = sorted(line.split(":")[0].strip() for line in fields)
    assert found == ["train.colour", "train.global_batch_size", "train.num_epochs"]
    assert jobs.mlflow_runs("wrong") == []


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["data.dataset=s3://no-such-bucket/emotion6"], {}, "that the bucket 'no-such-bucket' exists and admits"),
        (["checkpoint.root=s3://no-such-bucket/runs"], {}, "that the bucket 'no-such-bucket' exists and admits"),
        (["data.dataset=s3://tinyemo/datasets/no-such"], {}, "no data set at s3://tinyemo/datasets/no-such"),
        ([], {"AWS_SECRET_ACCESS_KEY": "wrong"}, "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ([], {"AWS_ENDPOINT_URL": f"http://{CLOSED}"}, f"S3 at http://{CLOSED} does not answer"),
        ([], {"MLFLOW_TRACKING_URI": f"http://{CLOSED}"}, f"no MLflow server answers at http://{CLOSED}"),
        ([], {"RAY_ADDRESS": CLOSED}, f"no Ray cluster answers at {CLOSED}"),
        ([], {"RAY_ADDRESS": ""}, "RAY_ADDRESS is not set"),
    ],
    ids=["bucket", "checkpoint bucket", "dataset", "credentials", "s3 gone", "mlflow gone", "ray gone", "no ray"],
)
def test_what_is_out_of_reach_is_one_line(
    jobs: Jobs, arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    recipe = jobs.recipe("unreachable", SHORT)
    command = jobs.start("train", recipe, *(f"--set={text}" for text in arguments), **environment)
    outcome = command.wait(GIVE_UP_S)
    assert expected in outcome.error
    assert "\n" not in outcome.error
    assert jobs.mlflow_runs("unreachable") == []


def test_a_corrupt_shard_is_named_and_fails_the_run(jobs: Jobs) -> None:
    outcome = jobs.run("ingest", "features", "--generated", "--name", "damaged", "--rows-per-shard", 300, "--json")
    assert outcome.document["data"] == "generated"
    manifest = jobs.manifest("damaged")
    shard = next(shard for shard in manifest.shards if shard.split == "train")
    jobs.overwrite_byte(manifest.file_uri(shard.path), shard.num_bytes // 2)
    recipe = jobs.recipe("damaged", SHORT)
    error = jobs.run("train", recipe, "--set=data.dataset=s3://tinyemo/datasets/damaged", *ALONE).error
    assert f"{manifest.file_uri(shard.path)} is corrupt" in error
    assert "\n" not in error
    (run,) = jobs.mlflow_runs("damaged")
    assert run.info.status == "FAILED"
    assert shard.path in run.data.tags["error"]


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(jobs: Jobs) -> None:
    recipe = jobs.recipe("diverging", SHORT + "[optimizer]\nmax_lr = 1e30\n")
    outcome = jobs.run("train", recipe, *ALONE)
    assert "train/loss is nan at step 1; this rank's samples: " in outcome.error
    assert "\n" not in outcome.error
    assert "attempt failed" not in outcome.stderr
    ids = outcome.error.split("samples: ")[1].split(". Lower")[0].split(", ")
    assert len(set(ids)) == 32
    with jobs.connected():
        assert not storage.exists("s3://tinyemo/runs/diverging/select/latest.json")
    (run,) = jobs.mlflow_runs("diverging")
    assert run.info.status == "FAILED"


def test_s3_that_goes_in_mid_run_is_one_line(jobs: Jobs) -> None:
    """The connection of the driver, the controller's snapshots and the workers' checkpoints breaks after 40 MB."""
    recipe = jobs.recipe("cut-off", SHORT)
    with BreakingProxy(jobs.environment["AWS_ENDPOINT_URL"], limit_bytes=40_000_000, way="hang up") as proxy:
        outcome = jobs.run("train", recipe, *ALONE, AWS_ENDPOINT_URL=proxy.endpoint)
        assert proxy.is_broken.is_set()
    assert f"S3 at {proxy.endpoint} does not answer" in outcome.error
    assert "\n" not in outcome.error
    (run,) = jobs.mlflow_runs("cut-off")
    assert run.info.status == "FAILED"
    state = jobs.state("cut-off")
    assert state is not None
    assert state.step > 0
