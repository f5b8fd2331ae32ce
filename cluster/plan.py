"""Plan of a platform before any of its servers runs: ports, folders and the environment of its jobs."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster.credentials import ensure_credentials, read_mlflow_login, read_s3_keys
from cluster.services import HOST
from cluster.state import PlatformPorts, PlatformState, make_private_folder
from tinyemo.errors import PlatformError

BUCKET = "tinyemo"
MAX_RAY_FOLDER_BYTES = 40
"""Longest folder for Ray's sessions: Ray appends up to 66 bytes, and a socket path has at most 107."""
PORT_OPTIONS = {"s3": "--s3-port", "mlflow": "--mlflow-port", "ray": "--ray-port", "dashboard": "--dashboard-port"}


def keep_plan(recorded: PlatformState, wanted: Mapping[str, int]) -> PlatformState:
    """Return the recorded platform unchanged, which is partly or wholly up.

    Raises:
        PlatformError: where a wanted port differs from the recorded one.
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
    """Return a platform that does not run yet; the state folder keeps the credentials of an earlier one.

    Raises:
        PlatformError: where the folder cannot be used or holds damaged credentials.
    """
    ports = PlatformPorts.model_validate(dict(wanted))
    for name in ("credentials", "logs", "s3", "mlflow"):
        make_private_folder(folder / name)
    ensure_credentials(folder, BUCKET)
    return PlatformState(
        platform_id=secrets.token_hex(8),
        bucket=BUCKET,
        ports=ports,
        num_cpus=num_cpus or _count_cpus(),
        object_store_bytes=int(object_store_gb * 1e9),
        ray_folder=_choose_ray_folder(folder),
        environment={
            "AWS_ENDPOINT_URL": f"http://{HOST}:{ports.s3}",
            **read_s3_keys(folder, "jobs"),
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "TINYEMO_BUCKET": BUCKET,
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{ports.mlflow}",
            **read_mlflow_login(folder),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # In capitals, because a driver replaces "localhost" and "127.0.0.1" by the machine's outer address, where
            # this head does not listen.
            "RAY_ADDRESS": f"LOCALHOST:{ports.ray}",
            "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{ports.dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "credentials" / "ray_token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # The watcher is one more process in every job; it looks for nodes that are about to be taken away, and
            # the only node here stays.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        },
        processes={},
    )


def _choose_ray_folder(folder: Path) -> Path:
    """Return a folder for Ray's sessions: in the state folder, or in a temporary one where that path is too long.

    Ray opens its own folder to everybody, so the folder around it must be private.
    """
    inside = folder / "ray"
    if len(os.fsencode(inside)) <= MAX_RAY_FOLDER_BYTES:
        return inside
    return Path(tempfile.mkdtemp(prefix="tinyemo-")) / "ray"


def _count_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
