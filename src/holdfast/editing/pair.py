"""BEFORE and AFTER, opened and compared: do they descend from one model, and what of AFTER is a LoRA update?"""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.checkpoints.adapter import LoraAdapter, is_adapter
from holdfast.checkpoints.fingerprint import file_stamps, fingerprint
from holdfast.checkpoints.merged import MergedCheckpoint, locate, open_checkpoint
from holdfast.checkpoints.naming import normalised
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.checkpoints.value import Source, as_checkpoint
from holdfast.editing.descent import require_alike
from holdfast.errors import CheckpointError

# What one save writes and another leaves out without a change of the model: a tied head, buffers that are recomputed.
_OPTIONAL = (("lm_head", "weight"), ("position_ids",), ("inv_freq",))


@dataclass
class Pair:
    """Two open checkpoints of one architecture.

    lora: AFTER's own adapter when AFTER is BEFORE plus one LoRA; `after` then is BEFORE with it merged.
    keys: key in `after` -> key in `before`, for every tensor that both have. only_after: optional tensors without one.
    """

    before: MergedCheckpoint
    after: MergedCheckpoint
    lora: LoraAdapter | None
    keys: dict[str, str] = field(default_factory=dict)
    only_after: list[str] = field(default_factory=list)
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


def open_pair(before: Source, after: Source) -> Pair:
    """Open BEFORE and AFTER; AFTER may be a folder, a hub id, a checkpoint value, or an adapter folder on BEFORE.

    Raises: CheckpointError: different models, shapes or types, BEFORE is an adapter, damaged files. AdapterError: an
        adapter that does not fit.
    """
    below, above = as_checkpoint(before), as_checkpoint(after)
    if not below.adapters and is_adapter(below.base):
        raise CheckpointError(
            f"BEFORE ({before}) is an adapter; expected the full model that the update started from. Only AFTER may be "
            "an adapter."
        )
    opened = open_checkpoint(below)
    try:
        if not above.adapters and is_adapter(above.base):
            above = below.under(above.base)
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
    for key, entry in after.entries.items():
        name = before.names.find(key)
        if name is None:
            if not _optional(key):
                raise CheckpointError(
                    f"AFTER ({after.folder}) has {key} and BEFORE ({before.folder}) has not; both must descend from "
                    "one base model. Pass as BEFORE the checkpoint this task was trained from."
                )
            pair.only_after.append(key)
            continue
        old = before.entries[name]
        require_alike(
            key,
            before=(old.shape, old.dtype),
            after=(entry.shape, entry.dtype),
            remedy="Save both in one type (or pass the adapter itself as AFTER, which is exact).",
        )
        pair.keys[key] = name
    missing = sorted(set(before.entries) - set(pair.keys.values()))
    lost = [key for key in missing if not _optional(key)]
    if lost:
        raise CheckpointError(
            f"BEFORE ({before.folder}) has {lost[0]} and AFTER ({after.folder}) has not ({len(lost)} such tensor(s)); "
            "both must descend from one base model."
        )


def _optional(key: str) -> bool:
    parts = normalised(key)
    return any(parts[-len(optional) :] == optional for optional in _OPTIONAL)
