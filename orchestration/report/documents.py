"""The documents about one model below its folder: evaluations, bias reports, and what people decided about findings.

FOLDER/evaluations/NAME/evaluation.json
FOLDER/bias/NAME/bias.json
FOLDER/bias/NAME/review.toml

FOLDER is a run's folder in S3. Below a local folder these files may lie in any folder.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.services import storage
from tinyemo.errors import DataError

NAMES = re.compile(r"/(?:evaluation|bias)\.json$")
OPEN, EXPLAINED = "open", "explained"


@dataclass(frozen=True)
class ModelDocuments:
    """Documents about one model, the newest first.

    Attributes:
        evaluations: documents of kind evaluation; each has `location`, its address, beside its own fields.
        bias: documents of kind bias; each finding has `decision` and `note` from the review file.
    """

    evaluations: list[dict[str, Any]]
    bias: list[dict[str, Any]]

    def measured(self) -> list[dict[str, Any]]:
        """Return the data entries of the evaluations; of several with one name, split and labels the newest."""
        newest: dict[tuple[str, str, tuple[str, ...]], dict[str, Any]] = {}
        for document in self.evaluations:
            for entry in document["data"]:
                newest.setdefault(identity(entry), entry | {"evaluation": document["name"]})
        return list(newest.values())

    def of_digest(self, digest: str) -> ModelDocuments:
        """Return the documents about a model whose files have this digest."""
        found = [[item for item in group if item["model"].get("digest") == digest]
                 for group in (self.evaluations, self.bias)]  # fmt: skip
        return ModelDocuments(*found)


def is_blamed(finding: dict[str, Any]) -> bool:
    """Return True for a significant finding that nothing harmless explains; people must decide on it."""
    return bool(finding["is_significant"]) and not finding.get("explained_by")


def identity(entry: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    """Return what makes two data entries the same measurement: name, split and labels."""
    return entry["name"], entry.get("split") or "", tuple(entry["labels"])


def read_documents(folder: str) -> ModelDocuments:
    """Return the documents below a model's folder.

    Raises:
        DataError: one of them cannot be read; the message names it.
        StorageError: S3 does not answer.
    """
    found: dict[str, list[dict[str, Any]]] = {"evaluation": [], "bias": []}
    for address in _addresses(folder):
        if not NAMES.search(address):
            continue
        document = _parsed(address, json.loads)
        kind = address.rsplit("/", 1)[1].removesuffix(".json")
        if document.get("kind") != kind or not isinstance(document.get("model"), dict):
            raise DataError(f"{address} is no document of kind {kind}: make it again")
        document["location"] = address
        if kind == "bias":
            _add_decisions(document, address.replace("/bias.json", "/review.toml"))
        found[kind].append(document)
    for documents in found.values():
        documents.sort(key=lambda item: str(item.get("made_at")), reverse=True)
    return ModelDocuments(found["evaluation"], found["bias"])


def _add_decisions(document: dict[str, Any], review: str) -> None:
    decided = {}
    if (review.startswith("s3://") and storage.exists(review)) or Path(review).is_file():
        decided = {item["id"]: item for item in _parsed(review, tomllib.loads).get("finding", [])}
    for finding in document["findings"]:
        row = decided.get(finding["id"], {})
        finding["decision"] = row.get("decision", OPEN if is_blamed(finding) else EXPLAINED)
        finding["note"] = row.get("note", "")


def _addresses(folder: str) -> list[str]:
    if folder.startswith("s3://"):
        return [uri for part in ("evaluations", "bias") for uri in storage.list_prefix(f"{folder}/{part}")]
    return sorted(str(path) for path in Path(folder).rglob("*.json"))


def _parsed(address: str, parse: Any) -> dict[str, Any]:
    data = storage.read_bytes(address) if address.startswith("s3://") else Path(address).read_bytes()
    try:
        found = parse(data.decode())
    except ValueError as error:
        raise DataError(f"{address} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{address} cannot be read: it holds no table")
    return found
