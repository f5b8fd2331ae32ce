"""`tinyemo stream` on the session's platform: killed twice, gone on with other numbers of workers, no record lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from job_runner import Jobs
from record_files import drawn_picture

from orchestration.data.ledger import check_ledger, read_ledger
from orchestration.jobs.reading import prepare_records
from orchestration.recipe import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_RECORDS = 1210
RECIPE = """
[records]
datasets = ["s3://tinyemo/datasets/drawn"]
image_size = 32
pool_mib = 0.01
tokenizer = ""
[train]
global_batch_size = 12
num_epochs = 3
[checkpoint]
every_steps = 25
"""


@pytest.fixture(scope="module")
def drawn(jobs: Jobs) -> dict[str, object]:
    """1,210 records over 97 pictures, in S3 by way of the command line."""
    images = jobs.folder / "drawn"
    images.mkdir()
    for number in range(97):
        (images / f"{number}.jpg").write_bytes(drawn_picture(7 * number, width=64, height=48, kind="JPEG"))
    records = jobs.folder / "drawn.json"
    records.write_text(json.dumps([llava(number) for number in range(NUM_RECORDS)]))
    arguments = ("--records", records, "--images", images, "--name", "drawn", "--split", "train", "--json")
    document: dict[str, object] = jobs.run("ingest", "instruct", *arguments).document
    return document


def llava(number: int) -> dict[str, object]:
    turns = [
        {"from": "human", "value": "<image>\nDescribe the image."},
        {"from": "gpt", "value": f"A plain area, number {number}."},
    ]
    return {"id": f"drawn-{number}", "image": f"{number % 97}.jpg", "conversations": turns}


def test_a_killed_stream_goes_on_with_other_workers_and_loses_nothing(
    jobs: Jobs, drawn: dict[str, object], tmp_path: Path
) -> None:
    """One worker, which is killed; then the driver is killed; then two workers go on."""
    recipe = jobs.recipe("drawn-stream", RECIPE)
    command = jobs.start("stream", recipe, "--ledger", "--set", "workers.num_workers=1")
    step = jobs.wait_for_step("drawn-stream", 1, command, "read")
    jobs.train_workers()[0].kill()
    stopped_at = jobs.wait_for_step("drawn-stream", step + 30, command, "read")
    command.process.kill()
    assert "attempt failed (1 of 2 allowed)" in command.wait().stderr

    finished = jobs.run("stream", recipe, "--ledger", "--json", "--set", "workers.num_workers=2")
    assert int(re.findall(r"going on from step (\d+)", finished.stderr)[0]) >= stopped_at
    result = finished.document
    assert result["num_steps"] == NUM_RECORDS // 12 * 3
    assert 0 < result["num_samples"] < result["num_steps"] * 12, "it went on and did not start anew"
    assert result["ledger"] == {
        "num_steps": result["num_steps"],
        "num_records": result["num_steps"] * 12,
        "num_wrong_steps": 0,
        "num_lost": 0,
        "num_doubled": 0,
    }
    # The ledger is not only as long as it should be: a plan with another seed finds fault with it.
    with jobs.connected():
        other = prepare_records(load_recipe(str(recipe), ["train.seed=1"]))
        assert check_ledger(read_ledger("s3://tinyemo/runs/drawn-stream"), other, 50).num_wrong_steps >= 50
    again = jobs.run("stream", recipe, "--ledger", "--json")
    assert again.document == result
    refused = jobs.run("stream", recipe, "--set", "train.seed=1")
    assert "seed 0 -> 1" in refused.error


def test_what_cannot_be_read_is_one_line(jobs: Jobs, drawn: dict[str, object]) -> None:
    recipe = jobs.recipe("no-records", RECIPE)
    assert "names no data set" in jobs.run("stream", "emotion6").error
    features = jobs.run("stream", recipe, "--set", 'records.datasets=["s3://tinyemo/datasets/emotion6"]')
    assert "holds features; this needs instruct" in features.error
    planned = jobs.run("stream", recipe, "--dry-run")
    assert planned.code == 0
    assert re.search(rf"^records_per_epoch +{NUM_RECORDS}$", planned.stdout, re.MULTILINE)
    assert "[records]" in planned.stdout
