"""SPA-VL (Zhang et al. 2024, arXiv 2406.12030; HF sqrti/SPA-VL, CC-BY-4.0): test splits `harm` and `help`, 265 each.

Parquet with `image, question, class1, class2, class3`, or the JSON form `{"id", "image", "question", ...}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.data.embedded import embedded_image, parquet_rows
from holdfast.data.safety_set import choose_many, field_of, image_folder, image_path, safety_set
from holdfast.data.source_files import read_records
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import DataError

SIDES = ("harm", "help")
OBTAIN = "`hf download sqrti/SPA-VL --repo-type dataset --include 'test/*' --local-dir <root>`."


def read(
    root: Path, *, name: str, benign: bool = True, cache: str | None = None, max_new_tokens: int = 512
) -> SafetySet:
    """`harm` as requests to refuse, `help` beside it.

    The `help` questions are about the same images and harm classes as `harm`, so not every refusal there is wrong: read
    over-refusal against theta_0's. benign: leave `help` out. cache: folder for the images (see `embedded.image_cache`).
    """
    folder = Path(cache).expanduser() if cache else None
    unsafe = _side(root, name, "harm", folder)
    return safety_set(
        name, unsafe, _side(root, name, "help", folder) if benign else (), where=root, max_new_tokens=max_new_tokens
    )


def _side(root: Path, name: str, side: str, cache: Path | None) -> list[Sample]:
    files = files_of(root, side)
    if not files:
        raise DataError(f"{name}: no {side}*.parquet, {side}.json or {side}.jsonl below {root}. {OBTAIN}")
    samples = []
    if files[0].suffix == ".parquet":
        for number, (path, row_number, row) in enumerate(parquet_rows(files, needed=("image", "question"))):
            where = f"{path}, row {row_number}"
            picture = embedded_image(row["image"], root, what=where, cache=cache)
            samples.append(_sample(row, str(number), where, picture))
        return samples
    items = read_records(files[0])
    probe = str(items[0].get("image") or ".") if items else "."
    images = image_folder(root, (f"images/{side}", "images", f"test/{side}", "."), probe)
    for index, item in enumerate(items):
        where = f"{files[0]}, item {index}"
        picture = image_path(root, images, field_of(item, "image", where), where)
        samples.append(_sample(item, str(item.get("id", index)), where, picture))
    return samples


def _sample(row: dict[str, Any], key: str, where: str, picture: Path) -> Sample:
    question = field_of(row, "question", where)
    classes = [str(row[c]) for c in ("class1", "class2", "class3") if row.get(c)]
    return Sample.single(
        key, question, images=(picture,), meta={"category": classes[0] if classes else "", "classes": classes}
    )


def files_of(root: Path, stem: str) -> list[Path]:
    """Shards `<stem>*.parquet` anywhere below `root`, else `<stem>.json` or `.jsonl`; sorted."""
    choose_many("SPA-VL side", stem, SIDES)
    shards = sorted(root.rglob(f"{stem}*.parquet"))
    return shards or sorted(p for suffix in ("json", "jsonl") for p in root.rglob(f"{stem}.{suffix}"))[:1]
