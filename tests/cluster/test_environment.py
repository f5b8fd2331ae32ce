"""The local platform fills gaps and never mixes its credentials with somebody else's endpoint."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.environment import GROUPS, find_missing, load_platform_environment, only_platform_s3
from cluster.process import MARKER, ProcessRecord, read_start
from cluster.state import PlatformPorts, PlatformState, make_private_folder, save_state
from tinyemo.errors import PlatformError

PLATFORM = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:8333",
    "AWS_ACCESS_KEY_ID": "local-key",
    "AWS_SECRET_ACCESS_KEY": "local-secret",
    "AWS_REGION": "us-east-1",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
    "RAY_ADDRESS": "LOCALHOST:6379",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": "/state/credentials/ray_token",
    "TINYEMO_BUCKET": "tinyemo",
}
ALL_RUNNING = {"s3", "mlflow", "ray"}
ALL_NAMES = sorted({name for group in GROUPS for name in (*group.deciding, *group.passive)})


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of any service is set; what a test sets is undone after it."""
    for name in (*ALL_NAMES, MARKER):
        monkeypatch.setenv(name, "")  # remembers the name, so that a value set by the code is undone too
        monkeypatch.delenv(name)
    return monkeypatch


def _record_platform(folder: Path, *, is_up: bool) -> PlatformState:
    """A record whose three processes are this test's own, or long gone."""
    started = read_start(os.getpid()) if is_up else "never"
    assert started is not None
    process = ProcessRecord(pid=os.getpid(), started=started, marker="x")
    state = PlatformState(
        platform_id=secrets.token_hex(4),
        bucket="tinyemo",
        ports=PlatformPorts(),
        num_cpus=1,
        object_store_bytes=1,
        ray_folder=folder,
        environment=PLATFORM,
        processes=dict.fromkeys(ALL_RUNNING, process),
    )
    save_state(make_private_folder(folder), state)
    return state


def test_an_empty_environment_gets_all(tmp_path: Path, bare_environment: pytest.MonkeyPatch):
    """The common case: nothing is set, the platform is up."""
    _record_platform(tmp_path, is_up=True)
    load_platform_environment(tmp_path)
    assert {name: os.environ.get(name) for name in PLATFORM} == PLATFORM


def test_the_state_folder_comes_from_the_environment(tmp_path: Path, bare_environment: pytest.MonkeyPatch):
    """TINYEMO_STATE names the folder where no option does."""
    _record_platform(tmp_path, is_up=True)
    bare_environment.setenv("TINYEMO_STATE", str(tmp_path))
    load_platform_environment()
    assert os.environ["RAY_ADDRESS"] == PLATFORM["RAY_ADDRESS"]


def test_a_dead_platform_sets_nothing(tmp_path: Path, bare_environment: pytest.MonkeyPatch):
    """A record that a crash left behind does not send anybody to a dead endpoint."""
    _record_platform(tmp_path, is_up=False)
    load_platform_environment(tmp_path)
    assert not [name for name in ALL_NAMES if name in os.environ]


def test_no_platform_sets_nothing(tmp_path: Path, bare_environment: pytest.MonkeyPatch):
    """A user with services elsewhere never needs a state folder."""
    load_platform_environment(tmp_path / "absent")
    assert not [name for name in ALL_NAMES if name in os.environ]


def test_a_job_of_the_platform_keeps_what_it_inherited(tmp_path: Path, bare_environment: pytest.MonkeyPatch):
    """Ray rewrites RAY_ADDRESS for its jobs; that is no foreign cluster and nothing is added."""
    state = _record_platform(tmp_path, is_up=True)
    bare_environment.setenv(MARKER, f"{state.platform_id}:ray")
    bare_environment.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    load_platform_environment(tmp_path)
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:6379"


def test_a_damaged_record_is_one_clear_error(tmp_path: Path):
    """The line names the file."""
    (tmp_path / "platform.json").write_text("{")
    with pytest.raises(PlatformError, match=r"platform\.json is damaged"):
        load_platform_environment(tmp_path)


@given(
    current=st.dictionaries(st.sampled_from(ALL_NAMES), st.sampled_from(["", "mine", "http://s3.example"])),
    running=st.sets(st.sampled_from(sorted(ALL_RUNNING))),
)
def test_no_group_is_ever_mixed(current: dict[str, str], running: set[str]):
    """Set variables stay; a group with a foreign endpoint or credential gets nothing, as from a dead service."""
    missing = find_missing(current, PLATFORM, running)
    assert not [name for name in missing if current.get(name)]
    for group in GROUPS:
        names = {*group.deciding, *group.passive}
        is_foreign = any(current.get(name) for name in group.deciding)
        if is_foreign or group.service not in running:
            assert not names & missing.keys()
        else:
            assert {name for name in names & PLATFORM.keys() if not current.get(name)} == names & missing.keys()


def test_values_equal_to_ours_are_not_foreign():
    """A shell that has sourced platform.env keeps working."""
    missing = find_missing({"AWS_ENDPOINT_URL": PLATFORM["AWS_ENDPOINT_URL"]}, PLATFORM, ALL_RUNNING)
    assert missing["AWS_SECRET_ACCESS_KEY"] == PLATFORM["AWS_SECRET_ACCESS_KEY"]


def test_the_bucket_is_made_on_the_platform_alone(bare_environment: pytest.MonkeyPatch):
    """`up` talks to its own S3 whatever the user has set, and puts everything back."""
    bare_environment.setenv("AWS_PROFILE", "work")
    bare_environment.setenv("AWS_ENDPOINT_URL", "http://s3.example")
    with only_platform_s3(PLATFORM):
        assert "AWS_PROFILE" not in os.environ
        assert os.environ["AWS_ENDPOINT_URL"] == PLATFORM["AWS_ENDPOINT_URL"]
    assert os.environ["AWS_PROFILE"] == "work"
    assert os.environ["AWS_ENDPOINT_URL"] == "http://s3.example"
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ
