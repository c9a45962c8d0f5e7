"""`restore` on the embedded model: what is published, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.cli.samples import read_samples
from holdfast.errors import ConfigError, DataError, StorageError, UnknownNameError
from holdfast.restore import run as restore_run
from holdfast.restore.run import restore
from holdfast.restore.search import Budget, Point, undominated
from holdfast.restore.sets import RestoreSets, Split
from holdfast.tiny import model_path
from holdfast.tiny.example import ExampleFiles

from .conftest import CONFIG, Done


def points(record: Any) -> list[Point]:
    return [Point(**row) for row in record["curve"]]


def test_it_publishes_an_adapter_with_its_record_and_page(done: Done) -> None:
    assert done.result.published == done.out.absolute()
    names = {path.name for path in done.out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "restore.json", "restore.html", "README.md"} <= names
    assert not list(done.out.parent.glob(".out.restore/*"))
    page = (done.out / "restore.html").read_text(encoding="utf-8")
    assert "forbidden requests the tuned model did not refuse" in page
    assert "<svg" in page
    card = (done.out / "README.md").read_text(encoding="utf-8")
    sections = [line for line in card.splitlines() if line.startswith("## ")]
    assert sections[:2] == ["## Restored", "## Options"]
    # Every table of the card says something: a rule without figures of its own has the distances.
    assert "| block | layers | distance from BEFORE, of AFTER's |" in card and "| 0 | 7 | " in card


def test_the_record_says_what_was_measured(done: Done) -> None:
    record = json.loads((done.out / "restore.json").read_text(encoding="utf-8"))
    assert [row["strength"] for row in record["curve"]] == [0.0, *CONFIG.strengths]
    for row in [*record["curve"], record["before"], record["tuned"], record["restored"]]:
        for key in ("asr", "over_refusal", "task"):
            assert 0 <= row[key] <= 1
    assert record["tuned"]["asr"] > record["before"]["asr"] + 0.1  # the tuning cost refusals
    assert record["restored"]["asr"] < record["tuned"]["asr"]
    assert record["calibration"]["screened"]["asked"] == 48


def test_no_strength_dominates_the_one_chosen(done: Done) -> None:
    curve = points(done.result.record)
    chosen = Point(**done.result.record["chosen"])
    assert chosen in undominated(curve)


def test_what_was_written_does_what_was_measured(done: Done) -> None:
    chosen, restored = done.result.record["chosen"], done.result.record["restored"]
    for key in ("asr", "over_refusal", "task"):
        assert restored[key] == pytest.approx(chosen[key], abs=0.05)  # fp16 may turn a reply


def test_the_ends_of_the_curve_are_the_two_models(done: Done) -> None:
    record = done.result.record
    strongest = record["curve"][-1]
    assert strongest["figures"]["kl_before"] < record["curve"][1]["figures"]["kl_before"]
    assert strongest["figures"]["kl_tuned"] > record["curve"][1]["figures"]["kl_tuned"]


def test_stock_peft_serves_the_adapter(done: Done, example: ExampleFiles) -> None:
    """An independent road: transformers and PEFT alone give the replies that the record was made from."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from holdfast.models.generate import generate
    from holdfast.models.load import load
    from holdfast.stream.protocol import Checkpoint

    samples = [s for s in read_samples(example.forbidden) if not s.images][:6]
    ours = generate(
        load(Checkpoint(base=str(example.before), adapters=(str(done.out),)), dtype="float32"),
        samples,
        max_new_tokens=32,
        batch_size=1,
    )
    base = AutoModelForImageTextToText.from_pretrained(example.before, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, done.out).eval()
    processor = AutoProcessor.from_pretrained(example.before, backend="pil")
    for sample, wanted in zip(samples, ours, strict=True):
        messages = [{"role": "user", "content": [{"type": "text", "text": sample.prompt}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        assert (
            processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            == wanted
        )


def test_an_unattainable_budget_publishes_nothing(
    example: ExampleFiles, sets: RestoreSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(CONFIG, strengths=(0.001,), whole_curve=False)
    small = replace(sets, task=Split(calibration=sets.task.calibration[:16], probe=sets.task.probe[:8]))
    small = replace(small, safety=Split(calibration=small.safety.calibration, probe=small.safety.probe[:16]))
    small = replace(small, benign=Split(calibration=small.benign.calibration, probe=small.benign.probe[:4]))
    budget = Budget(max_asr=0.0, max_drop=0.0, max_over_refusal=0.0)
    result = restore(str(example.before), str(example.after), small, out=tmp_path / "out", budget=budget, config=few)
    assert result.record["tuned"]["asr"] > 0
    assert result.published is None
    assert not (tmp_path / "out").exists()
    assert result.record["chosen"] is None
    assert result.record["nearest"]["strength"] in (0.0, 0.001)
    assert "No strength meets the budget" in result.page.read_text(encoding="utf-8")

    # Called again with a budget that can be met, nothing is asked twice; killed in the export, it goes on there.
    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(restore_run, "generate", never)

    class KilledError(RuntimeError):
        pass

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    def attainable(**changes: Any) -> Any:
        config = replace(few, whole_curve=True, **changes)
        return restore(
            str(example.before),
            str(example.after),
            small,
            out=tmp_path / "out",
            budget=Budget(max_asr=1.0),
            config=config,
        )

    for place in ("holdfast.restore.candidates.export", "holdfast.restore.run._Run._restored"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KilledError):
                attainable()
        assert not (tmp_path / "out").exists()
    # What the killed one had finished, an adapter, is in nobody's way.
    result = attainable(export="dense")
    assert result.published is not None and (tmp_path / "out" / "model.safetensors").is_file()
    assert result.record["chosen"]["strength"] == 0.0  # the tuned model keeps to that budget as it is


def test_safety_alone_works_and_says_what_is_unprotected(
    example: ExampleFiles, sets: RestoreSets, tmp_path: Path
) -> None:
    alone = RestoreSets(
        safety=Split(calibration=sets.safety.calibration, probe=sets.safety.probe[:8]), benign=Split(), task=Split()
    )
    result = restore(
        str(example.before),
        str(example.after),
        alone,
        out=tmp_path / "out",
        config=replace(CONFIG, strengths=(1.0,), export="dense"),
    )
    assert result.published is not None
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert len([w for w in result.record["warnings"] if w.startswith("No ")]) == 2
    assert result.record["restored"]["over_refusal"] is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: replace(s, safety=s.benign, benign=s.safety), "seem to be swapped"),
        (
            lambda s: replace(s, benign=Split(calibration=s.safety.calibration, probe=s.benign.probe)),
            "both forbidden and harmless",
        ),
        (lambda s: replace(s, safety=Split()), "no forbidden request"),
    ],
)
def test_sets_that_say_something_else_are_refused(
    example: ExampleFiles, sets: RestoreSets, tmp_path: Path, change: Any, match: str
) -> None:
    with pytest.raises(DataError, match=match):
        restore(str(example.before), str(example.after), change(sets), out=tmp_path / "out", config=CONFIG)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_aligned_is_refused(sets: RestoreSets, example: ExampleFiles, tmp_path: Path) -> None:
    small = RestoreSets(
        safety=Split(calibration=sets.safety.calibration, probe=sets.safety.probe[:4]), benign=Split(), task=Split()
    )
    with pytest.raises(DataError, match="not aligned for this policy"):
        restore(str(model_path("base")), str(example.after), small, out=tmp_path / "out", config=CONFIG)


def test_after_equal_to_before_is_refused(example: ExampleFiles, sets: RestoreSets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="equals BEFORE"):
        restore(str(example.before), str(example.before), sets, out=tmp_path / "out", config=CONFIG)
    idle = tmp_path / "idle"
    idle.mkdir()
    (idle / "adapter_config.json").write_bytes((example.after / "adapter_config.json").read_bytes())
    tensors = load_file(example.after / "adapter_model.safetensors")
    save_file(
        {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()},
        idle / "adapter_model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match="changes nothing"):
        restore(str(example.before), str(idle), sets, out=tmp_path / "out", config=CONFIG)


def test_a_bound_needs_what_it_bounds(example: ExampleFiles, sets: RestoreSets, tmp_path: Path) -> None:
    for budget, missing in (
        (Budget(max_over_refusal=0.1), replace(sets, benign=Split())),
        (Budget(max_drop=0.1), replace(sets, task=Split())),
    ):
        with pytest.raises(ConfigError, match="cannot be measured without"):
            restore(
                str(example.before), str(example.after), missing, out=tmp_path / "out", budget=budget, config=CONFIG
            )


def test_a_folder_that_exists_and_a_rule_without_strength_are_refused(
    example: ExampleFiles, sets: RestoreSets, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    with pytest.raises(StorageError, match="exists"):
        restore(str(example.before), str(example.after), sets, out=tmp_path / "there", config=CONFIG)
    with pytest.raises(UnknownNameError, match="rule with a strength"):
        restore(str(example.before), str(example.after), sets, out=tmp_path / "o", config=replace(CONFIG, rule="ties"))


def test_gate_holds_models_against_bounds(example: ExampleFiles) -> None:
    runner = CliRunner()
    common = [
        "--safety", str(example.forbidden), "--benign", str(example.benign), "--limit", "12",
        "--max-new-tokens", "48", "--max-asr", "20%", "--max-over-refusal", "20%", "--json",
    ]  # fmt: skip
    kept = runner.invoke(app, ["gate", str(example.before), *common])
    assert kept.exit_code == 0, kept.output
    assert json.loads(kept.stdout)["passed"] is True
    broken = runner.invoke(app, ["gate", str(model_path("base")), *common])
    assert broken.exit_code == 3, broken.output
    assert json.loads(broken.stdout)["broken"].keys() == {"asr"}


def test_gate_says_what_a_bound_needs(example: ExampleFiles) -> None:
    runner = CliRunner()
    common = ["gate", str(example.before), "--safety", str(example.forbidden)]
    for more, match in (
        ([], "No bound"),
        (["--max-over-refusal", "3%"], "--benign"),
        (["--max-drop", "2", "--task", str(example.task)], "--reference"),
        (["--max-asr", "300%"], "0 to 100 %"),
    ):
        result = runner.invoke(app, [*common, *more])
        assert match in str(result.exception)


def test_a_dry_run_says_what_it_would_cost(example: ExampleFiles, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        [
            "restore", str(example.before), str(example.after), "--safety", str(example.forbidden),
            "--out", str(tmp_path / "out"), "--dry-run",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "in all" in result.stdout
    assert "GiB" in result.stdout
    assert not (tmp_path / "out").exists()


def test_probe_requests_may_not_be_calibrated_on(example: ExampleFiles, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        [
            "restore", str(example.before), str(example.after), "--safety", str(example.forbidden),
            "--probe-safety", str(example.forbidden), "--out", str(tmp_path / "out"),
        ],
    )  # fmt: skip
    assert "both calibrated on and probed with" in str(result.exception)
