"""Experts folded into one ordinary LoRA: exact for one expert, a mean with a measured drift for several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from holdfast.data.types import Sample
from holdfast.errors import AdapterError, DataError, unknown_name
from holdfast.models.encode import encode_request
from holdfast.tuners.cram.folder import base_for_peft, load_expert, save_expert
from holdfast.tuners.cram.model import Cram, Factors


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far the merged model is from the routed one, on requests, at the first answer token.

    kl: mean KL(routed || merged) in nats. agreement: share of requests with the same most likely token, 0..1.
    """

    requests: int
    kl: float
    agreement: float


def mean_mass(cram: Cram, samples: Sequence[Sample]) -> dict[str, float]:
    """Mean routing weight of each expert over requests. What abstains counts for the base: the sum may be below 1.

    Raises: DataError: no request.
    """
    if not samples:
        raise DataError("There is no request to take routing weights from; expected at least one.")
    weights = cram.route(samples).weights.mean((0, 1))
    return {card.name: float(w) for card, w in zip(cram.router.experts, weights, strict=True)}


def merged_factors(cram: Cram, mass: Mapping[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
    """`sum_e mass_e B_e A_e` as one pair of factors per linear: B's side by side, A's stacked, A scaled by the mass.

    Raises: UnknownNameError: an expert that is not there. AdapterError: no expert with a weight.

    Returns: linear name -> A (sum of ranks, in), B (out, sum of ranks).
    """
    names = [card.name for card in cram.router.experts]
    for name in mass:
        if name not in names:
            raise unknown_name("expert", name, names)
    chosen = [(cram.experts[names.index(n)], w) for n, w in mass.items() if w != 0]
    if not chosen:
        raise AdapterError("No expert has a weight, so the merge would be the base itself. Name at least one expert.")
    merged = {}
    for p in cram.layers:
        pairs = [(expert[p.name], weight) for expert, weight in chosen if p.name in expert]
        if pairs:
            a = torch.cat([a if weight == 1 else a * weight for (a, _), weight in pairs])
            merged[p.name] = (a, torch.cat([b for (_, b), _ in pairs], dim=1))
    return merged


def quantised(weights: Mapping[str, float], steps: int) -> dict[str, float]:
    """Shares as multiples of 1 / steps that sum to 1, the nearest ones; experts without a share are left out.

    Raises: ValueError: no share at all.
    """
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"the shares {dict(weights)} sum to {total}; expected more than 0")
    exact = {name: weight / total * steps for name, weight in weights.items()}
    whole = {name: int(value) for name, value in exact.items()}
    # What is left goes to the largest remainders; a tie to the name that comes first.
    by_rest = sorted(exact, key=lambda name: (whole[name] - exact[name], name))
    for name in by_rest[: steps - sum(whole.values())]:
        whole[name] += 1
    return {name: count / steps for name, count in whole.items() if count}


def mixture_of_folders(folders: Mapping[str, Path], weights: Mapping[str, float]) -> Factors:
    """The factors of a constant mixture of expert folders, without a model: A (sum of ranks, in), B (out, the same).

    Raises: as `folder.load_expert`.
    """
    chosen = [(load_expert(folders[name]), weight) for name, weight in weights.items() if weight]
    merged = {}
    for name in dict.fromkeys(name for expert, _ in chosen for name in expert):
        pairs = [(expert[name], weight) for expert, weight in chosen if name in expert]
        a = torch.cat([a * weight for (a, _), weight in pairs])
        merged[name] = (a, torch.cat([b for (_, b), _ in pairs], dim=1))
    return merged


def save_nothing(folder: Path, like: Path, *, base: str) -> None:
    """A LoRA that changes nothing, on the linears of the expert folder `like`: the base, for servers that need a name.

    Raises: as `folder.load_expert` and `save_expert`.
    """
    factors = load_expert(like)
    zeros = {name: (torch.zeros(1, a.shape[1]), torch.zeros(b.shape[0], 1)) for name, (a, b) in factors.items()}
    save_expert(folder, zeros, base=base)


def export_merged(
    cram: Cram, mass: Mapping[str, float], folder: Path, *, record: Mapping[str, Any] | None = None
) -> Factors:
    """Write the merge as a stock PEFT LoRA folder; any tool can merge that into the base's weights.

    record: plain data kept beside it as merge.json.
    """
    factors = merged_factors(cram, mass)
    save_expert(folder, factors, **base_for_peft(cram.loaded), beside={"merge.json": dict(record)} if record else None)
    return factors


@torch.no_grad()
def drift(cram: Cram, mass: Mapping[str, float], samples: Sequence[Sample], *, batch_size: int = 8) -> Drift:
    """Compare routed answers with those under the constant weights `mass`, which is what the merged model computes.

    Raises: DataError: no request. UnknownNameError: an expert that is not there.
    """
    if not samples:
        raise DataError("There is no request to measure the drift on; expected at least one.")
    divergence, same = 0.0, 0
    for batch in _batches(samples, batch_size):
        inputs = {k: v.to(cram.loaded.device) for k, v in encode_request(cram.loaded, batch).items()}
        with cram.serving(batch):
            routed = F.log_softmax(cram.loaded.model(**inputs).logits[:, -1].float(), dim=-1)
        with cram.forced(mass):
            merged = F.log_softmax(cram.loaded.model(**inputs).logits[:, -1].float(), dim=-1)
        divergence += float(F.kl_div(merged, routed, log_target=True, reduction="sum"))
        same += int((routed.argmax(-1) == merged.argmax(-1)).sum())
    return Drift(requests=len(samples), kl=divergence / len(samples), agreement=same / len(samples))


def _batches(samples: Sequence[Sample], size: int) -> Iterable[list[Sample]]:
    for start in range(0, len(samples), size):
        yield list(samples[start : start + size])
