"""Every command ends as one place says: a sentence and a status, no traceback, nothing that acts on a terminal."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from holdfast.cli import boundary, main
from holdfast.cli.terminal import Console, GuardedStream, guarded_output
from holdfast.errors import DataError, StorageError
from holdfast.text import one_line, visible

ESC = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def end(error: BaseException | None, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    def command() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(SystemExit) as found:
        boundary.run(command)
    return int(found.value.code or 0)


# What torch's loader makes of an error in one of its workers.
IN_WORKER = (
    "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    '  File "x.py", line 1, in f\n    raise DataError("x")\nholdfast.errors.DataError: Sample 3 has no image.\n'
)


@pytest.mark.parametrize(
    "error, status, said",
    [
        (None, 0, ""),
        (DataError("Sample 3 has no image."), 2, "DataError: Sample 3 has no image."),
        (DataError(IN_WORKER), 2, "DataError: Sample 3 has no image."),
        (DataError(f"{ESC} is no name"), 2, r"DataError: \x1b]0;owned"),
        (KeyError("layers"), 1, "This is a bug in holdfast"),
        (AssertionError(), 1, "This is a bug in holdfast, or in a plug-in of yours: AssertionError"),
        (MemoryError(), 2, "the memory is used up"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "the memory is used up (CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "the memory is used up"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "StorageError: No space left to write /x/y"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "PermissionError: /x/y: Permission denied."),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), 2, "Give it a shorter name"),
        (
            UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"),
            2,
            r"'a\udcff' holds bytes",
        ),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 3, ""),
        (SystemExit("no"), 2, "no"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_every_end_has_its_status_and_sentence(
    error: BaseException | None,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert end(error, monkeypatch, tmp_path) == status
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out and "Traceback" not in shown.err and "\x1b" not in shown.err
    kept = [*tmp_path.glob("holdfast-*.txt")]
    if status == 1:
        assert str(kept[0]) in shown.err and "Traceback (most recent" in kept[0].read_text()
    elif isinstance(error, DataError | StorageError | None):
        assert not kept


def test_the_traceback_is_shown_where_it_is_asked_for_and_a_full_temp_folder_is_no_second_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOLDFAST_DEBUG", "1")
    assert end(DataError(f"bad {ESC}"), monkeypatch, tmp_path) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and "\x1b" not in shown
    monkeypatch.delenv("HOLDFAST_DEBUG")
    (tmp_path / "file").write_text("")
    assert end(KeyError("x"), monkeypatch, tmp_path / "file" / "below") == 1
    assert "could not be written" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    code = "from holdfast.cli import boundary; boundary.run(lambda: [print('x' * 99) for _ in range(10000)])"
    made = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert made.stdout is not None and made.stderr is not None
    made.stdout.read(10)
    made.stdout.close()
    said = made.stderr.read()
    made.stderr.close()
    assert made.wait() == 141 and not said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_from_a_file_acts_on_a_terminal_and_colours_stay() -> None:
    assert GuardedStream(plain := io.StringIO()).write(f"a{ESC}\r\nb\rc\n") and plain.getvalue() == (
        "a\\x1b]0;owned\\x07\\x1b[2J\\u009b31m\\u202e\nb\nc\n"
    )
    GuardedStream(screen := Terminal()).write(f"\x1b[1;31mred\x1b[0m {ESC}")
    assert screen.getvalue().startswith("\x1b[1;31mred\x1b[0m \\x1b]0") and "\x1b[2J" not in screen.getvalue()
    console = Console(file=(screen := Terminal()), force_terminal=True, width=100)
    table = Table(title=f"[red]title[/] {ESC}")
    table.add_column(f"head {ESC}")
    table.add_row(f"cell {ESC}")
    console.print(table, f"text {ESC}", markup=False)
    shown = screen.getvalue()
    assert "\x1b[3;31mtitle" in shown and "\\x1b]0;owned" in shown
    assert not {"\x1b]0", "\x1b[2J", "\x9b", "\x07", "\u202e"} & {
        shown[i : i + n] for i in range(len(shown)) for n in (1, 3, 4)
    }


def test_bars_reach_the_terminal_below_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with guarded_output():
        Console(stderr=True).show_cursor(False)
        print("\x1b[?25l", file=sys.stderr)
    assert screen.getvalue().count("\x1b[?25l") <= 1 and "\\x1b[?25l" in screen.getvalue()


def test_what_json_may_hold_stays_json() -> None:
    import json

    text = json.dumps({"a": "\x7f\x85\u202e\u2028\ud800"}, ensure_ascii=False)
    assert visible(text).isascii() and json.loads(visible(text))["a"] == "\x7f\x85\u202e\u2028\ud800"
    assert (
        one_line("a\nb " * 100, 20) == one_line(one_line("a\nb " * 100, 20), 20) and len(one_line("x" * 999, 50)) == 50
    )


def test_the_command_itself_ends_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["holdfast", "inspect", str(tmp_path / f"no{ESC}")])
    with pytest.raises(SystemExit) as found:
        main()
    assert found.value.code == 2 and "\x1b" not in capsys.readouterr().err
    assert os.environ.get("HOLDFAST_DEBUG") is None
