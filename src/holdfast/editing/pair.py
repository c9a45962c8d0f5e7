"""BEFORE and AFTER, opened and compared: do they descend from one model, and what of AFTER is a LoRA update?"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from holdfast.checkpoints.adapter import LoraAdapter, is_adapter
from holdfast.checkpoints.fingerprint import file_stamps, fingerprint
from holdfast.checkpoints.merged import MergedCheckpoint, locate, open_checkpoint
from holdfast.checkpoints.naming import normalised
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.checkpoints.tensor_file import EDITABLE_DTYPES
from holdfast.checkpoints.tied import is_resized
from holdfast.checkpoints.value import Checkpoint, Source, as_checkpoint
from holdfast.editing.descent import require_alike, require_shape
from holdfast.errors import CheckpointError

# What one save writes and another leaves out without a change of the model: a tied head, buffers that are recomputed.
_OPTIONAL = (("lm_head", "weight"), ("position_ids",), ("inv_freq",))


@dataclass
class Pair:
    """Two open checkpoints of one architecture.

    lora: AFTER's own adapter when AFTER is BEFORE plus one LoRA; `after` then is BEFORE with it merged.
    keys: key in `after` -> key in `before`, for every tensor that both have in one shape. only_after: those without
    one, and only_before: those of `before` that the result gets; no model of transformers has them. resized: ends of
    the vocabulary with another number of rows, (before, after). retyped: key in `after` -> (type before, after).
    """

    before: MergedCheckpoint
    after: MergedCheckpoint
    lora: LoraAdapter | None
    keys: dict[str, str] = field(default_factory=dict)
    only_after: list[str] = field(default_factory=list)
    only_before: list[str] = field(default_factory=list)
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)
    retyped: dict[str, tuple[str, str]] = field(default_factory=dict)
    _fingerprints: dict[str, list[str]] = field(default_factory=dict)

    def fingerprints(self) -> dict[str, list[str]]:
        """By content, for `before` and `after`: the base, then each adapter."""
        if not self._fingerprints:
            for side, checkpoint in (("before", self.before), ("after", self.after)):
                adapters = [fingerprint(adapter) for adapter in checkpoint.adapters]
                self._fingerprints[side] = [fingerprint(checkpoint.base), *adapters]
        return self._fingerprints

    def stamps(self) -> dict[str, dict[str, int]]:
        """Size and time of every file with weights, both sides."""
        sides = (("BEFORE", self.before), ("AFTER", self.after))
        return file_stamps({f"{side} {name}": path for side, c in sides for name, path in c.files().items()})

    def close(self) -> None:
        """Close both sides."""
        self.before.close()
        self.after.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def tuned_checkpoint(before: Source, after: Source) -> Checkpoint:
    """AFTER as a value: adapters alone go on BEFORE, and a model without a processor of its own gets BEFORE's.

    Raises: CheckpointError: AFTER is a full model and an adapter in one folder.
    """
    below, above = as_checkpoint(before), as_checkpoint(after)
    if is_adapter(above.base):
        return Checkpoint(base=below.base, adapters=(*below.adapters, above.base, *above.adapters))
    return above.lent(below.base)


def open_pair(before: Source, after: Source) -> Pair:
    """Open BEFORE and AFTER; AFTER may be a folder, a hub id, a checkpoint value, or adapter folders on BEFORE.

    Raises: CheckpointError: different models, shapes or types, BEFORE is an adapter, damaged files. AdapterError: an
        adapter that does not fit.
    """
    below, above = as_checkpoint(before), tuned_checkpoint(before, after)
    if is_adapter(below.base):
        raise CheckpointError(
            f"BEFORE ({before}) is an adapter; expected the full model that the update started from. Only AFTER may be "
            "an adapter."
        )
    opened = open_checkpoint(below)
    try:
        own = above.own_adapters(below) or ()
        if len(own) != 1:
            pair = Pair(opened, open_checkpoint(above), None)
        else:
            lora = LoraAdapter(locate(own[0]))
            # A second reader of the same files: each side closes its own.
            merged = MergedCheckpoint(CheckpointReader(opened.folder), [*opened.adapters, lora])
            pair = Pair(opened, merged, lora)
    except BaseException:
        opened.close()
        raise
    try:
        _match(pair)
    except BaseException:
        pair.close()
        raise
    return pair


def _match(pair: Pair) -> None:
    before, after = pair.before, pair.after
    if pair.lora is not None:
        pair.keys = {key: key for key in before.entries}
        return
    types = [reader.config().get("model_type") for reader in (before.base, after.base)]
    if types[0] != types[1]:
        raise CheckpointError(
            f"BEFORE ({before.folder}) is a {types[0]!r} model and AFTER ({after.folder}) a {types[1]!r} model; both "
            "must descend from one base model."
        )
    met = set()
    for key, entry in after.entries.items():
        name = before.names.find(key)
        if name is None:
            pair.only_after.append(key)
            continue
        met.add(name)
        old = before.entries[name]
        if old.shape != entry.shape and is_resized(key, entry.shape, old.shape):
            pair.resized[key] = (old.shape[0], entry.shape[0])
            continue
        _require_comparable(pair, key, name)
        pair.keys[key] = name
    missing = sorted(set(before.entries) - met)
    new, lost = ([key for key in found if not _optional(key)] for found in (pair.only_after, missing))
    if new or lost:
        built = _built(pair, [*new, *lost])
        new, lost = ([key for key in found if key in built] for found in (new, lost))
        pair.only_before = [key for key in missing if key not in built and not _optional(key)]
    if new:
        raise CheckpointError(
            f"AFTER ({after.folder}) has {new[0]} and BEFORE ({before.folder}) has not; both must descend from "
            "one base model. Pass as BEFORE the checkpoint this task was trained from."
        )
    if lost:
        raise CheckpointError(
            f"BEFORE ({before.folder}) has {lost[0]} and AFTER ({after.folder}) has not ({len(lost)} such tensor(s)); "
            "both must descend from one base model."
        )


def _require_comparable(pair: Pair, key: str, name: str) -> None:
    """Hold one tensor of AFTER against BEFORE's; where their floating types differ, BEFORE's is read in AFTER's.

    A tuning loads BEFORE in the type that it saves: only what comes after that rounding is its change.
    """
    entry, old = pair.after.entries[key], pair.before.entries[name]
    if old.dtype == entry.dtype or not {old.dtype, entry.dtype} <= set(EDITABLE_DTYPES):
        require_alike(
            key,
            before=(old.shape, old.dtype),
            after=(entry.shape, entry.dtype),
            remedy="Save both as floating-point weights (or pass the adapter itself as AFTER, which is exact).",
        )
        return
    require_shape(key, before=old.shape, after=entry.shape)
    pair.before.read_as[name] = entry.torch_dtype
    pair.retyped[key] = (old.dtype, entry.dtype)


def _built(pair: Pair, keys: Collection[str]) -> set[str]:
    """Those of `keys` that belong to the model as transformers builds it; the rest nothing loads (`mtp.*`, ...)."""
    from holdfast.models.built import built_keys

    shapes = {**_shapes(pair.before), **_shapes(pair.after)}
    return set(keys) & built_keys(pair.after.folder, shapes)


def _shapes(checkpoint: MergedCheckpoint) -> dict[str, tuple[int, ...]]:
    return {key: entry.shape for key, entry in checkpoint.entries.items()}


def _optional(key: str) -> bool:
    parts = normalised(key)
    return any(parts[-len(optional) :] == optional for optional in _OPTIONAL)
