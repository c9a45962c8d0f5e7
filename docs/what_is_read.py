"""Writes docs/what-is-read.md from the tables that the code reads and refuses by.

python docs/what_is_read.py            # write the page
python docs/what_is_read.py --check    # exit with 1 where the committed page is another one
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from holdfast import shipped
from holdfast.data import images, items, readers
from holdfast.data.streams import read_yaml

PAGE = Path(__file__).with_name("what-is-read.md")
# Modules whose tuples of (name, verdict, sentence) are tables of this page.
KINDS = ("holdfast.checkpoints.support",)


def page() -> str:
    """The whole page."""
    parts = [
        "# What is read, what is refused",
        "Made by `python docs/what_is_read.py` from the tables that the code itself reads and refuses by; do not edit "
        "it by hand. What is refused is refused before any work, by name and with what to do instead.",
        *checkpoints(),
        *item_keys(),
        *pictures(),
        *formats(),
        *layouts(),
    ]
    return "\n\n".join(parts) + "\n"


def checkpoints() -> list[str]:
    """Kinds of adapters and checkpoints, table by table."""
    found = []
    for place in KINDS:
        module = importlib.import_module(place)
        for name, value in vars(module).items():
            if isinstance(value, tuple) and value and all(_is_kind(kind) for kind in value):
                heading = name.replace("_KINDS", "s").replace("_", " ").capitalize()
                found += [f"## {heading}", table(("what", "", "how, or what to do instead"), map(_row, value))]
    return found


def item_keys() -> list[str]:
    """Keys of one item of a data file."""
    read = (
        ("id (its place in the file where it has none)", items.ID_KEYS),
        ("pictures, a path or a list of paths", items.IMAGE_KEYS),
        ("the request", items.PROMPT_KEYS),
        ("the request's second part, on a line of its own below it", (items.INPUT_KEY,)),
        ("a conversation, instead of a request", items.TURN_KEYS),
        ("earlier turns", (items.HISTORY_KEY,)),
        ("a system text", items.SYSTEM_KEYS),
        ("the answer, or all that count as right", items.ANSWER_KEYS),
        ("choices, shown below a request that an index or a letter answers", items.CHOICE_KEYS),
    )
    by_remedy: dict[str, list[str]] = {}
    for key, remedy in items.REFUSED_KEYS.items():
        by_remedy.setdefault(remedy, []).append(key)
    refused = [(_code(keys), remedy) for remedy, keys in by_remedy.items()]
    refused += [
        ("`image_url`, `img_path`, `photo`, ... without one of the keys above", "name the pictures in `images`"),
        ("`image_1`, `image2`, ...", f"name the pictures in `images`, and mark their places with `{items.MARK}`"),
        ("`video_path`, `frames`, `speech`, `point_cloud`, `depth_map`, ...", "only pictures are shown to the model"),
        (f"in a turn: {_code(items._REFUSED_TURN_KEYS)}, and all of the above", "take it out"),
    ]
    return [
        "## Keys of an item",
        "A key that carries words or a modality is used, or refused by its name; it is never passed over. Words that "
        "the request says anyway are no fault, nor are keys about a thing (`image_id`, `video_fps`). `loss` or `train` "
        "false, or `weight` 0, makes an answer no target. All other keys travel with a test item for its scorer.",
        table(("read as", "keys"), ((what, _code(keys)) for what, keys in read)),
        table(("refused", "what to do instead"), refused),
    ]


def pictures() -> list[str]:
    """What is made of a picture."""
    return ["## Pictures", table(("what", "", "how, or what to do instead"), map(_row, images.PICTURE_FORMS))]


def formats() -> list[str]:
    """Readers of tasks and safety sets, each with the first line of what it says of itself."""

    def rows(places: dict[str, str]) -> Iterable[Sequence[str]]:
        for name, place in places.items():
            module, _, function = place.partition(":")
            text = getattr(importlib.import_module(module), function).__doc__ or ""
            whole = importlib.import_module(module).__doc__ or ""
            yield f"`{name}`", _first(whole), _first(text)

    head = ("format", "what it is", "what is read")
    return [
        "## Formats of tasks",
        "Anything else is read by a reader of your own (`holdfast new reader NAME`).",
        table(head, rows(readers.READERS)),
        "## Formats of safety sets",
        table(head, rows(readers.SAFETY_READERS)),
    ]


def layouts() -> list[str]:
    """Where each shipped stream looks for its files."""
    parts = [
        "## Layouts of published benchmarks",
        "Folders below a stream's root, in the order in which they are looked for; the first that holds a file is "
        "read, and an error lists all that was looked for. The stream files are in `configs/streams/`.",
    ]
    for name, path in shipped.stream_files().items():
        found = read_yaml(path).get("layouts") or {}
        if found:
            rows = ((f"`{part}`", _code("the root" if folder == "." else folder for folder in folders))
                    for part, folders in found.items())  # fmt: skip
            parts += [f"### {name}", table(("layout", "folders"), rows)]
    return parts


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _is_kind(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and all(hasattr(value, name) for name in ("name", "verdict", "sentence"))


def _row(kind: Any) -> Sequence[str]:
    return kind.name, kind.verdict, kind.sentence


def _code(names: Iterable[str]) -> str:
    return ", ".join(name if name == "the root" else f"`{name}`" for name in names)


def _first(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join(text.strip().split("\n\n")[0].split()).removesuffix(":")


def main() -> None:
    """Write the page, or compare it."""
    made = page()
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != made:
        sys.exit(f"{PAGE} is not what the code says; run: python docs/what_is_read.py")


if __name__ == "__main__":
    main()
