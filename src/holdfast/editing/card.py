"""The model card of an edited checkpoint: what was done, from what, and what to check. Plain Markdown, no dates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.editing.report import EditReport
from holdfast.errors import ConfigError

# Columns of the per-layer table, where a rule reports them: key, heading, format.
_COLUMNS = (
    ("kept_share", "kept columns", "{:.1%}"),
    ("overlap", "focus overlap", "{:.1%}"),
    ("safety_share", "safety only", "{:.1%}"),
    ("alpha", "alpha", "{:.3f}"),
    ("coefficient", "coefficient", "{:.1e}"),
    ("coefficient_error", "error without it", "{:.1e}"),
    ("share_reverted", "change taken back", "{:.1%}"),
)


def model_card(report: EditReport, *, safety: Mapping[str, Any] | None = None) -> str:
    """Markdown of a report.

    safety: measured before and after, where somebody measured it: {set: {"before": rate, "after": rate}}, rates 0..1.
    """
    kind = "LoRA adapter" if report.export == "adapter" else "checkpoint"
    lines = [
        "---",
        "tags: [holdfast, model-editing, safety]",
        "---",
        f"# Edited {kind} ({report.rule})",
        "",
        f"This {kind} was made by `holdfast edit`: of the weight change between BEFORE and AFTER, {len(report.layers)} "
        "linear layers were edited; everything else is AFTER's, byte for byte.",
        "",
        *_inputs(report),
        "",
        *(line for note in report.notes() for line in (note, "")),
        "## Options",
        "",
        *(f"- `{key}`: {value}" for key, value in report.settings.items()),
        "",
        *_section("Not protected", [f"- {warning}" for warning in report.warnings]),
        *_section("Safety, measured", _safety_table(safety) if safety else []),
        *_section("Reload check", _guard(report)),
        "## By block (means over its layers)",
        "",
        *_table(report.layers),
        "",
        "<details><summary>By layer</summary>",
        "",
        *_table(report.layers, by_layer=True),
        "",
        "</details>",
        "",
        "All figures are in `edit.json`, the plan and the inputs' hashes in `holdfast.json`, what the reload "
        "check compared in `verification.json`. `holdfast inspect` prints them.",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def check_safety(safety: Any) -> Mapping[str, Any]:
    """`safety` of `model_card`, as given. Raises ConfigError: another shape, or a rate outside 0..1."""
    if not isinstance(safety, Mapping) or not safety:
        raise ConfigError(f'measured safety is {safety!r}; expected {{"set": {{"before": rate, "after": rate}}}}.')
    for name, rates in safety.items():
        if not isinstance(rates, Mapping) or set(rates) != {"before", "after"}:
            raise ConfigError(f'measured safety of {name!r} is {rates!r}; expected {{"before": rate, "after": rate}}.')
        for when, rate in rates.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ConfigError(f"measured safety of {name!r} {when} is {rate!r}; expected a rate in 0..1.")
    return safety


def _inputs(report: EditReport) -> list[str]:
    rows = ["| input | what | content hash |", "|---|---|---|"]
    for name, value in report.inputs.items():
        hashes = " + ".join(f"`{part[:16]}`" for part in value.get("fingerprint", ()))
        rows.append(f"| {name} | {value.get('source', '')} | {hashes} |")
    return rows


def _section(title: str, body: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *body, ""] if body else []


def _safety_table(safety: Mapping[str, Any]) -> list[str]:
    rows = ["| set | attack success before | after |", "|---|---|---|"]
    return rows + [f"| {name} | {value['before']:.1%} | {value['after']:.1%} |" for name, value in safety.items()]


def _guard(report: EditReport) -> list[str]:
    """What the no-op guard compared; a card without it would let an unchecked result look like a checked one."""
    found = report.verification
    if found is None:
        return ["This result was not loaded back and compared (`--no-verify`)."]
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in found.items() if value is not None]
    left_out = found.get("logits_without_coefficient_off_by")
    if left_out is not None:
        lines.append(
            f"- leaving out the orthogonal coefficient moves the logits of the probe batch by {left_out:.1e} of the "
            "largest one"
        )
    return lines


def _table(layers: Sequence[Mapping[str, Any]], *, by_layer: bool = False) -> list[str]:
    shown = [column for column in _COLUMNS if any(isinstance(row.get(column[0]), int | float) for row in layers)]
    head = "| layer |" if by_layer else "| block | layers |"
    lines = [
        f"{head} " + " | ".join(heading for _, heading, _ in shown) + " |",
        "|" + "---|" * (len(shown) + head.count("|") - 1),
    ]
    if by_layer:
        groups = [(f"{row['block']}.{row['linear']}", [row]) for row in layers]
    else:
        blocks = {row["block"]: [r for r in layers if r["block"] == row["block"]] for row in layers}
        groups = [(f"{block} | {len(rows)}", rows) for block, rows in sorted(blocks.items())]
    for name, rows in groups:
        cells = [_mean([row.get(key) for row in rows], form) for key, _, form in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _mean(values: Sequence[Any], form: str) -> str:
    numbers = [value for value in values if isinstance(value, int | float)]
    return form.format(sum(numbers) / len(numbers)) if numbers else "-"
