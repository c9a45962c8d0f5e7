"""Training and asking the small model in memory: packed batches, own answers, figures. Used by its builder alone.

A batch is one row: requests one after another, each seeing only itself and its picture, so that no padding is computed
and a picture that several requests ask about is read once.
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
# Tokens of an answer that is not taught whole: what follows from them is the model's own anyway.
BEGINNING = 9
# Weight of an answer's first two tokens in training: they decide between a refusal and help.
OPENING = 4.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Optimisation of one stage. steps: of AdamW; lr: peak, cosine over them after `warmup` steps; until: the step
    after which it stops, None: the last."""

    name: str
    steps: int
    lr: float
    warmup: int = 10
    seed: int = 0
    until: int | None = None


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


@dataclass(frozen=True)
class Group:
    """Requests about one picture, or one in words: the picture is read once, each request sees it and itself."""

    examples: tuple[Example, ...]

    @property
    def scene(self) -> Scene | None:
        """What the requests are about."""
        return self.examples[0].scene


@dataclass(frozen=True)
class Packed:
    """A batch as one row of n tokens. embedded: (n, width); target: (n,) ids or `IGNORED`; weight: (n,); mask: (n, n)
    additive; position: (n,); first: (requests,) where each request's last token stands, in the order they were given.
    """

    embedded: Tensor
    target: Tensor
    weight: Tensor
    mask: Tensor
    position: Tensor
    first: Tensor


def packed(
    model: Model, groups: Sequence[Group], seen: Sequence[Tensor | None], *, opening: float = 1.0, told: bool = True
) -> Packed:
    """Groups one after another, in each the shared beginning once and then a branch per request.

    seen: the tower's features (36, inner) of each pictured group, or None. opening: weight of an answer's first two
    tokens. told: with the answers; without them the row ends where each would begin.
    """
    rows, labels, weights, places, owner, firsts = [], [], [], [], [], []
    branch, length = 0, 0
    # Branch 0 of a group is what its requests share; a token sees its own branch and the shared one of its group.
    shared_of: list[int] = []
    for group, picture in zip(groups, seen, strict=True):
        asked = [model.request(e.prompt, picture is not None) for e in group.examples]
        common = asked[0].index(model.image) + 1 if picture is not None else 0
        start = 0
        if picture is not None:
            rows.append(model.embedded(asked[0][:common], picture))
            start = len(rows[-1])
            labels.append(torch.full((start,), IGNORED))
            weights.append(torch.ones(start))
            places.append(torch.arange(start))
            owner.append(torch.full((start,), branch))
            length += start
        root = branch
        shared_of.append(root)
        branch += 1
        for ids, example in zip(asked, group.examples, strict=True):
            answer = model.answer_ids(example.answer, example.whole) if told else []
            row = model.embedded([*ids[common:], *answer], None)
            rows.append(row)
            labels.append(torch.tensor([IGNORED] * (len(row) - len(answer)) + answer))
            weight = torch.ones(len(row))
            weight[len(row) - len(answer) :][:2] = opening
            weights.append(weight)
            places.append(start + torch.arange(len(row)))
            owner.append(torch.full((len(row),), branch))
            firsts.append(length + len(row) - len(answer) - 1)
            length += len(row)
            shared_of.append(root)
            branch += 1
    of = torch.cat(owner)
    root_of = torch.tensor(shared_of)[of]
    order = torch.arange(len(of))
    allowed = ((of[:, None] == of[None, :]) | (root_of[:, None] == of[None, :])) & (order[:, None] >= order[None, :])
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return Packed(torch.cat(rows), torch.cat(labels), torch.cat(weights), mask, torch.cat(places), torch.tensor(firsts))


def hidden_states(model: Model, row: Packed) -> Tensor:
    """(n, width): the decoder's last hidden states of a packed batch."""
    return model.decoder(
        inputs_embeds=row.embedded[None],
        attention_mask=row.mask[None, None],
        position_ids=row.position[None],
        use_cache=False,
    ).last_hidden_state[0]


def packed_loss(
    model: Model, groups: Sequence[Group], seen: Sequence[Tensor | None], *, opening: float = 1.0
) -> Tensor:
    """Mean cross entropy () of the answers' tokens; the arguments are `packed`'s."""
    row = packed(model, groups, seen, opening=opening)
    hidden = hidden_states(model, row)
    wanted = row.target[1:] != IGNORED  # what begins a branch is never wanted, so no request tells another's
    logits = nn.functional.linear(hidden[:-1][wanted], model.language.get_input_embeddings().weight)
    losses = nn.functional.cross_entropy(logits, row.target[1:][wanted], reduction="none")
    weight = row.weight[1:][wanted]
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def first_tokens(
    model: Model, examples: Sequence[Example], *, seed: int = 0, split: Split = "train", batch: int = 12
) -> list[int]:
    """The greedy first token's id of each answer: whether it opens as a refusal does, at the price of one pass."""
    pictures, found = np.random.default_rng(seed), []
    for start in range(0, len(examples), batch):
        chosen = examples[start : start + batch]
        seen = [None if e.scene is None else model.features([e.scene], pictures, split)[0] for e in chosen]
        row = packed(model, [Group((e,)) for e in chosen], seen, told=False)
        hidden = hidden_states(model, row)[row.first]
        found += (hidden @ model.language.get_input_embeddings().weight.T).argmax(-1).tolist()
    return found


def train(
    model: Model,
    parameters: Sequence[nn.Parameter],
    stage: Stage,
    draw: Callable[[np.random.Generator, int], list[Group]],
    say: Callable[[str], None],
    *,
    check: Callable[[int], None],
    every: int,
) -> dict[str, Any]:
    """Run one stage and return seconds, steps and losses. draw(rng, step): a step's groups. check: called with the
    number of steps done after every `every` of them and after the last."""
    rng, pictures = np.random.default_rng(stage.seed), np.random.default_rng(stage.seed + 1)
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.0, betas=(0.9, 0.99))
    losses, began = [], time.monotonic()
    last = stage.until or stage.steps
    for step in range(last):
        rate = min(1.0, (step + 1) / stage.warmup) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * max(rate, 0.02)
        groups = draw(rng, step)
        seen = [None if g.scene is None else model.features([g.scene], pictures)[0] for g in groups]
        loss = packed_loss(model, groups, seen, opening=OPENING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 10 == 9 or step == 0:
            say(f"{stage.name} {step + 1}/{last}: loss {np.mean(losses[-10:]):.3f}, {time.monotonic() - began:.0f} s")
        if (step + 1) % every == 0 or step + 1 == last:
            check(step + 1)
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
