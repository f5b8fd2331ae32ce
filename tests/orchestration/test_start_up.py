"""Commands that need neither a model nor Ray start without them; every command ends without taking Python apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "deepspeed", "transformers", "mlflow")
# Runs the command line, then says on the last line of stdout which modules were imported.
PROGRAM = f"""
import sys
from orchestration.cli import main
try:
    main()
except SystemExit:
    pass
print("imported:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["assets", "list"],
        ["platform", "status"],
        ["ingest", "features", "nothing", "--root", "here"],
        ["ingest", "instruct", "--records", "nothing", "--images", "nowhere", "--root", "here"],
        ["ingest", "oasis", "--negative-below", "9"],
        ["features", "nothing", "--name", "x", "--cpus-per-actor", "0"],
        ["train", "emotion6", "--set", "train.seed=x"],
        ["train", "emotion6", "--set", "data.dataset=nowhere"],
        ["family", "family", "--dry-run"],
        ["stream", "oasis-stream"],
        ["tune", "search-emotion6"],
        ["tune", "search-emotion6", "--dry-run"],
        ["train", "reasoning-offline"],
        ["family", "reasoning-family"],
        ["compare", "one", "another"],
    ],
    ids=" ".join,
)
def test_a_command_imports_only_what_it_needs(arguments: list[str], tmp_path: Path) -> None:
    services = ("AWS_", "MLFLOW_", "RAY_", "TINYEMO_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(services)}
    environment |= {"TINYEMO_STATE": str(tmp_path), "TINYEMO_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert result.stdout.splitlines()[-1] == "imported:", result.stderr


# The object clings to life as what Arrow's threads hold does: only where the interpreter is taken apart is it let go.
ENDING = """
import atexit
import sys
from orchestration import cli
class Held:
    def __del__(self):
        print("taken apart")
held = Held()
def app():
    atexit.register(print, "; handlers ran")
    sys.stdout.write("result")
    sys.stderr.write("progress")
    raise SystemExit(3)
cli.app = app
cli.main()
"""


def test_a_command_ends_with_its_code_and_output_before_python_is_taken_apart() -> None:
    result = subprocess.run([sys.executable, "-c", ENDING], check=False, capture_output=True, text=True, cwd=REPOSITORY)
    assert (result.returncode, result.stdout, result.stderr) == (3, "result; handlers ran\n", "progress")
