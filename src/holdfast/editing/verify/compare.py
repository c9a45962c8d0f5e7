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
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast.bounds import bounded
from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.merged import locate
from holdfast.checkpoints.value import Checkpoint, Source, as_checkpoint
from holdfast.editing.account import EditReport
from holdfast.editing.pair import Pair
from holdfast.editing.plan import LoraTarget, Target
from holdfast.editing.verify.redo import Redo, Redone
from holdfast.editing.verify.redo import Written as _Written
from holdfast.editing.verify.redo import same as _same
from holdfast.errors import AdapterError, ExportError
from holdfast.models.memory import free_memory_bytes
from holdfast.rules.base import EditRule

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
    redo = Redo(pair=pair, rule=rule, export=report.export, coefficient=coefficient)
    guard = _Guard(folder, report, as_checkpoint(before), as_checkpoint(after), targets, redo)
    if needed <= free:
        found = guard.compare_running()
    else:
        found = guard.compare_files()
        found["reason"] = (
            f"the model needs {needed / 1e9:.1f} GB to run and {free / 1e9:.1f} GB are free: its files were compared"
        )
    return replace(report, verification=found)


@dataclass
class _Live:
    """What the same edit did to a model in memory.

    hashes: of the written tensors that are what the edit in memory gives, by layer. changed: weights that the edit
    moved. unedited, reference: logits before and after it. without_scale: how far the logits are off where an adapter
    leaves the input scale out, or None. by_plain_loader: the same where it has one and a loader does not read it.
    from_peft: how far AFTER before the edit is from what transformers and PEFT
    alone load; None where PEFT cannot load it (no adapter, names that it does not match, input scaling).
    """

    ids: list[list[int]]
    hashes: Mapping[str, str]
    changed: int
    unedited: Tensor
    reference: Tensor
    without_scale: float | None
    by_plain_loader: float | None
    from_peft: float | None


@dataclass(frozen=True)
class _Guard:
    """One export and the edit that it must be."""

    folder: Path
    report: EditReport
    before: Checkpoint
    after: Checkpoint
    targets: Sequence[Target]
    redo: Redo

    @property
    def export(self) -> str:
        return self.report.export

    @property
    def pair(self) -> Pair:
        return self.redo.pair

    def compare_running(self) -> dict[str, Any]:
        """With the model in memory: logits and every edited tensor."""
        live = self._edit_in_memory()
        result, logits = self._run_probe(live.ids)
        loaded = self._loaded_hashes(result)
        found: dict[str, Any] = {
            "compared": "logits and weights of the reloaded export with the edit in memory",
            "edited_tensors": len(self.targets),
            "edited_tensors_equal": sum(loaded.get(name) == value for name, value in live.hashes.items()),
            "weights_changed_by_edit": live.changed,
            **_live_modules(self.folder, self.export),
            **{key: result[key] for key in ("active_modules", "scaled_modules") if key in result},
            "max_logit_difference": _relative(logits, live.reference),
            "after_differs_from_peft_by": live.from_peft,
            "edit_moves_logits_by": _relative(live.unedited, live.reference),
            "logits_without_coefficient_off_by": live.without_scale,
            "logits_with_plain_loader_off_by": live.by_plain_loader,
            "tolerance": _tolerance(self.report, self.pair, self.targets),
        }
        _judge(self.report, found)
        return found

    def compare_files(self) -> dict[str, Any]:
        """Without: every edited tensor is read by a clean process, and the edit of some is done again."""
        redone = self.targets[:: max(1, len(self.targets) // _LAYERS_REDONE)]
        hashes: dict[str, str] = {}
        with _Written(self.folder, self.export) as written:
            for target in redone:
                done = self.redo.layer(target, self.pair.after.read_float(target.key))
                hashes |= _hash_if_same(target, written.read(target), done)
        result, _ = self._run_probe(None)
        loaded = self._loaded_hashes(result)
        found: dict[str, Any] = {
            "compared": "files only: every edited tensor read by a clean process, the edit of some done again; the "
            "model was not run and no logits were compared",
            "edited_tensors": len(self.targets),
            "edited_tensors_read": len(loaded),
            "tensors_redone": len(redone),
            "tensors_redone_equal": sum(loaded.get(name) == value for name, value in hashes.items()),
            **_live_modules(self.folder, self.export),
            **{key: result[key] for key in ("matched_tensors", "active_modules", "scaled_modules") if key in result},
            "max_logit_difference": None,
        }
        faults = result.get("faults", ())
        if faults:
            listed = "; ".join(faults[:3])
            raise ExportError(f"The result does not fit the model: {listed} ({len(faults)} such tensor(s)).")
        _judge(self.report, found)
        return found

    @torch.no_grad()
    def _edit_in_memory(self) -> _Live:
        from holdfast.editing.verify.child import forward, module_index, probe_ids
        from holdfast.models.load import load

        # First, and gone before the next model is loaded: there is room for one.
        stock = self._after_by_peft()
        model: Any = load(self._merged_value(), dtype=torch.float32, device="cpu").model
        ids = probe_ids(model.config)
        unedited = forward(model, ids)
        from_peft = None if stock is None else _relative(unedited, stock)
        if from_peft is not None and not from_peft <= _TOLERANCE["same"]:
            raise ExportError(
                f"AFTER as holdfast reads it is not what PEFT loads: their logits differ by {from_peft:.2g} of the "
                f"largest (allowed: {_TOLERANCE['same']:.0e}). Merge {self.pair.after.adapters[-1].folder} into its "
                "base with PEFT and pass the merged folder."
            )
        names = module_index(model)
        hashes: dict[str, str] = {}
        scaled: dict[nn.Parameter, Tensor] = {}
        plain: dict[nn.Parameter, Tensor] = {}
        changed = 0
        with _Written(self.folder, self.export) as written:
            for target in self.targets:
                weight = model.get_submodule(names.require(target.layer.name)).weight
                done = self.redo.layer(target, weight)
                stored = written.read(target)
                hashes |= _hash_if_same(target, stored, done)
                new = done.weight.to(stored.dtype) if self.export == "dense" else done.weight
                if done.scaled is not None:
                    scaled[weight] = done.scaled
                if done.plain is not None:
                    plain[weight] = done.plain
                changed += not torch.equal(weight, new.to(weight.dtype))
                weight.copy_(new)
        reference = forward(model, ids)
        for weight, value in (scaled or plain).items():
            weight.copy_(value)
        off = _relative(forward(model, ids), reference) if scaled or plain else None
        return _Live(
            ids=ids,
            hashes=hashes,
            changed=changed,
            unedited=unedited,
            reference=reference,
            without_scale=off if scaled else None,
            by_plain_loader=off if plain else None,
            from_peft=from_peft,
        )

    def _after_by_peft(self) -> Tensor | None:
        """Logits of AFTER by a road that shares no code with the edit: transformers loads the base, PEFT the adapter.

        The last adapter only, unmerged; those below it are BEFORE's. None where PEFT cannot say what AFTER is.
        """
        from peft import PeftModel
        from transformers import AutoModelForImageTextToText

        from holdfast.editing.verify.child import copy_extra_weights, forward, probe_ids
        from holdfast.models.load import load
        from holdfast.models.merge import PEFT_SECONDS, resize_vocabulary
        from holdfast.models.settings import quiet_transformers

        value = self._merged_value()
        last_adapter = self.pair.after.adapters[-1] if value.adapters else None
        # PiSSA's start is found again by PEFT up to chance only.
        if last_adapter is None or last_adapter.input_scale or last_adapter.why_not_factors() is not None:
            return None
        last = str(locate(value.adapters[-1]))
        with quiet_transformers(), warnings.catch_warnings():
            warnings.filterwarnings("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            if value.adapters[:-1]:
                below = Checkpoint(base=value.base, adapters=value.adapters[:-1])
                model: Any = load(below, dtype=torch.float32, device="cpu").model
            else:
                model = AutoModelForImageTextToText.from_pretrained(
                    value.base, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
                )
            resize_vocabulary(model, self.pair.after.vocabulary)
            copy_extra_weights(model, Path(last))
            try:
                with bounded(f"{last}: loading it with PEFT", seconds=PEFT_SECONDS, error=AdapterError):
                    PeftModel.from_pretrained(model, last)
            except (UserWarning, ValueError, RuntimeError, KeyError):
                return None
            # PEFT put its layers into the model itself; its wrapper's forward adds nothing but arguments.
            return forward(model.eval(), probe_ids(model.config))

    def _merged_value(self) -> Checkpoint:
        """AFTER as something that `models.load` takes."""
        lora = self.pair.lora
        value = self.after if lora is None else self.before.under(lora.folder)
        return Checkpoint(base=str(locate(value.base)), adapters=value.adapters, settings=value.settings)

    def _loaded_hashes(self, result: Mapping[str, Any]) -> Mapping[str, str]:
        hashes: Mapping[str, str] = result.get("adapter_hashes" if self.export == "adapter" else "weight_hashes", {})
        return hashes

    def _stored_dtypes(self) -> dict[str, str]:
        def stored(target: Target) -> torch.dtype:
            if self.export == "adapter" and isinstance(target, LoraTarget):
                return target.lora.a.torch_dtype
            return self.pair.after.entries[target.key].torch_dtype

        return {target.layer.name: str(stored(target)).removeprefix("torch.") for target in self.targets}

    def _run_probe(self, input_ids: Sequence[Sequence[int]] | None) -> tuple[dict[str, Any], Tensor]:
        """What a clean process says of the export, and its logits on `input_ids` (an empty tensor without)."""
        with tempfile.TemporaryDirectory(prefix="holdfast-probe-") as place:
            request = {
                "export": str(self.folder),
                "kind": self.export,
                "base": str(self.pair.before.folder),
                "after": str(self.pair.after.folder),
                "base_adapters": list(self.before.adapters),
                "modules": self._stored_dtypes(),
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
                raise ExportError(f"The result in {self.folder} cannot be loaded by a clean process: {last[0]}.")
            result = json.loads(Path(place, "result.json").read_text(encoding="utf-8"))
            logits = torch.empty(0) if input_ids is None else load_file(f"{place}/logits.safetensors")["logits"]
        return result, logits


def _hash_if_same(target: Target, stored: Tensor, done: Redone) -> dict[str, str]:
    """The layer's stored tensor by hash, where it is what the edit in memory gives."""
    from holdfast.editing.verify.child import tensor_hash

    return {target.layer.name: tensor_hash(stored, stored.dtype)} if _same(stored, done.written) else {}


def _live_modules(folder: Path, export: str) -> dict[str, int]:
    """Of a written adapter: modules whose B is not all zero. A module that was never trained is no active one."""
    if export != "adapter":
        return {}
    adapter = LoraAdapter(folder)
    try:
        b = [entry.b for entry in adapter.modules.values()]
        b += [u.parts[r].entry for u in adapter.dense.values() for r in ("B", "embedding_B") if r in u.parts]
        return {"nonzero_modules": sum(bool(adapter.raw(entry).any()) for entry in b)}
    finally:
        adapter.close()


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
