"""The gates between a model and an alias: a policy, and what each of its gates finds about a candidate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat

from orchestration.recipe.toml_sections import parse_section, read_toml
from orchestration.report.documents import OPEN, ModelDocuments, identity, is_blamed
from orchestration.services import storage
from orchestration.services.tracking import ModelVersion
from tinyemo.config import Section

if TYPE_CHECKING:
    import pyarrow as pa

    from tinyemo.measures.comparison import PairedAccuracy

SHIPPED_POLICY = Path(__file__).with_name("policy.toml")
GateName = Literal["export", "leakage", "accuracy", "bias"]
Part = Literal["groups", "words", "slices", "association", "counterfactuals", "spurious", "sets"]
GATES: tuple[GateName, ...] = get_args(GateName)
Line = tuple[bool, str]
"""Whether something is as the policy asks, and a sentence with its figures."""


class AccuracyPolicy(Section):
    """When a candidate is not below the champion."""

    data: tuple[str, ...] = ()
    """Names of the data sets that count; empty: all that both were evaluated on, at least one."""
    margin: NonNegativeFloat = 0.05
    """Largest loss of top-1 accuracy, in [0, 1], that the low end of the paired interval may reach. An interval that
    lies wholly below 0 is refused at any margin."""


class BiasPolicy(Section):
    """Limits on the findings of a bias report; a finding beyond them stops a promotion."""

    needs_review: bool = True
    """Whether every significant finding must have a decision in the review file."""
    limits: dict[Part, NonNegativeFloat] = Field(
        default={"groups": 0.10, "slices": 0.15, "sets": 0.15, "counterfactuals": 0.10}
    )
    """Part of the report -> largest absolute effect of a confirmed finding; parts left out have no limit."""


class Policy(Section):
    """Gates that a model must pass before an alias moves to it."""

    gates: tuple[GateName, ...] = GATES
    """Gates that every candidate must pass."""
    first_version_gates: tuple[GateName, ...] = ("export",)
    """Gates for the first version that an alias points to; there is no champion that it could displace."""
    accuracy: AccuracyPolicy = AccuracyPolicy()
    bias: BiasPolicy = BiasPolicy()


@dataclass(frozen=True)
class Candidate:
    """A registered version and what is known about exactly its files.

    Attributes:
        folder: S3 folder of the run that made it.
        digest: of its files.
        documents: evaluations and bias reports about files of that digest.
        num_outdated: documents in the run's folder about other files.
    """

    version: ModelVersion
    folder: str
    digest: str
    documents: ModelDocuments
    num_outdated: int


@dataclass(frozen=True)
class Gate:
    """The outcome of one gate.

    Attributes:
        lines: what it looked at, each with whether that is as the policy asks.
    """

    name: GateName
    lines: tuple[Line, ...]

    @property
    def is_passed(self) -> bool:
        """True where every line is as the policy asks."""
        return all(is_good for is_good, _ in self.lines)


def load_policy(path: Path | None = None) -> Policy:
    """Return the policy of a TOML file, or the one that comes with the package.

    Raises:
        ConfigError: all that is wrong with the file, one line for each field.
    """
    return parse_section(Policy, read_toml(path or SHIPPED_POLICY), source=str(path or SHIPPED_POLICY.name))


def judge(candidate: Candidate, champion: Candidate | None, policy: Policy) -> list[Gate]:
    """Return the outcome of each gate that applies: those of a first version where there is no champion."""
    rules: dict[GateName, Callable[[Candidate, Candidate | None, Policy], Iterator[Line]]] = {
        "export": _judge_export,
        "leakage": _judge_leakage,
        "accuracy": _judge_accuracy,
        "bias": _judge_bias,
    }
    chosen = policy.gates if champion else policy.first_version_gates
    return [Gate(name, tuple(rules[name](candidate, champion, policy))) for name in chosen]


def _judge_export(candidate: Candidate, champion: Candidate | None, policy: Policy) -> Iterator[Line]:
    source = candidate.version.source
    files = {uri.removeprefix(f"{source}/"): size for uri, size in storage.list_prefix(source).items()}
    config = json.loads(storage.read_bytes(f"{source}/config.json")) if "config.json" in files else {}
    absent = sorted({"config.json", *config.get("sha256", {})} - files.keys())
    yield not absent, f"export in {source}: " + (f"lacks {', '.join(absent)}" if absent else f"{len(files)} files")
    card = config.get("card") or {}
    has_card = bool(card) or files.get("README.md", 0) > 0
    kind = " of random weights" if "random" in (card.get("llm_weights"), card.get("encoder_weights")) else ""
    yield has_card, f"model card{kind} present" if has_card else "no model card: export the model again"


def _measured(candidate: Candidate) -> Iterator[Line]:
    """Say where a candidate has no evaluation of its files."""
    if not candidate.documents.evaluations:
        outdated = f" ({candidate.num_outdated} documents are about other files)" if candidate.num_outdated else ""
        yield False, f"{candidate.version}: no evaluation{outdated}; make one with `tinyemo evaluate RECIPE`"


def _judge_leakage(candidate: Candidate, champion: Candidate | None, policy: Policy) -> Iterator[Line]:
    yield from _measured(candidate)
    for entry in candidate.documents.measured():
        leakage = entry.get("leakage")
        if leakage is None or leakage.get("is_checked") is False:
            yield False, f"{entry['name']}: leakage could not be looked for, the training data are not known"
        elif leakage["has_leakage"]:
            counts = ", ".join(
                f"{count} {kind.replace('_', ' ')}" for kind, count in leakage["counts"].items() if count
            )
            yield False, f"{entry['name']}: test data are in the training data ({counts})"
        else:
            yield True, f"{entry['name']}: no leakage in {entry['num_images']} images"


def _judge_accuracy(candidate: Candidate, champion: Candidate | None, policy: Policy) -> Iterator[Line]:
    absent = [*_measured(candidate), *(_measured(champion) if champion else [])]
    yield from absent
    if absent:
        return
    if champion is None:
        yield True, "there is no champion to compare with"
        return
    others = {identity(entry): entry for entry in champion.documents.measured()}
    compared = 0
    for entry in candidate.documents.measured():
        counts = not policy.accuracy.data or entry["name"] in policy.accuracy.data
        other = others.get(identity(entry))
        has_scores = bool(other and entry["scores"] and other["scores"])
        if counts and other is not None and has_scores and other["digest"] == entry["digest"]:
            compared += 1
            yield _judge_difference(entry, other, policy)
        elif counts and policy.accuracy.data:
            yield False, f"{entry['name']}: {champion.version} was not evaluated on this version of it"
    names = {entry["name"] for entry in candidate.documents.measured()}
    for name in policy.accuracy.data:
        if name not in names:
            yield False, f"{name}: {candidate.version} was not evaluated on it"
    if not compared and not policy.accuracy.data:
        yield False, f"{candidate.version} and {champion.version} were evaluated on no data set in common"


def _judge_difference(entry: dict[str, Any], other: dict[str, Any], policy: Policy) -> Line:
    found, mine, theirs = compare_entries(entry, other)
    is_good = found.high >= 0 and found.low >= -policy.accuracy.margin
    reason = "" if is_good else "; below the champion" if found.high < 0 else f"; a loss of more than {_points(policy.accuracy.margin)} cannot be excluded"  # noqa: E501  # fmt: skip
    seen = "" if found.smallest_detectable is None else f", could have seen {_points(found.smallest_detectable)}"
    return is_good, (
        f"{entry['name']}: top-1 {100 * mine:.1f} % against {100 * theirs:.1f} % of {found.num_images} images, "
        f"difference {100 * found.difference:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}], "
        f"McNemar p {found.p_mcnemar:.2g}{seen}{reason}"
    )


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def compare_entries(entry: dict[str, Any], other: dict[str, Any]) -> tuple[PairedAccuracy, float, float]:
    """Compare two models on the images of a data set that both were evaluated on; also return their accuracies."""
    import numpy as np

    from tinyemo.measures.comparison import compare_accuracy

    cluster_by = entry.get("cluster_by")
    mine, theirs = read_scores(entry["scores"]), read_scores(other["scores"])
    columns = ["id", "right", *([cluster_by] if cluster_by in mine.column_names else [])]
    both = _with_right(mine).select(columns).join(
        _with_right(theirs).select(["id", "right"]), "id", join_type="inner", right_suffix="_other"
    ).sort_by("id")  # fmt: skip
    first, second = (np.asarray(both[name], dtype=bool) for name in ("right", "right_other"))
    clusters = both[cluster_by].to_pylist() if cluster_by in both.column_names else None
    return compare_accuracy(first, second, clusters), float(first.mean()), float(second.mean())


def _with_right(table: pa.Table) -> pa.Table:
    import pyarrow.compute as pc

    return table.append_column("right", pc.equal(table["label"], table["predicted"]))


def read_scores(address: str) -> pa.Table:
    """Return the scores table of an evaluation, from S3 or a local file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(storage.read_bytes(address)) if address.startswith("s3://") else address)


def _judge_bias(candidate: Candidate, champion: Candidate | None, policy: Policy) -> Iterator[Line]:
    if not candidate.documents.bias:
        yield False, f"{candidate.version}: no bias report; make one with `tinyemo bias MODEL --data ... --groups ...`"
        return
    before = {item["id"]: item for item in findings(champion)} if champion else {}
    found = findings(candidate)
    undecided = [item["title"] for item in found if is_blamed(item) and item["decision"] == OPEN]
    if policy.bias.needs_review:
        text = f"{len(undecided)} findings wait for a decision in {_review(candidate)}: {_few(undecided)}"
        yield not undecided, text if undecided else f"no finding waits for a decision, of {len(found)}"
    for item in found:
        limit = policy.bias.limits.get(item["part"])
        if item["decision"] != "confirmed" or limit is None:
            continue
        known = before.get(item["id"])
        earlier = f", {abs(known['effect']):.3f} of {champion.version}" if known and champion else ""
        is_good = abs(item["effect"]) <= limit
        low, high = item.get("low"), item.get("high")
        interval = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
        text = f"confirmed gap {item['effect']:+.3f}{interval} in {item['title']}, limit {limit:.3f}{earlier}"
        yield is_good, text


def findings(candidate: Candidate) -> list[dict[str, Any]]:
    """Return the findings of the newest bias report of each name."""
    newest: dict[str, dict[str, Any]] = {}
    for document in candidate.documents.bias:
        newest.setdefault(document["name"], document)
    return [finding for document in newest.values() for finding in document["findings"]]


def _review(candidate: Candidate) -> str:
    return str(candidate.documents.bias[0]["location"]).replace("/bias.json", "/review.toml")


def _few(texts: list[str]) -> str:
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")
