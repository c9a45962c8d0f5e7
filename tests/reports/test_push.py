"""What is uploaded: model files and a card with figures before and after; no pickle, and no path of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import fake_run
from holdfast.errors import ConfigError, StorageError, UnknownNameError
from holdfast.reports.push import Upload, prepare, push
from holdfast.reports.read_runs import load_run


def adapter(folder: Path, *, base: str = "owner/base", **more: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 8)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 4}))
    for name, text in more.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def head(upload: Upload) -> dict[str, Any]:
    found = yaml.safe_load(upload.card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def results(upload: Upload) -> dict[tuple[str, str], float]:
    (index,) = head(upload)["model-index"]
    return {
        (result["dataset"]["name"], metric["name"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }


def test_a_runs_figures_are_in_the_card_before_and_after(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "run", methods={"seqft": 0.6, "hpa": 0.9})
    upload = prepare(adapter(tmp_path / "a"), "me/model", run=run, method="hpa")
    view = load_run(run)
    last = view.methods["hpa"].records[-1]
    found = results(upload)
    for name, row in last.safety.items():
        key = "Attack success rate (forbidden requests not refused)"
        assert found[name, f"{key}, after"] == pytest.approx(100 * row["asr"], abs=0.01)
        assert found[name, f"{key}, before"] == pytest.approx(100 * view.theta_0.safety[name]["asr"], abs=0.01)
        assert (name, "Over-refusal rate (harmless requests refused), after") in found
    assert {name for name, _ in found} == {*last.safety, *last.scores}
    assert "## Safety before and after" in upload.card and "starting model" not in upload.card
    assert head(upload)["base_model"] == ["owner/base"] and head(upload)["library_name"] == "peft"
    with pytest.raises(UnknownNameError, match="Did you mean 'hpa'"):
        prepare(tmp_path / "a", "me/model", run=run, method="hpaa")


@pytest.mark.parametrize(
    "name, record, expected",
    [
        (
            "restore__json",
            {
                "before": {"asr": 0.0, "task": None},
                "tuned": {"asr": 0.25},
                "restored": {"asr": 0.03, "over_refusal": 0.0},
            },
            {"before tuning": 0.0, "tuned": 25.0, "restored": 3.0},
        ),
        ("edit__json", {"safety": {"red team": {"before": 0.5, "after": 0.125}}}, {"before": 50.0, "after": 12.5}),
    ],
)
def test_what_a_restore_or_an_edit_measured_is_in_the_card(
    name: str, record: dict[str, Any], expected: dict[str, float], tmp_path: Path
) -> None:
    card = "---\ntags: [x]\n---\n# Edited\n\nBody."
    upload = prepare(adapter(tmp_path / "a", **{name: json.dumps(record), "README__md": card}), "me/model")
    found = {words.rpartition(", ")[2]: value for (_, words), value in results(upload).items() if "Attack" in words}
    assert found == expected
    assert upload.card.count("---\n") == 2 and upload.card.endswith("# Edited\n\nBody.\n")


def test_experts_go_with_their_folders_and_without_paths_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "cram"
    for expert in ("one", "two"):
        adapter(folder / expert, base=str(tmp_path / "base"))
    (folder / "router.safetensors").write_bytes(b"\0" * 8)
    base = str(tmp_path / "base")
    (folder / "router.json").write_text(json.dumps({"base": {"base": base, "adapters": []}, "sigma": 0.5}))
    (folder / "edit.json").write_text(json.dumps({"inputs": {"before": base, "after": str(tmp_path / "tuned")}}))
    (folder / "tokenizer.json").write_text(json.dumps(["/usr/bin"]))
    (folder / "README.md").write_text(f"# Edited\n\nFrom {base} and {tmp_path / 'tuned'}.")
    for private in ("restore.html", ".cache.json", "inputs.json", "notes.png"):
        (folder / private).write_text("/home/me")
    with pytest.raises(ConfigError, match="Pass --base"):
        prepare(folder, "me/model")
    upload = prepare(folder, "me/model", base="owner/base")
    assert set(upload.files) == {
        "README.md",
        *("router.safetensors", "router.json", "edit.json", "tokenizer.json"),
        *(f"{e}/{name}" for e in ("one", "two") for name in ("adapter_config.json", "adapter_model.safetensors")),
    }
    for content in upload.files.values():
        text = content if isinstance(content, bytes) else content.read_bytes()
        assert str(tmp_path).encode() not in text
    assert json.loads(upload.files["one/adapter_config.json"]) == {"base_model_name_or_path": "owner/base", "r": 4}  # type: ignore[arg-type]
    sent = {n: json.loads(c) for n, c in upload.files.items() if isinstance(c, bytes) and n.endswith(".json")}
    assert sent["router.json"] == {"base": {"base": "owner/base", "adapters": []}, "sigma": 0.5}
    assert sent["edit.json"] == {"inputs": {"before": "owner/base", "after": "tuned"}}
    assert "From owner/base and tuned." in upload.card and "tokenizer.json" not in sent
    (folder / "README.md").unlink()
    upload = prepare(folder, "me/model", base="owner/base")
    assert "Nobody measured" in upload.card and "model-index" not in head(upload)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_pickles_are_refused(suffix: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / f"optimizer{suffix}").write_bytes(b"x")
    with pytest.raises(StorageError, match="is a pickle"):
        prepare(folder, "me/model")


@pytest.mark.parametrize("repo", ["model", "me/model/x", "", "https://hub/me/model", "me /model"])
def test_a_repository_has_an_owner_and_a_name(repo: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected owner/name"):
        prepare(adapter(tmp_path / "a"), repo)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, match in ((tmp_path / "empty", "no safetensors"), (tmp_path / "none", "is no folder")):
        with pytest.raises(StorageError, match=match):
            prepare(folder, "me/model")
    with pytest.raises(ConfigError, match="both --run and --method"):
        prepare(adapter(tmp_path / "a"), "me/model", run=tmp_path)


def test_a_base_by_a_bare_name_is_replaced_where_a_base_is_named_alone(tmp_path: Path) -> None:
    router = json.dumps({"base": {"base": "model", "adapters": []}, "kind": "model"})
    card = "# A model\n\nOf None but this model."
    upload = prepare(
        adapter(tmp_path / "a", base="model", router__json=router, README__md=card), "me/x", base="owner/base"
    )
    found = json.loads(upload.files["router.json"])  # type: ignore[arg-type]
    assert found == {"base": {"base": "owner/base", "adapters": []}, "kind": "model"}
    assert upload.card.endswith(f"{card}\n")


@pytest.mark.parametrize("name", ["adapter_config.json", "edit.json", "restore.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    for text in ("{", "[1]"):
        (folder / name).write_text(text)
        with pytest.raises(StorageError, match=name):
            prepare(folder, "me/model")


def test_everything_is_one_commit(tmp_path: Path) -> None:
    calls: list[Any] = []
    api = SimpleNamespace(
        create_repo=lambda repo, **options: calls.append((repo, options)),
        create_commit=lambda repo, operations, **_: (
            calls.append([op.path_in_repo for op in operations]) or SimpleNamespace(commit_url="https://hub/commit/1")
        ),
    )
    upload = prepare(adapter(tmp_path / "a"), "me/model")
    assert push(upload, private=True, api=api) == "https://hub/commit/1"
    (repo, options), paths = calls
    assert repo == "me/model" and options["private"] and options["exist_ok"]
    assert sorted(paths) == sorted(upload.files)
