"""`tinyemo synthesize` from a recipe to a data set.

    photographs -> rounds of work items -> teachers -> ledger -> gates -> judge -> records -> ingest -> MLflow

Every step leaves what it found in S3 under the name, so the same command goes on where a driver was killed.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.data.data_card import has_mlflow
from orchestration.jobs.lease import Lease, hold_lease
from orchestration.services import storage, tracking
from orchestration.synthesize.answer_ledger import TRANSIENT, AnswerLedger, Spent, forget, open_ledger
from orchestration.synthesize.asking import ask_all, worst_case
from orchestration.synthesize.item_store import StoredItems, store_items
from orchestration.synthesize.photographs import PhotographSet, list_photographs
from orchestration.synthesize.prompts import PromptVariables
from orchestration.synthesize.requesting import Endpoint, read_key
from orchestration.synthesize.synthesis_recipe import JUDGE, SynthesisRecipe, TeacherConfig, sources_of
from orchestration.synthesize.synthesis_records import Judged, Output, judge, write_output
from orchestration.synthesize.work_items import Planner, WorkItem, open_prompts

if TYPE_CHECKING:
    from orchestration.services.tracking import RunHandle

logger = logging.getLogger(__name__)

Progress = Callable[..., None]


@dataclass(frozen=True)
class SynthesisResult:
    """The result of a synthesis.

    Attributes:
        folder: S3 folder of the ledger.
        num_requested: work items; accepted + rejected + unanswered.
        num_skipped: records that could not be asked for, because the photograph lacks what the prompt tells.
        rejected: code -> items.
        num_flagged: records whose label a projector disputes; they are kept.
        num_lost: requests of killed drivers that may have been paid for without an answer.
        requests, tokens, money: of all starts.
        tokens_per_s, answers_per_s: of this start; 0 where it asked nothing.
        stopped_by: limit of the budget that ended this start, or None.
        records: S3 address of the LLaVA records; their sha256 is `records_sha256`.
        teachers: by teacher: items, accepted, tokens, money.
        judge: figures of the judge against human norms; empty without either.
        dataset: the data set that was made; None where it was not.
    """

    name: str
    folder: str
    num_photographs: int
    num_requested: int
    num_accepted: int
    num_unanswered: int
    num_skipped: int
    rejected: dict[str, int]
    num_flagged: int
    num_lost: int
    requests: int
    tokens: int
    money: float
    tokens_per_s: float
    answers_per_s: float
    stopped_by: str | None
    records: str
    records_sha256: str
    teachers: dict[str, dict[str, float]]
    judge: dict[str, float]
    dataset: str | None
    run_url: str | None


@dataclass
class Asked:
    """Progress of one start of a synthesis.

    Attributes:
        seconds: that teachers were at work.
        before: spent when the start began.
    """

    ledger: AnswerLedger
    before: Spent
    seconds: float = 0.0
    num_answers: int = 0
    stopped_by: str | None = None


def synthesize(
    recipe: SynthesisRecipe,
    *,
    is_retried: bool = False,
    has_dataset: bool = True,
    progress: Progress = lambda *_: None,
) -> SynthesisResult:
    """Make a recipe's records, from where an earlier call with the same name stopped, and store them as a data set.

    Args:
        recipe: of the synthesis.
        is_retried: ask again for items that ended with a code of TRANSIENT.
        has_dataset: whether the records are ingested; else they are left in S3.
        progress: called with (stage, done, total).

    Raises:
        TinyEmoError: the input cannot be used, or a server does not answer; the same call continues.
    """
    for name, teacher in recipe.teachers.items():
        read_key(name, teacher)
    if has_mlflow():
        tracking.require_server()
    photographs = list_photographs(recipe.images, contexts_of(recipe))
    if has_dataset or any(teacher.kind == "transformers" for teacher in recipe.teachers.values()):
        from orchestration.services.ray_cluster import connect

        connect()
    storage.ensure_bucket(storage.parse_s3_uri(recipe.root)[0])
    folder = f"{recipe.root}/{recipe.name}"
    with (
        tempfile.TemporaryDirectory(prefix="tinyemo-synthesis-") as scratch_name,
        hold_lease(folder, None, {}, kind="synthesize") as lease,
        _open_run(recipe, lease, photographs) as run,
    ):
        scratch = Path(scratch_name)
        ledger = open_ledger(lease)
        if ledger.num_lost:
            logger.warning("%d requests of killed starts may have been paid for without an answer", ledger.num_lost)
        if is_retried:
            logger.info("%d items are asked again", forget(ledger, TRANSIENT))
        asked = Asked(ledger, ledger.spent)
        planner = Planner(recipe, open_prompts(recipe), photographs.taxonomy.words)
        rounds = _answer_rounds(planner, photographs, lease, asked, progress)
        judged = judge(recipe, photographs, ledger.folder, rounds)
        if recipe.gates.judge is not None and asked.stopped_by is None:
            judged = _ask_judge(planner, photographs, lease, asked, judged, rounds, progress)
        output = write_output(recipe, photographs, planner.prompts, lease, rounds, judged, scratch, progress)
        dataset = None
        if has_dataset and asked.stopped_by is None and output.num_accepted:
            dataset = _ingest(recipe, photographs, output, progress)
        result = _result(recipe, photographs, rounds, judged, output, asked, dataset, run)
        if run is not None:
            _log_result(run, recipe, result, output)
    return result


def contexts_of(recipe: SynthesisRecipe) -> set[str]:
    """Return everything that prompts are told."""
    return {name for task in recipe.tasks.values() for name in task.context}


def describe_synthesis(recipe: SynthesisRecipe) -> dict[str, Any]:
    """Return what a start would do, without writing or asking: counts, first prompts, worst case of tokens and money.

    Items that need another task's answer are counted as if every answer were accepted.
    """
    for name, teacher in recipe.teachers.items():
        read_key(name, teacher)
    photographs = list_photographs(recipe.images, contexts_of(recipe))
    planner = Planner(recipe, open_prompts(recipe), photographs.taxonomy.words)
    stand_ins = {
        (photograph.digest, other): f"(answer of {other})"
        for photograph in photographs.photographs
        for task in recipe.tasks.values()
        for other in sources_of(task)
    }
    items: dict[str, int] = {}
    prompts: dict[str, str] = {}
    skipped, tokens, money = 0, 0, 0.0
    for tasks in recipe.rounds():
        for item in planner.items(photographs.photographs, tasks, stand_ins):
            if item is None:
                skipped += 1
                continue
            name = f"{item.task} by {item.teacher}"
            items[name] = items.get(name, 0) + 1
            prompts.setdefault(name, f"{item.system}\n\n{item.user}".strip())
            most = worst_case(item, recipe.teachers[item.teacher])
            tokens, money = tokens + most[0], money + most[1]
    return {
        "photographs": len(photographs.photographs),
        "items": items,
        "skipped": skipped,
        "worst_case_tokens": tokens,
        "worst_case_money": round(money, 6),
        "prompts": prompts,
    }


def _answer_rounds(
    planner: Planner, photographs: PhotographSet, lease: Lease, asked: Asked, progress: Progress
) -> list[StoredItems]:
    """Ask for every round that the budget allows; later rounds are told accepted answers of earlier ones."""
    recipe = planner.recipe
    rounds: list[StoredItems] = []
    answers: dict[tuple[str, str], str] = {}
    for number, tasks in enumerate(recipe.rounds()):
        needed = {source for task in tasks for source in sources_of(recipe.tasks[task])}
        if needed:
            judged = judge(recipe, photographs, lease.folder, rounds, tasks=needed, has_duplicates=False)
            answers = {(item.image, item.task): verdict.text for item, verdict in judged.accepted()}
        told = sorted("".join((*key, text)) for key, text in answers.items())
        plan = "\0".join([recipe.digest(), photographs.digest, *told])
        stored = store_items(lease, plan, number, planner.items(photographs.photographs, tasks, answers))
        rounds.append(stored)
        _answer(recipe, photographs, stored, stored.total, asked, progress, ", ".join(tasks))
        if asked.stopped_by is not None:
            break
    return rounds


def _answer(
    recipe: SynthesisRecipe,
    photographs: PhotographSet,
    items: Any,
    total: int,
    asked: Asked,
    progress: Progress,
    stage: str,
) -> None:
    """Ask for the items that have no answer yet."""
    ledger, began_at, before = asked.ledger, time.monotonic(), len(asked.ledger.done)
    todo = total - sum(item.key in ledger.done for item in items)
    progress(stage, total - todo, total)
    if not todo:
        return

    def on_progress(num_done: int) -> None:
        progress(stage, min(total, total - todo + num_done - before), total)

    def left(name: str) -> Iterator[WorkItem]:
        return (item for item in items if item.teacher == name and item.key not in ledger.done)

    endpoints = {
        name: Endpoint(name, teacher, recipe.retries)
        for name, teacher in recipe.teachers.items()
        if teacher.kind == "endpoint"
    }
    try:
        for name, teacher in recipe.teachers.items():
            if teacher.kind == "transformers":
                _answer_in_process(name, teacher, items, photographs, ledger, on_progress)
        if endpoints:
            feeds = {name: left(name) for name in endpoints}
            read = _image_reader(photographs)
            asked.stopped_by = asyncio.run(ask_all(feeds, endpoints, ledger, recipe.budget, read, on_progress))
        ledger.merge()
    finally:
        asked.seconds += time.monotonic() - began_at
        asked.num_answers += len(ledger.done) - before


def _image_reader(photographs: PhotographSet) -> Callable[[str], bytes]:
    return lambda digest: next(photographs.read([digest]))[1]


def _answer_in_process(
    name: str,
    teacher: TeacherConfig,
    items: Any,
    photographs: PhotographSet,
    ledger: AnswerLedger,
    on_progress: Callable[[int], None],
) -> None:
    """Answer the batches that lack an answer; a batch is the same at every start."""
    from orchestration.synthesize.local_teachers import BATCH_SIZE, answer_in_process

    own = [item for item in items if item.teacher == name]
    size = teacher.pool.batch_size or BATCH_SIZE
    batches = [own[start : start + size] for start in range(0, len(own), size)]
    batches = [batch for batch in batches if any(item.key not in ledger.done for item in batch)]
    if not batches:
        return
    for answers in answer_in_process(name, teacher, batches, photographs):
        ledger.commit([answer for answer in answers if answer.key not in ledger.done], {})
        on_progress(len(ledger.done))


def _ask_judge(
    planner: Planner,
    photographs: PhotographSet,
    lease: Lease,
    asked: Asked,
    judged: Judged,
    rounds: Sequence[StoredItems],
    progress: Progress,
) -> Judged:
    """Let the judge score every record that passed the gates, and apply its least score."""
    recipe = planner.recipe
    teacher = recipe.gates.judge
    assert teacher is not None
    known = {photograph.digest: photograph for photograph in photographs.photographs}

    def items() -> Iterator[WorkItem]:
        for item, verdict in judged.accepted():
            variables = PromptVariables(question=item.question, answer=verdict.text, wants_json=True)
            yield planner.make(known[item.image], JUDGE, teacher, planner.prompts[JUDGE].render(variables), item.key)

    plan = "\0".join([recipe.digest(), photographs.digest, JUDGE, *(item.key for item, _ in judged.accepted())])
    stored = store_items(lease, plan, len(rounds), items())
    _answer(recipe, photographs, stored, stored.total, asked, progress, JUDGE)
    return judged.scored(recipe.gates, stored, lease.folder, known)


def _ingest(recipe: SynthesisRecipe, photographs: PhotographSet, output: Output, progress: Progress) -> str:
    """Store the records as a data set of kind instruct."""
    from orchestration.data.ingest import ingest_instruct
    from orchestration.data.ingest_rules import IngestRules

    source = {
        "answers": "synthetic",
        "teachers": {name: teacher.model for name, teacher in recipe.teachers.items()},
        "prompts": output.prompts,
        "photographs": {"source": recipe.images.source, "digest": photographs.digest},
        "synthesis": output.folder,
    }
    report = ingest_instruct(
        output.records,
        output.images,
        name=recipe.name,
        root=recipe.datasets,
        rules=IngestRules(taxonomy=photographs.taxonomy),
        source=source,
        extra_rules={"answers": "synthetic", "recipe_sha256": recipe.digest()},
        advance=progress,
    )
    return report.manifest.uri


def _result(
    recipe: SynthesisRecipe,
    photographs: PhotographSet,
    rounds: Sequence[StoredItems],
    judged: Judged,
    output: Output,
    asked: Asked,
    dataset: str | None,
    run: RunHandle | None,
) -> SynthesisResult:
    spent, num_requested = asked.ledger.spent, sum(stored.total for stored in rounds)
    num_rejected = sum(output.rejected.values())
    if output.num_accepted + num_rejected + output.num_unanswered != num_requested:
        raise AssertionError(
            f"{num_requested} items, {output.num_accepted} accepted, {num_rejected} rejected, "
            f"{output.num_unanswered} unanswered"
        )
    return SynthesisResult(
        name=recipe.name,
        folder=asked.ledger.folder,
        num_photographs=len(photographs.photographs),
        num_requested=num_requested,
        num_accepted=output.num_accepted,
        num_unanswered=output.num_unanswered,
        num_skipped=sum(stored.num_skipped for stored in rounds),
        rejected=output.rejected,
        num_flagged=output.num_flagged,
        num_lost=asked.ledger.num_lost,
        requests=spent.requests,
        tokens=spent.tokens,
        money=round(spent.money, 6),
        tokens_per_s=(spent.tokens - asked.before.tokens) / asked.seconds if asked.num_answers else 0.0,
        answers_per_s=asked.num_answers / asked.seconds if asked.num_answers else 0.0,
        stopped_by=asked.stopped_by,
        records=output.records,
        records_sha256=output.sha256,
        teachers=output.teachers,
        judge=judged.agreement,
        dataset=dataset,
        run_url=run.url if run is not None else None,
    )


@contextmanager
def _open_run(recipe: SynthesisRecipe, lease: Lease, photographs: PhotographSet) -> Iterator[RunHandle | None]:
    """Open the MLflow run of this name and recipe, the one before where it was interrupted; None without a server."""
    if not has_mlflow():
        yield None
        return
    uri = f"{lease.folder}/mlflow/{recipe.digest()[:16]}.json"
    before = storage.read_json(uri)["run_id"] if storage.exists(uri) else None
    tags = {"kind": "synthesize", "data.uri": recipe.images.source, "data.digest": photographs.digest}
    with tracking.open_run(
        recipe.experiment,
        f"synthesize-{recipe.name}",
        params=recipe.model_dump(mode="json"),
        tags=tags,
        resume_run_id=before,
    ) as run:
        lease.write_json(uri, {"run_id": run.run_id})
        logger.info("MLflow: %s", run.url)
        num_photographs = len(photographs.photographs)
        run.log_dataset("photographs", photographs.digest, recipe.images.source, num_photographs, "source")
        yield run


def _log_result(run: RunHandle, recipe: SynthesisRecipe, result: SynthesisResult, output: Output) -> None:
    """Write figures, the card and the prompts into the run."""
    step = result.num_requested - result.num_unanswered
    metrics: dict[str, float] = {
        "synthesis/requested": result.num_requested,
        "synthesis/accepted": result.num_accepted,
        "synthesis/requests": result.requests,
        "synthesis/tokens": result.tokens,
        "synthesis/money": result.money,
        "synthesis/lost": result.num_lost,
        "synthesis/flagged": result.num_flagged,
        "synthesis/tokens_per_s": result.tokens_per_s,
        "synthesis/answers_per_s": result.answers_per_s,
        **{f"gate/{code}": count for code, count in result.rejected.items()},
        **{f"teacher/{name}_{key}": value for name, found in result.teachers.items() for key, value in found.items()},
        **{f"judge/{name}": value for name, value in result.judge.items()},
    }
    run.log_metrics(metrics, step)
    for path in output.files:
        run.log_artifact(path, "synthesis")
    facts = {
        "records": result.records,
        "data set": result.dataset,
        "photographs": recipe.images.source,
        "teachers": ", ".join(f"{name}: {teacher.model}" for name, teacher in recipe.teachers.items()),
        "accepted": f"{result.num_accepted} of {result.num_requested}",
    }
    run.describe("Synthetic instruct records: every answer was written by a model, see card.md.", facts)
    run.set_tags({"records.sha256": result.records_sha256, "data.made": result.dataset or ""})
