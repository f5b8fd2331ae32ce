"""Move an alias of a registered model to a version that passes the gates of a policy, or say why not.

An object in S3 names the version that the alias was last moved to: `registry/NAME/ALIAS.json` beside the runs' folder.
It is replaced by conditional writes alone, before the alias moves, so of two promotions at once one wins and the other
is judged again, against the new champion. An alias that differs from the record was moved by something else, or its
move was cut off; `check_alias` tells and can set it right.
"""

from __future__ import annotations

import json
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from orchestration.report.documents import read_documents
from orchestration.report.policy import Candidate, Gate, Policy, judge
from orchestration.services import storage, tracking
from orchestration.services.tracking import ModelVersion
from orchestration.use.locations import digest_of_export
from tinyemo.errors import DataError, TrainingError

RUNS = "s3://tinyemo/runs"
CHAMPION = "champion"
ATTEMPTS = 3
SETTLE_S = 5.0
"""Longest wait for a promotion of another process that has written its record and not moved the alias yet."""
POLL_S = 0.5
Outcome = Literal["promoted", "refused", "unchanged", "passed"]


@dataclass(frozen=True)
class Decision:
    """Outcome of a promotion with its reasons.

    Attributes:
        outcome: promoted; refused by a gate; unchanged, because the alias pointed to it before; passed, in a dry run.
        champion: version that the alias pointed to before; None where there was none.
        policy: the gates and their limits.
        made_at: UTC, ISO 8601.
    """

    outcome: Outcome
    name: str
    version: str
    alias: str
    champion: str | None
    gates: list[Gate]
    policy: dict[str, Any]
    made_at: str
    made_by: str

    def document(self) -> dict[str, Any]:
        """Return the decision as a JSON document, as it is stored with both versions."""
        gates = {gate.name: {"is_passed": gate.is_passed, "lines": [list(line) for line in gate.lines]}
                 for gate in self.gates}  # fmt: skip
        return self.__dict__ | {"gates": gates}


@dataclass(frozen=True)
class AliasCheck:
    """Comparison of an alias with the version that was last promoted to it.

    Attributes:
        state: verified; none, where no version has the alias; unverified, where something else moved it or changed
            the files of the version.
        text: what was found, in a sentence.
        is_reverted: the alias was moved back to the promoted version.
    """

    state: Literal["verified", "none", "unverified"]
    name: str
    alias: str
    points_to: str | None
    promoted: str | None
    text: str
    is_reverted: bool


def find_version(location: str, runs: str = RUNS, name: str | None = None, *, is_dry_run: bool = False) -> ModelVersion:
    """Return the registered version that a location means.

    Args:
        location: models:/NAME/VERSION, models:/NAME@ALIAS, or the name of a run or of a family (its best size).
        runs: S3 folder of the runs.
        name: registered model to look in; a run that has no version of it yet is registered under it.
        is_dry_run: register nothing; such a run gets the version "new".

    Raises:
        DataError: there is no such version or run, or the run is not registered and no name is given.
    """
    if location.startswith("models:/"):
        path = location.removeprefix("models:/").replace("@", "/@", 1)
        model, _, version = path.partition("/")
        found = tracking.model_version(model, version) if version else None
        if found is None:
            raise DataError(f"{location} does not exist: give models:/NAME/VERSION, models:/NAME@ALIAS or a run")
        return found
    folder = f"{runs}/{location}"
    if storage.exists(f"{folder}/family.json"):
        best = storage.read_json(f"{folder}/family.json").get("champion")
        if not best:
            raise DataError(f"{location} is a family without a best size: name one of its runs")
        folder = f"{runs}/{best}"
    if not storage.exists(f"{folder}/result.json"):
        raise DataError(f"{location} is no finished run in {runs}: see `tinyemo runs list`")
    result = storage.read_json(f"{folder}/result.json")
    versions = [item for item in tracking.versions_of_run(result["run_id"]) if name in (None, item.name)]
    if versions:
        return versions[0]
    if name is None:
        raise DataError(f"{location} has no registered version: name the model to register it under with --name NAME")
    if is_dry_run:
        return ModelVersion(name, "new", result["model"], result["run_id"], {}, "")
    card = f"Model of run [{result['name']}]({result['run_url']}); its files are in `{result['model']}`."
    made = tracking.register(result["run_id"], result["model"], name, tags={}, card=card)
    found = tracking.model_version(name, made)
    assert found is not None
    return found


def promote(
    version: ModelVersion, policy: Policy, *, alias: str = CHAMPION, runs: str = RUNS, is_dry_run: bool = False
) -> Decision:
    """Judge a version by the gates of a policy and move the alias to it if it passes all of them.

    The decision is stored as a tag of the version and of the one that had the alias.

    Raises:
        TrainingError: the alias points to another version than was last promoted, or other promotions kept winning.
        TinyEmoError: S3 or MLflow does not answer, or a document cannot be read.
    """
    uri = record_uri(runs, version.name, alias)
    candidate = read_candidate(version)
    for _ in range(ATTEMPTS):
        record, etag, champion = _settled(uri, version.name, alias)
        if champion is not None and champion.version == version.version and (record or is_dry_run):
            return _decision("unchanged", candidate, champion, [], policy, alias)
        judged = judge(candidate, read_candidate(champion) if champion else None, policy)
        is_passed = all(gate.is_passed for gate in judged)
        outcome: Outcome = "refused" if not is_passed else "passed" if is_dry_run else "promoted"
        decision = _decision(outcome, candidate, champion, judged, policy, alias)
        if is_dry_run:
            return decision
        if outcome == "refused":
            _store(decision, version, champion)
            return decision
        if _write_record(uri, etag, decision, candidate.digest):
            _store(decision, version, champion)
            tracking.move_alias(version.name, alias, version.version)
            newest, _ = _read_record(uri)
            if newest is not None and newest["version"] != version.version:  # a later promotion was faster
                tracking.move_alias(version.name, alias, newest["version"])
            return decision
    raise TrainingError(f"other promotions moved {alias} of {version.name} {ATTEMPTS} times meanwhile: try again")


def promote_first(name: str, version: str, *, runs: str) -> Decision | None:
    """Promote a version by the shipped policy if no version has ever been champion; return None where one has."""
    from orchestration.report.policy import load_policy

    record, _ = _read_record(record_uri(runs, name, CHAMPION))
    found = tracking.model_version(name, version)
    if record is not None or found is None or tracking.model_version(name, f"@{CHAMPION}") is not None:
        return None
    return promote(found, load_policy(), runs=runs)


def check_alias(name: str, *, alias: str = CHAMPION, runs: str = RUNS, is_reverted: bool = False) -> AliasCheck:
    """Compare an alias with the record of the last promotion.

    Args:
        is_reverted: move an alias that something else moved back to the version that was promoted.
    """
    try:
        record, _, champion = _settled(record_uri(runs, name, alias), name, alias)
        points_to = champion.version if champion else None
    except TrainingError:
        record, _ = _read_record(record_uri(runs, name, alias))
        champion = tracking.model_version(name, f"@{alias}")
        points_to = champion.version if champion else None
    promoted = record["version"] if record else None
    state: Literal["verified", "none", "unverified"] = "unverified"
    can_move = record is not None and points_to != promoted
    if record is None and points_to is None:
        state, text = "none", f"no version of {name} has been {alias}"
    elif record is None:
        text = f"{alias} points to version {points_to}, and no promotion is on record"
    elif points_to != promoted:
        text = f"{alias} points to version {points_to}, but version {promoted} was promoted on {record['made_at']}"
    elif champion is not None and digest_of_export(champion.source) != record["digest"]:
        text = f"the files of version {points_to} in {champion.source} have changed since its promotion"
    else:
        state, text = "verified", f"{alias} points to version {points_to}, promoted on {record['made_at']}"
    if record is not None and can_move and is_reverted:
        tracking.move_alias(name, alias, record["version"])
        text += f"; moved back to version {record['version']}"
    return AliasCheck(state, name, alias, points_to, promoted, text, is_reverted and can_move)


def record_uri(runs: str, name: str, alias: str) -> str:
    """Return the address of the record of an alias."""
    return f"{runs.rstrip('/').rpartition('/')[0]}/registry/{name}/{alias}.json"


def read_candidate(version: ModelVersion) -> Candidate:
    """Return a version with the documents about its files.

    Raises:
        DataError: its files are not in S3.
    """
    if not version.source.startswith("s3://"):
        raise DataError(f"{version} lies in {version.source}: only models whose files are in S3 can be promoted")
    folder, digest = version.source.rpartition("/")[0], digest_of_export(version.source)
    documents = read_documents(folder)
    fitting = documents.of_digest(digest)
    num_all, num_fitting = (len(found.evaluations) + len(found.bias) for found in (documents, fitting))
    return Candidate(version, folder, digest, fitting, num_all - num_fitting)


def _settled(uri: str, name: str, alias: str) -> tuple[dict[str, Any] | None, str | None, ModelVersion | None]:
    """Return the record, its ETag and the version with the alias, once these two agree or there is no record.

    Raises:
        TrainingError: they do not agree.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        record, etag = _read_record(uri)
        champion = tracking.model_version(name, f"@{alias}")
        if record is None or (champion is not None and champion.version == record["version"]):
            return record, etag, champion
        if time.monotonic() > deadline:
            found = f"version {champion.version}" if champion else "nothing"
            raise TrainingError(
                f"{alias} of {name} points to {found}, but version {record['version']} was promoted last: look at it "
                f"with `tinyemo promote models:/{name} --check`, and undo the move with --revert"
            )
        time.sleep(POLL_S)


def _read_record(uri: str) -> tuple[dict[str, Any] | None, str | None]:
    with suppress(storage.MissingObjectError):
        content, etag = storage.read_with_etag(uri)
        return json.loads(content), etag
    return None, None


def _write_record(uri: str, etag: str | None, decision: Decision, digest: str) -> bool:
    nonce = secrets.token_hex(8)
    content = json.dumps(decision.document() | {"digest": digest, "nonce": nonce}, indent=1).encode()
    if etag is None:
        return storage.write_bytes_if_absent(uri, content) or storage.read_bytes(uri) == content
    return storage.write_bytes_if_match(uri, content, etag) is not None


def _decision(
    outcome: Outcome, candidate: Candidate, champion: ModelVersion | None, gates: list[Gate], policy: Policy, alias: str
) -> Decision:
    version, now = candidate.version, datetime.now(UTC).isoformat(timespec="seconds")
    before = champion.version if champion else None
    rules, user = policy.model_dump(mode="json"), tracking.user_name()
    return Decision(outcome, version.name, version.version, alias, before, gates, rules, now, user)


def _store(decision: Decision, version: ModelVersion, champion: ModelVersion | None) -> None:
    text = json.dumps(decision.document())
    tracking.tag_version(version, {f"promotion.{decision.alias}": text})
    if champion is not None and champion.version != version.version:
        kind = "successor" if decision.outcome == "promoted" else "challenger"
        tracking.tag_version(champion, {f"promotion.{decision.alias}.{kind}": text})
