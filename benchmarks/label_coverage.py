"""How wrong a judge is on XSTest, and whether rates corrected by labels cover what people say.

    python benchmarks/label_coverage.py [--data ../shared/fixtures/judges/xstest_completions.jsonl.gz] [--draws 1000]

1. Each judge's own rates against people's (two annotators, settled), per model: `--measured FILE` writes the table that
   reports show where a run has no labels (`src/holdfast/judges/measured.json`).
2. 1,000 draws of 50 and of 100 labels per model and side: coverage of the 95 % intervals and mean error of the
   stratified estimate (half-count intervals), of prediction-powered inference with plain normal intervals, of Rogan
   and Gladen's correction with the error measured on another model, and of the judge alone.

The data is XSTest's (Rottger et al. 2024, CC BY 4.0), three models' replies; it is not part of the package.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from holdfast import judges
from holdfast.data.types import Sample
from holdfast.metrics.corrected import Stratum, allocate, corrected_rate

Z = 1.959963984540054
# side -> (what a judge says, what people say) of a reply that counts in the side's rate
HIT = {"unsafe": ("compliance", "full_compliance"), "benign": ("refusal", "full_refusal")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/fixtures/judges/xstest_completions.jsonl.gz"))
    parser.add_argument("--judges", default="keyword,keyword_strict")
    parser.add_argument("--labels", default="50,100", help="labels per model and side")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--measured", type=Path, help="write the judges' measured errors to this file")
    parser.add_argument("--out", type=Path, help="write every cell as JSON")
    options = parser.parse_args()
    with gzip.open(options.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = options.judges.split(",")
    verdicts = {name: judged(name, rows) for name in names}
    measured = {name: error_of(rows, verdicts[name]) for name in names}
    for name, found in measured.items():
        print(f"{name}: {json.dumps(found)}")
    if options.measured:
        write_measured(options.measured, measured)
    cells = []
    for number in map(int, options.labels.split(",")):
        for name in names:
            cells += coverage(name, rows, verdicts[name], number, options.draws)
    report(cells)
    if options.out:
        options.out.write_text(json.dumps(cells, indent=1))


def judged(name: str, rows: list[dict]) -> list[str]:
    """The judge's behaviour for every row, in order."""
    judge, found = judges.get(name), [""] * len(rows)
    for side in ("unsafe", "benign"):
        some = [i for i, row in enumerate(rows) if row["side"] == side]
        samples = [Sample.single(rows[i]["id"], rows[i]["request"]) for i in some]
        verdicts = judge.judge(samples, [rows[i]["reply"] for i in some], side=side)
        for i, verdict in zip(some, verdicts, strict=True):
            found[i] = verdict.behaviour
    return found


def error_of(rows: list[dict], said: list[str]) -> dict:
    """The judge against people: on clear replies, and its rates per model (judge minus people), all 0..1."""
    clear = [(row["label"], b) for row, b in zip(rows, said, strict=True) if row["label"] != "partial_refusal"]
    of = {kind: [b for label, b in clear if label == kind] for kind in ("full_refusal", "full_compliance")}
    scored = [(label, b) for label, b in clear if b != "unscored"]
    rates: dict[str, dict[str, float]] = {"unsafe": {}, "benign": {}}
    for side, model in sorted({(row["side"], row["model"]) for row in rows}):
        own = [(row, b) for row, b in zip(rows, said, strict=True) if (row["side"], row["model"]) == (side, model)]
        verdict, label = HIT[side]
        known = [b for _, b in own if b != "unscored"]
        people = sum(row["label"] == label for row, _ in own) / len(own)
        rates[side][model] = round(sum(b == verdict for b in known) / len(known) - people, 4)
    return {
        "replies": len(rows),
        "missed_refusal": round(sum(b != "refusal" for b in of["full_refusal"]) / len(of["full_refusal"]), 4),
        "false_refusal": round(sum(b == "refusal" for b in of["full_compliance"]) / len(of["full_compliance"]), 4),
        "accuracy": round(sum((label == "full_refusal") == (b == "refusal") for label, b in scored) / len(scored), 4),
        "unscored": round(sum(b == "unscored" for b in said) / len(said), 4),
        "compliance_error": rates["unsafe"],
        "over_refusal_error": rates["benign"],
    }


def write_measured(path: Path, measured: dict[str, dict]) -> None:
    old = json.loads(path.read_text(encoding="utf-8"))["judges"] if path.is_file() else {}
    data = {
        "format": "holdfast.measured/1",
        "set": "XSTest",
        "source": "Röttger et al. 2024, completions of three models with two annotators, CC BY 4.0",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "judges": {**old, **measured},
    }
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def coverage(name: str, rows: list[dict], said: list[str], number: int, draws: int) -> list[dict]:
    """One row per model and side: coverage, width and error of each way to correct."""
    by_cell: dict[tuple[str, str], list[tuple[str, bool]]] = defaultdict(list)
    for row, behaviour in zip(rows, said, strict=True):
        by_cell[row["side"], row["model"]].append((behaviour, row["label"] == HIT[row["side"]][1]))
    found = []
    for (side, model), pairs in by_cell.items():
        verdict = HIT[side][0]
        judge = np.array([b == verdict for b, _ in pairs], dtype=float)
        people = np.array([y for _, y in pairs], dtype=float)
        truth = float(people.mean())
        # Rogan and Gladen with the sensitivity and specificity of each other model.
        others = [
            rogan_gladen(judge.mean(), [(b == verdict, y) for b, y in other])
            for (s, m), other in by_cell.items()
            if s == side and m != model
        ]
        rng = np.random.default_rng(0)
        row = {"judge": name, "side": side, "model": model, "labels": number, "people": truth}
        row["judge alone"] = {"error": abs(float(judge.mean()) - truth)}
        row["rogan-gladen"] = {"error": float(np.mean([abs(v - truth) for v in others]))}
        ways: dict[str, Callable[[], tuple[float, float, float]]] = {
            "stratified": stratified(pairs, number, rng, half_count),
            "stratified, normal": stratified(pairs, number, rng, normal),
            "ppi": lambda judge=judge, people=people, rng=rng: ppi(judge, people, number, rng),
        }
        for way, draw in ways.items():
            values = np.array([draw() for _ in range(draws)])
            inside = (values[:, 1] <= truth + 1e-9) & (truth - 1e-9 <= values[:, 2])
            row[way] = {
                "coverage": float(inside.mean()),
                "width": float((values[:, 2] - values[:, 1]).mean()),
                "error": float(np.abs(values[:, 0] - truth).mean()),
            }
        found.append(row)
    return found


def stratified(
    pairs: list[tuple[str, bool]],
    number: int,
    rng: np.random.Generator,
    way: Callable[[list[Stratum]], tuple[float, float, float]],
) -> Callable[[], tuple[float, float, float]]:
    """Draws of the stratified estimate, the judge's verdicts as strata, and its interval in one of two ways."""
    strata: dict[str, list[bool]] = defaultdict(list)
    for behaviour, hit in pairs:
        strata[behaviour].append(hit)
    sizes = [len(hits) for hits in strata.values()]
    counts = allocate(sizes, number)
    hits = [sum(hits) for hits in strata.values()]
    seen: dict[tuple[int, ...], tuple[float, float, float]] = {}

    def draw() -> tuple[float, float, float]:
        x = tuple(int(rng.hypergeometric(h, n - h, c)) for h, n, c in zip(hits, sizes, counts, strict=True))
        if x not in seen:
            seen[x] = way([Stratum(size=n, labelled=c, hits=k) for n, c, k in zip(sizes, counts, x, strict=True)])
        return seen[x]

    return draw


def half_count(strata: list[Stratum]) -> tuple[float, float, float]:
    """What the library does."""
    rate = corrected_rate(strata)
    return float(rate.value or 0.0), rate.low, rate.high


def normal(strata: list[Stratum]) -> tuple[float, float, float]:
    """The same estimate with the plain normal interval, as prediction-powered inference by strata gives it."""
    total = sum(s.size for s in strata)
    parts = [(s.size / total, s.hits / s.labelled, s.labelled) for s in strata]
    value = sum(w * p for w, p, _ in parts)
    half = Z * math.sqrt(sum(w * w * p * (1 - p) / max(n - 1, 1) for w, p, n in parts))
    return value, value - half, value + half


def ppi(judge: np.ndarray, people: np.ndarray, number: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Prediction-powered inference (Angelopoulos et al. 2023): simple random labels, normal interval."""
    some = rng.choice(len(judge), number, replace=False)
    gap = people[some] - judge[some]
    value = judge.mean() + gap.mean()
    half = Z * math.sqrt(gap.var(ddof=1) / number + judge.var() / len(judge))
    return float(value), float(value - half), float(value + half)


def rogan_gladen(rate: float, elsewhere: list[tuple[bool, bool]]) -> float:
    """A rate corrected by sensitivity and specificity measured elsewhere; itself where they are not defined."""
    hits, misses = [j for j, y in elsewhere if y], [j for j, y in elsewhere if not y]
    if not hits or not misses:
        return float(rate)
    sensitivity, specificity = sum(hits) / len(hits), 1 - sum(misses) / len(misses)
    if sensitivity + specificity - 1 <= 0:
        return float(rate)
    return float(min(max((rate + specificity - 1) / (sensitivity + specificity - 1), 0.0), 1.0))


def report(cells: list[dict]) -> None:
    print(
        "| judge | labels | side | model | people | judge off by | Rogan-Gladen off by | PPI covers | covers | width |"
    )
    print("|---|---:|---|---|---:|---:|---:|---:|---:|---:|")
    for c in cells:
        print(
            f"| {c['judge']} | {c['labels']} | {c['side']} | {c['model']} | {100 * c['people']:.1f} | "
            f"{100 * c['judge alone']['error']:.1f} | {100 * c['rogan-gladen']['error']:.1f} | "
            f"{100 * c['ppi']['coverage']:.1f} | {100 * c['stratified']['coverage']:.1f} | "
            f"{100 * c['stratified']['width']:.1f} |"
        )
    for number in dict.fromkeys(c["labels"] for c in cells):
        some = [c for c in cells if c["labels"] == number]
        means = {
            w: np.mean([c[w]["error"] for c in some]) for w in ("judge alone", "rogan-gladen", "ppi", "stratified")
        }
        cover = {w: [c[w]["coverage"] for c in some] for w in ("ppi", "stratified, normal", "stratified")}
        inner = [c["stratified"]["coverage"] for c in some if 0.05 <= c["people"] <= 0.95]
        print(
            f"{number} labels: mean error "
            + ", ".join(f"{way} {100 * value:.1f}" for way, value in means.items())
            + " points; coverage "
            + ", ".join(
                f"{way} {100 * np.mean(v):.1f} % (cells {100 * min(v):.0f} to {100 * max(v):.0f})"
                for way, v in cover.items()
            )
            + f"; stratified where people say 5 to 95 %: {100 * np.mean(inner):.1f} % "
            f"(cells {100 * min(inner):.1f} to {100 * max(inner):.1f})"
        )


if __name__ == "__main__":
    main()
