"""The command line, `tinyemo --help`. Each file has one group of commands and imports heavy packages when one runs."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

import typer

from orchestration.cli.assets import assets_app
from orchestration.cli.bias import bias
from orchestration.cli.compare import compare
from orchestration.cli.explain import explain
from orchestration.cli.ingest import features, ingest_app
from orchestration.cli.platform import platform_app
from orchestration.cli.promote import promote
from orchestration.cli.recipes import recipes_app
from orchestration.cli.report import report
from orchestration.cli.runs import datasets_app, runs_app
from orchestration.cli.synthesize import synthesize
from orchestration.cli.train import family, stream, train
from orchestration.cli.tune import tune
from orchestration.cli.use import evaluate, predict
from tinyemo.errors import TinyEmoError

app = typer.Typer(
    help="Train, follow and use the TinyEmo family on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(platform_app, name="platform")
app.add_typer(assets_app, name="assets")
app.add_typer(ingest_app, name="ingest")
app.add_typer(recipes_app, name="recipes")
app.add_typer(runs_app, name="runs")
app.add_typer(datasets_app, name="datasets")
app.command()(features)
app.command()(synthesize)
app.command()(train)
app.command()(family)
app.command()(tune)
app.command()(stream)
app.command()(evaluate)
app.command()(predict)
app.command()(explain)
app.command()(compare)
app.command()(bias)
app.command()(report)
app.command()(promote)


def main() -> NoReturn:
    """Run the command line and end the process; a TinyEmoError is one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("orchestration").setLevel(logging.INFO)
    logging.getLogger("tinyemo").setLevel(logging.INFO)
    code = 1  # the code of a traceback
    atexit.register(lambda: _end_process(code))  # handlers run in reverse order, so this one runs last
    try:
        app()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except TinyEmoError as error:
        typer.echo(f"error: {error}", err=True)
        code = 2
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        code = 130
    finally:
        _leave_cluster(code)
    sys.exit(code)


def _leave_cluster(code: int) -> None:
    """Disconnect from Ray before exit handlers run: Arrow's closes its S3 client, which Ray's threads may still use.

    If the cluster is gone, disconnecting would hang, so the process ends with `code` at once.
    """
    if "ray" not in sys.modules:
        return
    import ray

    from orchestration.services.ray_cluster import is_lost

    if is_lost():
        _end_process(code)
    ray.shutdown()


def _end_process(code: int) -> NoReturn:
    """Flush all output and end the process without tearing down the interpreter.

    Arrow's threads may hold Python objects. If one releases them during the teardown, a command that has done its work
    dies of SIGABRT or SIGSEGV (apache/arrow#34314; each was seen once).
    """
    logging.shutdown()
    for output in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone, or the stream is closed
            output.flush()
    os._exit(code)
