"""Running the tail of a model's forward again without running its head again.

Calibration in several passes needs the input of block `start` many blocks deep. The model's own forward is run, so
masks, rotary embeddings and whatever a family does between blocks stay its own; blocks before `start` are passed
through, and the input of block `start` is what an earlier pass saw there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

from holdfast.files import storage_errors

_PREFIX = "holdfast-calibrate-"
# Fields of a vision encoder's output that only shape the prompt's embeddings, which a replay overwrites.
_OVERWRITTEN = frozenset({"last_hidden_state", "pooler_output", "hidden_states", "attentions"})


class StopForwardError(Exception):
    """Ends a forward once the last block that is needed has run. Never leaves this package."""


class Spool:
    """Tensors by key, in memory up to `limit_bytes`, beyond that in a temporary folder.

    Raises: StorageError: that folder's disk is full.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._memory: dict[str, dict[str, Tensor]] = {}
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._folder: TemporaryDirectory[str] | None = None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep `tensors`, of any shape, under `key`: in memory while there is room, else in a temporary file.

        Each is read back as it is, say (B, T, d). Raises: StorageError: the disk is full.
        """
        self._drop(key)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.held_bytes + size <= self.limit_bytes:
            self._memory[key] = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            self.held_bytes += size
            return
        kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        with storage_errors(Path(gettempdir(), f"{_PREFIX}* (TMPDIR says where)")):
            if self._folder is None:
                self._folder = TemporaryDirectory(prefix=_PREFIX)
            save_file(kept, self._file(key))

    def get(self, key: str) -> dict[str, Tensor]:
        """What `put` was given under `key`, on the CPU; shapes and types as then, say (B, T, d)."""
        return self._memory[key] if key in self._memory else load_file(self._file(key))

    def close(self) -> None:
        """Forget everything and remove the temporary files."""
        self._memory.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _drop(self, key: str) -> None:
        old = self._memory.pop(key, {})
        self.held_bytes -= sum(t.numel() * t.element_size() for t in old.values())

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{key}.safetensors"


@contextmanager
def stop_after(blocks: Sequence[nn.Module], stop: int, record: Callable[[Tensor], None] | None) -> Iterator[None]:
    """End every forward when block `stop - 1` is done; `record` receives what block `stop` was about to read.

    Within this context; `record` is given (B, T, d). Raises: nothing itself: each forward ends in StopForwardError.
    """

    def at_next(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if record is not None:
            record(_hidden(args, kwargs))
        raise StopForwardError

    def at_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise StopForwardError

    if stop < len(blocks):
        handle = blocks[stop].register_forward_pre_hook(at_next, with_kwargs=True)
    else:
        handle = blocks[-1].register_forward_hook(at_last)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replayed(
    blocks: Sequence[nn.Module], start: int, hidden: Callable[[], Tensor], returns_tuple: Mapping[int, bool]
) -> Iterator[None]:
    """Within, blocks before `start` pass their input on and block `start` reads `hidden()`.

    returns_tuple: which blocks return a tuple whose first item is the hidden state, rather than the state itself.

    hidden: gives the input of block `start`, (B, T, d).
    """
    if start == 0:
        yield
        return

    def substitute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        old = _hidden(args, kwargs)
        new = hidden().to(old.device)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    originals = [block.__dict__.get("forward") for block in blocks[:start]]
    handle = blocks[start].register_forward_pre_hook(substitute, with_kwargs=True)
    try:
        for index, block in enumerate(blocks[:start]):
            block.forward = _pass_on_tuple if returns_tuple.get(index) else _pass_on  # type: ignore[method-assign]
        yield
    finally:
        handle.remove()
        for block, original in zip(blocks[:start], originals, strict=True):
            if original is None:
                del block.forward
            else:
                block.forward = original  # type: ignore[method-assign]


class VisionMemory:
    """Remembers what `get_image_features` returned, so that later passes need no vision tower.

    A replay overwrites the embeddings that image features were merged into, so these fields come back as zeros of the
    same shape; anything else (features that enter between blocks) comes back as it was.
    """

    def __init__(self, model: nn.Module, spool: Spool) -> None:
        self._owners = [m for m in model.modules() if callable(getattr(m, "get_image_features", None))]
        self._spool = spool
        self._shapes: dict[str, list[Any]] = {}

    @contextmanager
    def recording(self, batch: str) -> Iterator[None]:
        """Within, what the vision tower gives for this batch is kept."""
        self._shapes[batch] = []
        with self._patched(lambda original: self._record(batch, original)):
            yield

    @contextmanager
    def replaying(self, batch: str) -> Iterator[None]:
        """Within, the vision tower gives what was kept for this batch and does not run."""
        outputs = iter(self._shapes.get(batch, []))
        with self._patched(lambda original: lambda *args, **kwargs: self._restore(next(outputs))):
            yield

    @contextmanager
    def _patched(self, wrap: Callable[[Any], Any]) -> Iterator[None]:
        # The innermost owner is the one that the forward calls; an outer one only hands on.
        owner = self._owners[-1] if self._owners else None
        if owner is not None:
            owner.get_image_features = wrap(owner.get_image_features)
        try:
            yield
        finally:
            if owner is not None:
                del owner.get_image_features

    def _record(self, batch: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            key = f"vision-{batch}-{len(self._shapes[batch])}"
            kept: dict[str, Tensor] = {}
            form = _pack(output, "", kept, keep=True)
            self._spool.put(key, kept)
            self._shapes[batch].append((key, form))
            return output

        return call

    def _restore(self, entry: tuple[str, Any]) -> Any:
        key, form = entry
        kept = self._spool.get(key)
        return _unpack(form, kept)


def _pack(value: Any, path: str, kept: dict[str, Tensor], *, keep: bool) -> Any:
    """A description of nested tensors: those to keep go into `kept`, of the others only form and device remain."""
    if isinstance(value, Tensor):
        if keep:
            kept[path or "value"] = value
        return ("tensor", path or "value", value.shape, value.dtype, value.device, keep)
    if isinstance(value, ModelOutput):
        fields = {
            k: _pack(v, f"{path}.{k}", kept, keep=keep and k not in _OVERWRITTEN)
            # vars, too: some models hang a field on an output whose class does not declare it.
            for k, v in {**value, **vars(value)}.items()
            if v is not None
        }
        return ("output", type(value), fields)
    if isinstance(value, list | tuple):
        return ("sequence", type(value), [_pack(v, f"{path}.{i}", kept, keep=keep) for i, v in enumerate(value)])
    return ("plain", value)


def _unpack(form: Any, kept: dict[str, Tensor]) -> Any:
    match form:
        case ("tensor", path, shape, dtype, device, keep):
            return kept[path].to(device) if keep else torch.zeros((), dtype=dtype, device=device).expand(shape)
        case ("output", kind, fields):
            declared = {f.name for f in dataclasses.fields(kind)}
            values = {k: _unpack(v, kept) for k, v in fields.items()}
            output = kind(**{k: v for k, v in values.items() if k in declared})
            for name in values.keys() - declared:
                setattr(output, name, values[name])
            return output
        case ("sequence", kind, items):
            return kind(_unpack(v, kept) for v in items)
        case ("plain", value):
            return value
    raise AssertionError(form)


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return hidden_states


def _pass_on_tuple(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return (hidden_states,)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
