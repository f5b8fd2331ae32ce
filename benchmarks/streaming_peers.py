"""One loader over the benchmark's records, in a process of its own: `python streaming_peers.py SYSTEM SETTINGS.json`.

Prints JSON: samples/s over the second half, and seconds from building the loader to its first batch. Every system
has two processes that decode, the same decoder, the same batch, images alone.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

sys.path.pop(0)  # this folder, whose streaming.py is not MosaicML's package
sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestration.services import storage
from tinyemo.images import decode_image

SIZE = 224
NUM_WORKERS = 2


def to_tensor(data: bytes) -> torch.Tensor:
    """(224, 224, 3) uint8."""
    return torch.from_numpy(decode_image(data, SIZE).copy())


class ParquetImages(IterableDataset[torch.Tensor]):
    """Row groups in a shuffled order, split over the loader's workers, rows shuffled in a buffer of row groups."""

    def __init__(self, uris: list[str], buffer_groups: int) -> None:
        self.uris, self.buffer_groups = uris, buffer_groups

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Decoded images."""
        import pyarrow.parquet as pq

        info = get_worker_info()
        files = [pq.ParquetFile(storage.filesystem().open_input_file(uri.removeprefix("s3://"))) for uri in self.uris]
        groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        rng = random.Random(0)
        rng.shuffle(groups)
        mine = groups[info.id :: info.num_workers] if info else groups
        for start in range(0, len(mine), self.buffer_groups):
            images: list[bytes] = []
            for file, group in mine[start : start + self.buffer_groups]:
                images += file.read_row_group(group, columns=["image"])["image"].to_pylist()
            rng.shuffle(images)
            yield from map(to_tensor, images)


def torch_dataloader(settings: dict[str, Any]) -> Any:
    """PyTorch's DataLoader over the same Parquet shards."""
    dataset = ParquetImages(settings["shards"], buffer_groups=8)
    return DataLoader(dataset, batch_size=settings["batch"], num_workers=NUM_WORKERS, prefetch_factor=4)


def webdataset(settings: dict[str, Any]) -> Any:
    """WebDataset over tar shards on the same S3, by presigned addresses through curl, as its users do."""
    import webdataset as wds

    urls = []
    for uri in settings["tars"]:
        bucket, key = storage.parse_s3_uri(uri)
        params = {"Bucket": bucket, "Key": key}
        url = storage.client().generate_presigned_url("get_object", Params=params, ExpiresIn=7200)
        urls.append(f"pipe:curl -s '{url}'")
    dataset = wds.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000).to_tuple("jpg").map_tuple(to_tensor)
    loader = wds.WebLoader(dataset.batched(settings["batch"]), batch_size=None, num_workers=NUM_WORKERS)
    return loader.map(lambda batch: batch[0]) if hasattr(loader, "map") else loader


def mosaicml_streaming(settings: dict[str, Any]) -> Any:
    """MosaicML Streaming over MDS shards on the same S3, with an empty local cache."""
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")  # it wants torchvision, which we do not use
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    from streaming import StreamingDataset

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> torch.Tensor:
            return to_tensor(super().__getitem__(at)["image"])

    local = tempfile.mkdtemp(prefix="mds-")
    dataset = Images(remote=settings["mds"], local=local, shuffle=True, batch_size=settings["batch"])
    return DataLoader(dataset, batch_size=settings["batch"], num_workers=NUM_WORKERS, prefetch_factor=4)


class MemoryImages(torch.utils.data.Dataset[torch.Tensor]):
    """Encoded images in memory."""

    def __init__(self, images: list[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        """Images."""
        return len(self.images)

    def __getitem__(self, at: int) -> torch.Tensor:
        """One, decoded."""
        return to_tensor(self.images[at])


def decode_alone(settings: dict[str, Any]) -> dict[str, float]:
    """Two processes that decode what lies in their memory; nothing is read, moved or collated."""
    import pyarrow.parquet as pq

    images: list[bytes] = []
    for uri in settings["shards"]:
        images += pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=["image"])["image"].to_pylist()
    context = torch.multiprocessing.get_context("fork")
    barrier = context.Barrier(NUM_WORKERS + 1)

    def decode(part: list[bytes]) -> None:
        barrier.wait()
        for image in part:
            decode_image(image, SIZE)
        barrier.wait()

    processes = [context.Process(target=decode, args=(images[i::NUM_WORKERS],)) for i in range(NUM_WORKERS)]
    for process in processes:
        process.start()
    barrier.wait()
    started_at = time.perf_counter()
    barrier.wait()
    return {"samples_per_s": len(images) / (time.perf_counter() - started_at), "first_batch_s": 0.0}


SYSTEMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "mosaicml-streaming": mosaicml_streaming,
    "webdataset": webdataset,
    "torch DataLoader": torch_dataloader,
}


def measure(build: Callable[[dict[str, Any]], Any], settings: dict[str, Any]) -> dict[str, float]:
    """Take every batch of `num_epochs` epochs; the rate is of the second half."""
    built_at = time.perf_counter()
    first_at = half_at = 0.0
    num_samples = num_before_half = checksum = 0
    half = settings["num_records"] * settings["num_epochs"] / 2
    loader = build(settings)
    for _epoch in range(settings["num_epochs"]):
        for batch in loader:
            first_at = first_at or time.perf_counter()
            if not half_at and num_samples >= half:
                half_at, num_before_half = time.perf_counter(), num_samples
            num_samples += len(batch)
            checksum += int(np.asarray(batch)[0, 0, 0, 0])
    seconds = time.perf_counter() - half_at
    return {
        "samples_per_s": (num_samples - num_before_half) / seconds,
        "first_batch_s": first_at - built_at,
        "num_samples": num_samples,
    }


if __name__ == "__main__":
    name, path = sys.argv[1:]
    found = json.loads(Path(path).read_text())
    print(json.dumps(decode_alone(found) if name == "decode alone" else measure(SYSTEMS[name], found)))
