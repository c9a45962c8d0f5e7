"""What the training loop sees of CRAM: the model's forward pass, the trained factors' parameters and nothing else.

One class serves both phases: in the warm-up the trained factors are the buffer, in the stable phase the new expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.data.types import Sample
from holdfast.errors import AdapterError, DataError
from holdfast.functional.cram import column_basis, orthogonality_penalty, row_basis
from holdfast.models.families import decoder_blocks
from holdfast.models.trained_state import TrainedState
from holdfast.tuners.cram.folder import base_for_peft, save_expert
from holdfast.tuners.cram.layer import ExpertPass
from holdfast.tuners.cram.model import Cram, Factors
from holdfast.tuners.cram.router import ExpertCard, Features, mix

CENTROID = "centroid.safetensors"
# Names under which a batch carries the features of its samples.
FEATURES = ("cram_text", "cram_image", "cram_has_image")


def buffer_factors(cram: Cram, *, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The warm-up buffer: A Kaiming-uniform as in PEFT, B = 0, rank R for every adapted linear.

    Returns: linear name -> A (R, in), B (out, R), fp32 on the CPU. Source: the initial factors of PEFT's LoRA.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = cram.config.buffer_rank
    factors = {}
    for p in cram.layers:
        bound = 1 / math.sqrt(p.in_features)
        a = torch.empty(rank, p.in_features).uniform_(-bound, bound, generator=generator)
        factors[p.name] = (a, torch.zeros(p.out_features, rank))
    return factors


class CramTraining(TrainedState):
    """The model with trained factors in it. `unload` takes them and CRAM off again.

    card: of the task being learned; its group is settled. stable: False in the warm-up.
    Only the trained factors (and a learned centroid) require gradients, appear in `state_dict`, and are saved.
    """

    def __init__(self, cram: Cram, factors: Factors, card: ExpertCard, *, stable: bool) -> None:
        super().__init__()
        self.model = cram.loaded.model
        self.stable, self.card = stable, card
        self._cram = [cram]  # in a list: it is the model's submodule already
        self.old = cram.router.members(card.group)
        self.config = self.model.config
        config = cram.config
        self.model.requires_grad_(False)
        for p in cram.layers:
            a, b = factors[p.name]
            device = p.stacked_a.device
            p.train_factors(a.to(device), b.to(device), config.dropout, config.released.forward_factor)
        self.centroid: nn.Parameter | None = None
        if stable and config.released.learn_centroid and card.image_centroid is not None:
            sets = len(decoder_blocks(self.model)) if config.released.centroid_per_block else 1
            self.centroid = nn.Parameter(card.image_centroid.expand(sets, -1).clone().to(cram.loaded.device))
        self.router = cram.router.adding(self._placed())
        cram.pack(sets=max(self.router.sets, 1))
        self.bases = self._old_bases() if stable and config.penalty > 0 and self.old else {}
        self._old_mass: Tensor | None = None

    @property
    def cram(self) -> Cram:
        """The tuner that is trained; held in a list, so that its modules are not registered here a second time."""
        return self._cram[0]

    def _placed(self) -> ExpertCard:
        if self.centroid is None:
            return self.card
        return replace(self.card, image_centroid=self.centroid.detach().cpu())

    def _old_bases(self) -> dict[str, Tensor]:
        """Per linear, an orthonormal basis of what the group's experts write; made once, they are frozen."""
        cram, bases = self.cram, {}
        for p in cram.layers:
            pairs = [cram.experts[i][p.name] for i in self.old if p.name in cram.experts[i]]
            if cram.config.released.penalty_space == "output":
                basis = column_basis([b for _, b in pairs], p.out_features)
            elif p.in_features == p.out_features:
                basis = row_basis([a for a, _ in pairs], p.in_features)
            else:
                continue
            bases[p.name] = basis.to(p.stacked_a.device)
        if not bases:
            raise AdapterError(
                "penalty_space is 'input', which compares outputs with input directions, but no adapted linear is "
                "square. Use penalty_space 'output'."
            )
        return bases

    # Forward and loss

    def forward(self, **inputs: Any) -> Any:
        """The model's forward pass on a batch that carries its samples' features (`BatchFeatures`).

        Raises: DataError: the batch carries no features.
        """
        text, image, has_image = (inputs.pop(name, None) for name in FEATURES)
        if text is None:
            raise DataError("The batch carries no CRAM features; encode it through `BatchFeatures`.")
        self._route(Features(text=text, image=image, has_image=has_image), inputs)
        return self.model(**inputs)

    def _route(self, features: Features, inputs: Mapping[str, Tensor]) -> None:
        cram, count = self.cram, len(features)
        history = cram.config.released.warmup_history == "routed"
        if not self.stable and not (history and self.old):
            cram.active.set("routed")
            return
        experts = len(self.router)
        member = torch.zeros(experts, dtype=torch.bool, device=features.text.device)
        member[self.old] = True
        if self.stable:
            member[-1] = True
        packed = self.router.pack(features.text.device)
        if self.centroid is not None:
            image = torch.cat([packed.image[:, :-1], self.centroid.unsqueeze(1)], dim=1)
            packed = replace(packed, image=image)
        sigma = packed.sigma[self.card.group].expand(count)
        weights = mix(features, member.expand(count, -1), sigma, packed, cram.config.reuse)
        self._old_mass = weights[..., :-1].sum(-1).mean(1)
        pool = _pool(cram, inputs) if self.bases else None
        cram.activate(weights[..., :-1], weights[..., -1] if self.stable else None, pool)

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor:
        """lambda * mean over linears of `mean_b gamma_b ||Q^T z_b||^2` for the forward pass just made.

        Q: (out, k), orthonormal. z_b: (out,) per token of request b. gamma_b in 0..1: mass on the older experts.
        Returns: a scalar, ().
        """
        del model, inputs, outputs
        terms = []
        for p in self.cram.layers:
            basis = self.bases.get(p.name)
            if basis is not None:
                terms.append(_penalty_of(p, basis, self._old_mass))
        if not terms:
            return torch.zeros((), device=self.cram.loaded.device)
        return self.cram.config.penalty * torch.stack([t.to(terms[0].device) for t in terms]).mean()

    # What the loop and the trainer's checkpoints hold

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The trained factors, fp32 on the CPU, B with the factor of every forward pass in it.

        Under FSDP2 every process must ask: shards are gathered.

        Returns: linear name -> A (rank, in), B (out, rank).
        """
        found = {}
        for p in self.cram.layers:
            assert p.trained_a is not None and p.trained_b is not None
            found[p.name] = (_whole(p.trained_a), _whole(p.trained_b) * p.factor)
        return found

    def trained(self) -> dict[str, nn.Parameter]:
        """A (rank, in) and B (out, rank) of the new expert, and a centroid where one is learned."""
        found: dict[str, nn.Parameter] = {}
        for p in self.cram.layers:
            assert p.trained_a is not None and p.trained_b is not None
            found[f"{p.name}.lora_A"], found[f"{p.name}.lora_B"] = p.trained_a, p.trained_b
        if self.centroid is not None:
            found[CENTROID.removesuffix(".safetensors")] = self.centroid
        return found

    def save_pretrained(self, folder: str) -> None:
        """The trained factors as a PEFT folder, and a learned centroid beside them."""
        save_expert(Path(folder), self.factors(), **base_for_peft(self.cram.loaded))
        if self.centroid is not None:
            save_file({"image_centroid": _whole(self.centroid)}, Path(folder) / CENTROID)

    def unload(self) -> nn.Module:
        """Drop the trained factors and take CRAM off the model."""
        for p in self.cram.layers:
            p.drop_factors()
        self.cram.detach()
        return self.model


def _whole(parameter: nn.Parameter) -> Tensor:
    """fp32 on the CPU, gathered where FSDP2 holds a shard (a DTensor)."""
    value = parameter.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).float().cpu()


def learned_centroid(folder: Path) -> Tensor | None:
    """The centroid (S, d_image) that was trained with an expert, or None."""
    path = folder / CENTROID
    return load_file(path)["image_centroid"] if path.is_file() else None


class BatchFeatures:
    """Looks up what the encoder saw of a batch's samples, so that training never encodes a sample twice."""

    def __init__(self, samples: Sequence[Sample], features: Features) -> None:
        self._rows = {_key(sample): row for row, sample in enumerate(samples)}
        self._features = features

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Tensors that travel with the batch, by the names that `CramTraining.forward` takes."""
        rows = torch.tensor([self._rows[_key(s)] for s in samples])
        picked = self._features[rows]
        return dict(zip(FEATURES, (picked.text, picked.image, picked.has_image), strict=True))


def _key(sample: Sample) -> tuple[Any, ...]:
    # Not the id alone: data sets repeat ids, and not the object, which a loader's worker copies.
    return sample.id, sample.turns, sample.images


def _penalty_of(p: ExpertPass, basis: Tensor, old_mass: Tensor | None) -> Tensor:
    assert p.input_mean is not None and p.trained_a is not None and p.trained_b is not None and old_mass is not None
    # Q^T B first: (k, r), so nothing of width `out` is made per sample.
    inner = p.input_mean.to(p.trained_a.dtype) @ p.trained_a.T * p.factor
    return orthogonality_penalty(inner, p.trained_b.T @ basis.to(p.trained_b.dtype), old_mass.detach().to(inner))


def _pool(cram: Cram, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, T) weights of a mean over image tokens, or over all real tokens where a sample has no image."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    image = torch.isin(ids, torch.tensor(sorted(cram.loaded.image_token_ids), device=ids.device))
    chosen = torch.where(image.any(1, keepdim=True), image, real).float()
    return chosen / chosen.sum(1, keepdim=True).clamp_min(1)
