"""What the guard of CRAM does and costs: no guard, refusal openings, probe, on the same experts; and its latency.

    python benchmarks/five_seeds.py --seeds 0 --conditions injected --methods cram --draw validation --out runs/guard
    python benchmarks/cram_guard.py runs/guard --seed 0 --condition injected --draw validation

The runs are those of `five_seeds.py`. Experts are not trained again: a guard is fitted to a run's last folder from its
training requests and theta_0's calibration answers, and every prompt of the run is put to it. What answers then is
theta_0 where the guard says so and the run's model elsewhere, greedily, so answers that are on disk are put together;
`--ask` asks the guarded folders instead. Choose form and rate on the validation draw, report on test.

Latency is that of prefill + 16 tokens of one request, guard on over guard off, the median over requests.
`--clock cpu` counts the processor's time, for a machine that others use. Figures are 0..1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from holdfast import judges, scorers
from holdfast.data.names import slug
from holdfast.data.types import Sample
from holdfast.evaluation import CheckpointEvaluator
from holdfast.experiment import Experiment, decode_run, resolve
from holdfast.files import write_json
from holdfast.methods.seqft import draw
from holdfast.metrics.safety import set_figures
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint
from holdfast.tiny.recipe import run_data
from holdfast.tuners.cram.folder import from_pretrained, save_pretrained
from holdfast.tuners.cram.guard import FORMS, Guard, begin_guard, fit, see_task

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def opened(args: argparse.Namespace) -> Experiment:
    """A run of `five_seeds.py`, read again."""
    data = args.runs / "data" / args.condition / f"seed-{args.seed}"
    file = data / ("stream.yaml" if args.draw == "test" else "validation.yaml")
    plain = run_data(file, [args.method], seed=args.seed, harmful=args.harmful if args.condition == "injected" else 0.0)
    config = decode_run(plain, base=Path.cwd())
    return resolve(config, args.runs / args.draw / args.condition / f"seed-{args.seed}")


def guards_of(experiment: Experiment, requests: int, forms: list[str], rates: list[float]) -> dict[str, Guard]:
    """Guards by "form rate", fitted from one reading of theta_0."""
    loaded, stream = load(experiment.theta_0), experiment.with_own_answers()
    found = {}
    for form in forms:
        guard = begin_guard(loaded, form, list(stream.safety_calibration))  # type: ignore[arg-type]
        for task in stream.tasks:
            guard = see_task(guard, loaded, task.name, draw(task.train, requests, experiment.config.seed))
        found |= {f"{form} {rate:g}": fit(guard, false_alarm=rate) for rate in rates}
    return found


def answers(folder: Path, name: str, key: str, side: str | None = None) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return {row["id"]: row[key] for row in rows if row.get("side") == side}


def composed(experiment: Experiment, before: Path, after: Path, guarded: dict[str, set[str]]) -> dict[str, Any]:
    """AP and safety figures when the requests `guarded` (file -> ids) get theta_0's answer and others the run's."""

    def put(samples: list[Sample], name: str, key: str, side: str | None = None) -> list[str]:
        own, tuned = answers(before, name, key, side), answers(after, name, key, side)
        return [(own if s.id in guarded[name] else tuned)[s.id] for s in samples]

    limit = experiment.config.evaluation.limit
    scores = {}
    for task in experiment.stream.tasks:
        samples = list(task.test[:limit])
        scorer = scorers.get(task.scorer, mode=task.scorer_mode, **task.scorer_options)
        texts = put(samples, f"task-{slug(task.name)}", "prediction")
        scores[task.name] = scorer.aggregate(texts, [s.references for s in samples], [s.meta for s in samples])[0]
    chosen = experiment.config.evaluation.judges[0]
    judge = judges.get(chosen.name, **chosen.options)
    rows = []
    for safety in experiment.stream.safety:
        name = f"safety-{slug(safety.name)}"
        verdicts = {
            side: judge.judge(samples, put(samples, name, "reply", side), side=side)  # type: ignore[arg-type]
            for side, samples in (("unsafe", list(safety.unsafe[:limit])), ("benign", list(safety.benign[:limit])))
        }
        rows.append(
            set_figures(
                [v.label for v in verdicts["unsafe"]],
                [v.behaviour for v in verdicts["unsafe"]],
                [v.behaviour for v in verdicts["benign"]],
            )
        )
    return {
        "ap": mean(scores.values()),
        "masr": mean(row["asr"] for row in rows),
        "complied": mean(row["compliance"] for row in rows),
        "over_refusal": mean(row["benign"]["over_refusal"] for row in rows),
        "helpful": mean(row["benign"]["helpful"] for row in rows),
        "scores": scores,
    }


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def asked_of(experiment: Experiment) -> dict[str, list[Sample]]:
    """File name -> the samples that the run's evaluation asked."""
    limit = experiment.config.evaluation.limit
    found = {f"task-{slug(t.name)}": list(t.test[:limit]) for t in experiment.stream.tasks}
    return found | {f"safety-{slug(s.name)}": [*s.unsafe[:limit], *s.benign[:limit]] for s in experiment.stream.safety}


def figures(experiment: Experiment, args: argparse.Namespace) -> dict[str, Any]:
    last = len(experiment.stream.tasks) - 1
    step = experiment.directory.step_dir(args.method, last, experiment.stream.tasks[last].name)
    before = next(p for p in experiment.directory.theta_0_dir.rglob("predictions") if p.is_dir())
    after = step / "predictions"
    asked = asked_of(experiment)
    nobody: dict[str, set[str]] = {name: set() for name in asked}
    everybody = {name: {s.id for s in samples} for name, samples in asked.items()}
    found = {
        "theta_0": composed(experiment, before, before, everybody),
        "no guard": composed(experiment, before, after, nobody),
    }
    made = guards_of(experiment, args.requests, args.forms, args.rates)
    cram = from_pretrained(step / "cram", load(experiment.theta_0))
    for name, guard in made.items():
        cram.guard = guard
        if name.split()[0] not in {n.split()[0] for n in found}:
            cram._score_of.clear()  # another form has other scores
        guarded, shares = {}, {}
        for file, samples in asked.items():
            scores = cram.guard_scores(samples)
            assert scores is not None
            caught = scores >= guard.threshold
            guarded[file] = {s.id for s, yes in zip(samples, caught, strict=True) if yes}
            shares[file] = float(caught.float().mean())
        found[name] = {**composed(experiment, before, after, guarded), "guarded": shares, **guard.describe()}
        if args.ask:
            folder = args.out / name.replace(" ", "-")
            if not folder.exists():
                save_pretrained(cram, folder)
            asked_rows = CheckpointEvaluator(experiment.config.evaluation)(
                Checkpoint(base=experiment.theta_0.base, adapters=(str(folder),)),
                stream=experiment.stream,
                step=None,
                out_dir=args.out / "answers" / name.replace(" ", "-"),
                progress=lambda *_, **__: None,
            )
            found[name]["asked"] = {
                "ap": mean(row["value"] for row in asked_rows["scores"].values()),
                "masr": mean(row["asr"] for row in asked_rows["safety"].values()),
                "over_refusal": mean(row["benign"]["over_refusal"] for row in asked_rows["safety"].values()),
            }
    cram.detach()
    return found


def latency(experiment: Experiment, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one request (prefill and 16 tokens), guard off and on, and their ratio; medians over rounds."""
    last = len(experiment.stream.tasks) - 1
    step = experiment.directory.step_dir(args.method, last, experiment.stream.tasks[last].name)
    guard = guards_of(experiment, 16, ["openings"], [0.05])["openings 0.05"]
    # Above every score: the request still reaches the experts, so that what differs is the asking.
    guard = replace(guard, threshold=1e9)
    cram = from_pretrained(step / "cram", load(experiment.theta_0))
    loaded = replace(cram.loaded, tuner=cram)
    loaded.model.generation_config.eos_token_id = None
    clock, seconds = CLOCKS[args.clock], {"off": [], "on": []}
    samples = list(experiment.stream.tasks[0].test[: args.rounds])
    for sample in samples:
        for name, value in (("off", None), ("on", guard)):
            cram.guard = value
            cram._score_of.clear()
            start = clock()
            sixteen(loaded, sample)
            seconds[name].append(clock() - start)
    ratios = [on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    cram.detach()
    return {
        "clock": args.clock,
        "off_s": statistics.median(seconds["off"]),
        "on_s": statistics.median(seconds["on"]),
        "ratio": statistics.median(ratios[1:] or ratios),
    }


def sixteen(loaded: Any, sample: Sample) -> None:
    """Sixteen tokens, however early the answer would end."""
    from holdfast.models.encode import encode_request

    inputs = {k: v.to(loaded.device) for k, v in encode_request(loaded, [sample]).items()}
    with torch.inference_mode(), loaded.serving([sample]):
        loaded.model.generate(**inputs, do_sample=False, max_new_tokens=16, min_new_tokens=16)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, help="--out of five_seeds.py")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--condition", choices=["clean", "injected"], default="injected")
    options.add_argument("--draw", choices=["test", "validation"], default="test")
    options.add_argument("--harmful", type=float, default=0.01)
    options.add_argument("--method", default="cram")
    options.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options.add_argument("--rates", nargs="+", type=float, default=[0.002, 0.005, 0.01, 0.02])
    options.add_argument("--requests", type=int, default=200, help="training requests per task")
    options.add_argument("--ask", action="store_true", help="ask the guarded folders too, instead of putting together")
    options.add_argument("--latency-only", action="store_true")
    options.add_argument("--clock", choices=list(CLOCKS), default="wall")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--out", type=Path, default=Path("runs/cram-guard"))
    args = options.parse_args()
    args.out = args.out.absolute()
    args.runs = args.runs.absolute()
    experiment = opened(args)
    found: dict[str, Any] = {"latency": latency(experiment, args)}
    print("latency", json.dumps(found["latency"]), flush=True)
    if not args.latency_only:
        found["rows"] = figures(experiment, args)
        for name, row in found["rows"].items():
            shown = " ".join(
                f"{key} {100 * row[key]:.1f}" for key in ("ap", "masr", "complied", "over_refusal", "helpful")
            )
            print(f"{name:18} {shown}", row.get("asked", ""), flush=True)
    write_json(args.out / "cram_guard.json", found)


if __name__ == "__main__":
    main()
