"""Variables that lead a command to the local platform, kept apart from those of a user's own services.

Each outside service has a group of variables. Where the user has set one that says which service or whose credentials,
nothing of that group comes from the local platform: its secrets never travel to a foreign endpoint, nor foreign ones
to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.process import MARKER, is_alive
from cluster.state import load_state, resolve_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VariableGroup:
    """Environment variables of one outside service."""

    service: str
    """Name of the platform's service that stands behind them."""
    deciding: tuple[str, ...]
    """Endpoint and credentials: with one foreign value here the whole group belongs to the user."""
    passive: tuple[str, ...] = ()
    """Variables that are set where they are absent and decide nothing."""


GROUPS = (
    VariableGroup(
        service="s3",
        deciding=(
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AWS_PROFILE",
            "AWS_ROLE_ARN",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        ),
        passive=("AWS_REGION", "AWS_DEFAULT_REGION", "TINYEMO_BUCKET"),
    ),
    VariableGroup(
        service="mlflow",
        deciding=(
            "MLFLOW_TRACKING_URI",
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
            "MLFLOW_TRACKING_TOKEN",
        ),
        passive=("MLFLOW_DISABLE_TELEMETRY",),
    ),
    VariableGroup(
        service="ray",
        deciding=("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"),
        passive=("RAY_USAGE_STATS_ENABLED", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"),
    ),
)


def load_platform_environment(state: Path | None = None) -> None:
    """Set what `os.environ` lacks to reach the local platform, if one is up in the state folder.

    A variable that is set stays as it is. Where the user has set an endpoint or a credential of a service, none of the
    platform's variables for that service is set, and neither are those of a service that is not running.

    Raises:
        PlatformError: where the state folder holds a damaged record.
    """
    record = load_state(resolve_folder(state))
    if record is None or os.environ.get(MARKER, "").startswith(f"{record.platform_id}:"):
        return  # no platform, or we are one of its own jobs and have inherited everything
    running = {name for name, process in record.processes.items() if is_alive(process)}
    os.environ.update(find_missing(os.environ, record.environment, running))


def find_missing(current: Mapping[str, str], platform: Mapping[str, str], running: set[str]) -> dict[str, str]:
    """Return the platform's variables that `current` lacks, without those of services that the user has set up."""
    missing: dict[str, str] = {}
    for group in GROUPS:
        if group.service not in running:
            continue
        foreign = [name for name in group.deciding if current.get(name) and current[name] != platform.get(name)]
        if foreign:
            logger.warning("%s is set: the local platform's %s stays out", foreign[0], group.service)
            continue
        names = (*group.deciding, *group.passive)
        missing |= {name: platform[name] for name in names if name in platform and not current.get(name)}
    return missing


@contextlib.contextmanager
def only_platform_s3(platform: Mapping[str, str]) -> Iterator[None]:
    """Replace this process's S3 settings by those of the platform until the block ends."""
    names = (*GROUPS[0].deciding, *GROUPS[0].passive)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.update({name: platform[name] for name in names if name in platform})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
