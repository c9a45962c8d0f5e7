"""The model's own forward over samples, Grams of every layer's input handed on block by block, within a budget."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.calibration.grams import GramCollector, LayerGram, gram_bytes
from holdfast.calibration.resume_forward import Spool, StopForwardError, VisionMemory, replayed, stop_after
from holdfast.data.types import Sample, Turn
from holdfast.errors import CalibrationError, ConfigError
from holdfast.functional.hessian import Normalization
from holdfast.models.encode import ANSWER, IMAGE, PADDING, Inputs, encode_cut, encode_request, token_kinds
from holdfast.models.families import decoder_blocks, editable_linears
from holdfast.models.loaded import LoadedModel
from holdfast.models.memory import usable_bytes
from holdfast.models.processes import in_group
from holdfast.models.settings import quiet_transformers

Tokens = Literal["all", "text", "answer"]
Consumer = Callable[[LayerGram], None]
Progress = Callable[..., None]

# Of the budget: encoded inputs and hidden states between passes, beyond which they go to disk.
_SPOOL_SHARE = 8
# Of what is left after the weights: activations of one batch.
_ACTIVATION_SHARE = 4


@dataclass(frozen=True, kw_only=True)
class WalkReport:
    """What one walk did. sequences, tokens: over all processes. seconds: by phase. passes: block ranges, in order."""

    sequences: int
    tokens: int
    passes: tuple[tuple[int, int], ...]
    batch_size: int
    seconds: dict[str, float] = field(default_factory=dict)


def walk_grams(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    consumer: Consumer,
    *,
    tokens: Tokens = "all",
    normalization: Normalization = "sequence",
    batch_size: int = 16,
    memory_bytes: int | None = None,
    blocks_per_pass: int | None = None,
    blocks: Collection[int] | None = None,
    linears: Collection[str] | None = None,
    workspace_bytes: int | None = None,
    edits: bool = False,
    cut_at: int | None = None,
    progress: Progress | None = None,
) -> WalkReport:
    """Run `samples` through the model and hand the Gram of every distinct input to `consumer`, block after block.

    A Gram is freed when the consumer returns. As many blocks are collected in one pass as the budget allows; a later
    pass starts from the hidden states that the one before saw, so every block runs about once per sample. In a process
    group the samples are dealt out over the processes and every process hands on the same sums.

    Args:
        samples: with an assistant turn (or a reference) the answer is part of the sequence; without, the request alone.
        tokens: "all" real tokens, "text" without image tokens, "answer" the assistant's only. Padding never counts.
        normalization: of the Gram, see `InputGram`.
        batch_size: sequences per forward; lowered where a budget asks for it.
        memory_bytes: what the process (on a GPU: the device) may hold altogether; None takes most of what is free.
        blocks_per_pass: overrides the budget.
        blocks: 0-based indices to calibrate; None: all. linears: names of linear layers, as in memory; None: all.
        workspace_bytes: what the consumer takes beside the widest Gram; None: what the diagonal of an inverse takes.
        edits: the consumer changes the layers in place (`LayerGram.linears`), and a block reads what the edited blocks
            before it give: one block in a pass, which runs once more after its edit.
        cut_at: tokens at which a sample's answer was cut when it was learned (`max_length`); None: none was.

    Raises: CalibrationError: no samples, no token of the kind asked for, NaN or inf in an activation, a layer that
        never runs, no such layer. ConfigError: a budget too small for one block. DataError: as encoding.
    """
    if not samples:
        raise CalibrationError("The calibration set is empty; expected at least one sample.")
    if tokens not in get_args(Tokens):
        raise ConfigError(f"tokens={tokens!r}; expected one of {', '.join(get_args(Tokens))}.")
    if batch_size < 1 or (blocks_per_pass is not None and blocks_per_pass < 1):
        raise ConfigError(f"batch_size {batch_size} and blocks_per_pass {blocks_per_pass} must be positive.")
    if edits:
        blocks_per_pass = 1
    walk = _Walk(
        loaded, samples, tokens, normalization, batch_size, memory_bytes, blocks_per_pass, blocks, linears, cut_at
    )
    walk.edits = edits
    walk.workspace_bytes = workspace_bytes if workspace_bytes is not None else 4 * walk.widest * walk.widest // 8
    try:
        return walk.run(consumer, progress or _silent)
    finally:
        walk.spool.close()


class _Walk:
    def __init__(
        self,
        loaded: LoadedModel,
        samples: Sequence[Sample],
        tokens: Tokens,
        normalization: Normalization,
        batch_size: int,
        memory_bytes: int | None,
        blocks_per_pass: int | None,
        wanted: Collection[int] | None,
        names: Collection[str] | None,
        cut_at: int | None,
    ) -> None:
        self.loaded = loaded
        self.cut_at = cut_at
        self.tokens: Tokens = tokens
        self.normalization: Normalization = normalization
        self.blocks = [block for _, block in decoder_blocks(loaded.model)]
        by_block = _linears_by_block(loaded, wanted)
        # Activations are as wide as the widest layer that runs, whether or not it is calibrated.
        self.widest = max((linear.in_features for layers in by_block.values() for linear in layers.values()), default=0)
        if names is not None:
            unknown = sorted(set(names) - {name for layers in by_block.values() for name in layers})
            if unknown:
                raise CalibrationError(f"{loaded.name} has no linear layer {unknown[0]} in the blocks asked for.")
            by_block = {i: {n: linear for n, linear in layers.items() if n in names} for i, layers in by_block.items()}
        self.linears = {i: by_block.get(i, {}) for i in range(len(self.blocks))}
        self.last = max((i for i, layers in self.linears.items() if layers), default=-1)
        if self.last < 0:
            raise CalibrationError(f"{loaded.name} has no linear layer in the blocks asked for.")
        self.sharing: dict[tuple[Any, ...], list[int]] = {}
        self.returns_tuple: dict[int, bool] = {}
        # Blocks that read keys and values of earlier blocks cannot be reached without running those: every pass then
        # starts at the first block.
        self.replay = not getattr(loaded.model.config.get_text_config(), "num_kv_shared_layers", 0)
        self.budget = _Budget(loaded, memory_bytes)
        self.blocks_per_pass = blocks_per_pass
        whole = [_with_answer(sample, tokens) for sample in samples]
        _refuse_mixed(whole)
        self.samples = _my_share(whole)
        # Like lengths together: less padding. Long ones first: what does not fit fails at once.
        self.samples.sort(key=lambda s: (-_length(s), s.id))
        self.batch_size = self.budget.batch_size(batch_size, self._bytes_per_sequence())
        self.spool = Spool(self.budget.total // _SPOOL_SHARE)
        self.vision = VisionMemory(loaded.model, self.spool)
        self.workspace_bytes = 0
        self.edits = False
        self.seconds = dict.fromkeys(("encode", "load", "forward", "reduce"), 0.0)
        self.counted = [0, 0]

    def _bytes_per_sequence(self) -> int:
        """Activations of the sample that seems longest: in a decoder block, or in the tower, whichever is more."""
        if not self.samples:
            return 1
        inputs, mask = _encode(self.loaded, self.samples[:1], self.tokens, self.cut_at)
        hidden = self.loaded.model.config.get_text_config().hidden_size
        # Inputs held for sharing, their fp32 copies, gate and up and their product, the residual stream.
        decoder = mask.shape[1] * 4 * (4 * self.widest + 8 * hidden)
        return max(decoder, _tower_bytes(self.loaded, inputs))

    def run(self, consumer: Consumer, progress: Progress) -> WalkReport:
        passes: list[tuple[int, int]] = []
        start = 0
        batches = range(0, len(self.samples), self.batch_size)
        while start <= self.last:
            stop = self._choose_stop(start)
            self._pass(start, stop, batches, consumer, progress)
            passes.append((start, stop))
            start = stop
        return WalkReport(
            sequences=self.counted[0],
            tokens=self.counted[1],
            passes=tuple(passes),
            batch_size=self.batch_size,
            seconds={k: round(v, 3) for k, v in self.seconds.items()},
        )

    def _pass(self, start: int, stop: int, batches: range, consumer: Consumer, progress: Progress) -> None:
        here = range(start, stop)
        alive = here if self.replay else range(stop)
        store = self.loaded.blocks_on_disk
        if store is not None:
            with self._timed("load"):
                store.materialize(alive)
        collector = GramCollector({i: self.linears[i] for i in here if self.linears[i]}, self.normalization)
        with collector.attached({i: self.blocks[i] for i in here}):
            for number, offset in enumerate(batches):
                self._forward(start, stop, number, offset, collector)
                progress("calibrate", blocks=(start, stop, self.last + 1), done=number + 1, total=len(batches))
        with self._timed("reduce"):
            collector.synchronize()
            for index in here:
                self._note_sharing(index, collector)
                for layer in collector.take(index, len(self.blocks)) if self.linears[index] else ():
                    if layer.gram.tokens == 0:
                        raise CalibrationError(
                            f"No token of kind {self.tokens!r} reached {layer.modules[0]}; the samples have none."
                        )
                    self.counted = [layer.gram.sequences, layer.gram.tokens]
                    consumer(layer)
                    del layer
        if self._edited(start, stop) and stop <= self.last and self.replay:
            for number, offset in enumerate(batches):
                self._forward(start, stop, number, offset, None)
        if store is not None:
            store.release(alive)
        if stop <= self.last:
            _return_memory()

    def _forward(self, start: int, stop: int, number: int, offset: int, collector: GramCollector | None) -> None:
        """One batch through blocks `start` to `stop`; collector: None for the run after an edit, which only records."""
        several = not (start == 0 and stop > self.last)
        batch = self.samples[offset : offset + self.batch_size]
        with self._timed("encode"):
            inputs, mask = self._inputs(number, batch, first=start == 0, keep=several)
        if collector is not None:
            collector.expect(mask, f"samples {batch[0].id!r} .. {batch[-1].id!r}")
        # Before an edit the input of the next block is not what it will be, and what is there is needed once more.
        records = self.replay and stop <= self.last and (collector is None or not self._edited(start, stop))
        record = (lambda hidden: self.spool.put(f"hidden-{number}", {"hidden": hidden})) if records else None
        with self._timed("forward"), ExitStack() as stack:
            if several and self.replay:
                stack.enter_context(
                    self.vision.recording(str(number)) if start == 0 else self.vision.replaying(str(number))
                )
                stack.enter_context(self._watching(range(start, stop)))
            if self.replay:
                stack.enter_context(
                    replayed(
                        self.blocks, start, lambda: self.spool.get(f"hidden-{number}")["hidden"], self.returns_tuple
                    )
                )
            stack.enter_context(stop_after(self.blocks, stop, record))
            stack.enter_context(torch.no_grad())
            stack.enter_context(quiet_transformers())
            try:
                self.loaded.model(**inputs, use_cache=False)
            except StopForwardError:
                return
        raise CalibrationError(f"{self.loaded.name} finished its forward without reaching block {stop - 1}.")

    def _edited(self, start: int, stop: int) -> bool:
        """Whether the consumer changes what these blocks give."""
        return self.edits and any(self.linears[index] for index in range(start, stop))

    def _inputs(self, number: int, batch: list[Sample], *, first: bool, keep: bool) -> tuple[Inputs, Tensor]:
        if first:
            inputs, mask = _encode(self.loaded, batch, self.tokens, self.cut_at)
            if keep:
                self.spool.put(f"inputs-{number}", {**inputs, "holdfast.mask": mask})
        else:
            inputs = dict(self.spool.get(f"inputs-{number}"))
            mask = inputs.pop("holdfast.mask")
        return {k: v.to(self.loaded.device) for k, v in inputs.items()}, mask

    def _choose_stop(self, start: int) -> int:
        if self.blocks_per_pass is not None:
            return min(start + self.blocks_per_pass, self.last + 1)
        left = self.budget.for_blocks(self.workspace_bytes, self.spool)
        stop = start
        while stop <= self.last:
            left -= self._block_bytes(stop)
            if left < 0:
                break
            stop += 1
        agreed = self._agree(stop)
        if agreed == start:
            self.budget.refuse(self._block_bytes(start), start, elsewhere=stop > start)
        return agreed

    def _agree(self, stop: int) -> int:
        """The smallest `stop` of all processes: each sees memory of its own, and the Grams of a pass are summed."""
        if not in_group():
            return stop
        shared = torch.tensor([stop], device=self.loaded.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MIN)
        return int(shared)

    def _block_bytes(self, index: int) -> int:
        # Before a block of this shape has run, every layer counts as having an input of its own.
        widths = self.sharing.get(self._shape(index), [linear.in_features for linear in self.linears[index].values()])
        weights = 0
        if self.loaded.blocks_on_disk is not None:
            weights = sum(p.numel() * p.element_size() for p in self.blocks[index].parameters())
        return gram_bytes(widths) + weights

    def _shape(self, index: int) -> tuple[Any, ...]:
        return tuple(
            (name.split(f".{index}.", 1)[-1], linear.in_features) for name, linear in self.linears[index].items()
        )

    def _note_sharing(self, index: int, collector: GramCollector) -> None:
        leaders = dict.fromkeys(collector.leaders[n] for n in self.linears[index] if n in collector.leaders)
        self.sharing[self._shape(index)] = [self.linears[index][name].in_features for name in leaders]

    def _watching(self, here: range) -> ExitStack:
        """Notes whether blocks return a bare tensor or a tuple, so that a passed-through block does the same."""
        stack = ExitStack()
        for index in here:

            def note(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                self.returns_tuple[index] = isinstance(output, tuple)

            handle = self.blocks[index].register_forward_hook(note, prepend=True)
            stack.callback(handle.remove)
        return stack

    def _timed(self, phase: str) -> _Timer:
        return _Timer(self.seconds, phase)


class _Timer:
    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._seconds[self._phase] += time.perf_counter() - self._began


class _Budget:
    """How many bytes there are for Grams and streamed weights beside what is held already."""

    def __init__(self, loaded: LoadedModel, memory_bytes: int | None) -> None:
        self.device = loaded.device
        held = self._held()
        self.total = memory_bytes if memory_bytes is not None else held + usable_bytes(self.device)
        self.activations = 0
        self.reserve = max(0, (self.total - held) // _ACTIVATION_SHARE)

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def batch_size(self, wanted: int, per_sequence: int) -> int:
        """`wanted`, or as many sequences as fit into the share for activations."""
        size = min(wanted, max(1, self.reserve // per_sequence))
        self.activations = size * per_sequence
        return size

    def for_blocks(self, workspace: int, spool: Spool) -> int:
        # What the spool holds already is among what the process holds.
        unused = max(0, spool.limit_bytes - spool.held_bytes)
        return self.total - self._held() - min(self.activations, self.reserve) - unused - workspace

    def refuse(self, needed: int, block: int, *, elsewhere: bool) -> None:
        if elsewhere:
            raise ConfigError(
                f"Another process has no memory for block {block}, which needs {needed / 2**30:.2f} GiB here; its own "
                "message says what it holds. Raise --memory, lower the batch size, or start fewer processes."
            )
        raise ConfigError(
            f"The memory budget of {self.total / 2**30:.2f} GiB is too small: {self._held() / 2**30:.2f} GiB are held "
            f"already and block {block} needs {needed / 2**30:.2f} GiB more. Raise --memory, or lower the batch size."
        )


def _encode(
    loaded: LoadedModel, batch: list[Sample], tokens: Tokens, cut_at: int | None = None
) -> tuple[Inputs, Tensor]:
    inputs = encode_cut(loaded, batch, cut_at)[0] if _answered(batch[0]) else encode_request(loaded, batch)
    kinds = token_kinds(loaded, inputs)
    inputs.pop("labels", None)
    mask = kinds != PADDING
    if tokens == "text":
        mask &= kinds != IMAGE
    elif tokens == "answer":
        mask &= kinds == ANSWER
    return inputs, mask


def _tower_bytes(loaded: LoadedModel, inputs: Inputs) -> int:
    """A vision tower that returns the states of all its layers holds them all at once."""
    vision = getattr(loaded.model.config, "vision_config", None)
    pixels = inputs.get("pixel_values")
    patch = getattr(vision, "patch_size", None)
    if vision is None or pixels is None or not patch:
        return 0
    side = patch if isinstance(patch, int) else max(patch)
    layers = int(getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 0) or 0)
    patches = pixels.numel() // (3 * side * side)
    return patches * (layers + 8) * getattr(vision, "hidden_size", 0) * loaded.dtype.itemsize


def _answered(sample: Sample) -> bool:
    return any(turn.role == "assistant" for turn in sample.turns)


def _refuse_mixed(samples: Sequence[Sample]) -> None:
    """All or none have an answer: over the whole set, for which sample meets which in a batch depends on memory."""
    mute = [sample.id for sample in samples if not _answered(sample)]
    if mute and len(mute) < len(samples):
        raise CalibrationError(
            f"Samples with and without an answer are mixed ({mute[0]!r} has none, {len(mute)} of {len(samples)}); give "
            "every calibration sample an answer, or none."
        )


def has_answer(sample: Sample) -> bool:
    """Whether an answer is part of what is walked: an assistant turn, or a reference."""
    return _answered(sample) or bool(sample.answer)


def _with_answer(sample: Sample, tokens: Tokens) -> Sample:
    if _answered(sample):
        return sample
    if sample.answer:
        answer = Turn(role="assistant", text=sample.answer)
        return Sample(id=sample.id, turns=(*sample.turns, answer), images=sample.images, meta=sample.meta)
    if tokens == "answer":
        raise CalibrationError(
            f"Calibration sample {sample.id!r} has no answer, and tokens='answer' asks for its tokens."
        )
    return sample


def _my_share(samples: Sequence[Sample]) -> list[Sample]:
    if in_group():
        return list(samples[dist.get_rank() :: dist.get_world_size()])
    return list(samples)


def _linears_by_block(loaded: LoadedModel, wanted: Collection[int] | None) -> dict[int, dict[str, nn.Linear]]:
    found: dict[int, dict[str, nn.Linear]] = {}
    for index in range(len(decoder_blocks(loaded.model))) if wanted is None else sorted(wanted):
        found[index] = editable_linears(loaded.model, [index])
    return found


def _length(sample: Sample) -> int:
    return sum(len(turn.text) for turn in sample.turns) + 1000 * len(sample.images)


def _return_memory() -> None:
    """Hand freed memory back to the system: glibc keeps blocks of up to 32 MiB, and the budget counts what is held."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _silent(event: str, **values: Any) -> None:
    del event, values


__all__ = ["Consumer", "LayerGram", "Tokens", "WalkReport", "has_answer", "walk_grams"]
