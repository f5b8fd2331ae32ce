"""The prompt of an explanation is the trained form, and what cannot be explained is said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_reasoners import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestration.data.oasis import OasisRules, Photograph, build_records
from orchestration.use.explain import ANSWER, REQUEST, Explainer, reasoning_question
from orchestration.use.locations import weight_cautions
from tinyemo.config import ProjectorConfig
from tinyemo.encoders import EncoderInfo, card_entries
from tinyemo.errors import ConfigError, DataError
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.projector import MetricProjector
from tinyemo.reasoner.config import ReasonerConfig
from tinyemo.reasoner.model import Reasoner

WORDS = ("joy", "fear", "sadness")


def picture(colour: tuple[int, int, int] = (200, 30, 90)) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((40, 50, 3), colour, dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, never trained, over a vocabulary of bytes."""
    path = tmp_path_factory.mktemp("export")
    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    config = tiny_config(tower="efficientnet-lite0").to_dict()
    config["text_config"]["vocab_size"] = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    model = Reasoner(ReasonerConfig(**{**config, "template": "chatml"}))
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(path)
    return path


def projector(info: EncoderInfo, width: int) -> MetricProjector:
    torch.manual_seed(1)
    model = MetricProjector(ProjectorConfig(encoder_width=width, hidden_size=576))
    model.labels = LabelEmbeddings(WORDS, torch.randn(3, 576), "tiny", "0", "random", "word")
    model.card = dict(card_entries(info))
    return model


def test_the_prompt_and_the_answer_are_those_that_oasis_trains_on() -> None:
    """Every reasoning record with our request is what the prompt would be, and each answer is taken apart again."""
    photographs = [
        Photograph(f"{theme} {n}.jpg", theme, "Animal", valence, arousal)
        for n in range(40)
        for theme, valence, arousal in (("Dog", 6.2, 5.0), ("Snake", 2.5, 5.1), ("Ruin", 2.0, 2.2), ("Lake", 6.0, 2.0))
    ]
    reasoning = [record for record in build_records(photographs, OasisRules()) if record["task"] == "reasoning"]
    assert len(reasoning) == len(photographs)
    asked = 0
    for record in reasoning:
        question, answer = (turn["value"] for turn in record["conversations"])
        found = ANSWER.fullmatch(answer)
        assert found is not None
        assert found["label"] == record["label"]
        assert answer == f"Reasoning: {found['reasoning']}\nPredicted Label: {found['label']}"
        if REQUEST in question:
            asked += 1
            offered = question.split("[")[1].split("]")[0].split(", ")
            assert question == reasoning_question(offered, record["label"])
    assert asked > 20


def test_a_label_that_is_not_offered_is_refused() -> None:
    with pytest.raises(ConfigError, match="'awe' is not among the labels"):
        reasoning_question(WORDS, "awe")


def test_the_projector_chooses_the_label_that_the_prompt_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_config(tower="efficientnet-lite0").encoder_spec
    chooser = projector(spec.info, spec.feature_width)
    explainer = Explainer(folder, chooser)
    seen: dict[str, Any] = {}
    generate = explainer.model.generate

    def watch(**arguments: Any) -> torch.Tensor:
        seen.update(arguments)
        generated: torch.Tensor = generate(**arguments)
        return generated

    monkeypatch.setattr(explainer.model, "generate", watch)
    (said,) = explainer.explain({"a.png": picture()}, WORDS, max_new_tokens=5)
    pooled = explainer.model.vision_tower(seen["pixel_values"]).pooled
    cosines = chooser.classify(pooled, WORDS)[0]
    assert said.scores == dict(sorted(zip(WORDS, cosines.tolist(), strict=True), key=lambda pair: -pair[1]))
    assert said.label == WORDS[int(cosines.argmax())]
    ids = [token for token in seen["input_ids"][0].tolist() if token >= 0]
    assert f"The correct label is {said.label}." in explainer.tokenizer.decode(ids)
    assert explainer.explain({"a.png": picture()}, WORDS, max_new_tokens=5) == [said]


def test_a_batch_says_what_each_image_alone_does(folder: Path) -> None:
    """Prompts of different lengths are padded on the left, and an unreadable image takes nothing from the others."""
    spec = tiny_config(tower="efficientnet-lite0").encoder_spec
    explainer = Explainer(folder, projector(spec.info, spec.feature_width))
    colours = [(200, 30, 90), (10, 200, 30), (0, 0, 0), (255, 255, 255), (20, 20, 240)]
    images = {f"{number}.png": picture(colour) for number, colour in enumerate(colours)}
    alone = [explainer.explain({name: data}, WORDS, max_new_tokens=12)[0] for name, data in images.items()]
    together = explainer.explain({**images, "torn.png": picture()[:50]}, WORDS, max_new_tokens=12)
    assert together[-1].problem is not None
    assert "no image that can be read" in together[-1].problem
    for one, other in zip(alone, together[:-1], strict=True):
        assert (one.image, one.label, one.text) == (other.image, other.label, other.text)
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    labels = ["joy", "fear", "sadness"]
    pixels = torch.zeros(3, 3, 224, 224)
    texts = explainer._generate(pixels, WORDS, labels, 12)
    assert texts == [explainer._generate(pixels[:1], WORDS, [label], 12)[0] for label in labels]


def test_a_device_explains_as_the_cpu_does(folder: Path, device: str) -> None:
    """Labels are chosen in float32 everywhere; texts are written in bf16 on a GPU, and are the same each time."""
    spec = tiny_config(tower="efficientnet-lite0").encoder_spec
    chooser = projector(spec.info, spec.feature_width)
    images = {f"{number}.png": picture((90 * number, 200, 30)) for number in range(3)}
    expected = Explainer(folder, chooser, "cpu").explain(images, WORDS, max_new_tokens=6)
    explainer = Explainer(folder, chooser)
    assert explainer.device.type == device
    found = explainer.explain(images, WORDS, max_new_tokens=6)
    assert explainer.explain(images, WORDS, max_new_tokens=6) == found
    assert [one.label for one in found] == [one.label for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5 if device == "cpu" else 1e-2)
    if device == "cpu":
        assert found == expected


def test_a_projector_of_another_tower_is_refused(folder: Path) -> None:
    spec = tiny_config(tower="efficientnet-lite0").encoder_spec
    other = spec.info.model_copy(update={"revision": "1"})
    with pytest.raises(DataError, match="revision random is not 1"):
        Explainer(folder, projector(other, spec.feature_width))
    with pytest.raises(DataError, match="takes 768 numbers"):
        Explainer(folder, projector(spec.info, 768))


def test_what_is_missing_is_said(folder: Path, tmp_path: Path) -> None:
    explainer = Explainer(folder)
    with pytest.raises(ConfigError, match="--label"):
        explainer.explain({"a.png": picture()}, WORDS)
    (torn,) = explainer.explain({"a.png": b"no image"}, WORDS, label="joy")
    assert torn.problem is not None
    assert "8 bytes are no image" in torn.problem
    with pytest.raises(DataError, match="no exported reasoning model"):
        Explainer(tmp_path)


def test_weights_that_were_never_trained_are_named(folder: Path, tmp_path: Path) -> None:
    assert weight_cautions(str(folder)) == [
        "RANDOM WEIGHTS: the language model was never trained, its texts mean nothing.",
        "RANDOM WEIGHTS: the vision tower was never trained, its texts mean nothing.",
    ]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "llm_weights": "real", "vision_weights": "real"}))
    assert weight_cautions(str(tmp_path)) == []
