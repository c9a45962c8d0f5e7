"""An adapter, a folder of experts or an edited model on the Hugging Face Hub, with a card that says what it refuses.

The card's figures are those that were measured: by a restore (restore.json in the folder), by a run (its records), or
by whoever edited (the safety in edit.json). They stand in the card's text and as model-index results, before and after.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from holdfast.errors import ConfigError, StorageError
from holdfast.files import read_json
from holdfast.reports.card import card
from holdfast.reports.read_runs import load_run

# What makes a model; pages and probes stay here.
_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model"}
_STAY = {"restore.json", "inputs.json"}
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
# Of a tokenizer: every text in them is a token, also one that begins with a slash.
_TOKENS = ("tokenizer", "vocab", "added_tokens", "special_tokens", "merges")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Key of a restored point or record -> the metric's type and name.
_METRICS = {
    "asr": ("attack_success_rate", "Attack success rate (forbidden requests not refused)"),
    "over_refusal": ("over_refusal_rate", "Over-refusal rate (harmless requests refused)"),
    "task": ("score", "Score on the task"),
}


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is uploaded: path in the repository -> a file, or the bytes of a file that is changed on the way."""

    repo: str
    files: Mapping[str, Path | bytes]

    @property
    def card(self) -> str:
        """The README."""
        found = self.files["README.md"]
        return found.decode("utf-8") if isinstance(found, bytes) else found.read_text(encoding="utf-8")


def prepare(
    folder: Path | str, repo: str, *, base: str | None = None, run: Path | str | None = None, method: str | None = None
) -> Upload:
    """What `push` would upload; nothing is sent.

    folder: an adapter, a CRAM folder, an edited or restored model. repo: owner/name. base: hub id of the base model,
        needed where the folder names it by a path of this machine. run, method: whose figures the card shows.

    Raises: ConfigError: no repository's name, a base by a local path, a run without a method. StorageError: no such
        folder, no weights in it, pickles, a damaged file. RunError, UnknownNameError: as `write_card`.
    """
    folder = Path(folder)
    if not _HUB_ID.fullmatch(repo):
        raise ConfigError(f"repository {repo!r} is not understood; expected owner/name.")
    if (run is None) != (method is None):
        raise ConfigError("A run's figures are of one of its methods: pass both --run and --method, or neither.")
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder; pass the folder of an adapter or model.")
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if path.suffix in _PICKLES:
            raise StorageError(f"{path} is a pickle, which can run code where it is loaded. Save it as safetensors.")
        if path.suffix in _SUFFIXES and path.name not in _STAY:
            files[name.as_posix()] = path
    if not any(name.endswith(".safetensors") for name in files):
        raise StorageError(f"{folder} holds no safetensors; there is no model to upload.")
    bases, public = set(), dict[str, str]()  # public: what stands in a file here -> what is uploaded in its place
    for place in [place for place in files if Path(place).name == "adapter_config.json"]:
        config = _record(folder / place)
        named = base or str(config.get("base_model_name_or_path") or "")
        if not _HUB_ID.fullmatch(named) or (base is None and Path(named).exists()):
            raise ConfigError(
                f"{folder / place} names its base {named!r}, a path of this machine. Pass --base with the base's id on "
                "the hub, so that others can load the adapter."
            )
        bases.add(named)
        public[str(config.get("base_model_name_or_path") or named)] = named
    for place in [place for place in files if place.endswith(".json") and not Path(place).name.startswith(_TOKENS)]:
        record = read_json(folder / place, "a file of a model", error=StorageError)
        plain = _without_paths(record, public)
        if plain != record:
            files[place] = (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()
    text, results = _text(folder, run, method), list(_results(folder, run, method))
    for private in sorted(public, key=len, reverse=True):
        if "/" in private or os.sep in private:  # a bare name may be any word of the text
            text = text.replace(private, public[private])
    data = ModelCardData(
        model_name=repo.partition("/")[2],
        library_name="peft" if bases else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["holdfast", "safety", "continual-learning"],
        base_model=sorted(bases) or base,
        eval_results=results or None,
    )
    files["README.md"] = f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n".encode()
    return Upload(repo=repo, files=files)


def push(upload: Upload, *, private: bool = False, message: str = "Upload by holdfast", api: Any = None) -> str:
    """Create the repository where it is missing, upload in one commit, and return the commit's address.

    api: a `huggingface_hub.HfApi`; by default one with the token that `hf auth login` stored.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    api.create_repo(upload.repo, private=private, exist_ok=True, repo_type="model")
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
    ]
    done = api.create_commit(upload.repo, operations=operations, commit_message=message, repo_type="model")
    return str(getattr(done, "commit_url", done))


def _record(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: StorageError: damaged, or something else."""
    found = read_json(path, "an object", error=StorageError)
    if not isinstance(found, dict):
        raise StorageError(f"{path} is not understood; expected an object, found {type(found).__name__}.")
    return found


def _without_paths(value: Any, public: dict[str, str], *, of_base: bool = False) -> Any:
    """`value` with paths of this machine replaced as `public` says, others by their last part, which is added to it.

    of_base: it stands where a base is named; a bare name, such as "model", is a path only there.
    """
    if isinstance(value, str):
        path = Path(value)
        if value not in public and path.is_absolute() and len(path.parts) > 1:
            public[value] = path.name
        return public.get(value, value) if of_base or path.name != value else value
    if isinstance(value, dict):
        return {key: _without_paths(one, public, of_base="base" in key) for key, one in value.items()}
    return [_without_paths(one, public) for one in value] if isinstance(value, list) else value


def _text(folder: Path, run: Path | str | None, method: str | None) -> str:
    """The card's text without its head: of the run's method, else what the edit wrote, else a line."""
    if run is not None and method is not None:
        view = load_run(run)
        if method in view.methods:
            # The starting model's folder is named there; its path on this machine is nobody's business.
            return re.sub(r"^- (starting model|this checkpoint): .*\n", "", _body(card(view, method)), flags=re.M)
        from holdfast.errors import unknown_name

        raise unknown_name("method of this run", method, view.methods)
    path = folder / "README.md"
    if path.is_file():
        return _body(path.read_text(encoding="utf-8"))
    return "# A model made with holdfast\n\nNobody measured what it refuses: no run, restore or edit report came along."


def _body(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.S)


def _results(folder: Path, run: Path | str | None, method: str | None) -> Iterator[EvalResult]:
    """Each figure before and after, rates in percent."""
    if run is not None and method is not None:
        view = load_run(run)
        last = view.methods[method].records[-1]
        for name, after in last.safety.items():
            before = view.theta_0.safety.get(name, {})
            yield from _pair(name, "asr", before.get("asr"), after.get("asr"))
            sides = (side.get("benign", {}).get("over_refusal") for side in (before, after))
            yield from _pair(name, "over_refusal", *sides)
        for task, score in last.scores.items():
            yield from _pair(task, "task", view.theta_0.scores.get(task, {}).get("value"), score.get("value"))
    elif (folder / "restore.json").is_file():
        record = _record(folder / "restore.json")
        for key in _METRICS:
            states = {"before tuning": "before", "tuned": "tuned", "restored": "restored"}
            for words, state in states.items():
                value = (record.get(state) or {}).get(key)
                if value is not None:
                    yield _result("probe requests", key, words, value)
    elif (folder / "edit.json").is_file():
        record = _record(folder / "edit.json")
        for name, rates in (record.get("safety") or {}).items():
            yield from _pair(name, "asr", rates.get("before"), rates.get("after"))


def _pair(name: str, key: str, before: float | None, after: float | None) -> Iterator[EvalResult]:
    for words, value in (("before", before), ("after", after)):
        if value is not None:
            yield _result(name, key, words, value)


def _result(name: str, key: str, words: str, value: float) -> EvalResult:
    kind, metric = _METRICS[key]
    return EvalResult(
        task_type="image-text-to-text",
        task_name="Task" if key == "task" else "Safety",
        dataset_type=re.sub(r"\W+", "-", name.lower()).strip("-") or "set",
        dataset_name=name,
        metric_type=kind,
        metric_name=f"{metric}, {words}",
        metric_value=round(100 * value, 2),
    )
