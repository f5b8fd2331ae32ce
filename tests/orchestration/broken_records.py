"""Instruct records and images made by code: sound ones, and every way of being broken that we know of."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orchestration.data.ingest_rules import IngestRules
from orchestration.data.staging import MAX_RECORD_BYTES

FOREIGN_ROOT = "/elsewhere/images"
RULES = IngestRules(
    foreign_root=FOREIGN_ROOT,
    max_rejected_fraction=1,
    max_image_bytes=300_000,
    max_pixels=1_000_000,
    max_text_chars=2_000,
)
"""What the corpus is ingested by."""


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A colourful picture whose perceptual hash has nothing to do with that of another seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def frames(kind: str) -> bytes:
    """An animation of three pictures."""
    first, *rest = (picture(seed) for seed in (901, 902, 903))
    return encode(first, kind, save_all=True, append_images=rest)


def record(name: str, image: str, **changes: Any) -> dict[str, Any]:
    """A caption record of an image."""
    turns = [("human", "<image>\nDescribe the image."), ("gpt", f"This is {name}.")]
    return {"id": name, "image": image, "conversations": conversation(turns)} | changes


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns as LLaVA writes them."""
    return [{"from": role, "value": text} for role, text in turns]


def asked(question: str, answer: str = "It is a picture.") -> dict[str, Any]:
    """A conversation of one question."""
    return {"conversations": conversation([("human", f"<image>\n{question}"), ("gpt", answer)])}


def reasoned(labels: str, *, stated: str | None = None, predicted: str | None = "joy") -> dict[str, Any]:
    """A conversation in the published reasoning form."""
    question = "Provide emotional reasoning. Also choose the emotion that best corresponds to the image:\n\n"
    question += f"Labels: {labels}"
    question += f"\n\nImportant: note that the correct label is {stated}." if stated else ""
    answer = "Reasoning: bright colours." + (f"\nPredicted Label: {predicted}" if predicted else "")
    return asked(question, answer)


@dataclass
class Corpus:
    """A JSON Lines file and a folder of images, and what must become of each line."""

    folder: Path
    lines: list[bytes] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    """Line number -> reason code."""
    names: dict[int, str] = field(default_factory=dict)
    """Line number of a broken record -> in which way it is broken."""
    kept: dict[str, Path] = field(default_factory=dict)
    """Id of a sound record -> its image file."""

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def records(self) -> Path:
        return self.folder / "records.jsonl"

    def image(self, name: str, data: bytes | None = None) -> str:
        """Store an image file, a new picture unless `data` is given; its path below the root."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(len(self.lines))) if data is None else data)
        return name

    def keep(self, line: dict[str, Any], file: str) -> None:
        """Add a record that must be kept."""
        self.lines.append(json.dumps(line).encode())
        self.kept[str(line["id"])] = self.images / file

    def reject(self, reason: str, name: str, line: dict[str, Any] | bytes) -> None:
        """Add a record that must end in the dead letter."""
        self.lines.append(line if isinstance(line, bytes) else json.dumps(line).encode())
        self.reasons[len(self.lines)] = reason
        self.names[len(self.lines)] = name

    def write(self) -> None:
        """The file of records."""
        self.records.write_bytes(b"\n".join(self.lines) + b"\n")


def write_corpus(folder: Path) -> Corpus:
    """All of it."""
    corpus = Corpus(folder)
    corpus.images.mkdir(parents=True)
    for add in (_sound, _unreadable_texts, _broken_fields, _broken_turns, _broken_labels, _paths, _images, _duplicates):
        add(corpus)
    corpus.write()
    return corpus


def _sound(corpus: Corpus) -> None:
    """Records that look odd and are right."""
    for number in range(8):
        name = f"sound-{number}"
        corpus.keep(record(name, corpus.image(f"{name}.jpg"), split="train" if number % 2 else "test"), f"{name}.jpg")
    odd: dict[str, Callable[[str], dict[str, Any]]] = {
        "integer": lambda file: record("x", file, id=4711),
        "foreign": lambda file: record("foreign", f"{FOREIGN_ROOT}/{file}"),
        "dotted": lambda file: record("dotted", f"a/../{file}"),
        "nulls": lambda file: record("nulls", file, split=None, task=None, label=None, source=None),
        "reasoning": lambda file: record("reasoning", file, **reasoned("['Joy', \"fear\"]", stated="joy")),
        "long answer": lambda file: record("long answer", file, **asked("What is it?", "ä" * 1_900)),
        "told before": lambda file: record(
            "told before",
            file,
            task="sqa",
            conversations=conversation(
                [("human", "<image> What do you feel?"), ("gpt", "Joy."), ("human", "Why joy?"), ("gpt", "The joy.")]
            ),
        ),
    }
    for name, build in odd.items():
        file = corpus.image(f"{name}.jpg")
        corpus.keep(build(file), file)
    corpus.lines.append(b"   ")  # a blank line is no record
    grey = encode(picture(700).convert("L"), "PNG")
    for name, data in {"grey.png": grey, "web.webp": encode(picture(701), "WEBP")}.items():
        corpus.keep(record(name, corpus.image(name, data)), name)


def _unreadable_texts(corpus: Corpus) -> None:
    corpus.reject("bad_json", "no JSON", b'{"id": "half", "image": ')
    corpus.reject("bad_json", "two values", b'{"id": "a"} {"id": "b"}')
    corpus.reject("bad_json", "no UTF-8", b'{"id": "\xff\xfe"}')
    corpus.reject("bad_json", "no JSON number", b'{"id": NaN}')
    corpus.reject("bad_json", "half a character", b'{"id": "\\ud83d", "image": "a.jpg"}')
    corpus.reject("bad_json", "too deep", b"[" * 100_000)
    corpus.reject("bad_json", "too long", b'{"id": "' + b"x" * MAX_RECORD_BYTES + b'"}')
    corpus.reject("bad_json", "a number of 5,000 digits", b'{"id": ' + b"1" * 5_000 + b"}")
    corpus.reject("not_a_record", "a list", b'["id", "image"]')
    corpus.reject("not_a_record", "a text", b'"id"')
    corpus.reject("not_a_record", "null", b"null")


def _broken_fields(corpus: Corpus) -> None:
    file = corpus.image("fields.jpg")
    whole = record("fields", file)
    for name in ("id", "image", "conversations"):
        corpus.reject("missing_field", f"no {name}", {key: value for key, value in whole.items() if key != name})
        corpus.reject("missing_field", f"{name} is null", whole | {name: None})
    corpus.reject("missing_field", "image is empty", whole | {"image": ""})
    for name, value in {
        "id": 1.5, "image": 7, "conversations": "<image>", "split": 3, "task": ["vqa"], "label": {"a": 1}, "source": 1,
    }.items():  # fmt: skip
        corpus.reject("wrong_type", f"{name} of a wrong type", whole | {name: value})
    corpus.reject("wrong_type", "id is true", whole | {"id": True})
    corpus.reject("wrong_type", "image is nested 500 deep", whole | {"image": _nested(500)})
    corpus.reject("wrong_type", "a turn is a text", whole | {"conversations": ["<image>", "yes"]})
    corpus.reject("wrong_type", "a turn without value", whole | {"conversations": [{"from": "human"}]})
    corpus.reject("wrong_type", "a text is a number", whole | {"conversations": [{"from": "human", "value": 1}]})
    corpus.reject("bad_id", "id is blank", whole | {"id": " \t"})
    corpus.reject("bad_id", "id of 513 characters", whole | {"id": "x" * 513})
    corpus.reject("bad_split", "split is a path", whole | {"split": "../train"})
    corpus.reject("bad_split", "split is empty", whole | {"split": ""})
    corpus.reject("task_unknown", "a task of our own", whole | {"task": "poetry"})


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _broken_turns(corpus: Corpus) -> None:
    file = corpus.image("turns.jpg")
    question, answer = ("human", "<image> What is it?"), ("gpt", "A picture.")
    more, silent = ("human", "And now?"), ("gpt", " \n")
    for reason, name, turns in (
        ("no_turns", "no turn", []),
        ("unknown_role", "a system turn", [("system", "Be brief."), question, answer]),
        ("turns_out_of_order", "gpt begins", [answer, question]),
        ("turns_out_of_order", "human twice", [question, more, answer, answer]),
        ("turns_out_of_order", "human ends", [question, answer, more]),
        ("no_image_token", "no image token", [more, answer]),
        ("no_image_token", "image token in the answer", [more, ("gpt", "<image>")]),
        ("no_image_token", "image token in the second question", [more, answer, question, answer]),
        ("several_image_tokens", "image token twice", [("human", "<image><image> What?"), answer]),
        ("several_image_tokens", "image token in both turns", [question, ("gpt", "See <image>")]),
        ("empty_question", "no question", [("human", "<image>\n "), answer]),
        ("empty_question", "no second question", [question, answer, ("human", ""), answer]),
        ("empty_answer", "no answer", [question, silent]),
        ("empty_answer", "no second answer", [question, answer, more, silent]),
        ("text_too_long", "a long answer", [question, ("gpt", "x" * 2_000)]),
    ):
        corpus.reject(reason, name, record("turns", file) | {"conversations": conversation(turns)})


def _broken_labels(corpus: Corpus) -> None:
    file = corpus.image("labels.jpg")
    for reason, name, changes in (
        ("labels_malformed", "labels without brackets", reasoned("joy, fear")),
        ("labels_malformed", "no labels", reasoned("[]")),
        ("labels_malformed", "an empty label", reasoned("[joy, , fear]")),
        ("labels_malformed", "a label twice", reasoned("[joy, fear, Joy]")),
        ("labels_malformed", "labels twice", reasoned("[joy, fear]\nLabels: [joy, fear]")),
        ("labels_malformed", "no predicted label", reasoned("[joy, fear]", predicted=None)),
        ("labels_malformed", "an empty predicted label", reasoned("[joy, fear]", predicted=" ")),
        ("label_unknown", "an unknown label offered", reasoned("[joy, hangry]")),
        ("label_unknown", "a label of another taxonomy", reasoned("[joy, awe]")),
        ("label_unknown", "an unknown label predicted", reasoned("[joy, fear]", predicted="hangry")),
        ("label_unknown", "an unknown label stated", reasoned("[joy, fear]", stated="hangry")),
        ("label_unknown", "an unknown label given", {"label": "hangry"}),
        ("label_not_offered", "stated, not offered", reasoned("[joy, fear]", stated="anger")),
        ("label_not_offered", "predicted, not offered", reasoned("[joy, fear]", predicted="anger")),
        ("label_not_offered", "given, not offered", {**reasoned("[joy, fear]"), "label": "anger"}),
        ("label_conflict", "stated one, predicted the other", reasoned("[joy, fear]", stated="fear")),
        ("label_conflict", "given one, predicted the other", {**reasoned("[joy, fear]"), "label": "fear"}),
        ("answer_leaks", "sqa that tells", asked("Which emotion, if not joy?", "It shows joy.")),
        ("answer_leaks", "sqa that tells the label given", {**asked("Why this joy? How do you feel?"), "label": "joy"}),
        ("answer_leaks", "vqa that tells", asked("Is there Sadness here?", "Yes, sadness.")),
        ("answer_leaks", "caption that tells", asked("Describe the disgust.", "A face full of disgust.")),
    ):
        corpus.reject(reason, name, record("labels", file, **changes))


def _paths(corpus: Corpus) -> None:
    (corpus.folder / "secret.jpg").write_bytes(encode(picture(800)))
    (corpus.images / "link.jpg").symlink_to(corpus.folder / "secret.jpg")
    (corpus.images / "loop.jpg").symlink_to("loop.jpg")
    (corpus.images / "folder.jpg").mkdir()
    os.mkfifo(corpus.images / "pipe.jpg")
    for reason, name, path in (
        ("image_outside_root", "up and out", "../secret.jpg"),
        ("image_outside_root", "down, up and out", "a/b/../../../secret.jpg"),
        ("image_outside_root", "another root", "/etc/hostname"),
        ("image_outside_root", "a root that only begins alike", f"{FOREIGN_ROOT}-2/a.jpg"),
        ("image_outside_root", "out of the foreign root", f"{FOREIGN_ROOT}/../../secret.jpg"),
        ("image_outside_root", "an address", "https://example.org/a.jpg"),
        ("image_outside_root", "a link that leads out", "link.jpg"),
        ("image_missing", "no such file", "nowhere.jpg"),
        ("image_missing", "a folder", "folder.jpg"),
        ("image_missing", "a pipe", "pipe.jpg"),
        ("image_missing", "a link to itself", "loop.jpg"),
        ("image_missing", "a name that no file can have", "a\0.jpg"),
        ("image_missing", "a name that is too long", "x" * 300),
        ("image_missing", "the root itself", "."),
    ):
        corpus.reject(reason, name, record("paths", path))


def _images(corpus: Corpus) -> None:
    jpeg, png = encode(picture(801)), encode(picture(802), "PNG")
    huge = bytearray(encode(Image.new("L", (16, 16)), "PNG"))
    huge[16:24] = (30_000).to_bytes(4, "big") * 2  # width and height in the header, whose checksum follows
    huge[29:33] = _crc(bytes(huge[12:29]))
    deep = Image.fromarray(np.arange(96 * 64, dtype=np.uint16).reshape(64, 96))
    for reason, name, data in (
        ("image_unreadable", "empty.jpg", b""),
        ("image_unreadable", "text.jpg", b"this is no image" * 50),
        ("image_truncated", "header.png", png[:20]),
        ("image_unreadable", "broken.png", png[:60] + b"\xff" * 64 + png[124:]),
        ("image_truncated", "half.jpg", jpeg[: len(jpeg) // 2]),
        ("image_truncated", "half.png", png[: len(png) // 2]),
        ("image_too_large", "heavy.bmp", encode(picture(803, (400, 300)), "BMP")),
        ("image_too_large", "wide.png", encode(Image.new("L", (1_100, 1_000)), "PNG")),
        ("image_too_large", "bomb.png", bytes(huge)),
        ("image_too_small", "small.png", encode(picture(804, (15, 200)), "PNG")),
        ("image_format", "odd.ppm", encode(picture(805), "PPM")),
        ("image_format", "odd.ico", encode(picture(806, (64, 64)), "ICO")),
        ("image_animated", "moving.gif", frames("GIF")),
        ("image_animated", "moving.webp", frames("WEBP")),
        ("image_animated", "moving.png", frames("PNG")),
        ("image_animated", "pages.tiff", frames("TIFF")),
        ("image_mode", "sixteen.png", encode(deep, "PNG")),
        ("image_mode", "floats.tiff", encode(picture(807).convert("L").convert("F"), "TIFF")),
    ):
        corpus.reject(reason, name, record(name, corpus.image(name, data)))


def _crc(data: bytes) -> bytes:
    import zlib

    return zlib.crc32(data).to_bytes(4, "big")


def _duplicates(corpus: Corpus) -> None:
    """Behind all others, so that the sound records come first."""
    file = corpus.image("copy.jpg")
    corpus.reject("duplicate_id", "an id again", record("sound-1", file))
    shared = picture(900)
    same, near = encode(shared, quality=95), encode(shared.resize((60, 40)), quality=80)
    for split, image in (("test", same), ("train", same)):
        name = f"same-{split}"
        line = record(name, corpus.image(f"{name}.jpg", image), split=split)
        if split == "test":
            corpus.keep(line, f"{name}.jpg")
        else:
            corpus.reject("duplicate_image", "the same image in train", line)
    line = record("near", corpus.image("near.jpg", near), split="train")
    corpus.reject("duplicate_near_image", "the image again, smaller and re-saved", line)
