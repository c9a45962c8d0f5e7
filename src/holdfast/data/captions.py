"""Caption tasks with a COCO file of references (UCIT's VizWiz-Caption and Flickr30k).

`{"images": [{"id", "file_name"?}], "annotations": [{"image_id", "caption"}, ...]}`. The published scripts give the
predictions image ids 1..N by their order in the file, so order is what ties a test item to its references.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from holdfast.data.items import image_names, to_samples
from holdfast.data.readers import Source
from holdfast.data.source_files import expand_braces, read_json, read_records
from holdfast.data.types import Sample
from holdfast.errors import DataError


def read(source: Source) -> list[Sample]:
    """Samples of one split; a test sample's references are all captions of its image.

    Options: annotations (the COCO file), align: "order" (item i has image id i + 1, as published) or "file_name"
    (match the image's base name), prompt_suffix. Raises DataError: an item without captions, or a COCO file that
    names another image at the item's place.
    """
    options = source.take({"annotations": None, "align": "order", "prompt_suffix": ""})
    path = source.path()
    items = read_records(path)
    how: dict[str, Any] = {
        "where": path,
        "root": source.root,
        "folders": source.images,
        "image_search": source.image_search,
        "limit": source.limit,
        "keep_meta": source.split != "train",
    }
    if source.split == "train":
        return to_samples(items, **how)
    if not options["annotations"]:
        raise DataError(f"Task {source.name!r}: captions need options.annotations, the COCO file of references.")
    if options["align"] not in ("order", "file_name"):
        raise DataError(f"Task {source.name!r}: options.align is {options['align']!r}; expected order or file_name.")
    names = options["annotations"]
    aliases = tuple(n for name in ([names] if isinstance(names, str) else names) for n in expand_braces(name))
    gold_path = source.companion(aliases)
    captions, files = coco_captions(gold_path)
    ids = {base: name for name, base in files.items()}

    def own(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        base = next((PurePosixPath(name).name for name in image_names(item)), "")
        if options["align"] == "file_name":
            name = ids.get(base)
            if name is None:
                raise DataError(f"{gold_path.name} names no image {base!r}")
        else:
            name = str(index + 1)
            if name in files and base and files[name] != base and base in ids:
                raise DataError(
                    f"item {index} is image {base!r}, but image id {name} of {gold_path.name} is {files[name]!r}; the "
                    "files are in different order (set options.align: file_name)"
                )
        if not captions.get(name):
            raise DataError(f"{gold_path.name} has no caption for image id {name}")
        return {"references": captions[name], "meta": {"image_id": name}}

    return to_samples(items, each=own, prompt_suffix=options["prompt_suffix"], **how)


def coco_captions(path: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """(image id -> its captions, image id -> base file name where given) of a COCO caption file, ids as strings.

    Raises: DataError: not COCO's layout.
    """
    data = read_json(path)
    rows = data.get("annotations") if isinstance(data, Mapping) else data
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected COCO's {{'images': [...], 'annotations': [...]}}.")
    captions: dict[str, list[str]] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or "image_id" not in row or not isinstance(row.get("caption"), str):
            raise DataError(f"{path}, annotation {index}: expected 'image_id' and a text 'caption', found {row!r:.80}.")
        captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    images = data.get("images", []) if isinstance(data, Mapping) else []
    files = {
        str(image["id"]): PurePosixPath(str(image["file_name"])).name
        for image in images
        if isinstance(image, Mapping) and "id" in image and image.get("file_name")
    }
    return {name: tuple(texts) for name, texts in captions.items()}, files
