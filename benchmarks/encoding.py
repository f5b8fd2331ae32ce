"""Images per second of EfficientNet-Lite0 on one CPU thread: plain network in batches of 32 against `VisionEncoder`.

    python benchmarks/encoding.py [--images 96] [--repeats 5]

Reads photographs of the asset `oasis`. Writes benchmarks/results/encoding.json: medians over the repeats, which
alternate between the two, and the largest difference between their features.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from machine import write_results

from orchestration.assets.catalogue import get_asset
from tinyemo.encoder_folders import describe_encoder
from tinyemo.encoders import EFFICIENTNET_LITE0
from tinyemo.images import read_pixels
from tinyemo.vision import Features, load_encoder, load_network, run_network

PLAIN_BATCH_SIZE = 32


def main() -> None:
    """Measure, print and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = get_asset(EFFICIENTNET_LITE0)
    spec = describe_encoder(folder, name=EFFICIENTNET_LITE0)
    files = sorted((get_asset("oasis") / "images").iterdir())[: options.images]
    pixels = torch.from_numpy(np.stack([read_pixels(path.read_bytes(), spec.preprocessing) for path in files]))
    network = load_network(folder, spec).eval()
    mean, std = torch.tensor(spec.preprocessing.mean), torch.tensor(spec.preprocessing.std)

    @torch.inference_mode()
    def encode_plainly() -> Features:
        batches = []
        for batch in pixels.split(PLAIN_BATCH_SIZE):
            values = ((batch.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
            batches.append(run_network(spec.kind, network, values))
        return Features(torch.cat([b.pooled for b in batches]), torch.cat([b.patches for b in batches]))

    encoder = load_encoder(folder, spec)
    plain, fast = encode_plainly(), encoder.encode(pixels)  # warms both up
    rates: dict[str, list[float]] = {"plain": [], "encoder": []}
    for _ in range(options.repeats):
        for name, encode in (("plain", encode_plainly), ("encoder", lambda: encoder.encode(pixels))):
            started = time.perf_counter()
            encode()
            rates[name].append(len(pixels) / (time.perf_counter() - started))
    before, after = (statistics.median(rates[name]) for name in ("plain", "encoder"))
    figures = {
        "num_images": len(pixels),
        "num_threads": 1,
        "plain_batch_size": PLAIN_BATCH_SIZE,
        "measured_batch_size": encoder.batch_size,
        "plain_images_per_s": round(before, 1),
        "encoder_images_per_s": round(after, 1),
        "speedup": round(after / before, 2),
        "all_images_per_s": {name: [round(rate, 1) for rate in values] for name, values in rates.items()},
        "max_difference_pooled": float((plain.pooled - fast.pooled).abs().max()),
        "max_difference_patches": float((plain.patches - fast.patches).abs().max()),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(write_results("encoding", {"efficientnet_lite0": figures}))


if __name__ == "__main__":
    main()
