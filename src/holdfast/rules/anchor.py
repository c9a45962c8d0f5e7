"""The anchored edit of one layer as the editor's rule, dense and in LoRA closed form: `functional.anchor` per layer.

The Gram matrices lie on disk (`checkpoints.gram_store`); a layer's are read when it is edited, and let go after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.config import encode
from holdfast.errors import CalibrationError, ConfigError
from holdfast.functional.anchor import AnchorFactor, AnchorGrams, AnchorStrength
from holdfast.functional.columns import measure_lora
from holdfast.rules.base import DenseEdit, Layer, LoraEdit, Needs, Rule

if TYPE_CHECKING:
    from holdfast.calibration.gram_sets import GramSets

# Factors that are kept for the layers that share an input: on disk, q, k and v have o between them.
_KEPT_FACTORS = 2


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Options of the anchored edit (docs/design/anchor.md).

    safety_weight, past_weight: mu_s and mu_p, how strongly the model before the task holds on safety inputs and on
        those of earlier tasks, against 1 for the task just learned. past_weight 0: nothing is kept for later tasks.
    damping: lam, in units of the mean diagonal of the task's Gram. Large values make the edit an interpolation.
    benign_share: weight of answers to benign requests in the safety Gram, 0..1, where there are any; null: by their
        tokens.
    depth_slope: mu_s of the first block is (1 + slope) times the weight and (1 - slope) times in the last; -1..1.
    """

    safety_weight: float = 1.0
    past_weight: float = 0.3
    damping: float = 0.03
    benign_share: float | None = None
    depth_slope: float = 0.0

    def __post_init__(self) -> None:
        for name in ("safety_weight", "past_weight", "damping"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value}; expected 0 or more.")
        if self.benign_share is not None and not 0 <= self.benign_share <= 1:
            raise ConfigError(f"benign_share is {self.benign_share}; expected 0..1, or null to weigh by tokens.")
        if not -1 <= self.depth_slope <= 1:
            raise ConfigError(f"depth_slope is {self.depth_slope}; expected -1..1.")

    def strength(self, block: int, block_count: int) -> AnchorStrength:
        """mu_s and mu_p of one block."""
        depth = block / (block_count - 1) if block_count > 1 else 0.5
        weight = self.safety_weight * (1 + self.depth_slope * (1 - 2 * depth))
        return AnchorStrength(safety_weight=weight, past_weight=self.past_weight)


@dataclass(frozen=True)
class AnchorRule(Rule):
    """W_hat = W_prev + D A (A + K)^-1; of an adapter, A_lora A (A + K)^-1 at the same rank, exactly.

    A row has change ||D|| and distance ||W_hat - W_prev||, tau (the mean diagonal of the task's Gram), safety_weight,
    and fallbacks where float32 did not do.
    """

    config: AnchorConfig
    grams: GramSets
    _factors: OrderedDict[tuple[Any, ...], AnchorFactor] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    Config = AnchorConfig
    name = "anchor"
    inputs = ("grams",)
    reads_base = False

    @property
    def needs(self) -> Needs:
        """What the rule must be given of a layer."""
        return "grams"

    def settings(self) -> Mapping[str, Any]:
        """Every option, and of each store of Gram matrices its digest."""
        return {**encode(self.config), "grams": self.grams.digests()}

    def layers(self) -> tuple[Mapping[str, int], int]:
        """The layers that have Gram matrices, with their blocks, and the number of blocks."""
        return self.grams.task.blocks, self.grams.task.block_count

    def check_models(self, fingerprints: Mapping[str, Sequence[str]]) -> None:
        """Refuse Gram matrices of other models than those that are edited.

        fingerprints: of `before` and `after`, the base's and then each adapter's. Grams of a live model have none.
        Raises: CalibrationError: the safety inputs are not BEFORE's, or the task's not AFTER's.
        """
        for name, store in self.grams.stores.items():
            side = {"task": "after", "safety": "before", "benign": "before"}.get(name)
            model = store.meta.get("model", {})
            if side is None or model.get("fingerprint") is None:
                continue
            found = [model["fingerprint"], *(a["fingerprint"] for a in model.get("adapters", ()))]
            if found != list(fingerprints[side]):
                raise CalibrationError(
                    f"The {name} Gram matrices ({store.folder}) are of another model: they were made with "
                    f"{model.get('name')} ({_short(found)}); {side.upper()} is {_short(fingerprints[side])}. Calibrate "
                    "again with BEFORE and AFTER, or allow it (--allow-other-calibration)."
                )

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """The anchored edit of one layer. w_prev, w_new: (r, c)."""
        factor = self._factor(layer, w_new)
        moved = factor.apply(w_new.float() - w_prev.float())
        row = {"change": _norm(w_new - w_prev), "distance": _norm(moved), **self._row(factor)}
        return DenseEdit(weight=moved.add_(w_prev).to(w_new.dtype), row=row)

    def edit_lora(
        self, layer: Layer, w_prev: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> LoraEdit:
        """The anchored edit of A. lora_a: (rank, c). lora_b: (r, rank). w_prev: (r, c) or None."""
        factor = self._factor(layer, lora_a)
        edited = factor.apply(lora_a.float()).to(lora_a.dtype)
        change, distance = (measure_lora(a, lora_b, scaling).norm for a in (lora_a, edited))
        return LoraEdit(lora_a=edited, row={"change": change, "distance": distance, **self._row(factor)})

    def _row(self, factor: AnchorFactor) -> dict[str, Any]:
        row: dict[str, Any] = {"tau": factor.grams.tau, "safety_weight": factor.strength.safety_weight}
        if factor.fallbacks:
            row["fallbacks"] = list(factor.fallbacks)
        return row

    def _factor(self, layer: Layer, like: Tensor) -> AnchorFactor:
        entry = self.grams.task.entry(layer.name)
        if entry.width != like.shape[1]:
            raise CalibrationError(
                f"The Gram matrices are of another model: they have {entry.width} input columns for {layer.name}, "
                f"whose weight has {like.shape[1]}. Calibrate with BEFORE and AFTER themselves."
            )
        strength = self.config.strength(layer.block, layer.block_count)
        key = (entry.leader, strength, like.device)
        if key not in self._factors:
            while len(self._factors) >= _KEPT_FACTORS:
                self._factors.popitem(last=False)
            self._factors[key] = self._read(layer, like.device).factor(strength)
        return self._factors[key]

    def _read(self, layer: Layer, device: torch.device) -> AnchorGrams:
        sets, name = self.grams, layer.name
        safety = sets.safety.gram(name).to(device)
        if sets.benign is not None:
            counts = sets.safety.entry(name).tokens, sets.benign.entry(name).tokens
            share = counts[1] / sum(counts) if self.config.benign_share is None else self.config.benign_share
            safety = safety.mul_(1 - share).add_(sets.benign.gram(name).to(device), alpha=share)
        past = sets.past.gram(name).to(device) if sets.past is not None and self.config.past_weight else None
        return AnchorGrams(sets.task.gram(name).to(device), safety, past, damping=self.config.damping)


def _short(fingerprints: Sequence[str]) -> str:
    return " + ".join(f"{value[:12]}..." for value in fingerprints)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


__all__ = ["AnchorConfig", "AnchorRule"]
