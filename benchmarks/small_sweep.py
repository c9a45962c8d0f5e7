"""One task of the small world or a few, tuned once and edited under many settings, on the validation draw.

    python benchmarks/small_sweep.py --tasks guide --out runs/small_sweep [--rows anchor,anchor_lam_1] [--seed 0]

Every row is a label of one run (`holdfast.experiment`), with 1 % harmful samples, and has the library's defaults but
for what its name says. A tuning of the same weights on the same samples, and Gram matrices of the same weights and
samples, are made by the first row that needs them; the others take them as they are. A killed sweep goes on where it
stopped; the table has every row that is finished, and the score of every task.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from five_seeds import FIGURES, Lines, cell, names, row_of
from holdfast import experiment
from holdfast.calibration.curvature import model_identity, samples_sha256
from holdfast.checkpoints.gram_store import GramStore
from holdfast.files import atomic_path
from holdfast.methods import seqft
from holdfast.methods._glue import anchor_step
from holdfast.small import recipe
from holdfast.stream.summary import summarize_run
from holdfast.tiny.stream import StreamSize, write_stream
from holdfast.training.supervised import TrainResult
from holdfast.tuners.folders import new_folder

# Row -> method and what is changed of its options.
ROWS: dict[str, dict[str, Any]] = {
    "seqft": {},
    "anchor": {},
    **{f"anchor_mu_{mu:g}": {"edit": {"safety_weight": mu}} for mu in (0.03, 0.1, 0.3, 3.0)},
    **{f"anchor_lam_{lam:g}": {"edit": {"damping": lam}} for lam in (0.0003, 0.001, 0.003, 0.01, 0.3, 1.0)},
    "anchor_no_benign": recipe.NO_BENIGN,
    "anchor_benign_by_tokens": {"edit": {"benign_share": None}},
    "anchor_no_benign_mu_0.3": {"benign_samples": 0, "edit": {"benign_share": None, "safety_weight": 0.3}},
    **{
        f"anchor_no_benign_past_{mu:g}": {"benign_samples": 0, "edit": {"benign_share": None, "past_weight": mu}}
        for mu in (0.0, 0.03, 0.1, 1.0)
    },
    **{
        f"anchor_no_benign_{name}": {**recipe.NO_BENIGN, **change}
        for name, change in {
            "text": {"calibration": {"tokens": "text"}},
            "answer": {"calibration": {"tokens": "answer"}},
            **{f"safety_{count}": {"safety_samples": count} for count in (2, 4, 16)},
        }.items()
    },
    "anchor_no_screen": {"screen": False},
    "anchor_task_160": {"task_samples": 160},
    "anchor_text": {"calibration": {"tokens": "text"}},
    "anchor_answer": {"calibration": {"tokens": "answer"}},
    "anchor_safety_8": {"safety_samples": 8},
    "hpa": {"calibration": {"damping": 1.0}},
    "hpa_damping_1_percent": {"calibration": {"damping": 0.01}},
    "hpa_p_1_5": {"edit": {"keep_bounds": [1.0, 5.0]}},
    "interpolation": {},
}


def main() -> None:
    options = parse()
    size = StreamSize(
        train=recipe.SETTINGS.steps * recipe.SETTINGS.batch,
        validation=options.prompts,
        safety_validation=options.safety,
        test=1,
        safety=1,
    )
    name = f"{'-'.join(options.tasks)}-seed-{options.seed}-{options.prompts}-{options.safety}"
    data = options.out / "data" / name
    if not data.exists():
        write_stream(data, seed=options.seed, harmful=0.01, size=size, task_names=options.tasks, world=recipe.WORLD)
    plain = recipe.run_data(data / "validation.yaml", options.rows, seed=options.seed, harmful=0.01, limit_between=0)
    plain["methods"] = {name: {"method": name.partition("_")[0], **ROWS[name]} for name in options.rows}
    out = options.out / name
    share(out / "shared")
    experiment.run(experiment.decode_run(plain, base=Path.cwd()), out, jobs=1, progress=Lines(name, options.seed))
    summary = summarize_run(out)
    finished = [name for name in ROWS if summary["methods"].get(name, {}).get("complete")]
    table = markdown(summary, finished)
    with atomic_path(out.with_suffix(".md")) as temporary:
        temporary.write_text(table)
    print(table)


def share(folder: Path) -> None:
    """Let rows share what is the same for them: a tuning, and Gram matrices, by what they were made of."""
    tune, collect = seqft.train, anchor_step.collect_grams

    def once(loaded: Any, samples: Any, config: Any, *, work_dir: Path, seed: int, **rest: Any) -> Any:
        kept = folder / f"adapter-{weights(loaded)}-{samples_sha256(samples)[:16]}-{seed}"
        if not kept.exists():
            result = tune(loaded, samples, config, work_dir=work_dir, seed=seed, **rest)
            keep(result.adapter, kept)
            return result
        adapter = Path(work_dir) / "adapter"
        shutil.copytree(kept, adapter, dirs_exist_ok=True)
        return TrainResult(
            adapter=adapter, steps=0, samples=0, cut=0, precision="as the first row was", seconds=0.0, history=()
        )

    def kept_grams(source: Any, samples: Sequence[Any], out: Path, **rest: Any) -> GramStore:
        identity = model_identity(source)
        of = "-".join([identity["fingerprint"], *(a["fingerprint"] for a in identity["adapters"])])
        key = hashlib.sha256(f"{of} {samples_sha256(samples)} {rest['tokens']}".encode()).hexdigest()[:16]
        kept = folder / f"{out.name}-{key}"
        if not kept.exists():
            made = collect(source, samples, out, **rest)
            keep(out, kept)
            return made
        shutil.copytree(kept, out, dirs_exist_ok=True)
        return GramStore.open(out)

    seqft.train = once
    anchor_step.collect_grams = kept_grams


def weights(loaded: Any) -> str:
    """What tells a loaded model's weights from another's."""
    digest = hashlib.sha256()
    for name, parameter in loaded.model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().float().contiguous().numpy())
    return digest.hexdigest()[:16]


def keep(folder: Path, kept: Path) -> None:
    """A copy of `folder` as `kept`, whole or not at all."""
    with new_folder(kept) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)


def markdown(summary: Mapping[str, Any], rows: Sequence[str]) -> str:
    """A row per setting, in %; of several tasks the score of each after the last one."""
    tasks = summary["tasks"] if len(summary["tasks"]) > 1 else []
    headings = [*(heading for _, heading, _ in FIGURES), *tasks]
    lines = ["| setting | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
    for name, row in (("before the task", summary["theta_0"]), *((n, summary["methods"][n]) for n in rows)):
        figures = row_of([row])
        last = row["accuracy"][-1] if "accuracy" in row else [None] * len(tasks)
        cells = [cell(figures.get(key)) for key, _, _ in FIGURES]
        cells += ["" if value is None else f"{100 * value:.1f}" for value in last[: len(tasks)]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def rows(text: str) -> list[str]:
    """Names of rows. Raises: ArgumentTypeError: one that is none."""
    wrong = [name for name in names(text) if name not in ROWS]
    if wrong:
        raise argparse.ArgumentTypeError(f"no row {', '.join(wrong)}; there are {', '.join(ROWS)}")
    return names(text)


def tasks(text: str) -> tuple[str, ...]:
    """Names of tasks. Raises: ArgumentTypeError: one that is none."""
    wrong = [name for name in names(text) if name not in recipe.WORLD.tasks]
    if wrong:
        raise argparse.ArgumentTypeError(f"no task {', '.join(wrong)}; there are {', '.join(recipe.WORLD.tasks)}")
    return tuple(names(text))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=tasks, default=("guide",), help="one after another, as caption,guide")
    parser.add_argument("--rows", type=rows, default=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=24, help="questions of the task")
    parser.add_argument("--safety", type=int, default=16, help="requests per safety set and side")
    parser.add_argument("--out", type=Path, default=Path("runs/small_sweep"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
