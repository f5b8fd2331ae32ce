"""Files for clusters elsewhere: the launcher's schema, and what must never drift from the tested versions."""

from __future__ import annotations

import json
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


def _read(path: str, kind: str | None = None) -> dict[str, Any]:
    """The only document of a file, or its only document of a kind."""
    documents = yaml.safe_load_all((ROOT / path).read_text())
    (content,) = [document for document in documents if kind in (None, document.get("kind"))]
    return dict(content)


def test_the_launcher_accepts_ray_cluster_yaml():
    """Types, names and required fields, offline."""
    prepared = prepare_config(_read("ray_cluster.yaml"))
    validate_config(prepared)
    gpu_types = [kind for kind in prepared["available_node_types"].values() if kind["resources"].get("GPU")]
    assert gpu_types
    assert all(kind["min_workers"] == 0 and kind["max_workers"] > 0 for kind in gpu_types)


def _pods() -> dict[str, dict[str, Any]]:
    """The pods of KubeRay's cluster by the name of their group."""
    spec = _read("cluster/kuberay.yaml", "RayCluster")["spec"]
    groups = {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_kuberay_nodes_share_image_version_and_services():
    """Every pod runs one image, named by its digest, and reads the same endpoints; the operator makes the token."""
    spec = _read("cluster/kuberay.yaml", "RayCluster")["spec"]
    assert spec["rayVersion"] == _pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert all(group["minReplicas"] == 0 for group in spec["workerGroupSpecs"])
    containers = [container for pod in _pods().values() for container in pod["containers"]]
    (image,) = {container["image"] for container in containers}
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", image)
    assert {str(container["envFrom"]) for container in containers} == {str(containers[0]["envFrom"])}
    for pod in _pods().values():
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounts | {"kubernetes-token"} >= {volume["name"] for volume in pod["volumes"]} >= mounts


def test_kuberay_pods_have_no_rights_that_they_do_not_need():
    """Kubernetes' standard "restricted", no account's token but the autoscaler's, and no S3 key."""
    namespace = _read("cluster/kuberay.yaml", "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    options = _read("cluster/kuberay.yaml", "RayCluster")["spec"]["autoscalerOptions"]
    containers = [container for pod in _pods().values() for container in pod["containers"]]
    for container in [*containers, options]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
    for pod in _pods().values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        accounts = {f"tinyemo-{name}" for name in ("head", "worker")}
        assert pod["serviceAccountName"] in accounts
    assert "kubernetes-token" in {mount["name"] for mount in options["volumeMounts"]}
    assert "kubernetes-token" not in {mount["name"] for container in containers for mount in container["volumeMounts"]}
    text = (ROOT / "cluster/kuberay.yaml").read_text()
    assert "AWS_ACCESS_KEY_ID" not in text
    assert "AWS_SECRET_ACCESS_KEY" not in text


def test_kubernetes_lets_nobody_reach_the_cluster_but_itself():
    """The policy covers every pod of the cluster, both ways, and keeps the cloud's metadata server out of reach."""
    policy = _read("cluster/kuberay.yaml", "NetworkPolicy")["spec"]
    own = {"matchLabels": {"ray.io/cluster": _read("cluster/kuberay.yaml", "RayCluster")["metadata"]["name"]}}
    assert policy["podSelector"] == own
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert {"from": [{"podSelector": own}]} in policy["ingress"]
    assert all(rule["from"] for rule in policy["ingress"])
    blocks = [target["ipBlock"] for rule in policy["egress"] for target in rule["to"] if "ipBlock" in target]
    assert all(block.get("except") == ["169.254.0.0/16"] for block in blocks if block["cidr"] == "0.0.0.0/0")


def test_readers_are_offered_by_cpu_nodes_alone():
    """Two for each CPU, on the launcher's nodes and on KubeRay's; tasks that read stay off the head."""
    types = _read("ray_cluster.yaml")["available_node_types"]
    assert {name: kind["resources"].get("reader") for name, kind in types.items() if "reader" in kind["resources"]} == {
        "cpu_worker": 2 * types["cpu_worker"]["resources"]["CPU"]
    }
    spec = _read("cluster/kuberay.yaml", "RayCluster")["spec"]
    assert "resources" not in spec["headGroupSpec"]["rayStartParams"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups["gpu"]["rayStartParams"] == {}
    resources = json.loads(json.loads(groups["cpu"]["rayStartParams"]["resources"]))
    cpus = groups["cpu"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert resources == {"reader": 2 * int(cpus)}


def test_aws_nodes_have_least_rights():
    """A profile of its own for head and workers, no open metadata server, encrypted disks, a chosen security group."""
    types = _read("ray_cluster.yaml")["available_node_types"]
    for name, kind in types.items():
        config = kind["node_config"]
        profile = "tinyemo-head" if name == "head" else "tinyemo-worker"
        assert config["IamInstanceProfile"] == {"Name": profile}
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert config["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert all(disk["Ebs"]["Encrypted"] is True for disk in config["BlockDeviceMappings"])
        assert config["SecurityGroupIds"]


def test_ray_starts_with_a_token_on_every_aws_node():
    """The commands set the mode themselves: a shell's start-up file may leave it out."""
    content = _read("ray_cluster.yaml")
    commands = [*content["head_start_ray_commands"], *content["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(re.search(r"RAY_AUTH_MODE=token .*ray start", command) for command in starts)


def test_the_image_starts_from_a_digest_and_holds_what_is_named():
    """The build is refused without a digest; `.dockerignore` keeps out everything that it does not name."""
    dockerfile = (ROOT / "cluster/Dockerfile").read_text()
    assert "ARG BASE\nFROM ${BASE}" in dockerfile
    assert "@sha256:*)" in dockerfile
    assert "--require-hashes -r requirements.lock" in dockerfile
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for name in line.split()[:-1]}
    assert copied == allowed


def test_the_lock_holds_the_tested_versions_with_hashes():
    """What `make setup` and the image install is what constraints.txt says; torch is installed before, by version."""
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=\S)", lock.strip())
    locked = {}
    for entry in entries:
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", entry)
        assert match is not None, entry
        assert "--hash=sha256:" in entry
        locked[_normalise(match[1])] = match[2]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    tested = {_normalise(name): version for name, version in tested.items()}
    assert {name: version for name, version in tested.items() if locked.get(name) != version} == {
        "torch": tested["torch"]
    }
    # Builds from source need it, and it comes with every new virtual environment in a version of its own.
    assert locked.keys() - tested.keys() <= {"setuptools"}


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_nodes_elsewhere_install_the_tested_torch():
    """Image and launcher name torch alone, before the constraints; both must follow the pin."""
    wanted = f"torch=={_pinned('torch')}"
    for path in ("cluster/Dockerfile", "ray_cluster.yaml"):
        assert re.findall(r"torch==\S+", (ROOT / path).read_text()) == [wanted], path
