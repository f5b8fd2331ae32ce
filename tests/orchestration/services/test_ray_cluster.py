"""Joining a cluster, choosing a device and waiting for resources, on a real cluster of two CPUs."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from orchestration.services import ray_cluster
from orchestration.services.ray_cluster import choose_device, cluster_could_bring, room_for, wait_for_resources
from tinyemo.errors import ConfigError, PlatformError


@pytest.fixture
def head() -> Iterator[socket.socket]:
    """A port that answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener
    ray_cluster._is_lost = False


def address_of(head: socket.socket) -> str:
    return f"127.0.0.1:{head.getsockname()[1]}"


def test_an_error_of_ray_means_a_lost_cluster_only_if_nothing_answers(
    head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address_of(head))
    ray_cluster.require_cluster(RuntimeError("an actor died"))
    assert not ray_cluster.is_lost()
    head.close()
    with pytest.raises(PlatformError, match=r"is gone \(.*refused.*\): once it is up again"):
        ray_cluster.require_cluster(RuntimeError("an actor died"))
    assert ray_cluster.is_lost()


def test_a_cluster_that_does_not_answer_is_one_line_within_seconds(
    head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address_of(head))
    head.close()
    began_at = time.monotonic()
    with pytest.raises(PlatformError, match=r"no Ray cluster answers at 127.* `tinyemo platform up`"):
        ray_cluster.connect()
    assert time.monotonic() - began_at < 10
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match="RAY_ADDRESS is not set"):
        ray_cluster.connect()


def test_joining_a_cluster_imports_no_deep_learning_library() -> None:
    code = (
        "import sys, orchestration.services.ray_cluster; sys.exit('torch' in sys.modules or 'ray.train' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_cluster_without_an_autoscaler_has_room_for_what_is_up(cluster: str) -> None:
    assert cluster_could_bring() == [{"CPU": 2.0}]
    assert [room_for({"CPU": amount}) for amount in (0.1, 1, 1.5, 2, 3)] == [20, 2, 1, 1, 0]
    assert room_for({"CPU": 1, "GPU": 1}) == 0
    assert room_for({"CPU": 1, "GPU": 0}) == 2


def test_a_device_is_chosen_by_what_the_cluster_can_have(cluster: str) -> None:
    assert [choose_device("cpu", 1), choose_device("auto", 1)] == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match=r'"gpu" with 2 workers needs 2 GPUs.* can have 0.* offer \(CPU 2\)'):
        choose_device("gpu", 2)


@pytest.mark.parametrize("bundles", [[{"GPU": 1.0}], [{"CPU": 3.0}], [{"CPU": 1.0}] * 3])
def test_workers_that_can_never_start_are_an_error_at_once(bundles: list[dict[str, float]], cluster: str) -> None:
    with pytest.raises(ConfigError, match=r"train needs . x \(.PU .\), and this cluster has room for .*\(CPU 2\)"):
        wait_for_resources(bundles, 60, "train", print)


def test_free_resources_are_handed_back_at_once(cluster: str) -> None:
    lines: list[str] = []
    for _ in range(3):
        wait_for_resources([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 0.0}], 20, "train", lines.append)
    assert lines == []


@pytest.fixture
def release(cluster: str) -> Iterator[Callable[[], None]]:
    """Both CPUs are held by a placement group; calling the fixture's value frees them."""
    import ray

    group = ray.util.placement_group([{"CPU": 2}])
    assert group.wait(20)
    yield lambda: ray.util.remove_placement_group(group)
    ray.util.remove_placement_group(group)


def test_a_wait_says_what_is_missing_and_who_holds_it(
    release: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "FIRST_LINE_AFTER_S", 0.0)
    lines: list[str] = []

    def free_after_a_line(line: str) -> None:
        lines.append(line)
        threading.Thread(target=release).start()

    wait_for_resources([{"CPU": 1.0}] * 2, 60, "stage select", free_after_a_line)
    assert len(lines) == 1  # at most one in SECONDS_PER_LINE
    assert lines[0].startswith("stage select: waiting for 1 s; it needs 2 x (CPU 1); free now: none; ")
    assert lines[0].endswith("this command holds CPU 2")


def test_a_wait_ends_after_its_timeout(release: Callable[[], None]) -> None:
    began_at = time.monotonic()
    with pytest.raises(PlatformError, match=r"train: waited 2 s; it needs .* raise workers.start_timeout_s"):
        wait_for_resources([{"CPU": 2.0}], 2, "train", print)
    assert time.monotonic() - began_at < 20
