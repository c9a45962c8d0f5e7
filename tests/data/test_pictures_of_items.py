"""Where the pictures of items are found: several folders, written out in the text, and what no path can be."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from holdfast.data.images import ImageFinder, open_image
from holdfast.data.items import to_samples
from holdfast.data.source_files import inside
from holdfast.data.streams import TaskSpec, read_split
from holdfast.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))


def encoded(kind: str, size: tuple[int, int] = (7, 5)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_a_picture_may_be_written_out(tmp_path: Path, kind: str, prefix: str) -> None:
    items = [{"question": "Q", "answer": "a", "image": prefix + encoded(kind)}] * 2
    one, two = to_samples(items, where="x", root=tmp_path)
    assert one.images == two.images and open_image(one.images[0]).size == (7, 5)


@pytest.mark.parametrize(
    "name, message",
    [
        ("data:image/png;base64,%%%", "is no whole Base64"),
        ("data:text/plain;base64,QUJD", "is no picture; expected 'data:image"),
        ("https://example.org/a.png", "is a URL; fetch it"),
        ("x" * 300 + ".png", "longer than a file name can be"),
        ("QUJD" * 4000, "longer than a file name can be"),
        ("../a.png", "leaves the data root"),
    ],
)
def test_what_is_no_path_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_samples([{"question": "Q", "answer": "a", "image": name}], where="x", root=tmp_path)


def test_every_picture_is_found_below_whichever_folder_holds_it(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    items = [{"question": "Q", "answer": "a", "image": f"{i}.png"} for i in range(1, 5)]
    found = to_samples(items, where="x", root=tmp_path, folders=("a", "b"))
    assert [s.images[0].relative_to(tmp_path).as_posix() for s in found] == ["a/1.png", "b/2.png", "b/3.png", "b/4.png"]


def test_a_limit_reads_no_more_than_it_wants(tmp_path: Path) -> None:
    items = [{"question": f"Q{i}", "answer": "a"} for i in range(5)] + [{"no": "prompt"}]
    (tmp_path / "t.json").write_text(json.dumps(items))
    assert len(read_split(TaskSpec(name="t", test="t.json", limit=5), "test", tmp_path)) == 5
    with pytest.raises(DataError, match="item 5"):
        read_split(TaskSpec(name="t", test="t.json"), "test", tmp_path)


@pytest.mark.parametrize(
    "written", ["a.png", "a/b c.png", "./a.png", "a/../b.png", "a//b.png", "..", ".", "...", ".a", " "]
)
def test_the_short_way_to_a_path_is_the_long_one(tmp_path: Path, written: str) -> None:
    root = tmp_path / "r"
    try:
        expected: Path | str = inside(root / "x" / "..", written, start=root)
    except DataError as error:
        expected = type(error).__name__
    try:
        found: Path | str = ImageFinder(root, [root])(written)
    except DataError as error:
        found = type(error).__name__
    assert found == expected
