"""Which experts answer a request: groups by instruction, experts by image, abstention by floors. Per sample always."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import AdapterError, DataError
from holdfast.functional.cram import (
    GroupDecision,
    best_group,
    claims,
    cosine_similarity,
    decide_group,
    expert_index,
    routing_weights,
)
from holdfast.tuners.cram.cram_config import CramConfig

# Differences to all centroids, (rows, sets, experts, width), are the largest thing that routing makes. Small parts are
# faster, too: they stay in the cache.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the encoder saw of n requests: text (n, d_text), image (n, d_image), has_image (n,)."""

    text: Tensor
    image: Tensor
    has_image: Tensor

    def checked(self) -> Features:
        """Itself. Raises DataError: a value that is not finite. Waits for the device: never inside a forward pass."""
        for name, value in (("instruction", self.text), ("image", self.image)):
            if not bool(torch.isfinite(value).all()):
                raise DataError(f"An {name} feature is NaN or inf; the encoder or an image file is damaged.")
        return self

    def to(self, device: torch.device) -> Features:
        """The same features on `device`."""
        return Features(text=self.text.to(device), image=self.image.to(device), has_image=self.has_image.to(device))

    def __len__(self) -> int:
        return self.text.shape[0]

    def __getitem__(self, rows: Tensor) -> Features:
        return Features(text=self.text[rows], image=self.image[rows], has_image=self.has_image[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertCard:
    """What the router keeps of one task's expert. Fixed once the task is learned.

    text_centroid (d_text,): mean instruction vector. image_centroid (S, d_image), S = 1 or the number of blocks; None
        for a task without images. image_scatter, text_scatter: median distance of its samples to the centroid.
    text_floor: a cosine, image_radius: a distance; beyond them a request is unlike this task. None: no floor.
    ranks: linear name -> rank.
    """

    name: str
    group: int
    samples: int
    images: int
    text_centroid: Tensor
    text_scatter: float
    image_centroid: Tensor | None
    image_scatter: float | None
    text_floor: float | None
    image_radius: float | None
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label, value in (("text", self.text_centroid), ("image", self.image_centroid)):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise AdapterError(
                    f"Expert {self.name!r}: its {label} centroid holds NaN or inf, so every distance to it would be "
                    "NaN. The router file is damaged; restore it or learn the task again."
                )
        for label in ("text_scatter", "image_scatter", "text_floor", "image_radius"):
            value = getattr(self, label)
            if value is not None and not (math.isfinite(value) and (label == "text_floor" or value >= 0)):
                raise AdapterError(
                    f"Expert {self.name!r}: its {label} is {value}; expected a finite number"
                    f"{'' if label == 'text_floor' else ', 0 or more'}. The router file is damaged; restore it or "
                    "learn the task again."
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The decision for n requests. weights (n, S, E) sum to 1 over E, or to 0 where the base answers alone.

    guarded (n,): the guard sent the request to the base alone, guard_score (n,) at or above its threshold; None where
    no guard was asked.
    """

    weights: Tensor
    group: Tensor  # (n,) chosen group
    similarity: Tensor  # (n, G) cosine with each group's prototype
    abstained: Tensor  # (n,)
    guarded: Tensor | None = None
    guard_score: Tensor | None = None

    def under(self, guarded: Tensor, score: Tensor) -> Routing:
        """The decision with that of the guard laid over it. guarded, score: of each request, (requests,)."""
        guarded, score = guarded.to(self.weights.device), score.to(self.weights.device)
        weights = self.weights.masked_fill(guarded[:, None, None], 0.0)
        return replace(self, weights=weights, guarded=guarded, guard_score=score)


class Router:
    """Experts in the order they were learned, in groups. A value: adding an expert makes another router."""

    def __init__(self, config: CramConfig, experts: Sequence[ExpertCard] = ()) -> None:
        self.config, self.experts = config, tuple(experts)
        names = [e.name for e in self.experts]
        if len(set(names)) < len(names):
            raise AdapterError(f"Two experts have one name among {', '.join(names)}; task names must differ.")
        self.group_count = 1 + max((e.group for e in self.experts), default=-1)
        self._packed: PackedRouter | None = None

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def sets(self) -> int:
        """Image centroids per expert: 1, or one per decoder block."""
        return max((c.image_centroid.shape[0] for c in self.experts if c.image_centroid is not None), default=1)

    def adding(self, card: ExpertCard) -> Router:
        """A router that knows one more expert."""
        return Router(self.config, (*self.experts, card))

    def members(self, group: int) -> list[int]:
        """Indices of a group's experts."""
        return [i for i, e in enumerate(self.experts) if e.group == group]

    def group_name(self, group: int) -> str:
        """A group is called after its first task."""
        return self.experts[self.members(group)[0]].name

    def prototypes(self) -> Tensor:
        """(G, d_text): the mean instruction vector of each group's tasks, weighted by their samples."""
        rows = []
        for group in range(self.group_count):
            cards = [self.experts[i] for i in self.members(group)]
            total = sum(c.samples for c in cards)
            rows.append(torch.stack([c.text_centroid * (c.samples / total) for c in cards]).sum(0))
        return torch.stack(rows)

    def decide(self, text: Tensor) -> GroupDecision:
        """Level 1 for a new task, from all instruction vectors (n, d_text) of it."""
        similarities = (
            cosine_similarity(text.mean(0, keepdim=True), self.prototypes())[0].tolist() if self.experts else []
        )
        config = self.config
        return decide_group(
            similarities,
            join_cosine=config.join_cosine,
            margin=config.join_margin,
            floor=config.join_floor,
            max_groups=config.released.max_groups,
        )

    def route(self, features: Features) -> Routing:
        """The decision for each request, on the device of `features`; no host synchronisation."""
        rows = torch.arange(len(features), device=features.text.device).split(_ROWS_AT_ONCE)
        if len(rows) <= 1:
            return self._route(features)
        parts = [self._route(features[some]) for some in rows]
        made = [name for name, value in vars(parts[0]).items() if value is not None]
        return Routing(**{name: torch.cat([getattr(part, name) for part in parts]) for name in made})

    def _route(self, features: Features) -> Routing:
        packed = self.pack(features.text.device)
        similarity = cosine_similarity(features.text, packed.prototypes)
        group = best_group(similarity)
        members = packed.members[group]
        abstained = torch.zeros_like(group, dtype=torch.bool)
        if self.config.abstain != "off":
            abstained = ~claims(cosine_similarity(features.text, packed.text), packed.text_floor, members)
        if self.config.abstain == "both":
            near = (features.image.unsqueeze(1) - packed.image.mean(0)).norm(dim=-1) <= packed.image_radius
            abstained |= features.has_image & ~(near & members).any(-1)
        weights = self.weights(features, members & ~abstained.unsqueeze(-1), packed.sigma[group])
        return Routing(weights=weights, group=group, similarity=similarity, abstained=abstained)

    def weights(self, features: Features, members: Tensor, sigma: Tensor) -> Tensor:
        """pi (n, S, E) over `members` (n, E): by image where there is one, else by instruction."""
        return mix(features, members, sigma, self.pack(features.text.device), self.config.reuse)

    def sigma_of(self, group: int, extra: Sequence[ExpertCard] = ()) -> float:
        """Width of a group's routing softmax: configured, or from its experts' scatter."""
        if self.config.sigma is not None:
            return self.config.sigma
        cards = [e for e in (*self.experts, *extra) if e.group == group]
        scatter = [c.image_scatter for c in cards if c.image_scatter is not None]
        return self.config.sigma_scale * sum(scatter) / len(scatter) if scatter else 0.0

    def text_sigma_of(self, card: ExpertCard) -> float:
        """Width of the routing softmax over instruction vectors, for requests without an image."""
        return self.config.sigma_scale * card.text_scatter

    def row_index(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Linear name -> the expert of each of its stacked rows.

        Returns: linear name -> (R,) int64, R the ranks of all experts together.
        """
        return {name: expert_index([e.ranks.get(name, 0) for e in self.experts]) for name in names}

    def pack(self, device: torch.device) -> PackedRouter:
        """The router's tensors on a device. Raises AdapterError: there is no expert."""
        if not self.experts:
            raise AdapterError("The router has no expert yet; learn a task before asking it.")
        if self._packed is None or self._packed.text.device != device:
            # The first request may come under inference_mode, whose tensors no later training step may touch.
            with torch.inference_mode(False):
                self._packed = PackedRouter.of(self, device)
        return self._packed


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRouter:
    """A router's tensors, stacked over experts."""

    prototypes: Tensor  # (G, d_text)
    members: Tensor  # (G, E)
    text: Tensor  # (E, d_text)
    image: Tensor  # (S, E, d_image)
    pictured: Tensor  # (E,) has an image centroid
    sigma: Tensor  # (G,)
    text_sigma: Tensor  # (E,)
    text_floor: Tensor  # (E,)
    image_radius: Tensor  # (E,)

    @classmethod
    def of(cls, router: Router, device: torch.device) -> PackedRouter:
        """All cards of `router` as tensors on `device`, G groups and E experts."""
        cards = router.experts
        pictured = [c for c in cards if c.image_centroid is not None]
        width = next((c.image_centroid.shape[-1] for c in pictured if c.image_centroid is not None), 1)
        image = torch.zeros(router.sets, len(cards), width)
        for i, card in enumerate(cards):
            if card.image_centroid is not None:
                image[:, i] = card.image_centroid
        groups = range(router.group_count)
        packed = cls(
            prototypes=router.prototypes(),
            members=torch.tensor([[c.group == g for c in cards] for g in groups]),
            text=torch.stack([c.text_centroid for c in cards]),
            image=image,
            pictured=torch.tensor([c.image_centroid is not None for c in cards]),
            sigma=torch.tensor([router.sigma_of(g) for g in groups]),
            text_sigma=torch.tensor([router.text_sigma_of(c) for c in cards]),
            text_floor=torch.tensor([-math.inf if c.text_floor is None else c.text_floor for c in cards]),
            image_radius=torch.tensor([math.inf if c.image_radius is None else c.image_radius for c in cards]),
        )
        return replace(packed, **{k: v.to(device) for k, v in vars(packed).items()})


def mix(features: Features, members: Tensor, sigma: Tensor, packed: PackedRouter, reuse: bool) -> Tensor:
    """pi (n, S, E): members with an image centroid compete for a request with an image, all members for one without.

    A request with an image in a group whose tasks had none is routed by its instruction. sigma (n,): of each request's
    group. reuse: False gives all weight to the nearest.
    """
    by_image = members & packed.pictured
    use_image = features.has_image & by_image.any(-1)
    width = (members * packed.text_sigma).sum(-1) / members.sum(-1).clamp_min(1)
    if not reuse:
        sigma, width = torch.zeros_like(sigma), torch.zeros_like(width)
    seen = routing_weights(features.image, packed.image, sigma, by_image)  # (n, S, E)
    told = routing_weights(features.text, packed.text, width, members).unsqueeze(1).expand_as(seen)
    return torch.where(use_image[:, None, None], seen, told)


def card_from_features(
    name: str, group: int, features: Features, config: CramConfig, *, seed: int
) -> tuple[ExpertCard, Tensor]:
    """The card of a new task from the features of its training samples, and which rows were held out for the floors.

    Raises: DataError: no sample.
    features: of n samples. The second result is (n,) bool.
    """
    count = len(features)
    if count == 0:
        raise DataError(f"Task {name!r} has no training sample to place its expert by.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(count, dtype=torch.bool)
    held[order[: math.floor(config.held_out * count)]] = True
    kept, aside = features[~held], features[held]
    text = kept.text.mean(0)
    pictures = kept.image[kept.has_image]
    floor = None
    # Whatever `abstain` says now: it only decides which of them a request is asked, and may be changed in router.json.
    # Two held-out samples are the least that say anything about spread; a smaller task never abstains.
    if len(aside) >= 2:
        cosines = cosine_similarity(aside.text, text.unsqueeze(0))[:, 0]
        floor = float(cosines.quantile(config.abstain_quantile)) - config.abstain_slack
    card = ExpertCard(
        name=name,
        group=group,
        samples=len(kept),
        images=len(pictures),
        text_centroid=text,
        text_scatter=float((kept.text - text).norm(dim=-1).median()),
        image_centroid=None,
        image_scatter=None,
        text_floor=floor,
        image_radius=None,
    )
    return (placed(card, pictures.mean(0, keepdim=True), features, held, config) if len(pictures) else card), held


def placed(card: ExpertCard, centroid: Tensor, features: Features, held: Tensor, config: CramConfig) -> ExpertCard:
    """The card with its expert at the image centroid (S, d_image): scatter and radius are distances to that place.

    features, held: of the task's training samples (some with an image), and which rows are held out.
    """
    place = centroid.mean(0)

    def distances(rows: Tensor) -> Tensor:
        return (features.image[rows & features.has_image] - place).norm(dim=-1)

    near, aside = distances(~held), distances(held)
    radius = None
    if len(aside) >= 2:
        radius = float(aside.quantile(1 - config.abstain_quantile)) * (1 + config.abstain_slack)
    return replace(card, image_centroid=centroid, image_scatter=float(near.median()), image_radius=radius)


def describe(routing: Routing, router: Router, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Plain data for a log or a screen: per request its group, similarities and weights, and whether it abstained.

    Where a guard was asked also "guarded" and "guard_score".
    """
    rows = []
    weights = routing.weights.mean(1)
    for i, sample_id in enumerate(ids):
        rows.append(
            {
                "id": sample_id,
                "group": router.group_name(int(routing.group[i])),
                "similarity": {
                    router.group_name(g): round(float(routing.similarity[i, g]), 4) for g in range(router.group_count)
                },
                "abstained": bool(routing.abstained[i]),
                **_guard_row(routing, i),
                "weights": {e.name: round(float(weights[i, j]), 4) for j, e in enumerate(router.experts)},
            }
        )
    return rows


def _guard_row(routing: Routing, i: int) -> dict[str, Any]:
    if routing.guarded is None or routing.guard_score is None:
        return {}
    return {"guarded": bool(routing.guarded[i]), "guard_score": round(float(routing.guard_score[i]), 4)}
