"""CRAM on the embedded stream: ablations, oracle routing, one rank-48 LoRA per task, routing confusion, abstention.

    python benchmarks/cram_stream.py runs/cram --seeds 0 1 2 3 4 --methods cram cram_fixed_rank --limit 100
    python benchmarks/cram_stream.py runs/cram-one-group --seeds 0 1 2 3 4 --max-groups 1 --limit 100 --no-reference \\
        --no-abstention --methods cram cram_no_penalty cram_no_reuse

Re-use and the penalty act between experts of one group. With the default `join_floor` every task of this stream opens
its own group, so their effects are measured with `--max-groups 1`.

A killed call goes on where it stopped. OUT/seed<n>/row.json holds the figures of a seed, OUT/cram_stream.json means
over all seeds that are there with the same settings, 95 % t-intervals, and differences from CRAM paired by seed; so
several processes may share OUT with other seeds each. Figures are 0..1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before torch is imported: one thread per process, no spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from peft import LoraConfig, get_peft_model
from PIL import Image

from holdfast.config import encode
from holdfast.data.names import slug
from holdfast.data.types import Sample, Stream, Task
from holdfast.evaluation import CheckpointEvaluator
from holdfast.experiment import Experiment, decode_run, resolve, run
from holdfast.files import write_json
from holdfast.methods import lay_over
from holdfast.metrics.intervals import over_seeds
from holdfast.models.families import editable_linears
from holdfast.models.load import load
from holdfast.stream.protocol import Checkpoint
from holdfast.tiny.pixels import draw
from holdfast.tiny.recipe import run_data
from holdfast.tiny.stream import write_stream
from holdfast.tiny.tasks import generator
from holdfast.tiny.world import SKILLS
from holdfast.training.supervised import train
from holdfast.training.training_config import TrainingConfig
from holdfast.tuners.cram.cram_config import ATTENTION
from holdfast.tuners.cram.folder import load_expert, open_folder
from holdfast.tuners.cram.stored_router import ROUTER
from holdfast.tuners.folders import new_folder

METHODS = ("cram", "cram_no_penalty", "cram_fixed_rank", "cram_no_reuse", "cram_official")
SAFETY = ("masr", "compliance_mean", "collapse_mean", "over_refusal", "helpful")
MODES = ("off", "text", "both")
# What a change of would be another experiment; the rest of the options may differ between rows.
SETTINGS = (
    "tasks", "methods", "split", "limit", "between", "harmful", "learning_rate", "reference_learning_rate", "steps",
    "max_groups", "sigma_scale", "warmup_fraction", "skills", "reference", "abstention",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One seed's run of the methods, and where its other files go."""

    experiment: Experiment
    summary: Mapping[str, Any]
    folder: Path

    @property
    def stream(self) -> Stream:
        return self.experiment.stream

    def step(self, method: str, step: int = -1) -> Path:
        """The folder of a method's step, the last one by default."""
        step %= len(self.stream.tasks)
        return self.experiment.directory.step_dir(method, step, self.stream.tasks[step].name)

    def ask(self, checkpoint: Checkpoint, stream: Stream, name: str) -> dict[str, Any]:
        """The evaluator's rows of every task and safety set of `stream`; answers are kept under `name`."""
        evaluator = CheckpointEvaluator(self.experiment.config.evaluation)
        return evaluator(
            checkpoint, stream=stream, step=None, out_dir=self.folder / "answers" / name, progress=lambda *_, **__: None
        )

    def tuned(self, folder: Path) -> Checkpoint:
        return Checkpoint(base=self.experiment.theta_0.base, adapters=(str(folder),))


def run_methods(seed: int, args: argparse.Namespace, methods: Sequence[str], out: Path) -> Seed:
    """Every task with every method, on the stream of this seed."""
    folder = out / f"seed{seed}"
    data = folder / "data"
    if not data.exists():
        write_stream(data, seed=seed, harmful=args.harmful, task_names=args.tasks)
    file = data / ("stream.yaml" if args.split == "test" else "validation.yaml")
    plain = run_data(file, methods, seed=seed, harmful=args.harmful, limit=args.limit, limit_between=args.between)
    plain["defaults"]["training"]["max_steps"] = args.steps
    own = {"training": {"learning_rate": args.learning_rate}} if args.learning_rate else {}
    cram = {"sigma_scale": args.sigma_scale, "warmup_fraction": args.warmup_fraction}
    plain["defaults"]["cram"] = {key: value for key, value in cram.items() if value is not None}
    if args.max_groups is not None:
        plain["defaults"]["cram"]["released"] = {"max_groups": args.max_groups}
    plain["methods"] = {name: lay_over(options, own) for name, options in plain["methods"].items()}
    experiment = resolve(decode_run(plain, base=folder), folder / f"run-{args.split}", progress=_say)
    summary = run(experiment.config, experiment.out, progress=_say)
    return Seed(experiment=experiment, summary=summary, folder=folder)


def row_of(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Every method and reference of one seed."""
    done = run_methods(seed, args, args.methods, args.out)
    row: dict[str, Any] = {"seed": seed, "settings": settings(args), "theta_0": theta_0(done)}
    row["methods"] = {name: method_row(done, name) for name in args.methods}
    if "cram" in args.methods:
        row["oracle"] = oracle(done)
    if args.reference:
        row["lora48_oracle"] = reference(done, seed, args)
    if args.abstention and "cram" in args.methods:
        row["abstention"] = abstention(done, seed, args.skills)
    return row


def method_row(done: Seed, name: str) -> dict[str, Any]:
    figures = done.summary["methods"][name]
    tasks = range(len(done.stream.tasks))
    learned = [json.loads((done.step(name, step) / "cram.json").read_text()) for step in tasks]
    return {
        **{key: figures[key] for key in ("ap", "mft", "bwt", "accuracy", *SAFETY)},
        "parameters": {row["expert"]: row["parameters"] for row in learned},
        **routing(done, name),
    }


def routing(done: Seed, name: str) -> dict[str, Any]:
    """Confusion (rows: task of the request; columns: the expert with most weight, then the base) and its accuracy."""
    cram = open_folder(done.step(name) / "cram")
    names = [e.name for e in cram.router.experts]
    confusion = []
    for task in done.stream.tasks:
        counts = [0] * (len(names) + 1)
        for row in cram.explain(_asked(done, task.test)):
            best = max(row["weights"], key=row["weights"].get)
            counts[len(names) if row["abstained"] else names.index(best)] += 1
        confusion.append(counts)
    right = sum(confusion[i][names.index(task.name)] for i, task in enumerate(done.stream.tasks))
    return {
        "groups": [cram.router.group_name(e.group) for e in cram.router.experts],
        "confusion": confusion,
        "routing_accuracy": right / sum(map(sum, confusion)),
    }


def oracle(done: Seed) -> dict[str, Any]:
    """Each task asked with its own expert of `cram` alone."""
    folders = sorted((done.step("cram") / "cram" / "experts").iterdir())
    scores = {
        task.name: _own_task(done, task, folder, f"oracle/{slug(task.name)}")
        for task, folder in zip(done.stream.tasks, folders, strict=True)
    }
    return {"scores": scores, "ap": _mean(scores.values())}


def reference(done: Seed, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One rank-48 LoRA per task on the linears that CRAM adapts, each asked only its own task."""
    rate = args.reference_learning_rate or args.learning_rate
    cram = run_data(Path(), ["cram"], seed=seed)
    plain = lay_over(cram["defaults"]["training"], cram["methods"]["cram"]["training"])
    plain.update({"max_steps": args.steps, "rank": 48, "alpha": 48, **({"learning_rate": rate} if rate else {})})
    config = TrainingConfig(**plain)
    # The settings are in the name, so other settings never take up these weights.
    tag = f"lora48-{config.max_steps}-steps-lr-{config.learning_rate:g}"
    scores, parameters = {}, {}
    for step, task in enumerate(done.stream.tasks):
        adapter = done.folder / tag / slug(task.name)
        if not adapter.exists():
            train(
                load(done.experiment.theta_0),
                task.train,
                config,
                work_dir=done.folder / tag / f"{slug(task.name)}-training",
                seed=1000 * seed + step,
                out=adapter,
                adapter=_lora,
            )
        scores[task.name] = _own_task(done, task, adapter, f"{tag}/{slug(task.name)}")
        parameters[task.name] = sum(a.numel() + b.numel() for a, b in load_expert(adapter).values())
    return {"scores": scores, "ap": _mean(scores.values()), "parameters": parameters}


def _lora(loaded: Any, config: TrainingConfig) -> Any:
    names = [n for n in editable_linears(loaded.model) if n.rpartition(".")[2] in ATTENTION]
    lora = LoraConfig(r=config.rank, lora_alpha=int(config.alpha), lora_dropout=config.dropout, target_modules=names)
    return get_peft_model(loaded.model, lora)


def abstention(done: Seed, seed: int, skill_count: int) -> dict[str, Any]:
    """The same experts with abstention off, by instruction, and by instruction and image, beside theta_0.

    Each: AP, safety, the base's skills (`skill_count` requests of each), and the share of requests that went to the
    base. Floors come from held-out training samples of each task.
    """
    skills = skill_stream(done.folder / "skills", seed, skill_count)
    found = {"theta_0": {**theta_0(done), **_skills(done.ask(done.experiment.theta_0, skills, "skills-theta_0"))}}
    for mode in MODES:
        folder = variant(done.step("cram") / "cram", done.folder / f"abstain-{mode}", mode)
        if mode == done.experiment.methods["cram"].config.cram.abstain:
            figures = done.summary["methods"]["cram"]
            row = {"ap": figures["ap"], **_safety(figures)}
        else:
            row = scored(done, done.tuned(folder), f"abstain-{mode}")
        answers = done.ask(done.tuned(folder), skills, f"skills-{mode}")
        found[mode] = {**row, **_skills(answers), "abstained": abstained(done, folder, skills)}
    return found


def variant(folder: Path, out: Path, abstain: str) -> Path:
    """A copy of a CRAM folder with another rule of abstention."""
    if not out.exists():
        with new_folder(out) as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            router = json.loads((temporary / ROUTER).read_text())
            router["config"]["abstain"] = abstain
            write_json(temporary / ROUTER, router)
    return out


def scored(done: Seed, checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """AP and safety figures of a checkpoint that knows all tasks, by the run's evaluation."""
    rows = done.ask(checkpoint, done.stream, name)
    safety = rows["safety"].values()
    return {
        "ap": _mean(row["value"] for row in rows["scores"].values()),
        "masr": _mean(row["asr"] for row in safety),
        "compliance_mean": _mean(row["compliance"] for row in safety),
        "collapse_mean": _mean(row["collapse"] for row in safety),
        "over_refusal": _mean(row["benign"]["over_refusal"] for row in safety),
        "helpful": _mean(row["benign"]["helpful"] for row in safety),
    }


def abstained(done: Seed, folder: Path, skills: Stream) -> dict[str, Any]:
    """Share of requests that go to the base alone: per task, per side of the safety sets, over all skills."""
    cram = open_folder(folder)

    def share(samples: Sequence[Sample]) -> float:
        return float(cram.route(samples).abstained.float().mean())

    return {
        "tasks": {task.name: share(_asked(done, task.test)) for task in done.stream.tasks},
        "unsafe": _mean(share(_asked(done, s.unsafe)) for s in done.stream.safety),
        "benign": _mean(share(_asked(done, s.benign)) for s in done.stream.safety),
        "skills": _mean(share(task.test) for task in skills.tasks),
    }


def skill_stream(folder: Path, seed: int, count: int) -> Stream:
    """`count` fresh requests of each skill that the base was taught, none of them in any task's data."""
    tasks = []
    for name, skill in SKILLS.items():
        if name == "dialogue":  # several turns; its questions are those of the other skills
            continue
        rng = generator(seed, "skills", name)
        samples = []
        for i in range(count):
            example = skill(rng)
            path = folder / slug(name) / f"{i:03d}.png"
            if example.scene is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw(example.scene, rng, "test")).save(path)
            images = () if example.scene is None else (path,)
            samples.append(
                Sample.single(f"{slug(name)}-{i:03d}", example.prompt, images=images, references=[example.answer])
            )
        tasks.append(Task(name=name, train=[], test=samples, max_new_tokens=40))
    return Stream(name="skills", tasks=tasks)


def _skills(rows: Mapping[str, Any]) -> dict[str, Any]:
    scores = {name: row["value"] for name, row in rows["scores"].items()}
    return {"skills": scores, "skills_mean": _mean(scores.values())}


def _own_task(done: Seed, task: Task, adapter: Path, name: str) -> float:
    rows = done.ask(done.tuned(adapter), replace(done.stream, tasks=[task], safety=[]), name)
    return float(rows["scores"][task.name]["value"])


def theta_0(done: Seed) -> dict[str, Any]:
    return {"ap": _mean(done.summary["theta_0"]["scores"].values()), **_safety(done.summary["theta_0"])}


def _safety(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in SAFETY}


def _asked(done: Seed, samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[: done.experiment.config.evaluation.limit]


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _say(event: str, **values: Any) -> None:
    if event == "phase":
        print(values.get("method"), values.get("task"), values.get("phase"), flush=True)


# Over seeds


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return encode({key: getattr(args, key) for key in SETTINGS})


def rows_of(out: Path, wanted: Mapping[str, Any], name: str = "row.json") -> list[dict[str, Any]]:
    """The rows under `out` of these settings, by seed; others are named on the screen and left out."""
    rows = []
    for path in out.glob(f"seed*/{name}"):
        row = json.loads(path.read_text())
        if row["settings"] == wanted:
            rows.append(row)
        else:
            print(f"{path} has other settings and is left out.")
    return sorted(rows, key=lambda row: row["seed"])


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; what stands beside `minus_cram` is a difference paired by seed."""
    plain = [figures_of(row) for row in rows]
    found: dict[str, Any] = {}
    for name in plain[0]:
        found[name] = {key: over([row[name][key] for row in plain]) for key in plain[0][name]}
        if name in ("cram", "theta_0") or "cram" not in plain[0]:
            continue
        base = [row["cram"] for row in plain]
        shared = [key for key in plain[0][name] if key in base[0]]
        found[name]["minus_cram"] = {
            key: over([row[name][key] - own[key] for row, own in zip(plain, base, strict=True)]) for key in shared
        }
        if "parameters" in shared:
            shares = [own["parameters"] / row[name]["parameters"] for row, own in zip(plain, base, strict=True)]
            found[name]["cram_parameter_share"] = over(shares)
    return found


def figures_of(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of one seed's row: who -> figure -> value."""
    keys = ("ap", "mft", "bwt", *SAFETY, "routing_accuracy")
    found = {"theta_0": dict(row["theta_0"])}
    for name, figures in row["methods"].items():
        # One task has no backward transfer.
        found[name] = {key: figures[key] for key in keys if figures[key] is not None}
        found[name]["parameters"] = sum(figures["parameters"].values())
    if "oracle" in row:
        found["cram_oracle"] = {"ap": row["oracle"]["ap"]}
    if "lora48_oracle" in row:
        own = row["lora48_oracle"]
        found["lora48_oracle"] = {"ap": own["ap"], "parameters": sum(own["parameters"].values())}
    for mode, figures in row.get("abstention", {}).items():
        shares = figures.get("abstained", {})
        found[f"abstain {mode}"] = {
            **{key: figures[key] for key in ("ap", *SAFETY, "skills_mean")},
            **{f"abstained_{key}": shares[key] for key in ("unsafe", "benign", "skills") if key in shares},
            **({"abstained_tasks": _mean(shares["tasks"].values())} if shares else {}),
        }
    return found


def over(values: Sequence[float]) -> dict[str, Any]:
    found = over_seeds(values).to_json()
    return {**{key: found[key] for key in ("value", "low", "high", "std", "n")}, "values": list(values)}


def table(summary: Mapping[str, Any]) -> str:
    """One line per method and figure: mean [95 % interval] over seeds, and the paired difference from CRAM."""
    lines = []
    for name, figures in summary.items():
        for key, value in figures.items():
            if key == "minus_cram":
                continue
            line = f"{name:18} {key:22} {shown(value)}"
            difference = figures.get("minus_cram", {}).get(key)
            lines.append(line + (f"   minus cram {shown(difference)}" if difference else ""))
    return "\n".join(lines)


def shown(figure: Mapping[str, Any]) -> str:
    bounds = "" if figure["low"] is None else f" [{figure['low']:.4g}, {figure['high']:.4g}]"
    return f"{figure['value']:.4g}{bounds}"


def publish(args: argparse.Namespace) -> None:
    rows = rows_of(args.out, settings(args))
    summary = summarize(rows)
    write_json(
        args.out / "cram_stream.json",
        {"settings": settings(args), "seeds": [row["seed"] for row in rows], "summary": summary},
    )
    print(f"{len(rows)} seed(s)\n{table(summary)}", flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every experiment with CRAM on the embedded stream has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=lambda text: Path(text).absolute())
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--tasks", nargs="+", help="default: all of the embedded stream")
    made.add_argument("--split", choices=["test", "validation"], default="test")
    made.add_argument("--limit", type=int, help="prompts per test split and side of a safety set")
    made.add_argument("--between", type=int, default=25, help="of them along the way; not part of any figure")
    made.add_argument("--harmful", type=float, default=0.0, help="share of harmful training samples")
    made.add_argument("--learning-rate", type=float, help="default: CRAM's on the embedded model")
    made.add_argument("--steps", type=int, default=60, help="optimizer steps per task")
    made.add_argument("--max-groups", type=int)
    made.add_argument("--sigma-scale", type=float)
    made.add_argument("--warmup-fraction", type=float)
    return made


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", default=list(METHODS))
    options.add_argument("--reference-learning-rate", type=float, help="default: that of the experts")
    options.add_argument("--skills", type=int, default=30, help="requests per skill of the base")
    options.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--abstention", action=argparse.BooleanOptionalAction, default=True)
    args = options.parse_args()
    for seed in args.seeds:
        path = args.out / f"seed{seed}" / "row.json"
        if not path.exists() or json.loads(path.read_text())["settings"] != settings(args):
            write_json(path, row_of(seed, args))
        publish(args)


if __name__ == "__main__":
    main()
