"""Teachers in process: a transformers model on a pool of Ray actors, batch by batch.

A batch is always the same items, also after a restart, so that padding cannot change an answer between two starts.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from orchestration.assets.catalogue import CATALOGUE, find_asset, get_asset
from orchestration.assets.model_files import fetch_from_hub, fetch_from_s3
from orchestration.data.tasks import guarded, run_on_actors
from orchestration.synthesize.answer_ledger import ANSWER_SCHEMA, Answer
from orchestration.synthesize.synthesis_recipe import TeacherConfig
from orchestration.synthesize.work_items import WorkItem
from tinyemo.errors import AssetError, DataError

HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
BATCH_SIZE = 16


def fetch_teacher(model: str) -> Path:
    """Return the folder or GGUF file of a teacher on this node.

    Raises:
        AssetError, StorageError: the source does not answer, or there is no such folder.
    """
    if model in CATALOGUE:
        return get_asset(model) / find_asset(model).files[0]
    if model.startswith("s3://"):
        return fetch_from_s3(model)
    if Path(model).is_absolute():
        if not Path(model).exists():
            raise AssetError(f"{model} is not on this node: put the teacher's folder on every node")
        return Path(model)
    name, separator, commit = model.partition("@")
    if not separator:
        raise AssetError(f"teacher {model!r} is no asset, folder or s3 address; a name on the hub needs @commit")
    return fetch_from_hub(name, commit, HUB_FILES)


class LocalTeacher:
    """Ray Data actor that holds a teacher for as long as it lives."""

    def __init__(self, name: str, teacher: TeacherConfig, photographs: Any) -> None:
        """Remember what to load; `photographs` has `read`, and is None for a text-only teacher."""
        self.name, self.teacher, self.photographs = name, teacher, photographs
        self.model: Any = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the answers to one batch of items."""
        return guarded(self._answer_batch, batch)

    def _answer_batch(self, batch: pa.Table) -> pa.Table:
        if self.model is None:
            self._load()
        rows = [item for row in batch.to_pylist() for item in row["items"]]
        items = [WorkItem(**{**row, "offered": tuple(row["offered"] or ())}) for row in rows]
        began_at = time.monotonic()
        texts = self.generate(items)
        answers = [
            Answer(
                item.key,
                item.task,
                self.name,
                text=text,
                finish_reason="stop" if has_ended else "length",
                model=self.teacher.model,
                prompt_tokens=num_prompt,
                completion_tokens=num_new,
                latency_s=time.monotonic() - began_at,
            )
            for item, (text, has_ended, num_prompt, num_new) in zip(items, texts, strict=True)
        ]
        return pa.Table.from_pylist([asdict(answer) for answer in answers], schema=ANSWER_SCHEMA)

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        torch.set_num_threads(max(1, int(self.teacher.pool.cpus_per_actor)))
        path = fetch_teacher(self.teacher.model)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if path.suffix == ".gguf":
            options["gguf_file"], path = path.name, path.parent
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        kind = AutoModelForImageTextToText if self.teacher.sees_image else AutoModelForCausalLM
        try:
            model = kind.from_pretrained(path, dtype=dtype, **options)
            # A processor holds a tokenizer; a text-only teacher has that alone.
            self.processor = (AutoProcessor if self.teacher.sees_image else AutoTokenizer).from_pretrained(
                path, **options
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"teachers.{self.name}: {self.teacher.model} cannot be loaded: {reason}") from error
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = model.eval().to(self.device)

    def generate(self, items: Sequence[WorkItem]) -> list[tuple[str, bool, int, int]]:
        """Return for each item the text, whether it ended by itself, and its prompt's and its own tokens."""
        import torch

        try:
            prompts = [
                self.processor.apply_chat_template(self._turns(item), tokenize=False, add_generation_prompt=True)
                for item in items
            ]
        except ValueError as error:
            raise DataError(f"teachers.{self.name}: {str(error).splitlines()[0]}") from error
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}
        if self.teacher.sees_image:
            options["images"] = self._images(items)
        inputs = self.processor(text=prompts, **options).to(self.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.teacher.temperature:
            torch.manual_seed(items[0].seed)
            sampling = {"do_sample": True, "temperature": self.teacher.temperature}
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=self.teacher.max_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )
        length = inputs["input_ids"].shape[1]
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        found = []
        for row, mask in zip(tokens[:, length:].tolist(), inputs["attention_mask"], strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), None)
            text = self.tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
            found.append((text, stop is not None, int(mask.sum()), len(row) if stop is None else stop + 1))
        return found

    def _turns(self, item: WorkItem) -> list[dict[str, Any]]:
        content: Any = item.user
        if self.teacher.sees_image:
            content = [{"type": "image"}, {"type": "text", "text": item.user}]
        system: Any = [{"type": "text", "text": item.system}] if self.teacher.sees_image else item.system
        before = [{"role": "system", "content": system}] if item.system else []
        return [*before, {"role": "user", "content": content}]

    def _images(self, items: Sequence[WorkItem]) -> list[Any]:
        from PIL import Image

        files = dict(self.photographs.read([item.image for item in items]))
        return [[Image.open(io.BytesIO(files[item.image])).convert("RGB")] for item in items]


def answer_in_process(
    name: str, teacher: TeacherConfig, batches: Sequence[Sequence[WorkItem]], photographs: Any
) -> Iterator[list[Answer]]:
    """Yield the answers to each batch as actors finish it; call `connect` first.

    Raises:
        TinyEmoError: the teacher cannot be loaded, or the cluster has no room for it.
    """
    items = [{"items": [asdict(item) for item in batch]} for batch in batches]
    arguments = (name, teacher, photographs if teacher.sees_image else None)
    advice = "start the command again; answers so far are stored"
    for table in run_on_actors(items, LocalTeacher, arguments, teacher.pool, advice=advice):
        yield [Answer(**row) for row in table.to_pylist()]
