"""`--preset`: a whole choice under one word, for `run` and `edit`. The table is here; the constants are the defaults.

Importing it imports no torch, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from holdfast.experiment import RunConfig

PresetName = Literal["paper", "holdfast"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """method: of `holdfast run`. rule: of `holdfast edit`. line: what it is, for --help."""

    method: str
    rule: str
    line: str


PRESETS: Mapping[str, Preset] = {
    "paper": Preset(method="hpa", rule="hpa", line="HPA with the paper's constants (arXiv 2511.20158)"),
    "holdfast": Preset(method="anchor", rule="anchor", line="what we recommend: the anchored edit with its defaults"),
}

HELP = "; ".join(f"{name}: {preset.line}" for name, preset in PRESETS.items())

# What of a method's options is the edit; tuning stays as the run file has it.
_OWN = ("edit", "task_samples", "safety_samples", "benign_samples", "screen")
# Of `calibration`, what depends on the machine alone.
_MACHINE = ("batch_size",)


def method_options(name: str) -> dict[str, Any]:
    """Every option of the edit of a preset's method, spelt out: a run file's `defaults` do not reach under them."""
    from holdfast.config import encode
    from holdfast.methods import get

    method: Any = get(PRESETS[name].method)
    plain = encode(method.config)
    calibration = {key: value for key, value in plain["calibration"].items() if key not in _MACHINE}
    return {**{key: plain[key] for key in _OWN}, "calibration": calibration}


def with_preset(config: RunConfig, name: str) -> RunConfig:
    """`config` with the preset's method alone, its edit as the preset has it."""
    from dataclasses import replace

    return replace(config, methods={PRESETS[name].method: method_options(name)})


__all__ = ["HELP", "PRESETS", "Preset", "PresetName", "method_options", "with_preset"]
