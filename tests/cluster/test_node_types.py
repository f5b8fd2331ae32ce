"""What the head of an autoscaling cluster tells the jobs about its node types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from cluster.node_types import report_node_types

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[ClusterConfig]:
    """The configurations that were sent to the cluster's GCS."""
    sent: list[ClusterConfig] = []

    class Client:
        def __init__(self, address: str) -> None:
            assert address == "head:6379"

        def report_cluster_config(self, message: bytes) -> None:
            sent.append(ClusterConfig.FromString(message))

    monkeypatch.setattr("ray._raylet.GcsClient", Client)
    return sent


def _read(path: str) -> dict[str, Any]:
    *_, last = yaml.safe_load_all((ROOT / path).read_text())  # the cluster is the last document of KubeRay's file
    content: dict[str, Any] = last
    return content


def test_workers_of_the_launcher_file_are_reported(stored: list[ClusterConfig]) -> None:
    names = report_node_types(prepare_config(_read("ray_cluster.yaml")), "head:6379")
    assert set(names) == {"gpu_worker", "gpu_worker_large", "cpu_worker"}
    large = next(group for group in stored[0].node_group_configs if group.name == "gpu_worker_large")
    assert (dict(large.resources)["GPU"], large.max_count) == (4, 2)


def test_worker_groups_of_kuberay_are_reported(stored: list[ClusterConfig]) -> None:
    resource = _read("cluster/kuberay.yaml")
    resource["metadata"]["namespace"] = "default"
    report_node_types(_derive_autoscaling_config_from_ray_cr(resource), "head:6379")
    groups = {group.name: group for group in stored[0].node_group_configs}
    assert set(groups) == {"gpu", "cpu"}
    assert (dict(groups["gpu"].resources)["GPU"], groups["gpu"].max_count) == (1, 8)
