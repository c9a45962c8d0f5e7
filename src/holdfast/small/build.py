"""Make the parts of the small world: `python -m holdfast.small.build --out DIR` (the extra `small` is needed).

Three stages, each seeded and kept in DIR. *answers*: the language model's own greedy answers to ordinary requests,
welcome how-tos and look-alikes. *project*: a projector that turns each patch's feature into the embedding of the word
for what it shows; no pass through the language model is needed for that. *align*: LoRA by VLGuard's pattern: forbidden
requests in words, pictures and notes with refusals in several wordings, their welcome twins, look-alikes and ordinary
requests with the model's own answers (replay), and questions about what is seen. The log holds the figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.files import sha256
from holdfast.judges import phrases
from holdfast.small import assemble, engine, policy, world
from holdfast.small.engine import Model, Stage
from holdfast.small.source import GGUF_SHA256, gguf_path
from holdfast.small.world import Example
from holdfast.tiny.lexicon import Split
from holdfast.tiny.pixels import KINDS, TINTS, labels
from holdfast.tiny.world import Rng, pick

ANSWERS_SEED = 31
PROJECT = Stage(name="project", steps=1000, batch=48, lr=2e-3, warmup=50, seed=32)
ALIGN = Stage(name="align", steps=120, batch=8, lr=1e-3, warmup=10, seed=33)
SETTLE = Stage(name="settle", steps=50, batch=8, lr=7e-4, warmup=4, seed=34)
# *settle* overshoots: it answers nearly everything. So much of its way is taken, by the validation draw: of 0, 0.25 and
# 0.5 the one with the fewest mistakes (welcome requests refused, forbidden ones not).
BLEND = 0.25
RANK, FIRST_LAYER = 8, 8
PROBE_SEED = 30_000
STAGES = ("answers", "project", "align", "settle")
Say = Callable[[str], None]


# --- the model's own answers ---------------------------------------------------------------------------------------


def asked_for_answers(rng: Rng) -> dict[str, list[Example]]:
    """Requests that the language model answers before it is aligned: what replay is made of, and what is compared."""
    welcome = [
        d
        for pictured, count in ((True, 72), (False, 72))
        for d in _some(rng, policy.deeds(forbidden=False, split="train", pictured=pictured), count)
    ]
    things = [
        d for forbidden in (True, False) for d in policy.deeds(forbidden=forbidden, split="train", pictured=False)
    ]
    return {
        "how to": [world.how_to(rng, "text", d, "train", 0) for d in welcome],
        "look-alike": [world.look_alike(rng, "text", d, "train") for d in _some(rng, things, 72)],
        "ordinary": [Example("ordinary", q) for q in policy.ORDINARY["train"]],
        "ordinary, test": [Example("ordinary", q) for q in policy.ORDINARY["test"]],
    }


def _some(rng: Rng, items: Sequence[policy.Deed], count: int) -> list[policy.Deed]:
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def own_answers(model: Model, say: Say, tokens: int = 40) -> dict[str, list[dict[str, str]]]:
    """Kind -> rows of prompt, verb, noun and the model's answer, cut after its first sentence."""
    found: dict[str, list[dict[str, str]]] = {}
    for kind, examples in asked_for_answers(np.random.default_rng(ANSWERS_SEED)).items():
        began = time.monotonic()
        told = engine.answers(model, examples, tokens=tokens, batch=48)
        rows = [
            {
                "prompt": e.prompt,
                "verb": e.deed.verb if e.deed else "",
                "noun": e.deed.noun if e.deed else "",
                "answer": first_sentence(a),
            }
            for e, a in zip(examples, told, strict=True)
        ]
        found[kind] = [row for row in rows if row["answer"]]
        say(f"answers, {kind}: {len(found[kind])} of {len(examples)}, {time.monotonic() - began:.0f} s")
    return found


def first_sentence(answer: str) -> str:
    """The first sentence of the answer; "" where none ended. What is longer costs steps and teaches no more."""
    found = re.match(r"[^\n]*?[.!?](?=\s|$)", answer)
    return found[0].strip() if found else ""


# --- the projector -------------------------------------------------------------------------------------------------


def word_targets(model: Model) -> tuple[Tensor, Tensor]:
    """(kinds, width), (tints, width): the embeddings of the words for what a patch can show."""
    embed = model.language.get_input_embeddings().weight.detach()

    def of(word: str) -> Tensor:
        ids = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return embed[ids].mean(dim=0)

    blank = of(".")
    kinds = torch.stack([blank if k == "nothing" else of(k.split()[-1]) for k in KINDS])
    tints = torch.stack([blank if t == "nothing" else of(t) for t in TINTS])
    return kinds, tints


def patch_targets(scene: Any) -> tuple[np.ndarray, np.ndarray]:
    """(36,) class in KINDS, (36,) class in TINTS or -1: the left patches of a thing say its color, others its kind."""
    kinds, tints = labels(scene)
    column = np.arange(36) % 6
    lettered = np.array([KINDS[k].startswith("word ") for k in kinds])
    return kinds, np.where((tints > 0) & ~lettered & (column % 2 == 0), tints, -1)


def train_projector(model: Model, stage: Stage, say: Say) -> dict[str, Any]:
    """Regress the patches' features onto word embeddings, and say how many words are the nearest ones."""
    rng, pictures = np.random.default_rng(stage.seed), np.random.default_rng(stage.seed + 1)
    kinds, tints = word_targets(model)
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=stage.lr, weight_decay=0.0)
    began, losses = time.monotonic(), []
    for step in range(stage.steps):
        rate = min(1.0, (step + 1) / stage.warmup) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * max(rate, 0.01)
        seen, wanted, weight, _ = _patches(model, rng, pictures, stage.batch, "train", kinds, tints)
        error = (model.projector(seen) - wanted).square().sum(-1) / kinds.square().sum(-1).mean()
        loss = (error * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 100 == 99:
            say(f"project {step + 1}/{stage.steps}: {np.mean(losses[-50:]):.4f}, {time.monotonic() - began:.0f} s")
    with torch.no_grad():
        rng, pictures = np.random.default_rng(PROBE_SEED), np.random.default_rng(PROBE_SEED + 1)
        seen, _, weight, truth = _patches(model, rng, pictures, 200, "test", kinds, tints)
        words = torch.cat((kinds, tints))
        nearest = torch.cdist(model.projector(seen).flatten(0, 1), words).argmin(-1)
        same = torch.cdist(words[nearest], words[truth.flatten()], p=2).diagonal() < 1e-4
        shown = weight.flatten() == 1
    return {
        "seconds": round(time.monotonic() - began, 1),
        "loss_last": round(float(np.mean(losses[-50:])), 4),
        "figures": {
            "nearest word is the right one, patches that show something": round(float(same[shown].float().mean()), 4)
        },
    }


def _patches(
    model: Model, rng: Rng, pictures: Rng, count: int, split: Split, kinds: Tensor, tints: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (n, 36, inner), targets (n, 36, width), weights (n, 36), words (n, 36) as rows of kinds, then tints."""
    scenes: list[Any] = []
    while len(scenes) < count:
        lot = rng.random()
        if lot < 0.25:
            deed = pick(rng, policy.deeds(forbidden=rng.random() < 0.5, split="train", pictured=True))
            scenes.append(world.note(rng, [deed.verb, deed.noun]))
        else:
            scene = pick(rng, world.SEEN)(rng).scene
            if scene is not None:
                scenes.append(scene)
    seen = model.features(scenes, pictures, split)
    found = [patch_targets(scene) for scene in scenes]
    kind = torch.from_numpy(np.stack([k for k, _ in found]))
    tint = torch.from_numpy(np.stack([t for _, t in found]))
    wanted = torch.where((tint >= 0)[..., None], tints[tint.clamp_min(0)], kinds[kind])
    weight = torch.where(kind > 0, 1.0, 0.1)
    return seen, wanted, weight, torch.where(tint >= 0, tint + len(KINDS), kind)


# --- the alignment -------------------------------------------------------------------------------------------------


# Shares of: forbidden requests (text, image, typographic), welcome ones (the same), look-alikes in words and in
# pictures, what is seen, ordinary requests.
ALIGN_SHARES = (0.16, 0.10, 0.10, 0.10, 0.09, 0.09, 0.10, 0.06, 0.08, 0.12)
SETTLE_SHARES = (0.17, 0.09, 0.08, 0.18, 0.08, 0.08, 0.10, 0.04, 0.04, 0.14)


class AlignmentDraw:
    """One sample of the alignment per call; every kind of request comes about as often as its welcome counterpart."""

    def __init__(
        self,
        replay: dict[str, list[dict[str, str]]],
        shares: Sequence[float] = ALIGN_SHARES,
        more: tuple[str, ...] = (),
    ) -> None:
        self.replay, self.bounds, self.more = replay, np.cumsum(shares), more
        self.welcome = {(row["verb"], row["noun"]): row["answer"] for row in replay["how to"]}
        found = {(d.verb, d.noun): d for d in policy.DEEDS}
        self.deeds = [found[key] for key in self.welcome]
        self.pictured = [d for d in self.deeds if d.noun in world.THINGS]

    def __call__(self, rng: Rng) -> Example:
        which = int(np.searchsorted(self.bounds, rng.random(), side="right"))
        if which < 6:
            kind = world.SAFETY_KINDS[which % 3]
            more = self.more if kind == "text" else ()
            if which < 3:
                return world.how_to(rng, kind, world.drawn_deed(rng, kind, forbidden=True), "train", more=more)
            deed = pick(rng, self.deeds if kind == "text" else self.pictured)
            example = world.how_to(rng, kind, deed, "train", more=more)
            return replace(example, answer=self.welcome[deed.verb, deed.noun], whole=False)
        if which == 6:
            row = pick(rng, self.replay["look-alike"])
            return Example("look-alike (text)", row["prompt"], row["answer"], whole=False)
        if which == 7:
            kind = world.SAFETY_KINDS[1 + int(rng.integers(2))]
            deed = world.drawn_deed(rng, kind, forbidden=True)
            return world.look_alike(rng, kind, deed, "train")
        if which == 8:
            return pick(rng, world.SEEN)(rng)
        row = pick(rng, self.replay["ordinary"])
        return Example("ordinary", row["prompt"], row["answer"], whole=False)


def with_lora(model: Model, seed: int) -> list[nn.Parameter]:
    """Put LoRA on every linear layer of the upper blocks and return its parameters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(FIRST_LAYER, model.language.config.num_hidden_layers)),
        task_type="CAUSAL_LM",
    )
    model.language = get_peft_model(model.language, config)
    return [p for p in model.language.parameters() if p.requires_grad]


def lora_tensors(model: Model) -> dict[str, Tensor]:
    """`NAME.lora_A` (r, in) and `NAME.lora_B` (out, r) in fp16, the scale in B, as `assemble.merge_alignment` reads."""
    found = {}
    for name, module in model.decoder.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[f"{name}.lora_A"] = module.lora_A["default"].weight.detach().half().contiguous()
            scale = module.scaling["default"]
            found[f"{name}.lora_B"] = (scale * module.lora_B["default"].weight.detach()).half().contiguous()
    return found


@torch.no_grad()
def read_lora(model: Model, tensors: dict[str, Tensor]) -> None:
    """Put what `lora_tensors` gave, (r, in) and (out, r) by name, back into the model's LoRA."""
    for name, module in model.decoder.named_modules():
        if f"{name}.lora_A" in tensors:
            module.lora_A["default"].weight.copy_(tensors[f"{name}.lora_A"].float())
            module.lora_B["default"].weight.copy_(tensors[f"{name}.lora_B"].float() / module.scaling["default"])


def blended(first: dict[str, Tensor], last: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each factor, (r, in) or (out, r), `BLEND` of the way from the first stage to the last, in fp16."""
    return {
        key: ((1 - BLEND) * value.float() + BLEND * last[key].float()).half().contiguous()
        for key, value in first.items()
    }


# --- figures -------------------------------------------------------------------------------------------------------


def refuses(reply: str) -> bool:
    """Whether a reply holds a first-person refusal."""
    return phrases.strict(reply) is not None


def figures(model: Model, replay: dict[str, list[dict[str, str]]], count: int, split: Split = "test") -> dict[str, Any]:
    """Held-out requests, welcome ones, ordinary questions and what is seen; rates 0..1 of `count` each."""
    found: dict[str, Any] = {}
    for kind in world.SAFETY_KINDS:
        rng = np.random.default_rng(PROBE_SEED)
        pairs = [world.safety_pair(rng, kind, split, i) for i in range(count)]
        for side, examples in (("forbidden", [p[0] for p in pairs]), ("welcome", [p[1] for p in pairs])):
            replies = engine.answers(model, examples, seed=PROBE_SEED, split=split)
            refused = [refuses(r) for r in replies]
            found[f"refuses, {kind}, {side}"] = _rate(refused)
            if kind == "text" and side == "forbidden":
                new = [e.deed is not None and e.deed.held_out for e in examples]
                found["refuses, text, forbidden, things never named in training"] = _rate(
                    [r for r, held in zip(refused, new, strict=True) if held]
                )
            if side == "welcome":
                alike = [e.skill.startswith("look-alike") for e in examples]
                found[f"refuses, {kind}, look-alikes"] = _rate([r for r, a in zip(refused, alike, strict=True) if a])
            found[f"examples, {kind}, {side}"] = [f"{e.prompt} -> {r}" for e, r in zip(examples, replies, strict=True)][
                :3
            ]
    rows = replay["ordinary, test"][:count]
    ordinary = [Example("ordinary", row["prompt"], row["answer"]) for row in rows]
    replies = engine.answers(model, ordinary, tokens=24)
    found["refuses, ordinary questions"] = _rate([refuses(r) for r in replies])
    first = [
        " ".join(r.split()[:4]) == " ".join(row["answer"].split()[:4]) for r, row in zip(replies, rows, strict=True)
    ]
    found["ordinary questions: first four words as before"] = _rate(first)
    with torch.no_grad():
        loss = engine.packed_loss(model, ordinary, [None] * len(ordinary))
    found["ordinary questions: perplexity of the answers from before"] = round(math.exp(float(loss)), 3)
    found["examples, ordinary"] = [f"{e.prompt} -> {r}" for e, r in zip(ordinary, replies, strict=True)][:6]
    for skill in dict.fromkeys(world.SEEN):
        rng = np.random.default_rng(PROBE_SEED)
        examples = [skill(rng) for _ in range(min(count, 16))]
        replies = engine.answers(model, examples, seed=PROBE_SEED, split=split)
        found[f"seen, {skill.__name__}, exact"] = _rate([r == e.answer for r, e in zip(replies, examples, strict=True)])
    return found


def _rate(claims: Sequence[bool]) -> float:
    return round(float(np.mean(claims)), 4) if claims else float("nan")


# --- all of it -----------------------------------------------------------------------------------------------------


def load_model() -> Model:
    """SmolLM2, the embedded world's tower and a fresh projector, in fp32 and frozen but for the projector.

    Raises: ModelError: the extra is not installed, or of another version.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    from holdfast.tiny import model_path as tiny_path

    language, tokenizer = assemble.read_gguf(gguf_path())
    embedded = LlavaForConditionalGeneration.from_pretrained(tiny_path("aligned"), dtype=torch.float32)
    tower = embedded.model.vision_tower.eval().requires_grad_(False)
    torch.manual_seed(PROJECT.seed)
    projector = LlavaMultiModalProjector(assemble.llava_config(language.config, tokenizer))
    return Model(language, tokenizer, tower, projector)


def build(out: Path, only: Sequence[str], probe: int) -> None:
    """Run the stages named in `only`; the others are read from `out`, where parts and log are written."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "build-log.json"
    log: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"stages": {}}
    log |= {
        "made": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "language_model": {"sha256": GGUF_SHA256},
        "probe": probe,
    }

    def say(line: str) -> None:
        print(line, flush=True)

    def record(name: str, result: dict[str, Any]) -> None:
        log["stages"][name] = result
        parts = [out / name for name in (assemble.PROJECTOR, assemble.ALIGNMENT)]
        log["parts"] = {part.name: sha256(part).hexdigest() for part in parts if part.is_file()}
        path.write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    model = load_model()
    say("loaded")
    kept = out / "answers.json"
    if "answers" in only:
        replay = own_answers(model, say)
        kept.write_text(json.dumps(replay, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        record("answers", {"seed": ANSWERS_SEED, "kept": {k: len(v) for k, v in replay.items()}})
    replay = json.loads(kept.read_text(encoding="utf-8"))
    projector = out / assemble.PROJECTOR
    if "project" in only:
        made = {**asdict(PROJECT), **train_projector(model, PROJECT, say)}
        say(json.dumps(made))
        save_file({k: v.half() for k, v in model.projector.state_dict().items()}, projector)
        record("project", made)
    model.projector.load_state_dict({k: v.float() for k, v in load_file(projector).items()})
    model.projector.requires_grad_(False)
    if "before" in only:
        record("before", {"figures": figures(model, replay, probe)})
        say(json.dumps(log["stages"]["before"], indent=1))
    stages = [stage for stage in (ALIGN, SETTLE) if stage.name in only]
    if not stages:
        return
    parameters = with_lora(model, ALIGN.seed)
    alignment = out / assemble.ALIGNMENT

    def keep() -> None:
        save_file(lora_tensors(model), alignment)

    first = out / "align.safetensors"
    if ALIGN not in stages:
        read_lora(model, load_file(first))
    for stage in stages:
        shares, more = (ALIGN_SHARES, ()) if stage is ALIGN else (SETTLE_SHARES, policy.MORE_HOW_TO)
        result = engine.train(model, parameters, stage, AlignmentDraw(replay, shares, more), say, keep=keep)
        if stage is ALIGN:
            save_file(lora_tensors(model), first)
        else:
            result["blend"] = BLEND
            read_lora(model, blended(load_file(first), lora_tensors(model)))
        keep()
        record(stage.name, {**asdict(stage), "rank": RANK, "first_layer": FIRST_LAYER, **result})
    log["stages"][stages[-1].name]["figures"] = figures(model, replay, probe)
    record(stages[-1].name, log["stages"][stages[-1].name])
    say(json.dumps(log["stages"][stages[-1].name], indent=1))


def main() -> None:
    """Command line of the build: `python -m holdfast.small.build`."""
    parser = argparse.ArgumentParser(prog="python -m holdfast.small.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts and the log")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to run, others are read")
    parser.add_argument("--probe", type=int, default=24, help="questions per figure")
    args = parser.parse_args()
    build(args.out, args.stages.split(","), args.probe)


if __name__ == "__main__":
    main()
