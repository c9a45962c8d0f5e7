from __future__ import annotations

import json
import subprocess
import sys

import pytest

from holdfast.data.types import Sample
from holdfast.errors import JudgeError
from holdfast.judges.cache import ContentKey, VerdictCache, open_cache


def test_what_was_put_is_there_after_a_restart(tmp_path):
    path = tmp_path / "deep/verdicts.jsonl"
    cache = VerdictCache(path)
    cache.put("k1", "safe")
    cache.put("k2", "zwei\nZeilen 🙂")
    assert {k: VerdictCache(path).get(k) for k in ("k1", "k2", "k3")} == {
        "k1": "safe",
        "k2": "zwei\nZeilen 🙂",
        "k3": None,
    }


def test_a_kill_in_the_middle_of_a_write_loses_that_line_and_no_other(tmp_path):
    path = tmp_path / "v.jsonl"
    VerdictCache(path).put("k1", "safe")
    VerdictCache(path).put("k2", "unsafe")
    whole = path.read_bytes()
    first = len(whole.split(b"\n")[0]) + 1
    for cut in range(first + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        cache = VerdictCache(path)
        assert cache.get("k1") == "safe" and cache.get("k2") is None and cache.torn == 1
        cache.put("k3", "safe")
        again = VerdictCache(path)
        assert again.get("k3") == "safe" and again.get("k1") == "safe" and again.torn == 1


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "v.jsonl"
    one, two = VerdictCache(path), VerdictCache(path)
    for i in range(20):
        (one, two)[i % 2].put(f"k{i}", str(i))
    assert len(VerdictCache(path)) == 20


ASKER = """
import sys, time
from pathlib import Path
from holdfast.judges.cache import VerdictCache
folder, name = Path(sys.argv[1]), sys.argv[2]
cache = VerdictCache(folder / "v.jsonl")
(folder / f"{name}.ready").touch()
while len(list(folder.glob("*.ready"))) < 3:
    time.sleep(0.005)
keys = [f"k{i}" for i in range(24)]
for start in range(0, 24, 4):
    with cache.asking(keys[start : start + 4]) as still:
        for key in still:
            with (folder / "paid.txt").open("a") as bill:
                bill.write(key + chr(10))
            time.sleep(0.002)
            cache.put(key, key.upper())
assert all(cache.get(key) == key.upper() for key in keys)
"""


def test_three_processes_pay_for_every_answer_once(tmp_path):
    children = [subprocess.Popen([sys.executable, "-c", ASKER, tmp_path, str(i)]) for i in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert sorted((tmp_path / "paid.txt").read_text().split()) == sorted(f"k{i}" for i in range(24))
    found = VerdictCache(tmp_path / "v.jsonl")
    assert len(found) == 24 and found.torn == 0


def test_an_answer_that_another_process_got_meanwhile_is_not_asked_for(tmp_path):
    path = tmp_path / "v.jsonl"
    one, other = VerdictCache(path), VerdictCache(path)
    other.put("k1", "safe")
    with one.asking(["k1", "k2", "k2"]) as still:
        assert still == ["k2"]
    assert one.get("k1") == "safe"
    with path.open("ab") as file:  # a line that somebody is still writing
        file.write(b'{"key": "k3", ')
    with one.asking(["k3"]) as still:
        assert still == ["k3"] and one.torn == 0
    with path.open("ab") as file:
        file.write(b'"text": "safe"}\n')
    with one.asking(["k3"]) as still:
        assert still == []


def test_a_line_that_another_process_did_not_end_spoils_no_answer(tmp_path):
    path = tmp_path / "v.jsonl"
    one = VerdictCache(path)
    one.put("k1", "safe")
    with path.open("ab") as file:
        file.write(b'{"key": "k2"')  # and then it was killed
    one.put("k3", "unsafe")
    assert VerdictCache(path).get("k3") == "unsafe"


def test_the_key_sees_content_and_not_names(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    key = ContentKey({"model": "m"})
    sample = Sample.single("1", "q", images=[image])
    base = key(sample, "r")
    assert key(Sample.single("other id", "q", "with an answer", images=[image], meta={"x": 1}), "r") == base
    assert key(sample, "r2") != base
    assert key(Sample.single("1", "q2", images=[image]), "r") != base
    assert key(Sample.single("1", "q"), "r") != base
    assert ContentKey({"model": "m2"})(sample, "r") != base
    assert key(sample, "r", side="benign") != base
    copy = tmp_path / "b.png"
    copy.write_bytes(b"one")
    assert key(Sample.single("1", "q", images=[copy]), "r") == base
    image.write_bytes(b"another")
    assert key(sample, "r") != base


def test_replies_are_not_stored(tmp_path):
    path = tmp_path / "v.jsonl"
    key = ContentKey({})(Sample.single("1", "question"), "a harmful reply")
    VerdictCache(path).put(key, "unsafe")
    assert "harmful" not in path.read_text() and set(json.loads(path.read_text())) == {"key", "text"}


def test_the_default_file_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    assert open_cache(None, "guard").path == tmp_path / "verdicts/guard.jsonl"
    assert open_cache(False, "guard").path is None
    assert open_cache(tmp_path / "x.jsonl", "guard").path == tmp_path / "x.jsonl"


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JudgeError, match="cannot be written.*option `cache`"):  # noqa: RUF043
        VerdictCache(tmp_path / "file" / "v.jsonl").put("k", "v")
