"""Write LLaVA caption records of the flickr8k asset: `python examples/flickr8k_records.py FOLDER OUTPUT.jsonl`.

FOLDER holds `images/` and `captions.csv` (image, split, number, caption). Every photograph of the train split is
entered once for each of its captions, one of the other splits once for each of its first `--held-out` captions. Then:

    tinyemo ingest instruct --records OUTPUT.jsonl --images FOLDER/images --name flickr8k-captions
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTION = "<image>\nDescribe the image."


def caption_records(folder: Path, num_held_out: int, num_train: int) -> Iterator[dict[str, Any]]:
    """Yield a record for each caption that is kept, in the order of the file."""
    with (folder / "captions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if int(row["number"]) >= (num_train if row["split"] == "train" else num_held_out):
                continue
            caption = row["caption"].strip().rstrip(".").strip()
            yield {
                "id": f"{Path(row['image']).stem}/{row['number']}/caption",
                "image": row["image"],
                "split": row["split"],
                "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": f"{caption}."}],
            }


def main() -> None:
    """Write the records and print their number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--held-out", type=int, default=2, help="captions of a held-out photograph (default: 2)")
    parser.add_argument("--train", type=int, default=5, help="captions of a photograph of the train split (default: 5)")
    arguments = parser.parse_args()
    count = 0
    with arguments.output.open("w") as file:
        for record in caption_records(arguments.folder, arguments.held_out, arguments.train):
            file.write(json.dumps(record) + "\n")
            count += 1
    print(f"{count} records in {arguments.output}")


if __name__ == "__main__":
    main()
