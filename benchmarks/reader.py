"""How long reading a stream's training file takes, against parsing its JSON alone, in one process.

    python benchmarks/reader.py --items 150000

Prints CPU seconds of `json.loads`, of the reader, and of the reader with `limit: 100`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from holdfast.data.streams import TaskSpec, read_split


def item(i: int) -> dict:
    turns = ["<image>\nWhat is shown here, and what colour is it?", "A cat on a sofa.", "And?", "Nothing else."]
    spoken = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
    return {"id": str(i), "image": f"coco/train2017/{i:012d}.jpg", "conversations": spoken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=150_000)
    count = parser.parse_args().items
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "train.json").write_text(json.dumps([item(i) for i in range(count)]))
        began = time.process_time()
        json.loads((root / "train.json").read_text())
        print(f"json.loads      {time.process_time() - began:6.1f} s")
        for limit in (None, 100):
            task = TaskSpec(name="a", train="train.json", test="unused.json", limit=limit)
            began = time.process_time()
            read_split(task, "train", root)
            print(f"limit {limit!s:9} {time.process_time() - began:6.1f} s")


if __name__ == "__main__":
    main()
