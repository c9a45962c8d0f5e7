"""What an edit did, layer by layer: a value, a file (`edit.json`), and a model card. Plain data, no dates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from holdfast.checkpoints.reader import read_json
from holdfast.errors import CheckpointError, ConfigError
from holdfast.files import write_json

FORMAT_VERSION = 1
REPORT_FILE = "edit.json"
# What the no-op guard found: beside the report and not in it, for its figures depend on the machine.
VERIFICATION_FILE = "verification.json"
_PACKAGES = ("holdfast", "torch", "transformers", "peft", "safetensors")


# Figures worth a column where people read, where a rule reports them: key, heading, format.
FIGURES = (
    ("kept_share", "kept columns", "{:.1%}"),
    ("overlap", "focus overlap", "{:.1%}"),
    ("safety_share", "safety only", "{:.1%}"),
    ("alpha", "alpha", "{:.3f}"),
    ("coefficient", "coefficient", "{:.1e}"),
    ("coefficient_error", "error without it", "{:.1e}"),
    ("share_reverted", "change taken back", "{:.1%}"),
    ("left", "distance from BEFORE, of AFTER's", "{:.1%}"),
)


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """One edit.

    layers: a row per edited layer, in block order: `layer` (name as in memory), `linear` (its last two parts), `block`
        (0-based), `rows`, `columns`, the rule's figures (for HPA: kept_share, overlap, safety_share, alpha,
        coefficient, share_reverted, change, distance, relative_change; shares are 0..1), and of the calibration, where
        it recorded them, tokens_over_width and fallbacks by set.
    inputs: before, after and calibration, as given and by fingerprint. warnings: sentences, worst first.
    coefficient: of an adapter export, what was done with what the rule takes from the base: drop, measure or keep.
    verification: what the no-op guard compared, or None when it was not asked for.
    seconds: wall-clock by phase; never written into the result, whose bytes do not depend on the machine's speed.
    """

    rule: str
    settings: Mapping[str, Any]
    export: str
    layers: Sequence[Mapping[str, Any]]
    inputs: Mapping[str, Any]
    plan_hash: str
    coefficient: str | None = None
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    verification: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def mean(self, figure: str) -> float | None:
        """Mean over the layers that have the figure, or None."""
        values = [row[figure] for row in self.layers if isinstance(row.get(figure), int | float)]
        return sum(values) / len(values) if values else None

    def notes(self) -> list[str]:
        """Sentences that a reader of the figures needs: what the calibration rests on, what an adapter leaves out."""
        return [*_calibration_note(self.inputs.get("calibration", {})), *_coefficient_note(self)]

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the format's version."""
        return {
            "format_version": FORMAT_VERSION,
            "rule": self.rule,
            "settings": dict(self.settings),
            "export": self.export,
            "coefficient": self.coefficient,
            "inputs": dict(self.inputs),
            "plan_hash": self.plan_hash,
            "warnings": list(self.warnings),
            "versions": dict(self.versions),
            "verification": None if self.verification is None else dict(self.verification),
            "layers": [dict(row) for row in self.layers],
        }

    def save(self, path: Path) -> None:
        """Write it as JSON in one rename.

        Raises: StorageError: the disk is full or the folder cannot be written.
        """
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> EditReport:
        """Read `edit.json`, with what the guard found from `verification.json` beside it, where it is.

        Raises: CheckpointError: no such file, damaged, or of another format version.
        """
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: {path.parent} is no result of `holdfast edit`.")
        try:
            data = read_json(path, "the report of an edit")
            version = data.pop("format_version")
            if version != FORMAT_VERSION:
                raise CheckpointError(f"{path} has report format {version}, this version reads {FORMAT_VERSION}.")
            beside = path.parent / VERIFICATION_FILE
            if data.get("verification") is None and beside.is_file():
                data["verification"] = read_json(beside, "the record of a reload check")
            return cls(**data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path} is no edit report that can be read ({error}).") from error

    def with_seconds(self, seconds: Mapping[str, float]) -> EditReport:
        """The same report with the seconds that each phase took."""
        return replace(self, seconds=dict(seconds))


def _calibration_note(calibration: Mapping[str, Any]) -> list[str]:
    config, sets = calibration.get("config", {}), calibration.get("sets", {})
    options = [
        f"{key} {config[key]}" for key in ("damping", "shrinkage", "normalization", "activations") if key in config
    ]
    counts = [
        f"{name} {record.get('sequences')} sequences, {record.get('tokens')} tokens" for name, record in sets.items()
    ]
    said = "; ".join(part for part in (", ".join(options), *counts) if part)
    return [f"Calibration: {said}."] if said else []


def _coefficient_note(report: EditReport) -> list[str]:
    # `orthogonal`: the option's name in reports of version 0.1.
    unprojected = report.settings.get("projection") == "none" or report.settings.get("orthogonal") is False
    if report.coefficient is None or unprojected:
        return []
    if not any("coefficient" in row for row in report.layers):
        return []
    if report.coefficient == "keep":
        return [
            "Coefficient (keep): the projection is stored as a vector per layer in holdfast_input_scale.safetensors, "
            "which holdfast's loaders apply. PEFT alone ignores that file, and serves the adapter as if the "
            "coefficient had been dropped; so does vLLM."
        ]
    if report.coefficient == "drop":
        return [
            "Coefficient (drop): the projection on the base weight is left out of the adapter, and how much that "
            "changes was not measured (the base was not read)."
        ]
    errors = [row["coefficient_error"] for row in report.layers if "coefficient_error" in row]
    largest = f", at most {max(errors):.1e} of a layer's edited update" if errors else ""
    return [f"Coefficient (measure): the projection on the base weight is left out of the adapter{largest}."]


@lru_cache(maxsize=1)
def versions() -> Mapping[str, str]:
    """Versions of what computes and stores an edit, without importing any of it (reading them takes 40 ms)."""
    return {name: metadata.version(name) for name in _PACKAGES}


def linear_name(layer: str) -> str:
    """Last two parts of a module name: what a layer is called within every block."""
    return ".".join(layer.split(".")[-2:])


def model_card(report: EditReport, *, safety: Mapping[str, Any] | None = None, served: Sequence[str] = ()) -> str:
    """Markdown of a report.

    served: sentences on what a server makes of the result (`checkpoints.adapter_config.serving_notes`).
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
        *_section("Served", [f"- {sentence}" for sentence in [*served, *_scale_effect(report)]]),
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
    rows = ["| set | attack success before the edit | after the edit |", "|---|---|---|"]
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


def _scale_effect(report: EditReport) -> list[str]:
    """What a server that does not read the input-scaling file changes, where it was measured."""
    off = (report.verification or {}).get("logits_with_plain_loader_off_by")
    if off is None:
        return []
    return [
        f"Without its input-scaling vectors (PEFT alone, vLLM) the logits of the probe batch are off by {off:.1e} of "
        "the largest one. `--coefficient measure`, the default, writes an adapter that needs none."
    ]


def _table(layers: Sequence[Mapping[str, Any]], *, by_layer: bool = False) -> list[str]:
    shown = shown_figures(layers)
    head = "| layer |" if by_layer else "| block | layers |"
    lines = [
        f"{head} " + " | ".join(heading for _, heading, _ in shown) + " |",
        "|" + "---|" * (len(shown) + head.count("|") - 1),
    ]
    for name, rows in grouped(layers, by_layer=by_layer):
        first = name if by_layer else f"{name} | {len(rows)}"
        lines.append(f"| {first} | " + " | ".join(mean_text(rows, key, form) for key, _, form in shown) + " |")
    return lines


def shown_figures(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Those of `FIGURES` that some row has."""
    rows = [_with_left(row) for row in layers]
    return [figure for figure in FIGURES if any(isinstance(row.get(figure[0]), int | float) for row in rows)]


def _with_left(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A layer's row, and how far the edited weight is from BEFORE as a share of how far AFTER is."""
    change, distance = row.get("change"), row.get("distance")
    return {**row, "left": distance / change} if change and distance is not None else row


def grouped(
    layers: Sequence[Mapping[str, Any]], *, by_layer: bool = False
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(name, rows) by block, or (block.linear, [row]) by layer."""
    rows = [_with_left(row) for row in layers]
    if by_layer:
        return [(f"{row['block']}.{row['linear']}", [row]) for row in rows]
    blocks = sorted({row["block"] for row in rows})
    return [(str(block), [row for row in rows if row["block"] == block]) for block in blocks]


def mean_text(rows: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """Mean of a figure over the rows that have it, or "-"."""
    numbers = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return form.format(sum(numbers) / len(numbers)) if numbers else "-"
