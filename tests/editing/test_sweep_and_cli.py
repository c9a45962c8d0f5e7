"""A sweep says what the edit will do; the verbs do what the library does and speak in sentences."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.editing.editor import edit_checkpoint
from holdfast.editing.measure import measure_pair
from holdfast.errors import ConfigError, HoldfastError, StorageError
from holdfast.rules.hpa import HpaConfig, HpaRule
from holdfast.rules.what_if import grid, sweep


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, HoldfastError | SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("kind", ["after", "adapter"])
def test_a_sweep_row_is_what_the_edit_reports(kind, world, tmp_path):
    after = getattr(world, kind)
    projection = "layer" if kind == "after" else "none"
    config = HpaConfig(keep_bounds=(10, 30), focus_ratio=3, alpha_bounds=(0.2, 0.9), projection=projection)
    layers = measure_pair(world.before, after, world.curvature)
    (row,) = sweep(layers, [config])
    report = edit_checkpoint(
        world.before, after, rule=HpaRule(config), curvature=world.curvature, out=tmp_path / "out", verify=False
    )
    for figure in ("kept_share", "overlap", "safety_share", "alpha"):
        assert getattr(row, figure) == pytest.approx(report.mean(figure)), figure
    change = sum(r["change"] ** 2 for r in report.layers)
    reverted = sum(r["share_reverted"] * r["change"] ** 2 for r in report.layers) / change
    assert row.share_reverted == pytest.approx(reverted)
    strength = (sum(r["distance"] ** 2 for r in report.layers) / change) ** 0.5
    assert row.strength == pytest.approx(strength, rel=1e-4)


def test_more_columns_kept_take_back_more(world):
    layers = measure_pair(world.before, world.adapter, world.curvature)
    configs = grid([(p, p) for p in (0, 5, 20, 60, 100)], [1.0], [(0.4, 0.8)], HpaConfig())
    rows = sweep(layers, configs)
    reverted = [row.share_reverted for row in rows]
    assert reverted[0] == 0 and reverted[-1] == pytest.approx(1)
    assert reverted == sorted(reverted)
    assert [row.strength for row in rows] == sorted((row.strength for row in rows), reverse=True)


def test_one_sweep_has_one_form_of_the_curvature(world):
    layers = measure_pair(world.before, world.adapter, world.curvature)
    with pytest.raises(ConfigError, match="one form of the curvature, found divide, multiply"):
        sweep(layers, [HpaConfig(), HpaConfig(curvature_form="multiply")])


def test_edit_then_inspect_from_the_command_line(world, tmp_path):
    world.curvature.save(tmp_path / "c.safetensors")
    out = tmp_path / "out"
    result = run(
        *("edit", world.before, world.after, "--calibration", tmp_path / "c.safetensors", "--out", out),
        *("--keep", "10..20", "--focus", "3", "--alpha", "0.5", "--projection", "none", "--no-verify"),
    )
    assert result.exit_code == 0, result.output
    assert "14 layers edited" in result.output
    settings = json.loads((out / "edit.json").read_text())["settings"]
    assert settings["keep_bounds"] == [10.0, 20.0] and settings["focus_ratio"] == 3
    assert settings["alpha_bounds"] == [0.5, 0.5] and settings["projection"] == "none"
    shown = run("inspect", out, "--layers")
    assert shown.exit_code == 0 and "mlp.down_proj" in shown.output
    assert "multi_modal_projector: 1 tensor changed" in shown.output
    assert json.loads(run("inspect", out, "--json").output)["rule"] == "hpa"


def test_sweep_edit_prints_every_setting(world, tmp_path):
    world.curvature.save(tmp_path / "c.safetensors")
    result = run(
        *("sweep-edit", world.before, world.adapter, "--calibration", tmp_path / "c.safetensors"),
        *("--keep", "5..15", "--keep", "10..30", "--focus", "2", "--focus", "4", "--out", tmp_path / "sweep.json"),
    )
    assert result.exit_code == 0, result.output
    assert "4 settings over 14 layers" in result.output
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["config"]["keep_bounds"] for row in rows] == [[5, 15], [5, 15], [10, 30], [10, 30]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "OUT"], "Pass --calibration FILE, or both"),
        (["--out", "OUT", "--safety", "s.jsonl"], "Pass --calibration FILE, or both"),
        (["--out", "OUT", "--calibration", "no.safetensors"], "No calibration at no.safetensors"),
        (["--out", "OUT", "--calibration", "C", "--keep", "five"], "--keep 'five' is not understood"),
        (["--out", "OUT", "--calibration", "C", "--keep", "50..150"], "expected two percentages"),
        (["--out", "OUT", "--calibration", "C", "--shard", "big"], "size 'big' is not understood"),
    ],
)
def test_a_wrong_option_is_a_sentence(arguments, message, world, tmp_path):
    world.curvature.save(tmp_path / "c.safetensors")
    places = {"OUT": tmp_path / "out", "C": tmp_path / "c.safetensors"}
    result = run("edit", world.before, world.after, *(places.get(a, a) for a in arguments))
    assert isinstance(result.exception, HoldfastError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def write_sets(folder):
    for name, answer in (("safety", "no"), ("task", "red")):
        rows = [{"id": str(i), "text": f"Question {i}?", "answer": answer} for i in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_edit_calibrates_by_itself_from_two_sets_of_samples(world, tmp_path):
    write_sets(tmp_path)
    result = run(
        *("edit", world.before, world.adapter, "--out", tmp_path / "out", "--export", "adapter", "--no-verify"),
        *("--safety", tmp_path / "safety.jsonl", "--task", tmp_path / "task.jsonl"),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert len(report["layers"]) == len(world.curvature.modules)
    assert report["inputs"]["calibration"]["sets"]["safety"]["sequences"] == 3


def own_calibration(world, folder, out, *options):
    write_sets(folder)
    sets = ("--safety", folder / "safety.jsonl", "--task", folder / "task.jsonl")
    return run("edit", world.before, world.adapter, "--out", out, "--no-verify", *sets, *options)


@pytest.mark.parametrize(
    "words, key",
    [
        ("calibrate BEFORE --after ADAPTER --safety S --task T --out C2", "layers"),
        ("calibrate-grams BEFORE --after ADAPTER --safety S --task T --out G", "tokens"),
        ("edit BEFORE ADAPTER --calibration C --out E --no-verify", "rule"),
        ("sweep-edit BEFORE ADAPTER --calibration C --keep 5..15", "rows"),
        ("restore BEFORE ADAPTER --safety S --task T --out R --dry-run", "total_seconds"),
        ("push ADAPTER owner/name --base owner/base --dry-run", "files"),
    ],
)
def test_with_json_stdout_holds_the_result_and_nothing_else(words, key, world, tmp_path):
    world.curvature.save(tmp_path / "c.safetensors")
    write_sets(tmp_path)
    places = {"BEFORE": world.before, "ADAPTER": world.adapter, "C": tmp_path / "c.safetensors"}
    places |= {"S": tmp_path / "safety.jsonl", "T": tmp_path / "task.jsonl"}
    places |= {name: tmp_path / name for name in ("C2", "G", "E", "R")}
    result = run(*(places.get(word, word) for word in words.split()), "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert key in json.loads(result.stdout), result.stdout[:500]


def test_edits_own_calibration_is_kept_and_reused_while_its_inputs_are_the_same(world, tmp_path, monkeypatch):
    made = own_calibration(world, tmp_path, tmp_path / "out", "--export", "adapter")
    assert made.exit_code == 0, (made.output, made.exception)
    assert (tmp_path / ".out.calibration.safetensors").is_file()

    def never(*_, **__):
        raise HoldfastError("calibrated again")

    monkeypatch.setattr("holdfast.calibration.curvature.collect_curvature", never)
    again = own_calibration(world, tmp_path, tmp_path / "out", "--export", "adapter")
    assert again.exit_code == 0 and "of these models, samples and options" in again.output
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with (tmp_path / "task.jsonl").open("a") as file:
        file.write("\n")
    assert own_calibration(world, tmp_path, tmp_path / "out").exit_code == 0
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    (tmp_path / ".out.calibration.safetensors").rename(shorter / ".out.calibration.safetensors")
    monkeypatch.setattr("holdfast.data.sample_files.rename_duplicates", lambda samples: samples[:2])
    assert str(own_calibration(world, shorter, shorter / "out").exception) == "calibrated again"


def test_an_out_that_exists_or_does_not_fit_is_found_before_the_calibration(world, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    result = own_calibration(world, tmp_path, tmp_path / "taken")
    assert isinstance(result.exception, StorageError) and "exists. Choose another --out" in str(result.exception)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 100})())
    result = own_calibration(world, tmp_path, tmp_path / "out")
    assert isinstance(result.exception, StorageError) and "GB more and its disk has" in str(result.exception)
    assert not list(tmp_path.glob(".*"))


def test_measured_safety_and_the_form_of_the_curvature_reach_the_result(world, tmp_path):
    world.curvature.save(tmp_path / "c.safetensors")
    (tmp_path / "safety.json").write_text('{"forbidden": {"before": 0.42, "after": 0.05}}')
    given = ("--calibration", tmp_path / "c.safetensors", "--curvature-form", "multiply", "--no-verify")
    files = ("--measured-safety", tmp_path / "safety.json")
    result = run("edit", world.before, world.after, "--out", tmp_path / "out", *given, *files)
    assert result.exit_code == 0, result.output
    assert "| forbidden | 42.0% | 5.0% |" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "edit.json").read_text())["settings"]["curvature_form"] == "multiply"
    (tmp_path / "safety.json").write_text('{"forbidden": {"before": 42, "after": 5}}')
    wrong = run("edit", world.before, world.after, "--out", tmp_path / "wrong", *given, *files)
    assert "measured safety of 'forbidden' before is 42; expected a rate in 0..1" in str(wrong.exception)
    assert not (tmp_path / "wrong").exists()


def test_edit_takes_any_rule_with_its_options_and_needs_a_calibration_only_where_the_rule_does(world, tmp_path):
    (tmp_path / "my_rule.py").write_text(
        "from dataclasses import dataclass\n"
        "from holdfast.rules.base import DenseEdit\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine:\n"
        "    factor: float = 1.0\n"
        "    name = 'mine'\n"
        "    needs_curvature = False\n\n"
        "    def settings(self):\n"
        "        return {'factor': self.factor}\n\n"
        "    def edit(self, layer, w_prev, w_new):\n"
        "        return DenseEdit(weight=w_prev.float() + self.factor * (w_new.float() - w_prev.float()))\n"
    )
    edited = {}
    for name, plugin in (("interpolation", ()), ("my_rule:Mine", ("--plugin", tmp_path / "my_rule.py"))):
        out = tmp_path / name.partition(":")[0]
        options = ("--rule", name, "--set", "factor=0.25", "--no-verify")
        result = run(*plugin, "edit", world.before, world.after, "--out", out, *options)
        assert result.exit_code == 0, (result.output, result.exception)
        report = json.loads((out / "edit.json").read_text())
        assert report["settings"]["factor"] == 0.25
        edited[name] = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert edited["interpolation"] == edited["my_rule:Mine"]
