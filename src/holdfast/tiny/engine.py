"""Training and asking the tiny model in memory: batches, one optimisation stage over one or two processes, answers.

Only the builder and the experiments on the tiny world use this; streams are trained by `holdfast.training`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.tiny import tokenizer as tok
from holdfast.tiny.lexicon import Split
from holdfast.tiny.pixels import GRID, KINDS, PATCH, SIZE, TINTS, Scene, draw, labels
from holdfast.tiny.world import Example, Rng

Draw = Callable[[Rng], Example]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of the tiny LLaVA: about 2.7 M parameters, 5.5 MB in fp16."""

    hidden: int = 192
    layers: int = 5
    intermediate: int = 512
    heads: int = 6
    vision_hidden: int = 96
    vision_layers: int = 4
    vision_intermediate: int = 288
    vision_heads: int = 4


def make_model(seed: int, shape: ModelShape | None = None) -> Any:
    """A randomly initialised `LlavaForConditionalGeneration` in fp32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    shape = shape or ModelShape()
    words = tok.vocabulary()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_intermediate,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=shape.vision_hidden,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=256,
            initializer_range=0.04,
            tie_word_embeddings=False,
            bos_token_id=words.index(tok.BEGIN),
            eos_token_id=words.index(tok.END),
            pad_token_id=words.index(tok.PAD),
        ),
        image_token_index=words.index(tok.IMAGE),
        image_seq_length=tok.IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(
        bos_token_id=words.index(tok.BEGIN), eos_token_id=words.index(tok.END), pad_token_id=words.index(tok.PAD)
    )
    return model


# --- batches -------------------------------------------------------------------------------------------------------

_WORDS: dict[str, int] = {}


def encode(text: str) -> list[int]:
    """Ids of a text, as the shipped tokenizer gives them (checked in `tests/tiny`)."""
    if not _WORDS:
        _WORDS.update({word: i for i, word in enumerate(tok.vocabulary())})
    unknown = _WORDS[tok.UNKNOWN]
    return [_WORDS[w] if w in tok.PUNCTUATION else _WORDS.get("▁" + w, unknown) for w in tok.split_words(text)]


def special(token: str) -> int:
    """Id of a special token."""
    encode("")
    return _WORDS[token]


def pixel_values(scenes: Sequence[Scene], rng: Rng, split: Split = "train") -> Tensor:
    """(n, 3, 48, 48) in -1..1, as the shipped image processor gives them."""
    pictures = np.stack([draw(scene, rng, split) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def request_ids(prompt: str, pictured: bool) -> list[int]:
    """Token ids of one request up to where the answer begins; `pictured`: with the image's tokens."""
    picture = [special(tok.IMAGE)] * tok.IMAGE_TOKENS if pictured else []
    return [special(tok.USER), *picture, *encode(prompt), special(tok.END), special(tok.ASSISTANT)]


@dataclass
class Batch:
    """Right padded for training, labels only on the answer; `pixel_values` None when nothing is pictured."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None

    @property
    def targets(self) -> int:
        """Number of tokens that the loss is taken over."""
        return int((self.labels != -100).sum())


def batch_of(examples: Sequence[Example], pixels: Tensor | None) -> Batch:
    """Examples padded to one length n, labels on the answers alone.

    pixels: (images, 3, height, width), of the pictured examples in order, or None. Returns: ids, mask and labels (B,
    n).
    """
    rows, golds = [], []
    for example in examples:
        row: list[int] = []
        gold: list[int] = []
        for turn, (prompt, answer) in enumerate([(example.prompt, example.answer), *example.more]):
            asked = request_ids(prompt, example.scene is not None and turn == 0)
            said = [*encode(answer), special(tok.END)]
            row += asked + said
            gold += [-100] * len(asked) + said
        rows.append(row)
        golds.append(gold)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), special(tok.PAD))
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, (row, target) in enumerate(zip(rows, golds, strict=True)):
        ids[i, : len(row)], labels[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(target), 1
    return Batch(ids, mask, labels, pixels)


LENGTH_STEP = 20


def batches(examples: Sequence[Example], rng: Rng, split: Split = "train") -> list[Batch]:
    """A few batches of like length, so that little is computed on padding; pictured and worded requests apart."""
    groups: dict[tuple[bool, int], list[Example]] = {}
    for example in examples:
        said = [example.prompt, example.answer, *(text for turn in example.more for text in turn)]
        length = len(tok.split_words(" ".join(said)))
        groups.setdefault((example.scene is not None, length // LENGTH_STEP), []).append(example)
    found = []
    for (pictured, _), some in sorted(groups.items()):
        scenes = [e.scene for e in some if e.scene is not None]
        found.append(batch_of(some, pixel_values(scenes, rng, split) if pictured else None))
    return found


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Cross entropy summed over the answer tokens.

    Over a batch of B examples padded to n tokens, labels (B, n). Returns: a scalar, ().
    """
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        logits_to_keep=0,
    )
    logits = out.logits[:, :-1].float()
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), batch.labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


# --- one stage -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stage:
    """steps: optimiser steps; batch: samples per step over all processes; lr: peak, after `warmup` steps, then cosine
    down to `final` of it."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 40
    final: float = 0.05
    weight_decay: float = 0.02
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that train together (gloo); world 1 needs no group."""

    rank: int = 0
    world: int = 1

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.world == 1:
            return
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        flat /= self.world
        offset = 0
        for p in parameters:
            p.grad = flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()


def rate(stage: Stage, step: int) -> float:
    """Learning rate of a step: a linear climb, then a cosine down to the share `final` of `lr`."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.lr * (stage.final + (1 - stage.final) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimise(
    parameters: Sequence[nn.Parameter],
    stage: Stage,
    ranks: Ranks,
    loss_of_step: Callable[[Rng, int], float],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run a stage: `loss_of_step(rng, samples)` does forward and backward of this process's share, returns the loss."""
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=stage.lr,
        betas=(0.9, 0.98),
    )
    rng = np.random.default_rng([stage.seed, ranks.rank])
    begun, recent, curve = time.perf_counter(), [], []
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(stage, step)
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss_of_step(rng, stage.batch // ranks.world))
        ranks.average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            mean = float(np.mean(recent))
            recent.clear()
            curve.append([step + 1, round(mean, 4)])
            say(f"{stage.name} {step + 1}/{stage.steps} loss {mean:.4f} {time.perf_counter() - begun:.0f} s")
    return {"seconds": round(time.perf_counter() - begun, 1), "loss": curve}


def train_language(
    model: Any,
    parameters: Sequence[nn.Parameter],
    stage: Stage,
    ranks: Ranks,
    draw_one: Draw,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Next-word training on freshly drawn examples, bf16 autocast."""

    def step(rng: Rng, samples: int) -> float:
        parts = batches([draw_one(rng) for _ in range(samples)], rng)
        targets = sum(b.targets for b in parts)
        total = 0.0
        for part in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = summed_loss(model, part) / targets
            loss.backward()
            total += float(loss.detach())
        return total

    return optimise(parameters, stage, ranks, step, say)


def crowded_scene(rng: Rng) -> Scene:
    """A picture with much in it, for the dense head: objects in about half of the cells, or several written rows."""
    from holdfast.tiny import lexicon
    from holdfast.tiny.pixels import Thing

    if rng.random() < 0.5:
        return Scene(
            lines=tuple((row, str(rng.choice(lexicon.WRITABLE))) for row in range(6) if rng.random() < 0.7),
            ink=str(rng.choice(list(lexicon.COLORS))),
        )
    things = []
    for cell in range(9):
        lot = rng.random()
        if lot < 0.55:
            kind = (
                str(rng.choice(lexicon.SHAPES)) if lot < 0.12
                else str(rng.choice(lexicon.NOUNS)) if lot < 0.35
                else f"digit {rng.choice(lexicon.NUMBERS)}"
            )  # fmt: skip
            things.append(Thing(kind, str(rng.choice(list(lexicon.COLORS))), cell))
    return Scene(tuple(things))


class DenseHead(nn.Module):
    """What each patch shows, read off the vision tower's last layer; thrown away after the first stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, len(KINDS))
        self.tint = nn.Linear(width, len(TINTS))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of kind and colour for every patch: (B, patches, d) -> (B, patches, kinds), (B, patches, colours)."""
        features = self.norm(features)
        return self.kind(features), self.tint(features)


def _patch_labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    pairs = [labels(s) for s in scenes]
    return torch.from_numpy(np.stack([k for k, _ in pairs])), torch.from_numpy(np.stack([t for _, t in pairs]))


def train_vision(tower: Any, head: DenseHead, stage: Stage, ranks: Ranks, say: Callable[[str], None]) -> dict[str, Any]:
    """Teach the vision tower to tell kind and colour of every patch; returns figures for the log."""
    parameters = [*tower.parameters(), *head.parameters()]
    weight = torch.ones(len(KINDS))
    weight[0] = 0.1  # most patches are background
    tint_weight = torch.ones(len(TINTS))
    tint_weight[0] = 0.1

    def step(rng: Rng, samples: int) -> float:
        scenes = [crowded_scene(rng) for _ in range(samples)]
        kinds, tints = _patch_labels(scenes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kind, tint = head(tower(pixel_values=pixel_values(scenes, rng)).last_hidden_state[:, 1:])
        loss = nn.functional.cross_entropy(kind.float().flatten(0, 1), kinds.flatten(), weight)
        loss = loss + 0.5 * nn.functional.cross_entropy(tint.float().flatten(0, 1), tints.flatten(), tint_weight)
        loss.backward()
        return float(loss.detach())

    return optimise(parameters, stage, ranks, step, say)


@torch.no_grad()
def vision_accuracy(tower: Any, head: DenseHead, seed: int, count: int = 400) -> dict[str, float]:
    """Share of patches named rightly on the test draw of the digits, by what they show."""
    rng = np.random.default_rng(seed)
    scenes = [crowded_scene(rng) for _ in range(count)]
    kinds, tints = _patch_labels(scenes)
    kind, tint = head(tower(pixel_values=pixel_values(scenes, rng, "test")).last_hidden_state[:, 1:])
    right = kind.argmax(-1) == kinds
    found = {"color": float((tint.argmax(-1) == tints)[tints > 0].float().mean())}
    starts = {"background": (0, 1), "shape": (1, 7), "thing": (7, 31), "digit": (31, 41), "word": (41, len(KINDS))}
    for what, (low, high) in starts.items():
        found[what] = float(right[(kinds >= low) & (kinds < high)].float().mean())
    return {k: round(v, 4) for k, v in found.items()}


# --- asking --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(
    model: Any, prompts: Sequence[str], pixels: Sequence[Tensor | None], *, max_new_tokens: int = 40, batch: int = 128
) -> list[str]:
    """Greedy answers; pixels[i] (3, 48, 48) or None. Sorted by length inside, so that padding is short."""
    words = tok.vocabulary()
    rows = [request_ids(p, x is not None) for p, x in zip(prompts, pixels, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    replies = [""] * len(rows)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        width = max(len(rows[i]) for i in some)
        ids = torch.full((len(some), width), special(tok.PAD))
        mask = torch.zeros((len(some), width), dtype=torch.long)
        for j, i in enumerate(some):
            ids[j, width - len(rows[i]) :], mask[j, width - len(rows[i]) :] = torch.tensor(rows[i]), 1
        shown = [pixels[i] for i in some if pixels[i] is not None]
        picture = {"pixel_values": torch.stack(shown)} if shown else {}  # type: ignore[arg-type]
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, **picture
        )
        for j, i in enumerate(some):
            said = [words[int(t)] for t in out[j, width:] if int(t) != special(tok.PAD)]
            said = said[: said.index(tok.END)] if tok.END in said else said
            replies[i] = "".join(w.replace("▁", " ") for w in said).strip()
    return replies


def answer_examples(
    model: Any, examples: Sequence[Example], seed: int, split: Split = "test", **options: Any
) -> list[str]:
    """The model's greedy answers to `examples`, their scenes drawn with `seed`."""
    rng = np.random.default_rng(seed)
    pixels = [None if e.scene is None else pixel_values([e.scene], rng, split)[0] for e in examples]
    return answers(model, [e.prompt for e in examples], pixels, **options)


assert GRID * GRID == tok.IMAGE_TOKENS
