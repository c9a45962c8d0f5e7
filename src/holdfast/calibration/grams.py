"""Hooks that turn a model's forward into Gram matrices, one per distinct input of the decoder's linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import CalibrationError, ModelError, NumericalError
from holdfast.functional.hessian import InputGram, Normalization
from holdfast.models.processes import in_group


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGram:
    """What a consumer receives: the finished Gram of one distinct input, and the layers that read it.

    block: 0-based decoder block, of `block_count`. modules: their names, in the order in which they ran (q, k, v share
    one Gram; so do gate and up). linears: the layers themselves, which a consumer may change in place.
    """

    block: int
    block_count: int
    modules: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    gram: InputGram


@dataclass(frozen=True, eq=False)
class _Seen:
    leader: str
    tensor: Tensor
    version: int


class GramCollector:
    """Collects the inputs of linear layers while the model runs; layers that are handed one tensor share one Gram.

    Sharing is seen at run time (the same memory within one pass through a block), so it needs no list of names.
    """

    def __init__(
        self, linears: dict[int, dict[str, nn.Linear]], normalization: Normalization, *, dual: bool = True
    ) -> None:
        self.linears = linears
        self.block_of = {name: index for index, layers in linears.items() for name in layers}
        self.normalization: Normalization = normalization
        self.leaders: dict[str, str] = {}  # module -> the module whose Gram it shares, in the order of the first run
        self.grams: dict[str, InputGram] = {}
        self._dual = dual
        self._recent: list[_Seen] = []
        self._mask: Tensor | None = None
        self._label = ""

    @contextmanager
    def attached(self, blocks: dict[int, nn.Module]) -> Iterator[None]:
        """Hooks on every linear of `linears`, and on their blocks, for the time within."""
        handles = []
        try:
            for index, layers in self.linears.items():
                handles.append(blocks[index].register_forward_pre_hook(self._enter))
                for name, linear in layers.items():
                    handles.append(linear.register_forward_pre_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._recent.clear()

    def expect(self, mask: Tensor, label: str) -> None:
        """The next forward is of a batch with this mask (sequences, tokens); `label` names it in errors."""
        self._mask, self._label = mask, label

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._recent.clear()

    def _hook(self, name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._collect(name, module, args[0])

        return collect

    def _collect(self, name: str, module: nn.Module, x: Tensor) -> None:
        leader = next((seen.leader for seen in self._recent if _same(seen, x)), None)
        known = self.leaders.setdefault(name, leader or name)
        if known != (leader or name):
            raise ModelError(f"{name} read the input of {known} in one batch and another one now; this is not handled.")
        if leader is not None:
            return
        if any(seen.leader == name for seen in self._recent):
            raise ModelError(f"{name} runs more than once in one forward; such models are not handled.")
        self._recent.append(_Seen(name, x, x._version))
        gram = self.grams.get(name)
        if gram is None:
            gram = self.grams[name] = InputGram(module.in_features, self.normalization, dual=self._dual)  # type: ignore[arg-type]
        try:
            gram.update(*_aligned(name, x, self._mask))
        except NumericalError as error:
            raise CalibrationError(f"{name}, while calibrating on {self._label}: {error}") from error

    def synchronize(self) -> None:
        """Sum every Gram over all processes; the layers and their sharing are those that rank 0 saw.

        Raises: ModelError: processes disagree on which layers share an input.
        """
        if not in_group():
            return
        shared = [self.leaders]
        dist.broadcast_object_list(shared, src=0)
        if self.leaders and self.leaders != shared[0]:
            raise ModelError("Processes disagree on which layers share an input; all must run the same model.")
        self.leaders = shared[0]
        for leader in dict.fromkeys(self.leaders.values()):
            if leader not in self.grams:
                width = self.linears[self.block_of[leader]][leader].in_features
                self.grams[leader] = InputGram(width, self.normalization, dual=self._dual)
            self.grams[leader].all_reduce()

    def take(self, block: int, block_count: int) -> Iterator[LayerGram]:
        """The Grams of one block, each given up by the collector as it is handed out.

        Raises: CalibrationError: a layer of the block never ran on the samples.
        """
        layers = self.linears[block]
        silent = sorted(set(layers) - set(self.leaders))
        if silent:
            raise CalibrationError(
                f"{silent[0]} ({len(silent)} layer(s) of block {block}) never ran on the calibration samples, so "
                "nothing is known of its inputs. Add samples of the kind that use it (images, for cross attention)."
            )
        groups: dict[str, list[str]] = {}
        for name, leader in self.leaders.items():
            if name in layers:
                groups.setdefault(leader, []).append(name)
        for leader, modules in groups.items():
            yield LayerGram(
                block=block,
                block_count=block_count,
                modules=tuple(modules),
                linears=tuple(layers[m] for m in modules),
                gram=self.grams.pop(leader),
            )


def gram_bytes(widths: Sequence[int]) -> int:
    """Memory of fp32 Grams of these widths."""
    return sum(4 * width * width for width in widths)


def _same(seen: _Seen, x: Tensor) -> bool:
    # Views made per layer are new objects on the same memory. The tensor is held in `seen`, so its memory cannot have
    # been given to another; the version says whether it was written to in between.
    tensor = seen.tensor
    return x is tensor or (
        x.data_ptr() == tensor.data_ptr()
        and x.shape == tensor.shape
        and x.stride() == tensor.stride()
        and x._version == seen.version
    )


def _aligned(name: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    assert mask is not None
    rows = mask.numel()
    if x.ndim == 2 and x.shape[0] == rows:
        x = x.view(*mask.shape, x.shape[-1])
    if x.ndim != 3 or x.shape[:2] != mask.shape:
        raise ModelError(
            f"{name} reads an input of shape {tuple(x.shape)}; expected (sequences, tokens, width) for sequences x "
            f"tokens = {tuple(mask.shape)}. Layers that see a selection of tokens (routed experts) are not handled."
        )
    return x, mask.to(x.device)
