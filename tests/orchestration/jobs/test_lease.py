"""One driver per run name: real processes, stopped, woken and killed, on a real S3 server."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestration.jobs import lease as module
from orchestration.jobs.lease import Holder, Lease, LeaseDocument, hold_lease, read_claim, read_lease
from orchestration.recipe import Recipe, parse_recipe
from orchestration.services import storage
from tinyemo.errors import LostLeaseError, TrainingError

DATA = {"train": "a" * 64}
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe({"name": "held"}, source="test")


@pytest.fixture
def start(s3_root: str) -> Iterator[Start]:
    """Start a driver on the test's folder; see lease_driver.py."""
    drivers: list[subprocess.Popen[str]] = []

    def start_driver(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).parent / "lease_driver.py"), s3_root, *map(str, arguments)]
        drivers.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return drivers[-1]

    yield start_driver
    for driver in drivers:
        driver.kill()
        driver.wait(30)


def wait_for(uri: str) -> None:
    deadline = time.monotonic() + 60
    while not storage.exists(uri):
        assert time.monotonic() < deadline, uri
        time.sleep(0.05)


def said(driver: subprocess.Popen[str]) -> list[str]:
    return driver.communicate(timeout=60)[0].splitlines()


def tokens(root: str, num_steps: int) -> list[int]:
    return [int(storage.read_bytes(f"{root}/steps/{number}")) for number in range(num_steps)]


@pytest.mark.parametrize("stops", ["between two writes", "between check and write"])
def test_a_driver_that_was_stopped_and_taken_over_writes_nothing_more(stops: str, start: Start, s3_root: str) -> None:
    first = start(2, 60, 20 if stops == "between check and write" else -1)
    wait_for(f"{s3_root}/steps/19")
    if stops == "between two writes":
        first.send_signal(signal.SIGSTOP)
    else:
        time.sleep(0.5)
    second = start(2, 60)
    wait_for(f"{s3_root}/steps/30")
    before = {uri: storage.read_with_etag(uri) for uri in storage.list_prefix(f"{s3_root}/steps")}
    first.send_signal(signal.SIGCONT)
    lines = said(first)
    assert first.returncode == 2
    assert lines[-1].startswith("error: ")
    assert "took it over" in lines[-1]
    assert len([line for line in lines if line.startswith("error")]) == 1
    lines = said(second)
    assert lines[-1] == "done"
    assert any("took" in line and "over from" in line for line in lines)
    assert all(storage.read_with_etag(uri) == content for uri, content in before.items())
    written = tokens(s3_root, 60)
    assert written == sorted(written)
    assert set(written) == {1, 2}
    assert storage.read_json(f"{s3_root}/latest.json") == {"step": 59, "token": 2}
    assert storage.read_json(f"{s3_root}/result.json") == {"token": 2}
    assert storage.read_json(f"{s3_root}/run.json")["mlflow_run_id"] == "run-1"


def test_of_two_drivers_at_once_one_works_and_the_other_finds_the_result(start: Start, s3_root: str) -> None:
    outputs = [said(driver) for driver in [start(30, 20), start(30, 20)]]
    assert sorted(lines[-1] for lines in outputs) == ["done", "finished already"]
    assert set(tokens(s3_root, 20)) == {1}
    (waiting,) = [lines[0] for lines in outputs if lines[-1] == "finished already"]
    assert "held is being run by " not in waiting or "(pid " in waiting


def test_a_driver_that_was_killed_on_this_machine_is_replaced_at_once(start: Start, s3_root: str) -> None:
    first = start(1000, 40)
    wait_for(f"{s3_root}/steps/5")
    first.kill()
    first.wait(30)
    began_at = time.monotonic()
    assert said(start(1000, 40))[-1] == "done"
    assert time.monotonic() - began_at < 60
    assert set(tokens(s3_root, 40)) == {1, 2}


def elsewhere(root: str, nonce: str) -> None:
    """Renew the lease as a driver on another machine would, whose clock is decades behind."""
    holder = Holder(user="ada", host="far", pid=7, started_at="1999-01-01T00:00:00+00:00", process="there/boot/1")
    document = LeaseDocument(token=4, lease_id="theirs", nonce=nonce, holder=holder)
    storage.write_bytes(f"{root}/lease.json", document.model_dump_json().encode())


def test_a_driver_that_is_alive_keeps_its_name_whatever_its_clock_says(
    s3_root: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OLD_AFTER_S", 1.5)
    monkeypatch.setattr(module, "WAIT_S", 4.0)
    monkeypatch.setattr(module, "POLL_S", 0.2)
    stop = threading.Event()
    elsewhere(s3_root, "0")

    def renew() -> None:
        beat = 0
        while not stop.wait(0.3):
            beat += 1
            elsewhere(s3_root, str(beat))

    thread = threading.Thread(target=renew)
    thread.start()
    lines: list[str] = []
    try:
        with (
            pytest.raises(TrainingError, match=r"\S+ is being run by ada on far \(pid 7, .*which is alive: wait for"),
            hold_lease(s3_root, recipe, DATA, progress=lines.append),
        ):
            raise AssertionError("unreachable")
        info = read_lease(s3_root)
    finally:
        stop.set()
        thread.join()
    assert len(lines) == 1
    assert "is being run by ada on far" in lines[0]
    assert info is not None
    assert (info.is_alive, info.token) == (True, 4)
    assert info.age_s < 2


def test_a_torn_heartbeat_is_no_sign_of_life(s3_root: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OLD_AFTER_S", 1.0)
    monkeypatch.setattr(module, "POLL_S", 0.1)
    elsewhere(s3_root, "0")
    stop = threading.Event()

    def tear() -> None:
        time.sleep(0.4)
        for number in range(4):
            storage.write_bytes(f"{s3_root}/lease.json", b'{"token": 4, "hol' + bytes([65 + number]))
            if stop.wait(0.1):
                return

    thread = threading.Thread(target=tear)
    thread.start()
    with hold_lease(s3_root, recipe, DATA) as lease:
        stop.set()
        thread.join()
        assert lease.token == 5
        lease.check()
        storage.write_bytes(f"{s3_root}/lease.json", b"{")
        assert read_lease(s3_root) is None
        with pytest.raises(LostLeaseError, match="another driver took it over; nothing more was written"):
            lease.check()


def test_a_lease_is_given_back_and_taken_again_at_once(s3_root: str, recipe: Recipe) -> None:
    for token in (1, 2, 3):
        with hold_lease(s3_root, recipe, DATA) as lease:
            assert lease.token == token
            info = read_lease(s3_root)
            assert info is not None
            assert info.is_alive
            assert "pid" in info.holder
        info = read_lease(s3_root)
        assert info is not None
        assert (info.is_alive, info.holder, info.token) == (False, "", token)


def test_a_lease_is_renewed_while_it_is_held(s3_root: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    with hold_lease(s3_root, recipe, DATA) as lease:
        etags = set()
        for _ in range(8):
            etags.add(storage.read_with_etag(f"{s3_root}/lease.json")[1])
            time.sleep(0.1)
        assert len(etags) > 3
        lease.check()


def test_a_claim_is_what_a_later_driver_goes_on_with(s3_root: str, recipe: Recipe) -> None:
    with hold_lease(s3_root, recipe, DATA, kind="tune") as lease:
        assert (lease.run_id, lease.device) == (None, None)
        lease.write_claim("run-1", "gpu")
    with hold_lease(s3_root, recipe, DATA) as lease:
        assert (lease.run_id, lease.device) == ("run-1", "gpu")
        copy: Lease = pickle.loads(pickle.dumps(lease))
        copy.write_json(f"{s3_root}/latest.json", {"step": 1})
        copy.write_json(f"{s3_root}/latest.json", {"step": 2})
    assert storage.read_json(f"{s3_root}/latest.json") == {"step": 2}
    claim = read_claim(s3_root, recipe, DATA)
    assert claim is not None
    assert claim["mlflow_run_id"] == "run-1"
    other = parse_recipe({"name": "held", "train": {"seed": 7}}, source="test")
    with pytest.raises(TrainingError, match=r"train\.seed 0 -> 7"), hold_lease(s3_root, other, DATA):
        raise AssertionError("unreachable")
    assert storage.read_json(f"{s3_root}/run.json")["kind"] == "tune"


def test_a_run_that_was_removed_stops_its_driver(s3_root: str, recipe: Recipe) -> None:
    with hold_lease(s3_root, recipe, DATA) as lease:
        storage.delete_prefix(s3_root)
        with pytest.raises(LostLeaseError, match="its lease was removed"):
            lease.write(f"{s3_root}/latest.json", b"1")
    assert not storage.exists(f"{s3_root}/latest.json")
    assert read_lease(s3_root) is None
