"""Which MLflow server there is, and how the client treats it.

MLflow is not imported here: a health check without it takes milliseconds and fails in seconds.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from tinyemo.errors import ConfigError, PlatformError

HEALTH_TIMEOUT_S = 5.0
# MLflow's defaults retry for four minutes; these give up after about ten seconds. A variable that the user set wins.
CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A curve that a dead driver still held in a queue is a curve that nobody sees.
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
ADVICE = "start one with `tinyemo platform up` or set MLFLOW_TRACKING_URI"


def require_server() -> str:
    """The address of an MLflow server that answers, from MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: the variable is not set or is no http address.
        PlatformError: the server does not answer within seconds, or is no MLflow server.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    shown = public_address(uri)
    if not uri:
        raise ConfigError(f"no MLflow server: {ADVICE}")
    if urlsplit(uri).scheme not in ("http", "https"):
        raise ConfigError(f"MLFLOW_TRACKING_URI must be an http or https address, got {shown!r}")
    try:
        with urllib.request.urlopen(f"{shown}/health", timeout=HEALTH_TIMEOUT_S) as response:
            is_mlflow = response.read(64).strip() == b"OK"
    except urllib.error.HTTPError as error:
        hint = "; start it with --allowed-hosts naming this host" if error.code == 403 else ""
        raise PlatformError(f"MLflow at {shown} answers HTTP {error.code} to a health check{hint}") from error
    except (OSError, ValueError) as error:
        raise PlatformError(f"no MLflow server answers at {shown} ({one_line(error)}): {ADVICE}") from error
    if not is_mlflow:
        raise PlatformError(f"what answers at {shown} is no MLflow server: {ADVICE}")
    return uri


def answers(uri: str) -> bool:
    """Whether anything answers at `uri` within seconds, whatever it says."""
    try:
        urllib.request.urlopen(f"{public_address(uri)}/health", timeout=HEALTH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def set_client_defaults() -> None:
    """Set what MLflow's client reads from the environment; call it before MLflow is imported."""
    for variable, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(variable, value)


def public_address(uri: str) -> str:
    """The address without user name and password."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def one_line(error: BaseException) -> str:
    """The text of an exception without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
