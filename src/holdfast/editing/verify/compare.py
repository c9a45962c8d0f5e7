"""The no-op guard: an export is loaded back in a clean process and must do what the edit does in memory.

With room for the model in memory, its logits on a probe batch are compared with those of the same edit done on a live
model, and every edited weight by hash. Without, the clean process reads every edited tensor and fits all of them to a
model without weights (PEFT loads an adapter onto it), and the edit of some layers is done again; no logits are compared
then. What was compared is always recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.merged import CheckpointLike, add_updates, locate
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.editing.pair import Pair, Source
from holdfast.editing.plan import Target
from holdfast.editing.report import EditReport
from holdfast.errors import ExportError
from holdfast.models.memory import free_memory_bytes
from holdfast.rules.base import EditRule, LoraEditRule

# Largest logit difference, relative to the largest logit. fp32 arithmetic in another order on equal weights; and a sum
# that one side rounds to 8 bits (bf16 or fp16 storage) where other parts of the model stay unrounded.
_TOLERANCE = {"same": 1e-3, "rounded": 5e-2}
# A model loaded in fp32 with its activations, the tokenizer and the libraries.
_MEMORY_FACTOR = 1.3
_LAYERS_REDONE = 8


def verify_export(
    folder: Path,
    report: EditReport,
    *,
    before: Source,
    after: Source,
    pair: Pair,
    targets: Sequence[Target],
    rule: EditRule,
    coefficient: str,
) -> EditReport:
    """The report with `verification` filled in: what was compared, and how near it came.

    Raises: ExportError: the export loads to something else than the edit, or not at all.
    """
    needed = sum(entry.numel for entry in pair.before.entries.values()) * 4 * _MEMORY_FACTOR
    free = free_memory_bytes()
    if needed <= free:
        found = _compare_running(folder, report, before, after, pair, targets, rule, coefficient)
    else:
        found = _compare_files(folder, report, before, pair, targets, rule, coefficient)
        found["reason"] = (
            f"the model needs {needed / 1e9:.1f} GB to run and {free / 1e9:.1f} GB are free: its files were compared"
        )
    return replace(report, verification=found)


def _compare_running(
    folder: Path,
    report: EditReport,
    before: Source,
    after: Source,
    pair: Pair,
    targets: Sequence[Target],
    rule: EditRule,
    coefficient: str,
) -> dict[str, Any]:
    from holdfast.editing.verify.child import forward, module_index, probe_ids, tensor_hash
    from holdfast.models.load import load

    model: Any = load(_merged_value(before, after, pair), dtype=torch.float32, device="cpu").model
    ids = probe_ids(model.config)
    unedited = forward(model, ids)
    names = module_index(model)
    hashes: dict[str, str] = {}
    scaled: dict[str, Tensor] = {}
    changed = 0
    with _Written(folder, report.export) as written:
        for target in targets:
            module = model.get_submodule(names.require(target.layer.name))
            with torch.no_grad():
                new, with_scale, factor = _redo(pair, target, rule, module.weight, report.export, coefficient)
                stored = written.read(target)
                if _same(stored, new if factor is None else factor):
                    hashes[target.layer.name] = tensor_hash(stored, stored.dtype)
                if report.export == "dense":
                    new = new.to(stored.dtype)
                if with_scale is not None:
                    scaled[target.layer.name] = with_scale
                changed += not torch.equal(module.weight, new.to(module.weight.dtype))
                module.weight.copy_(new)
    reference = forward(model, ids)
    coefficient_error = None
    if scaled and coefficient != "keep":
        with torch.no_grad():
            for name, weight in scaled.items():
                model.get_submodule(names.require(name)).weight.copy_(weight)
        coefficient_error = _relative(forward(model, ids), reference)
    del model
    dtypes = _stored_dtypes(report, pair, targets)
    live = _live_modules(folder, report.export)
    result, logits = _run_probe(folder, report.export, before, pair, dtypes, ids)
    assert logits is not None
    loaded = result.get("adapter_hashes" if report.export == "adapter" else "weight_hashes", {})
    found: dict[str, Any] = {
        "compared": "logits and weights of the reloaded export with the edit in memory",
        "edited_tensors": len(targets),
        "edited_tensors_equal": sum(loaded.get(name) == value for name, value in hashes.items()),
        "weights_changed_by_edit": changed,
        **live,
        **{key: result[key] for key in ("active_modules", "scaled_modules") if key in result},
        "max_logit_difference": _relative(logits, reference),
        "edit_moves_logits_by": _relative(unedited, reference),
        "logits_without_coefficient_off_by": coefficient_error,
        "tolerance": _tolerance(report, pair, targets),
    }
    _judge(report, found)
    return found


def _redo(
    pair: Pair, target: Target, rule: EditRule, w_new: Tensor, export: str, coefficient: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The edit of one layer in memory: weight, weight with its input scale (when left out), and the new A."""
    old = pair.before.read_float(target.before_key)
    if target.lora is None or pair.lora is None:
        # The editor sees the stored values; the live model holds them widened.
        stored = pair.after.entries[target.key].torch_dtype
        exact = pair.after.is_plain(target.key) and pair.before.is_plain(target.before_key)
        return rule.edit(target.layer, old, w_new.to(stored if exact else w_new.dtype).clone()).weight, None, None
    a, b = pair.lora.read_factors(target.lora.module)
    if not isinstance(rule, LoraEditRule):
        new = add_updates(old, [(a, b, target.lora, None)], torch.empty_like(old))
        return rule.edit(target.layer, old, new).weight, None, None
    # Read the base like the editor does: a sum in another order would differ in the last bit.
    base = None if not rule.reads_base or (export == "adapter" and coefficient == "drop") else old
    edited = rule.edit_lora(target.layer, base, a, b, target.lora.scaling)
    plain = add_updates(old, [(edited.lora_a, b, target.lora, None)], torch.empty_like(old))
    factor = edited.lora_a if export == "adapter" else None
    if edited.input_scale is None:
        return plain, None, factor
    scaled = add_updates(old, [(edited.lora_a, b, target.lora, edited.input_scale)], torch.empty_like(old))
    if export == "dense" or coefficient == "keep":
        return scaled, None, factor
    return plain, scaled, factor


class _Written:
    """The edited tensors of an export, as they lie on disk."""

    def __init__(self, folder: Path, export: str) -> None:
        self._adapter = LoraAdapter(folder) if export == "adapter" else None
        self._dense = CheckpointReader(folder) if export == "dense" else None

    def read(self, target: Target) -> Tensor:
        if self._adapter is not None:
            assert target.lora is not None
            return self._adapter.raw(self._adapter.modules[target.lora.module].a)
        assert self._dense is not None
        return self._dense.read(target.key)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *exc: object) -> None:
        for opened in (self._adapter, self._dense):
            if opened is not None:
                opened.close()


def _live_modules(folder: Path, export: str) -> dict[str, int]:
    """Of a written adapter: modules whose B is not all zero. A module that was never trained is no active one."""
    if export != "adapter":
        return {}
    adapter = LoraAdapter(folder)
    try:
        return {"nonzero_modules": sum(bool(adapter.raw(entry.b).any()) for entry in adapter.modules.values())}
    finally:
        adapter.close()


def _same(stored: Tensor, redone: Tensor) -> bool:
    """Equal up to one rounding: a matrix product in other memory may differ in its last bit before the cast."""
    eps = torch.finfo(stored.dtype).eps
    return torch.allclose(stored.double(), redone.double(), rtol=2 * eps, atol=1e-5 * float(redone.abs().max()))


def _stored_dtypes(report: EditReport, pair: Pair, targets: Sequence[Target]) -> dict[str, str]:
    def stored(target: Target) -> torch.dtype:
        if report.export == "adapter":
            assert target.lora is not None
            return target.lora.a.torch_dtype
        return pair.after.entries[target.key].torch_dtype

    return {target.layer.name: str(stored(target)).removeprefix("torch.") for target in targets}


def _merged_value(before: Source, after: Source, pair: Pair) -> Any:
    """AFTER as something that `models.load` takes."""
    from holdfast.editing.verify.child import Value

    if pair.lora is None:
        return after if isinstance(after, CheckpointLike) else str(locate(after))
    base, adapters = (before.base, before.adapters) if isinstance(before, CheckpointLike) else (str(before), ())
    return Value(str(locate(base)), (*adapters, str(pair.lora.folder)))


def _run_probe(
    folder: Path,
    export: str,
    before: Source,
    pair: Pair,
    dtypes: Mapping[str, str],
    input_ids: Sequence[Sequence[int]] | None,
) -> tuple[dict[str, Any], Tensor | None]:
    with tempfile.TemporaryDirectory(prefix="holdfast-probe-") as place:
        request = {
            "export": str(folder),
            "kind": export,
            "base": str(pair.before.folder),
            "after": str(pair.after.folder),
            "base_adapters": list(before.adapters) if isinstance(before, CheckpointLike) else [],
            "modules": dict(dtypes),
            "input_ids": input_ids,
            "result": f"{place}/result.json",
            "logits": f"{place}/logits.safetensors",
        }
        Path(place, "request.json").write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "holdfast.editing.verify.child", f"{place}/request.json"],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise ExportError(f"The result in {folder} cannot be loaded by a clean process: {last[0]}.")
        result = json.loads(Path(place, "result.json").read_text(encoding="utf-8"))
        logits = None if input_ids is None else load_file(f"{place}/logits.safetensors")["logits"]
    return result, logits


def _compare_files(
    folder: Path,
    report: EditReport,
    before: Source,
    pair: Pair,
    targets: Sequence[Target],
    rule: EditRule,
    coefficient: str,
) -> dict[str, Any]:
    from holdfast.editing.verify.child import tensor_hash

    dtypes = _stored_dtypes(report, pair, targets)
    redone = targets[:: max(1, len(targets) // _LAYERS_REDONE)]
    hashes: dict[str, str] = {}
    with _Written(folder, report.export) as written:
        for target in redone:
            merged = pair.after.read_float(target.key)
            new, _, factor = _redo(pair, target, rule, merged, report.export, coefficient)
            stored = written.read(target)
            if _same(stored, new if factor is None else factor):
                hashes[target.layer.name] = tensor_hash(stored, stored.dtype)
    result, _ = _run_probe(folder, report.export, before, pair, dtypes, None)
    loaded = result.get("adapter_hashes" if report.export == "adapter" else "weight_hashes", {})
    found: dict[str, Any] = {
        "compared": "files only: every edited tensor read by a clean process, the edit of some done again; the model "
        "was not run and no logits were compared",
        "edited_tensors": len(targets),
        "edited_tensors_read": len(loaded),
        "tensors_redone": len(redone),
        "tensors_redone_equal": sum(loaded.get(name) == value for name, value in hashes.items()),
        **_live_modules(folder, report.export),
        **{key: result[key] for key in ("matched_tensors", "active_modules", "scaled_modules") if key in result},
        "max_logit_difference": None,
    }
    faults = result.get("faults", ())
    if faults:
        raise ExportError(f"The result does not fit the model: {'; '.join(faults[:3])} ({len(faults)} such tensor(s)).")
    _judge(report, found)
    return found


def _judge(report: EditReport, found: Mapping[str, Any]) -> None:
    if report.export == "adapter":
        expected, active = found["nonzero_modules"], found["active_modules"]
        if expected == 0:
            raise ExportError(
                "Every B of the exported adapter is zero: it would serve the base model unchanged. Was the "
                "adapter saved before it was trained?"
            )
        if active == 0:
            raise ExportError(
                "The exported adapter, loaded by PEFT onto BEFORE, has no active module: it would serve the base model "
                "unchanged. Module names of the adapter and of the model do not meet."
            )
        if active != expected:
            raise ExportError(
                f"{active} of the adapter's {expected} modules that are not zero are active after a reload."
            )
    read = found.get("edited_tensors_read", found["edited_tensors"])
    if read != found["edited_tensors"]:
        raise ExportError(f"{read} of {found['edited_tensors']} edited tensors came out of a reload.")
    which = "tensors_redone" if "tensors_redone" in found else "edited_tensors"
    if found[f"{which}_equal"] != found[which]:
        raise ExportError(
            f"{found[which] - found[f'{which}_equal']} of {found[which]} edited tensors are not what the edit in "
            f"memory gives, after a reload."
        )
    difference = found["max_logit_difference"]
    if difference is not None and not difference <= found["tolerance"]:
        raise ExportError(
            f"The reloaded result's logits differ from the edit in memory by {difference:.2g} of the largest logit "
            f"(allowed: {found['tolerance']:.0e})."
        )


def _tolerance(report: EditReport, pair: Pair, targets: Sequence[Target]) -> float:
    edited = {target.key for target in targets}
    sums = [key for key in pair.after.updates if key not in edited]
    rounded = report.export == "dense" and bool(sums)
    return _TOLERANCE["rounded" if rounded else "same"]


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; two figures, for it depends on the machine beyond that."""
    scale = float(b.abs().max())
    value = float((a - b).abs().max()) / scale if scale > 0 else float((a - b).abs().max())
    return float(f"{value:.2g}")


__all__ = ["verify_export"]
