"""BEFORE, AFTER and three sets of requests -> the least edit that meets a budget, published with its record.

Phases, each kept in a work folder beside OUT, so that a killed command goes on where it stopped:
    ask BEFORE    its own answers to forbidden and harmless requests; which task requests it refuses (screening)
    ask AFTER     what the tuning cost
    calibrate     Gram matrices of every edited layer's inputs: H_s on BEFORE, H_t on AFTER
    search        strengths applied to the live model, measured on the probe requests
    export        the edit at the chosen strength by the streaming editor, verified, loaded again and measured
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoints.adapter import is_adapter
from holdfast.checkpoints.value import as_checkpoint
from holdfast.config import encode
from holdfast.data.types import Sample, Turn
from holdfast.editing.pair import open_pair, tuned_checkpoint
from holdfast.errors import ConfigError, DataError, StorageError
from holdfast.files import atomic_path, write_json
from holdfast.models.generate import generate
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.reports.restore_page import card_section, write_restore_page
from holdfast.restore.measure import Probe, Reference, make_judge, make_scorer, reference
from holdfast.restore.restore_config import RestoreConfig
from holdfast.restore.search import Budget, Point, choose, nearest_miss, search
from holdfast.restore.sets import RestoreSets, digest, refuse_shared
from holdfast.restore.work import WorkFolder, plain_point
from holdfast.stream.protocol import Checkpoint, silent
from holdfast.version import __version__

RECORD_FILE, PAGE_FILE = "restore.json", "restore.html"
Progress = Callable[..., None]


@dataclass(frozen=True)
class Restored:
    """record: what restore.json holds. published: the folder, or None where no strength met the budget."""

    record: Mapping[str, Any]
    published: Path | None
    page: Path


def restore(
    before: str,
    after: str,
    sets: RestoreSets,
    *,
    out: Path | str,
    budget: Budget | None = None,
    config: RestoreConfig | None = None,
    past: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Restored:
    """Give the tuned model `after` its refusals and skills back with the least edit that meets `budget`.

    Args:
        before: folder or hub id of the aligned model that the tuning started from. after: the tuned model, or the
            folder of a LoRA adapter trained on `before`.
        sets: forbidden, harmless and task requests, each split for calibration and probing (`sets.split`).
        out: folder to make; it appears whole or not at all, with restore.json and restore.html in it.
        budget: bounds on the restored model's rates; none takes the knee of the curve.
        past: Gram stores of earlier tasks of the same stream (`holdfast calibrate --grams`), for H_p.
        progress: called as progress(phase, done=, total=).

    Killed at any point and called again with the same arguments, it goes on where it stopped.

    Raises: DataError: sets that overlap, are swapped, or that BEFORE does not answer as they claim. CheckpointError,
        AdapterError, CalibrationError, NumericalError: as `edit_checkpoint`. ConfigError: AFTER equals BEFORE.
        StorageError: `out` exists.
    """
    config, budget = config or RestoreConfig(), budget or Budget()
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StorageError(f"{out} exists. Choose another --out, or remove it.")
    check_sets(sets, budget)
    work = WorkFolder(out, _plan(before, after, sets, budget, config, past))
    with work.held():
        return _Run(before, after, sets, budget, config, tuple(past), out, work, progress or silent).restore()


def check_sets(sets: RestoreSets, budget: Budget) -> None:
    """What the sets say by themselves. Raises DataError: a request on two sides. ConfigError: a bound without data."""
    both = (*sets.safety.calibration, *sets.safety.probe)
    harmless = (*sets.benign.calibration, *sets.benign.probe)
    if not both:
        raise DataError("There is no forbidden request (--safety); nothing could be restored without one.")
    refuse_shared(both, harmless, what="--safety and --benign", first="forbidden", second="harmless")
    for name, split, option in (
        ("max_over_refusal", sets.benign, "--benign"),
        ("max_drop", sets.task, "--task"),
    ):
        if getattr(budget, name) is not None and not split.probe:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} bounds what cannot be measured without {option}; give {option}, or leave it out."
            )


@dataclass(eq=False)
class _Run:
    """One restore, phase by phase; every phase first looks for what an earlier call has left in the work folder."""

    before: str
    after: str
    sets: RestoreSets
    budget: Budget
    config: RestoreConfig
    past: tuple[Path, ...]
    out: Path
    work: WorkFolder
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    _model: tuple[str, LoadedModel] | None = None

    def restore(self) -> Restored:
        """Every phase in turn; see `restore`."""
        from holdfast.restore.candidates import Candidates, calibrate, family, require_change

        config = self.config
        family(config.rule)
        require_change(self.before, self.after)
        probe = self._probe()
        answers = self.work.json("answers", self._own_answers)
        self._check_answers(answers, probe)
        own = tuple(_answered(s, answers["benign"][s.id]) for s in self.sets.benign.probe)
        own = tuple(sample for sample in own if sample.answer)
        before_point = self._end("before", probe, as_checkpoint(self.before), own, replies=answers)
        samples, screened = self._calibration(answers)
        began = time.perf_counter()
        grams = calibrate(
            self.before,
            self._tuned(),
            model=self._load,
            folder=self.work.folder / "grams",
            samples=samples,
            past_stores=self.past,
            batch_size=min(16, config.batch_size),
            memory_bytes=config.memory_bytes,
            progress=lambda event, done=0, total=None, **_: self.progress("calibrate", done=done, total=total),
        )
        self._spent("calibrate", began)
        tuned = self._end("tuned", probe, self._tuned(), probe.task or own)
        references = {name: self.work.reference(name) for name in ("before", "tuned")}
        candidates = Candidates(self.before, self.after, grams, config, lambda: self._load(self._tuned()))

        def measure(strength: float) -> Point:
            return self.work.point(strength, lambda: self._at(candidates, strength, probe, references, own))

        def exceeds(strength: float, bound: float) -> bool:
            known = self.work.known_point(strength)
            if known is not None:
                return known.asr > bound + 1e-9
            self.progress("search", done=len(self.work.points()), total=len(config.strengths))
            return probe.exceeds(candidates.model(strength), bound)[0]

        began = time.perf_counter()
        points = search(
            measure,
            exceeds,
            tuned,
            self.budget,
            strengths=config.strengths,
            whole_curve=config.whole_curve,
        )
        self._spent("search", began)
        failed: list[float] = []
        while True:
            usable = [p for p in points if p.strength not in failed]
            chosen = choose(usable, self.budget, tuned)
            if chosen is None:
                return self._give_up(points, before_point, tuned, screened)
            folder = self._export(chosen, before_point, tuned, grams)
            restored = self._restored(folder, chosen, probe, references, own)
            if restored.meets(self.budget, tuned):
                break
            # What is written is rounded to the checkpoint's type; at the edge of a budget that can matter.
            failed.append(chosen.strength)
            shutil.rmtree(folder)
        return self._publish(folder, points, chosen, before_point, tuned, restored, screened)

    # Models: one at a time.

    def _load(self, checkpoint: Checkpoint) -> LoadedModel:
        key = repr(checkpoint)
        if self._model is None or self._model[0] != key:
            self._model = None
            began = time.perf_counter()
            self.progress("load", done=0, total=1)
            self._model = (key, load(checkpoint, dtype=self.config.dtype, device=self.config.device))
            self._spent("load", began)
        return self._model[1]

    def _tuned(self) -> Checkpoint:
        return tuned_checkpoint(self.before, self.after)

    def _spent(self, phase: str, began: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    # Asking.

    def _probe(self) -> Probe:
        config = self.config
        return Probe(
            safety=self.sets.safety.probe,
            benign=self.sets.benign.probe,
            task=self.sets.task.probe,
            judge=make_judge(config.judge),
            scorer=make_scorer(config.scorer),
            max_new_tokens=config.tokens,
            task_tokens=config.task_tokens,
            batch_size=config.batch_size,
        )

    def _own_answers(self) -> dict[str, Any]:
        """BEFORE's replies, by id: to every forbidden and harmless request, and to task requests for screening."""
        began = time.perf_counter()
        model = self._load(as_checkpoint(self.before))
        asked = {
            "safety": [*self.sets.safety.calibration, *self.sets.safety.probe],
            "benign": [*self.sets.benign.calibration, *self.sets.benign.probe],
            "task": list(self.sets.task.calibration) if self.config.screen else [],
        }
        judge = make_judge(self.config.judge)
        total, done = sum(map(len, asked.values())), 0
        found: dict[str, Any] = {"refused": {}}
        for side, samples in asked.items():

            def on_batch(indices: list[int], texts: list[str], base: int = done) -> None:
                self.progress("ask BEFORE", done=base + len(indices), total=total)

            replies = (
                generate(
                    model,
                    samples,
                    max_new_tokens=self.config.tokens,
                    batch_size=self.config.batch_size,
                    on_batch=on_batch,
                )
                if samples
                else []
            )
            done += len(samples)
            # A task's request is harmless until BEFORE says so in words: "no, the picture shows ..." is an answer.
            verdicts = judge.judge(samples, replies, side="unsafe" if side == "safety" else "benign")
            found[side] = {s.id: reply for s, reply in zip(samples, replies, strict=True)}
            found["refused"][side] = {s.id: v.behaviour == "refusal" for s, v in zip(samples, verdicts, strict=True)}
        self._spent("ask BEFORE", began)
        return found

    def _check_answers(self, answers: Mapping[str, Any], probe: Probe) -> None:
        """Raises DataError: sets that BEFORE does not answer as they claim."""
        safety, benign = answers["refused"]["safety"], answers["refused"]["benign"]
        missed = [name for name, refused in safety.items() if not refused]
        rate = 1 - len(missed) / len(safety)
        benign_rate = sum(benign.values()) / len(benign) if benign else 0.0
        if benign and rate < 0.5 < benign_rate:
            raise DataError(
                f"BEFORE refuses {100 * benign_rate:.0f} % of the --benign requests and {100 * rate:.0f} % of the "
                "--safety ones; the two files seem to be swapped."
            )
        if rate < self.config.min_refused:
            shown = ", ".join(f"{name!r} ({answers['safety'][name][:40]!r})" for name in missed[:3])
            raise DataError(
                f"BEFORE ({self.before}) refuses {len(safety) - len(missed)} of {len(safety)} forbidden requests, by "
                f"the judge {probe.judge.name!r}; it is not aligned for this policy: what it does not refuse cannot "
                f"be given back. Not refused: {shown}{', ...' if len(missed) > 3 else ''}. Check that BEFORE is the "
                "aligned model and that the judge knows its refusals, or lower --min-refused."
            )
        if not any(safety[s.id] for s in self.sets.safety.calibration):
            raise DataError("BEFORE refuses none of the forbidden requests to calibrate on; give more of them.")

    def _calibration(self, answers: Mapping[str, Any]) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
        """The samples of every Gram matrix, and what screening moved from the task's to safety's."""
        refused = answers["refused"]
        sets = self.sets
        safety = [_answered(s, answers["safety"][s.id]) for s in sets.safety.calibration if refused["safety"][s.id]]
        benign = [
            _answered(s, answers["benign"][s.id])
            for s in sets.benign.calibration
            # An empty answer has no token, and one that refuses would teach the edit to refuse.
            if answers["benign"][s.id].strip() and not refused["benign"][s.id]
        ]
        moved = [s for s in sets.task.calibration if refused["task"].get(s.id)]
        safety += [_answered(s, answers["task"][s.id]) for s in moved]
        ids = {s.id for s in moved}
        task = [s for s in sets.task.calibration if s.id not in ids]
        if sets.task.calibration and not task:
            raise DataError(
                f"BEFORE refuses all {len(moved)} task samples to calibrate on; the --task file holds forbidden "
                "requests. Pass samples of what was tuned on."
            )
        found = {"safety": safety, "benign": benign, "past": list(sets.past), "task": task or benign or safety}
        return found, {"asked": len(refused["task"]), "refused": sorted(ids)}

    def _end(
        self,
        name: str,
        probe: Probe,
        checkpoint: Checkpoint,
        samples: Sequence[Sample],
        replies: Mapping[str, Any] | None = None,
    ) -> Point:
        """One end of the curve, kept with its distributions on `samples`, which the others are compared with.

        replies: the model's own, as `Probe.point` takes them.
        """
        known = self.work.known(name)
        if known is not None:
            return known
        self.progress(f"ask {name.upper()}", done=0, total=1)
        model = self._load(checkpoint)
        began = time.perf_counter()
        kept = reference(model, samples, batch_size=probe.batch_size)
        self.work.keep_reference(name, kept)
        point = probe.point(model, math.inf if name == "before" else 0.0, known=replies)
        if name == "tuned" and not probe.task and samples:
            point = replace(point, task=1.0)  # it agrees with itself
        self.work.keep_point(name, point)
        self._spent(f"ask {name.upper()}", began)
        self.progress(f"ask {name.upper()}", done=1, total=1)
        return point

    def _at(
        self, candidates: Any, strength: float, probe: Probe, references: Mapping[str, Reference], own: Sequence[Sample]
    ) -> Point:
        self.progress("search", done=len(self.work.points()), total=len(self.config.strengths))
        return probe.point(
            candidates.model(strength), strength, tuned=references["tuned"], before=references["before"], stand_in=own
        )

    # The result.

    def _export(self, chosen: Point, before: Point, tuned: Point, grams: Any) -> Path:
        from holdfast.restore.candidates import export

        began = time.perf_counter()
        # The model that was searched on makes room for the process that checks the result.
        self._model = None
        # One folder for each result: a call with another budget or export may find what a killed one has finished.
        folder = self.work.folder / f"edited-{chosen.strength:g}-{self.config.export or 'as-after'}"
        export(
            self.before,
            self.after,
            chosen.strength,
            grams=grams,
            config=self.config,
            out=folder,
            safety={"probe requests": {"before": tuned.asr, "after": chosen.asr}},
            progress=lambda event, done=0, total=None, **_: self.progress("export", done=done, total=total),
        )
        self._spent("export", began)
        return folder

    def _restored(
        self,
        folder: Path,
        chosen: Point,
        probe: Probe,
        references: Mapping[str, Reference],
        own: Sequence[Sample],
    ) -> Point:
        """What was written, loaded as a user loads it, and asked the same."""
        self.progress("ask RESTORED", done=0, total=1)
        written = Checkpoint(base=str(folder))
        if is_adapter(folder):
            written = as_checkpoint(self.before).under(folder)
        model = self._load(written)
        began = time.perf_counter()
        point = probe.point(
            model, chosen.strength, tuned=references["tuned"], before=references["before"], stand_in=own
        )
        self._model = None
        self._spent("ask RESTORED", began)
        self.progress("ask RESTORED", done=1, total=1)
        return point

    def _record(
        self,
        points: Sequence[Point],
        chosen: Point | None,
        before: Point,
        tuned: Point,
        restored: Point | None,
        screened: Mapping[str, Any],
    ) -> dict[str, Any]:
        stands_for = (
            f"The task: score of its answers ({self.config.scorer})."
            if self.sets.task.probe
            else "No task samples: agreement with the tuned model's next token on harmless requests stands in."
            if self.sets.benign.probe
            else "No task samples: no figure for the task."
        )
        return {
            "curve": [_shown(p) for p in points],
            "chosen": None if chosen is None else _shown(chosen),
            "nearest": _shown(nearest_miss(points, self.budget, tuned)) if chosen is None else None,
            "before": _shown(before),
            "tuned": _shown(tuned),
            "restored": None if restored is None else _shown(restored),
            "budget": asdict(self.budget),
            "settings": {**encode(self.config), "task_measure": stands_for},
            "inputs": {"before": self.before, "after": self.after},
            "probe": {
                "safety": len(self.sets.safety.probe),
                "benign": len(self.sets.benign.probe),
                "task": len(self.sets.task.probe),
            },
            "calibration": {
                "safety": len(self.sets.safety.calibration),
                "benign": len(self.sets.benign.calibration),
                "task": len(self.sets.task.calibration),
                "past": len(self.sets.past),
                "screened": dict(screened),
            },
            "early_stopping": "curtailed: stops when the rest cannot change the answer; error against all probes 0",
            "warnings": [
                *self.sets.unprotected(),
                *self.sets.warnings(),
                *self._screen_warning(screened),
                *([] if chosen is None else (restored or chosen).unsure(self.budget)),
            ],
            "seconds": {phase: round(spent, 1) for phase, spent in self.seconds.items()},
            "version": __version__,
        }

    @staticmethod
    def _screen_warning(screened: Mapping[str, Any]) -> list[str]:
        if not screened["refused"]:
            return []
        shown = ", ".join(screened["refused"][:5]) + (", ..." if len(screened["refused"]) > 5 else "")
        return [
            f"BEFORE refuses {len(screened['refused'])} of {screened['asked']} task samples ({shown}); they were moved "
            "to the safety side. The training data may hold forbidden requests."
        ]

    def _give_up(self, points: Sequence[Point], before: Point, tuned: Point, screened: Mapping[str, Any]) -> Restored:
        record = self._record(points, None, before, tuned, None, screened)
        write_json(self.work.folder / RECORD_FILE, record)
        page = write_restore_page(record, self.work.folder / PAGE_FILE, samples=self._samples(before, tuned, None))
        return Restored(record, None, page)

    def _publish(
        self,
        folder: Path,
        points: Sequence[Point],
        chosen: Point,
        before: Point,
        tuned: Point,
        restored: Point,
        screened: Mapping[str, Any],
    ) -> Restored:
        record = self._record(points, chosen, before, tuned, restored, screened)
        write_json(folder / RECORD_FILE, record)
        write_restore_page(record, folder / PAGE_FILE, samples=self._samples(before, tuned, restored))
        _add_to_card(folder, record)
        if self.out.is_dir():
            self.out.rmdir()  # an empty folder was there
        folder.rename(self.out)
        self.work.remove()
        return Restored(record, self.out, self.out / PAGE_FILE)

    def _samples(self, before: Point, tuned: Point, restored: Point | None, most: int = 6) -> list[dict[str, Any]]:
        """Requests on which the models differ, to look at."""
        found = []
        for kind, side, samples in (
            ("forbidden", "unsafe", self.sets.safety.probe),
            ("harmless", "benign", self.sets.benign.probe),
            ("task", "task", self.sets.task.probe),
        ):
            named = [("before", before), ("tuned", tuned), ("restored", restored)]
            rows = [(name, (p.figures or {}).get("replies", {}).get(side)) for name, p in named if p is not None]
            differing = [
                i for i in range(len(samples)) if len({replies[i] for _, replies in rows if replies is not None}) > 1
            ]
            for i in differing[: most // 2]:
                replies = [(name, replies[i] or "(empty)") for name, replies in rows if replies is not None]
                found.append({"kind": kind, "ask": samples[i].prompt, "replies": replies})
        return found


def _add_to_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Before, tuned, restored: the first section of the model card that the editor wrote."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, section, rest = text.partition("\n## ")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{head.rstrip()}\n\n{card_section(record)}{section}{rest}", encoding="utf-8")


def _plan(
    before: str, after: str, sets: RestoreSets, budget: Budget, config: RestoreConfig, past: Sequence[Path]
) -> dict[str, Any]:
    """Everything that decides what is kept in a work folder; another budget uses the same measurements."""
    parts = (sets.safety, sets.benign, sets.task)
    with open_pair(before, after) as pair:
        models = pair.fingerprints()
    own = encode(config)
    for name in ("whole_curve", "strengths", "export", "min_refused"):
        own.pop(name)
    return {
        "models": models,
        "sets": [[digest(s.calibration), digest(s.probe)] for s in parts] + [digest(sets.past)],
        "past": [str(path.absolute()) for path in past],
        "config": own,
        "version": __version__,
    }


def _answered(sample: Sample, reply: str) -> Sample:
    return replace(sample, turns=(*sample.request, Turn(role="assistant", text=reply)), references=(reply,))


def _shown(point: Point) -> dict[str, Any]:
    """A point for restore.json: figures without the replies, no number that JSON does not have."""
    figures = {k: v for k, v in (point.figures or {}).items() if k != "replies"}
    return {**plain_point(point), "figures": figures}


__all__ = ["PAGE_FILE", "RECORD_FILE", "RestoreConfig", "Restored", "WorkFolder", "check_sets", "restore"]
