"""Gates between a teacher's answer and a record; each has a code, and an answer carries the first that applies.

`check_answer` looks at one answer. `find_duplicates` compares texts that passed it, by MinHash over word triples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from orchestration.data.manifest import held_out_rank
from orchestration.synthesize.answer_ledger import Code
from orchestration.synthesize.prompts import read_structured, schema_of
from orchestration.synthesize.synthesis_recipe import GatesConfig, TaskConfig
from orchestration.synthesize.work_items import WorkItem
from tinyemo.taxonomies import Taxonomy, canonical_word

NUM_PERM = 64
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")
_REFUSAL = re.compile(
    r"\b(?:as an? (?:ai|language model|artificial intelligence)\b|i(?:'m| am) (?:sorry|unable|not able)\b|"
    r"i (?:can(?:no|')t|cannot|won't|will not) (?:help|assist|answer|provide|see|view|describe|do that|comply|look)\b|"
    r"i (?:do not|don't) have (?:access|the ability|enough|personal)\b)",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"<\|?(?:im_start|im_end|image|endoftext|system|user|assistant)\|?>|^(?:user|assistant|system):", re.I | re.M
)
_PREDICTED = re.compile(r"\n?[ \t]*Predicted Label:[ \t]*(.*?)[ \t.]*$", re.IGNORECASE | re.MULTILINE)
_REASONING = re.compile(r"^\s*Reasoning:\s*", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['\u2019]\w+)?")


@dataclass(frozen=True)
class Verdict:
    """Decision of the gates about one answer.

    Attributes:
        code: None for an answer that may become a record.
        text: what the record's answer says, without the form around it.
        detail: for people.
    """

    code: Code | None
    text: str = ""
    detail: str = ""


class _RejectedError(Exception):
    """One answer does not pass; caught in `check_answer`."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict)
        self.verdict = verdict


def _reject(code: Code, detail: str = "", said: str = "") -> NoReturn:
    raise _RejectedError(Verdict(code, said, detail))


def check_answer(
    item: WorkItem, text: str, finish_reason: str, form: str, task: TaskConfig, gates: GatesConfig, taxonomy: Taxonomy
) -> Verdict:
    """Return the first gate that an answer does not pass, or its text.

    Args:
        item: of the answer.
        text: as the teacher wrote it.
        finish_reason: as the endpoint gives it.
        form: `answers` of the teacher.
        task: of the item.
        gates: of the recipe.
        taxonomy: whose words are labels.
    """
    try:
        _check_whole(text, finish_reason)
        said, stated = _plain(item, text) if form == "text" else _structured(item, text)
        _check_wording(said, f"{item.system} {item.user}", task, gates)
        if item.label is not None and item.task in ("reasoning", "sqa"):
            _check_labels(item.label, said, stated, taxonomy)
    except _RejectedError as error:
        return error.verdict
    return Verdict(None, said)


def _check_whole(text: str, finish_reason: str) -> None:
    if not text.strip():
        _reject(Code.EMPTY)
    if found := _CONTROL.search(text):
        _reject(Code.CONTROL_CHARACTERS, f"U+{ord(found[0]):04X}")
    if finish_reason == "length":
        _reject(Code.UNFINISHED, "the answer has max_tokens tokens")
    if _REFUSAL.search(text):
        _reject(Code.REFUSAL)


def _plain(item: WorkItem, text: str) -> tuple[str, str | None]:
    """Return what a text says, and the label in its last line `Predicted Label: X`."""
    said = _REASONING.sub("", text).strip().strip('"').strip()
    lines = _PREDICTED.findall(said) if item.task == "reasoning" else []
    return (_PREDICTED.sub("", said).strip(), lines[-1]) if lines else (said, None)


def _structured(item: WorkItem, text: str) -> tuple[str, str | None]:
    """Return what a JSON answer says, and the label that it names."""
    document = read_structured(text, schema_of(item.task))
    if isinstance(document, str):
        _reject(Code.NOT_JSON, document)
    said, label = str(next(iter(document[name] for name in schema_of(item.task)["required"]))), document.get("label")
    return said.strip(), None if label is None else str(label)


def _check_wording(said: str, prompt: str, task: TaskConfig, gates: GatesConfig) -> None:
    words = _words(said)
    if not words:
        _reject(Code.EMPTY)
    if found := _TURN.search(said):
        _reject(Code.COPIED_PROMPT, f"{found[0]!r} stands in the text")
    if len(words) < task.min_words:
        _reject(Code.TOO_SHORT, f"{len(words)} words, at least {task.min_words}", said)
    if len(words) > task.max_words:
        _reject(Code.TOO_LONG, f"{len(words)} words, at most {task.max_words}", said)
    copied = _copied_share(words, prompt)
    if copied >= gates.copied_share:
        _reject(Code.COPIED_PROMPT, f"{copied:.0%} of the word quadruples stand in the prompt", said)
    if gates.language and len(words) >= gates.language_min_words and (language := _language(said)) != gates.language:
        _reject(Code.WRONG_LANGUAGE, f"{language} in place of {gates.language}", said)


def _check_labels(label: str, said: str, stated: str | None, taxonomy: Taxonomy) -> None:
    """Check the labels that an answer names against the photograph's."""
    named = set(_labels_in(said, taxonomy))
    if stated is not None and taxonomy.label(stated.strip(" \t'\"[]`*.")) != label:
        _reject(Code.LABEL_DIFFERENT, f"{stated[:40]!r} in place of {label}", said)
    if stated is None and not named:
        _reject(Code.LABEL_MISSING, f"names no label; {label} was to be named", said)
    if named and label not in named:
        _reject(Code.LABEL_DIFFERENT, f"{', '.join(sorted(named))} in place of {label}", said)
    if len(named) > 1:
        _reject(Code.SEVERAL_LABELS, ", ".join(sorted(named)), said)


def record_answer(item: WorkItem, text: str) -> str:
    """Return the gpt turn of a record; reasoning in the published form (arXiv 2410.07062)."""
    return f"Reasoning: {text}\nPredicted Label: {item.label}" if item.task == "reasoning" else text


def _labels_in(text: str, taxonomy: Taxonomy) -> Iterable[str]:
    """Yield the taxonomy's labels that stand in a text as words, aliases considered, synonyms not."""
    words = {canonical_word(word) for word in re.findall(r"[^\W\d_]+", text)}
    return (label for label in taxonomy.words if label in words or (" " in label and label in text.lower()))


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _copied_share(words: Sequence[str], prompt: str) -> float:
    """Return the share of a text's word quadruples that stand in the prompt; 0 for fewer than eight words."""
    told = _words(prompt)
    known = {tuple(told[place : place + 4]) for place in range(len(told) - 3)}
    found = [tuple(words[place : place + 4]) in known for place in range(len(words) - 3)]
    return sum(found) / len(found) if len(words) >= 8 else 0.0


def _language(text: str) -> str:
    import py3langid

    return str(py3langid.classify(text)[0])


# Over all texts


@dataclass(frozen=True)
class Text:
    """A text that passed the gates of one answer.

    Attributes:
        place: of its record.
        split: its record's split; None counts as train.
    """

    place: int
    split: str | None
    text: str


def find_duplicates(
    texts: Sequence[Text], threshold: float, held_out: Iterable[str] = ()
) -> dict[int, tuple[Code, str]]:
    """Return what each text repeats: place -> code and detail; texts that repeat nothing are absent.

    Splits that are held out more come first, then the order of the texts; a text that repeats an earlier one goes.

    Args:
        texts: of one task.
        threshold: Jaccard similarity from which a text repeats another; 0 compares none.
        held_out: texts that no record may repeat.
    """
    if not threshold:
        return {}
    from datasketch import MinHash, MinHashLSH

    found: dict[int, tuple[Code, str]] = {}
    index = MinHashLSH(threshold=threshold, num_perm=NUM_PERM)
    sketches: dict[int, Any] = {}
    splits: dict[int, str | None] = {}

    def sketch(text: str) -> Any:
        made = MinHash(num_perm=NUM_PERM, seed=1)
        made.update_batch([triple.encode() for triple in _triples(text)])
        return made

    for number, foreign in enumerate(held_out):
        made, key = sketch(foreign), -1 - number
        index.insert(key, made)
        sketches[key] = made.hashvalues
    for text in sorted(texts, key=lambda text: (held_out_rank(text.split or "train"), text.place)):
        made = sketch(text.text)
        near = [key for key in index.query(made) if (made.hashvalues == sketches[key]).mean() >= threshold]
        if near:
            other = min(near)
            if other < 0:
                found[text.place] = (Code.HELD_OUT_TEXT, "stands in a held-out split of gates.held_out")
            elif splits[other] != text.split:
                found[text.place] = (Code.DUPLICATE_ACROSS_SPLITS, f"record {other} of {splits[other] or 'train'}")
            else:
                found[text.place] = (Code.NEAR_DUPLICATE, f"record {other}")
            continue
        index.insert(text.place, made)
        sketches[text.place], splits[text.place] = made.hashvalues, text.split
    return found


def _triples(text: str) -> set[str]:
    words = _words(text)
    return {" ".join(words[place : place + 3]) for place in range(max(1, len(words) - 2))}
