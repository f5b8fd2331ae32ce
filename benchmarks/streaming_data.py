"""The records and rows of the streaming benchmark, real ones where they can be."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

COPIES = 48
LARGE_PIXELS, LARGE_QUALITY = 900, 92
BATCH = 64
RECORDS_PER_FILE = 1024
FEATURE_WIDTH = 512
ONCE_PREFIX = "once"


def write_records(folder: Path, images: list[Path], num_records: int, prefix: str = "r") -> Path:
    """LLaVA records over the images, one caption each, as JSON Lines."""
    path = folder / "records.jsonl"
    with path.open("w") as file:
        for number in range(num_records):
            image = images[number % len(images)]
            turns = [
                {"from": "human", "value": "<image>\nDescribe the image."},
                {"from": "gpt", "value": f"{image.stem.rsplit('_', 1)[0].replace('_', ' ')}."},
            ]
            file.write(json.dumps({"id": f"{prefix}{number:07d}", "image": image.name, "conversations": turns}) + "\n")
    return path


def photographs(size: str, folder: Path) -> tuple[list[Path], int]:
    """Return the photographs of a size, and how often each is entered: some hundred megabytes in all.

    fi has about 10 kB a photograph, flickr8k about 18 kB; `large` is flickr8k scaled up, written to `folder`.
    """
    from PIL import Image

    from orchestration.assets.catalogue import get_asset

    if size == "oasis":
        return sorted((get_asset("oasis") / "images").glob("*.jpg")), COPIES
    data = Path(os.environ["TINYEMO_MIRROR"])
    if size == "fi":
        return sorted((data / "fi" / "images").rglob("*.jpg")), 4
    images = sorted((data / "flickr8k" / "images").rglob("*.jpg"))
    if size == "flickr8k":
        return images, 4
    folder.mkdir()
    for path in images:
        with Image.open(path) as image:
            scale = LARGE_PIXELS / max(image.size)
            large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
            large.save(folder / path.name, quality=LARGE_QUALITY)
    return sorted(folder.glob("*.jpg")), 1


def ingest_photographs(size: str) -> dict[str, Any]:
    """Put the photographs of a size into S3 in all three forms and return where they are."""
    from orchestration.data.ingest import ingest_instruct
    from orchestration.services import storage

    root = f"s3://{os.environ['TINYEMO_BUCKET']}"
    with tempfile.TemporaryDirectory() as name:
        images, copies = photographs(size, Path(name) / "images")
        records = write_records(Path(name), images, copies * len(images))
        manifest = ingest_instruct(
            records, images[0].parent, name=f"bench-{size}", root=f"{root}/datasets", split="train"
        ).manifest
        data = [images[number % len(images)].read_bytes() for number in range(copies * len(images))]
    tars = []
    for number, start in enumerate(range(0, len(data), RECORDS_PER_FILE)):
        tars.append(f"{root}/bench/{size}/tar/{number:05d}.tar")
        storage.write_bytes(tars[-1], as_tar(data[start : start + RECORDS_PER_FILE], number))
    return {
        "dataset": manifest.uri,
        "shards": manifest.shard_uris("train"),
        "tars": tars,
        "mds": write_mds(data, f"{root}/bench/{size}/mds"),
        "batch": BATCH,
        "num_records": len(data),
        "num_image_bytes": sum(map(len, data)),
        "num_dataset_bytes": sum(shard.num_bytes for shard in manifest.shards),
    }


def ingest_oasis_once() -> str:
    """The photographs again, each under one other id: the small set of a mix. Its address."""
    from orchestration.assets.catalogue import get_asset
    from orchestration.data.ingest import ingest_instruct

    images = sorted((get_asset("oasis") / "images").glob("*.jpg"))
    with tempfile.TemporaryDirectory() as name:
        records = write_records(Path(name), images, len(images), ONCE_PREFIX)
        root = f"s3://{os.environ['TINYEMO_BUCKET']}/datasets"
        report = ingest_instruct(records, images[0].parent, name="bench-oasis-once", root=root, split="train")
    return report.manifest.uri


def as_tar(images: list[bytes], number: int) -> bytes:
    """A WebDataset shard."""
    sink = BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for place, image in enumerate(images):
            info = tarfile.TarInfo(f"{number:05d}{place:05d}.jpg")
            info.size = len(image)
            tar.addfile(info, BytesIO(image))
    return sink.getvalue()


def write_mds(images: list[bytes], uri: str) -> str | None:
    """MosaicML's shards under `uri`, None where its package is not there."""
    script = (
        "import sys, types, pickle\n"
        "sys.modules['streaming.vision'] = types.ModuleType('streaming.vision')\n"
        "from streaming import MDSWriter\n"
        "with MDSWriter(out=sys.argv[1], columns={'image': 'bytes'}, size_limit=1 << 24) as out:\n"
        "    for image in pickle.load(sys.stdin.buffer):\n"
        "        out.write({'image': image})\n"
    )
    from orchestration.services import storage

    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            [sys.executable, "-c", script, name], input=pickle.dumps(images), env=peer_environment(), check=False
        )  # fmt: skip
        if done.returncode:
            return None
        for path in sorted(Path(name).iterdir()):
            storage.write_bytes(f"{uri}/{path.name}", path.read_bytes())
    return uri


def peer_environment() -> dict[str, str]:
    """Ours, with the peers' folder behind it."""
    folders = [os.environ.get("TINYEMO_PEERS", ""), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def write_feature_rows(path: Path, num_rows: int, seed: int) -> None:
    """Generated rows of a split: noise around a centre for each label."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = ["anger", "disgust", "fear", "joy", "sadness", "surprise"]
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((6, FEATURE_WIDTH))
    schema = pa.schema([("id", pa.string()), ("emotion", pa.string()),
                        ("features", pa.list_(pa.float16(), FEATURE_WIDTH))])  # fmt: skip
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 50_000):
            count = min(50_000, num_rows - start)
            labels = rng.integers(0, 6, count)
            noise = rng.standard_normal((count, FEATURE_WIDTH), dtype=np.float32)
            values = pa.array((noise + centres[labels]).astype(np.float16).ravel())
            ids = [f"{path.stem}/{number}" for number in range(start, start + count)]
            columns = [ids, [words[label] for label in labels],
                       pa.FixedSizeListArray.from_arrays(values, FEATURE_WIDTH)]  # fmt: skip
            writer.write_table(pa.table(columns, schema=schema))


def write_small_images(folder: Path, num_images: int) -> Path:
    """Generated 48-pixel JPEGs in subfolders, and a record for each."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    records = folder / "records.jsonl"
    with records.open("w") as file:
        for number in range(num_images):
            path = folder / "images" / f"{number // 1000:03d}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(small).resize((48, 48)).save(path, quality=80)
            turns = [{"from": "human", "value": "<image>\nDescribe the image."},
                     {"from": "gpt", "value": f"Coloured squares, number {number}."}]  # fmt: skip
            image = str(path.relative_to(folder / "images"))
            file.write(json.dumps({"id": f"g{number}", "image": image, "conversations": turns}) + "\n")
    return records
