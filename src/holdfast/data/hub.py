"""Hugging Face `datasets`, from a local folder or a hub id, for one's own tasks (`pip install 'holdfast[hf]'`).

    {name: mine, format: hf, train: train, test: "validation", options: {dataset: user/name, prompt: question,
     answer: answer, image: image}}

`train` and `test` name splits (slices such as `train[:100]` work). Pictures inside the dataset are put on disk once, by
content hash, so that samples stay lazy.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from holdfast.data.embedded import embedded_image
from holdfast.data.items import (
    IMAGE_KEYS,
    INPUT_KEY,
    PROMPT_KEYS,
    TURN_KEYS,
    dialogue,
    is_blank,
    item_id,
    place_marks,
    with_suffix,
)
from holdfast.data.readers import Source
from holdfast.data.types import Sample
from holdfast.errors import DataError

OPTIONS: dict[str, Any] = {
    "dataset": None,
    "config": None,
    "revision": None,
    "id": None,
    "prompt": None,
    "answer": None,
    "image": None,
    "prompt_suffix": "",
}


def read(source: Source) -> list[Sample]:
    """Samples of one split. Options: dataset (hub id, or a folder relative to the data root), config, revision, and the
    column names id, prompt, answer, image (guessed from the usual names where not given), prompt_suffix.

    Raises DataError: `datasets` is not installed, the dataset or split does not exist, a column is missing.
    """
    options = source.take(OPTIONS)
    if not options["dataset"]:
        raise DataError(f"Task {source.name!r}: format 'hf' needs options.dataset, a hub id or a folder.")
    rows = _load(source, options)
    columns = list(rows.column_names)
    for key in ("id", "prompt", "answer", "image"):
        if options[key] is not None and options[key] not in columns:
            raise DataError(
                f"Task {source.name!r}: {options['dataset']} has no column {options[key]!r} (option {key}); it has "
                f"{', '.join(columns)}."
            )
    where = f"{options['dataset']}, split {source.files[0]}"
    image_columns = [options["image"]] if options["image"] else [c for c in IMAGE_KEYS if c in columns]
    samples = []
    classes = _named_classes(rows)
    for index, row in enumerate(islice(rows, source.limit)):
        try:
            samples.append(_sample(_with_names(row, classes), index, source, options, image_columns))
        except DataError as error:
            raise DataError(f"{where}, row {index}: {str(error).rstrip('.')}.") from None
    return samples


def _sample(
    row: Mapping[str, Any], index: int, source: Source, options: Mapping[str, Any], image_columns: list[str]
) -> Sample:
    images = tuple(embedded_image(cell, source.root, what=f"row {index}") for cell in _shown(row, image_columns))
    prompt_key, answer_key = options["prompt"], options["answer"]
    spoken = [prompt_key] if prompt_key else [*PROMPT_KEYS, INPUT_KEY, *TURN_KEYS]
    if all(is_blank(row.get(key)) for key in spoken):
        raise DataError(f"no prompt; name its column in options.prompt (columns: {', '.join(row)})")
    turns, gold = dialogue(row, prompt_key=prompt_key, answer_key=answer_key, picture_keys=image_columns)
    turns = with_suffix(turns, options["prompt_suffix"])
    name = str(row[options["id"]]) if options["id"] else item_id(row, index)
    return Sample(id=name, turns=place_marks(turns, len(images)), images=images, references=gold)


def _shown(row: Mapping[str, Any], columns: list[str]) -> list[Any]:
    """The row's pictures. Raises DataError: two columns hold different ones."""
    found = {c: list(v) if isinstance(v := row.get(c), list) else [v] for c in columns if not is_blank(row.get(c))}
    if not found:
        return []
    most = max(found, key=lambda column: len(found[column]))
    for column, cells in found.items():
        if not all(cell in found[most] for cell in cells):
            raise DataError(f"the columns {column!r} and {most!r} hold different images; name one in options.image")
    return found[most]


def _named_classes(rows: Any) -> dict[str, Any]:
    """Column -> its class names, of columns that hold classes by number."""
    import datasets

    return {
        column: feature
        for column, holder in rows.features.items()
        if isinstance(feature := getattr(holder, "feature", holder), datasets.ClassLabel)
    }


def _with_names(row: dict[str, Any], classes: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with the names of its classes; a class below 0 is an unknown one, as `datasets` writes hidden labels."""

    def name(feature: Any, value: Any) -> str | None:
        return feature.int2str(value) if isinstance(value, int) and value >= 0 else None

    named = {
        column: [name(feature, v) for v in row[column]] if isinstance(row[column], list) else name(feature, row[column])
        for column, feature in classes.items()
    }
    return {**row, **named}


def _load(source: Source, options: Mapping[str, Any]) -> Any:
    """The split as a `datasets.Dataset` whose images are not decoded."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"Task {source.name!r}: format 'hf' needs the `datasets` library; install it with: "
            "pip install 'holdfast[hf]'."
        ) from None
    name, split = str(options["dataset"]), source.files[0]
    folder = source.root / Path(name).expanduser()
    target = str(folder) if folder.is_dir() else name
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            saved = datasets.load_from_disk(target)
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(target, options["config"], split=split, revision=options["revision"])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"Task {source.name!r}: {name} (split {split!r}) cannot be loaded: {type(error).__name__}: {error}. "
            f"Expected a folder below {source.root} or a hub id that is reachable or cached (HF_HUB_OFFLINE keeps to "
            "the cache)."
        ) from error
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows
