"""The edit done again in memory, layer by layer, for the guard to compare the written one with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.merged import add_updates
from holdfast.checkpoints.naming import NameIndex
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.editing.pair import Pair
from holdfast.editing.plan import DenseTarget, LoraTarget, Target
from holdfast.errors import AdapterError
from holdfast.rules.base import EditRule, LoraEditRule


@dataclass(frozen=True, kw_only=True, eq=False)
class Redone:
    """What the edit of one layer is in memory.

    weight: (r, c). factor: the new A (rank, c) of an adapter export, else None. scaled: the weight with the adapter's
    input scale, where the export leaves that out, else None.
    """

    weight: Tensor
    factor: Tensor | None = None
    scaled: Tensor | None = None

    @property
    def written(self) -> Tensor:
        """What the export stores of it.

        The weight (r, c), or the factor A (rank, c).
        """
        return self.weight if self.factor is None else self.factor


@dataclass(frozen=True, kw_only=True)
class Redo:
    """Does the edit of a pair's layers again, as `rule` with `coefficient` and `export` did it."""

    pair: Pair
    rule: EditRule
    export: str
    coefficient: str

    def layer(self, target: Target, w_new: Tensor) -> Redone:
        """w_new: (r, c) of AFTER, widened; overwritten by none of this."""
        old = self.pair.before.read_float(target.before_key)
        if isinstance(target, DenseTarget):
            return self._dense(target, old, w_new)
        return self._lora(target, old)

    def _dense(self, target: DenseTarget, old: Tensor, w_new: Tensor) -> Redone:
        # The editor sees the stored values; the live model holds them widened.
        stored = self.pair.after.entries[target.key].torch_dtype
        exact = self.pair.after.is_plain(target.key)
        new = w_new.to(stored if exact else w_new.dtype).clone()
        return Redone(weight=self.rule.edit(target.layer, old, new).weight)

    def _lora(self, target: LoraTarget, old: Tensor) -> Redone:
        a, b = target.adapter.read_factors(target.lora.module)
        if not isinstance(self.rule, LoraEditRule):
            new = add_updates(old, [(a, b, target.lora, None)], torch.empty_like(old))
            return Redone(weight=self.rule.edit(target.layer, old, new).weight)
        # Read the base like the editor does: a sum in another order would differ in the last bit.
        unread = not self.rule.reads_base or (self.export == "adapter" and self.coefficient == "drop")
        edited = self.rule.edit_lora(target.layer, None if unread else old, a, b, target.lora.scaling)

        def weight(scale: Tensor | None) -> Tensor:
            return add_updates(old, [(edited.lora_a, b, target.lora, scale)], torch.empty_like(old))

        factor = edited.lora_a if self.export == "adapter" else None
        if edited.input_scale is None:
            return Redone(weight=weight(None), factor=factor)
        if self.export == "dense" or self.coefficient == "keep":
            return Redone(weight=weight(edited.input_scale), factor=factor)
        return Redone(weight=weight(None), factor=factor, scaled=weight(edited.input_scale))


class Written:
    """The edited tensors of an export, as they lie on disk."""

    def __init__(self, folder: Path, export: str) -> None:
        self._opened: LoraAdapter | CheckpointReader
        self._opened = LoraAdapter(folder) if export == "adapter" else CheckpointReader(folder)
        # An adapter is written with the present names, whatever names AFTER's has.
        modules = self._opened.modules if isinstance(self._opened, LoraAdapter) else ()
        self._names = NameIndex(modules, what=f"adapter {folder}")

    def read(self, target: Target) -> Tensor:
        """The stored tensor of a target. Raises AdapterError: an adapter has none of this layer.

        The weight (r, c), or the factor A (rank, c).
        """
        if isinstance(self._opened, CheckpointReader):
            return self._opened.read(target.key)
        if not isinstance(target, LoraTarget):
            raise AdapterError(f"{self._opened.folder} is an adapter and cannot hold {target.key}.")
        return self._opened.raw(self._opened.modules[self._names.require(target.lora.module)].a)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()


def same(stored: Tensor, redone: Tensor) -> bool:
    """Equal up to one rounding: a matrix product in other memory may differ in its last bit before the cast.

    stored, redone: of one shape, any shape.
    """
    eps = torch.finfo(stored.dtype).eps
    return torch.allclose(stored.double(), redone.double(), rtol=2 * eps, atol=1e-5 * float(redone.abs().max()))
