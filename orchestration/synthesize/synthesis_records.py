"""From answers to records: verdicts of all gates, LLaVA records with images, what was rejected and why, a card."""

from __future__ import annotations

import io
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from orchestration.data.data_card import SHEET_COLUMNS, THUMBNAIL_SIDE, thumbnail
from orchestration.data.ingest_rules import TASKS
from orchestration.data.manifest import held_out_rank, load_manifest
from orchestration.data.record_checks import IMAGE_TOKEN
from orchestration.data.sets import RecordSet, read_records, turns_of
from orchestration.jobs.lease import Lease
from orchestration.services import storage
from orchestration.synthesize.answer_ledger import Code, read_answers
from orchestration.synthesize.gates import Text, Verdict, check_answer, find_duplicates, record_answer
from orchestration.synthesize.item_store import StoredItems
from orchestration.synthesize.photographs import Photograph, PhotographSet, read_table, stem_of
from orchestration.synthesize.prompts import PromptFile, read_structured, schema_of
from orchestration.synthesize.synthesis_recipe import JUDGE, GatesConfig, SynthesisRecipe
from orchestration.synthesize.work_items import WorkItem
from tinyemo.local_files import sha256_of_file

NUM_SHOWN = 24
IMAGES_AT_ONCE = 128
TEXT_HEIGHT = 90
SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif"}
Progress = Callable[..., None]


@dataclass(frozen=True)
class Judged:
    """The verdict on every item that has an answer, in the order of the items.

    Attributes:
        rounds: whose items these are.
        verdicts: by key; items without an answer are absent.
        tokens: by key: tokens and money.
        scores: by key: the judge's score.
        agreement: the judge's valence and arousal against human norms.
    """

    rounds: tuple[StoredItems, ...]
    verdicts: dict[str, Verdict]
    costs: dict[str, tuple[int, float]]
    scores: dict[str, int] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)

    def items(self) -> Iterator[WorkItem]:
        """Yield all items."""
        return chain.from_iterable(self.rounds)

    def accepted(self) -> Iterator[tuple[WorkItem, Verdict]]:
        """Yield the items that passed every gate so far."""
        for item in self.items():
            verdict = self.verdicts.get(item.key)
            if verdict is not None and verdict.code is None:
                yield item, verdict

    def scored(
        self, gates: GatesConfig, stored: StoredItems, folder: str, photographs: Mapping[str, Photograph]
    ) -> Judged:
        """Return the verdicts after the judge, whose items are `stored`; an item that it did not score passes."""
        answers = {row["key"]: row for row in read_answers(folder, columns=("key", "text", "reason")).to_pylist()}
        verdicts, scores = dict(self.verdicts), {}
        pairs: dict[str, list[tuple[float, float]]] = {"valence": [], "arousal": []}
        for item in stored:
            answer = answers.get(item.key)
            found = read_structured(answer["text"], schema_of(JUDGE)) if answer and not answer["reason"] else ""
            if isinstance(found, str):
                continue
            judged = item.question  # of a judge's item: the key of the record
            scores[judged] = min(5, int(found["score"]))
            for name, values in pairs.items():
                human = photographs[item.image].context.get(f"{name}_mean")
                if human is not None:
                    values.append((float(human), float(found[name])))
            if scores[judged] < gates.judge_min_score:
                detail = f"{scores[judged]} of 5, at least {gates.judge_min_score}"
                verdicts[judged] = replace(verdicts[judged], code=Code.JUDGED_POOR, detail=detail)
        agreement: dict[str, float] = {"scored": len(scores), "items": stored.total}
        for name, values in pairs.items():
            agreement |= _agreement(name, values)
        return replace(self, verdicts=verdicts, scores=scores, agreement=agreement)


def _agreement(name: str, values: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return Spearman's rank correlation of the judge with people, and the mean difference; nothing without people."""
    human, model = np.array(values or [(0, 0)], dtype=float).T
    if len(values) < 3 or not human.std() or not model.std():
        return {}
    from scipy.stats import spearmanr

    return {
        f"{name}_spearman": float(spearmanr(human, model).statistic),
        f"{name}_mean_difference": float((model - human).mean()),
        f"{name}_records": len(values),
    }


def judge(
    recipe: SynthesisRecipe,
    photographs: PhotographSet,
    folder: str,
    rounds: Sequence[StoredItems],
    *,
    tasks: Collection[str] = TASKS,
    has_duplicates: bool = True,
) -> Judged:
    """Apply the gates to every stored answer.

    Args:
        recipe: of the synthesis.
        photographs: of the recipe.
        folder: S3 folder of the ledger.
        rounds: the items.
        tasks: only these.
        has_duplicates: whether answers are compared with each other and with held-out texts.
    """
    answers = read_answers(folder)
    places = {key: place for place, key in enumerate(answers["key"].to_pylist())}
    verdicts: dict[str, Verdict] = {}
    costs: dict[str, tuple[int, float]] = {}
    texts: dict[str, list[tuple[str, Text]]] = {}
    for number, item in enumerate(chain.from_iterable(rounds)):
        if item.task not in tasks or item.key not in places:
            continue
        answer = answers.slice(places[item.key], 1).to_pylist()[0]
        costs[item.key] = (answer["prompt_tokens"] + answer["completion_tokens"], answer["cost"])
        if answer["reason"]:
            verdicts[item.key] = Verdict(Code(answer["reason"]), answer["text"], answer["detail"])
            continue
        form = recipe.teachers[item.teacher].answers
        task = recipe.tasks[item.task]  # type: ignore[index]
        verdict = check_answer(
            item, answer["text"], answer["finish_reason"], form, task, recipe.gates, photographs.taxonomy
        )
        verdicts[item.key] = verdict if verdict.text or verdict.code is None else replace(verdict, text=answer["text"])
        if verdict.code is None:
            texts.setdefault(item.task, []).append((item.key, Text(number, item.split, verdict.text)))
    if has_duplicates:
        held_out = [text for uri in recipe.gates.held_out for text in _held_out_texts(uri)]
        for name, found in texts.items():
            keys = {text.place: key for key, text in found}
            threshold = recipe.tasks[name].near_duplicate  # type: ignore[index]
            for place, (code, detail) in find_duplicates([text for _, text in found], threshold, held_out).items():
                verdicts[keys[place]] = replace(verdicts[keys[place]], code=code, detail=detail)
    return Judged(tuple(rounds), verdicts, costs)


def _held_out_texts(uri: str) -> Iterator[str]:
    """Yield the answers of a data set's splits that are held out."""
    manifest = load_manifest(uri, "instruct")
    for split in manifest.splits:
        if held_out_rank(split) < held_out_rank("other"):
            record_set = RecordSet(manifest, split)
            for turns in turns_of(read_records(record_set, np.arange(record_set.num_rows), ("turns",))):
                yield from (text for role, text in turns if role == "gpt")


@dataclass(frozen=True)
class Output:
    """Results that a synthesis stores besides its ledger.

    Attributes:
        folder: S3 folder of the synthesis.
        records: S3 address of the LLaVA records, JSON Lines.
        images: S3 folder that the records' image paths are relative to.
        sha256: of the records.
        rejected: code -> items.
        teachers: by teacher: items, accepted, tokens, money.
        prompts: by task: name and sha256 of the template.
        files: local copies for MLflow.
    """

    folder: str
    records: str
    images: str
    sha256: str
    num_accepted: int
    num_unanswered: int
    num_flagged: int
    rejected: dict[str, int]
    teachers: dict[str, dict[str, float]]
    prompts: dict[str, str]
    files: tuple[Path, ...]


def write_output(
    recipe: SynthesisRecipe,
    photographs: PhotographSet,
    prompts: Mapping[str, PromptFile],
    lease: Lease,
    rounds: Sequence[StoredItems],
    judged: Judged,
    scratch: Path,
    progress: Progress,
) -> Output:
    """Store records, rejected items, images, prompts and the card; equal answers make equal records.

    `scratch` is an empty local folder; `Output.files` lie in it.
    """
    used = {item.image for item, _ in judged.accepted()}
    names = _store_images(photographs, sorted(used), f"{lease.folder}/images", progress)
    disputed = _disputed(recipe, photographs)
    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    teachers = {name: dict.fromkeys(("items", "accepted", "tokens", "money"), 0.0) for name in recipe.teachers}
    records, losses = scratch / "records.jsonl", scratch / "rejected.jsonl"
    with records.open("w", encoding="utf-8") as kept, losses.open("w", encoding="utf-8") as lost:
        for item in judged.items():
            teacher, verdict = teachers[item.teacher], judged.verdicts.get(item.key)
            teacher["items"] += 1
            if verdict is None:
                counts["unanswered"] += 1
                continue
            tokens, money = judged.costs[item.key]
            teacher["tokens"], teacher["money"] = teacher["tokens"] + tokens, teacher["money"] + money
            if verdict.code is None:
                teacher["accepted"] += 1
                counts["accepted"] += 1
                scores = disputed.get(item.image) if item.label else None
                counts["flagged"] += scores is not None
                document = _record(recipe, item, verdict, names[item.image], scores, judged.scores.get(item.key))
                kept.write(json.dumps(document, ensure_ascii=False) + "\n")
            else:
                rejected[verdict.code] += 1
                lost.write(json.dumps(_loss(item, verdict), ensure_ascii=False) + "\n")
    sha256 = sha256_of_file(records)
    folder = f"{lease.folder}/output/{sha256[:12]}"
    for path in (records, losses):
        lease.check()
        storage.upload_file(path, f"{folder}/{path.name}")
    output = Output(
        folder=lease.folder,
        records=f"{folder}/records.jsonl",
        images=f"{lease.folder}/images",
        sha256=sha256,
        num_accepted=counts["accepted"],
        num_unanswered=counts["unanswered"],
        num_flagged=counts["flagged"],
        rejected=dict(sorted(rejected.items())),
        teachers=teachers,
        prompts={task: f"{prompt.name} {prompt.sha256[:12]}" for task, prompt in prompts.items()},
        files=(),
    )
    files = [scratch / "card.md"]
    files[0].write_text(_card(recipe, photographs, rounds, judged, output), encoding="utf-8")
    for prompt in prompts.values():
        files.append(scratch / f"{Path(prompt.name).stem}.j2")
        files[-1].write_text(prompt.text, encoding="utf-8")
    if recipe.images.may_be_shown and used:
        files.append(scratch / "samples.png")
        files[-1].write_bytes(_sheet(photographs, judged))
    for path in files:
        storage.upload_file(path, f"{folder}/{path.name}")
    return replace(output, files=tuple(files))


def _record(
    recipe: SynthesisRecipe, item: WorkItem, verdict: Verdict, image: str, disputed: str | None, score: int | None
) -> dict[str, Any]:
    """Return a LLaVA record; the ingest reads the known fields and passes over the others."""
    review = {"review": f"a projector sees {disputed}"} if disputed else {}
    judged = {"judge_score": score} if score is not None else {}
    return {
        "id": f"{recipe.name}/{item.image[:16]}/{item.task}",
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TOKEN}\n{item.question}"},
            {"from": "gpt", "value": record_answer(item, verdict.text)},
        ],
        "split": item.split,
        "task": item.task,
        "label": item.label,
        "source": f"synthetic:{item.teacher}",
        **review,
        **judged,
    }


def _loss(item: WorkItem, verdict: Verdict) -> dict[str, Any]:
    names = ("key", "image", "task", "teacher", "split", "label", "prompt_sha256", "system", "user")
    return {
        **{name: getattr(item, name) for name in names},
        "reason": verdict.code,
        "detail": verdict.detail,
        "text": verdict.text,
    }


def _disputed(recipe: SynthesisRecipe, photographs: PhotographSet) -> dict[str, str]:
    """Return the photographs whose label a projector disputes, each with the projector's label and cosines."""
    if not recipe.gates.projector:
        return {}
    rows, found = read_table(recipe.gates.projector), {}
    for photograph in photographs.photographs:
        row = rows.get(stem_of(photograph.name), {})
        seen = photographs.taxonomy.label(row.get("label", ""))
        if seen is not None and photograph.label is not None and seen != photograph.label:
            scores = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("label", "problem"))
            found[photograph.digest] = f"{seen} ({scores})"
    return found


def _store_images(photographs: PhotographSet, digests: Sequence[str], uri: str, progress: Progress) -> dict[str, str]:
    """Store each image under its sha256 once; return digest -> file name."""
    names = {Path(address).stem: Path(address).name for address in storage.list_prefix(uri)}
    missing = [digest for digest in digests if digest not in names]

    def put(found: tuple[str, bytes]) -> tuple[str, str]:
        digest, data = found
        suffix = next((suffix for magic, suffix in SUFFIXES.items() if data.startswith(magic)), ".bin")
        storage.write_bytes(f"{uri}/{digest}{suffix}", data)
        return digest, f"{digest}{suffix}"

    with ThreadPoolExecutor(storage.TRANSFER_THREADS) as pool:
        for start in range(0, len(missing), IMAGES_AT_ONCE):
            names |= dict(pool.map(put, photographs.read(missing[start : start + IMAGES_AT_ONCE])))
            progress("images", min(start + IMAGES_AT_ONCE, len(missing)), len(missing))
    return names


def _card(
    recipe: SynthesisRecipe,
    photographs: PhotographSet,
    rounds: Sequence[StoredItems],
    judged: Judged,
    output: Output,
) -> str:
    """Return the card as Markdown; it holds no text of a record."""
    requested = sum(stored.total for stored in rounds)
    rows: Counter[tuple[str, str, str]] = Counter()
    for item in judged.items():
        verdict = judged.verdicts.get(item.key)
        rows[item.teacher, item.task, (verdict.code or "accepted") if verdict else "unanswered"] += 1
    lines = [
        f"# {recipe.name}",
        "",
        "**The answers of these records are synthetic: models wrote them, no person checked them.** The photographs "
        "are real; their labels and contexts are those of the source.",
        "",
        f"Items {requested} = accepted {output.num_accepted} + rejected {sum(output.rejected.values())} + unanswered "
        f"{output.num_unanswered}; {sum(stored.num_skipped for stored in rounds)} more could not be asked for. "
        f"{output.num_flagged} records are flagged for review: a projector sees another label.",
        "",
        "## Teachers",
        "",
        "| teacher | model | reads | items | accepted | tokens | money |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, teacher in recipe.teachers.items():
        found = output.teachers[name]
        reads = "photograph and context" if teacher.sees_image else "context alone: it never sees the photograph"
        lines.append(
            f"| {name} | {Path(teacher.model).name} | {reads} | {found['items']:.0f} | {found['accepted']:.0f} | "
            f"{found['tokens']:.0f} | {found['money']:.4f} |"
        )
    lines += [
        "",
        "A text-only teacher writes what its context suggests, not what the photograph shows. Answers of small "
        "teachers (below about a billion parameters) are poor: vague, repetitive and at times wrong; the gates measure "
        "form, not truth.",
        "",
        "## Gates",
        "",
        "| teacher | task | outcome | items |",
        "|---|---|---|---|",
        *(f"| {' | '.join(key)} | {count} |" for key, count in sorted(rows.items())),
        "",
    ]
    if judged.agreement:
        lines += ["## Judge", "", *(f"- {name}: {value:.3g}" for name, value in judged.agreement.items()), ""]
    lines += [
        "## Lineage",
        "",
        f"- photographs: {len(photographs.photographs)} of `{recipe.images.source}` at `{photographs.digest[:12]}`",
        *(f"- prompt of {task}: {prompt}" for task, prompt in output.prompts.items()),
        f"- recipe `{recipe.digest()[:12]}`, seed {recipe.seed}; ledger `{output.folder}`; records sha256 "
        f"`{output.sha256[:12]}`",
        "",
    ]
    return "\n".join(lines)


def _sheet(photographs: PhotographSet, judged: Judged) -> bytes:
    """Return a PNG of some photographs, each above the text of one of its records."""
    shown: dict[str, tuple[WorkItem, Verdict]] = {}
    for item, verdict in judged.accepted():
        if len(shown) == NUM_SHOWN:
            break
        shown.setdefault(item.image, (item, verdict))
    pictures = dict(photographs.read(list(shown)))
    num_rows, height = -(-len(shown) // SHEET_COLUMNS), THUMBNAIL_SIDE + TEXT_HEIGHT
    sheet = Image.new("RGB", (SHEET_COLUMNS * THUMBNAIL_SIDE, num_rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (digest, (item, verdict)) in enumerate(shown.items()):
        left, top = place % SHEET_COLUMNS * THUMBNAIL_SIDE, place // SHEET_COLUMNS * height
        with Image.open(io.BytesIO(thumbnail(pictures[digest]))) as small:
            sheet.paste(small, (left, top))
        text = _wrapped(f"{item.task}: {verdict.text}", 26)[:6]
        draw.text((left + 2, top + THUMBNAIL_SIDE), "\n".join(text), fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text.encode("latin-1", "replace").decode("latin-1"), width)
