"""One matrix asks every registered method the same questions on a microscopic model and a stream of two tasks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.data.streams import StreamSpec, TaskSpec
from holdfast.data.types import Sample
from holdfast.errors import CalibrationError
from holdfast.evaluation import EvaluationConfig
from holdfast.experiment import Experiment, RunConfig, build_methods
from holdfast.methods import METHODS
from holdfast.stream.protocol import ChecksStream, Method, silent
from holdfast.stream.summary import summarize_run

# Bounds that learn nothing: no seed and no kill reaches a training that there is not.
LEARNS_NOTHING = {"frozen"}
# Variants that go a way of their own through the runner; the other variants of a class differ from its first name in
# a number or a criterion, so whether they resume and are seeded is asked of that one.
OWN_WAY = {"cram_guard", "cram_official", "interpolation_matched"}
FIRST_OF_CLASS = {place: name for name, (place, _) in reversed(METHODS.items())}
ONE_PER_WAY = sorted({*FIRST_OF_CLASS.values(), *OWN_WAY})
MakeExperiment = Callable[..., Experiment]
TRAINING = {
    "rank": 4,
    "alpha": 8,
    "dropout": 0.1,
    "learning_rate": 5e-3,
    "max_steps": 4,
    "batch_size": 4,
    "precision": "fp32",
}


@pytest.fixture(scope="session")
def unaligned(pico_folder, tmp_path_factory) -> str:
    """The model "before its alignment", which SafeLoRA compares with."""
    import torch

    from holdfast.models.load import load

    loaded = load(pico_folder, device="cpu")
    folder = tmp_path_factory.mktemp("unaligned")
    generator = torch.Generator().manual_seed(1)
    for parameter in loaded.model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def needed(unaligned) -> dict[str, dict[str, Any]]:
    """Options without which a method cannot run."""
    # Four training requests say little of a false-alarm rate.
    return {
        "safe_lora": {"unaligned": unaligned},
        "resta": {"unaligned": unaligned},
        "moelora": {"experts": 2},
        "cram_guard": {"guard_false_alarm": 0.9, "guard_requests": 8},
        # Without a CLIP at hand the router sees what the model sees.
        "cram_official": {"cram": {"encoder": "backbone", "sigma": None}},
    }


@pytest.fixture(scope="session")
def own_stream(pico_stream, pico_folder):
    """The stream with the pico model's own answers to calibrate on, which a guard asks for (it refuses nothing)."""
    from holdfast.models.generate import generate
    from holdfast.models.load import load

    asked = [*pico_stream.tasks[0].train[:4], *pico_stream.tasks[1].train[:4]]
    answers = generate(load(pico_folder, device="cpu"), asked, max_new_tokens=4)
    own = [Sample.single(f"own-{s.id}", s.prompt, a, images=s.images) for s, a in zip(asked, answers, strict=True) if a]
    return replace(pico_stream, safety_calibration=own)


def experiment(pico_folder, pico_stream, name, options, out, progress=silent, seed=0) -> Experiment:
    config = RunConfig(
        model=str(pico_folder),
        stream=StreamSpec(name="pico", tasks=(TaskSpec(name="unused", test="unused"),)),
        methods={name: options},
        defaults={"training": TRAINING, "task_samples": 6},
        evaluation=EvaluationConfig(batch_size=8),
        threads=1,
        seed=seed,
    )
    return Experiment(config=config, out=out, stream=pico_stream, methods=build_methods(config), progress=progress)


def run(made: Experiment, name: str) -> None:
    with made.held():
        made.run_method(name)


def weights(out: Path, name: str, t: int = 2) -> dict[str, str]:
    """Digest of every tensor file of the checkpoint after task `t`, adapters included."""
    folders = sorted((out / "methods" / name).glob(f"{t}-*"))
    files = sorted(p for p in folders[0].rglob("*.safetensors") if "curvature" not in p.name)
    return {str(p.relative_to(folders[0])): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


class Loads:
    """How often weights were read from disk for a model, by the task that was going on."""

    def __init__(self) -> None:
        self.task, self.by_task = -1, Counter[int]()

    def progress(self, event: str, **values) -> None:
        if "step" in values:
            self.task = values["step"]

    @contextmanager
    def counted(self) -> Iterator[None]:
        from transformers import AutoModelForImageTextToText as Auto

        read = Auto.from_pretrained

        def counting(*args, **options):
            self.by_task[self.task] += 1
            return read(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Auto, "from_pretrained", counting)
            yield


@pytest.fixture(scope="module")
def loads() -> dict[str, Loads]:
    """Of the finished runs, by method."""
    return {}


@pytest.fixture(scope="module", params=sorted(METHODS))
def finished(
    request, pico_folder, pico_stream, own_stream, needed, loads, tmp_path_factory
) -> tuple[str, Path, MakeExperiment]:
    """A method's finished run, and how to make the same experiment in another directory."""
    name = request.param
    counter = loads[name] = Loads()

    def make(out: Path, progress=silent, seed=0) -> Experiment:
        stream = own_stream if name.endswith("_guard") else pico_stream
        return experiment(pico_folder, stream, name, needed.get(name, {}), out, progress, seed)

    out = tmp_path_factory.mktemp(name) / "run"
    base = snapshot(pico_folder)
    with counter.counted():
        run(make(out, counter.progress), name)
    assert snapshot(pico_folder) == base, "the base model was changed"
    return name, out, make


def test_it_is_a_method(finished):
    name, out, make = finished
    made = make(out).methods[name]
    assert isinstance(made, Method) and made.name == name


# Reads in the second task. A new checkpoint is read once, by whoever asks it first; CRAM's base is read for all tasks.
READS = {
    "seqft": 1,
    "hpa": 1,
    "cram": 0,
    "moelora": 0,
    "cram_guard": 0,
    "cram_hpa": 1,
    "model_tailor": 1,
    "ewc": 2,  # the Fisher leaves no model that the evaluation could take
}
# Anchored edits measure theta_0, the model before the task and the one after it, in turn.
MOST_READS = 3


def test_every_checkpoint_is_read_once(finished, loads):
    """Before any task theta_0 is, to be asked; a task does not read it again where nothing came in between."""
    name, _, _ = finished
    found = loads[name].by_task
    assert found[-1] == 1
    assert found[1] <= READS.get(name, MOST_READS), dict(found)


@pytest.mark.parametrize("name", ["seqft", "hpa", "cram_hpa"])
def test_a_model_that_is_handed_on_gives_the_same_bytes(name, pico_folder, pico_stream, tmp_path, monkeypatch):
    """Every file but times, of a run that holds its model and of one that reads it anew each time."""
    from holdfast.models import held

    def files(out: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(out)): p for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"}
        # With times in them: of phases, and of the files that an edit read.
        timed = ("record.json", "phases.json", "inputs.json")
        return {name: p.read_bytes() for name, p in found.items() if p.name not in timed}

    first, second = Loads(), Loads()
    with first.counted():
        run(experiment(pico_folder, pico_stream, name, {}, tmp_path / "held" / "run", first.progress), name)
    monkeypatch.setattr(held, "holding", nullcontext)
    with second.counted():
        run(experiment(pico_folder, pico_stream, name, {}, tmp_path / "anew" / "run", second.progress), name)
    assert second.by_task[1] > first.by_task[1]
    kept, fresh = files(tmp_path / "held"), files(tmp_path / "anew")
    assert kept.keys() == fresh.keys()
    different = [file for file in kept if kept[file] != fresh[file].replace(b"/anew/", b"/held/")]
    assert different == []


def test_it_learns_both_tasks_and_writes_every_record(finished, pico_stream):
    name, out, _ = finished
    summary = summarize_run(out)
    method = summary["methods"][name]
    assert method["complete"] and method["steps"] == 2
    assert [len([v for v in row if v is not None]) for row in method["accuracy"]] == [1, 2]
    assert set(method["asr"]) == {s.name for s in pico_stream.safety}
    steps = sorted((out / "methods" / name).glob("*-*"))
    assert all((step / "record.json").is_file() and not (step / "scratch").exists() for step in steps)
    assert json.loads((out / "config.json").read_text())["methods"][name]["training"]["rank"] == 4


@pytest.mark.parametrize("finished", ONE_PER_WAY, indirect=True)
def test_without_safety_answers_it_says_so_at_once_or_needs_none(finished, pico_stream, tmp_path):
    """Either before anything is computed, or never: not after an hour of training."""
    name, _, make = finished
    made = make(tmp_path / "run")
    stream = replace(pico_stream, safety_calibration=[])
    method = made.methods[name]
    if isinstance(method, ChecksStream):
        try:
            method.check_stream(stream)
        except CalibrationError:
            return
    run(replace(made, stream=replace(stream, tasks=stream.tasks[:1])), name)


def test_a_second_call_recomputes_nothing(finished):
    name, out, make = finished
    before = snapshot(out)
    run(make(out), name)
    assert snapshot(out) == before


@pytest.mark.parametrize("finished", ONE_PER_WAY, indirect=True)
def test_the_seed_of_the_run_file_reaches_the_training(finished, tmp_path):
    name, out, make = finished
    if name in LEARNS_NOTHING:
        assert weights(out, name, 1) == {}, "it wrote weights: take it off the list"
        return
    made = make(tmp_path / "run", seed=5)
    run(replace(made, stream=replace(made.stream, tasks=made.stream.tasks[:1])), name)
    ours, first = weights(tmp_path / "run", name, 1), weights(out, name, 1)
    # What the second step carried on is gone from the finished run.
    assert first and first.keys() <= ours.keys() and {file: ours[file] for file in first} != first
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["seed"] == 5


@pytest.mark.parametrize("finished", ONE_PER_WAY, indirect=True)
def test_killed_in_the_second_task_it_resumes_to_the_same_bytes(finished, tmp_path):
    name, out, make = finished
    if name in LEARNS_NOTHING:
        assert weights(out, name) == {}, "it wrote weights: take it off the list"
        return
    seen: list[str] = []

    def killer(event: str, **values) -> None:
        if values.get("step") == 1 and event != "step_done":
            seen.append(event)
        # Once in the middle of learning, once in the middle of what follows it.
        if seen.count("train") == 3 and event == "train" and len(kills) == 0:
            kills.append("train")
            raise KeyboardInterrupt
        if event in ("edit", "evaluate") and values.get("step") == 1 and len(kills) == 1:
            kills.append(event)
            raise KeyboardInterrupt

    kills: list[str] = []
    made = make(tmp_path / "run", killer)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(made, name)
    run(made, name)
    assert kills[0] == "train" and len(kills) == 2
    expected = weights(out, name)
    assert expected and weights(tmp_path / "run", name) == expected
    scores = [summarize_run(o)["methods"][name]["accuracy"] for o in (out, tmp_path / "run")]
    assert scores[0] == scores[1]
