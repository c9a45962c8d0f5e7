"""A checkpoint's rows and its files, on a microscopic model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from holdfast.data.types import Turn
from holdfast.errors import ConfigError, RunError, UnknownNameError
from holdfast.evaluation import CheckpointEvaluator, EvaluationConfig, JudgeConfig
from holdfast.evaluation import evaluator as evaluator_module
from holdfast.metrics.safety import BEHAVIOURS
from holdfast.stream.protocol import Checkpoint, TimesAnswers, silent

CONFIG = EvaluationConfig(batch_size=2)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def ask(pico_folder, pico_stream, tmp_path):
    def run(step=None, *, config=CONFIG, out_dir=None, stream=pico_stream, progress=silent):
        evaluator = CheckpointEvaluator(config)
        checkpoint = Checkpoint(base=str(pico_folder))
        return evaluator(checkpoint, stream=stream, step=step, out_dir=out_dir or tmp_path / "out", progress=progress)

    return run


def test_rows_of_every_task_and_set_with_one_line_per_answer(ask, pico_stream, tmp_path):
    seen: list[tuple[int, int]] = []
    rows = ask(progress=lambda event, done, total: seen.append((done, total)))
    assert list(rows["scores"]) == ["colour", "name"]
    assert rows["scores"]["colour"] | {"value": 0, "scored": 0} == {
        "value": 0,
        "n": 5,
        "scored": 0,
        "unscored": 0,
        "scorer": "exact_match",
        "mode": "strict",
    }
    safety = rows["safety"]["forbidden"]
    assert safety["n"] == 4 and safety["benign"]["n"] == 3 and safety["judge"] == "keyword"
    assert safety["refusal"] + safety["compliance"] + safety["other_safe"] + safety["collapse"] == pytest.approx(1)
    assert safety["asr"] == pytest.approx(1 - safety["refusal"])
    assert set(safety["judges"]) == {"keyword_strict"}
    assert seen[-1] == (17, 17)

    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["safety-forbidden.jsonl", "task-colour.jsonl", "task-name.jsonl"]
    lines = rows_of(out / "task-colour.jsonl")
    assert [line["id"] for line in lines] == [s.id for s in pico_stream.tasks[0].test]
    assert set(lines[0]) == {"id", "prompt", "images", "prediction", "references", "value", "evidence"}
    lines = rows_of(out / "safety-forbidden.jsonl")
    assert [line["side"] for line in lines] == ["unsafe"] * 4 + ["benign"] * 3
    assert lines[0]["judges"]["keyword_strict"]["behaviour"] in BEHAVIOURS


def test_a_step_is_asked_the_tasks_so_far(ask):
    assert list(ask(step=0)["scores"]) == ["colour"]


def test_an_interrupted_evaluation_asks_only_what_is_missing(ask, tmp_path, monkeypatch):
    expected = ask(out_dir=tmp_path / "whole")
    asked: list[str] = []
    original = evaluator_module.generate

    def generate(loaded, samples, **options):
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.extend(s.id for s in samples)
        return original(loaded, samples, **options)

    monkeypatch.setattr(evaluator_module, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        ask(out_dir=tmp_path / "part")
    first, asked[:] = list(asked), ["-"] * 8  # never dies again
    assert ask(out_dir=tmp_path / "part") == expected
    assert len(first) == 7 and len({*first, *asked[8:]}) == 7 + len(asked[8:]) == 17
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "part" / path.name).read_bytes()


def test_a_finished_evaluation_loads_no_model(ask, monkeypatch):
    expected = ask()

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(evaluator_module, "load", refuse)
    assert ask() == expected


def test_what_was_asked_is_timed_and_what_was_read_is_not(pico_folder, pico_stream, tmp_path):
    evaluator = CheckpointEvaluator(CONFIG)
    for asked in (17, 0):
        where = {"stream": pico_stream, "step": None, "out_dir": tmp_path / "out", "progress": silent}
        evaluator(Checkpoint(base=str(pico_folder)), **where)
        assert evaluator.answering["requests"] == asked and (evaluator.answering["seconds"] > 0) is (asked > 0)
    assert isinstance(evaluator, TimesAnswers)


def test_answers_to_other_samples_are_refused(ask, pico_stream):
    ask(step=0)
    task = dataclasses.replace(pico_stream.tasks[0], test=pico_stream.tasks[0].test[:3])
    changed = dataclasses.replace(pico_stream, tasks=[task, *pico_stream.tasks[1:]])
    with pytest.raises(RunError, match=r"answers to other samples than the ones to ask now \(5 rows, 3 samples\)"):
        ask(step=0, stream=changed)


@pytest.mark.parametrize("kind", ["task", "safety"])
def test_an_answer_to_another_prompt_of_the_same_id_is_not_reused(ask, pico_stream, tmp_path, kind):
    ask(step=0)

    def changed(samples):
        first, *rest = samples
        return [dataclasses.replace(first, turns=(Turn(role="user", text="Something else?"),), images=()), *rest]

    (task, *tasks), (safety,) = pico_stream.tasks, pico_stream.safety
    if kind == "task":
        task = dataclasses.replace(task, test=changed(task.test))
    else:
        safety = dataclasses.replace(safety, unsafe=changed(safety.unsafe))
    stream = dataclasses.replace(pico_stream, tasks=[task, *tasks], safety=[safety])
    with pytest.raises(
        RunError,
        match=r"another prompt of '\S+' than .*then, 'Something else\?' now\. .*choose another --out, or delete",
    ):
        ask(step=0, stream=stream)


def test_two_judges_stand_side_by_side_with_their_agreement(ask):
    both = (JudgeConfig(name="keyword"), JudgeConfig(name="keyword_strict"))
    row = ask(config=EvaluationConfig(batch_size=2, judges=both))["safety"]["forbidden"]
    agreement = row["judges"]["keyword_strict"]["agreement"]
    assert agreement["label"]["n"] == agreement["behaviour"]["n"] == 4 and agreement["benign"]["n"] == 3
    assert agreement["label"]["raw"] is not None


def test_two_endpoints_are_told_apart_by_their_own_names():
    options = {"url": "http://127.0.0.1:1/v1", "model": "m", "cache": False}
    one, two = (JudgeConfig(name="endpoint", options={**options, "name": n}) for n in ("first", "second"))
    assert list(CheckpointEvaluator(EvaluationConfig(judges=(one, two))).judges) == ["first", "second"]
    with pytest.raises(ConfigError, match="named twice in judges: first, first"):
        EvaluationConfig(judges=(one, one))


def test_seeded_sampling_repeats_itself_and_differs_from_greedy(ask, tmp_path):
    def lines(name, **options):
        ask(config=EvaluationConfig(batch_size=2, **options), out_dir=tmp_path / name)
        return [row["prediction"] for row in rows_of(tmp_path / name / "task-colour.jsonl")]

    one = lines("one", seed=3)
    assert one == lines("two", seed=3) != lines("greedy")
    with pytest.raises(ConfigError, match="temperature is 0"):
        EvaluationConfig(temperature=0.0)


def test_limit_asks_the_first_of_every_split_and_side(ask):
    rows = ask(config=EvaluationConfig(batch_size=2, limit=2))
    assert rows["scores"]["name"]["n"] == 2
    assert rows["safety"]["forbidden"]["n"] == 2 and rows["safety"]["forbidden"]["benign"]["n"] == 2


def test_steps_between_are_looked_at_with_fewer_prompts_and_the_ends_in_full(ask, tmp_path):
    config = EvaluationConfig(batch_size=2, limit=4, limit_between=2)

    def counts(step: int | None) -> dict[str, int]:
        rows = ask(step, config=config, out_dir=tmp_path / f"step-{step}")
        safety = rows["safety"]["forbidden"]
        return {**{k: v["n"] for k, v in rows["scores"].items()}, "unsafe": safety["n"]}

    assert counts(0) == {"colour": 4, "unsafe": 2}  # the task just learned in full
    assert counts(1) == {"colour": 4, "name": 4, "unsafe": 4}  # the last step
    assert counts(None) == {"colour": 4, "name": 4, "unsafe": 4}  # theta_0


def test_nothing_is_asked_on_the_way_where_the_limit_is_zero(ask):
    rows = ask(0, config=EvaluationConfig(batch_size=2, limit_between=0))
    assert rows["scores"]["colour"]["n"] == 5  # just learned
    assert rows["safety"]["forbidden"]["n"] == 0 and rows["safety"]["forbidden"]["asr"] is None
    with pytest.raises(ConfigError, match="limit_between is -1; expected 0 or more"):
        EvaluationConfig(limit_between=-1)


def test_wrong_settings_are_named():
    with pytest.raises(UnknownNameError, match="Did you mean 'keyword'"):
        CheckpointEvaluator(EvaluationConfig(judges=(JudgeConfig(name="keywords"),)))
    with pytest.raises(ConfigError, match="judges is empty"):
        EvaluationConfig(judges=())
    with pytest.raises(ConfigError, match="named twice"):
        EvaluationConfig(judges=(JudgeConfig(name="keyword"), JudgeConfig(name="keyword")))
    with pytest.raises(ConfigError, match="limit is 0; expected 1 or more"):
        EvaluationConfig(limit=0)
