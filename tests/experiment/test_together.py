"""Several processes that learn every task together (gloo, CPU): the results of one, written by one, resumed by all."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import pico
from fork_server import ForkServer
from holdfast import experiment
from holdfast.checkpoints.value import Checkpoint
from holdfast.data.types import Sample
from holdfast.errors import ConfigError, ModelError, RunError
from holdfast.experiment.together import refuse_together
from holdfast.methods import METHODS, get
from holdfast.models.generate import generate
from holdfast.models.load import load
from holdfast.models.processes import joined, wants_shards
from holdfast.models.shards import load_shards
from holdfast.share import ALONE, Share, alone, current, is_alone, sharing
from holdfast.stream.protocol import LearnsTogether
from holdfast.training.dealt import deal
from holdfast.training.training_config import TrainingConfig

# Sums over two parts of a batch round in another order than over the whole, and Adam divides small gradients by their
# own size: a weight may move by this much, where a step moves it by 1e-3.
TOLERANCE = 1e-5
# Dropout is another draw in every process, so what is compared has none. Five samples and batches of four: the last
# batch of an epoch leaves one of two processes without a sample.
TRAINING = {
    "rank": 2,
    "alpha": 4,
    "dropout": 0.0,
    "max_steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "save_steps": 1,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "hpa": {},
    "cram_guard": {"cram": {"dropout": 0.0}, "guard_false_alarm": 0.9, "guard_requests": 8},
}
SHARDED = {"hpa": True}
# In the stable phase of the second task, which begins with the third step: a saved state is there.
KILLS = {"cram_guard": [1, "train", 1, 4], "hpa": [0, "train", 1, 3]}
PROGRAM = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
import accelerate, peft, transformers
from holdfast.methods import cram, hpa, seqft
from stream_worker import together as main
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(PROGRAM) as server:
        yield server


def start(server: ForkServer, *jobs: dict[str, Any]) -> str:
    """Run jobs in two processes; what went wrong, or the empty text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return server.run(json.dumps(jobs, default=str), port)[1]


@pytest.fixture(scope="module")
def files(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run files, one a method; the model's own answers for those that calibrate, and benign prompts that it answers."""
    shown = pico.pictures(tmp_path_factory.mktemp("shown"))
    # The tasks' own requests, so that a guard finds all of them alike.
    asked = [Sample.single(f"own-{i}", f"<image>\nWhich? {i}", images=[shown[c]]) for i, c in enumerate(sorted(shown))]
    answers = generate(load(pico_folder, device="cpu"), asked, max_new_tokens=4)
    own = [
        {"id": s.id, "prompt": s.prompt, "image": f"images/{s.images[0].name}", "answer": a}
        for s, a in zip(asked, answers, strict=True)
        if a
    ]
    made = {}
    for name, options in OPTIONS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = pico.run_file(
            folder, pico_folder, methods={name: options}, defaults={"training": TRAINING, "task_samples": 4}
        )
        data = yaml.safe_load(made[name].read_text())
        data["stream"]["benign_calibration"] = {"format": "qa", "file": "twins.jsonl"}
        data["benign_calibration"] = {"max_new_tokens": 4}
        data["evaluation"] = {"batch_size": 2, "limit": 2}
        if SHARDED.get(name):
            data["defaults"]["screening"] = {"max_new_tokens": 2}
            data["defaults"]["training"] |= {"micro_batch_size": 1, "gradient_checkpointing": True, "screen": "report"}
        made[name].write_text(yaml.safe_dump(data))
        twins = [{"id": f"twin-{i}", "prompt": f"Allowed too {i}"} for i in range(4)]
        for file, rows in (("prompts", own), ("twins", twins)):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for task in ("colour", "name"):
            path = folder / f"{task}-train.json"
            path.write_text(json.dumps(json.loads(path.read_text())[:5]))
    return made


@pytest.fixture(scope="module")
def by_two(
    server: ForkServer, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The finished run of two processes with a method."""

    @cache
    def run(name: str) -> Path:
        out = tmp_path_factory.mktemp("two") / name
        assert start(server, {"file": files[name], "out": out, "fsdp": SHARDED.get(name, False)}) == ""
        return out

    return run


def tensors(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(p.relative_to(out)): load_file(p) for p in sorted(out.rglob("*.safetensors"))}


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_end_where_one_does(
    name: str, files: dict[str, Path], by_two: Callable[[str], Path], tmp_path: Path
) -> None:
    """Copies of the base, or its shards (hpa): the same files, weights within rounding, the same scores and ranks."""
    summary = experiment.run(experiment.read_run(files[name]), tmp_path / "one")
    one, two = tensors(tmp_path / "one"), tensors(by_two(name))
    assert one.keys() == two.keys() and len(one) >= 2
    for file, expected in one.items():
        assert expected.keys() == two[file].keys()
        for key, value in expected.items():
            # A statistic over samples is taken by one process, of the same samples: only weights differ.
            torch.testing.assert_close(two[file][key], value, rtol=1e-4, atol=TOLERANCE, msg=f"{file}: {key}")
    other = json.loads((by_two(name) / "summary.json").read_text())
    assert other["methods"][name]["accuracy"] == summary["methods"][name]["accuracy"]
    for record in ("cram.json", "guard.json", "training.json"):
        for step in sorted((tmp_path / "one" / "methods" / name).glob(f"*/{record}")):
            there = json.loads((by_two(name) / step.relative_to(tmp_path / "one")).read_text())
            assert there.keys() == json.loads(step.read_text()).keys()
            if record == "cram.json":
                assert there == json.loads(step.read_text())  # groups, ranks and how each came about
    assert json.loads((by_two(name) / "config.json").read_text())["config"]["processes"] == {
        "number": 2,
        "base": "shards" if SHARDED.get(name) else "copies",
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_killed_they_resume_to_the_same_bytes(
    name: str, server: ForkServer, files: dict[str, Path], by_two: Callable[[str], Path], tmp_path: Path
) -> None:
    job = {"file": files[name], "out": tmp_path / "run", "fsdp": SHARDED.get(name, False)}
    assert "ended with 9" in start(server, {**job, "kill": KILLS[name]})
    assert start(server, job) == ""

    expected, found = tensors(by_two(name)), tensors(tmp_path / "run")
    assert expected.keys() == found.keys()
    for file, values in expected.items():
        assert values.keys() == found[file].keys()
        assert all(torch.equal(found[file][key].view(torch.uint8), v.view(torch.uint8)) for key, v in values.items())


def test_a_process_holds_its_shard_of_every_block(server: ForkServer, pico_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model.*v_proj", init_lora_weights=False)
    get_peft_model(load(pico_folder, device="cpu", trainable=True).model, lora).save_pretrained(tmp_path / "lora")
    assert start(server, {"shards": {"model": pico_folder, "adapter": tmp_path / "lora"}}) == ""


def test_experts_are_not_put_on_shards(tmp_path: Path) -> None:
    (tmp_path / "holdfast_tuner.json").write_text('{"tuner": "cram"}')
    with pytest.raises(ModelError, match="decides per request which adapters answer"):
        load_shards(Checkpoint(base="anything", adapters=(str(tmp_path),)))


def test_a_run_directory_belongs_to_a_number_of_processes(
    files: dict[str, Path], by_two: Callable[[str], Path]
) -> None:
    with pytest.raises(RunError, match="processes"):
        experiment.run(experiment.read_run(files["hpa"]), by_two("hpa"))


# Those that learn in a way of their own, and say nothing of several processes.
ALONE_ONLY = {"guardspace", "many", "one_shot", "osf", "safe_anchor"}
NEEDED = {"safe_lora": {"unaligned": "x"}, "resta": {"unaligned": "x"}, "moelora": {"experts": 2}}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_that_cannot_is_refused_before_anything_is_done(name: str, files: dict[str, Path], tmp_path: Path):
    config = replace(experiment.read_run(files["hpa"]), methods={name: NEEDED.get(name, {})})
    method = get(name, **NEEDED.get(name, {}))
    assert isinstance(method, LearnsTogether)
    assert bool(method.together) == (name not in ALONE_ONLY)
    for way in ("copies", "shards"):
        made = experiment.Experiment(
            config=config, out=tmp_path / "run", stream=None, methods=experiment.build_methods(config)
        )
        if way in method.together:
            refuse_together(made.config, made.methods, Share(world=2, sharded=way == "shards"))
            continue
        with pytest.raises(ConfigError, match=f"Method '{name}' cannot learn in 2 processes"):
            refuse_together(made.config, made.methods, Share(world=2, sharded=way == "shards"))
        refuse_together(made.config, made.methods, ALONE)
    assert not (tmp_path / "run").exists()


def test_a_subclass_that_learns_in_its_own_way_claims_nothing() -> None:
    from holdfast.methods.cram import Cram
    from holdfast.methods.seqft import SeqFT

    class Own(SeqFT):
        def train_task(self, ctx: Any) -> Any: ...

    class Penalised(SeqFT):
        def training_options(self, ctx: Any) -> Any: ...

    class OwnCram(Cram):
        def train_task(self, ctx: Any) -> Any: ...

    assert [set(m().together) for m in (Own, Penalised, OwnCram)] == [set(), {"copies"}, set()]
    assert "shards" in get("hpa").together and "shards" not in get("hpa", screen=True).together


@pytest.mark.parametrize(
    ("changes", "share", "sentence"),
    [
        ({"backend": "vllm"}, Share(world=2), "takes the devices for itself"),
        ({}, Share(world=3), "batch_size 4 cannot be dealt out evenly over 3 processes"),
        ({}, Share(world=2, sharded=True), "safety_gate asks every checkpoint on one device"),
    ],
)
def test_what_does_not_go_together_is_said(changes: dict[str, Any], share: Share, sentence: str, files, tmp_path):
    config = experiment.read_run(files["hpa"])
    config = replace(config, evaluation=replace(config.evaluation, **changes))
    if share.sharded:
        data = {**yaml.safe_load(files["hpa"].read_text()), "safety_gate": {"max_asr": 0.5, "probe": PROBE}}
        config = experiment.decode_run(data, base=files["hpa"].parent)
    made = experiment.Experiment(config=config, out=tmp_path, stream=None, methods=experiment.build_methods(config))
    with pytest.raises(ConfigError, match=sentence):
        refuse_together(made.config, made.methods, share)


PROBE = {"name": "probe", "format": "qa", "options": {"unsafe": "unsafe.jsonl"}}


# Samples, batch, forward pass, processes.
DEALS = [(5, 4, 4, 2), (5, 4, 1, 2), (16, 8, 2, 4), (17, 8, 3, 4), (3, 8, 8, 4), (7, 6, 2, 3), (1, 2, 2, 2)]


@pytest.mark.parametrize(("count", "batch", "forward", "world"), DEALS)
def test_batches_are_those_of_one_process_in_parts(count: int, batch: int, forward: int, world: int) -> None:
    config = TrainingConfig(batch_size=batch, micro_batch_size=forward if batch % forward == 0 else None)
    dealt = [deal(count, config, Share(rank=rank, world=world), 7) for rank in range(world)]
    for epoch in (0, 1):
        for one in dealt:
            one.set_epoch(epoch)
        passes = [list(one) for one in dealt]
        assert {len(p) for p in passes} == {len(dealt[0])}, "every process runs as many passes"
        size, steps = dealt[0].passes, -(-len(dealt[0]) // dealt[0].passes)
        assert steps == -(-count // batch)
        seen: list[int] = []
        for step in range(steps):
            mine = [p for own in passes for p in own[step * size : (step + 1) * size]]
            learned = [i for p in mine for i in p if i >= 0]
            assert all(len(p) == 1 or min(p) >= 0 for p in mine), "an idle pass is idle as a whole"
            assert len(learned) == min(batch, count - step * batch)
            assert max(map(len, mine)) <= config.forward_size
            seen += learned
        assert sorted(seen) == list(range(count))


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 3 cannot be dealt out evenly over 2 processes"):
        deal(8, TrainingConfig(batch_size=3), Share(world=2), 0)
    assert deal(8, TrainingConfig(batch_size=3), ALONE, 0) is None


def test_what_the_first_process_does_alone() -> None:
    said: list[Any] = []
    chief = Share(rank=0, world=2, tell=lambda value: said.append(value) or value)

    def work() -> bool:
        assert current() is not chief
        return is_alone()

    with sharing(chief):
        assert current() is chief and not is_alone()
        assert chief.by_chief(work) is True
        with alone():
            assert is_alone() and current().chief and current().world == 1
    assert said == [""] and current() is ALONE
    with pytest.raises(ValueError, match="broken"):
        chief.by_chief(lambda: (_ for _ in ()).throw(ValueError("broken")))
    assert said[-1] == "ValueError: broken"
    other = Share(rank=1, world=2, tell=lambda value: said[-1])
    with pytest.raises(RunError, match="The first process stopped: ValueError: broken"):
        other.by_chief(lambda: pytest.fail("not its work"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"ACCELERATE_USE_FSDP": "false"}, False),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DeepSpeed"),
    ],
)
def test_what_the_launcher_was_configured_for(environment: dict[str, str], expected: Any) -> None:
    if isinstance(expected, bool):
        assert wants_shards(environment) is expected
    else:
        with pytest.raises(ConfigError, match=expected):
            wants_shards(environment)


def test_shards_need_more_than_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="this is the only one"), joined(shard=True):
        pass
    with joined() as share:
        assert share is ALONE
