"""A model of text alone, and how two runs are held against each other."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from tiny_reasoners import IMAGE, VOCABULARY, tiny_reasoner

from orchestration.data.batch import Batch
from orchestration.jobs.checkpoints import StageState
from orchestration.jobs.evaluation import measure_records, summarise
from orchestration.jobs.paired import compare_runs
from orchestration.jobs.results import evaluation_lines
from orchestration.jobs.stage_weights import prepare_stage
from orchestration.jobs.steps import Inputs
from orchestration.recipe import parse_recipe
from orchestration.recipe.sections import StageConfig
from orchestration.services import storage
from tinyemo.errors import ConfigError, DataError, TrainingError


def batch(seed: int) -> Batch:
    """Four records of one image each."""
    rng = np.random.default_rng(seed)
    tokens = []
    for _ in range(4):
        text = rng.integers(3, VOCABULARY, 9)
        labels = torch.tensor([-100] * 9 + list(text[4:]))
        tokens.append((torch.tensor([1, *[IMAGE] * 4, *text]), labels))
    pixels = torch.from_numpy(rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    ids, is_real = [f"r{place}" for place in range(4)], torch.ones(4, dtype=torch.bool)
    return Batch(0, 0, ids, is_real, pixel_values=pixels, other_pixel_values=pixels.flip(0), tokens=tokens)


def test_a_stage_without_images_sees_none_and_trains_no_connector() -> None:
    stage = StageConfig.model_validate({"trains": "lora", "images": False, "lora": {"rank": 2, "alpha": 4}})
    model = prepare_stage(tiny_reasoner(), stage, 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    inputs = Inputs(model.config.encoder_spec.preprocessing, torch.device("cpu"), IMAGE, has_images=False)
    (whole,) = inputs.micro_batches(batch(0), 4)
    assert whole.pixel_values is None
    assert IMAGE not in whole.input_ids
    assert whole.work.images == 0
    assert whole.forward(model).shape == (whole.work.answer_tokens,)


def test_it_is_measured_without_images_alone() -> None:
    model = tiny_reasoner()
    alone = list(measure_records(model, iter([batch(0), batch(1)]), ("text_only",), micro_batch_size=3))
    whole = list(measure_records(model, iter([batch(0), batch(1)]), micro_batch_size=3))
    assert set(alone[0]) == {"id", "image", "num_answer_tokens", "text_only"}
    for one, other in zip(alone, whole, strict=True):
        assert one == {key: other[key] for key in one}
    found = summarise(alone)
    assert (found.loss.keys(), found.tests) == ({"text_only"}, {})
    assert "It was trained on text alone, without images." in evaluation_lines(asdict(found))
    assert "| own image | another record's image | no image, no image tokens |" in evaluation_lines(
        asdict(summarise(whole))
    )


def test_a_connector_cannot_be_trained_without_images() -> None:
    content = {"name": "x", "stages": {"pretrain": {"trains": "connector", "images": False}}}
    with pytest.raises(ConfigError, match=r"stages\.pretrain\.images: false leaves the connector"):
        parse_recipe(content, source="test")


def store(root: str, name: str, rows: list[dict[str, Any]], *, is_final: bool = True) -> None:
    folder = f"{root}/{name}/evaluation"
    storage.write_json(f"{folder}/checkpoint/rows.json", rows)
    storage.write_json(f"{folder}/latest.json", asdict(StageState(folder, f"{folder}/checkpoint", 1, is_final, {})))


def test_runs_are_compared_record_by_record(s3_root: str) -> None:
    losses = {"a": (1.0, 1.5), "b": (2.0, 2.1), "c": (3.0, 2.8)}
    right = [{"id": name, "image": "i" if name < "c" else "j", "right": one, "shuffled": 9.0, "text_only": 9.0}
             for name, (one, _) in losses.items()]  # fmt: skip
    text = [{"id": name, "image": "?", "text_only": other} for name, (_, other) in reversed(losses.items())]
    store(s3_root, "ours", right)
    store(s3_root, "base", text)
    found = compare_runs("ours", "base", s3_root)
    assert found.conditions == ("right", "text_only")
    assert found.over_records.mean_difference == pytest.approx((0.5 + 0.1 - 0.2) / 3)
    assert found.over_records.share_lower == pytest.approx(2 / 3)
    assert (found.over_images.num_pairs, found.over_images.share_lower) == (2, 0.5)
    store(s3_root, "less", text[:2])
    with pytest.raises(DataError, match="ours was evaluated on 3 records and less on 2, 2 of them the same"):
        compare_runs("ours", "less", s3_root)
    store(s3_root, "early", text, is_final=False)
    for name in ("early", "none"):
        with pytest.raises(TrainingError, match=f"{name} has no evaluation"):
            compare_runs("ours", name, s3_root)
