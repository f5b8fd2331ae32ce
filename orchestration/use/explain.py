"""Labels of images by a projector, and a language model's reasons for them.

The label goes into the prompt in the form that the model was trained on (arXiv 2410.07062): a request, the labels to
choose from, the right one. The answer is then `Reasoning: ...`, a line break, `Predicted Label: X`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from orchestration.data.forms import open_chat_tokenizer
from orchestration.data.oasis import REASONING_REQUESTS
from orchestration.use.bulk import Row
from orchestration.use.locations import fetch_export, read_image
from tinyemo.conversation import IMAGE_TEXT, encode_prompt
from tinyemo.encoders import encoder_of_card, find_conflict
from tinyemo.errors import ConfigError, DataError
from tinyemo.images import read_pixels
from tinyemo.projector import MetricProjector
from tinyemo.reasoner.model import Reasoner
from tinyemo.taxonomies import canonical_word
from tinyemo.vision import normalise

REQUEST = REASONING_REQUESTS[0]
ANSWER = re.compile(r"\s*Reasoning:\s*(?P<reasoning>.*?)\s*Predicted Label:\s*(?P<label>[^\n]*?)\s*", re.DOTALL)
CPU_BATCH_SIZE, GPU_BATCH_SIZE = 16, 64
"""Images explained together: decoding a token reads all weights once, whatever the batch."""


@dataclass(frozen=True)
class Explanation:
    """A label for one image and the reasons for it.

    Attributes:
        image: location of the image.
        label: label that the prompt stated: the projector's nearest word, or the user's.
        reasoning: text between `Reasoning:` and `Predicted Label:`; all of the text where it has another form.
        predicted_label: label at the end of the text, None in another form; a trained model repeats the prompt's.
        text: text as generated.
        scores: cosine of each word, highest first; empty where the user gave the label.
        problem: why the image could not be read; None where it could.
    """

    image: str
    label: str = ""
    reasoning: str = ""
    predicted_label: str | None = None
    text: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    problem: str | None = None


class Explainer:
    """A reasoning model, and the projector that chooses its labels."""

    def __init__(self, folder: Path, projector: MetricProjector | None = None, device: str | None = None) -> None:
        """Load an exported folder.

        Args:
            folder: export of `tinyemo train`.
            projector: trained on pooled features of the model's own vision tower; None where labels are given.
            device: None: a GPU, in bf16, where there is one, else the CPU in float32.

        Raises:
            DataError: the folder holds no such model, or the projector reads features of another encoder.
        """
        hf_logging.disable_progress_bar()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            model = Reasoner.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
            end_token = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eos_token
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} holds no exported reasoning model: {str(error).splitlines()[0]}") from error
        self.model = model.eval().to(self.device)
        # The projector was trained on float32 features.
        self.model.vision_tower.float()
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

    @torch.inference_mode()
    def explain(
        self, images: Mapping[str, bytes], words: Sequence[str], *, label: str | None = None, max_new_tokens: int = 128
    ) -> list[Explanation]:
        """Explain images in one batch; the same image always gets the same text.

        Args:
            images: encoded images by their locations.
            words: labels to choose from, which the prompt offers.
            label: label in place of the projector's choice.
            max_new_tokens: tokens of a text at most.

        Raises:
            ConfigError: there is neither a projector nor a label.
        """
        found: dict[str, Explanation] = {}
        readable: dict[str, Tensor] = {}
        for image, data in images.items():
            try:
                readable[image] = torch.from_numpy(read_pixels(data, self.spec.preprocessing).copy())
            except DataError as error:
                found[image] = Explanation(image, problem=str(error))
        if readable:
            pixels = torch.stack(list(readable.values())).to(self.device)
            pixel_values = normalise(pixels, self.spec.preprocessing).contiguous()
            scores = self._scores(pixel_values, words) if label is None else [{} for _ in readable]
            labels = [label if label is not None else next(iter(ranked)) for ranked in scores]
            texts = self._generate(pixel_values, words, labels, max_new_tokens)
            for image, said, text, ranked in zip(readable, labels, texts, scores, strict=True):
                found[image] = _explanation(image, said, text, ranked)
        return [found[image] for image in images]

    def _generate(
        self, pixel_values: Tensor, words: Sequence[str], labels: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """Return one text per image; prompts are padded on the left, so that all answers begin at one position."""
        config, end_id = self.model.config, self.tokenizer.end_id
        prompts = [
            encode_prompt(
                [("human", reasoning_question(words, label))],
                self.tokenizer,
                template=config.template,
                image_tokens=config.num_image_tokens,
                task="reasoning",
            )
            for label in labels
        ]
        length = max(map(len, prompts))
        input_ids = torch.tensor([[end_id] * (length - len(ids)) + ids for ids in prompts], device=self.device)
        is_prompt = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        generated = self.model.generate(
            input_ids=input_ids,
            attention_mask=is_prompt,
            pixel_values=pixel_values,
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
        answers = generated[:, length:].tolist()
        return [self.tokenizer.decode(ids[: (*ids, end_id).index(end_id)]).strip() for ids in answers]

    def _scores(self, pixel_values: Tensor, words: Sequence[str]) -> list[dict[str, float]]:
        if self.projector is None:
            raise ConfigError(
                "no label for the prompt: give a projector trained on features of this tower with --projector "
                "(`tinyemo features`, then `tinyemo train`), or the label itself with --label"
            )
        pooled = self.model.vision_tower(pixel_values).pooled.float().cpu()
        cosines = self.projector.eval().classify(pooled, tuple(words))
        return [dict(sorted(zip(words, row, strict=True), key=lambda pair: -pair[1])) for row in cosines.tolist()]


def _explanation(image: str, label: str, text: str, scores: dict[str, float]) -> Explanation:
    found = ANSWER.fullmatch(text)
    if found is None:
        return Explanation(image, label, text, None, text, scores)
    return Explanation(image, label, found["reasoning"], found["label"], text, scores)


def reasoning_question(words: Sequence[str], label: str) -> str:
    """Return the human turn in the form that models are trained on.

    Raises:
        ConfigError: the label is not among the words.
    """
    offered = list(dict.fromkeys(canonical_word(word) for word in words))
    if canonical_word(label) not in offered:
        raise ConfigError(f"--label {label!r} is not among the labels that the prompt offers: {', '.join(offered)}")
    return f"{IMAGE_TEXT}\n{REQUEST}\nLabels: [{', '.join(offered)}]\nThe correct label is {canonical_word(label)}."


@dataclass
class ExplainWorker:
    """Worker of a bulk run; it fetches the model to its own node.

    Attributes:
        model: what `find_export` found; a folder of this machine must be on every node.
        projector: chooses labels where `label` is None.
        words: labels to choose from.
        label: stated label.
        max_new_tokens: tokens of a text at most.
        batch_size: images explained together; None: by device.
    """

    model: str
    projector: MetricProjector | None
    words: tuple[str, ...]
    label: str | None
    max_new_tokens: int
    batch_size: int | None = None

    def __post_init__(self) -> None:
        self.explainer = Explainer(fetch_export(self.model, "model"), self.projector)

    def __call__(self, images: Sequence[str]) -> list[Row]:
        """Return one row per image: the fields of its explanation."""
        on_gpu = self.explainer.device.type == "cuda"
        size = self.batch_size or (GPU_BATCH_SIZE if on_gpu else CPU_BATCH_SIZE)
        rows: list[Row] = []
        for start in range(0, len(images), size):
            readable: dict[str, bytes] = {}
            problems: dict[str, str] = {}
            for image in images[start : start + size]:
                try:
                    readable[image] = read_image(image)
                except DataError as error:
                    problems[image] = str(error)
            explained = self.explainer.explain(
                readable, self.words, label=self.label, max_new_tokens=self.max_new_tokens
            )
            rows += [asdict(item) for item in explained]
            rows += [asdict(Explanation(image, problem=problem)) for image, problem in problems.items()]
        return rows
