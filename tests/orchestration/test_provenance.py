"""Which code a run is of: from git, or from the environment where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_git_state_falls_back_to_the_environment(tmp_path):
    """A copy outside any checkout, as in a Ray job's working directory."""
    package = tmp_path / "orchestration"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "provenance.py").write_text((REPOSITORY / "orchestration/services/provenance.py").read_text())
    code = "import json; from orchestration.services.provenance import git_state; print(json.dumps(git_state()))"

    def state(**variables: str) -> dict[str, str]:
        environment = {"PATH": os.environ["PATH"]} | variables
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60
        )
        return json.loads(done.stdout)

    assert state() == {"git_commit": "unknown", "git_dirty": "unknown"}
    submitted = {"TINYEMO_GIT_COMMIT": "abc", "TINYEMO_GIT_DIRTY": "false"}
    assert state(**submitted) == {"git_commit": "abc", "git_dirty": "false"}
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "orchestration"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    # Python's caches from the runs above are files that git does not know.
    (tmp_path / ".git/info/exclude").write_text("__pycache__\n")
    committed = state(**submitted)
    assert len(committed["git_commit"]) == 40
    assert committed["git_dirty"] == "false"
    (tmp_path / "new.py").touch()
    assert state() == committed | {"git_dirty": "true"}
