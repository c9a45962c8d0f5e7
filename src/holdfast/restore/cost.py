"""What a restore would cost, before it starts: minutes and GiB from the model's shapes and this machine's speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.checkpoints.adapter import is_adapter
from holdfast.checkpoints.merged import MergedCheckpoint, open_checkpoint
from holdfast.checkpoints.value import as_checkpoint
from holdfast.data.types import Sample
from holdfast.models.memory import find_device
from holdfast.models.precision import default_device, resolve_dtype
from holdfast.models.settings import read_config
from holdfast.models.speed import DECODE_SHARE, FORWARD_SHARE, flops_per_second
from holdfast.restore.sets import RestoreSets

if TYPE_CHECKING:
    from holdfast.restore.restore_config import RestoreConfig

# Typical tokenisers make one token of about four characters of English; a picture takes a few hundred.
_CHARACTERS_PER_TOKEN, _TOKENS_PER_PICTURE = 4, 576


def estimate_cost(before: str, after: str, sets: RestoreSets, config: RestoreConfig) -> str:
    """A few lines for people: phases with minutes, the peak of memory, and the disk. Nothing is loaded."""
    found = cost_figures(before, after, sets, config)
    lines = [f"{name:<28} {max(0.1, seconds / 60):6.1f} min" for name, seconds in found["seconds"].items()]
    lines.append(f"{'in all':<28} {found['total_seconds'] / 60:6.1f} min on {found['device']}")
    lines.append(f"{'memory':<28} {found['memory_bytes'] / 2**30:6.1f} GiB for the model and one layer's matrices")
    lines.append(f"{'disk':<28} {found['disk_bytes'] / 2**30:6.1f} GiB beside OUT while it runs")
    speed = f"{found['flops_per_second'] / 1e9:.0f} GFLOP/s here"
    lines.append(f"({found['parameters'] / 1e6:.0f} M parameters, {found['blocks']} blocks; {speed})")
    return "\n".join(lines)


def cost_figures(before: str, after: str, sets: RestoreSets, config: RestoreConfig) -> dict[str, Any]:
    """The same as plain data: {"seconds": {phase: s}, "total_seconds", "memory_bytes", "disk_bytes", "device",
    "parameters", "blocks", "flops_per_second"}.

    A planning figure: the speed is that of one matrix product here and now, lengths are guessed from characters.
    """
    device = find_device(config.device) if config.device else default_device()
    speed = flops_per_second(device)
    with open_checkpoint(before) as opened:
        parameters = sum(entry.numel for entry in opened.entries.values())
        widths = _widths(opened)
    model_config = read_config(as_checkpoint(before).base)
    tower = _TOKENS_PER_PICTURE if parameters > 1e8 else 36

    def tokens(samples: Sequence[Sample]) -> int:
        return sum(
            sum(len(t.text) for t in s.turns) // _CHARACTERS_PER_TOKEN + tower * len(s.images) + 8 for s in samples
        )

    probes = (*sets.safety.probe, *sets.benign.probe, *sets.task.probe)
    asked = (*sets.safety.calibration, *sets.benign.calibration, *sets.task.calibration, *probes)
    flops = 2 * parameters

    def asking(samples: Sequence[Sample], count: int) -> float:
        # Replies are mostly shorter than the bound.
        return flops * (tokens(samples) / FORWARD_SHARE + count * config.tokens / 2 / DECODE_SHARE) / speed

    calibrated = (*sets.safety.calibration, *sets.benign.calibration, *sets.task.calibration, *sets.past)
    gram = sum(2 * width**2 for width in widths) * tokens(calibrated) / speed
    bisection = math.ceil(math.log2(len(config.strengths) + 1)) + 4
    points = bisection if not config.whole_curve else len(config.strengths)
    factor = sum(width**3 / 3 for width in widths) / speed
    phases = {
        "ask BEFORE": asking(asked, len(asked)) + asking(probes, len(probes)),
        "calibrate": flops * tokens(calibrated) / FORWARD_SHARE / speed + gram,
        "ask AFTER": asking(probes, len(probes)),
        f"search, about {points} strengths": points * (asking(probes, len(probes)) + factor),
        "export and ask again": asking(probes, len(probes)) + factor + 30,
    }
    itemsize = resolve_dtype(config.dtype, model_config, device).itemsize
    peak = parameters * itemsize + 4 * max(widths) ** 2 * 4
    disk = sum(2 * width * (width + 1) for width in widths) * (2 + bool(sets.benign))
    disk += parameters * 2 if not is_adapter(after) else 0
    return {
        "seconds": phases,
        "total_seconds": sum(max(6.0, seconds) for seconds in phases.values()),
        "memory_bytes": round(peak),
        "disk_bytes": round(disk),
        "device": str(device),
        "parameters": parameters,
        "blocks": model_config.get_text_config().num_hidden_layers,
        "flops_per_second": speed,
    }


def _widths(opened: MergedCheckpoint) -> list[int]:
    """Input widths of a decoder's distinct inputs: four a block."""
    found = []
    for key, entry in opened.entries.items():
        if key.endswith((".q_proj.weight", ".o_proj.weight", ".gate_proj.weight", ".down_proj.weight")) and (
            "vision" not in key
        ):
            found.append(int(entry.shape[1]))
    return found or [max((int(e.shape[-1]) for e in opened.entries.values() if len(e.shape) == 2), default=1)]
