"""The model that a run holds from one phase to the next, so that no checkpoint is read twice in a row.

Within `holding()` the `load` of this module gives what `models.load.load` gives, and keeps the model: the evaluation of
a task leaves the checkpoint that the next task is trained on, and CRAM's base serves every task. One model is held at
a time. Whatever else is loaded meanwhile (a guard model, a plug-in's) takes its place: memory is never asked to hold
more than without this module.

What is handed on is what was read: a model that came back with other parameters, hooks or settings is let go. Adapters
on top of the held checkpoint are merged into it, as `load` would into a fresh one, where no other borrower has it; it
is then the borrower's alone.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoints.adapter_settings import has_settings
from holdfast.checkpoints.merged import locate
from holdfast.checkpoints.value import Checkpoint, Source, as_checkpoint
from holdfast.models import load as loading
from holdfast.models.loaded import LoadedModel
from holdfast.models.memory import find_device
from holdfast.models.merge import merge_adapter
from holdfast.models.precision import default_device, parse_dtype, resolve_dtype
from holdfast.models.settings import quiet_transformers, read_config, read_processor
from holdfast.models.tuner import attach_tuner, is_tuner_folder
from holdfast.share import current


@contextmanager
def holding() -> Iterator[None]:
    """Within, `load` keeps the last plain model and hands it on. Nested calls share one; it is let go at the end."""
    global _holder
    if _holder is not None:
        yield
        return
    _holder = _Holder()
    loading.before_load.append(let_go)
    try:
        yield
    finally:
        let_go()
        loading.before_load.remove(let_go)
        _holder = None


def load(
    source: Source, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> LoadedModel:
    """What `models.load.load` gives, frozen; within `holding()` it may be the model of the call before.

    The borrower gives it back as it came: adapters off, no gradients, eval mode. Where the processes at work share a
    base's weights out, each gets its shard, read anew. Raises: as `models.load.load`, `models.shards.load_shards`.
    """
    if current().sharded:
        from holdfast.models.shards import load_shards

        let_go()
        return load_shards(source, dtype=dtype)
    found = held(source, dtype=dtype, device=device)
    if found is not None:
        return found
    if _holder is None:
        return loading.load(source, dtype=dtype, device=device)
    return _holder.read(as_checkpoint(source), dtype, device)


def held(
    source: Source, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> LoadedModel | None:
    """The model of `source`, made from the one that is held, or None where that cannot be; reads no base model."""
    return None if _holder is None else _holder.give(as_checkpoint(source), dtype, device)


def let_go() -> None:
    """Free the memory of the held model, where nobody is using it."""
    if _holder is not None:
        _holder.release()


class _Holder:
    """The plain model (adapters merged, no tuner on top) that was loaded last."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def read(self, value: Checkpoint, dtype: Any, device: Any) -> LoadedModel:
        plain, on_top = _split(value)
        stamp = _stamp(plain)
        loaded = loading.load(plain, dtype=dtype, device=device)  # lets go of what is held
        usual = resolve_dtype(None, read_config(plain.base), loaded.device)
        self._kept = _Kept(plain, stamp, loaded, usual, _state(loaded.model))
        return self._with_tuner(loaded, value, on_top)

    def give(self, value: Checkpoint, dtype: Any, device: Any) -> LoadedModel | None:
        plain, on_top = _split(value)
        kept = self._kept
        if kept is None or not kept.fits(dtype, device):
            return None
        kept.put_back()
        below, extra = kept.value, plain.adapters[len(kept.value.adapters) :]
        if plain.base != below.base or plain.adapters[: len(below.adapters)] != below.adapters:
            return None
        if kept.stamp != _stamp(below) or kept.state != _state(kept.loaded.model):
            self.release()
            return None
        if not extra:
            return self._with_tuner(kept.loaded, value, on_top)
        if kept.is_lent():
            return None
        self._kept = None  # the adapters change it for good
        loaded = _under(kept.loaded, plain, extra)
        return loaded if on_top is None else replace(loaded, tuner=attach_tuner(loaded, on_top))

    def release(self) -> None:
        if self._kept is not None:
            self._kept.put_back()
            self._kept = None
            gc.collect()

    def _with_tuner(self, plain: LoadedModel, value: Checkpoint, on_top: str | None) -> LoadedModel:
        assert self._kept is not None
        loaded = replace(plain, name=str(value), source=value)
        if on_top is not None:
            tuner: Any = attach_tuner(loaded, on_top)
            loaded = replace(loaded, tuner=tuner)
            if not hasattr(tuner, "detach"):
                self._kept = None  # it stays on the model
                return loaded
            self._kept.tuner = tuner
        self._kept.lent.append(weakref.ref(loaded))
        return loaded


@dataclass
class _Kept:
    """usual: the dtype that no dtype comes to. lent: to whom it was handed."""

    value: Checkpoint
    stamp: Any
    loaded: LoadedModel
    usual: torch.dtype
    state: Any
    tuner: Any = None
    lent: list[weakref.ref[LoadedModel]] = field(default_factory=list)

    def is_lent(self) -> bool:
        gc.collect()  # a trainer is full of cycles
        self.lent = [ref for ref in self.lent if ref() is not None]
        return bool(self.lent)

    def fits(self, dtype: Any, device: Any) -> bool:
        wanted = self.usual if dtype is None else parse_dtype(dtype)
        target = default_device() if device is None else find_device(device)
        here = self.loaded.device
        return wanted == self.loaded.dtype and target.type == here.type and target.index in (None, here.index)

    def put_back(self) -> None:
        """Take off a tuner, and what else a borrower may leave without changing what was read."""
        if self.tuner is not None:
            self.tuner.detach()
            self.tuner = None
        # The trainer turns the cache on when it is done, whatever it was.
        for config, cached in self.state.caches:
            if cached is not None:
                config.use_cache = cached
            elif hasattr(config, "use_cache"):
                del config.use_cache
        # What a forward pass noted on a module (Qwen-VL's last position deltas) is not there in a fresh model.
        for module, noted in self.state.notes:
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor) and value is not noted.get(name):
                    module.__dict__[name] = noted.get(name)


@dataclass(frozen=True, eq=False)
class _State:
    """What tells that a model is as it was loaded, without reading its weights.

    caches, notes: what is put back (a configuration and its `use_cache`; a module and its loose tensors).
    """

    caches: tuple[tuple[Any, Any], ...]
    notes: tuple[tuple[Any, Any], ...]
    facts: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and self.facts == other.facts


def _state(model: Any) -> _State:
    configs = [model.config, *(getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {}))]
    configs = [config for config in configs if config is not None]
    hooks = sum(
        sum(map(_is_foreign, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))
        + ("forward" in module.__dict__)
        for module in model.modules()
    )
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    facts = (
        tuple((name, t.data_ptr(), t._version, t.dtype, t.device, t.requires_grad) for name, t in tensors),
        tuple(name for name, _ in model.named_modules()),
        hooks,
        model.training,
        any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        tuple(getattr(config, "_attn_implementation", None) for config in configs),
        repr(model.generation_config),
    )
    notes = tuple(
        (module, {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)})
        for module in model.modules()
    )
    return _State(tuple((c, getattr(c, "use_cache", None)) for c in configs), notes, facts)


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is not transformers' own: a first forward pass leaves some that collect outputs when asked."""
    return not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("transformers.")


def _split(value: Checkpoint) -> tuple[Checkpoint, str | None]:
    """(the checkpoint without a tuner's folder on top, that folder)."""
    if value.adapters and is_tuner_folder(value.adapters[-1]):
        return Checkpoint(base=value.base, adapters=value.adapters[:-1]), value.adapters[-1]
    return value, None


def _stamp(value: Checkpoint) -> Any:
    """Size and time of every file of a checkpoint's folders: the same path may hold something else a phase later."""
    found = []
    for folder in map(Path, value.paths):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return found


def _under(below: LoadedModel, value: Checkpoint, adapters: tuple[str, ...]) -> LoadedModel:
    """The model of `below` with `adapters` merged into it, in place."""
    model, processor = below.model, below.processor
    if any(has_settings(locate(adapter)) for adapter in adapters):
        processor = read_processor(value.base, model.config, value.adapters)
    with quiet_transformers():
        for adapter in adapters:
            model = merge_adapter(model, adapter, base=value.base)
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(model=model, processor=processor, name=str(value), family=below.family, source=value)


_holder: _Holder | None = None


__all__ = ["held", "holding", "let_go", "load"]
