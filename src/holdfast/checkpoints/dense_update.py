"""What an adapter does to one weight where that is not plain LoRA on a linear layer: merged whole, never as factors.

Conv and embedding LoRA are W + s B A in another layout; DoRA (arXiv 2402.09353) scales every output of W + s B A to a
trained length; PiSSA and its like (arXiv 2404.02948) began with factors that were taken out of W, so what was trained
is W + s (B A - B0 A0); trainable tokens replace rows. The arithmetic is PEFT's `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.checkpoints.tensor_file import TensorEntry, TensorFile

DenseKind = Literal["linear", "embedding", "conv", "tokens"]


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of an update, and the open file that it is in."""

    file: TensorFile
    entry: TensorEntry


@dataclass(frozen=True, kw_only=True)
class DenseUpdate:
    """One module's update. parts: by role: A, B, embedding_A, embedding_B, magnitude, tokens, initial_A, initial_B.

    scaling: s. transposed: the base stores a linear's weight as (in, out). indices: the rows that `tokens` replaces.
    """

    module: str
    kind: DenseKind
    parts: Mapping[str, Part] = field(repr=False)
    scaling: float = 1.0
    transposed: bool = False
    indices: tuple[int, ...] = ()

    def meaning(self) -> list[Any]:
        """What beside the tensors decides the update, for a fingerprint."""
        return [self.kind, self.scaling, self.transposed, list(self.indices)]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the update is of a weight of this shape."""
        if self.kind == "tokens":
            rows = self.parts["tokens"].entry.shape
            return rows == (len(self.indices), *shape[1:]) and max(self.indices, default=-1) < shape[0]
        return self.shape == shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that the factors are for; of trainable tokens, of the rows."""
        if self.kind == "tokens":
            return self.parts["tokens"].entry.shape
        if self.kind == "embedding":
            return (self.parts["embedding_A"].entry.shape[1], self.parts["embedding_B"].entry.shape[0])
        a, b = self.parts["A"].entry.shape, self.parts["B"].entry.shape
        if self.kind == "conv":
            return (b[0], *a[1:])
        return (a[1], b[0]) if self.transposed else (b[0], a[1])

    def apply(self, weight: Tensor) -> Tensor:
        """The updated weight, fp32 or wider; `weight` is left alone.

        weight: the base's (r, c), or a convolution's (out, in, height, width). Returns: of the same shape.

        Raises: ValueError: a stored tensor holds NaN or inf, or is for another shape.
        """
        if not self.fits(tuple(weight.shape)):
            raise ValueError(
                f"{self.module} is updated as {self.shape}, but is {tuple(weight.shape)} in the base; the adapter was "
                "trained on another model, or on a convolution with groups, which is not handled."
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        found = weight.to(wide)
        if self.kind == "tokens":
            rows = torch.tensor(self.indices, device=weight.device)
            return found.index_copy(0, rows, self._read("tokens", weight).to(wide))
        flat = found.t() if self.transposed else found.reshape(found.shape[0], -1)
        total = flat + self._change(weight).to(wide)
        if "magnitude" in self.parts:
            # An embedding's outputs are its columns, a linear's or convolution's its rows.
            dim = 0 if self.kind == "embedding" else 1
            magnitude = self._read("magnitude", weight).to(wide).reshape(-1)
            total = total * (magnitude.unsqueeze(dim) / total.norm(dim=dim, keepdim=True))
        return total.t().contiguous() if self.transposed else total.reshape(found.shape)

    def _change(self, weight: Tensor) -> Tensor:
        """s B A as a matrix (rows, everything else)."""
        if self.kind == "embedding":
            return (self._read("embedding_B", weight) @ self._read("embedding_A", weight)).t() * self.scaling
        a, b = (self._read(role, weight).flatten(1) for role in ("A", "B"))
        change = b @ a
        if "initial_A" in self.parts:
            a, b = (self._read(role, weight).flatten(1) for role in ("initial_A", "initial_B"))
            change = change - b @ a
        return change * self.scaling

    def _read(self, role: str, like: Tensor) -> Tensor:
        part = self.parts[role]
        tensor = part.file.read(part.entry)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{part.entry.name} holds NaN or inf; the training that made it diverged.")
        return tensor.to(like.device, torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["DenseKind", "DenseUpdate", "Part"]
