"""Both stages on the session's platform with a small language model: what a run leaves, and what survives a kill."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from feature_files import MIRROR
from job_runner import Jobs
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from orchestration.data.stream import Stream
from orchestration.jobs.reasoning_plan import prepare_reasoning
from orchestration.jobs.stage_weights import build_for_stage
from orchestration.jobs.steps import Inputs, losses_by_record
from orchestration.recipe import load_recipe
from orchestration.services import storage, tracking
from tinyemo.errors import ConfigError
from tinyemo.reasoner.model import Reasoner
from tinyemo.reasoner.trained import parameter_groups

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WORDS = ("fear", "joy", "sadness")
NUM_RECORDS = {"train": 96, "validation": 12, "test": 18}
SIZE = "tinyemo-700m"
RUN = f"moods-{SIZE}"
STAGES = """
[reasoner]
llm = "{llm}"
[records]
datasets = ["s3://tinyemo/datasets/moods"]
template = "chatml"
num_readers = 1
[engine]
zero_stage = 2
precision = "fp32"
[checkpoint]
every_steps = 4
[stages.pretrain]
template = "plain"
global_batch_size = 8
micro_batch_size = 2
learning_rate = 5e-3
[stages.finetune]
trains = "lora"
lora = {{ rank = 4, alpha = 8, dropout = 0.1 }}
global_batch_size = 8
micro_batch_size = 2
learning_rate = 5e-3
"""


def mood(number: int, split: str) -> dict[str, Any]:
    """A record in the published form, over a picture that no other split has."""
    word = WORDS[number % 3]
    question = f"<image>\nWhy?\nLabels: [{', '.join(WORDS)}]\nThe correct label is {word}."
    answer = f"Reasoning: It is plain.\nPredicted Label: {word}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    name = f"{split}-{number}"
    return {"id": f"moods/{name}/reasoning", "image": f"{name}.png", "conversations": turns, "split": split,
            "task": "reasoning", "label": word}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(jobs: Jobs) -> Path:
    """A recipe over a data set in S3 and a language model of 3 million numbers that was never trained."""
    images, records = jobs.folder / "moods", []
    images.mkdir()
    rng = np.random.default_rng(0)
    for split, count in NUM_RECORDS.items():
        for number in range(count):
            records.append(mood(number, split))
            blocks = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            blocks.resize((64, 64), Image.Resampling.NEAREST).save(images / f"{split}-{number}.png")
    path = jobs.folder / "moods.json"
    path.write_text(json.dumps(records))
    arguments = ("--records", path, "--images", images, "--name", "moods", "--json")
    outcome = jobs.run("ingest", "instruct", *arguments)
    assert outcome.code == 0, outcome.stderr
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, tinyemo_weights="random",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(jobs.folder / "llm")
    text = STAGES.format(llm=jobs.folder / "llm")
    return jobs.recipe("moods", f'{text}[family]\nsizes = ["{SIZE}"]\n')


@pytest.fixture(scope="module")
def mirror(jobs: Jobs, recipe: Path) -> Path:
    """A mirror in which that language model stands for a size of the family, beside what the real one holds."""
    folder = jobs.folder / "mirror"
    (folder / "llms").mkdir(parents=True)
    (folder / "llms" / SIZE).symlink_to(jobs.folder / "llm")
    for path in MIRROR.iterdir() if MIRROR.is_dir() else ():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def finished(jobs: Jobs, recipe: Path, mirror: Path) -> dict[str, Any]:
    """What a run said that went through, a rank of which was killed in mid-epoch of its first stage."""
    command = jobs.start("family", recipe, "--json", TINYEMO_MIRROR=str(mirror))
    jobs.wait_for_step(RUN, 4, command, "pretrain")
    jobs.train_workers()[0].kill()
    outcome = command.wait(900)
    assert outcome.stderr.count("attempt failed") == 1, outcome.stderr
    whole: dict[str, Any]
    (whole,) = outcome.document
    return whole


def plain_losses(jobs: Jobs, recipe: Path) -> list[float]:
    """Of the first stage, by one process with torch's own optimizer: no Ray, no DeepSpeed, no checkpoint."""
    with jobs.connected():
        chosen = load_recipe(str(recipe), ["workers.num_workers=1"])
        plan = prepare_reasoning(chosen).stages["pretrain"]
        batches = list(plan.batches(Read(plan), rank=0))
    model, stage = build_for_stage(chosen, "pretrain", {}), chosen.stages["pretrain"]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, learning_rate=stage.learning_rate), weight_decay=stage.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: stage.rate_factor(step, plan.num_steps))
    inputs = Inputs(model.config.encoder_spec.preprocessing, torch.device("cpu"), model.config.image_token_id)
    losses = []
    for batch in batches:
        loss = inputs.micro_batch(batch).forward(model).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


class Read:
    """Hands the rows of rank 0 to a stream as Ray Data does, read in this process."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        for window in self.stream.plan.windows():
            yield from (pa.Table.from_pylist([row]) for row in self.stream.read(window) if row["rank"] == 0)


def test_a_run_that_lost_a_rank_has_the_losses_of_a_plain_loop(
    jobs: Jobs, recipe: Path, finished: dict[str, Any]
) -> None:
    """An engine's tests restart adapters with dropout, at every stage of ZeRO, bit for bit."""
    found, expected = list(jobs.curve(RUN, "pretrain").values()), plain_losses(jobs, recipe)
    assert len(found) == len(jobs.curve(RUN, "finetune")) == NUM_RECORDS["train"] // 8
    worst = max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))
    print(f"worst difference of {len(expected)} losses: {worst}")
    assert worst <= 1e-5
    assert max(expected) - min(expected) > 0.1


def test_stages_learn_one_after_the_other(jobs: Jobs, finished: dict[str, Any]) -> None:
    pretrain, finetune = (finished["stages"][name] for name in ("pretrain", "finetune"))
    assert pretrain["last_loss"] < pretrain["first_loss"]
    assert finetune["val_loss"] < pretrain["val_loss"]
    assert finished["llm_weights"] == "random"
    with jobs.connected():
        trained = jobs.folder / "trained.safetensors"
        storage.download_file(f"{finetune['checkpoint']}/trained.safetensors", trained)
    names = set(load_file(trained))
    assert {name.split(".")[0] for name in names} == {"connector", "language_model"}
    assert all("lora_" in name for name in names if name.startswith("language_model"))


def test_the_evaluation_counts_every_test_record_once(jobs: Jobs, finished: dict[str, Any]) -> None:
    evaluation = finished["evaluation"]
    assert evaluation["num_records"] == NUM_RECORDS["test"]
    assert set(evaluation["loss"]) == {"right", "shuffled", "text_only"}
    assert evaluation["tests"]["shuffled"]["num_pairs"] == NUM_RECORDS["test"]


def test_mlflow_shows_a_child_for_each_stage_and_where_it_came_from(jobs: Jobs, finished: dict[str, Any]) -> None:
    (parent,) = jobs.mlflow_runs(RUN)
    (pretrain,), (finetune,) = (jobs.mlflow_runs(f"{RUN}-{name}") for name in ("pretrain", "finetune"))
    assert {run.info.status for run in (parent, pretrain, finetune)} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in (pretrain, finetune)} == {parent.info.run_id}
    assert finetune.data.tags["starts_from.run_id"] == pretrain.info.run_id
    assert finetune.data.tags["starts_from.checkpoint"] == finished["stages"]["pretrain"]["checkpoint"]
    assert parent.data.tags["llm.revision"].startswith("sha256-")
    assert parent.data.metrics["test/loss_right"] == finished["evaluation"]["loss"]["right"]
    for key in ("train/loss", "train/learning_rate", "train/tokens_per_s", "train/wait_share", "val/loss"):
        assert key in finetune.data.metrics, key


def test_a_family_says_what_each_size_would_read(jobs: Jobs, recipe: Path, mirror: Path) -> None:
    override = f'family.overrides={{{SIZE} = ["stages.pretrain.num_steps=5"]}}'
    arguments = ("family", recipe, "--set", "name=planned", "--set", override, "--dry-run", "--json")
    (planned,) = jobs.run(*arguments, TINYEMO_MIRROR=str(mirror)).document
    assert planned["name"] == f"planned-{SIZE}"
    assert planned["optimizer_steps"] == {"pretrain": 5, "finetune": NUM_RECORDS["train"] // 8}
    assert planned["recipe"]["reasoner"]["llm"] == str(mirror / "llms" / SIZE)


def test_mlflow_shows_the_sizes_of_a_family_side_by_side(jobs: Jobs, finished: dict[str, Any], tmp_path: Path) -> None:
    (family,) = jobs.mlflow_runs("moods")
    (child,) = jobs.mlflow_runs(RUN)
    assert family.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == family.info.run_id
    with jobs.connected():
        folder = tracking.download_artifacts(f"runs:/{family.info.run_id}/", tmp_path)
    (row,) = json.loads((folder / "sizes.json").read_text())
    assert row["size"] == SIZE
    for stage in ("pretrain", "finetune"):
        assert (folder / "plots" / f"sizes-{stage}.png").read_bytes().startswith(b"\x89PNG")
        curve = row["loss_against_tokens"][stage]
        assert [loss for _, loss in curve] == list(jobs.curve(RUN, stage).values())
        assert curve[-1][0] == family.data.metrics[f"{SIZE}/{stage}/tokens"]
        for figure in ("tokens_per_s", "peak_memory_bytes", "model_flops_per_s"):
            assert family.data.metrics[f"{SIZE}/{stage}/{figure}"] > 0


@pytest.fixture(scope="module")
def folder(jobs: Jobs, finished: dict[str, Any]) -> Path:
    """The exported model."""
    path = jobs.folder / "export"
    with jobs.connected():
        storage.download_folder(finished["model"], path)
    return path


@torch.no_grad()
def test_the_export_with_merged_adapters_has_the_loss_that_the_engine_had(
    jobs: Jobs, recipe: Path, finished: dict[str, Any], folder: Path
) -> None:
    model = Reasoner.from_pretrained(folder).eval()
    inputs = Inputs(model.config.encoder_spec.preprocessing, torch.device("cpu"), model.config.image_token_id)
    with jobs.connected():
        loaded = load_recipe(str(recipe))
        plan = prepare_reasoning(loaded).validation
        assert plan is not None
        alone = replace(plan, world_size=1)
        batches = list(alone.batches(Read(alone), rank=0))
    rows = []
    for batch in batches:
        whole = inputs.micro_batch(batch.part(slice(0, int(batch.is_real.sum()))))
        rows += losses_by_record(whole, whole.forward(model))
    num_tokens = sum(count for count, _ in rows)
    loss = sum(nats for _, nats in rows) / num_tokens
    assert loss == pytest.approx(finished["stages"]["finetune"]["val_loss"], abs=1e-4)


def test_the_export_explains_an_image(jobs: Jobs, finished: dict[str, Any], folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "language model's weights are random" in card
    assert f"| {finished['evaluation']['loss']['right']:.4f} |" in card
    image = jobs.folder / "moods" / "test-1.png"
    arguments = (image, "--model", folder, "--labels", ",".join(WORDS), "--label", "joy", "--json")
    (said,) = jobs.run("explain", *arguments).document["images"]
    assert (said["label"], said["scores"]) == ("joy", {})
    assert "joy" in jobs.run("explain", *arguments[:-1]).stdout
    many = jobs.run("explain", jobs.folder / "moods", "--model", RUN, *arguments[3:], "--max-new-tokens", "1")
    assert len(many.document["images"]) == sum(NUM_RECORDS.values())


def test_the_same_command_shows_the_result_and_another_recipe_is_refused(
    jobs: Jobs, recipe: Path, mirror: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    assert jobs.run("family", recipe, "--json", TINYEMO_MIRROR=str(mirror)).document == [finished]
    with jobs.connected():
        (run,) = jobs.mlflow_runs(RUN)
        child = tracking.download_artifacts(f"runs:/{run.info.run_id}/recipe.toml", tmp_path)
    refused = jobs.run("train", child, "--set", "stages.finetune.learning_rate=1e-3")
    assert "stages.finetune.learning_rate 0.005 -> 0.001" in refused.error


def test_what_is_wrong_with_the_data_is_one_line(jobs: Jobs, recipe: Path) -> None:
    missing = jobs.run("train", recipe, "--set", "name=x", "--set", 'records.datasets=["s3://tinyemo/datasets/none"]')
    assert "stages.pretrain: " in missing.error
    assert "stages.finetune: " in missing.error
    with jobs.connected():
        for override, said in (
            ("records.datasets=[]", "names no data set"),
            (
                "reasoner.llm=random:tinyemo-700m",
                "smollm2-135m has 49152 tokens and reasoner.llm random:tinyemo-700m embeddings for 32000",
            ),
        ):
            chosen = load_recipe(str(recipe), ["name=x", override])
            with pytest.raises(ConfigError, match=re.escape(said)):
                prepare_reasoning(chosen)
    neither = jobs.run("explain", recipe, "--model", jobs.folder)
    assert "--projector or --label" in neither.error
