"""`tinyemo promote`: move an alias of a registered model to a version that passes the gates, or say why not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.options import JsonOption
from tinyemo.errors import ConfigError

if TYPE_CHECKING:
    from orchestration.report.promotion import AliasCheck, Decision

RunsOption = Annotated[
    str, typer.Option("--root", metavar="S3_URI", help="S3 folder of the runs, checkpoint.root of their recipes.")
]


def promote(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="models:/NAME/VERSION, or a finished run or family; with --check models:/NAME."
        ),
    ],
    alias: Annotated[str, typer.Option("--to", metavar="ALIAS", help="Alias to move.")] = "champion",
    name: Annotated[
        str | None, typer.Option("--name", help="Registered model; a run without a version of it is registered first.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Gates and their limits.  [default: the shipped policy]")
    ] = None,
    is_check: Annotated[
        bool, typer.Option("--check", help="Only tell whether ALIAS points to the version that was promoted last.")
    ] = False,
    is_reverted: Annotated[
        bool, typer.Option("--revert", help="With --check: move an alias back that something else moved.")
    ] = False,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge the model; move and store nothing.")] = False,
    root: RunsOption = "s3://tinyemo/runs",
    as_json: JsonOption = False,
) -> None:
    """Move an alias to a model that passes every gate of the policy, or say why not, with the figures.

    Exit code 1: the model was refused, or --check found an alias that something else moved.

    Example: tinyemo promote models:/tinyemo-projector/2 --to champion
    """
    if is_reverted and not is_check:
        raise ConfigError("--revert goes with --check")
    from cluster.environment import load_platform_environment

    load_platform_environment()
    from orchestration.report import promotion
    from orchestration.report.policy import load_policy

    if is_check:
        checked = name or model.removeprefix("models:/").partition("/")[0].partition("@")[0]
        found = promotion.check_alias(checked, alias=alias, runs=root, is_reverted=is_reverted)
        _show_check(found, as_json)
        raise typer.Exit(int(found.state == "unverified" and not found.is_reverted))
    rules = load_policy(policy)
    version = promotion.find_version(model, root, name, is_dry_run=is_dry_run)
    decision = promotion.promote(version, rules, alias=alias, runs=root, is_dry_run=is_dry_run)
    _show_decision(decision, as_json)
    raise typer.Exit(int(decision.outcome == "refused"))


def _show_check(found: AliasCheck, as_json: bool) -> None:
    typer.echo(json.dumps(asdict(found), indent=1) if as_json else f"{found.state}: {found.text}")


def _show_decision(decision: Decision, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(decision.document(), indent=1))
        return
    against = f"against version {decision.champion}" if decision.champion else "no version had the alias"
    for gate in decision.gates:
        typer.echo(f"{gate.name}: {'passed' if gate.is_passed else 'FAILED'}")
        for is_good, text in gate.lines:
            typer.echo(f"  {'+' if is_good else '-'} {text}")
    texts = {
        "promoted": f"{decision.alias} of {decision.name} now points to version {decision.version}, {against}",
        "refused": f"version {decision.version} of {decision.name} was refused, {against}; {decision.alias} stays",
        "unchanged": f"{decision.alias} of {decision.name} points to version {decision.version} already",
        "passed": f"version {decision.version} of {decision.name} would pass, {against}; nothing was moved (--dry-run)",
    }
    typer.echo(texts[decision.outcome])
