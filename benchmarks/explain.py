"""Images per second of `tinyemo explain`: 200 photographs one by one and in batches, with the 135M model.

    python benchmarks/explain.py [--images 200] [--max-new-tokens 32] [--batch-sizes 4 16]

The model is SmolLM2-135M with EfficientNet-Lite0 and an untrained connector, so every text has all its tokens; the
label is given. Writes benchmarks/results/explain.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from machine import write_results
from transformers import PreTrainedTokenizerFast

from orchestration.assets.catalogue import get_asset
from orchestration.use.explain import Explainer
from tinyemo.encoders import EFFICIENTNET_LITE0
from tinyemo.reasoner.loading import build_reasoner
from tinyemo.taxonomies import TAXONOMIES
from tinyemo.tokenizer_files import open_tokenizer

END_TOKEN = "<|im_end|>"


def export_untrained(folder: Path) -> None:
    """Write the model that no stage has trained as `tinyemo train` exports one."""
    (gguf,) = get_asset("smollm2-135m").glob("*.gguf")
    model = build_reasoner(gguf, get_asset(EFFICIENTNET_LITE0), template="chatml", vision_name=EFFICIENTNET_LITE0)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=open_tokenizer(gguf), eos_token=END_TOKEN)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Measure, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    options = parser.parse_args()
    files = sorted((get_asset("oasis") / "images").iterdir())[: options.images]
    images = {path.name: path.read_bytes() for path in files}
    with tempfile.TemporaryDirectory(prefix="tinyemo-explain-") as name:
        export_untrained(Path(name))
        explainer = Explainer(Path(name))
    words = TAXONOMIES["mikels"].words
    texts: dict[int, list[str]] = {}
    rates: dict[int, float] = {}
    for batch_size in (1, *options.batch_sizes):
        started = time.perf_counter()
        texts[batch_size] = []
        for start in range(0, len(files), batch_size):
            batch = {path.name: images[path.name] for path in files[start : start + batch_size]}
            explained = explainer.explain(batch, words, label="awe", max_new_tokens=options.max_new_tokens)
            texts[batch_size] += [item.text for item in explained]
        rates[batch_size] = len(files) / (time.perf_counter() - started)
        print(f"batch size {batch_size}: {rates[batch_size]:.2f} images/s", flush=True)
    figures = {
        "num_images": len(files),
        "max_new_tokens": options.max_new_tokens,
        "device": str(explainer.device),
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "images_per_s": {str(size): round(rate, 3) for size, rate in rates.items()},
        "speedup": round(max(rates.values()) / rates[1], 2),
        "texts_equal_to_one_by_one": {
            str(size): sum(map(str.__eq__, texts[1], texts[size])) for size in options.batch_sizes
        },
    }
    print(write_results("explain", {"smollm2_135m": figures}))


if __name__ == "__main__":
    main()
