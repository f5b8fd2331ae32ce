"""Ray's own autoscaler with its fake provider: nodes are processes on this machine, none of them is up at first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from nodes import HEAD, Nodes, documents, running_nodes

from tests.conftest import choose_platform_ports

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CONFIG: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 2,
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu_worker": {
            "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
        },
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "file_mounts_sync_continuously": False,
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


@pytest.fixture(scope="module")
def autoscaling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head whose autoscaler may bring one node with a GPU."""
    path, port = tmp_path_factory.mktemp("autoscaling") / "cluster.yaml", choose_platform_ports()["ray"]
    provider = {"type": "fake_multinode", "gcs_address": f"{HEAD}:{port}"}
    path.write_text(json.dumps(CONFIG | {"provider": provider}))
    environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with running_nodes(port, [f"--autoscaling-config={path}"], environment) as nodes:
        reported = [sys.executable, "-m", "cluster.node_types", str(path)]
        subprocess.run(reported, check=True, env=nodes.environment, timeout=60)
        yield nodes


def test_a_run_gets_the_gpu_node_that_the_autoscaler_can_bring(autoscaling: Nodes) -> None:
    before, too_many, lines, after = documents(
        autoscaling.drive(
            """
print(json.dumps([choose_device("auto", 1), choose_device("auto", 2), room_for({"GPU": 1, "CPU": 1}),
                  ray.cluster_resources().get("GPU", 0)]))
try:
    choose_device("gpu", 4)
except ConfigError as error:
    print(json.dumps(str(error)))
lines = []
wait_for_resources([{"CPU": 1, "GPU": 1}], 100, "stage select", lines.append)
print(json.dumps(lines))
print(json.dumps([choose_device("auto", 1), room_for({"GPU": 1}), ray.cluster_resources().get("GPU", 0)]))
"""
        ),
        timeout_s=200,
    )
    assert before == ["gpu", "cpu", 1, 0]
    assert (
        "needs 4 GPUs, and this cluster can have 1: its node types offer (CPU 1, GPU 1); set workers.device" in too_many
    )
    assert lines[0].startswith("stage select: waiting for ")
    assert "it needs 1 x (CPU 1, GPU 1); free now: none; the autoscaler can start nodes with (CPU 1, GPU 1)" in lines[0]
    assert after == ["gpu", 1, 1]
