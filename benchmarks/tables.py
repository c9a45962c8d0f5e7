"""Every table of the documents, from nothing: `make tables`, or some of them.

    python benchmarks/tables.py --list
    python benchmarks/tables.py rivals order --seeds 0 --prompts 100

A table is one or more commands of this folder; each goes on where it was killed and computes no finished cell again, so
this one may be stopped and started at will. Every table has the seeds and the number of prompts that the documents hold
it with; --seeds and --prompts ask for others. Hours: two to five minutes a method, seed and condition on one core, ten
in the small world. Results go to OUT/<table>/table.md, and between `<!-- table NAME -->` and `<!-- end of table -->` of
docs/REPRODUCTION.md where the document has these marks, with the command, the commit and the versions that made them.
`rivals --chosen benchmarks/chosen.json` takes the settings that the fifty tries of docs/design/rivals.md came to.
Orderings that the paper claims are marked seen, not seen or opposite, by intervals paired by seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from five_seeds import METHODS, cell, interval, names, seeds
from holdfast.files import atomic_path
from holdfast.metrics.intervals import over_seeds
from holdfast.metrics.paired import paired_seeds

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "REPRODUCTION.md"
RIVALS = (
    *("seqft", "hpa", "anchor", "safe_delta", "model_tailor", "safe_lora", "ties", "dare", "resta", "cgm", "cgm_plus"),
    *(
        "ewc",
        "lwf",
        "o_lora",
        "reg_lora",
        "osf",
        "sppft",
        "guardspace",
        "guardspace_released",
        "safe_anchor",
        "intruders",
        "many",
    ),
    *("replay", "safety_replay", "one_shot", "moelora", "joint", "frozen"),
)
# Methods whose settings were chosen on the validation draw, with as many tries for each (choose.py).
TRIED = (
    *("reg_lora", "safety_replay", "guardspace", "safe_anchor", "safe_lora", "ewc", "safe_delta", "osf"),
    *("hpa", "interpolation"),
)
FEW = ("seqft", "hpa", "interpolation", "anchor", "cram", "cram_guard")
SMALL = (*FEW, "hpa_damping_100_percent", "anchor_benign")
# What they stand beside: nothing to choose, and ours, whose settings come from this validation draw too.
BESIDE = ("seqft", "anchor")
ORDER = "guide,digits,larger,classify,caption,tally"
# (better, worse) as the paper orders them on AP, BWT and MASR.
CLAIMS = (("hpa", "safe_delta"), ("safe_delta", "model_tailor"), ("model_tailor", "seqft"), ("hpa", "hpa_eps"))
# key of five_seeds' table -> (heading, whether more is better)
CLAIMED = {"ap": ("AP", True), "bwt": ("BWT", True), "masr": ("MASR", False)}

Commands = list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table. commands: of (options, folder); shown: the Markdown of what they left in the folder.

    seeds, prompts: what the documents hold it with.
    """

    what: str
    commands: Callable[[argparse.Namespace, Path], Commands]
    seeds: str = "0..4"
    prompts: int = 100
    shown: Callable[[Path, argparse.Namespace], str] = lambda out, _: (out / "table.md").read_text()


def stream(*options: str, methods: Sequence[str] = METHODS, conditions: str = "injected") -> Any:
    """`five_seeds.py` with these options; --methods and --conditions of the command line narrow it."""

    def commands(args: argparse.Namespace, out: Path) -> Commands:
        chosen = chosen_of(args, methods)
        return [
            ["five_seeds.py", "--conditions", conditions, "--methods", ",".join(chosen), *options, *common(args, out)]
        ]

    return commands


def chosen_of(args: argparse.Namespace, methods: Sequence[str]) -> list[str]:
    """Those that the command line asks for. Raises SystemExit: none of them."""
    chosen = [name for name in methods if args.methods is None or name in args.methods]
    if not chosen:
        raise SystemExit(f"--methods {','.join(args.methods)}: none of them is among {', '.join(methods)}.")
    return chosen


def common(args: argparse.Namespace, out: Path) -> list[str]:
    return ["--seeds", args.seeds, "--prompts", str(args.prompts), "--jobs", str(args.jobs), "--out", str(out)]


def rivals(args: argparse.Namespace, out: Path) -> Commands:
    """Settings first, on the validation draw, unless they were chosen before; then those on the test draw."""
    tried = chosen_of(args, (*BESIDE, *TRIED))
    choices = [name for name in tried if name in TRIED]
    choose: Commands = []
    if args.chosen is not None:
        missing = sorted(set(choices) - set(json.loads(args.chosen.read_text())))
        if missing:
            raise SystemExit(
                f"--chosen {args.chosen} has no settings for {', '.join(missing)}; leave them out of --methods."
            )
    elif choices:
        options = ["--jobs", str(args.jobs), "--out", str(out / "choose")]
        choose = [["choose.py", "--methods", ",".join(choices), *options]]
    settings = ["--against", "anchor"]
    if choices:
        settings += ["--settings", str(chosen_file(args, out))]
    return [*choose, *stream(*settings, methods=tried)(args, out)]


def chosen_file(args: argparse.Namespace, out: Path) -> Path:
    return args.chosen or out / "choose" / "chosen.json"


def edit_once(args: argparse.Namespace, out: Path) -> Commands:
    return [
        ["five_seeds.py", "--conditions", "injected", "--methods", "seqft", *common(args, out / "seqft")],
        ["edit_once.py", str(out / "seqft"), "--seeds", args.seeds, "--out", str(out)],
    ]


def guard(args: argparse.Namespace, out: Path) -> Commands:
    options = ["--condition", "injected", "--draw", "test", "--forms", "openings", "--rates", "0.005", "--clock", "cpu"]
    return [
        ["five_seeds.py", "--conditions", "injected", "--methods", "cram", *common(args, out / "cram")],
        *(
            ["cram_guard.py", str(out / "cram"), "--seed", str(seed), *options, "--out", str(out / f"seed-{seed}")]
            for seed in seeds(args.seeds)
        ),
    ]


def shown_rivals(out: Path, args: argparse.Namespace) -> str:
    file = chosen_file(args, out)
    chosen = json.loads(file.read_text()) if file.is_file() else {}
    settings = "; ".join(
        f"{name} {json.dumps({key: value for key, value in row.items() if key != 'method'})[1:-1] or 'as it is'}"
        for name, row in chosen.items()
        if args.methods is None or name in args.methods
    )
    return f"{(out / 'table.md').read_text()}\nSettings that were chosen: {settings}."


def shown_once(out: Path, _: argparse.Namespace) -> str:
    rows = json.loads((out / "edit_once.json").read_text())["rows"]
    states = ("theta_0", "tuned", "anchor", "interpolation")
    per_seed = [{name: row[name] for name in states if row[name].get("published", True)} for row in rows.values()]
    return figures(per_seed, states, ("anchor", "interpolation"))


def shown_guard(out: Path, _: argparse.Namespace) -> str:
    per_seed = [json.loads(file.read_text())["rows"] for file in sorted(out.glob("seed-*/cram_guard.json"))]
    states = list(per_seed[0])
    return figures(per_seed, states, (states[-1], "no guard"))


def figures(per_seed: Sequence[Mapping[str, Any]], states: Sequence[str], pair: tuple[str, str]) -> str:
    """A row for each state, and one for the first of `pair` minus the second, paired by seed."""
    keys = {"ap": "AP", "masr": "MASR", "complied": "= comply", "over_refusal": "over-refusal"}
    lines = [f"| | {' | '.join(keys.values())} | seeds |", "|---|" + "---:|" * (len(keys) + 1)]
    for name in states:
        found = [row[name] for row in per_seed if name in row]
        if found:
            cells = (cell(over_seeds([one[key] for one in found]).to_json()) for key in keys)
            lines.append(f"| {name} | {' | '.join(cells)} | {len(found)} |")
    both = [row for row in per_seed if all(name in row for name in pair)]
    if len(both) > 1:
        cells = []
        for key in keys:
            test = paired_seeds([row[pair[0]][key] for row in both], [row[pair[1]][key] for row in both])
            assert test.interval is not None
            difference = test.interval.to_json()
            cells.append(cell({**difference, "std": None}) + interval(difference))
        lines.append(f"| {pair[0]} minus {pair[1]} | {' | '.join(cells)} | {len(both)} |")
    return "\n".join(lines)


TABLES: Mapping[str, Table] = {
    "main": Table(
        what="the paper's comparison, ablations, controls, CRAM and ours, clean and with 1 % harmful samples",
        commands=stream(conditions="clean,injected"),
        prompts=200,
    ),
    "rivals": Table(
        what="rivals and HPA with settings chosen on the validation draw, five tries each, beside ours",
        commands=rivals,
        shown=shown_rivals,
    ),
    "released": Table(what="every rival with the settings of its authors", commands=stream(methods=RIVALS), seeds="0"),
    "harm-0.1": Table(what="0.1 % harmful samples", commands=stream("--harmful", "0.001", methods=FEW)),
    "harm-5": Table(
        what="5 % harmful samples; `anchor_drop` leaves out what the starting model refuses",
        commands=stream("--harmful", "0.05", methods=(*FEW, "anchor_drop")),
    ),
    "order": Table(what="another order of the tasks", commands=stream("--order", ORDER, methods=FEW)),
    "small": Table(
        what="a pretrained language model of 135 M parameters (the extra `small`)",
        commands=stream("--world", "small", methods=SMALL, conditions="clean,injected"),
        seeds="0..2",
        prompts=24,
    ),
    "edit-once": Table(what="edited once, after six plainly tuned tasks", commands=edit_once, shown=shown_once),
    "guard": Table(what="CRAM with and without its guard, on the same experts", commands=guard, shown=shown_guard),
}


def orderings(table: Mapping[str, Any]) -> list[str]:
    """The paper's orderings on these rows: seen, not seen (the paired interval holds 0), opposite, or one seed."""
    lines = []
    for condition, found in table.items():
        for better, worse in CLAIMS:
            rows = [found["methods"].get(name, {}) for name in (better, worse)]
            words = []
            for key, (heading, more_is_better) in CLAIMED.items():
                if not all(key in row for row in rows):
                    continue
                values = [row[key]["values"] for row in rows]
                words.append(f"{heading} {_seen(*values, more_is_better=more_is_better)}")
            if words:
                lines.append(f"- {condition}: {better} better than {worse}: {', '.join(words)}")
    return ["The paper's orderings on these rows:", "", *lines] if lines else []


def _seen(better: Sequence[float], worse: Sequence[float], *, more_is_better: bool) -> str:
    sign = 1 if more_is_better else -1
    if len(better) < 2:
        gained = sign * (better[0] - worse[0])
        direction = "in its direction" if gained > 0 else "against it" if gained < 0 else "equal"
        return f"{direction} by {100 * abs(gained):.1f} (one seed)"
    test = paired_seeds(better, worse)
    assert test.interval is not None
    if not test.interval.leaves_out_zero:
        return "not seen"
    return "seen" if sign * test.difference > 0 else "opposite"


def made_by(commands: Commands, root: Path) -> list[str]:
    """Who made a table: commands (with paths below `root` as the default's), commit, versions, day."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    day = time.strftime("%Y-%m-%d")
    return [
        *(f"`python benchmarks/{' '.join(command).replace(str(root), 'runs/tables')}`  " for command in commands),
        f"({day}, commit {commit or 'unknown'}, {versions}, Python {platform.python_version()})",
    ]


def insert(name: str, text: str, document: Path = DOCUMENT) -> bool:
    """Put `text` between the document's marks of that name. Returns whether it has them."""
    marks = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL)
    before = document.read_text(encoding="utf-8")
    after, found = marks.subn(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", before)
    if found and after != before:
        with atomic_path(document) as temporary:
            temporary.write_text(after, encoding="utf-8")
    return bool(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="which; all without one")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--seeds", default=None, help="0..4 or 0,3,7; as the documents have them without it")
    parser.add_argument("--prompts", type=int, default=None, help="per test split and side of a safety set")
    parser.add_argument("--methods", type=names, default=None, help="only these rows")
    parser.add_argument(
        "--chosen", type=Path, default=None, help="settings for `rivals`, as in benchmarks/chosen.json; no tries then"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/tables"))
    parser.add_argument("--keep-documents", action="store_true", help="write OUT alone")
    args = parser.parse_args()
    if args.list:
        for name, table in TABLES.items():
            print(f"{name:<10} {table.what}; seeds {table.seeds}, {table.prompts} prompts")
        return 0
    unknown = sorted(set(args.tables) - set(TABLES))
    if unknown:
        parser.error(f"no table {unknown[0]!r}; there are {', '.join(TABLES)}")
    if args.chosen is not None and not args.chosen.is_file():
        parser.error(
            f"--chosen {args.chosen} is no file; expected one as benchmarks/chosen.json, or as choose.py leaves"
        )
    for name in args.tables or TABLES:
        out = (args.out / name).absolute()
        out.mkdir(parents=True, exist_ok=True)
        table = TABLES[name]
        asked = {"seeds": args.seeds or table.seeds, "prompts": args.prompts or table.prompts}
        narrowed = argparse.Namespace(**{**vars(args), **asked})
        commands = table.commands(narrowed, out)
        for command in commands:
            print(f"{name}: {' '.join(command)}", flush=True)
            done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=False)
            if done.returncode:
                print(f"{name}: {command[0]} ended with {done.returncode}; the same command goes on there", flush=True)
                return 1
        parts = [table.shown(out, narrowed)]
        if (out / "table.json").is_file():
            parts += orderings(json.loads((out / "table.json").read_text()))
        text = "\n".join([*parts, "", *made_by(commands, args.out.absolute())])
        with atomic_path(out / "shown.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
        if not args.keep_documents and not insert(name, text):
            print(f"({DOCUMENT.name} has no marks for {name}; see {out / 'shown.md'})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
