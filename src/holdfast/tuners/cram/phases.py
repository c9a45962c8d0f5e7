"""Learning one task, as a state machine driven by optimizer steps: survey, warm-up, consolidate, stable, done.

Each phase ends by publishing one file or folder in a single rename, and the phase that a task is in is read off what is
published. So a killed task goes on in the phase it was in, and nothing about phases is kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.data.types import Sample
from holdfast.errors import AdapterError, ConfigError
from holdfast.files import atomic_path, write_json
from holdfast.functional.cram import ExpertFactors, GroupDecision, RankRule, expert_from_buffer, row_basis
from holdfast.models.loaded import LoadedModel
from holdfast.share import current
from holdfast.tuners.cram.cram_config import BACKBONE, CramConfig
from holdfast.tuners.cram.folder import base_for_peft, from_pretrained, load_expert, save_cram, save_expert
from holdfast.tuners.cram.guard import Guard
from holdfast.tuners.cram.model import Cram, Factors
from holdfast.tuners.cram.objective import BatchFeatures, CramTraining, buffer_factors, learned_centroid
from holdfast.tuners.cram.router import ExpertCard, Features, Router, card_from_features, placed
from holdfast.tuners.cram.router_features import Encoder
from holdfast.tuners.cram.stored_router import read_router


class Phase(StrEnum):
    SURVEY = "survey"  # encode the task's requests, choose its group
    WARMUP = "warm-up"  # train the buffer
    CONSOLIDATE = "consolidate"  # buffer -> expert of adaptive rank
    STABLE = "stable"  # train the expert
    DONE = "done"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A task's optimizer steps, and how many of them are warm-up."""

    total: int
    warmup: int

    def __post_init__(self) -> None:
        if not 1 <= self.warmup < self.total:
            raise ConfigError(
                f"A task of {self.total} optimizer step(s) cannot have {self.warmup} of warm-up; CRAM needs at least "
                "one step for the buffer and one for the expert. Give the task more steps."
            )

    @classmethod
    def of(cls, total: int, warmup_fraction: float) -> Steps:
        """`warmup_fraction` of the steps, rounded, at least one and never all."""
        return cls(total=total, warmup=max(1, min(total - 1, round(warmup_fraction * total))))

    @property
    def stable(self) -> int:
        """Optimizer steps of the stable phase."""
        return self.total - self.warmup


class Loop(Protocol):
    """The training loop, bound by the method: train what `adapter` makes for `steps` steps and publish it at `out`.

    Called again after a kill with the same arguments it must go on and end with the same bytes.
    """

    def __call__(
        self, phase: Phase, *, steps: Steps, adapter: Callable[[], CramTraining], extras: BatchFeatures, out: Path
    ) -> None: ...


class TaskLearning:
    """How one task becomes an expert.

    previous: the CRAM folder that this task continues, or None for the first task.
    work_dir: what the phases publish: features.safetensors, buffer/, ranks.json, initial/, expert/, group.json. Where
        several processes learn (`holdfast.share.current`) the first one surveys, consolidates and writes; all train.
    encoder: instead of the one that `config` names.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        name: str,
        samples: Sequence[Sample],
        config: CramConfig,
        *,
        steps: Steps,
        previous: Path | None,
        work_dir: Path,
        seed: int,
        encoder: Encoder | None = None,
    ) -> None:
        self.loaded, self.name, self.samples, self.config = loaded, name, samples, config
        self.steps, self.previous, self.work_dir = steps, previous, work_dir
        self.seed, self.encoder = seed, encoder
        if previous is not None:
            stored = read_router(previous).router
            if name in [e.name for e in stored.experts]:
                raise AdapterError(f"{previous} already has an expert for task {name!r}; task names must differ.")
            check_continues(previous, stored.config, config)

    @property
    def phase(self) -> Phase:
        """Where this task stands, read off the disk."""
        if self.expert.exists():
            return Phase.DONE
        if not self._features_path.exists():
            return Phase.SURVEY
        if not (self.work_dir / "buffer").exists():
            return Phase.WARMUP
        return Phase.STABLE if (self.work_dir / "initial").exists() else Phase.CONSOLIDATE

    @property
    def expert(self) -> Path:
        """The trained expert's folder, once the task is done."""
        return self.work_dir / "expert"

    def learn(self, loop: Loop) -> Path:
        """Every phase that is left. Returns the folder of the trained expert, which no router knows yet."""
        while (phase := self.phase) is not Phase.DONE:
            share = current()
            share.wait()  # everybody has read the phase before anybody ends it
            if phase is Phase.SURVEY:
                share.by_chief(self.survey)
            elif phase is Phase.CONSOLIDATE:
                share.by_chief(self.consolidate)
            else:
                self._train(loop, phase, self.work_dir / "buffer" if phase is Phase.WARMUP else self.expert)
        return self.expert

    def attach(self) -> Cram:
        """The model with the experts learned so far, under this task's configuration."""
        if self.previous is None:
            return Cram(self.loaded, Router(self.config), encoder=self.encoder)
        cram = from_pretrained(self.previous, self.loaded, encoder=self.encoder)
        cram.router = Router(self.config, cram.router.experts)
        return cram

    def survey(self) -> None:
        """Encode every training request once: the vision tower runs, the language model does not."""
        cram = self.attach()
        try:
            features = cram.features(self.samples)
        finally:
            cram.detach()
        with atomic_path(self._features_path) as temporary:
            save_file(
                {
                    "text": features.text.contiguous(),
                    "image": features.image.contiguous(),
                    "has_image": features.has_image.contiguous(),
                },
                temporary,
            )

    def features(self) -> Features:
        """The router's features of the task's training samples, made once and read from then on.

        Raises: AdapterError: they are of another number of samples.
        """
        stored = load_file(self._features_path)
        if stored["text"].shape[0] != len(self.samples):
            raise AdapterError(
                f"{self._features_path} holds {stored['text'].shape[0]} samples, the task has {len(self.samples)}; it "
                "belongs to another run. Remove the work folder and start the task again."
            )
        return Features(**stored)

    def card(self, router: Router) -> ExpertCard:
        """The new expert's card: centroids and floors of its training samples, and its group by the level-1 table."""
        return self._placed(router, None)[0]

    def _placed(self, router: Router, centroid: Tensor | None) -> tuple[ExpertCard, GroupDecision]:
        """The card, and the decision on its group.

        centroid: the image centroid that was learned with the expert, instead of the mean of its images.
        """
        features = self.features()
        card, held = card_from_features(self.name, 0, features, self.config, seed=self.seed)
        if centroid is not None:
            card = placed(card, centroid, features, held, self.config)
        decision = router.decide(features.text[~held])
        return replace(card, group=router.group_count if decision.group is None else decision.group), decision

    def consolidate(self) -> None:
        """Buffer -> initial expert, per linear; `ranks.json` says how each rank came about."""
        cram = self.attach()
        try:
            card = self.card(cram.router)
            history = history_rows(cram, card.group)
        finally:
            cram.detach()
        buffer = load_expert(self.work_dir / "buffer")
        made = consolidate(buffer, history, self.config, seed=self.seed, device=self.loaded.device)
        write_json(self.work_dir / "ranks.json", {name: describe_rank(e) for name, e in made.items()})
        save_expert(
            self.work_dir / "initial",
            {n: (e.lora_a, e.lora_b) for n, e in made.items()},
            **base_for_peft(self.loaded),
        )

    def previous_guard(self) -> Guard | None:
        """The guard of the folder that this task continues."""
        return read_router(self.previous).guard if self.previous is not None else None

    def publish(self, out: Path, *, expert: Path | None = None, guard: Guard | None = None) -> ExpertCard:
        """Write the CRAM folder `out`: older experts byte for byte, the new one, and the router that knows it.

        expert: instead of the trained one (an edited copy of it). guard: stored beside the router.
        Does nothing where `out` is already there.
        """
        expert = expert or self.expert
        cram = self.attach()
        try:
            ranks = {name: a.shape[0] for name, (a, _) in load_expert(expert).items()}
            card, decision = self._placed(cram.router, learned_centroid(self.expert))
            card = replace(card, ranks=ranks)
            write_json(self.work_dir / "group.json", describe_decision(decision, cram.router))
            if not out.exists():
                older = read_router(self.previous).folders if self.previous is not None else ()
                router = cram.router.adding(card)
                save_cram(out, router, [*older, expert], loaded=self.loaded, encoder=cram.encoder, guard=guard)
        finally:
            cram.detach()
        return card

    def _train(self, loop: Loop, phase: Phase, out: Path) -> None:
        def adapter() -> CramTraining:
            cram = self.attach()
            stable = phase is Phase.STABLE
            factors: Factors = (
                load_expert(self.work_dir / "initial") if stable else buffer_factors(cram, seed=self.seed)
            )
            return CramTraining(cram, factors, self.card(cram.router), stable=stable)

        loop(phase, steps=self.steps, adapter=adapter, extras=BatchFeatures(self.samples, self.features()), out=out)

    @property
    def _features_path(self) -> Path:
        return self.work_dir / "features.safetensors"


def check_continues(previous: Path, stored: CramConfig, config: CramConfig) -> None:
    """Raises ConfigError when a new expert could not stand beside those of the folder `previous`.

    One folder adapts one list of linears and has one encoder; every other option may differ from task to task.
    """
    if set(config.targets) != set(stored.targets):
        raise ConfigError(
            f"{previous} adapts {', '.join(sorted(stored.targets))}, but targets is "
            f"{', '.join(sorted(config.targets))}; all experts of a folder adapt the same linears. Keep the folder's "
            "targets, or begin a folder of its own."
        )
    if config.encoder != stored.encoder:
        raise ConfigError(
            f"{previous} was made with encoder {stored.encoder!r}, but encoder is {config.encoder!r}; the centroids of "
            "one mean nothing to another. Keep the folder's encoder (if its files only moved, write the new place into "
            'router.json, under "config", "encoder"), or begin a folder of its own.'
        )
    if config.encoder == BACKBONE and config.common_directions != stored.common_directions:
        raise ConfigError(
            f"{previous} was made with common_directions {stored.common_directions:g}, but common_directions is "
            f"{config.common_directions:g}; instruction vectors of the one mean nothing to the other. Set "
            f"common_directions to {stored.common_directions:g} under `cram`, or begin a folder of its own."
        )


def history_rows(cram: Cram, group: int) -> dict[str, list[Tensor]]:
    """Linear name -> the A (r, in) of the group's experts."""
    members = cram.router.members(group)
    return {p.name: [cram.experts[i][p.name][0] for i in members if p.name in cram.experts[i]] for p in cram.layers}


def consolidate(
    buffer: Factors,
    history: dict[str, list[Tensor]],
    config: CramConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, ExpertFactors]:
    """The expert that a buffer turns into, for every linear; factors fp32 on the CPU.

    buffer: linear name -> A (R, in), B (out, R). history: linear name -> older experts' A, each (rank, in).
    """
    made = {}
    scale = 2.0 if config.released.double_scale else 1.0
    for name, (a, b) in buffer.items():
        rows = [r.to(device) for r in history.get(name, [])]
        basis = row_basis(rows, a.shape[1]) if rows else None
        rule = narrow(config.rank, a.shape[1], b.shape[0])
        # A seed from each linear's name: leaving one out moves no other.
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        expert = expert_from_buffer(a.to(device), b.to(device), basis, rule, scale=scale, generator=generator)
        made[name] = replace(expert, lora_a=expert.lora_a.cpu(), lora_b=expert.lora_b.cpu())
    return made


def narrow(rule: RankRule, width: int, out: int) -> RankRule:
    """The rule with its bounds cut to what a linear of this size can hold (a narrow value projection)."""
    bound = min(width, out)
    return rule if rule.r_max <= bound else replace(rule, r_max=bound, r_min=min(rule.r_min, bound))


def describe_rank(expert: ExpertFactors) -> dict[str, Any]:
    """Plain data: the rank and the counts behind it."""
    return {
        "rank": expert.rank,
        "strong": expert.strong,
        "novel": expert.novel,
        "padded": expert.padded,
        "fresh": expert.fresh,
        "overlapping": expert.overlapping,
        "energy": round(expert.energy, 6),
    }


def describe_decision(decision: GroupDecision, router: Router) -> dict[str, Any]:
    """Plain data: the group joined (null: a new one), the row of the table that said so, and the figures behind it."""
    return {
        "joined": None if decision.group is None else router.group_name(decision.group),
        "rule": decision.rule,
        "similarity": _or_null(decision.similarity),
        "margin": _or_null(decision.margin),
    }


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def read_group(work_dir: Path) -> dict[str, Any]:
    """What level 1 decided about this task, and why."""
    return json.loads((work_dir / "group.json").read_text(encoding="utf-8"))


def read_ranks(work_dir: Path) -> dict[str, dict[str, Any]]:
    """What `consolidate` wrote about each linear's rank."""
    return json.loads((work_dir / "ranks.json").read_text(encoding="utf-8"))
