"""Training and asking the small model in memory: packed batches, own answers, figures. Used by its builder alone.

A batch is one row: samples one after another, each seeing only itself, so that no padding is computed. The tower is
frozen, so a picture costs its tower pass once.
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

from holdfast.small import assemble
from holdfast.small.world import Example
from holdfast.tiny.engine import pixel_values
from holdfast.tiny.lexicon import Split
from holdfast.tiny.pixels import Scene

IGNORED = -100
# Tokens of the model's own answers that replay teaches: what follows from them is the model's own anyway.
BEGINNING = 14
# Weight of an answer's first two tokens in training: they decide between a refusal and help.
OPENING = 4.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Optimisation of one stage. steps: of AdamW on `batch` samples; lr: peak, cosine after `warmup` steps."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 10
    seed: int = 0


class Model:
    """Language model, tower and projector as the builder holds them."""

    def __init__(self, language: Any, tokenizer: Any, tower: Any, projector: nn.Module) -> None:
        self.language, self.tokenizer, self.tower, self.projector = language, tokenizer, tower, projector
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.image = tokenizer.convert_tokens_to_ids(assemble.IMAGE)

    @property
    def decoder(self) -> Any:
        """The decoder without its head, under LoRA or not."""
        found = self.language
        while not hasattr(found, "layers"):
            found = found.model
        return found

    @torch.no_grad()
    def features(self, scenes: Sequence[Scene], rng: np.random.Generator, split: Split = "train") -> Tensor:
        """(n, 36, width of the tower): its last layer without the class token, as LLaVA takes it."""
        pixels = pixel_values(scenes, rng, split)
        return self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

    def embedded(self, ids: Sequence[int], seen: Tensor | None) -> Tensor:
        """(n, width): the embeddings of token ids, the picture's in the place of `<image>`."""
        embed = self.language.get_input_embeddings()
        if seen is None:
            return embed(torch.tensor(ids))
        at = list(ids).index(self.image)
        before, after = (embed(torch.tensor(part, dtype=torch.long)) for part in (ids[:at], ids[at + 1 :]))
        return torch.cat((before, self.projector(seen), after))

    def request(self, prompt: str, pictured: bool) -> list[int]:
        """Token ids up to where the answer begins, as the chat template writes them."""
        parts = [{"type": "image"}] if pictured else []
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_ids(self, answer: str, whole: bool) -> list[int]:
        """Token ids of an answer with its end; of one that is not `whole`, the first ones."""
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.end] if whole else ids[:BEGINNING]


def packed_loss(
    model: Model, examples: Sequence[Example], seen: Sequence[Tensor | None], *, opening: float = 1.0
) -> Tensor:
    """Mean cross entropy () of the answers' tokens.

    seen: the tower's features (36, inner) of each pictured example, or None. opening: weight of an answer's first two
    tokens.
    """
    rows, labels, places, owner, weights = [], [], [], [], []
    for number, (example, picture) in enumerate(zip(examples, seen, strict=True)):
        asked, told = (
            model.request(example.prompt, picture is not None),
            model.answer_ids(example.answer, example.whole),
        )
        row = model.embedded([*asked, *told], picture)
        rows.append(row)
        labels.append(torch.tensor([IGNORED] * (len(row) - len(told)) + told))
        weight = torch.ones(len(row))
        weight[len(row) - len(told) :][:2] = opening
        weights.append(weight)
        places.append(torch.arange(len(row)))
        owner.append(torch.full((len(row),), number))
    whole, target, position, of = torch.cat(rows), torch.cat(labels), torch.cat(places), torch.cat(owner)
    allowed = (of[:, None] == of[None, :]) & (position[:, None] >= position[None, :])
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    hidden = model.decoder(
        inputs_embeds=whole[None], attention_mask=mask[None, None], position_ids=position[None], use_cache=False
    ).last_hidden_state[0]
    wanted = target[1:] != IGNORED  # a first token is never wanted, so no sample tells another's
    logits = nn.functional.linear(hidden[:-1][wanted], model.language.get_input_embeddings().weight)
    losses = nn.functional.cross_entropy(logits, target[1:][wanted], reduction="none")
    weight_of = torch.cat(weights)[1:][wanted]
    return (losses * weight_of).sum() / weight_of.sum()


def train(
    model: Model,
    parameters: Sequence[nn.Parameter],
    stage: Stage,
    draw: Callable[[np.random.Generator], Example],
    say: Callable[[str], None],
    *,
    keep: Callable[[], None],
) -> dict[str, Any]:
    """Run one stage and return seconds, steps and losses. keep: called after every 50 steps."""
    rng, pictures = np.random.default_rng(stage.seed), np.random.default_rng(stage.seed + 1)
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.0, betas=(0.9, 0.99))
    losses, began = [], time.monotonic()
    for step in range(stage.steps):
        rate = min(1.0, (step + 1) / stage.warmup) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * max(rate, 0.02)
        examples = [draw(rng) for _ in range(stage.batch)]
        seen = [None if e.scene is None else model.features([e.scene], pictures)[0] for e in examples]
        loss = packed_loss(model, examples, seen, opening=OPENING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 10 == 9 or step == 0:
            say(
                f"{stage.name} {step + 1}/{stage.steps}: loss {np.mean(losses[-10:]):.3f}, "
                f"{time.monotonic() - began:.0f} s"
            )
        if step % 50 == 49:
            keep()
    return {
        "seconds": round(time.monotonic() - began, 1),
        "loss_first": round(float(np.mean(losses[:10])), 4),
        "loss_last": round(float(np.mean(losses[-10:])), 4),
    }


@torch.no_grad()
def answers(
    model: Model,
    examples: Sequence[Example],
    *,
    seed: int = 0,
    split: Split = "train",
    tokens: int = 24,
    batch: int = 16,
) -> list[str]:
    """Greedy answers, left padded in batches of similar length."""
    pictures = np.random.default_rng(seed)
    asked = []
    for example in examples:
        seen = None if example.scene is None else model.features([example.scene], pictures, split)[0]
        asked.append(model.embedded(model.request(example.prompt, seen is not None), seen))
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    found = [""] * len(asked)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(asked[i]) for i in chosen)
        width = asked[chosen[0]].shape[1]
        inputs, mask = torch.zeros(len(chosen), longest, width), torch.zeros(len(chosen), longest, dtype=torch.long)
        for row, i in enumerate(chosen):
            inputs[row, longest - len(asked[i]) :] = asked[i]
            mask[row, longest - len(asked[i]) :] = 1
        out = model.language.generate(
            inputs_embeds=inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            eos_token_id=model.end,
        )  # fmt: skip
        for row, i in enumerate(chosen):
            found[i] = model.tokenizer.decode(out[row], skip_special_tokens=True).strip()
    return found
