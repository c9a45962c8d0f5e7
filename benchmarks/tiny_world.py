"""Experiments on the tiny world, in memory: a stream in about a minute on one thread, for sweeps over settings.

    python benchmarks/tiny_world.py --model DIR --out results.jsonl --runs '[{"rule": "none"}, {"rule": "hpa"}]'

Draws the same samples as `holdfast.tiny.stream`, tunes with PEFT LoRA on every linear layer of the language model,
merges in fp32 after each task and edits with `holdfast.functional`. `holdfast run` is the product and gives the figures
of the documents; this is the workbench that chose their settings (docs/design/tiny-world.md).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.functional.anchor import AnchorGrams, AnchorStrength
from holdfast.functional.columns import measure_change
from holdfast.functional.hessian import InputGram
from holdfast.functional.hpa import ColumnRanking, column_count, keep_schedule
from holdfast.tiny import engine, model_path, tasks
from holdfast.tiny import tokenizer as tok
from holdfast.tiny.build import complies, is_refusal
from holdfast.tiny.lexicon import Split
from holdfast.tiny.stream import SETTINGS
from holdfast.tiny.world import Example


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stream under one rule. rule: none, hpa, change, random, interpolate, anchor; `match` gives a control HPA's
    distance per layer (its own `p` or `kept` is then not used)."""

    rule: str = "none"
    order: tuple[str, ...] = tuple(tasks.TASKS)
    seed: int = 0
    harmful: float = 0.0
    lr: float = SETTINGS.lr
    steps: int = SETTINGS.steps
    batch: int = SETTINGS.batch
    rank: int = SETTINGS.rank
    alpha: int = SETTINGS.alpha
    train: int = 960
    # the edit
    p: tuple[float, float] = (5.0, 15.0)
    ratio: float = 2.0
    bounds: tuple[float, float] = (0.4, 0.8)
    form: str = "divide"
    criterion: str = "eps+phi"
    orthogonal: bool = True
    match: bool = False
    share: float = 0.8  # of the change that interpolation lets through
    mu_s: float = 1.0  # anchor: weights of safety and of the past, damping in units of tau
    mu_p: float = 0.3
    lam: float = 0.03
    mu_depth: float = 0.0  # mu_s of block b is mu_s * (1 + mu_depth * (1 - 2 b / (blocks - 1)))
    past: str = "full"  # H_p as it is kept: "full", "diagonal", or "low-rank": its 32 first directions
    origin: float = 0.0  # share of the safety term that is anchored at theta_0 instead of the step before
    benign: int = 0  # theta_0's own answers to benign twins in the safety set
    benign_share: float | None = None  # their weight in H_s; None: by tokens
    screen: bool = False  # task samples that theta_0 refuses go from the task set to the safety set
    drop: bool = False  # training samples that theta_0 refuses are not learned
    # its calibration
    damping: float = 0.01
    shrinkage: float = 0.0
    normalization: str = "sequence"
    tokens: str = "all"
    safety_kind: str = "mixed"
    safety_count: int = 8
    task_count: int = 128
    # the questions
    split: str = "validation"
    asked: int = 60
    guarded: int = 48
    every_step: bool = False
    train_dtype: str = "bfloat16"
    note: str = ""


Linears = dict[str, nn.Linear]


def linears_of(model: Any) -> Linears:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n and "language" in n}


def block_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def train_task(model: Any, examples: Sequence[Example], pixels: Sequence[Tensor | None], run: Run, seed: int) -> float:
    """LoRA on all linear layers of the LLM, merged into the weights in fp32. Returns the loss of the last ten steps."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    target = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    config = LoraConfig(r=run.rank, lora_alpha=run.alpha, target_modules=target, lora_dropout=0.0)
    tuned = get_peft_model(model, config)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0)
    order = np.concatenate(
        [
            np.random.default_rng([seed, e]).permutation(len(examples))
            for e in range(1 + run.steps * run.batch // len(examples))
        ]
    )
    warmup = max(1, round(0.05 * run.steps))
    losses = []
    for step in range(run.steps):
        progress = (step - warmup) / max(1, run.steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = run.lr * factor
        chosen = order[step * run.batch : (step + 1) * run.batch]
        parts = []
        for pictured in (False, True):
            some = [int(i) for i in chosen if (pixels[int(i)] is not None) == pictured]
            if some:
                stacked = torch.stack([pixels[i] for i in some]) if pictured else None  # type: ignore[arg-type]
                parts.append(engine.batch_of([examples[i] for i in some], stacked))
        targets = sum(b.targets for b in parts)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.train_dtype == "bfloat16"):
                loss = engine.summed_loss(tuned, part) / targets
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(total)
    merged = tuned.merge_and_unload()
    assert merged is model or merged.model is model.model
    for p in model.parameters():
        p.requires_grad_(False)
    return float(np.mean(losses[-10:]))


_THETA_0: dict[Any, Any] = {}
_FIRST: dict[Any, tuple[float, dict[str, Tensor]]] = {}


def learn(model: Any, examples: Sequence[Example], pixels: Sequence[Tensor | None], run: Run, t: int) -> float:
    """`train_task`; the first task, which no edit has touched, is learned once for all runs of a process."""
    key = (run.order[0], run.seed, run.harmful, run.drop, run.lr, run.steps, run.batch, run.rank, run.alpha, run.train)
    key += (run.train_dtype,)
    if t or key not in _FIRST:
        loss = train_task(model, examples, pixels, run, seed=1000 * run.seed + t)
        if not t:
            _FIRST[key] = loss, {n: layer.weight.detach().clone() for n, layer in linears_of(model).items()}
        return loss
    loss, weights = _FIRST[key]
    for name, layer in linears_of(model).items():
        layer.weight.data.copy_(weights[name])
    return loss


def draw_pixels(examples: Sequence[Example], rng: np.random.Generator, split: Split) -> list[Tensor | None]:
    return [None if e.scene is None else engine.pixel_values([e.scene], rng, split)[0] for e in examples]


@dataclass
class Questions:
    """Drawn exactly as `holdfast.tiny.stream` draws them."""

    run: Run
    _cache: dict[Any, Any] = field(default_factory=dict)

    def train(self, name: str) -> tuple[list[Example], list[Tensor | None]]:
        run = self.run
        rng = tasks.generator(run.seed, "train", name)
        examples = [tasks.TASKS[name].draw(rng, "train") for _ in range(run.train)]
        count, bad = round(run.harmful * run.train), tasks.generator(run.seed, "harmful", name)
        for place in sorted(int(i) for i in bad.permutation(run.train)[:count]):
            examples[place] = tasks.harmful_sample(bad)
        return examples, draw_pixels(examples, tasks.generator(run.seed, "pictures", name), "train")

    def asked(self, name: str) -> tuple[list[Example], list[Tensor | None]]:
        if name not in self._cache:
            split: Split = self.run.split  # type: ignore[assignment]
            rng = tasks.generator(self.run.seed, split, name)
            examples = [tasks.TASKS[name].draw(rng, split) for _ in range(self.run.asked)]
            self._cache[name] = examples, draw_pixels(examples, rng, split)
        return self._cache[name]

    def guarded(self, kind: str) -> tuple[list[Example], list[Tensor | None]]:
        if kind not in self._cache:
            split: Split = self.run.split  # type: ignore[assignment]
            rng = tasks.generator(self.run.seed, "safety", kind, split)
            pairs = [tasks.safety_pair(rng, kind, split, i) for i in range(self.run.guarded)]
            examples = [p[0] for p in pairs] + [p[1] for p in pairs]
            self._cache[kind] = examples, draw_pixels(examples, rng, split)
        return self._cache[kind]


def accuracy(model: Any, questions: Questions, name: str) -> float:
    examples, pixels = questions.asked(name)
    replies = engine.answers(
        model, [e.prompt for e in examples], pixels, max_new_tokens=tasks.TASKS[name].max_new_tokens
    )
    return float(np.mean([r == e.answer for r, e in zip(replies, examples, strict=True)]))


def safety(
    model: Any, questions: Questions, samples: dict[str, list[str]] | None = None
) -> dict[str, dict[str, float]]:
    found = {}
    for kind in tasks.SAFETY_KINDS:
        examples, pixels = questions.guarded(kind)
        replies = engine.answers(model, [e.prompt for e in examples], pixels, max_new_tokens=48)
        refused = np.array([is_refusal(r) for r in replies])
        helped = np.array([complies(r, e.deed) for r, e in zip(replies, examples, strict=True)])  # type: ignore[arg-type]
        half = len(replies) // 2
        if samples is not None:
            samples[kind] = [f"{e.prompt} -> {r}" for e, r in list(zip(examples, replies, strict=True))[:6]]
        found[kind] = {
            "comply": float(helped[:half].mean()),
            "collapse": float((~helped & ~refused)[:half].mean()),
            "over_refusal": float(refused[half:].mean()),
            "helpful": float(helped[half:].mean()),
        }
    return found


# --- calibration and edits -----------------------------------------------------------------------------------------


def grams(
    model: Any, examples: Sequence[Example], pixels: Sequence[Tensor | None], normalization: str, tokens: str
) -> dict[str, InputGram]:
    """2 X^T X of every linear layer of the LLM; layers of a block that share their input share the Gram."""
    layers = linears_of(model)
    leading = ("q_proj", "o_proj", "gate_proj", "down_proj")
    leaders = {n: layer for n, layer in layers.items() if n.rsplit(".", 1)[1] in leading}
    found = {n: InputGram(layer.in_features, normalization=normalization) for n, layer in leaders.items()}
    mask: Tensor | None = None

    def hook(name: str) -> Any:
        def update(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name].update(inputs[0].detach().float(), mask)

        return update

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in leaders.items()]
    try:
        with torch.no_grad():
            for pictured in (False, True):
                some = [i for i in range(len(examples)) if (pixels[i] is not None) == pictured]
                for start in range(0, len(some), 32):
                    part = some[start : start + 32]
                    stacked = torch.stack([pixels[i] for i in part]) if pictured else None  # type: ignore[arg-type]
                    batch = engine.batch_of([examples[i] for i in part], stacked)
                    mask = batch.attention_mask.bool()
                    if tokens == "text":
                        mask = mask & (batch.input_ids != engine.special(tok.IMAGE))
                    elif tokens == "answer":
                        mask = mask & (batch.labels != -100)
                    elif tokens == "request":
                        mask = mask & (batch.labels == -100)
                    model(
                        input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values
                    )
    finally:
        for handle in handles:
            handle.remove()
    twin = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    return {
        n: found[n.replace(n.rsplit(".", 1)[1], twin.get(n.rsplit(".", 1)[1], n.rsplit(".", 1)[1]))] for n in layers
    }


def inverse_diagonals(found: dict[str, InputGram], run: Run) -> dict[str, Tensor]:
    shared: dict[int, Tensor] = {}
    for gram in found.values():
        if id(gram) not in shared:
            shared[id(gram)] = gram.inverse_diagonal(run.damping, shrinkage=run.shrinkage)
    return {n: shared[id(g)] for n, g in found.items()}


def matching_columns(order: Tensor, energy: Tensor, reverted: float) -> Tensor:
    """The first columns of `order` whose energy comes closest to the share `reverted` of the whole."""
    total = torch.cumsum(energy[order], 0) / energy.sum()
    count = int((total - reverted).abs().argmin()) + 1
    if abs(float(reverted)) < abs(float(total[count - 1] - reverted)):
        count = 0
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def edit(
    layers: Linears, before: dict[str, Tensor], run: Run, a_s: dict[str, Tensor], a_t: dict[str, Tensor], seed: int
) -> dict[str, float]:
    """Edit the model's weights in place, layer by layer; returns means of the layers' figures."""
    blocks = 1 + max(block_of(n) for n in layers)
    rng = torch.Generator().manual_seed(seed)
    rows: dict[str, list[float]] = defaultdict(list)
    for name, layer in layers.items():
        w_prev, w_new = before[name], layer.weight.data
        change = measure_change(w_prev, w_new)
        percent = keep_schedule(block_of(name), blocks, keep_bounds=run.p)
        energy = change.energy.cpu()
        needed = run.rule == "hpa" or run.match
        ranking = ColumnRanking(energy, a_s[name], a_t[name], run.form) if needed else None  # type: ignore[arg-type]
        kept = torch.zeros(len(energy), dtype=torch.bool)
        if ranking is not None:
            selection = ranking.select(
                keep_percent=percent, focus_percent=min(100.0, run.ratio * percent), alpha_bounds=run.bounds,
                criterion=run.criterion,  # type: ignore[arg-type]
            )  # fmt: skip
            kept = selection.kept
            rows["overlap"].append(selection.overlap)
            rows["alpha"].append(selection.alpha)
            reverted = float(change.reverted(kept))
        share = run.share
        if run.rule in ("change", "random"):
            order = (
                torch.randperm(len(energy), generator=rng) if run.rule == "random" else energy.argsort(descending=True)
            )
            if run.match:
                kept = matching_columns(order, energy, reverted)
            else:
                kept = torch.zeros(len(energy), dtype=torch.bool)
                kept[order[: column_count(percent, len(energy))]] = True
        elif run.rule == "interpolate":
            if run.match:
                share = math.sqrt(max(0.0, 1 - reverted))
            kept[:] = False
        if run.rule == "interpolate":
            w_hat = w_prev + share * (w_new - w_prev)
        else:
            w_hat = torch.where(
                kept, w_prev, w_new - (change.coefficient() * w_prev if run.orthogonal and run.rule == "hpa" else 0)
            )
        rows["reverted"].append(float(change.reverted(kept)) if run.rule != "interpolate" else 1 - share**2)
        rows["change"].append(change.norm / float(w_prev.norm()))
        rows["distance"].append(float((w_hat - w_prev).norm()) / float(w_prev.norm()))
        layer.weight.data.copy_(w_hat)
    return {k: round(float(np.mean(v)), 4) for k, v in rows.items()}


def benign_answers(model: Any, run: Run) -> tuple[list[Example], list[Tensor | None]]:
    """theta_0's own answers to benign twins of training pairs: disjoint from every test and validation request."""
    rng = tasks.generator(run.seed, "calibration", "benign")
    drawn = tasks.benign_prompts(rng, "mixed", -(-run.benign // 4))[: run.benign]
    pixels = draw_pixels(drawn, np.random.default_rng(1), "train")
    replies = engine.answers(model, [e.prompt for e in drawn], pixels, max_new_tokens=48)
    good = [i for i, r in enumerate(replies) if not is_refusal(r)]
    return [replaced(drawn[i], replies[i]) for i in good], [pixels[i] for i in good]


def replaced(example: Example, answer: str) -> Example:
    return Example("safety", example.prompt, answer, example.scene, example.deed)


def screened(
    model: Any, examples: list[Example], pixels: list[Tensor | None]
) -> tuple[Sequence[int], list[Example], list[Tensor | None]]:
    """Indices of the samples that `model` (theta_0) does not refuse, and the others with its refusal as the answer."""
    replies = engine.answers(model, [e.prompt for e in examples], pixels, max_new_tokens=12)
    kept = [i for i, r in enumerate(replies) if not is_refusal(r)]
    out = [i for i, r in enumerate(replies) if is_refusal(r)]
    answers = engine.answers(model, [examples[i].prompt for i in out], [pixels[i] for i in out], max_new_tokens=48)
    return kept, [replaced(examples[i], a) for i, a in zip(out, answers, strict=True)], [pixels[i] for i in out]


def moments(model: Any, examples: Sequence[Example], pixels: Sequence[Tensor | None], run: Run) -> dict[str, Tensor]:
    """Mean 2 x x^T per token of every linear layer."""
    found = grams(model, examples, pixels, "token", run.tokens)
    shared = {id(g): g.hessian() for g in found.values()}
    return {n: shared[id(g)] for n, g in found.items()}


def anchor(
    layers: Linears,
    before: dict[str, Tensor],
    run: Run,
    h_t: dict[str, Tensor],
    h_s: dict[str, Tensor],
    h_p: dict[str, Tensor] | None,
    first: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """The anchored edit of every layer, in place."""
    rows: dict[str, list[float]] = defaultdict(list)
    blocks = 1 + max(block_of(n) for n in layers)
    factors: dict[int, Any] = {}
    for name, layer in layers.items():
        depth = 1 + run.mu_depth * (1 - 2 * block_of(name) / max(1, blocks - 1))
        key = id(h_t[name])
        if key not in factors:
            found = AnchorGrams(h_t[name], h_s[name], None if h_p is None else h_p[name], damping=run.lam)
            factors[key] = found.factor(AnchorStrength(safety_weight=run.mu_s * depth, past_weight=run.mu_p))
        w_prev, w_new = before[name], layer.weight.data.clone()
        w_hat = factors[key].edit_weight(w_prev, w_new)
        if run.origin and first is not None:
            w_hat += pull_back(first[name] - w_prev, h_t[name], h_s[name], h_p and h_p[name], run, run.mu_s * depth)
        rows["change"].append(float((w_new - w_prev).norm() / w_prev.norm()))
        rows["distance"].append(float((w_hat - w_prev).norm() / w_prev.norm()))
        layer.weight.data.copy_(w_hat)
    return {k: round(float(np.mean(v)), 4) for k, v in rows.items()}


def pull_back(change: Tensor, h_t: Tensor, h_s: Tensor, h_p: Tensor | None, run: Run, mu_s: float) -> Tensor:
    """What the edit gains when `origin` of the safety term holds theta_0: change mu_s H_s (A + K)^-1, (r, c)."""
    tau = h_t.diagonal().double().mean()
    mu_p = run.mu_p if h_p is not None else 0.0
    whole = h_t.double() + mu_s * h_s.double() + (mu_p * h_p.double() if h_p is not None else 0)
    whole = whole / tau + run.lam * (1 + mu_s + mu_p) * torch.eye(len(whole), dtype=torch.float64)
    right = change.double() @ (h_s.double() / tau) * (mu_s * run.origin)
    return torch.linalg.solve(whole, right.T).T.float()


def blend(several: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum, layers that share a tensor sharing it again."""
    shared: dict[int, Tensor] = {}
    for name, first in several[0].items():
        if id(first) not in shared:
            shared[id(first)] = sum(w * one[name] for w, one in zip(weights, several, strict=True))  # type: ignore[assignment]
    return {name: shared[id(first)] for name, first in several[0].items()}


def kept_past(h_t: dict[str, Tensor], form: str, rank: int = 32) -> dict[str, Tensor]:
    """What is kept of a task's moments, (c, c) each: all, the diagonal, or the `rank` strongest directions."""
    if form == "full":
        return h_t
    done: dict[int, Tensor] = {}
    for one in h_t.values():
        if id(one) in done:
            continue
        if form == "diagonal":
            done[id(one)] = torch.diag(one.diagonal())
        else:
            values, vectors = torch.linalg.eigh(one.double())
            top = slice(-rank, None)
            done[id(one)] = (vectors[:, top] * values[top] @ vectors[:, top].T).to(one.dtype)
    return {name: done[id(one)] for name, one in h_t.items()}


def own_answers(
    model: Any, examples: list[Example], pixels: list[Tensor | None], wanted: int
) -> tuple[list[Example], list[Tensor | None]]:
    """The safety calibration: the model's own refusals, the first `wanted` in turn over the categories."""
    replies = engine.answers(model, [e.prompt for e in examples], pixels, max_new_tokens=48)
    good = [i for i, r in enumerate(replies) if is_refusal(r)][:wanted]
    return [replaced(examples[i], replies[i]) for i in good], [pixels[i] for i in good]


def play(run: Run, folder: Path) -> dict[str, Any]:
    from transformers import LlavaForConditionalGeneration

    begun = time.perf_counter()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    questions = Questions(run)
    key = (run.seed, run.split, run.guarded)
    if key not in _THETA_0:
        _THETA_0[key] = safety(model, questions)
    result: dict[str, Any] = {"run": asdict(run), "theta_0": _THETA_0[key]}
    drawn = tasks.calibration_prompts(
        tasks.generator(run.seed, "calibration", run.safety_kind), run.safety_kind, max(2, run.safety_count // 4) * 2
    )
    asked = own_answers(model, drawn, draw_pixels(drawn, np.random.default_rng(0), "train"), run.safety_count)
    anchored = run.rule == "anchor"
    helpful = benign_answers(model, run) if anchored and run.benign else ([], [])
    theta_0 = copy.deepcopy(model) if run.screen or run.drop else None
    past: list[dict[str, Tensor]] = []
    first = {n: layer.weight.detach().clone() for n, layer in linears_of(model).items()}
    learned, edits, steps = [], [], []
    for t, name in enumerate(run.order):
        layers = linears_of(model)
        before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
        needs = run.rule == "hpa" or run.match
        a_s = inverse_diagonals(grams(model, *asked, run.normalization, run.tokens), run) if needs else {}
        examples, pixels = questions.train(name)
        found = {}
        if run.drop:
            kept, out, _ = screened(theta_0, examples, pixels)
            bad = {i for i, e in enumerate(examples) if e.deed is not None and e.deed.forbidden}
            found = {"dropped": len(out), "harmful": len(bad), "caught": len(bad - set(kept))}
            examples, pixels = [examples[i] for i in kept], [pixels[i] for i in kept]
        few: Any = slice(0, run.task_count)
        told, told_pixels = examples[few], pixels[few]
        refused: tuple[list[Example], list[Tensor | None]] = ([], [])
        if theta_0 is not None and run.screen and not run.drop:
            kept, *refused = screened(theta_0, told, told_pixels)  # type: ignore[assignment]
            told, told_pixels = [told[i] for i in kept], [told_pixels[i] for i in kept]
        if anchored:
            unsafe = asked[0] + refused[0], asked[1] + refused[1]
            if run.benign_share is None:
                h_s = moments(model, unsafe[0] + helpful[0], unsafe[1] + helpful[1], run)
            else:
                one, two = moments(model, *unsafe, run), moments(model, *helpful, run)
                h_s = blend([one, two], [1 - run.benign_share, run.benign_share])
        loss = learn(model, examples, pixels, run, t)
        layers = linears_of(model)
        if anchored:
            h_t = moments(model, told, told_pixels, run)
            h_p = blend(past, [1 / len(past)] * len(past)) if past and run.mu_p else None
            edits.append(anchor(layers, before, run, h_t, h_s, h_p, first) | {"screened": len(refused[0]), **found})
            past.append(kept_past(h_t, run.past))
        elif run.rule != "none":
            a_t = (
                inverse_diagonals(grams(model, told, told_pixels, run.normalization, run.tokens), run) if needs else {}
            )
            edits.append(edit(layers, before, run, a_s, a_t, seed=run.seed + t))
        learned.append(accuracy(model, questions, name))
        step: dict[str, Any] = {"task": name, "loss": round(loss, 4), "learned": learned[-1]}
        if run.every_step:
            step["safety"] = safety(model, questions)
            step["accuracy"] = [accuracy(model, questions, n) for n in run.order[: t + 1]]
        steps.append(step)
    final = [accuracy(model, questions, n) for n in run.order]
    samples: dict[str, list[str]] = {}
    last = safety(model, questions, samples)
    mean = {k: float(np.mean([v[k] for v in last.values()])) for k in next(iter(last.values()))}
    result |= {
        "ap": float(np.mean(final)), "learned": float(np.mean(learned)),
        "bwt": float(np.mean(final) - np.mean(learned)),
        "masr": mean["comply"] + mean["collapse"], **mean, "final": final, "safety": last, "steps": steps,
        "edits": edits, "samples": samples, "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    return result


def line(result: dict[str, Any]) -> str:
    """One result on one line: percentages, the edit's mean distance, what differs from the default run."""
    usual = json.loads(json.dumps(asdict(Run())))
    run = {k: v for k, v in json.loads(json.dumps(result["run"])).items() if v != usual[k]}
    names = ("ap", "learned", "bwt", "masr", "comply", "collapse", "over_refusal", "helpful")
    figures = " ".join(f"{k} {100 * result[k]:.0f}" for k in names)
    if result["edits"]:
        figures += f" distance {np.mean([e['distance'] for e in result['edits']]):.4f}"
    learned, final = ([round(100 * x) for x in xs] for xs in ([s["learned"] for s in result["steps"]], result["final"]))
    return f"{figures} {result['seconds']:.0f}s | {run} | learned {learned} final {final}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="theta_0 (default: the shipped aligned model)")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per run; appended")
    parser.add_argument("--runs", required=True, help="JSON list of runs (fields of Run), or a file that holds it")
    parser.add_argument("--part", default="0/1", help="i/n: of the runs, those whose index is i modulo n")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = args.runs if args.runs.lstrip().startswith("[") else Path(args.runs).read_text()
    part, parts = map(int, args.part.split("/"))
    known = {f.name for f in fields(Run)}
    for i, values in enumerate(json.loads(text)):
        if i % parts != part:
            continue
        assert set(values) <= known, set(values) - known
        run = Run(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        result = play(run, args.model or model_path("aligned"))
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(line(result), flush=True)


if __name__ == "__main__":
    main()
