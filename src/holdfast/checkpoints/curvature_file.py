"""A saved calibration: one number per input column, layer and set. A few MiB stand for gigabytes of Gram matrices.

The file is plain safetensors: `safety/<module>` and `task/<module>` hold diag((H + lam I)^-1), fp32, shape (c,),
and the metadata key `holdfast` holds JSON. Whoever has it can edit, and sweep every option of an edit, without a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast.checkpoints.tensor_file import TensorFile
from holdfast.errors import CalibrationError, CheckpointError
from holdfast.files import atomic_path, parse_json

FORMAT_VERSION = 1
SETS = ("safety", "task")
_METADATA_KEY = "holdfast"


@dataclass(frozen=True)
class Curvature:
    """Diagonals of the inverse damped input Grams of every editable layer, from the safety and from the task set.

    safety, task: in-memory module name (as in `model.named_modules()`) -> fp32 tensor (c,), positive and finite. The
        two hold the same modules. q, k and v of a block may share one tensor object; so may gate and up.
    meta: plain data. `blocks` {module: 0-based decoder block}, `block_count`, `weight_keys` {module: on-disk key, or
        list of keys} and, free for reports, `sets`, `model`, `versions` and whatever the calibration recorded.

    Raises: CalibrationError: no module, one set only, a module without its block, a value that is not positive.
    """

    safety: Mapping[str, Tensor]
    task: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.safety and not self.task:
            raise CalibrationError("The calibration is empty: it holds no layer. Calibrate with at least one sample.")
        one_sided = sorted(set(self.safety) ^ set(self.task))
        if one_sided:
            side = "safety" if one_sided[0] in self.safety else "task"
            raise CalibrationError(
                f"The calibration is one-sided: {one_sided[0]} ({len(one_sided)} such layer(s)) has a diagonal from "
                f"the {side} set only; the edit compares both. Calibrate again with both --safety and --task."
            )
        blocks = self.meta.get("blocks")
        if not isinstance(blocks, Mapping) or not isinstance(self.meta.get("block_count"), int):
            raise CalibrationError("The calibration's meta lacks `blocks` or `block_count`; calibrate again.")
        for name in self.safety:
            a, b = self.safety[name], self.task[name]
            if a.ndim != 1 or a.shape != b.shape:
                raise CalibrationError(
                    f"The calibration of {name} has shapes {tuple(a.shape)} (safety) and {tuple(b.shape)} (task); "
                    "expected one number per input column in both."
                )
            index = blocks.get(name)
            if not isinstance(index, int) or not 0 <= index < self.meta["block_count"]:
                raise CalibrationError(
                    f"The calibration names {name} in block {index!r}; expected 0..{self.meta['block_count'] - 1}."
                )
            for side, diagonal in (("safety", a), ("task", b)):
                bad = ~(torch.isfinite(diagonal) & (diagonal > 0))
                if bool(bad.any()):
                    j = int(bad.nonzero()[0])
                    raise CalibrationError(
                        f"The {side} calibration of {name} holds {float(diagonal[j])} at column {j}; the diagonal of "
                        "an inverse damped Gram matrix is positive and finite. Calibrate again."
                    )

    @property
    def modules(self) -> tuple[str, ...]:
        """In-memory names of the calibrated layers, in block order."""
        return tuple(sorted(self.safety, key=lambda name: (self.meta["blocks"][name], name)))

    @property
    def blocks(self) -> Mapping[str, int]:
        """Layer -> 0-based index of its decoder block."""
        return self.meta["blocks"]

    @property
    def block_count(self) -> int:
        """Number of decoder blocks of the model, edited or not."""
        return self.meta["block_count"]

    def weight_keys(self, module: str) -> tuple[str, ...]:
        """On-disk key(s) of the weight of `module`; `<module>.weight` where the calibration recorded none."""
        keys = self.meta.get("weight_keys", {}).get(module, f"{module}.weight")
        return (keys,) if isinstance(keys, str) else tuple(keys)

    def record_of(self, module: str) -> dict[str, Any]:
        """What was recorded of a layer's Grams, by set: `tokens_over_width` (N / c) and `fallbacks`, where there are.

        Layers that share an input share its record, which is kept under the first of them.
        """
        groups = self.meta.get("inputs", ())
        leader = next((group[0] for group in groups if module in group), module)
        found: dict[str, Any] = {}
        for key in ("tokens_over_width", "fallbacks"):
            by_set = {name: record.get(key, {}) for name, record in self.meta.get("sets", {}).items()}
            values = {name: record[leader] for name, record in by_set.items() if leader in record}
            if values:
                found[key] = values
        return found

    def digest(self) -> str:
        """sha256 of all that decides an edit: diagonals, blocks, keys. Calibrations with one digest edit alike."""
        deciding = {"blocks": self.blocks, "block_count": self.block_count}
        deciding["weight_keys"] = {name: self.weight_keys(name) for name in self.safety}
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
        for side, values in (("safety", self.safety), ("task", self.task)):
            for name in sorted(values):
                digest.update(f"\0{side}/{name}\0".encode())
                digest.update(values[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, atomically. The same curvature gives the same bytes.

        Raises: StorageError: the file cannot be written.
        """
        # One owner per tensor: safetensors refuses tensors that share memory, and q/k/v often do.
        tensors = {
            f"{side}/{name}": values[name].detach().to("cpu", torch.float32, copy=True).contiguous()
            for side, values in (("safety", self.safety), ("task", self.task))
            for name in sorted(values)
        }
        with atomic_path(Path(path)) as temporary:
            # One metadata key only: safetensors keeps metadata in an unordered map.
            save_file(tensors, temporary, metadata={_METADATA_KEY: _encode_meta(self.meta)})

    @classmethod
    def load(cls, path: Path | str) -> Curvature:
        """Read what `save` wrote.

        Raises: CalibrationError: no such file, not a calibration, damaged, or of another format version.
        """
        path = Path(path)
        if not path.is_file():
            raise CalibrationError(f"No calibration at {path}. Make one with `holdfast calibrate MODEL --out {path}`.")
        try:
            TensorFile(path).close()  # its header, within bounds
        except CheckpointError as error:
            raise CalibrationError(f"{path} is not a readable safetensors file ({error}); calibrate again.") from error
        try:
            with safe_open(path, framework="pt") as file:
                encoded = (file.metadata() or {}).get(_METADATA_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, KeyError) as error:
            raise CalibrationError(f"{path} is not a readable safetensors file ({error}); calibrate again.") from error
        if encoded is None:
            raise CalibrationError(f"{path} is no calibration: it lacks the metadata that `holdfast calibrate` writes.")
        meta = parse_json(encoded, f"{path} holds metadata that cannot be read: it", error=CalibrationError)
        if not isinstance(meta, dict):
            raise CalibrationError(f"{path} holds metadata that is no JSON object; calibrate again.")
        version = meta.get("format_version")
        if version != FORMAT_VERSION:
            raise CalibrationError(
                f"{path} has calibration format {version!r}, this version reads {FORMAT_VERSION}; calibrate again."
            )
        sides: dict[str, dict[str, Tensor]] = {side: {} for side in SETS}
        for name, tensor in tensors.items():
            side, _, module = name.partition("/")
            if side not in sides:
                raise CalibrationError(f"{path} holds {name!r}; expected names safety/... and task/... only.")
            sides[side][module] = tensor
        return cls(safety=sides["safety"], task=sides["task"], meta=meta)


def _encode_meta(meta: Mapping[str, Any]) -> str:
    return json.dumps({**meta, "format_version": FORMAT_VERSION}, sort_keys=True, allow_nan=False)
