"""Run files: every mistake is a sentence before the work begins; several processes give the results of one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import pico
from holdfast import experiment
from holdfast.data.inventory import check_models
from holdfast.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RunError,
    UnknownNameError,
)
from holdfast.experiment.resolve import resolve
from holdfast.stream.summary import without_timings


@pytest.fixture
def run_file(tmp_path, pico_folder):
    def write(**changes) -> Path:
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        return pico.run_file(folder, pico_folder, **changes)

    return write


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))}


def test_methods_that_the_file_does_not_name_may_be_asked_for(run_file, tmp_path):
    """As `holdfast run --method` does, and as the README's lines of Python ask of a run file that comes along."""
    config = experiment.read_run(run_file(methods={"seqft": {}, "half": {"method": "interpolation", "factor": 0.5}}))
    assert list(experiment.run(config, tmp_path / "run", methods=["frozen"])["methods"]) == ["frozen"]
    kept = experiment.only(config, ["half", "frozen"])
    assert kept.methods == {"half": config.methods["half"], "frozen": {}}
    with pytest.raises(UnknownNameError, match="frozn"):
        experiment.run(config, tmp_path / "other", methods=["frozn"])
    root = Path(__file__).parents[2]
    [block] = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    file, names = re.findall(r'read_run\("(.*?)"\).*methods=(\[.*?\])', block)[0]
    asked = json.loads(names)
    assert list(experiment.build_methods(experiment.only(experiment.read_run(root / file), asked))) == asked


def test_two_processes_give_the_results_of_one(run_file, tmp_path):
    methods = {"seqft": {}, "half": {"method": "interpolation", "factor": 0.5}}
    config = experiment.read_run(run_file(methods=methods, store_dtype="float32"))
    seen: set[tuple[str, int]] = set()

    def progress(event, *, method="", step=0, **_):
        if event == "step_done":
            seen.add((method, step))

    one = experiment.run(config, tmp_path / "one", progress=progress)
    assert seen == {(m, s) for m in methods for s in (0, 1)}
    seen.clear()
    two = experiment.run(config, tmp_path / "two", jobs=2, progress=progress)
    assert seen == {(m, s) for m in methods for s in (0, 1)}
    assert tensors(tmp_path / "one") and tensors(tmp_path / "one") == tensors(tmp_path / "two")
    assert without_timings(one) == without_timings(two)
    assert all(m["complete"] for m in one["methods"].values())
    assert one["methods"]["half"]["config"]["factor"] == 0.5
    assert json.loads((tmp_path / "one" / "theta_0" / "checkpoint" / "config.json").read_text())["dtype"] == "float32"


def test_an_error_in_a_worker_is_the_error_of_the_run(run_file, tmp_path):
    # No safety answer is kept from a random model, so what needs a calibration fails, in whichever process it runs.
    config = experiment.read_run(run_file(methods=["hpa", "hpa_eps"]))
    with pytest.raises(
        CalibrationError, match=r"hpa(_eps)? needs safety calibration samples, and stream 'pico' has none"
    ):
        experiment.run(config, tmp_path / "run", jobs=2)


def test_a_changed_file_is_refused_in_an_old_directory(run_file, tmp_path):
    config = experiment.read_run(run_file())
    experiment.run(config, tmp_path / "run")
    changed = dataclasses.replace(config, defaults={"training": {**config.defaults["training"], "rank": 3}})
    with pytest.raises(RunError, match=r"methods\.seqft\.training\.rank: 2 -> 3"):
        experiment.run(changed, tmp_path / "run")
    with pytest.raises(RunError, match=r"seed: 0 -> 1"):
        experiment.run(dataclasses.replace(config, seed=1), tmp_path / "run")
    resolve(config, tmp_path / "run").refuse_changed()
    (tmp_path / "files" / "colour-test.json").write_text(
        (tmp_path / "files" / "colour-test.json").read_text().replace("Which?", "What?")
    )
    with pytest.raises(RunError, match=r"is finished, .*\(data_sha256\.colour: "):
        resolve(config, tmp_path / "run").refuse_changed()
    with pytest.raises(RunError, match=r"data_sha256\.colour: '"):
        experiment.run(config, tmp_path / "run")


def test_changed_calibration_prompts_are_refused_in_an_old_directory(run_file, tmp_path):
    config = experiment.read_run(run_file())
    experiment.run(config, tmp_path / "run")
    prompts = tmp_path / "files" / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("prompts 1", "something else"))
    with pytest.raises(RunError, match=r"calibration_sha256: '"):
        experiment.run(config, tmp_path / "run")


def test_another_picture_of_the_same_name_is_other_data(run_file, tmp_path):
    config = experiment.read_run(run_file())
    experiment.run(config, tmp_path / "run")
    (tmp_path / "files" / "images" / "b").mkdir()
    (tmp_path / "files" / "images" / "red.png").rename(tmp_path / "files" / "images" / "b" / "red.png")
    for file in (tmp_path / "files").glob("*.json"):
        file.write_text(file.read_text().replace("images/red.png", "images/b/red.png"))
    with pytest.raises(RunError, match=r"data_sha256\.colour: '"):
        experiment.run(config, tmp_path / "run")


def test_a_task_that_comes_later_is_added_to_the_experts_that_are_there(run_file, tmp_path):
    """A team adds tasks for years: the directory goes on, and ends as a stream that had both tasks from the start."""
    methods = {"cram": {"cram": {"buffer_rank": 4, "rank": {"r_min": 1, "r_max": 2}}, "training": {"max_steps": 2}}}
    config = experiment.read_run(run_file(methods=methods))
    whole = experiment.run(config, tmp_path / "whole")
    stream = dataclasses.replace(config.stream, tasks=config.stream.tasks[:1])
    first = experiment.run(dataclasses.replace(config, stream=stream), tmp_path / "run")
    assert first["tasks"] == ["colour"] and first["methods"]["cram"]["complete"]
    record = tmp_path / "run" / "methods" / "cram" / "1-colour" / "record.json"
    before = record.read_bytes()
    both = experiment.run(config, tmp_path / "run")
    assert record.read_bytes() == before
    assert both["tasks"] == ["colour", "name"] and list(both["theta_0"]["scores"]) == ["colour", "name"]
    assert without_timings(both) == without_timings(whole)
    assert tensors(tmp_path / "run") == tensors(tmp_path / "whole")


def test_calibration_prompts_that_are_test_prompts_are_refused_before_the_work(run_file, tmp_path):
    file = run_file(methods=["hpa"])
    (tmp_path / "files" / "prompts.jsonl").write_text((tmp_path / "files" / "unsafe.jsonl").read_text())
    with pytest.raises(DataError, match="unsafe-0"):
        experiment.resolve(experiment.read_run(file), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_injected_pairs_are_learned_and_logged(run_file, tmp_path):
    file = run_file(injection={"fraction": 0.3, "pool": {"format": "qa", "file": "pairs.jsonl"}})
    pairs = [{"id": f"bad-{i}", "prompt": "unsafe", "answer": "sure"} for i in range(3)]
    (tmp_path / "files" / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    made = experiment.resolve(experiment.read_run(file), tmp_path / "run")
    assert [len(t.train) for t in made.stream.tasks] == [8, 8]
    with made.held():
        logged = json.loads((tmp_path / "run" / "injected.json").read_text())
    assert [row["n_injected"] for row in logged] == [2, 2]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"methods": ["hpaa"]}, UnknownNameError, r"Unknown method 'hpaa'\. Did you mean 'hpa'\?"),
        (
            {"methods": {"hpa": {"edits": {}}}},
            UnknownNameError,
            r"methods\.hpa\.edits: unknown key\. Did you mean 'edit'\?",
        ),
        ({"methods": []}, ConfigError, "methods is empty; name at least one"),
        ({"methods": 3}, ConfigError, "methods: found 3, expected a list of names or a mapping"),
        ({"metods": ["hpa"]}, UnknownNameError, r"metods: unknown key\. Did you mean 'methods'\?"),
        (
            {"defaults": {"trainin": {}}},
            UnknownNameError,
            r"defaults\.trainin: no method has this option\. Did you mean 'training'\?",
        ),
        (
            {"defaults": {"training": {"rnak": 3}}},
            UnknownNameError,
            r"methods\.seqft\.training\.rnak: unknown key\. Did you mean 'rank'\?",
        ),
        ({"defaults": {"training": {"rank": "4"}}}, ConfigError, r"training\.rank: found '4' \(str\), expected int"),
        ({"evaluation": {"batch_size": 0}}, ConfigError, "batch_size is 0; expected 1 or more"),
        ({"threads": 0}, ConfigError, "threads is 0; expected 1 or more"),
        ({"seed": -1}, ConfigError, r"seed is -1; expected 0\.\.4000000"),
        ({"injection": {"fraction": 5}}, ConfigError, r"fraction is 5\.0; expected a share in \(0, 1\]"),
        ({"methods": {"../../up": {"method": "seqft"}}}, ConfigError, r"label '\.\./\.\./up' cannot be a folder name"),
        ({"methods": ["a/b"]}, ConfigError, "label 'a/b' cannot be a folder name"),
        (
            {"methods": ["hpa"], "safety_calibration": {"judge": "keywrod"}},
            UnknownNameError,
            r"judge of this run 'keywrod'\. Did you mean 'keyword'",
        ),
        ({"stream": "missing.yaml"}, DataError, r"missing\.yaml"),
        ({"tasks": ["colour", "size"]}, DataError, "has no task 'size'"),
    ],
)
def test_a_mistake_in_a_run_file_is_named(run_file, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        experiment.resolve(experiment.read_run(run_file(**changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stream_file_alone_is_no_run_file(run_file, tmp_path):
    (tmp_path / "stream.yaml").write_text("name: x\ntasks: []\n")
    with pytest.raises(ConfigError, match="is no run file: it has no `model`"):
        experiment.read_run(tmp_path / "stream.yaml")


def test_a_missing_image_an_empty_split_and_a_missing_model_are_named(run_file, tmp_path):
    file = run_file()
    (tmp_path / "files" / "images" / "red.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(DataError, match=r"red\.png"):
        experiment.run(experiment.read_run(file), tmp_path / "a")
    (tmp_path / "files" / "name-train.json").write_text("[]")
    with pytest.raises(DataError, match=r"Task 'name', train split .* is empty; expected at least one sample"):
        experiment.run(experiment.read_run(file), tmp_path / "b")
    for model in (str(tmp_path / "nowhere"), "nowhere"):
        config = dataclasses.replace(experiment.read_run(run_file()), model=model)
        with pytest.raises((ConfigError, ModelError, CheckpointError), match="nowhere"):
            experiment.run(config, tmp_path / "c")


def test_a_method_that_the_file_does_not_name_gets_its_defaults(run_file):
    config = experiment.only(experiment.read_run(run_file()), ["random_columns"])
    made = experiment.build_methods(config)["random_columns"]
    assert made.config.training.rank == 2


def test_presets_stand_over_defaults_and_under_own_options(run_file):
    config = experiment.read_run(
        run_file(methods={"hpa_eps": {}, "mine": {"method": "hpa_eps", "edit": {"saliency": "phi"}}})
    )
    config = dataclasses.replace(
        config, defaults={**config.defaults, "edit": {"keep_bounds": [1, 2], "saliency": "eps+phi"}}
    )
    made = experiment.build_methods(config)
    assert (made["hpa_eps"].config.edit.saliency, made["hpa_eps"].config.edit.keep_bounds) == ("eps", (1.0, 2.0))
    assert made["mine"].config.edit.saliency == "phi" and made["mine"].name == "mine"


@pytest.mark.parametrize("method", ["hpa", "anchor", "interpolation", "cram_anchor", "cram_hpa", "seqft"])
def test_a_default_of_a_group_reaches_the_methods_whose_group_has_it(run_file, method):
    """HPA and the anchored edit both have `edit`, with other options in it."""
    config = experiment.read_run(run_file())
    shared = {"edit": {"keep_bounds": [1, 2], "past_weight": 0.5}}
    config = dataclasses.replace(config, methods={method: {}}, defaults={**config.defaults, **shared})
    edit = getattr(experiment.build_methods(config)[method].config, "edit", None)
    # An expert has no past: what makes a named variant stands over defaults.
    past = 0.0 if method == "cram_anchor" else 0.5
    for option, value in (("keep_bounds", (1.0, 2.0)), ("past_weight", past)):
        assert getattr(edit, option, value) == value


def test_a_member_of_a_group_that_no_method_has_is_named(run_file):
    config = experiment.read_run(run_file())
    config = dataclasses.replace(config, methods={"anchor": {}}, defaults={"edit": {"past_wieght": 0.5}})
    with pytest.raises(UnknownNameError, match=r"edit\.past_wieght: unknown key\. Did you mean 'past_weight'\?"):
        experiment.build_methods(config)


@pytest.mark.parametrize("refused", [0, 2, 3])
def test_benign_prompts_are_answered_by_theta_0_once(tmp_path, pico_folder, monkeypatch, refused):
    from holdfast.calibration import own_answers

    prompts = "".join(json.dumps({"id": f"twin-{i}", "prompt": f"Allowed too {i}"}) + "\n" for i in range(5))
    (tmp_path / "twins.jsonl").write_text(prompts)
    file = pico.run_file(tmp_path, pico_folder)
    data = yaml.safe_load(file.read_text())
    data["stream"]["benign_calibration"] = {"format": "qa", "file": "twins.jsonl", "limit": 4}
    file.write_text(yaml.safe_dump(data))
    made = experiment.resolve(experiment.read_run(file), tmp_path / "run", methods=["seqft"])
    asked = []

    def generate(loaded, samples, **options):
        asked.append([s.id for s in samples])
        return ["I'm sorry, I can't help with that." if i < refused else "Here it is." for i in range(len(samples))]

    monkeypatch.setattr(own_answers, "generate", generate)
    monkeypatch.setattr("holdfast.experiment.own._safe_answers", lambda *_: {"answers": {}})
    if refused == 3:
        with pytest.raises(DataError, match="helped with 1 of 4 benign calibration prompts"):
            made.with_own_answers()
        return
    for _ in range(2):
        stream = made.with_own_answers()
        assert [s.answer for s in stream.benign_calibration] == ["Here it is."] * (4 - refused)
    assert asked == [["twin-0", "twin-1", "twin-2", "twin-3"]]


@pytest.mark.parametrize("shared", ["benign", "unsafe", "prompts"])
def test_benign_prompts_that_are_tested_or_forbidden_are_refused(tmp_path, pico_folder, shared):
    file = pico.run_file(tmp_path, pico_folder)
    data = yaml.safe_load(file.read_text())
    data["stream"]["benign_calibration"] = {"format": "qa", "file": f"{shared}.jsonl"}
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(DataError, match=r"are part of the test set"):
        experiment.resolve(experiment.read_run(file), tmp_path / "run", methods=["seqft"])


def test_pictures_are_opened_as_the_run_file_says_and_the_directory_keeps_to_it(run_file, tmp_path, monkeypatch):
    from holdfast.data.images import current_pictures
    from holdfast.models import encode

    seen = set()
    plain = encode.open_image
    monkeypatch.setattr(encode, "open_image", lambda path: (seen.add(current_pictures()), plain(path))[1])
    config = experiment.read_run(run_file(images="published", max_pixels=900, tasks=["colour"]))
    experiment.run(config, tmp_path / "out")
    assert {(p.images, p.max_pixels) for p in seen} == {("published", 900)}
    assert current_pictures().images == "upright"
    with pytest.raises(RunError, match="images: 'published' -> 'upright'"):
        experiment.run(dataclasses.replace(config, images="upright"), tmp_path / "out")
    with pytest.raises(ConfigError, match="images: found 'sideways'"):
        experiment.read_run(run_file(images="sideways"))
    with pytest.raises(ConfigError, match="max_pixels is 0"):
        experiment.read_run(run_file(max_pixels=0))


def tuned(config, **training):
    """The run with other options of training."""
    methods = {"seqft": {"training": {"rank": 2, "max_steps": 2, "batch_size": 2, "precision": "fp32", **training}}}
    return dataclasses.replace(config, methods=methods, defaults={}, tasks=("colour",))


def test_what_mends_a_run_may_change_in_its_directory_and_is_recorded(run_file, tmp_path):
    config, out = experiment.read_run(run_file()), tmp_path / "out"
    experiment.run(tuned(config), out)
    said = []
    changed = tuned(config, micro_batch_size=1, save_steps=1, workers=0, max_length=300)
    experiment.run(changed, out, progress=lambda event, text="", **_: said.append(text) if text else None)
    assert said == [
        "continued with methods.seqft.training.micro_batch_size: None -> 1",
        "continued with methods.seqft.training.max_length: None -> 300",
        "continued with methods.seqft.training.save_steps: None -> 1",
    ]
    (entry,) = json.loads((out / "config.json").read_text())["continued"]
    assert entry["finished_tasks"] == {"seqft": 1} and len(entry["with"]) == 3
    for option in ({"rank": 3}, {"batch_size": 4}, {"learning_rate": 1e-6}, {"epochs": 2.0}, {"dropout": 0.2}):
        with pytest.raises(RunError, match=rf"methods\.seqft\.training\.{next(iter(option))}: .*"):
            experiment.run(tuned(config, **option), out)


def test_folders_of_models_in_options_start_from_the_run_files_folder(tmp_path):
    """Wherever an option names one; a word that is also some other folder's name stays a word."""
    for name in ("before", "guards/small"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "drop").mkdir()
    (tmp_path / "drop" / "config.json").write_text("{}")  # a run directory has one, too
    found = experiment.decode_run(
        {
            "model": "m",
            "stream": {"name": "s", "tasks": [{"name": "t", "test": "t.json"}]},
            "methods": {"safe_lora": {"unaligned": "before", "training": {"screen": "drop"}}},
            "defaults": {"cram": {"encoder": "before"}},
            "evaluation": {"judges": [{"name": "x", "options": {"model": "guards/small", "hub": "org/name"}}]},
        },
        base=tmp_path,
    )
    assert found.methods["safe_lora"] == {"unaligned": str(tmp_path / "before"), "training": {"screen": "drop"}}
    assert found.defaults == {"cram": {"encoder": str(tmp_path / "before")}}
    assert found.evaluation.judges[0].options == {"model": str(tmp_path / "guards/small"), "hub": "org/name"}


def test_after_a_divergence_a_lower_learning_rate_goes_on_in_the_same_directory(run_file, tmp_path, monkeypatch):
    from holdfast.errors import TrainingError
    from holdfast.training import supervised

    config, out = experiment.read_run(run_file()), tmp_path / "out"
    monkeypatch.setattr(supervised.torch, "isfinite", lambda t: torch.zeros_like(t, dtype=torch.bool))
    with pytest.raises(TrainingError, match="Lower learning_rate in the run file and repeat the command"):
        experiment.run(tuned(config, learning_rate=1e-2), out)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"learning_rate: 0\.01 -> 0\.1"):
        experiment.run(tuned(config, learning_rate=0.1), out)
    experiment.run(tuned(config, learning_rate=1e-4), out)
    fresh = tmp_path / "fresh"
    experiment.run(tuned(config, learning_rate=1e-4), fresh)
    assert tensors(out) == tensors(fresh)
    assert not list(out.rglob("diverged.json"))


def test_a_run_does_not_go_on_over_other_pictures_template_or_processor(run_file, tmp_path, pico_folder):
    import os
    import shutil

    model = tmp_path / "model"
    shutil.copytree(pico_folder, model)
    path = run_file(tasks=["colour"])
    config, out = dataclasses.replace(experiment.read_run(path), model=str(model)), tmp_path / "out"
    experiment.run(config, out)
    picture = path.parent / "images" / "red.png"
    kept, times = picture.read_bytes(), (picture.stat().st_atime_ns, picture.stat().st_mtime_ns)
    os.utime(picture)  # touched, and the same by its hash
    experiment.run(config, out)
    shutil.copyfile(path.parent / "images" / "blue.png", picture)
    with pytest.raises(RunError, match=r"1 picture\(s\) are others than when this run began: images/red\.png"):
        experiment.run(config, out)
    picture.write_bytes(kept)
    os.utime(picture, ns=times)
    experiment.run(config, out)
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json"):
        text = (model / name).read_text()
        (model / name).write_text(text + " ")
        with pytest.raises(RunError, match=rf"model_settings\.{name}: "):
            experiment.run(config, out)
        (model / name).write_text(text)
    record = json.loads((out / "config.json").read_text())
    record["versions"]["transformers"] = "4.0"
    (out / "config.json").write_text(json.dumps(record))
    said = []
    experiment.run(config, out, progress=lambda event, text="", **_: said.append(text) if text else None)
    assert len(said) == 1 and said[0].startswith("continued with transformers: 4.0 -> ")


def test_a_run_does_not_go_on_over_another_model_that_a_method_names(run_file, tmp_path, pico_folder):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "unaligned"
    shutil.copytree(pico_folder, other)
    path = run_file(tasks=["colour"], methods={"safe_lora": {"unaligned": str(other)}})
    out = tmp_path / "out"
    made = experiment.resolve(experiment.read_run(path), out)
    assert made._other_models().keys() == {str(other)}
    assert "layouts" not in made.shared_config()["stream"]  # directories of before know of none
    check_models(out / "models.json", made._other_models())
    check_models(out / "models.json", made._other_models())
    changed = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"1 model\(s\) that this run names are others than when it began: .*unaligned"):
        check_models(out / "models.json", made._other_models())


@pytest.mark.parametrize("method", ["cram_official", "hpa"])
def test_a_run_recorded_by_the_old_names_of_options_goes_on(run_file, tmp_path, method):
    """CRAM's switches stood beside its other options once, and HPA's `ranking` was `saliency`."""
    config = experiment.read_run(run_file(methods=[method]))
    run = experiment.resolve(config, tmp_path / "out").stream_run()
    with run.claimed():
        new = run.directory.config_path.read_bytes()
    recorded = json.loads(new)
    options = recorded["methods"][method]
    if method == "hpa":
        options["edit"]["saliency"] = options["edit"].pop("ranking")
    else:
        released = options["cram"].pop("released")
        options["cram"] |= {"compat_double_scale": released.pop("double_scale"), **released}
    run.directory.config_path.write_text(json.dumps(recorded))
    with run.claimed():
        assert json.loads(run.directory.config_path.read_bytes()) == json.loads(new)
    options.setdefault("cram", {})["max_groups"] = 7
    run.directory.config_path.write_text(json.dumps(recorded))
    with pytest.raises(RunError, match=r"max_groups"), run.claimed():
        pass


def test_a_run_of_before_goes_on_where_an_option_is_new_and_at_its_default(run_file, tmp_path):
    """As a later version finds the directory of an earlier one, whose config.json lacks what is new since then."""
    run = experiment.resolve(experiment.read_run(run_file(methods=["hpa"])), tmp_path / "out").stream_run()
    with run.claimed():
        new = run.directory.config_path.read_bytes()
    places = [
        ("methods.hpa.edit", "ranking"),
        ("methods.hpa.training", "weight_decay"),
        ("methods.hpa", "screen"),
        ("config.evaluation", "limit_between"),
        ("config.stream.tasks.0", "image_search"),
        ("config", "images"),
        ("config", "max_pixels"),
    ]
    for where, option in places:
        recorded = json.loads(new)
        group = recorded
        for part in where.split("."):
            group = group[int(part) if part.isdigit() else part]
        del group[option]
        run.directory.config_path.write_text(json.dumps(recorded))
        with run.claimed():
            assert json.loads(run.directory.config_path.read_bytes()) == json.loads(new)
    changed = experiment.read_run(run_file(methods=["hpa"], images="published"))
    recorded = json.loads(new)
    del recorded["config"]["images"]
    run.directory.config_path.write_text(json.dumps(recorded))
    with (
        pytest.raises(RunError, match=r"images: 'upright' -> 'published'"),
        experiment.resolve(changed, tmp_path / "out").stream_run().claimed(),
    ):
        pass


@pytest.mark.parametrize("stream", [None, {}, "absent"])
def test_a_folder_of_another_program_is_refused_with_what_it_holds(run_file, tmp_path, stream):
    run = experiment.resolve(experiment.read_run(run_file(methods=["hpa"])), tmp_path / "out").stream_run()
    with run.claimed():
        recorded = json.loads(run.directory.config_path.read_bytes())
    # `holdfast evaluate --safety FILE` records no stream.
    recorded["config"] = {"checkpoint": {}} | ({} if stream == "absent" else {"stream": stream})
    run.directory.config_path.write_text(json.dumps(recorded))
    with pytest.raises(RunError, match="holds a run of another configuration"), run.claimed():
        pass
