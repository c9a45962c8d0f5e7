"""Strengths of an edit on a live model, and the one that is taken, by the streaming editor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from holdfast.calibration.curvature import adapted_layers
from holdfast.calibration.gram_sets import GramSets, collect_grams
from holdfast.checkpoints.adapter import is_one_adapter
from holdfast.checkpoints.gram_store import GramStore, running_mean
from holdfast.checkpoints.naming import NameIndex
from holdfast.checkpoints.tensor_file import EDITABLE_DTYPES
from holdfast.checkpoints.value import as_checkpoint
from holdfast.data.types import Sample
from holdfast.editing.editor import edit_checkpoint
from holdfast.editing.pair import open_pair
from holdfast.editing.plan import Blocks, find_targets
from holdfast.errors import ConfigError, unknown_name
from holdfast.functional.columns import measure_change
from holdfast.models.loaded import LoadedModel
from holdfast.rules.anchor import AnchorConfig, AnchorRule
from holdfast.rules.base import EditRule
from holdfast.rules.interpolation import InterpolationRule
from holdfast.stream.protocol import Checkpoint

if TYPE_CHECKING:
    from holdfast.restore.restore_config import RestoreConfig

Progress = Callable[..., None]


def _anchor(strength: float, grams: GramSets, config: RestoreConfig) -> EditRule:
    """mu_s is the strength; with a past, mu_p keeps its ratio to it, so that 0 is the tuned model."""
    options = AnchorConfig(safety_weight=strength, past_weight=config.past_weight * strength, damping=config.damping)
    return AnchorRule(options, grams)


def _interpolation(strength: float, grams: GramSets, config: RestoreConfig) -> EditRule:
    """The share 1 / (1 + strength) of the change stays, as in the limit of the anchored edit."""
    return InterpolationRule(InterpolationRule.Config(factor=1 / (1 + strength)))


# rule -> (strength, Gram matrices, options) -> the rule at that strength.
FAMILIES: Mapping[str, Callable[[float, GramSets, RestoreConfig], EditRule]] = {
    "anchor": _anchor,
    "interpolation": _interpolation,
}


def family(name: str) -> Callable[[float, GramSets, RestoreConfig], EditRule]:
    """The rule `name` as a family of strengths. Raises UnknownNameError."""
    if name not in FAMILIES:
        raise unknown_name("rule with a strength to search", name, FAMILIES)
    return FAMILIES[name]


def require_change(before: str, after: str) -> None:
    """Raises ConfigError: AFTER is BEFORE, so there is nothing to restore. Reads until the first difference."""
    with open_pair(before, after) as pair:
        if pair.lora is not None:
            if pair.lora.dense or any(bool(pair.lora.read_factors(name)[1].any()) for name in pair.lora.modules):
                return
            what = f"the adapter {after} changes nothing (every B is zero)"
        else:
            for key, old_key in pair.keys.items():
                if pair.after.entries[key].dtype not in EDITABLE_DTYPES:
                    continue
                new, old = pair.after.read_float(key), pair.before.read_float(old_key)
                if measure_change(old.reshape(1, -1), new.reshape(1, -1)).norm > 0:
                    return
            if pair.resized:
                return
            what = f"AFTER ({after}) equals BEFORE ({before}) in every tensor"
    raise ConfigError(f"{what}: there is nothing to restore. Pass the tuned model as AFTER.")


def calibrate(
    before: str,
    tuned: Checkpoint,
    *,
    model: Callable[[Checkpoint], LoadedModel],
    folder: Path,
    samples: Mapping[str, Sequence[Sample]],
    past_stores: Sequence[Path] = (),
    batch_size: int = 16,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> GramSets:
    """Gram matrices into `folder`: of "safety", "benign" and "past" samples on BEFORE, of "task" samples on AFTER.

    model: loads a checkpoint, or hands out the one that is loaded. An empty set is left out. Of an adapter, only the
    layers that it changes are measured. memory_bytes: bound on what the process (or the GPU) holds meanwhile.
    """
    base = as_checkpoint(before)
    changed = adapted_layers(base, tuned)
    found: dict[str, GramStore] = {}
    # BEFORE first: it is loaded already.
    for name in ("safety", "benign", "past", "task"):
        if not samples.get(name):
            continue
        found[name] = collect_grams(
            model(tuned if name == "task" else base),
            samples[name],
            folder / name,
            batch_size=batch_size,
            memory_bytes=memory_bytes,
            changed=changed,
            progress=progress,
        )
    for number, path in enumerate(past_stores):
        kept = GramStore.open(path)
        found["past"] = running_mean(found.get("past"), kept, folder / f"past-{number}", {"of": kept.digest()})
    return GramSets(**found)


@dataclass(eq=False)
class Candidates:
    """AFTER in memory, edited at one strength after another; its weights are put back from the files each time."""

    before: str
    after: str
    grams: GramSets
    config: RestoreConfig
    load: Callable[[], LoadedModel]
    _at: float | None = field(default=None, init=False)

    @torch.no_grad()
    def model(self, strength: float) -> LoadedModel:
        """AFTER, edited at `strength`; the same object each time."""
        loaded = self.load()
        if self._at == strength:
            return loaded
        rule = family(self.config.rule)(strength, self.grams, self.config)
        store = self.grams.task
        modules: dict[str, Any] = dict(loaded.model.named_modules())
        names = NameIndex([name for name in modules if name], what=loaded.name)
        with open_pair(self.before, self.after) as pair:
            targets = find_targets(pair, Blocks(store.blocks, store.block_count), seed=self.config.seed)
            for target in targets:
                old = pair.before.read_float(target.before_key)
                new = pair.after.read_float(target.key)
                weight = modules[names.require(target.layer.name)].weight
                weight.copy_(rule.edit(target.layer, old, new).weight)
        self._at = strength
        return loaded


def export(
    before: str,
    after: str,
    strength: float,
    *,
    grams: GramSets,
    config: RestoreConfig,
    out: Path,
    safety: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """The edit at `strength` by the streaming editor, checked by its no-op guard, as the folder `out`."""
    rule = family(config.rule)(strength, grams, config)
    edit_checkpoint(
        before,
        after,
        rule=rule,
        out=out,
        export=config.export or ("adapter" if is_one_adapter(after) else "dense"),
        # The anchored edit of an adapter is an adapter; nothing is taken from the base.
        coefficient="drop",
        blocks=(grams.task.blocks, grams.task.block_count),
        seed=config.seed,
        safety=safety,
        progress=progress,
    )
