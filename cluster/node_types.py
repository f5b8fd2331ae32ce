"""Tell a Ray cluster which nodes its autoscaler can bring: `python -m cluster.node_types [LAUNCHER_FILE]`.

Jobs read this to choose devices before any worker node is up. Ray's autoscalers know their node types but do not
publish them; this command stores them where Ray's own libraries look for them (GCS, ClusterConfig). Run it once on the
head node after `ray start`: with the launcher's file, or in a KubeRay pod without an argument.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with Ray

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def report_node_types(config: dict[str, Any], gcs_address: str) -> list[str]:
    """Store the autoscaler's worker node types in the cluster; return their names.

    Args:
        config: an autoscaler's configuration, with `available_node_types` and `head_node_type`.
        gcs_address: host:port of the head.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without stubs
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    message = ClusterConfig()
    for name, node_type in config["available_node_types"].items():
        if name != config["head_node_type"]:
            group = message.node_group_configs.add(name=name)
            group.min_count = int(node_type.get("min_workers", 0))
            group.max_count = int(node_type.get("max_workers", config.get("max_workers", 0)))
            for resource, amount in node_type["resources"].items():
                group.resources[resource] = int(amount)
    GcsClient(gcs_address).report_cluster_config(message.SerializeToString())
    return [group.name for group in message.node_group_configs]


def read_config(arguments: list[str]) -> dict[str, Any]:
    """Return the launcher's file, or what KubeRay's operator says of the cluster whose head pod this is."""
    if arguments:
        loaded: dict[str, Any] = yaml.safe_load(Path(arguments[0]).expanduser().read_text())
        return loaded
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    producer: Any = AutoscalingConfigProducer(os.environ["RAY_CLUSTER_NAME"], NAMESPACE_FILE.read_text())
    produced: dict[str, Any] = producer()
    return produced


if __name__ == "__main__":
    names = report_node_types(read_config(sys.argv[1:]), os.environ.get("RAY_ADDRESS", "127.0.0.1:6379"))
    sys.stdout.write(f"node types: {', '.join(names)}\n")
