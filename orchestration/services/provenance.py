"""Which code runs, and who runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def git_state() -> dict[str, str]:
    """Tags `git_commit` and `git_dirty` ("true", "false") of the code that runs.

    Where the code lies in no git checkout, as in a Ray job's working directory, they come from TINYEMO_GIT_COMMIT and
    TINYEMO_GIT_DIRTY, which whoever submits the job sets; else they are "unknown". An untracked file makes dirty.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        # A copy in site-packages lies inside a checkout that is not its own.
        git("ls-files", "--error-unmatch", here.name)
        return {
            "git_commit": git("rev-parse", "HEAD"),
            "git_dirty": "true" if git("status", "--porcelain") else "false",
        }
    except (OSError, subprocess.SubprocessError):
        return {
            "git_commit": os.environ.get("TINYEMO_GIT_COMMIT") or "unknown",
            "git_dirty": os.environ.get("TINYEMO_GIT_DIRTY") or "unknown",
        }


def identity_tags() -> dict[str, str]:
    """Who runs what code; the `mlflow.` names are the ones that the UI has columns for."""
    git = git_state()
    return git | {
        "mlflow.user": os.environ.get("USER") or "unknown",
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git["git_commit"],
    }
