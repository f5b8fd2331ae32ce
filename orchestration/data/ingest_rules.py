"""Rules by which images and instruct records are kept, and the codes of those that are not."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from orchestration.recipe.toml_sections import lay_over, parse_section, read_toml
from tinyemo.config import Section
from tinyemo.errors import DataError
from tinyemo.taxonomies import TAXONOMIES, TaxonomyChoice

Task = Literal["caption", "vqa", "sqa", "reasoning"]
TASKS: tuple[Task, ...] = ("caption", "vqa", "sqa", "reasoning")

SPLIT_NAME = re.compile(r"\w[\w.-]*")
"""A split names files, so it is made of letters, digits, underscores, dots and dashes."""

KEPT_FORMATS = ("JPEG", "PNG", "WEBP", "MPO")
"""Pillow's names of the formats whose bytes are stored as they came. MPO is what phones write: a JPEG with a second,
smaller picture after it, which readers of JPEG pass over."""
CONVERTIBLE_FORMATS = ("BMP", "GIF", "ICO", "PPM", "TIFF")
"""Other formats that are opened at all; Pillow's remaining decoders are never run on foreign files."""
PILLOW_MAX_PIXELS = 178_956_970
"""Beyond this many pixels Pillow itself refuses to open an image."""


class Reason(StrEnum):
    """Reason why a record is not kept.

    Checks run in this order, those of the record before those of its image, and those over all records (`duplicate_`)
    last; a record carries the first code that applies.
    """

    BAD_ROW = "bad_row"
    """A row of a table of labels cannot be read."""
    BAD_JSON = "bad_json"
    """No JSON, not UTF-8, too long or too deep to read; or the place from which on a JSON array is broken."""
    NOT_A_RECORD = "not_a_record"
    """JSON, but no object."""
    MISSING_FIELD = "missing_field"
    """`id`, `image` or `conversations` is absent, null or an empty text."""
    WRONG_TYPE = "wrong_type"
    """A field, or a turn of the conversation, is of another type than it must be."""
    BAD_ID = "bad_id"
    """`id` is blank or longer than 512 characters."""
    BAD_SPLIT = "bad_split"
    """`split` cannot name a file."""
    NO_TURNS = "no_turns"
    """The conversation is empty."""
    UNKNOWN_ROLE = "unknown_role"
    """A turn is from neither `human` nor `gpt`."""
    TURNS_OUT_OF_ORDER = "turns_out_of_order"
    """Turns are not human, gpt, human, gpt ... with gpt last."""
    SEVERAL_IMAGE_TOKENS = "several_image_tokens"
    """`<image>` stands more than once in the conversation."""
    NO_IMAGE_TOKEN = "no_image_token"
    """`<image>` is not in the first human turn."""
    EMPTY_QUESTION = "empty_question"
    """A human turn is blank, `<image>` aside."""
    EMPTY_ANSWER = "empty_answer"
    """A gpt turn is blank."""
    TEXT_TOO_LONG = "text_too_long"
    """The turns together have more than `max_text_chars` characters."""
    LABELS_MALFORMED = "labels_malformed"
    """The line `Labels: [a, b, c]` or `Predicted Label: X` is there without its form, twice, or one without the
    other."""
    LABEL_UNKNOWN = "label_unknown"
    """A label is not in the taxonomy, aliases and unambiguous synonyms considered."""
    LABEL_NOT_OFFERED = "label_not_offered"
    """The label that is stated, predicted or given is not among those offered."""
    LABEL_CONFLICT = "label_conflict"
    """The label that is stated, the one that is predicted and the one that is given are not the same."""
    TASK_UNKNOWN = "task_unknown"
    """`task`, or the one found from the conversation, is not among the rule's `tasks`."""
    ANSWER_LEAKS = "answer_leaks"
    """The question holds the label that the answer names, outside a list of labels to choose from."""
    IMAGE_OUTSIDE_ROOT = "image_outside_root"
    """The path leads out of the images' root, or is absolute and not under `foreign_root`."""
    IMAGE_MISSING = "image_missing"
    """There is no such file."""
    IMAGE_UNREADABLE = "image_unreadable"
    """The file cannot be read, or is no image that Pillow can decode."""
    IMAGE_TOO_LARGE = "image_too_large"
    """More bytes than `max_image_bytes`, or more pixels than `max_pixels` by its header."""
    IMAGE_TOO_SMALL = "image_too_small"
    """A side is shorter than `min_side`."""
    IMAGE_FORMAT = "image_format"
    """Neither JPEG, PNG nor WebP, nor one of `convert_formats`."""
    IMAGE_ANIMATED = "image_animated"
    """Several frames or pages, where `animated` says reject."""
    IMAGE_MODE = "image_mode"
    """Pixels are neither RGB nor L, nor one of `convert_modes`."""
    IMAGE_TRUNCATED = "image_truncated"
    """The file ends before its last pixel."""
    DUPLICATE_ID = "duplicate_id"
    """An earlier record has this id; see `repeated_id`."""
    DUPLICATE_IMAGE = "duplicate_image"
    """The same image is in a split that is held out more (test, then validation, then any other, then train)."""
    DUPLICATE_NEAR_IMAGE = "duplicate_near_image"
    """An image within `near_duplicate_bits` of this one is in a split that is held out more."""

    NULL_FIELD = "null_field"
    """Kind features: split, id, label or a number of the vector is null or empty."""
    WRONG_WIDTH = "wrong_width"
    """Kind features: the vector has another width than the data set."""
    NOT_FINITE = "not_finite"
    """Kind features: the vector holds NaN or Inf."""
    UNKNOWN_LABEL = "unknown_label"
    """Kind features: the label is not in the taxonomy."""
    ID_IN_TWO_SPLITS = "id_in_two_splits"
    """Kind features: a split that is held out more has this id."""
    VECTOR_IN_TWO_SPLITS = "vector_in_two_splits"
    """Kind features: a split that is held out more has this vector."""
    CONFLICTING_LABELS = "conflicting_labels"
    """Kind images: records of the same image name different labels."""

    @property
    def is_duplicate(self) -> bool:
        """True where the record is sound, but one too many."""
        return self.startswith("duplicate_")


class RejectedRecordError(DataError):
    """One record is not kept; caught where records are checked."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class IngestRules(Section):
    """Rules for keeping records, changing images and splitting; part of the data set's manifest."""

    taxonomy: TaxonomyChoice = TAXONOMIES["ekman"]
    """Labels that are allowed: ekman, mikels, parrott, or a TOML or JSON file with words, synonyms and maps."""
    tasks: tuple[Task, ...] = TASKS
    """The tasks that are allowed."""
    held_out: dict[str, float] = Field({"validation": 0.05, "test": 0.05})
    """Split -> fraction of images, for records that name no split; what is left over is train. The image's sha256
    decides, so the records of an image stay together."""
    max_rejected_fraction: float = Field(0.05, ge=0, le=1)
    """The ingest fails where more records than this are rejected, of all; duplicates do not count."""
    repeated_id: Literal["reject", "number"] = "reject"
    """A second record with the same id: reject it, or keep it as `<id>#2`, the third as `<id>#3`, for data whose ids
    name images. One with the same conversation is a duplicate either way."""

    leaks: Literal["reject", "keep"] = "reject"
    """Records of caption, vqa and sqa whose question holds the label that the answer names."""
    stated_label: Literal["keep", "reject"] = "keep"
    """Records whose question states the correct label, as the published reasoning records do. `reject` leaves data on
    which accuracy can be measured."""
    stated_pattern: str = (
        r"\b(?:correct|true|right) (?:label|emotion)(?: is:?|:)\s*[\"'\[]*([A-Za-z][A-Za-z-]*)[\"'\]]*[.!]?\s*$"
    )
    """Regular expression, case ignored, `$` at line ends: group 1 is the label that a question states."""
    label_from_folder: bool = False
    """Take the label of a record that has none from the folder of its image: `.../<label>/<file>.jpg`."""
    max_text_chars: PositiveInt = 16_384
    """Of all turns of a record together, characters."""

    foreign_root: str = ""
    """Absolute folder on another machine that image paths start with; the images' root stands in its place."""
    max_image_bytes: PositiveInt = Field(32 * 2**20, le=2**30)
    """Of an image file."""
    max_pixels: PositiveInt = Field(25_000_000, le=PILLOW_MAX_PIXELS)
    """Width x height of an image, read from its header before anything is decoded. Decoding takes up to 4 bytes a pixel
    in a task: 100 MB at the default."""
    min_side: PositiveInt = 16
    """Shortest side of an image that is allowed, pixels."""
    animated: Literal["reject", "first_frame"] = "reject"
    """Images of several frames or pages; `first_frame` stores that one as PNG."""
    convert_modes: tuple[str, ...] = ("1", "CMYK", "LA", "P", "PA", "RGBA", "RGBX", "YCbCr")
    """Pillow's modes that are stored as PNG in RGB (1: in L), transparent parts white. RGB and L stay as they came,
    all others are rejected."""
    convert_formats: tuple[str, ...] = ("BMP", "GIF", "TIFF")
    """Pillow's formats that are stored as PNG. JPEG, PNG and WebP stay as they came, all others are rejected."""
    near_duplicate_bits: int = Field(4, ge=-1, le=11)
    """Two images in two splits are one picture where their 64-bit perceptual hashes differ in no more bits than this;
    -1 compares none. A flat image (one colour) has no such hash."""

    pictures_may_be_shown: bool = Field(False, exclude_if=lambda is_allowed: not is_allowed)
    """Whether `tinyemo report` may put small pictures of these images on its page: you have the right to show them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [
            f"held_out.{name}: {fraction} is no fraction of a split that is held out"
            for name, fraction in self.held_out.items()
            if not 0 <= fraction < 1 or name == "train" or not SPLIT_NAME.fullmatch(name)
        ]
        if sum(self.held_out.values()) >= 1:
            problems.append("held_out: the fractions sum to 1 or more, nothing is left for train")
        try:
            if re.compile(self.stated_pattern).groups != 1:
                problems.append("stated_pattern: it must have one group, the label")
        except re.error as error:
            problems.append(f"stated_pattern: no regular expression ({error})")
        if unknown := set(self.convert_formats) - set(CONVERTIBLE_FORMATS):
            problems.append(f"convert_formats: {', '.join(sorted(unknown))}; use {', '.join(CONVERTIBLE_FORMATS)}")
        if self.foreign_root and not self.foreign_root.startswith("/"):
            problems.append(f"foreign_root: {self.foreign_root!r} must be an absolute path")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class Layout(Section):
    """How the shards of an instruct data set are cut."""

    rows_per_group: PositiveInt = 256
    """Records of a Parquet row group, the unit of reading; the last one of a shard may be shorter."""
    shard_bytes: PositiveInt = 64 * 2**20
    """A shard ends with the record that reaches this many bytes of images and texts."""
    records_per_chunk: PositiveInt = Field(1000, exclude=True)
    """Records that one task checks; no part of what is stored."""


def load_rules(path: Path | None, overrides: list[str] | None = None) -> IngestRules:
    """Return the rules of a TOML file, or the defaults, with `key=value` overrides laid over them.

    Raises:
        ConfigError: all that is wrong with them, one line a field.
    """
    content = {} if path is None else read_toml(path)
    problems = lay_over(content, overrides or [], IngestRules)
    return parse_section(IngestRules, content, source="rules" if path is None else str(path), problems=problems)
