"""A projector's label and a language model's reasons: images in, label, scores and explanation out.

The label goes into the prompt in the form that the model was trained on (arXiv 2410.07062): a request, the labels to
choose from, the one that is right. The answer is then `Reasoning: ...`, a line break, `Predicted Label: X`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from orchestration.instruct.oasis import REASONING_REQUESTS
from orchestration.reasoning.steps import normalise
from orchestration.services import storage
from orchestration.streaming.record_forms import open_chat_tokenizer
from tinyemo.conversation import IMAGE_TEXT, encode_prompt
from tinyemo.encoders import encoder_of_card, find_conflict
from tinyemo.errors import ConfigError, DataError
from tinyemo.images import read_pixels
from tinyemo.projector import MetricProjector
from tinyemo.reasoner.model import Reasoner
from tinyemo.taxonomies import canonical_word

REQUEST = REASONING_REQUESTS[0]
ANSWER = re.compile(r"\s*Reasoning:\s*(?P<reasoning>.*?)\s*Predicted Label:\s*(?P<label>[^\n]*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Explanation:
    """What is said of one image.

    Attributes:
        image: where it came from.
        label: that the prompt stated: the projector's nearest word, or the user's.
        scores: cosine of each word, highest first; empty where the user gave the label.
        reasoning: what stands between `Reasoning:` and `Predicted Label:`; all of the text where it has no such form.
        predicted_label: that the text ends with; None without that form. It repeats the prompt's in a trained model.
        text: as generated.
    """

    image: str
    label: str
    reasoning: str
    predicted_label: str | None
    text: str
    scores: dict[str, float] = field(default_factory=dict)


def read_image(place: str) -> bytes:
    """An image's file, from this machine or S3.

    Raises:
        DataError: there is no such file.
        StorageError: S3 does not yield it.
    """
    if place.startswith("s3://"):
        return storage.read_bytes(place)
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror}") from error


class Explainer:
    """A model, and the projector that chooses its labels."""

    def __init__(self, folder: Path, projector: MetricProjector | None = None) -> None:
        """Load an exported folder.

        Args:
            folder: that `tinyemo train` exported.
            projector: trained on pooled features of the model's own vision tower; None where labels are given.

        Raises:
            DataError: the folder holds no such model, or the projector reads features of another encoder.
        """
        hf_logging.disable_progress_bar()
        try:
            self.model = Reasoner.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
            end_token = AutoTokenizer.from_pretrained(folder, local_files_only=True).eos_token
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} holds no exported reasoning model: {str(error).splitlines()[0]}") from error
        self.tokenizer = open_chat_tokenizer(str(folder), end_token)
        self.spec = self.model.config.encoder_spec
        self.projector = projector
        if projector is not None:
            conflict = find_conflict(encoder_of_card(projector.card), self.spec.info)
            if conflict is None and projector.config.encoder_width != self.spec.feature_width:
                conflict = (
                    f"it takes {projector.config.encoder_width} numbers, the tower gives {self.spec.feature_width}"
                )
            if conflict is not None:
                raise DataError(
                    f"the projector does not read the features of the model's vision tower {self.spec.info}: "
                    f"{conflict}; give another with --projector, or the label itself with --label"
                )

    def cautions(self) -> list[str]:
        """Lines that no explanation may be shown without."""
        config = self.model.config
        return [
            f"RANDOM WEIGHTS: {part} was never trained, what it says means nothing."
            for part, weights in (("the language model", config.llm_weights), ("the tower", config.vision_weights))
            if weights == "random"
        ]

    @torch.inference_mode()
    def explain(
        self, data: bytes, words: Sequence[str], *, source: str, label: str | None = None, max_new_tokens: int = 128
    ) -> Explanation:
        """One image's label, scores and reasons; the same input gives the same text.

        Args:
            data: an encoded image.
            words: labels to choose from, and that the prompt offers.
            source: of the image, for messages and the result.
            label: in place of the projector's.
            max_new_tokens: of the text.

        Raises:
            DataError: the bytes are no image.
            ConfigError: there is neither a projector nor a label.
        """
        try:
            pixels = torch.from_numpy(read_pixels(data, self.spec.preprocessing).copy())[None]
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        pixel_values = normalise(pixels, self.spec.preprocessing)
        scores: dict[str, float] = {}
        if label is None:
            scores = self._scores(pixel_values, words)
            label = next(iter(scores))
        turns = [("human", reasoning_question(words, label))]
        ids = encode_prompt(
            turns,
            self.tokenizer,
            template=self.model.config.template,
            image_tokens=self.model.config.num_image_tokens,
            task="reasoning",
            record_id=source,
        )
        input_ids = torch.tensor([ids])
        generated = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixel_values,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.end_id,
            pad_token_id=self.tokenizer.end_id,
        )
        text = self.tokenizer.decode(generated[0, len(ids) :].tolist()).strip()
        found = ANSWER.fullmatch(text)
        return Explanation(
            image=source,
            label=label,
            reasoning=found["reasoning"] if found else text,
            predicted_label=found["label"] if found else None,
            text=text,
            scores=scores,
        )

    def _scores(self, pixel_values: torch.Tensor, words: Sequence[str]) -> dict[str, float]:
        if self.projector is None:
            raise ConfigError(
                "no label for the prompt: give a projector trained on features of this tower with --projector "
                "(`tinyemo features`, then `tinyemo train`), or the label itself with --label"
            )
        pooled = self.model.vision_tower(pixel_values).pooled.float()
        cosines = self.projector.eval().classify(pooled, tuple(words))[0]
        ranked = sorted(zip(words, cosines.tolist(), strict=True), key=lambda pair: -pair[1])
        return dict(ranked)


def reasoning_question(words: Sequence[str], label: str) -> str:
    """The human turn of the trained form.

    Raises:
        ConfigError: the label is not among the words.
    """
    offered = list(dict.fromkeys(canonical_word(word) for word in words))
    if canonical_word(label) not in offered:
        raise ConfigError(f"--label {label!r} is not among the labels that the prompt offers: {', '.join(offered)}")
    return f"{IMAGE_TEXT}\n{REQUEST}\nLabels: [{', '.join(offered)}]\nThe correct label is {canonical_word(label)}."
