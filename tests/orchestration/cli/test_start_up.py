"""Commands that need neither a model nor Ray start without them; a command ends before Python is taken apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
HEAVY = ("torch", "ray", "deepspeed", "transformers", "mlflow")
COMMANDS = [
    ["--help"],
    ["train", "--help"],
    ["recipes", "list"],
    ["recipes", "show", "emotion6"],
    ["assets", "list"],
    ["platform", "status"],
    ["ingest", "features", "nothing", "--root", "here"],
    ["ingest", "instruct", "--records", "nothing", "--images", "nowhere", "--root", "here"],
    ["ingest", "oasis", "--negative-below", "9"],
    ["features", "nothing", "--name", "x", "--cpus-per-actor", "0"],
    ["train", "emotion6", "--set", "train.seed=x"],
    ["train", "emotion6", "--set", "data.dataset=nowhere"],
    ["train", "emotion6", "--set", "checkpoint.root=s3://nowhere/runs"],
    ["family", "family", "--dry-run"],
    ["stream", "oasis-stream"],
    ["tune", "search-emotion6"],
    ["synthesize", "synthesize-fi"],
    ["tune", "search-emotion6", "--dry-run"],
    ["train", "reasoning-offline"],
    ["family", "reasoning-family"],
    ["compare", "one", "another"],
]
# One process for all: modules stay imported, so the first command that imports a heavy one is the one to blame.
PROGRAM = """
import contextlib, json, sys
from orchestration.cli import app
from tinyemo.errors import TinyEmoError

heavy, found = json.loads(sys.argv[1]), {}
for arguments in json.loads(sys.argv[2]):
    outcome = "finished"
    with contextlib.redirect_stdout(sys.stderr):
        try:
            app(arguments, standalone_mode=False)
        except TinyEmoError as error:
            outcome = f"refused: {error}"
        except SystemExit as ending:
            outcome = f"exit {ending.code}"
    found[" ".join(arguments)] = [outcome, sorted(set(heavy) & set(sys.modules))]
print(json.dumps(found))
"""


def test_commands_import_only_what_they_need(tmp_path: Path) -> None:
    services = ("AWS_", "MLFLOW_", "RAY_", "TINYEMO_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(services)}
    environment |= {"TINYEMO_STATE": str(tmp_path), "TINYEMO_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(HEAVY), json.dumps(COMMANDS)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {arguments: imported for arguments, (_, imported) in found.items() if imported} == {}
    shows = ("--help", "recipes list", "recipes show emotion6", "train --help", "assets list", "platform status")
    assert {arguments for arguments, (outcome, _) in found.items() if not outcome.startswith("refused")} == set(shows)


# Arrow's threads may hold an object until the interpreter is taken apart; this one prints where that happens.
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
