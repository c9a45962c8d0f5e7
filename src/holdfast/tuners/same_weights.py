"""Whether weights are those that were there when a router was made, from a few values of each that it keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from holdfast.errors import AdapterError
from holdfast.models.families import decoder_blocks
from holdfast.models.loaded import LoadedModel

PROBED_VALUES = 16


def probe(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A few values of each weight, in its own dtype, on the CPU.

    weights: of any shape. Each result is (n,), n values spread evenly over the flattened weight.
    """
    found = {}
    for name, weight in weights.items():
        flat = weight.detach().reshape(-1)
        # Integers: in float32 the places of a weight of more than 2^24 values would be off, even out of bounds.
        steps = torch.arange(PROBED_VALUES, device=flat.device)
        index = steps * (flat.numel() - 1) // (PROBED_VALUES - 1)
        found[name] = flat[index].cpu()
    return found


def compare_probe(
    stored: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    what: str,
    remedy: str,
    *,
    places: Collection[str] = (),
) -> None:
    """Raises AdapterError unless every weight that both sides hold as numbers is the same weight.

    Judged weight by weight: one tuned matrix among hundreds is another base.

    stored: name -> (n,) values, as `probe` takes them. weights: name -> weight of any shape.
    places: modules that may hold their weights quantised now, without values to compare.
    """
    found = probe(weights)
    if lost := sorted(name for name in stored if name not in found and name.rpartition(".")[0] not in places):
        raise AdapterError(f"{what}: there is no {lost[0]} here. {remedy}")
    common = sorted(set(stored) & set(found))
    if not common:
        raise AdapterError(f"{what}, or both hold all weights quantised, so nothing says that they are one. {remedy}")
    if other := [name for name in common if not _same_values(stored[name], found[name])]:
        raise AdapterError(
            f"{what}: {len(other)} of {len(common)} weights have other values, {other[0]} first. {remedy}"
        )


def _same_values(stored: Tensor, found: Tensor) -> bool:
    """Whether probed values are those of one weight: bit for bit in one dtype; in two, each rounds from one number."""
    if stored.dtype == found.dtype:
        return bool((stored == found).all())
    # Not a cast to the coarser dtype: neither of bf16 and fp16 is that everywhere, and fp32 -> fp16 -> bf16 may round
    # twice.
    allowed = _half_step(stored) + _half_step(found)
    return bool(((stored.double() - found.double()).abs() <= allowed).all())


def _half_step(values: Tensor) -> Tensor:
    """Half the distance between neighbours at each value: how far what was rounded to it can have been, float64."""
    kind = torch.finfo(values.dtype)
    size = values.double().abs().clamp_min(kind.smallest_normal)
    # size / mantissa is the next power of two above, exactly; from half of it on, neighbours are eps / 2 of it apart.
    return size / torch.frexp(size).mantissa * (kind.eps / 4)


def block_weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """Every weight of the decoder blocks that is held as numbers: what experts were corrections to.

    Names as in the model; shapes as there, (out, in) for a linear.
    """
    return {
        f"{prefix}.{name}": parameter
        for prefix, block in decoder_blocks(loaded.model)  # type: ignore[arg-type]
        for name, parameter in block.named_parameters()
        if parameter.is_floating_point() and parameter.element_size() >= 2
    }


def head_weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """The output embeddings (vocabulary, hidden), where they are held as numbers: a guard reads through them."""
    weight = loaded.model.get_output_embeddings().weight  # type: ignore[operator, union-attr]
    return {"output": weight} if weight.is_floating_point() and weight.element_size() >= 2 else {}
