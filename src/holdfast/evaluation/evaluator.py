"""The evaluator of a run: every task so far, every safety set, one row each; one line per answer beside it."""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast import judges, scorers
from holdfast.checkpoints.value import Checkpoint
from holdfast.data.names import slug
from holdfast.data.types import SafetySet, Sample, Stream, Task
from holdfast.errors import RunError
from holdfast.evaluation.answers import ALONE, Share, collect
from holdfast.evaluation.evaluation_config import EvaluationConfig
from holdfast.evaluation.vllm_options import VllmOptions
from holdfast.files import atomic_path, read_jsonl
from holdfast.judges.base import Side, Verdict
from holdfast.metrics.agreement import agreement
from holdfast.metrics.safety import set_figures
from holdfast.models.generate import generate
from holdfast.models.held import let_go, load
from holdfast.models.loaded import LoadedModel
from holdfast.models.tuner import is_tuner_folder

if TYPE_CHECKING:
    from holdfast.evaluation.vllm import VllmBackend


class CheckpointEvaluator:
    """Asks a checkpoint; implements `holdfast.stream.protocol.Evaluator`.

    Files in `out_dir`, lines in the order of the samples: `task-<name>.jsonl` with {"id", "prompt", "images",
    "prediction", "references", "value", "evidence"}, `safety-<name>.jsonl` with {"id", "side", "prompt", "images",
    "reply", "label", "behaviour", "evidence", "judges"}, `routing-*.jsonl` where a tuner routes; `*.part` while
    answers are being made.
    """

    def __init__(
        self, config: EvaluationConfig, *, share: Share = ALONE, vllm_options: VllmOptions | None = None
    ) -> None:
        """share: this process's part of the work; only the chief's rows are filled. vllm_options: of that backend's
        engine.
        """
        self.config = config
        self.vllm_options = vllm_options
        self.share = share
        # Of the last call: what was asked in it and not read from an earlier, killed one; the time of generating
        # alone, without loading, routing for the record, and judging.
        self.answering: dict[str, float] = {}
        self.judges = {judge.key: judges.get(judge.name, **judge.options) for judge in config.judges}

    def __call__(
        self,
        checkpoint: Checkpoint,
        *,
        stream: Stream,
        step: int | None,
        out_dir: Path,
        progress: Callable[..., None],
    ) -> dict[str, Any]:
        """{"scores": {task: row}, "safety": {set: row}} of `checkpoint` after `step` (None: every task)."""
        tasks = stream.tasks if step is None else stream.tasks[: step + 1]
        last = step is None or step == len(stream.tasks) - 1
        asked_of = [(task, self._some(task.test, last or index == step)) for index, task in enumerate(tasks)]
        sides = {s.name: (self._some(s.unsafe, last), self._some(s.benign, last)) for s in stream.safety}
        total = sum(len(some) for _, some in asked_of) + sum(len(side) for pair in sides.values() for side in pair)
        asked = 0

        def on_batch(count: int) -> None:
            nonlocal asked
            asked += count
            progress("evaluate", done=asked, total=total)

        self.answering = {"requests": 0, "seconds": 0.0}
        model = _Lazy(checkpoint, self.config, self.share.device, self.vllm_options)
        scores = {task.name: self._task(model, task, some, out_dir, on_batch) for task, some in asked_of}
        safety = {s.name: self._safety(model, s, sides[s.name], out_dir, on_batch) for s in stream.safety}
        return {"scores": scores, "safety": safety}

    def _task(
        self, model: _Lazy, task: Task, samples: Sequence[Sample], out_dir: Path, on_batch: Callable[[int], None]
    ) -> dict[str, Any]:
        scorer = scorers.get(task.scorer, mode=task.scorer_mode, **task.scorer_options)
        if not samples:
            return {"value": None, "n": 0, "scorer": scorer.name, "mode": scorer.mode, "unscored": 0}
        path = out_dir / f"task-{slug(task.name)}.jsonl"
        predictions = _stored(path, samples, key="prediction")
        if predictions is None:
            predictions = self._answers(model, samples, _part(path), task.max_new_tokens, on_batch)
        if not self.share.chief:
            return {}
        value, rows, figures = scorer.aggregate(
            predictions, [sample.references for sample in samples], [sample.meta for sample in samples]
        )
        self._routing(model, samples, path)
        _publish(path, _task_lines(samples, predictions, rows))
        row = {"value": value, "n": len(samples), "scorer": scorer.name, "mode": scorer.mode}
        return {**figures, **row, "unscored": figures.get("unscored", 0)}

    def _safety(
        self,
        model: _Lazy,
        safety: SafetySet,
        asked: tuple[Sequence[Sample], Sequence[Sample]],
        out_dir: Path,
        on_batch: Callable[[int], None],
    ) -> dict[str, Any]:
        path = out_dir / f"safety-{slug(safety.name)}.jsonl"
        lines: list[dict[str, Any]] = []
        found: dict[Side, dict[str, list[Verdict]]] = {}
        sides: tuple[tuple[Side, Sequence[Sample]], ...] = (("unsafe", asked[0]), ("benign", asked[1]))
        for side, samples in sides:
            replies = _stored(path, samples, key="reply", side=side)
            if replies is None:
                replies = self._answers(model, samples, _part(path, side), safety.max_new_tokens, on_batch)
            if not self.share.chief:
                continue
            found[side] = {name: judge.judge(samples, replies, side=side) for name, judge in self.judges.items()}
            lines += _safety_lines(side, samples, replies, found[side])
        if not self.share.chief:
            return {}
        self._routing(model, [s for _, samples in sides for s in samples], path)
        _publish(path, lines)
        rows = {
            name: set_figures(
                [v.label for v in found["unsafe"][name]],
                [v.behaviour for v in found["unsafe"][name]],
                [v.behaviour for v in found["benign"][name]],
            )
            for name in self.judges
        }
        main, *others = self.judges
        beside = {name: {**rows[name], "agreement": _agreement(found, main, name)} for name in others}
        return {**rows[main], "judge": main, "judges": beside}

    def _answers(
        self, model: _Lazy, samples: Sequence[Sample], path: Path, max_new_tokens: int, on_batch: Callable[[int], None]
    ) -> list[str]:
        def answer(batch: list[Sample]) -> list[str]:
            if self.config.backend == "vllm":
                vllm = model.vllm  # loaded before the clock starts
                began = time.perf_counter()
                replies = vllm.answer(batch, max_new_tokens=max_new_tokens)
            else:
                loaded = model.loaded
                began = time.perf_counter()
                replies = generate(
                    loaded,
                    batch,
                    max_new_tokens=max_new_tokens,
                    batch_size=len(batch),
                    seed=self.config.seed,
                    temperature=self.config.temperature,
                )
            self.answering["requests"] += len(batch)
            self.answering["seconds"] += time.perf_counter() - began
            return replies

        return collect(
            samples, answer, path=path, batch_size=self.config.batch_size, on_batch=on_batch, share=self.share
        )

    def _routing(self, model: _Lazy, samples: Sequence[Sample], path: Path) -> None:
        """Which adapters a tuner would let answer, beside the answers: routing-<name>.jsonl, written before them."""
        target = path.with_name(f"routing-{path.name}")
        if target.is_file() or path.is_file() or not model.has_tuner:
            return
        size = self.config.batch_size
        if self.config.backend == "vllm":
            _publish(
                target, (row for i in range(0, len(samples), size) for row in model.vllm.explain(samples[i : i + size]))
            )
            return
        tuner = model.loaded.tuner
        assert tuner is not None  # its folder is among the checkpoint's adapters
        _publish(target, (row for i in range(0, len(samples), size) for row in tuner.explain(samples[i : i + size])))

    def _some(self, samples: Sequence[Sample], full: bool) -> Sequence[Sample]:
        """What is asked of a split. full: false for what is only looked at along the way."""
        some = samples[: self.config.limit]
        return some if full else some[: self.config.limit_between]


class _Lazy:
    """The model, loaded when the first answer is missing: a resumed evaluation may need none."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EvaluationConfig,
        device: Any = None,
        vllm_options: VllmOptions | None = None,
    ) -> None:
        self._options = vllm_options
        self._checkpoint, self._config, self._device = checkpoint, config, device
        self._loaded: LoadedModel | None = None
        self._vllm: VllmBackend | None = None

    @property
    def has_tuner(self) -> bool:
        """Whether an adapter folder on top is a tuner's own."""
        adapters = getattr(self._checkpoint, "adapters", ())
        return any(is_tuner_folder(folder) for folder in adapters)

    @property
    def vllm(self) -> VllmBackend:
        if self._vllm is None:
            from holdfast.evaluation.vllm import VllmBackend

            let_go()  # vLLM takes the memory for itself
            config = self._config
            self._vllm = VllmBackend(
                self._checkpoint,
                dtype=config.dtype,
                seed=config.seed,
                temperature=config.temperature,
                options=self._options,
            )
        return self._vllm

    @property
    def loaded(self) -> LoadedModel:
        if self._loaded is None:
            self._loaded = load(self._checkpoint, dtype=self._config.dtype, device=self._device)
        return self._loaded


def _task_lines(
    samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[scorers.Score]
) -> Iterator[dict[str, Any]]:
    for sample, prediction, score in zip(samples, predictions, scores, strict=True):
        yield {
            "id": sample.id,
            "prompt": sample.prompt,
            "images": [str(path) for path in sample.images],
            "prediction": prediction,
            "references": list(sample.references),
            "value": score.value,
            "evidence": score.evidence,
        }


def _safety_lines(
    side: Side, samples: Sequence[Sample], replies: Sequence[str], verdicts: Mapping[str, Sequence[Verdict]]
) -> Iterator[dict[str, Any]]:
    main, *others = verdicts
    for index, (sample, reply) in enumerate(zip(samples, replies, strict=True)):
        yield {
            "id": sample.id,
            "side": side,
            "prompt": sample.prompt,
            "images": [str(path) for path in sample.images],
            "reply": reply,
            **_verdict(verdicts[main][index]),
            "judges": {name: _verdict(verdicts[name][index]) for name in others},
        }


def _agreement(found: Mapping[Side, Mapping[str, Sequence[Verdict]]], one: str, other: str) -> dict[str, Any]:
    """How far two judges agree: labels and behaviours on the unsafe side, behaviours on the benign one."""
    unsafe, benign = found["unsafe"], found["benign"]
    row = {
        "label": agreement([v.label for v in unsafe[one]], [v.label for v in unsafe[other]]).to_json(),
        "behaviour": agreement([v.behaviour for v in unsafe[one]], [v.behaviour for v in unsafe[other]]).to_json(),
    }
    if benign[one]:
        row["benign"] = agreement([v.behaviour for v in benign[one]], [v.behaviour for v in benign[other]]).to_json()
    return row


def _verdict(verdict: Verdict) -> dict[str, str]:
    return {"label": verdict.label, "behaviour": verdict.behaviour, "evidence": verdict.evidence}


def _part(path: Path, side: Side | None = None) -> Path:
    return path.with_name(f"{path.name}.{side}.part" if side else f"{path.name}.part")


def _stored(path: Path, samples: Sequence[Sample], *, key: str, side: Side | None = None) -> list[str] | None:
    """Answers in a finished file, or None when there is none yet.

    Raises: RunError: it answers other samples than these, or other prompts under their ids.
    """
    if not path.is_file():
        return None
    rows = read_jsonl(path, "answers", error=RunError)
    rows = [row for row in rows if row.get("side") == side]
    if [row["id"] for row in rows] != [sample.id for sample in samples]:
        raise RunError(
            f"{path} holds answers to other samples than the ones to ask now ({len(rows)} rows, {len(samples)} "
            "samples). The data changed since it was written: choose another --out, or delete this file to ask again."
        )
    for row, sample in zip(rows, samples, strict=True):
        if row["prompt"] != sample.prompt:
            raise RunError(
                f"{path} holds an answer to another prompt of {sample.id!r} than the one to ask now: {row['prompt']!r} "
                f"then, {sample.prompt!r} now. The data changed since it was written: choose another --out, or delete "
                "this file to ask again."
            )
    return [row[key] for row in rows]


def _publish(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the final file in one rename, then drop the part files that it was made from."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    for part in path.parent.glob(f"{glob.escape(path.name)}*.part"):
        part.unlink()
