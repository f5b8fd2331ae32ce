"""Files for clusters elsewhere: the launcher's schema, and what must never drift from the tested versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


def _pinned(name: str) -> str:
    match = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1)


def _read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return content


def test_the_launcher_accepts_ray_cluster_yaml():
    """Types, names and required fields, offline."""
    prepared = prepare_config(_read("ray_cluster.yaml"))
    validate_config(prepared)
    gpu_types = [kind for kind in prepared["available_node_types"].values() if kind["resources"].get("GPU")]
    assert gpu_types
    assert all(kind["min_workers"] == 0 and kind["max_workers"] > 0 for kind in gpu_types)


def test_kuberay_nodes_share_image_token_and_services():
    """Every pod runs the same image, knows the token, reads endpoints from a secret; no secret stands in the file."""
    manifest = _read("cluster/kuberay.yaml")
    assert manifest["kind"] == "RayCluster"
    spec = manifest["spec"]
    assert spec["rayVersion"] == _pinned("ray")
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert all(group["minReplicas"] == 0 for group in spec["workerGroupSpecs"])
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == groups[0]["template"]["spec"]["containers"][0]["image"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert container["envFrom"] == [{"secretRef": {"name": "tinyemo-services"}}]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert pod["securityContext"]["fsGroup"] == 1100


def test_nodes_elsewhere_install_the_tested_torch():
    """Image and launcher name torch alone, before the constraints; both must follow the pin."""
    wanted = f"torch=={_pinned('torch')}"
    for path in ("cluster/Dockerfile", "ray_cluster.yaml"):
        assert re.findall(r"torch==\S+", (ROOT / path).read_text()) == [wanted], path
