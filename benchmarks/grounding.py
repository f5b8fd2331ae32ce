"""Does the caption model look at the photograph? `python benchmarks/grounding.py [--no-text-only] [key=value...]`.

Needs the platform (`tinyemo platform up`) and the flickr8k folder of the mirror. Makes the caption data set, trains
captions-photos and captions-text-only (finished runs are taken as they are; overrides must be those that they were
trained with) and measures on flickr8k's test split, read once:

- nats per answer token with the photograph's own image, with another's, without one, and of the text-only model; paired
  tests over photographs;
- the right caption among ten by likelihood, and by what the image adds to it;
- captions of the photographs whose own image helped most and least, as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import write_results
from cluster.environment import load_platform_environment
from examples.flickr8k_records import QUESTION, caption_records

NUM_CHOICES = 10
NUM_EXAMPLES = 3


def ingest_captions(folder: Path) -> None:
    """Put the captions into S3 as flickr8k-captions; nothing happens where the same version is there."""
    from orchestration.data.ingest import ingest_instruct

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "records.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in caption_records(folder, 2, 5))
        root = f"s3://{os.environ['TINYEMO_BUCKET']}/datasets"
        ingest_instruct(path, folder / "images", name="flickr8k-captions", root=root)


def train(name: str, overrides: list[str]) -> None:
    """Train a recipe, or return at once where its run is finished; overrides of stages that it lacks are left out."""
    from orchestration.recipe import load_recipe

    stages = load_recipe(name).stages
    kept = [text for text in overrides if not text.startswith("stages.") or text.split(".")[1] in stages]
    subprocess.run(
        [sys.executable, "-c", "from orchestration.cli import main; main()", "train", name,
         *(f"--set={text}" for text in kept)],
        check=True,
    )  # fmt: skip


def rows_of(name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a run's evaluation by record id."""
    from orchestration.jobs.paired import _rows_by_id

    return _rows_by_id(name, "s3://tinyemo/runs")


class CaptionScorer:
    """Nats of captions under the exported model, with an image's tokens before them or without."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        from tinyemo.reasoner.model import Reasoner

        self.model = Reasoner.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def image(self, data: bytes) -> torch.Tensor:
        """Return the tokens of an encoded image, (1, P, H)."""
        from tinyemo.images import read_pixels
        from tinyemo.vision import normalise

        preprocessing = self.model.config.encoder_spec.preprocessing
        pixels = torch.from_numpy(read_pixels(data, preprocessing).copy())[None]
        return self.model.image_embeds(normalise(pixels, preprocessing))

    @torch.no_grad()
    def nats(self, captions: list[str], image: torch.Tensor | None) -> np.ndarray[Any, Any]:
        """Return the mean nats per token of each caption, (N,)."""
        from tinyemo.conversation import IGNORED, IMAGE_TOKEN_ID, encode_conversation
        from tinyemo.packing import pack

        num_tokens = 0 if image is None else image.shape[1]
        encoded = [
            encode_conversation([("human", QUESTION), ("gpt", caption)], self.tokenizer, template="plain",
                                image_tokens=num_tokens, task="caption")
            for caption in captions
        ]  # fmt: skip
        packed = pack([(torch.tensor(one.input_ids), torch.tensor(one.labels)) for one in encoded])
        places = packed.input_ids == IMAGE_TOKEN_ID
        embeds = self.model.get_input_embeddings()(packed.input_ids.masked_fill(places, 0))
        if image is not None:
            embeds = embeds.masked_scatter(places[..., None], image.expand(len(captions), -1, -1))
        found = self.model(inputs_embeds=embeds, labels=packed.labels, position_ids=packed.position_ids).token_nats
        position_ids, labels = packed.position_ids[0], packed.labels[0]
        is_learned = (labels != IGNORED) & (position_ids != 0)
        owner = ((position_ids == 0).cumsum(0) - 1)[is_learned]
        sums = torch.zeros(len(captions)).index_add(0, owner, found)
        return np.asarray(sums / torch.bincount(owner, minlength=len(captions)))

    @torch.no_grad()
    def caption(self, image: torch.Tensor, max_new_tokens: int = 24) -> str:
        """Return the greedy caption of an image."""
        ids: list[int] = []
        for _ in range(max_new_tokens):
            embeds = self.model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
            logits = self.model(inputs_embeds=torch.cat([image, embeds], 1)).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == self.tokenizer.end_id:
                break
        return str(self.tokenizer.decode([one for one in ids if one != self.tokenizer.end_id])).strip()


def choose_captions(scorer: CaptionScorer, images: dict[str, bytes], captions: dict[str, str]) -> dict[str, Any]:
    """Return how often the right caption is the likeliest of ten, over all images."""
    names = sorted(images)
    alone = {name: float(scorer.nats([captions[name]], None)[0]) for name in names}
    rng = np.random.default_rng(0)
    hits = {"likelihood": 0, "likelihood_minus_without_image": 0}
    for place, name in enumerate(names):
        others = rng.choice([other for other in names if other != name], NUM_CHOICES - 1, replace=False)
        offered = [name, *others]
        nats = scorer.nats([captions[one] for one in offered], scorer.image(images[name]))
        hits["likelihood"] += int(nats.argmin() == 0)
        hits["likelihood_minus_without_image"] += int((nats - [alone[one] for one in offered]).argmin() == 0)
        if place % 100 == 99:
            print(f"caption choice: {place + 1} of {len(names)}", flush=True)
    return {way: count / len(names) for way, count in hits.items()} | {"num_images": len(names), "chance": 0.1}


def grounding(rows: dict[str, dict[str, Any]], text_only: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """Return the losses under each condition and paired tests over photographs."""
    from orchestration.jobs.paired import mean_by_group, paired_test

    ids = sorted(rows)
    images = [rows[one]["image"] for one in ids]
    losses = {name: [rows[one][key] for one in ids]
              for name, key in (("own", "right"), ("other", "shuffled"), ("no_image", "text_only"))}  # fmt: skip
    if text_only is not None:
        losses["text_only_model"] = [text_only[one]["text_only"] for one in ids]
    by_image = {name: mean_by_group(np.array(values), images) for name, values in losses.items()}
    found: dict[str, Any] = {"nats_per_token": {name: float(np.mean(values)) for name, values in by_image.items()}}
    found["tests_over_images"] = {
        name: asdict(paired_test(by_image["own"], values)) for name, values in by_image.items() if name != "own"
    }
    return found | {"num_records": len(ids), "num_images": len(set(images))}


def main() -> None:
    """Make, train, measure, print and write benchmarks/results/grounding.json."""
    load_platform_environment()
    from orchestration.assets.models import tokenizer_source
    from orchestration.services import storage
    from orchestration.use.locations import fetch_export
    from tinyemo.chat_tokenizer import ChatTokenizer
    from tinyemo.tokenizer_files import open_tokenizer

    overrides, folder = sys.argv[1:], Path(os.environ["TINYEMO_MIRROR"]) / "flickr8k"
    if not storage.exists("s3://tinyemo/datasets/flickr8k-captions/latest.json"):
        ingest_captions(folder)
    has_text_only = "--no-text-only" not in overrides
    overrides = [text for text in overrides if not text.startswith("--")]
    for name in ("captions-photos", *(["captions-text-only"] if has_text_only else [])):
        train(name, overrides)
    rows = rows_of("captions-photos")
    found = grounding(rows, rows_of("captions-text-only") if has_text_only else None)
    records = {record["id"]: record for record in caption_records(folder, 2, 0) if record["split"] == "test"}
    captions = {record["image"]: record["conversations"][1]["value"] for one, record in records.items() if "/0/" in one}
    images = {name: (folder / "images" / name).read_bytes() for name in captions}
    tokenizer = ChatTokenizer(open_tokenizer(tokenizer_source("smollm2-135m")), "<|im_end|>")
    scorer = CaptionScorer(fetch_export("captions-photos", "model"), tokenizer)
    gains = {one: rows[one]["shuffled"] - rows[one]["right"] for one in records if "/0/" in one}
    order = sorted(gains, key=lambda one: gains[one])
    found["examples"] = {
        way: [
            {"image": records[one]["image"], "human": records[one]["conversations"][1]["value"],
             "model": scorer.caption(scorer.image(images[records[one]["image"]])),
             "own_below_other_nats": round(gains[one], 3)}
            for one in chosen
        ]
        for way, chosen in (("worked", order[::-1][:NUM_EXAMPLES]), ("did_not", order[:NUM_EXAMPLES]))
    }  # fmt: skip
    found["caption_choice"] = choose_captions(scorer, images, captions)
    nats = found["nats_per_token"]
    summary = {
        "own_below_other_nats": nats["other"] - nats["own"],
        "own_below_text_only_nats": nats["text_only_model"] - nats["own"] if has_text_only else None,
        "caption_choice_of_10": found["caption_choice"]["likelihood_minus_without_image"],
    }
    note = "flickr8k test split, 500 photographs x 2 captions; SmolLM2-135M, EfficientNet-Lite0, 16 tokens an image"
    figures = summary | found | {"note": note, "overrides": overrides}
    print(json.dumps(figures, indent=1))
    print("written", write_results("grounding", figures))


if __name__ == "__main__":
    main()
