"""Files of others are read with bounds; a file system without locks or fsync is told of and lived with."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from holdfast import files
from holdfast.errors import ConfigError, DataError, RunError, StorageError

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text, said",
    [
        (DEEP, "nested too deeply"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nested too deeply"),
        ("9" * 5000, "digits"),
        ("[" + "9" * 1000 + "]", "digits"),
        ('{"a": "\\ud83d"}', r"half of a character \(\\ud83d\)"),
        ('{"\\udc00": 1}', "half of a character"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"x": {"a": 1, "b": 2, "a": 3}}', "'a' twice"),
        ('{"a": 1e999}', "the number inf"),
        ('{"a": NaN}', "the number nan"),
        ("{", "not valid JSON"),
        (b"\xff\xfe{", "not UTF-8"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_nothing_can_work_with_is_refused_in_a_sentence(text: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        files.parse_json(text, "here", error=DataError, unique=True, nan=False)


def test_ordinary_json_is_read_as_it_is() -> None:
    text = '{"a": [1, 2.5, null, "\\ud83d\\ude00 é"], "b": {"a": -1e300}}'
    assert files.parse_json(text, "here", error=DataError, unique=True, nan=False) == {
        "a": [1, 2.5, None, "😀 é"],
        "b": {"a": -1e300},
    }
    assert files.parse_json("[NaN, Infinity]", "a model's config", error=DataError)[1] == float("inf")


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 2000 + "]" * 2000, "nested too deeply"),
        (LAUGHS, "more than .* values"),
        ("a: &a [*a]", "nested too deeply|more than"),
        (f"a: {'9' * 5000}", "not usable YAML"),
        ('a: "\\ud800"', "half of a character|not valid YAML"),
        ("a: 1\nb: 2\na: 3", "'a' stands twice"),
        ("x: {a: 1, a: 2}", "'a' stands twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("{[1]: 2}", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
        ("a: 2020-13-45", "not usable YAML"),
        ("x" * 2_000_000, "characters"),
    ],
)
def test_yaml_that_nothing_can_work_with_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        files.parse_yaml(text, "here")


def test_yaml_aliases_and_merged_keys_are_read() -> None:
    assert files.parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: [*a, *a]", "here")["b"] == {"x": 2}


@pytest.mark.timeout(20)
def test_what_is_no_ordinary_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in (
        ("pipe", "named pipe"),
        ("link", "named pipe"),
        ("folder", "a folder"),
        ("socket", "a socket"),
        ("loop", "symbolic links"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(DataError, match=said):
            files.read_bytes(tmp_path / name, error=DataError)
    with pytest.raises(DataError, match="a device"):
        files.read_bytes(Path("/dev/zero"), error=DataError)
    (tmp_path / "large").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="100 bytes; expected a note, of at most 10"):
        files.read_bytes(tmp_path / "large", error=DataError, most=10, what="a note")


def test_a_lock_is_one_processs_at_a_time_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"from pathlib import Path; from holdfast.files import Lock; Lock(Path({str(path)!r}), busy='taken')"
    with files.Lock(path, busy="taken"), pytest.raises(RunError, match="taken"):
        files.Lock(path, busy="taken", error=RunError)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with files.Lock(path, busy="taken"):
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert done.returncode and "StorageError: taken" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_or_fsync_works_and_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    files._say_once.cache_clear()
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("os.fsync", refuse)
    with files.Lock(tmp_path / "a" / "lock", busy="taken"):
        files.write_json(tmp_path / "a" / "x.json", {"a": 1})
        files.append(tmp_path / "a" / "y", b"line\n")
    assert (tmp_path / "a" / "y").read_bytes() == b"line\n" and (tmp_path / "a" / "x.json").is_file()
    assert "no fsync" in caplog.text
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(StorageError, match="broken"):
        files.write_json(tmp_path / "z.json", {})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_is_one_sentence_whichever_library_meets_it(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StorageError, match="No space left to write"), files.full_disk_errors(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), files.full_disk_errors(tmp_path):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(StorageError, match="needs about"):
        files.require_space(tmp_path / "not" / "there", 10**18, "It")
