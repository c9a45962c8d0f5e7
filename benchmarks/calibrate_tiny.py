"""Calibration (8 + 128 samples, both passes) and edit of the tiny model, wall and CPU seconds (imports excluded).

    python benchmarks/calibrate_tiny.py

The edit is the streaming one of `holdfast edit`: read both checkpoints, HPA on every linear layer, write the result.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from holdfast.calibration.curvature import collect_curvature
from holdfast.data.streams import load_stream
from holdfast.data.types import Sample, Turn
from holdfast.editing.editor import edit_checkpoint
from holdfast.rules.hpa import HpaRule
from holdfast.tiny import model_path
from holdfast.tiny.stream import write_stream


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        stream = load_stream(write_stream(Path(folder) / "stream"))
        refusal = Turn(role="assistant", text="sorry i can not help with that")
        safety = [Sample(id=s.id, turns=(*s.request, refusal), images=s.images) for s in stream.safety_calibration[:8]]
        model = model_path("aligned")
        for attempt in ("first", "second"):
            began, cpu, seconds = time.perf_counter(), time.process_time(), {}
            made = collect_curvature(model, model, safety, stream.tasks[0].train[:128], device="cpu", seconds=seconds)
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            phases = ", ".join(f"{phase} {spent:.2f}" for phase, spent in seconds.items())
            print(f"calibrate, {attempt}: {len(made.modules)} layers, wall {wall:.2f} s, CPU {cpu:.2f} s ({phases})")
        for attempt in ("first", "second"):
            began, cpu = time.perf_counter(), time.process_time()
            out = Path(folder) / attempt
            edit_checkpoint(model, model_path("base"), rule=HpaRule(), curvature=made, out=out, verify=False)
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            print(f"edit, {attempt}: wall {wall:.2f} s, CPU {cpu:.2f} s")


if __name__ == "__main__":
    main()
