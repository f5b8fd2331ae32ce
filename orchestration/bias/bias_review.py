"""The review of a bias report: a TOML file with one decision for each finding that blames a group.

A person edits it by hand, or with `tinyemo bias MODEL --decide ID=confirmed`. The next report keeps the decisions,
and says what changed since.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from tinyemo.errors import ConfigError, DataError

Decision = Literal["open", "confirmed", "dismissed", "explained"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
REVIEW = "review.toml"
HEADER = """# Findings of a bias report. Set decision to "confirmed", "dismissed" or "explained", say why in note,
# and give the command again: decisions are kept, and are stored with the version of the model.
"""


def parse_review(text: str, source: str) -> dict[str, dict[str, Any]]:
    """Return the findings of a review by id.

    Raises:
        DataError: it is no TOML, or a decision is none of DECISIONS.
    """
    try:
        rows = tomllib.loads(text).get("finding", [])
        found = {str(row["id"]): row for row in rows}
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{source} cannot be read as a review: {' '.join(str(error).split())}") from error
    wrong = [f"{name}: {row.get('decision')!r}" for name, row in found.items() if row.get("decision") not in DECISIONS]
    if wrong:
        raise DataError(f"{source}: decision must be one of {', '.join(DECISIONS)}; got {'; '.join(wrong)}")
    return found


def merge_review(
    findings: Sequence[Mapping[str, Any]], earlier: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows of the next review: every blamed finding, with its decision if it had one.

    A finding that is gone keeps its row while its decision is not open, with `is_gone`.
    """
    rows = []
    for finding in findings:
        if not finding["is_significant"] or finding["explained_by"] is not None:
            continue
        before = earlier.get(finding["id"], {})
        row = {"id": finding["id"], "title": finding["title"], "effect": finding["effect"]}
        row |= {"decision": before.get("decision", "open"), "note": before.get("note", "")}
        if "effect" in before and before["effect"] != finding["effect"]:
            row["effect_before"] = before["effect"]
        rows.append(row)
    named = {row["id"] for row in rows}
    gone = [row for name, row in earlier.items() if name not in named and row["decision"] != "open"]
    return [*rows, *({**row, "is_gone": True} for row in gone)]


def review_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as TOML."""
    tables = []
    for row in rows:
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in row.items() if value is not None]
        tables.append("\n".join(["[[finding]]", *lines]))
    return "\n\n".join([HEADER.rstrip(), *tables]) + "\n"


def decide_findings(rows: Sequence[dict[str, Any]], decisions: Sequence[str], note: str) -> list[dict[str, Any]]:
    """Return the rows with the decisions of `ID=DECISION` texts.

    Raises:
        ConfigError: lists every id that the review lacks and every decision that is none.
    """
    known, problems, chosen = {row["id"] for row in rows}, [], {}
    for text in decisions:
        name, _, decision = text.rpartition("=")
        if name not in known:
            problems.append(f"--decide {text}: the review has no finding {name or text!r}")
        if decision not in DECISIONS:
            problems.append(f"--decide {text}: the decision must be one of {', '.join(DECISIONS)}")
        chosen[name] = decision
    if problems:
        raise ConfigError("\n".join(problems))
    return [
        row | {"decision": chosen[row["id"]], "note": note or row["note"]} if row["id"] in chosen else row
        for row in rows
    ]


def changes(findings: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line about each finding that came, went or turned since an earlier report."""
    then, now = ({one["id"]: one for one in part if one["is_significant"]} for part in (before, findings))
    lines = [f"new: {now[name]['title']}" for name in now if name not in then]
    lines += [f"gone: {then[name]['title']}" for name in then if name not in now]
    lines += [
        f"turned: {now[name]['title']} (was {then[name]['effect']:+.3f})"
        for name in now
        if name in then and now[name]["effect"] * then[name]["effect"] < 0
    ]
    return lines


def split_names(text: str | None) -> tuple[str, ...]:
    """Return the names of an option that holds them by commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
