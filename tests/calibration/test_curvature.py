"""From two sets and two checkpoints to one small file, alone and in two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from holdfast.calibration import curvature as calibrate
from holdfast.calibration.curvature import CalibrationConfig, collect_curvature, is_calibration_of, samples_sha256
from holdfast.calibration.walk import walk_grams
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.cli import app
from holdfast.cli.samples import read_samples, write_samples
from holdfast.data.types import Sample
from holdfast.editing.editor import edit_checkpoint
from holdfast.errors import CalibrationError, ConfigError, StorageError
from holdfast.functional.hessian import InputGram
from holdfast.functional.hpa import HpaConfig
from holdfast.models import memory
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.rules.hpa import HpaRule
from holdfast.stream.protocol import Checkpoint

UP = "model.language_model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def tuned(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    torch.manual_seed(3)
    model = get_peft_model(
        load(llava_folder, device="cpu", trainable=True).model,
        LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*_proj", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    return Checkpoint(base=str(llava_folder), adapters=(str(folder),))


@pytest.fixture(scope="module")
def curvature(llava_folder: Path, tuned: Checkpoint, samples: list[Sample]) -> Curvature:
    return collect_curvature(llava_folder, tuned, samples[:2], samples, device="cpu")


def diagonal(loaded: LoadedModel, samples: list[Sample], name: str, damping: float = 0.01) -> torch.Tensor:
    found: dict[str, InputGram] = {}
    walk_grams(loaded, samples, lambda layer: found.update(dict.fromkeys(layer.modules, layer.gram)))
    return found[name].inverse_diagonal(damping)


def test_safety_comes_from_before_and_task_from_after(
    curvature: Curvature, loaded: LoadedModel, tuned: Checkpoint, samples: list[Sample]
) -> None:
    assert torch.equal(curvature.safety[UP], diagonal(loaded, samples[:2], UP))
    assert torch.equal(curvature.task[UP], diagonal(load(tuned, device="cpu"), samples, UP))


@pytest.mark.parametrize("activations", ["old", "new"])
def test_both_sets_can_come_from_one_model(
    llava_folder: Path, loaded: LoadedModel, tuned: Checkpoint, samples: list[Sample], activations: str
) -> None:
    config = CalibrationConfig(activations=activations)  # type: ignore[arg-type]
    made = collect_curvature(llava_folder, tuned, samples[:2], samples, config=config, device="cpu")
    one = loaded if activations == "old" else load(tuned, device="cpu")
    assert torch.equal(made.safety[UP], diagonal(one, samples[:2], UP))
    assert torch.equal(made.task[UP], diagonal(one, samples, UP))


def test_the_record_says_what_was_measured(curvature: Curvature, samples: list[Sample], llava_folder: Path) -> None:
    meta = curvature.meta
    assert meta["block_count"] == 2
    assert meta["blocks"][UP] == 1
    assert meta["weight_keys"][UP].endswith("layers.1.mlp.up_proj.weight")
    assert meta["sets"]["safety"]["sequences"] == 2
    assert meta["sets"]["task"]["data_sha256"] == samples_sha256(samples)
    assert meta["sets"]["task"]["tokens_over_width"][f"{UP[:-7]}gate_proj"] > 1
    assert meta["config"]["damping"] == 0.01
    assert len(meta["model"]["before"]["fingerprint"]) == 64
    assert meta["model"]["before"]["fingerprint"] == meta["model"]["after"]["fingerprint"]
    assert len(meta["model"]["after"]["adapters"]) == 1
    assert [f"{UP[:-7]}gate_proj", UP] in meta["inputs"]


def test_the_same_calibration_gives_the_same_bytes(
    curvature: Curvature, llava_folder: Path, tuned: Checkpoint, samples: list[Sample], tmp_path: Path
) -> None:
    curvature.save(tmp_path / "one.safetensors")
    collect_curvature(llava_folder, tuned, samples[:2], samples, device="cpu").save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert Curvature.load(tmp_path / "one.safetensors").digest() == curvature.digest()


def test_weights_too_large_for_the_budget_are_streamed(
    curvature: Curvature, llava_folder: Path, tuned: Checkpoint, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_RESIDENT_SHARE", 0.0)
    streamed = collect_curvature(llava_folder, tuned, samples[:2], samples, memory_bytes=2**34, device="cpu")
    for name, values in curvature.task.items():
        torch.testing.assert_close(streamed.task[name], values, rtol=1e-5, atol=0)
        assert torch.equal(streamed.safety[name], curvature.safety[name])


def test_without_a_budget_a_model_beyond_free_memory_is_streamed(
    llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calibrate.open_model(llava_folder, device="cpu").blocks_on_disk is None
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
    assert calibrate.open_model(llava_folder, device="cpu").blocks_on_disk is not None


def group(folder: Path, limit: str, used: int, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip((*names, "memory.stat"), (limit, used, "anon 500\ninactive_file 150"), strict=True):
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_stays_within_every_group_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    own = tmp_path / "own"
    own.write_text("0::/slurm/job\n" if version == 2 else "9:cpu:/x\n4:memory,hugetlb:/slurm/job\n0::/\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", own)
    root = tmp_path if version == 2 else tmp_path / "memory"
    unlimited = "max" if version == 2 else "9223372036854771712"
    # The container's own group is the root, whatever the path says; a job's limit may stand on any level.
    for where in ("", "slurm", "slurm/job"):
        for level in ("", "slurm", "slurm/job"):
            group(root / level, "1000" if level == where else unlimited, 700, version=version)
        assert [*memory.quotas().values()] == [450] and memory.free_memory_bytes() == 450
    for level in ("", "slurm", "slurm/job"):
        group(root / level, unlimited, 700, version=version)
    assert memory.quotas() == {}
    group(root / "slurm", "100", 700, version=version)
    assert [*memory.quotas().values()] == [0]


def test_an_empty_set_is_named(loaded: LoadedModel, samples: list[Sample]) -> None:
    with pytest.raises(CalibrationError, match="safety calibration set is empty; the edit weighs it against the task"):
        collect_curvature(loaded, loaded, [], samples)
    with pytest.raises(CalibrationError, match="task calibration set is empty"):
        collect_curvature(loaded, loaded, samples, [])


def test_safety_samples_without_an_answer_are_refused(loaded: LoadedModel, samples: list[Sample]) -> None:
    mute = replace(samples[0], turns=samples[0].request, references=())
    with pytest.raises(CalibrationError, match=r"1 of 2 safety .* have no answer .* `holdfast calibrate-data`"):
        collect_curvature(loaded, loaded, [samples[1], mute], samples)
    referenced = replace(mute, references=("I will not.",))
    collect_curvature(loaded, loaded, [referenced], samples, blocks=[0])


def test_a_device_that_is_not_there_is_named(llava_folder: Path) -> None:
    for name in ("tpu", "cuda:77", "xpu"):
        with pytest.raises(ConfigError, match=rf"device is '{name}'; expected one of this machine: cpu"):
            calibrate.open_model(llava_folder, device=name)
    assert memory.find_device("cpu") == torch.device("cpu")


def test_sums_over_sets_of_unlike_size_warn(loaded: LoadedModel, samples: list[Sample]) -> None:
    with pytest.warns(UserWarning, match=r"1 safety and 5 task samples: the larger set drowns the other"):
        collect_curvature(loaded, loaded, samples[:1], samples, config=CalibrationConfig(normalization="sum"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": 0.0}, "damping is 0.0"),
        ({"shrinkage": 1.0}, "shrinkage is 1.0"),
        ({"tokens": "images"}, "tokens is 'images'; expected one of all, text, answer"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_nonsense_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig(**change)  # type: ignore[arg-type]


@pytest.fixture
def files(samples: list[Sample], pictures: list[Path], tmp_path: Path) -> tuple[Path, Path]:
    root = pictures[0].parent
    write_samples(tmp_path / "safety.jsonl", samples[:3], image_root=root)
    write_samples(tmp_path / "task.jsonl", samples, image_root=root)
    return tmp_path / "safety.jsonl", tmp_path / "task.jsonl"


def arguments(model: Path, after: str, files: tuple[Path, Path], images: Path, out: Path) -> list[str]:
    safety, task = map(str, files)
    roots = ["--safety-images", str(images), "--task-images", str(images)]
    return ["calibrate", str(model), "--after", after, "--safety", safety, "--task", task, "--out", str(out), *roots]


def test_written_samples_read_back(files: tuple[Path, Path], samples: list[Sample], pictures: list[Path]) -> None:
    back = read_samples(files[1], images=pictures[0].parent)
    assert [(s.id, s.images) for s in back] == [(s.id, s.images) for s in samples]
    assert [len(s.turns) for s in back] == [2, 2, 2, 4, 2]


def test_two_processes_agree_with_one(
    llava_folder: Path, tuned: Checkpoint, files: tuple[Path, Path], pictures: list[Path], tmp_path: Path
) -> None:
    """The command under the environment that `accelerate launch` sets, over gloo."""
    images, adapter = pictures[0].parent, tuned.adapters[0]
    alone = tmp_path / "alone.safetensors"
    result = CliRunner().invoke(app, [*arguments(llava_folder, adapter, files, images, alone), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "3 sequences" in result.output and "5 sequences" in result.output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = tmp_path / "together.safetensors"
    command = [sys.executable, "-m", "holdfast", *arguments(llava_folder, adapter, files, images, together)]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, "--device", "cpu"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + 280
    try:
        errors = [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], errors
    one, two = Curvature.load(alone), Curvature.load(together)
    for name in one.safety:
        torch.testing.assert_close(two.safety[name], one.safety[name], rtol=2e-4, atol=0)
        torch.testing.assert_close(two.task[name], one.task[name], rtol=2e-4, atol=0)
    counts = [json.loads(json.dumps(c.meta["sets"])) for c in (one, two)]
    assert counts[0]["task"]["tokens"] == counts[1]["task"]["tokens"]
    assert counts[0]["task"]["sequences"] == counts[1]["task"]["sequences"] == 5


def test_without_a_second_model_the_record_says_old(
    llava_folder: Path, files: tuple[Path, Path], pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "c.safetensors"
    options = arguments(llava_folder, "", files, pictures[0].parent, out)
    del options[2:4]
    result = CliRunner().invoke(app, [*options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "activations: old, MODEL's for both sets" in result.output
    assert Curvature.load(out).meta["config"]["activations"] == "old"
    again = CliRunner().invoke(app, [*options, "--device", "cpu"])
    assert isinstance(again.exception, StorageError) and "or pass --overwrite" in str(again.exception)


def test_one_set_for_both_and_a_limit_of_nothing_are_refused(
    llava_folder: Path, files: tuple[Path, Path], pictures: list[Path], tmp_path: Path
) -> None:
    same = (files[1], files[1].parent / "." / files[1].name)
    options = arguments(llava_folder, str(llava_folder), same, pictures[0].parent, tmp_path / "c.safetensors")
    assert "are the same 5 samples" in str(CliRunner().invoke(app, options).exception)
    for limit in ("0", "-5"):
        options = arguments(llava_folder, str(llava_folder), files, pictures[0].parent, tmp_path / "c.safetensors")
        result = CliRunner().invoke(app, [*options, "--limit", limit])
        assert result.exit_code == 2 and "--limit" in result.output
    assert not (tmp_path / "c.safetensors").exists()


def test_an_out_that_cannot_be_written_is_found_before_the_models_are_loaded(
    files: tuple[Path, Path], pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "c.safetensors"
    result = CliRunner().invoke(app, arguments(Path("no-model"), "none", files, pictures[0].parent, out))
    assert isinstance(result.exception, StorageError) and "could not be written" in str(result.exception)


def lora(base: Path, folder: Path, targets: str) -> Checkpoint:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    get_peft_model(load(base, device="cpu", trainable=True).model, config).save_pretrained(folder)
    return Checkpoint(base=str(base), adapters=(str(folder),))


def test_of_an_adapter_only_what_it_changes_is_measured(
    llava_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    tuned = lora(llava_folder, tmp_path / "adapter", r".*language_model.*(v_proj|o_proj)")
    one, two = (
        collect_curvature(llava_folder, tuned, samples[:2], samples, device="cpu", adapted_only=only)
        for only in (True, False)
    )
    assert {name.rpartition(".")[2] for name in one.modules} == {"v_proj", "o_proj"}
    assert len(two.modules) > len(one.modules)
    for name in one.modules:
        assert torch.equal(one.safety[name], two.safety[name]) and torch.equal(one.task[name], two.task[name])
    edited = [
        edit_checkpoint(
            llava_folder,
            tuned,
            rule=HpaRule(HpaConfig(projection="none")),
            curvature=c,
            out=tmp_path / str(len(c.modules)),
            export="adapter",
            coefficient="drop",
            verify=False,
        )
        for c in (one, two)
    ]
    assert edited[0].layers and edited[0].layers == edited[1].layers
    files = [tmp_path / str(len(c.modules)) / "adapter_model.safetensors" for c in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_an_adapter_everything_is_measured(llava_folder: Path, samples: list[Sample]) -> None:
    asked = collect_curvature(llava_folder, llava_folder, samples[:2], samples, device="cpu", adapted_only=True)
    assert UP in asked.modules


def test_an_adapter_of_other_layers_is_refused(llava_folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    tuned = lora(llava_folder, tmp_path / "adapter", r".*vision_tower.*q_proj")
    with pytest.raises(CalibrationError, match="changes no linear layer of the blocks to calibrate"):
        collect_curvature(llava_folder, tuned, samples[:2], samples, device="cpu", adapted_only=True)


def test_an_unknown_linear_is_named(loaded: LoadedModel, samples: list[Sample]) -> None:
    with pytest.raises(CalibrationError, match=r"has no linear layer model\.none in the blocks"):
        walk_grams(loaded, samples, lambda layer: None, linears=["model.none"])


def test_a_calibration_is_known_by_models_samples_and_options(
    curvature: Curvature, llava_folder: Path, tuned: Checkpoint, samples: list[Sample]
) -> None:
    config = CalibrationConfig()
    assert is_calibration_of(curvature, llava_folder, tuned, samples[:2], samples, config)
    assert not is_calibration_of(curvature, llava_folder, llava_folder, samples[:2], samples, config)
    assert not is_calibration_of(curvature, llava_folder, tuned, samples, samples, config)
    assert not is_calibration_of(curvature, llava_folder, tuned, samples[:2], samples, CalibrationConfig(damping=0.1))


def test_a_size_that_is_no_size_is_refused(llava_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    options = arguments(llava_folder, str(llava_folder), files, tmp_path, tmp_path / "x.safetensors")
    result = CliRunner().invoke(app, [*options, "--memory", "lots"])
    assert isinstance(result.exception, ConfigError)
    assert "size 'lots' is not understood" in str(result.exception)
