"""Files: brace lists, roots that nothing leaves, whole writes, CSV, odd JSON."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.data.source_files import (
    expand_braces,
    find,
    inside,
    read_csv,
    read_json,
    read_records,
    read_text,
    write_text,
)
from holdfast.errors import DataError, StorageError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/b.json", ["a/b.json"]),
        ("{x,y}/{1,2}.json", ["x/1.json", "x/2.json", "y/1.json", "y/2.json"]),
        ("{instructions/,}T/test.json", ["instructions/T/test.json", "T/test.json"]),
        ("{alone}.json", ["{alone}.json"]),
        ("{a,{b,c}}", ["a", "b", "a", "c"]),
    ],
)
def test_braces_stand_for_lists_in_order(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@given(st.lists(st.sampled_from(["a", "b", "..", ".", "...", "~"]), min_size=1, max_size=6))
def test_no_relative_path_leaves_its_root(parts: list[str]) -> None:
    root = Path("/data/root")
    try:
        found = inside(root, "/".join(parts))
    except DataError:
        assert os.path.commonpath([os.path.normpath(root.joinpath(*parts)), root]) != str(root)
    else:
        assert found.is_relative_to(root) and ".." not in found.parts


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "C:\\x", "\\\\host\\share\\x", "", " ", "a\0b"])
def test_paths_out_of_bounds_are_refused(path: str) -> None:
    with pytest.raises(DataError, match=r"leaves the data root|is empty or holds a NUL"):
        inside(Path("/data/root"), path)


def test_a_path_may_climb_within_the_root_and_links_of_the_owner_are_followed(tmp_path: Path) -> None:
    assert inside(tmp_path, "../b.png", start=tmp_path / "a") == tmp_path / "b.png"
    assert inside(tmp_path, str(tmp_path / "b.png")) == tmp_path / "b.png"
    assert inside(tmp_path, "a:b.png").name == "a:b.png"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert read_text(inside(tmp_path / "root", "link/x.txt")) == "x"


def test_a_missing_file_names_the_folder_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"the folder {tmp_path} is there, 'a' below it is not\. Get it\."):
        find(tmp_path, ["a/b/c.json"], what="Task", obtain="Get it.")
    with pytest.raises(DataError, match="no file is named"):
        find(tmp_path, [], what="Task")


def test_texts_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode() and [p.name for p in path.parent.iterdir()] == ["a.txt"]
    with pytest.raises(StorageError, match="cannot be written"):
        write_text(path / "below-a-file.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_text(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "new"]


def test_gzipped_json_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    assert read_records(path) == [{"a": 1}, {"a": 2}]


def test_csv_rows_and_their_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid,text\r\n1,"two\nlines, one cell"\r\n2,\r\n')
    assert read_csv(path) == [{"id": "1", "text": "two\nlines, one cell"}, {"id": "2", "text": ""}]
    path.write_text("id,text\n1,a,b\n")
    with pytest.raises(DataError, match="line 2: more fields than the header"):
        read_csv(path)


def test_json_nested_beyond_reason_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"nested too deeply|not valid JSON"):
        read_json(path)


@pytest.mark.timeout(20)
def test_braces_stand_for_a_bounded_number_of_names() -> None:
    assert expand_braces("{a,b}/{x,y}.json") == ["a/x.json", "a/y.json", "b/x.json", "b/y.json"]
    assert expand_braces("{a,{b,c}}") == ["a", "b", "a", "c"]
    assert expand_braces("{a}.json") == ["{a}.json"]
    for bomb in ("{a,b}" * 60, "{" * 3000 + "a,b" + "}" * 3000 + "{c,d}" * 30, "{" + "a," * 20_000 + "b}"):
        with pytest.raises(DataError, match="more than 10000 names"):
            expand_braces(bomb)
