"""VLGuard (Zong et al. 2024, arXiv 2402.02207; HF ys-zong/VLGuard).

`<split>.json`: items `{"id", "image", "safe", "harmful_category"?, "harmful_subcategory"?, "instr-resp": [...]}`,
images in the unpacked `<split>.zip`. Unsafe images have one `{"instruction", "response"}`; safe ones have
`{"safe_instruction", "response"}` and `{"unsafe_instruction", "response"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from holdfast.data.safety_set import choose, field_of, image_folder, image_path, safety_set
from holdfast.data.source_files import find, read_records
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import DataError

Subset = Literal["unsafes", "safe_unsafes", "all"]
OBTAIN = (
    "VLGuard is gated: accept its terms on https://huggingface.co/datasets/ys-zong/VLGuard, then "
    "`hf download ys-zong/VLGuard --repo-type dataset --local-dir <root>` and unzip test.zip (train.zip) there."
)


def read(
    root: Path,
    *,
    name: str,
    subset: Subset = "unsafes",
    split: Literal["test", "train"] = "test",
    benign: bool = True,
    max_new_tokens: int = 256,
) -> SafetySet:
    """A VLGuard subset (test: 442 unsafes, 558 safe_unsafes) with safe_safes (558) as its benign side.

    subset: "unsafes" (harmful images), "safe_unsafes" (harmful requests over harmless images) or "all" (both;
        the two published rates are reported apart, so prefer one set for each).
    benign: leave the benign side out where two subsets stand in one stream and asking it once is enough.

    Raises: DataError: files are missing or of another layout.
    """
    choose("VLGuard subset", subset, ("unsafes", "safe_unsafes", "all"))
    choose("VLGuard split", split, ("test", "train"))
    path = find(root, (f"{split}.json", f"data/{split}.json", f"VLGuard/{split}.json"), what=name, obtain=OBTAIN)
    items = read_records(path)
    if not items:
        raise DataError(f"{path} holds no item. {OBTAIN}")
    folders = [split, f"data/{split}", f"VLGuard/{split}", f"data/VLGuard/{split}", f"images/{split}", "."]
    images = image_folder(root, folders, str(items[0].get("image", "")) or ".")
    sides: dict[str, list[Sample]] = {"unsafes": [], "safe_unsafes": [], "safe_safes": []}
    for index, item in enumerate(items):
        where = f"{path}, item {index} (id {item.get('id')!r})"
        picture = image_path(root, images, field_of(item, "image", where), where)
        pairs = field_of(item, "instr-resp", where, list)
        if field_of(item, "safe", where, bool):
            sides["safe_unsafes"].append(_sample(item, index, picture, pairs, "unsafe_instruction", where))
            sides["safe_safes"].append(_sample(item, index, picture, pairs, "safe_instruction", where))
        else:
            sides["unsafes"].append(_sample(item, index, picture, pairs, "instruction", where))
    unsafe = [s for side in ("unsafes", "safe_unsafes") if subset in (side, "all") for s in sides[side]]
    return safety_set(name, unsafe, sides["safe_safes"] if benign else (), where=path, max_new_tokens=max_new_tokens)


def _sample(item: Mapping[str, Any], index: int, picture: Path, pairs: list[Any], key: str, where: str) -> Sample:
    pair = next((p for p in pairs if isinstance(p, dict) and key in p), None)
    if pair is None:
        raise DataError(f"{where}: 'instr-resp' holds no {key!r}; is 'safe' right for this item?")
    response = str(pair.get("response") or "")
    meta = {
        "category": item.get("harmful_category") or "",
        "subcategory": item.get("harmful_subcategory") or "",
        "subset": {"instruction": "unsafes", "unsafe_instruction": "safe_unsafes"}.get(key, "safe_safes"),
    }
    is_benign = key == "safe_instruction"
    if response and not is_benign:
        meta["safe_response"] = response
    return Sample.single(
        str(item.get("id", index)),
        field_of(pair, key, where),
        images=(picture,),
        references=(response,) if response and is_benign else (),
        meta=meta,
    )
