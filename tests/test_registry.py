"""One registry for every kind of part: where a name may come from, and what is said where it cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import stranger_kit
from holdfast import judges, methods, registry, rules, scorers
from holdfast.data import readers
from holdfast.data.streams import load_stream, read_spec
from holdfast.errors import ConfigError, UnknownNameError
from holdfast.models import tuner
from holdfast.registry import Registry, load_plugins

REGISTRIES = {
    "methods": methods.REGISTRY,
    "judges": judges.REGISTRY,
    "scorers": scorers.REGISTRY,
    "readers": readers.REGISTRY,
    "safety_readers": readers.SAFETY_REGISTRY,
    "tuners": tuner.REGISTRY,
    "rules": rules.REGISTRY,
}
every_kind = pytest.mark.parametrize("kind", REGISTRIES)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Names and modules that a test brings are gone after it."""
    tables = {kind: dict(known.table) for kind, known in REGISTRIES.items()}
    plugins, modules = dict(registry._plugins), set(sys.modules)
    yield
    for kind, known in REGISTRIES.items():
        known.table.clear()
        known.table.update(tables[kind])
        known.plugin_of.clear()
    registry._plugins.clear()
    registry._plugins.update(plugins)
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in ("strangers", "mine", "other", "broken", "shadow"):
            del sys.modules[name]


def site(folder: Path, monkeypatch, **changes) -> Path:
    monkeypatch.syspath_prepend(stranger_kit.install(folder / "site", **changes))
    return folder / "site"


def plugin(folder: Path, text: str, name: str = "mine.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@every_kind
def test_every_built_in_name_is_its_own_and_can_be_imported(kind):
    known = REGISTRIES[kind]
    for name in known.builtin:
        assert known.find(name).source == "builtin" and known.find(name).came_from == "builtin"
        assert registry.is_builtin(known.load(name))


@every_kind
def test_every_kind_takes_entry_points_and_code_by_its_place(kind, tmp_path, monkeypatch):
    known = REGISTRIES[kind]
    parts = {"methods": "Half", "judges": "Curt", "scorers": "Length", "rules": "Share"}
    part = parts.get(kind, "read_lines")
    site(tmp_path, monkeypatch, entry_points=f"[{known.group}]\nnew_one = strangers.parts:{part}\n")
    assert "new_one" in known and known.find("new_one").came_from == "strangers 1.2"
    assert known.load("new_one") is known.load(f"strangers.parts:{part}")
    origin = known.origin("new_one")
    assert origin["class"] == f"strangers.parts:{part}"
    assert (origin["distribution"], origin["version"]) == ("strangers", "1.2")
    assert len(origin["sha256"]) == 64 and origin["file"] == "parts.py"


@every_kind
def test_a_distribution_that_takes_a_built_in_name_is_an_error_that_names_both(kind, tmp_path, monkeypatch):
    known = REGISTRIES[kind]
    name, untouched = next(iter(known.builtin)), list(known.builtin)[-1]
    site(tmp_path, monkeypatch, entry_points=f"[{known.group}]\n{name} = strangers.parts:Half\n")
    with pytest.raises(
        ConfigError, match=rf"'{name}' is claimed twice: by holdfast itself \(.*\) and by the distri.* st"
    ):
        known.load(name)
    if untouched != name:
        assert known.load(untouched)


def test_two_distributions_with_one_name_are_an_error_that_names_both(tmp_path, monkeypatch):
    points = "[holdfast.judges]\nsame = strangers.parts:Curt\n"
    site(tmp_path, monkeypatch, entry_points=points)
    stranger_kit.install(tmp_path / "site2", name="other", entry_points=points)
    monkeypatch.syspath_prepend(tmp_path / "site2")
    with pytest.raises(ConfigError, match=r"distribution \w+ 1\.2 .* distribution \w+ 1\.2"):
        judges.get("same")


@every_kind
def test_an_unknown_name_shows_the_nearest_and_how_to_name_code_of_ones_own(kind):
    known = REGISTRIES[kind]
    name = next(iter(known.builtin))
    with pytest.raises(UnknownNameError, match=rf"Did you mean '{name}'.*package\.module:Class"):
        known.load(f"{name}_")


@every_kind
@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_module:Part", r"there is no module 'no_such_module'\. .*plugins"),
        ("holdfast.no_such:Part", r"there is no module 'holdfast\.no_such'"),
        ("holdfast.version:Part", r"holdfast\.version has no 'Part'"),
        (":Part", r"names no code; expected package\.module:Class"),
        ("holdfast.version:", r"names no code; expected package\.module:Class"),
        ("holdfast.version:__version__", r"is '.*'; expected|lacks"),
    ],
)
def test_code_that_is_not_there_is_named(kind, name, message):
    with pytest.raises(ConfigError, match=message):
        REGISTRIES[kind].load(name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError"),
        ("raise SystemExit('needs a licence')", "SystemExit: needs a licence"),
    ],
)
def test_code_that_fails_says_so_in_its_own_words(text, message, tmp_path, monkeypatch):
    path = plugin(tmp_path, f"\n{text}\n", "broken.py")
    with pytest.raises(ConfigError, match=rf"plug-in .*broken\.py.* cannot be imported: {message}"):
        load_plugins([path])
    assert "broken" not in sys.modules
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"judge 'broken:Part': module broken cannot be imported: .*{message[-12:]}"):
        judges.get("broken:Part")


@pytest.mark.parametrize(
    "get, code, lacks",
    [
        (methods.get, "class Part: pass", "Config, begin_task, train_task, end_task"),
        (methods.get, "def Part(): pass", "Config, begin_task, train_task, end_task"),
        (
            methods.get,
            "class Part:\n Config = int\n begin_task = train_task = end_task = print",
            "expected a frozen dataclass",
        ),
        (judges.get, "class Part: name = 'x'", "lacks judge"),
        (scorers.get, "class Part:\n def __init__(self, mode): pass", "lacks name, mode, score, aggregate"),
        (rules.get, "class Part: name = 'x'", "lacks needs_curvature, settings, edit"),
        (readers.task_reader, "Part = 3", "is 3; expected something that can be called"),
    ],
)
def test_code_that_is_no_such_part_is_refused_with_what_it_lacks(get, code, lacks, tmp_path):
    load_plugins([plugin(tmp_path, code)])
    with pytest.raises(ConfigError, match=lacks):
        get("mine:Part")


def test_a_name_put_into_a_table_counts_whatever_form_it_has(tmp_path):
    load_plugins([plugin(tmp_path, "class Part:\n name = 'x'\n def __init__(self, a=1): self.a = a\n judge = print")])
    cls = sys.modules["mine"].Part
    for value, a in [("mine:Part", 1), (("mine:Part", {"a": 2}), 2), (cls, 1), ((cls, {"a": 3}), 3)]:
        judges.JUDGES["part"] = value
        assert judges.get("part").a == a and judges.REGISTRY.find("part").came_from == "Python"
        assert judges.get("part", a=4).a == 4
    judges.JUDGES["part"] = 7
    with pytest.raises(ConfigError, match=r"registered as 7; expected 'package\.module:Class'"):
        judges.get("part")


def test_a_plug_in_file_may_give_its_parts_short_names(tmp_path):
    text = (
        "from holdfast.judges import JUDGES\nclass Part:\n name = 'x'\n judge = print\nJUDGES['part'] = 'mine:Part'\n"
    )
    path = plugin(tmp_path, text)
    (loaded,) = load_plugins([path])
    assert judges.REGISTRY.find("part").came_from == "mine.py"
    assert judges.REGISTRY.origin("part") == {"class": "mine:Part", "file": "mine.py", "sha256": loaded.sha256}
    assert load_plugins([path]) == [loaded]
    # Changed, it is read again, within the same second too, and what it no longer names is gone.
    path.write_text(text.replace("['part']", "['tarp']"))
    assert load_plugins([path])[0].sha256 != loaded.sha256
    assert "tarp" in judges.REGISTRY and "part" not in judges.REGISTRY


@every_kind
def test_a_plug_in_file_that_takes_a_name_is_refused_and_leaves_nothing(kind, tmp_path):
    known = REGISTRIES[kind]
    name, value = next(iter(known.builtin.items()))
    elsewhere = dict.fromkeys(("readers", "safety_readers"), "holdfast.data.readers") | {"tuners": tuner.__name__}
    room = elsewhere.get(kind, f"holdfast.{kind}")
    attribute = "SAFETY_REGISTRY" if kind == "safety_readers" else "REGISTRY"
    text = f"from {room} import {attribute} as R\nR.table['mine_only'] = R.table['{name}'] = 'mine:Part'\n"
    with pytest.raises(ConfigError, match=rf"in the place of .* '{name}', which is holdfast itself"):
        load_plugins([plugin(tmp_path, text)])
    assert known.table[name] == value and "mine_only" not in known and "mine" not in sys.modules


@pytest.mark.parametrize(
    "file, message",
    [
        ("json.py", "would hide the module 'json'"),
        ("torch.py", "would hide the module 'torch'"),
        ("holdfast.py", "would hide the module 'holdfast'"),
        ("my-edit.py", "cannot be a module's name"),
        ("mine.txt", "expected a Python file"),
    ],
)
def test_a_file_that_can_be_no_plug_in_is_refused(file, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_plugins([plugin(tmp_path, "", file)])


def test_two_plug_ins_of_one_stem_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(ConfigError, match="would both be module 'mine'"):
        load_plugins([plugin(tmp_path / "a", ""), plugin(tmp_path / "b", "")])
    with pytest.raises(ConfigError, match=r"gone\.py: expected a Python file .* there is none"):
        load_plugins([tmp_path / "gone.py"])


def test_a_marker_in_a_folder_chooses_among_names_and_never_names_code(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit")
    for name in ("evil:attach", "os:system", "holdfast.tuners.cram:attach"):
        (tmp_path / tuner.MARKER).write_text(f'{{"tuner": "{name}"}}')
        with pytest.raises(UnknownNameError, match=r"Unknown tuner \(in .*\) .*Available: cram, moelora\.$"):
            tuner.attach_tuner(None, tmp_path)  # type: ignore[arg-type]


def test_what_another_process_is_told_is_what_it_knows(tmp_path, monkeypatch):
    path = plugin(tmp_path, "from holdfast.judges import JUDGES\nJUDGES['part'] = 'mine:Part'\n")
    load_plugins([path])
    monkeypatch.setitem(scorers.SCORERS, "added", ("holdfast.scorers.match:ExactMatch", {"strip": True}))
    told = registry.export()
    assert told["tables"]["holdfast.scorers"]["added"]["options"] == {"strip": True}
    assert {"path": str(path), "sha256": registry._sha256(path.read_bytes())} in told["plugins"]
    del scorers.SCORERS["added"]
    monkeypatch.setattr(sys, "path", list(sys.path))
    registry.restore(told)
    assert scorers.get("added").strip is True
    path.write_text("# another\n")
    with pytest.raises(ConfigError, match="changed after the run had begun"):
        registry.restore(told)


def test_verbs_that_read_the_stream_of_a_run_file_know_its_plug_ins(tmp_path):
    plugin(tmp_path, "from holdfast.data.types import Sample\ndef read(source): return [Sample.single('1', 'q', 'a')]")
    task = {"name": "t", "format": "mine:read", "test": "x"}
    data = {"model": "m", "tasks": ["t"], "plugins": "mine.py", "stream": {"name": "s", "tasks": [task]}}
    (tmp_path / "run.yaml").write_text(json.dumps(data))
    (loaded,) = load_stream(tmp_path / "run.yaml").tasks
    assert loaded.test[0].answer == "a"
    (tmp_path / "run.yaml").write_text(json.dumps({**data, "plugins": {"a": 1}}))
    with pytest.raises(ConfigError, match=r"plugins: found .*, expected a list"):
        read_spec(tmp_path / "run.yaml")


def test_names_told_before_the_room_is_imported_are_there_when_it_is():
    value = {"where": "x:Y", "options": {}, "module": "x", "file": None}
    registry.restore({"search_path": list(sys.path), "plugins": [], "tables": {"holdfast.later": {"n": value}}})
    late = Registry("part", "holdfast.later", {"own": "a:B"})
    assert late.names() == ["own", "n"] and late.find("n").source == "python"
    del registry._REGISTRIES["holdfast.later"]


def test_code_that_no_other_process_can_import_is_named():
    class Local:
        pass

    for value, place in [(Local, "inside a function"), ("__main__:Part", "in the script or notebook that runs")]:
        judges.JUDGES["part"] = value
        with pytest.raises(ConfigError, match=rf"{place}, so the processes of jobs=N cannot import it"):
            judges.REGISTRY.refuse_unshareable("part")
