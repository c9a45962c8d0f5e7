"""The mathematics of CRAM: adaptive rank, novelty, routing, orthogonality penalty. Tensors in, tensors out.

Source: CRAM (arXiv 2606.02502). Shapes: A (r, in) and B (out, r) are LoRA factors, an expert adds `B A x`; v (B, d) are
image features, t (B, d) instruction features; E experts in G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from holdfast.errors import ConfigError, NumericalError

# A residual shorter than this is rounding noise in float32 after one subtraction: scaled to unit length it would be an
# arbitrary direction that carries the strength of a real one.
VANISHING = 1e-3
# The same for a row of a factor, relative to the longest: rows are square roots of strengths.
VANISHED_ROW = 1e-6
# Most by which scaling a residual to unit length may raise its strength: a random direction's residual has at least
# 1 / 1.1 of its length until history fills a sixth of the space; where it fills nearly all, it would be raised many
# times.
RAISED = 1.1
# What differs by less, relative to the largest of its kind, is one value: rounding and the last bits of an input must
# not choose between two directions, groups or experts.
TIE = 1e-5
# Norm of a row of PEFT's Kaiming-uniform A (entries uniform in +-1/sqrt(in)): what a row without content starts with.
FRESH_ROW_NORM = 1 / math.sqrt(3)

Rule = Literal["first", "similar", "unlike", "margin", "ambiguous", "limit"]


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """How many directions of the buffer an expert keeps, per linear.

    r_min, r_max: bounds of the rank.
    tau_alloc: a direction is strong when S_j > tau_alloc * S_1 (`alloc="relative"`) or S_j > tau_alloc ("absolute",
        the released code with 0.08: a number that depends on learning rate, width and steps).
    tau_novel: a direction is new when its novelty exceeds tau_novel times the chance level sqrt(1 - k/d)
        (`novelty="chance"`: a random direction of a d-dimensional space with k history rows has that novelty), or
        exceeds tau_novel itself ("absolute", the released code).
    cap_first: cut to r_max before looking at novelty (released code) instead of after.
    fixed: keep exactly the r_max strongest directions: no threshold on strength or novelty (an ablation).
    """

    r_min: int = 4
    r_max: int = 10
    tau_alloc: float = 0.2
    alloc: Literal["relative", "absolute"] = "relative"
    tau_novel: float = 0.99
    novelty: Literal["chance", "absolute"] = "chance"
    cap_first: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.r_min <= self.r_max:
            raise ConfigError(
                f"r_min is {self.r_min} and r_max is {self.r_max}; expected 1 <= r_min <= r_max. "
                "Lower r_min or raise r_max."
            )
        if not (math.isfinite(self.tau_alloc) and self.tau_alloc >= 0):
            raise ConfigError(f"tau_alloc is {self.tau_alloc}; expected a finite number >= 0.")
        if not 0 <= self.tau_novel <= 1:
            raise ConfigError(f"tau_novel is {self.tau_novel}; expected a number in 0..1.")


@dataclass(frozen=True, kw_only=True)
class ExpertFactors:
    """One linear's expert and how its rank came about (counts of directions)."""

    lora_a: Float[Tensor, "r in"]
    lora_b: Float[Tensor, "out r"]
    strong: int  # above tau_alloc
    novel: int  # of those, also above tau_novel
    padded: int  # kept only to reach r_min
    fresh: int  # of the padded, random rows with B = 0, because the buffer had nothing left to give
    overlapping: int  # kept although not orthogonal to history, because history leaves no free direction
    energy: float  # sum of S_j^2 kept over the total, 0..1; 1 for a buffer that learnt nothing

    @property
    def rank(self) -> int:
        """Directions that the expert keeps: rows of A, columns of B."""
        return self.lora_a.shape[0]


@dataclass(frozen=True, kw_only=True)
class GroupDecision:
    """Level 1 for a new task: join group `group`, or open one (None), and the row of the table that said so."""

    group: int | None
    rule: Rule
    similarity: float  # the best cosine; nan when there is no group
    margin: float  # best minus second best; nan below two groups


def product_svd(
    lora_a: Float[Tensor, "r in"], lora_b: Float[Tensor, "out r"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    """Thin SVD of `B A` without forming it: two QRs and the SVD of an r x r matrix.

    Returns U (out, k), S (k,) in falling order, Vh (k, in) with k = min(r, in, out), at least in float32. Singular
    values within 1e-5 of S_1 of each other become their mean, and their directions, which an SVD leaves open, a basis
    that depends on their span alone: a factor changed in its last bits gives the same directions in the same order.

    Raises: NumericalError: shapes that do not multiply, or a factor that is not finite.
    """
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise NumericalError(
            f"LoRA factors A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)} do not multiply; "
            "expected A (r, in) and B (out, r) of one rank r."
        )
    a, b = _wide(lora_a), _wide(lora_b)
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        raise NumericalError(
            "A LoRA factor holds NaN or inf; the buffer diverged. Lower the learning rate or lengthen the warm-up."
        )
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u, vh = q_b @ u, vh @ q_a.T
    for run in _tied(s.tolist()):
        if run.stop - run.start > 1:
            turn = _turn_to_span(vh[run])
            u[:, run], vh[run], s[run] = u[:, run] @ turn, turn.T @ vh[run], s[run].mean()
    return u, s, vh


def row_basis(rows: Sequence[Float[Tensor, "r d"]], d: int | None = None) -> Float[Tensor, "d k"]:
    """Orthonormal basis, as columns, of the span of all rows of `rows`; k is its numerical rank.

    `d` is needed only when `rows` is empty: the basis is then (d, 0).

    Raises: NumericalError: no row at all, and no `d`.
    """
    stacked = [_wide(r) for r in rows if r.shape[0]]
    if not stacked:
        if d is None:
            raise NumericalError("row_basis of no rows needs d, the length of a row.")
        return torch.zeros(d, 0)
    matrix = torch.cat(stacked)
    # Unit rows: an expert that barely moved spans its directions as much as one that moved far. A row that is nothing
    # but rounding beside the others points nowhere.
    norms = matrix.norm(dim=1, keepdim=True)
    matrix = torch.where(norms > VANISHED_ROW * norms.max(), matrix / norms.clamp_min(_tiny(matrix)), 0.0)
    q, r = torch.linalg.qr(matrix.T)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    tolerance = float(s[0]) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return q @ u[:, s > tolerance]


def column_basis(columns: Sequence[Float[Tensor, "d r"]], d: int | None = None) -> Float[Tensor, "d k"]:
    """Orthonormal basis, as columns, of the span of all columns of `columns`."""
    return row_basis([c.T for c in columns], d)


def residual(directions: Float[Tensor, "k d"], basis: Float[Tensor, "d q"]) -> Float[Tensor, "k d"]:
    """`(I - Q Q^T) v` for each row v. Projected twice: once leaves an error of eps / novelty after normalising."""
    if basis.shape[1] == 0:
        return directions
    q = basis.to(directions)
    once = directions - (directions @ q) @ q.T
    return once - (once @ q) @ q.T


def chance_novelty(history_rows: int, d: int) -> float:
    """sqrt(1 - k/d): the novelty of a random direction of d dimensions against a span of k of them."""
    return math.sqrt(max(0.0, 1 - history_rows / d))


def expert_from_buffer(
    lora_a: Float[Tensor, "r in"],
    lora_b: Float[Tensor, "out r"],
    history: Float[Tensor, "in q"] | None,
    rule: RankRule,
    *,
    scale: float = 1.0,
    generator: torch.Generator,
) -> ExpertFactors:
    """The expert that the warm-up buffer `B A` turns into: its strong and novel directions, off the history.

    Kept directions are `v_j <- (I - Q Q^T) v_j` of unit length with strength S_j, but at most 1.1 times the strength
    S_j * novelty_j of the residual (which binds only where history fills more than a sixth of the space), split as
    A = sqrt(S) V^T and B = U sqrt(S). So the expert is at most 1.1 times what the buffer learnt off history. No more
    directions count as novel than history leaves dimensions. Directions added only to reach r_min come in order of
    strength times novelty, what the buffer learnt off history along them, and keep that strength, so nothing redundant
    is amplified; where no direction is left, a random row orthogonal to history and to the kept rows with B = 0 (an
    ordinary LoRA start). Rows stay orthogonal to history unless history leaves fewer free dimensions than r_min
    (counted in `overlapping`).

    A buffer or a history changed by rounding gives the same expert: tied strengths are settled by their span (see
    `product_svd`), among them the most novel direction comes first, further ties go to the stronger direction, and what
    meets a threshold within 1e-5 of it is not strong, and is novel.

    Args:
        history: orthonormal columns, the row space of the group's older A of this linear; None when there are none.
        scale: factor on the update, 1; the released code's double scale is 2.
        generator: seeds the fresh rows; on the CPU.
    Raises: ConfigError: r_max above the buffer's rank or the linear's width. NumericalError: see `product_svd`.
    """
    width = lora_a.shape[1]
    if rule.r_max > lora_a.shape[0]:
        raise ConfigError(
            f"r_max is {rule.r_max} but the warm-up buffer has rank {lora_a.shape[0]}; "
            "raise buffer_rank or lower r_max."
        )
    u, s, vh = product_svd(lora_a, lora_b)
    if rule.r_max > s.shape[0]:
        raise ConfigError(
            f"r_max is {rule.r_max} but this linear is only {s.shape[0]} wide; lower r_max for this model."
        )
    basis = history if history is not None else torch.zeros(width, 0)
    basis = basis.to(device=vh.device, dtype=vh.dtype)
    if basis.shape[1]:
        for run in _tied(s.tolist()):
            if run.stop - run.start > 1:
                turn = _turn_to_novelty(vh[run], basis)
                u[:, run], vh[run] = u[:, run] @ turn, turn.T @ vh[run]
    rest = residual(vh, basis)
    # Without history everything is new, and not new up to rounding.
    novelty = rest.norm(dim=1) if basis.shape[1] else torch.ones_like(s)

    strength, news = s.tolist(), novelty.tolist()
    # At or below this a direction of the buffer is rounding noise, and B's column with it.
    floor = strength[0] * torch.finfo(torch.float32).eps * max(width, lora_b.shape[0])
    strong = _strong(strength, rule, floor)
    threshold = rule.tau_novel * (chance_novelty(basis.shape[1], width) if rule.novelty == "chance" else 1.0)
    if rule.fixed:
        kept = [j for j in range(rule.r_max) if news[j] > VANISHING and strength[j] > floor]
        novel = len(kept)
    else:
        pool = strong[: rule.r_max] if rule.cap_first else strong
        bar = max(threshold * (1 - TIE), VANISHING)
        fresh_enough = [j for j in pool if news[j] > bar and strength[j] > floor]
        # More would depend on each other: they live in what history leaves.
        fresh_enough = fresh_enough[: width - basis.shape[1]]
        novel = len(fresh_enough)
        kept = fresh_enough[: rule.r_max]
    target = rule.r_max if rule.fixed else rule.r_min

    power = [strength[j] * min(1.0, RAISED * news[j]) for j in kept]
    spare = [j for j in range(len(news)) if j not in kept and news[j] > VANISHING and strength[j] > floor]
    gain = [x * y for x, y in zip(strength, news, strict=True)]
    for j in _by_gain(spare, gain, strength[0])[: max(0, target - len(kept))]:
        kept.append(j)
        power.append(gain[j])
    rows = [rest[j] / novelty[j] * math.sqrt(p) for j, p in zip(kept, power, strict=True)]
    columns = [u[:, j] * math.sqrt(p) for j, p in zip(kept, power, strict=True)]
    fresh = overlapping = 0
    while len(rows) < target:
        row = _fresh_row(rows, basis, width, generator).to(vh)
        if bool(row.any()):
            columns.append(torch.zeros_like(u[:, 0]))
            fresh += 1
        else:  # history and the kept rows already span the whole input space
            j = min(set(range(len(strength))) - set(kept))
            kept.append(j)
            root = math.sqrt(strength[j]) if strength[j] > floor else 0.0
            row = vh[j] * (root or FRESH_ROW_NORM)
            columns.append(u[:, j] * root)
            overlapping += 1
        rows.append(row)
    total = float((s.double() ** 2).sum())
    return ExpertFactors(
        lora_a=torch.stack(rows),
        lora_b=torch.stack(columns, dim=1) * scale,
        strong=len(strong),
        novel=novel,
        padded=len(rows) - min(novel, rule.r_max),
        fresh=fresh,
        overlapping=overlapping,
        energy=sum(p * p for p in power) / total if total > 0 else 1.0,
    )


def cosine_similarity(t: Float[Tensor, "B d"], prototypes: Float[Tensor, "G d"]) -> Float[Tensor, "B G"]:
    """Cosine of each instruction vector with each prototype. Row by row, so independent of the batch."""
    t = torch.nn.functional.normalize(t.float(), dim=-1)
    prototypes = torch.nn.functional.normalize(prototypes.float(), dim=-1)
    return (t.unsqueeze(-2) * prototypes).sum(-1)


def instruction_vector(mean_embedding: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
    """LayerNorm without affine terms of a mean token embedding: zero mean, unit variance over the features."""
    return torch.nn.functional.layer_norm(mean_embedding.float(), mean_embedding.shape[-1:])


def decide_group(
    similarities: Sequence[float],
    *,
    join_cosine: float = 0.8,
    margin: float = 0.1,
    floor: float = -1.0,
    max_groups: int | None = None,
) -> GroupDecision:
    """Level 1 for a new task, from the cosine of its prototype with each group's.

    No group: open one. One: join when the cosine exceeds `join_cosine`, else open. Two or more: join the best when its
    lead over the second exceeds `margin`, else open. Where `max_groups` forbids to open, join the best.

    What meets a threshold within 1e-5 does not exceed it, and of groups equally near the oldest is the best.

    floor: with two groups or more the best must exceed it too. The lead alone (floor -1, the released code) joins a
        task that is unlike every group and a little less unlike one; within a group only images tell tasks apart.

    Raises: NumericalError: a similarity is not finite. ConfigError: `max_groups` below 1.
    """
    if any(not math.isfinite(s) for s in similarities):
        raise NumericalError(f"A group's similarity is not finite: {list(similarities)}; a prototype is damaged.")
    if max_groups is not None and max_groups < 1:
        raise ConfigError(f"max_groups is {max_groups}; expected at least 1, or none for no limit.")
    if not similarities:
        return GroupDecision(group=None, rule="first", similarity=math.nan, margin=math.nan)
    order = sorted(range(len(similarities)), key=lambda g: -similarities[g])
    # Of groups that are equally near, the oldest.
    best = min(g for g in order if similarities[order[0]] - similarities[g] <= TIE)
    lead = similarities[order[0]] - similarities[order[1]] if len(order) > 1 else math.nan
    if len(order) == 1:
        joins, rule_join, rule_open = similarities[best] > join_cosine + TIE, "similar", "unlike"
    else:
        leads = lead > margin + TIE
        joins, rule_join = leads and similarities[best] > floor + TIE, "margin"
        rule_open = "unlike" if leads else "ambiguous"
    full = max_groups is not None and len(order) >= max_groups
    rule = rule_join if joins else ("limit" if full else rule_open)
    return GroupDecision(
        group=best if joins or full else None,
        rule=rule,  # type: ignore[arg-type]
        similarity=similarities[best],
        margin=lead,
    )


def routing_weights(
    features: Float[Tensor, "B d"],
    centroids: Float[Tensor, "*S E d"],
    sigma: Float[Tensor, " B"] | float,
    members: Bool[Tensor, "B E"],
) -> Float[Tensor, "B *S E"]:
    """`pi_e = softmax_e(-||v - c_e||^2 / (2 sigma^2))` over the members of each sample's group, 0 elsewhere.

    sigma = 0 gives the nearest centroid, sigma = inf the uniform distribution; a row without members is all 0.
    `centroids` may have a leading axis (one set per decoder block). Row by row: no batch statistics.
    """
    members = members.bool().reshape(members.shape[0], *[1] * (centroids.dim() - 2), members.shape[1])
    v = features.float().reshape(features.shape[0], *[1] * (centroids.dim() - 1), features.shape[-1])
    distance = (v - centroids.float()).square().sum(-1)  # (B, *S, E)
    distance = distance.masked_fill(~members, math.inf)
    # Detached: the softmax does not change with this shift, and neither does its gradient.
    nearest = distance.amin(-1, keepdim=True).detach()
    variance = torch.as_tensor(sigma, dtype=torch.float32, device=v.device).square()
    variance = variance.clamp_min(torch.finfo(torch.float32).tiny)  # sigma = 0: 0 / tiny for the nearest, inf beyond
    variance = variance.reshape(-1, *[1] * (distance.dim() - 1)) if variance.dim() else variance
    # Subtracting the nearest distance first keeps a tiny sigma from giving inf - inf.
    beyond = distance - nearest
    # The nearest alone: centroids at one distance share a request, and rounding does not choose among them.
    hard = variance <= torch.finfo(torch.float32).tiny
    beyond = torch.where(hard & (beyond <= TIE * nearest), torch.zeros_like(beyond), beyond)
    logits = (-beyond / (2 * variance)).masked_fill(~members, -math.inf)
    weights = torch.softmax(logits, dim=-1)
    return torch.where(members.any(-1, keepdim=True), weights, torch.zeros_like(weights))


def best_group(similarity: Float[Tensor, "B G"]) -> Int[Tensor, " B"]:
    """The group with the largest cosine; of equally near ones (within 1e-5) the oldest."""
    near = similarity >= similarity.amax(-1, keepdim=True) - TIE
    return near.to(torch.uint8).argmax(-1)


def claims(
    similarities: Float[Tensor, "B E"], floors: Float[Tensor, " E"], members: Bool[Tensor, "B E"]
) -> Bool[Tensor, " B"]:
    """Whether any expert of a sample's group finds the request like its own task's; if none, the base answers alone."""
    return ((similarities >= floors) & members).any(-1)


def orthogonality_penalty(
    z: Float[Tensor, "B out"], basis: Float[Tensor, "out k"], old_mass: Float[Tensor, " B"]
) -> Float[Tensor, ""]:
    """`mean_b gamma_b ||Q^T z_b||^2`: how much of the new expert's output lies where older experts write.

    Zero if and only if each z_b with routing mass on older experts is orthogonal to span(Q).
    """
    return (old_mass * (z @ basis).square().sum(-1)).mean()


def expert_index(ranks: Sequence[int]) -> Int[Tensor, " rows"]:
    """For stacked experts, the expert that each row belongs to: ranks (2, 3) -> 0 0 1 1 1."""
    return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(list(ranks), dtype=torch.long))


def _wide(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _strong(strength: list[float], rule: RankRule, floor: float) -> list[int]:
    bar = rule.tau_alloc * strength[0] if rule.alloc == "relative" else rule.tau_alloc
    bar = max(bar * (1 + TIE), floor)
    return [j for j, value in enumerate(strength) if value > bar or j == 0]


def _tied(falling: Sequence[float], scale: float | None = None) -> list[slice]:
    """Runs of values in falling order that are one value: within TIE * scale (the first value) of the run's first."""
    runs, start = [], 0
    width = TIE * (falling[0] if scale is None else scale) if falling else 0.0
    for j in range(1, len(falling) + 1):
        if j == len(falling) or falling[start] - falling[j] > width:
            runs.append(slice(start, j))
            start = j
    return runs


def _by_gain(candidates: Sequence[int], gain: Sequence[float], scale: float) -> list[int]:
    """Directions by falling gain; among tied ones the stronger, which has the smaller index, first."""
    order = sorted(candidates, key=lambda j: -gain[j])
    runs = _tied([gain[j] for j in order], scale)
    return [j for run in runs for j in sorted(order[run])]


def _turn_to_span(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
    """The rotation Q for which `Q^T rows` is a function of the span of orthonormal rows, whatever basis they are."""
    probe = torch.randn(rows.shape[1], rows.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, r = torch.linalg.qr(rows.double() @ probe.to(rows.device))
    return (q * r.diagonal().sign()).to(rows)


def _turn_to_novelty(rows: Float[Tensor, "m d"], basis: Float[Tensor, "d q"]) -> Float[Tensor, "m m"]:
    """The rotation after which orthonormal rows come by falling novelty; tied ones are settled by their span."""
    seen = rows.double() @ basis.double()
    # Rising in what history sees is falling in what it does not.
    squares, turn = torch.linalg.eigh(seen @ seen.T)
    turned = turn.T @ rows.double()
    for run in _tied((1 - squares).clamp_min(0).tolist(), 1.0):
        turn[:, run] = turn[:, run] @ _turn_to_span(turned[run])
    return turn.to(rows)


def _fresh_row(rows: list[Tensor], basis: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """A random row orthogonal to history and to `rows`, of a LoRA start's norm; zero where no such direction exists."""
    taken = row_basis([basis.T, *[row.unsqueeze(0) for row in rows]], width).to(basis)
    if taken.shape[1] >= width:
        return torch.zeros(width)
    row = residual(torch.randn(1, width, generator=generator).to(basis), taken)[0]
    return row / row.norm() * FRESH_ROW_NORM
