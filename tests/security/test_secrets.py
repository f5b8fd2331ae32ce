"""No secret of a run is found where others can read: logs, MLflow, job metadata, dashboard, process list, S3."""

from __future__ import annotations

import base64
import http.client
import json
import sqlite3
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cluster.credentials import S3_ACTIONS, read_s3_keys
from cluster.services import find_program
from cluster.state import load_state
from orchestration.services import storage
from tests.conftest import RunningPlatform
from tests.orchestration.job_runner import Jobs, platform_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

API_KEY = "sk-planted/key+of=a&user?8f3a61"
PLANTED = {"OPENAI_API_KEY": API_KEY, "HF_TOKEN": f"hf_{API_KEY}", "MY_SECRET": f"other {API_KEY}"}
RECIPE = """
[data]
num_readers = 1
[train]
num_epochs = 1
[workers]
num_workers = 1
[engine]
precision = "fp32"
"""
FAMILY = f"""{RECIPE}
[family]
sizes = ["smollm2-135m"]
random_weights = true
"""
SEARCH = f"""{RECIPE}
[search]
num_trials = 2
num_startup_trials = 1
num_finalists = 1
finalist_seeds = 1
winner_seeds = 1
[search.space]
optimizer.max_lr = {{ low = 1e-4, high = 1e-2, log = true }}
"""
DASHBOARD_PAGES = (
    "/api/jobs/",
    "/nodes?view=summary",
    "/logical/actors",
    "/api/cluster_status",
    "/api/cluster_metadata",
    "/api/v0/actors?detail=true&limit=10000",
    "/api/v0/jobs?detail=true",
    "/api/v0/nodes?detail=true",
    "/api/v0/runtime_envs?detail=true",
    "/api/v0/tasks?detail=true&limit=10000",
    "/api/v0/workers?detail=true&limit=10000",
    "/api/train/v2/runs/v1",
    "/events",
)


def _spellings(secret: str) -> set[bytes]:
    """The secret as it is, URL-encoded, in JSON, and in base64 at each of the three places of a byte."""
    plain = secret.encode()
    found = {plain, urllib.parse.quote(secret, safe="").encode(), urllib.parse.quote_plus(secret).encode()}
    found.add(json.dumps(secret)[1:-1].encode())
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            # The first and last characters depend on the bytes around the secret.
            found.add(encode(bytes(shift) + plain)[4 if shift else 0 : -4])
    return found


def test_a_secret_is_found_in_every_spelling():
    """The search below can find what it looks for."""
    spellings = _spellings(API_KEY)
    for prefix in ("", "x", "xy"):
        text = f"{prefix}{API_KEY}, and more".encode()
        for encoded in (text, base64.b64encode(text), base64.urlsafe_b64encode(text)):
            assert any(spelling in encoded for spelling in spellings)
    assert any(spelling in urllib.parse.quote_plus(f"key={API_KEY}").encode() for spelling in spellings)


@pytest.fixture(scope="module")
def after_all_jobs(platform: RunningPlatform, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the commands printed; each ran with planted keys in its environment, one through Ray's job server."""
    folder = tmp_path_factory.mktemp("secrets")
    jobs = Jobs(folder, platform_environment(platform.environment, folder), platform.folder)
    printed = []

    def run(*arguments: object) -> None:
        outcome = jobs.run(*arguments, **PLANTED)
        printed.append(outcome.stdout + outcome.stderr)
        assert outcome.code == 0, outcome.stderr[-3000:]

    run("ingest", "features", "--generated", "--name", "secret-features", "--json")
    data = ("--set", "data.dataset=s3://tinyemo/datasets/secret-features")
    command = [find_program("ray"), "job", "submit", "--", "tinyemo", "train"]
    submitted = subprocess.run(
        [*command, str(jobs.recipe("secret-train", RECIPE)), *data],
        env=jobs.environment | PLANTED, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    printed.append(submitted.stdout + submitted.stderr)
    assert submitted.returncode == 0, printed[-1][-3000:]
    run("family", jobs.recipe("secret-family", FAMILY), *data)
    run("tune", jobs.recipe("secret-search", SEARCH), *data)
    _write_photographs(folder)
    run("ingest", "instruct", "--records", folder / "records.json", "--images", folder, "--name", "secret-images")
    encoder = folder / "encoder"
    _write_tiny_clip(encoder)
    run("features", "secret-images", "--encoder", encoder, "--name", "secret-encoded", "--actors", "1")
    return "\n".join(printed)


def _write_photographs(folder: Path) -> None:
    """Twelve pictures and a records file that asks and answers about each."""
    records = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        turns = [{"from": "human", "value": f"<image>\nWhat is in picture {number}?"}]
        turns.append({"from": "gpt", "value": f"Colours, for the {number}th time."})
        records.append({"id": str(number), "image": f"{number}.jpg", "label": "joy", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))


def _write_tiny_clip(folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**size, image_size=32, patch_size=16, projection_dim=16)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def _secrets(platform: RunningPlatform) -> dict[str, str]:
    found = {f"S3 key of {name}": read_s3_keys(platform.folder, name)["AWS_SECRET_ACCESS_KEY"] for name in S3_ACTIONS}
    found["token of Ray"] = Path(platform.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    found["password of MLflow"] = platform.environment["MLFLOW_TRACKING_PASSWORD"]
    return found | {"API key": API_KEY}


def _places(platform: RunningPlatform, printed: str) -> Iterator[tuple[str, bytes]]:
    """Every text that somebody else may read, with its name."""
    state = load_state(platform.folder)
    assert state is not None
    yield "output of the commands", printed.encode()
    for path in [*(platform.folder / "logs").rglob("*"), *state.ray_folder.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()
    with sqlite3.connect(f"file:{platform.folder}/mlflow/mlflow.db?mode=ro", uri=True) as database:
        yield "MLflow's database", "\n".join(database.iterdump()).encode()
    for uri in storage.list_prefix("s3://tinyemo"):
        yield uri, storage.read_bytes(uri)  # MLflow's artifacts, too
    token = Path(platform.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    for page in DASHBOARD_PAGES:
        connection = http.client.HTTPConnection("127.0.0.1", platform.ports["dashboard"], timeout=60)
        connection.request("GET", page, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        yield f"dashboard {page} ({answer.status})", answer.read()
        connection.close()
    for process in psutil.process_iter(["cmdline"]):
        yield f"process {process.pid}", " ".join(process.info["cmdline"] or []).encode()


@pytest.mark.usefixtures("platform_environment")
def test_no_secret_is_found_anywhere(platform: RunningPlatform, after_all_jobs: str):
    """After train, family, tune, features and ingest, in every spelling."""
    spellings = {name: _spellings(secret) for name, secret in _secrets(platform).items()}
    places = dict(_places(platform, after_all_jobs))
    names = "\n".join(places)
    for expected in (
        "runtime_env_agent.log",
        "raylet.out",
        "mlflow.log",
        "s3.log",
        "datasets/secret-features",
        "runs/",
    ):
        assert expected in names
    assert "(200)" in names
    leaks = [
        f"{secret} in {place}"
        for place, content in places.items()
        for secret, wanted in spellings.items()
        if any(spelling in content for spelling in wanted)
    ]
    assert leaks == []
