"""What a platform shall look like: ports, folders, and random credentials in files of mode 0600."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster.services import HOST
from cluster.state import PlatformPorts, PlatformState, make_private_folder, write_private
from tinyemo.errors import PlatformError

BUCKET = "tinyemo"
MAX_RAY_FOLDER_BYTES = 40
"""Ray appends up to 66 bytes of session and socket names; a socket path ends at 107."""
PORT_OPTIONS = {"s3": "--s3-port", "mlflow": "--mlflow-port", "ray": "--ray-port", "dashboard": "--dashboard-port"}


def keep_plan(recorded: PlatformState, wanted: Mapping[str, int]) -> PlatformState:
    """The platform that is partly or wholly up, as it is.

    Raises:
        PlatformError: where a port is wanted that differs from the recorded one.
    """
    for name, port in wanted.items():
        present = getattr(recorded.ports, name)
        if present != port:
            raise PlatformError(
                f"the platform is up with {PORT_OPTIONS[name]} {present}: "
                f"run `tinyemo platform down` before you move it to {port}"
            )
    return recorded


def make_plan(
    folder: Path, wanted: Mapping[str, int], *, num_cpus: int | None, object_store_gb: float
) -> PlatformState:
    """A platform of which nothing runs yet; credentials of an earlier one in this folder are kept.

    Raises:
        PlatformError: where the folder cannot be used or holds damaged credentials.
    """
    ports = PlatformPorts.model_validate(dict(wanted))
    for name in ("credentials", "logs", "s3", "mlflow"):
        make_private_folder(folder / name)
    access_key, secret_key = _ensure_s3_identity(folder / "credentials" / "s3.json")
    token_path = folder / "credentials" / "ray_token"
    if not token_path.exists():
        write_private(token_path, secrets.token_hex(32))
    return PlatformState(
        platform_id=secrets.token_hex(8),
        bucket=BUCKET,
        ports=ports,
        num_cpus=num_cpus or _count_cpus(),
        object_store_bytes=int(object_store_gb * 1e9),
        ray_folder=_choose_ray_folder(folder),
        environment={
            "AWS_ENDPOINT_URL": f"http://{HOST}:{ports.s3}",
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "TINYEMO_BUCKET": BUCKET,
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{ports.mlflow}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Capitals on purpose: a driver replaces "localhost" and "127.0.0.1" by the machine's outer address, where
            # this head does not listen.
            "RAY_ADDRESS": f"LOCALHOST:{ports.ray}",
            "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{ports.dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A process of its own in every job that looks for nodes about to be taken away: here is one, and it stays.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        },
        processes={},
    )


def _ensure_s3_identity(path: Path) -> tuple[str, str]:
    """Access key and secret key of the one S3 identity, random, made once per state folder."""
    if not path.exists():
        keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "tinyemo", "credentials": [keys], "actions": actions}
        write_private(path, json.dumps({"identities": [identity]}))
    try:
        keys = json.loads(path.read_text())["identities"][0]["credentials"][0]
        return keys["accessKey"], keys["secretKey"]
    except (ValueError, LookupError, TypeError) as error:
        raise PlatformError(f"{path} is damaged: delete it, and `up` makes new credentials") from error


def _choose_ray_folder(folder: Path) -> Path:
    """A folder for Ray's sessions inside the state folder, or a short one where socket paths would get too long."""
    inside = folder / "ray"
    if len(os.fsencode(inside)) <= MAX_RAY_FOLDER_BYTES:
        return make_private_folder(inside)
    return Path(tempfile.mkdtemp(prefix="tinyemo-"))


def _count_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
