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
from holdfast.small.engine import Group, Model, Stage
from holdfast.small.source import GGUF_SHA256, gguf_path
from holdfast.small.world import Example
from holdfast.tiny.lexicon import Split
from holdfast.tiny.pixels import KINDS, TINTS, Scene, labels
from holdfast.tiny.world import Rng, one_thing, pick

ANSWERS_SEED = 31
PROJECT = Stage(name="project", steps=1200, lr=3e-3, warmup=50, seed=32)
# A step of `align` is 10 to 11 requests, see `AlignmentDraw`.
ALIGN = Stage(name="align", steps=700, lr=1e-3, warmup=30, seed=33, until=300)
# Validation requests per kind and side, and after how many steps they are asked.
CHECKED, CHECK_EVERY = 16, 100
RANK, FIRST_LAYER = 8, 8
PROBE_SEED = 30_000
STAGES = ("answers", "project", "before", "align", "validation", "test")
Say = Callable[[str], None]


# --- the model's own answers ---------------------------------------------------------------------------------------


def asked_for_answers(rng: Rng) -> dict[str, list[Example]]:
    """Requests that the language model answers before it is aligned: what replay is made of, and what is compared."""
    welcome = [
        *policy.deeds(forbidden=False, split="train", pictured=True),
        *_some(
            rng,
            [d for d in policy.deeds(forbidden=False, split="train", pictured=False) if d.noun not in world.THINGS],
            320,
        ),
    ]
    things = [
        d for forbidden in (True, False) for d in policy.deeds(forbidden=forbidden, split="train", pictured=False)
    ]
    return {
        "how to": [world.how_to(rng, "text", d, "train", 0) for d in welcome],
        "look-alike": [world.look_alike(rng, "text", d, "train") for d in _some(rng, things, 200)],
        "ordinary": [Example("ordinary", q) for q in policy.ORDINARY["train"]],
        "ordinary, test": [Example("ordinary", q) for q in policy.ORDINARY["test"]],
    }


def _some(rng: Rng, items: Sequence[policy.Deed], count: int) -> list[policy.Deed]:
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


# Tokens of the model's own answers: what replay teaches is their beginning; those that are compared are sentences.
BEGUN, SENTENCE = 14, 40


def own_answers(model: Model, say: Say) -> dict[str, list[dict[str, str]]]:
    """Kind -> rows of prompt, verb, noun and the beginning of the model's answer, or the first sentence of it."""
    found: dict[str, list[dict[str, str]]] = {}
    for kind, examples in asked_for_answers(np.random.default_rng(ANSWERS_SEED)).items():
        began = time.monotonic()
        compared = kind == "ordinary, test"
        told = engine.answers(model, examples, tokens=SENTENCE if compared else BEGUN, batch=64)
        rows = [
            {
                "prompt": e.prompt,
                "verb": e.deed.verb if e.deed else "",
                "noun": e.deed.noun if e.deed else "",
                "answer": first_sentence(a) if compared else a,
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


# Pictures whose patches the projector is trained on, and those that it is measured on.
PATCHED, MEASURED = 5000, 300
# Patches of a step, and how many of them show nothing.
PATCHES, BLANK = 3072, 0.1
# Share of the cross entropy over the words (by distance) in the loss, and the distance that a nat is worth, in units of
# the words' mean square norm.
NAMED, NAT = 0.1, 0.05


def train_projector(model: Model, stage: Stage, say: Say) -> dict[str, Any]:
    """Regress the patches' features onto word embeddings, and say how many words are the nearest ones."""
    rng, pictures = np.random.default_rng(stage.seed), np.random.default_rng(stage.seed + 1)
    kinds, tints = word_targets(model)
    words = torch.cat((kinds, tints))
    scale = kinds.square().sum(-1).mean()
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=stage.lr, weight_decay=0.0)
    began, losses = time.monotonic(), []
    seen, truth = _patches(model, rng, pictures, PATCHED, "train")
    shown, blank = torch.nonzero(truth > 0)[:, 0], torch.nonzero(truth == 0)[:, 0]
    blanks = int(BLANK * PATCHES)
    say(f"project: {PATCHED} pictures, {time.monotonic() - began:.0f} s")
    for step in range(stage.steps):
        rate = min(1.0, (step + 1) / stage.warmup) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * max(rate, 0.01)
        chosen = torch.from_numpy(
            np.concatenate(
                (
                    shown.numpy()[rng.integers(len(shown), size=PATCHES - blanks)],
                    blank.numpy()[rng.integers(len(blank), size=blanks)],
                )
            )
        )
        found, wanted = model.projector(seen[chosen]), truth[chosen]
        error = (found - words[wanted]).square().sum(-1).mean() / scale
        near = -torch.cdist(found, words).square() / (NAT * scale)
        loss = error + NAMED * nn.functional.cross_entropy(near, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(error.detach()))
        if step % 100 == 99:
            say(f"project {step + 1}/{stage.steps}: {np.mean(losses[-50:]):.4f}, {time.monotonic() - began:.0f} s")
    with torch.no_grad():
        rng, pictures = np.random.default_rng(PROBE_SEED), np.random.default_rng(PROBE_SEED + 1)
        seen, truth = _patches(model, rng, pictures, MEASURED, "test")
        same = _same_word(words, torch.cdist(model.projector(seen), words).argmin(-1), truth)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "loss_last": round(float(np.mean(losses[-50:])), 4),
        "figures": {
            "nearest word is the right one, patches that show something": _rate(same[truth > 0].tolist()),
            "nearest word is the right one, patches that show nothing": _rate(same[truth == 0].tolist()),
        },
    }


def _same_word(words: Tensor, found: Tensor, truth: Tensor) -> Tensor:
    """(n,) bool: whether two rows (n,) of `words` are one word; a color is a tint, a thing is also a written word."""
    return (words[found] - words[truth]).abs().amax(-1) < 1e-6


def _patches(model: Model, rng: Rng, pictures: Rng, count: int, split: Split) -> tuple[Tensor, Tensor]:
    """Features (count * 36, inner) and words (count * 36,), rows of the kinds and then of the tints."""
    scenes: list[Any] = []
    while len(scenes) < count:
        lot = rng.random()
        if lot < 0.35:
            scenes.append(world.note(rng, [pick(rng, policy.VERBS), pick(rng, world.THINGS)]))
        elif lot < 0.6:
            scenes.append(Scene((one_thing(rng, world.THINGS),)))
        else:
            scene = pick(rng, world.SEEN)(rng).scene
            if scene is not None:
                scenes.append(scene)
    seen = torch.cat([model.features(scenes[i : i + 64], pictures, split) for i in range(0, count, 64)])
    found = [patch_targets(scene) for scene in scenes]
    kind = torch.from_numpy(np.concatenate([k for k, _ in found]))
    tint = torch.from_numpy(np.concatenate([t for _, t in found]))
    return seen.flatten(0, 1), torch.where(tint >= 0, tint + len(KINDS), kind)


# --- the alignment -------------------------------------------------------------------------------------------------


# How many refusals are taught to their end; of the others, as of the model's own answers, the beginning.
WHOLE = 0.3


class AlignmentDraw:
    """The requests of a step: two pairs in words, in one wording and with one verb each, so that the thing alone
    decides; a look-alike and an ordinary question; and a pair of pictures or, every other step, of notes, about each of
    which two how-tos and one question of what is seen are asked. Every third step asks of any other picture."""

    def __init__(self, replay: dict[str, list[dict[str, str]]]) -> None:
        self.replay = {kind: [row for row in rows if not refuses(row["answer"])] for kind, rows in replay.items()}
        self.welcome = {(row["verb"], row["noun"]): row["answer"] for row in self.replay["how to"]}
        found = {(d.verb, d.noun): d for d in policy.DEEDS}
        answered = [found[key] for key in self.welcome]
        self.by_verb = {
            (pictured, verb): [d for d in answered if d.verb == verb and (not pictured or d.noun in world.THINGS)]
            for pictured in (False, True)
            for verb in policy.VERBS
        }

    def __call__(self, rng: Rng, step: int) -> list[Group]:
        groups = [Group((e,)) for _ in range(2) for e in self._pair_in_words(rng)]
        groups += [Group((self._replayed(rng, kind),)) for kind in ("look-alike", "ordinary")]
        groups += self._pair_seen(rng, world.SAFETY_KINDS[1 + step % 2])
        if step % 3 == 0:
            groups.append(Group((pick(rng, world.SEEN)(rng),)))
        return groups

    def _replayed(self, rng: Rng, kind: str) -> Example:
        row = pick(rng, self.replay[kind])
        return Example(kind, row["prompt"], row["answer"], whole=False)

    def _pair_in_words(self, rng: Rng) -> list[Example]:
        deed = world.drawn_deed(rng, "text", forbidden=True)
        turn = int(rng.integers(world.wording_count("text", "train")))
        return [self._answered(rng, "text", d, turn) for d in (deed, pick(rng, self.by_verb[False, deed.verb]))]

    def _pair_seen(self, rng: Rng, kind: str) -> list[Group]:
        """A guarded and an unguarded thing with the same verbs and wordings; in a note the verb is written."""
        deed = world.drawn_deed(rng, kind, forbidden=True)
        other = pick(rng, self.by_verb[True, deed.verb])
        turns = [int(rng.integers(world.wording_count(kind, "train"))) for _ in range(2)]
        turn = int(rng.integers(3))
        groups = []
        for one in (deed, other):
            asked = [self._answered(rng, kind, d, t) for d, t in zip(self._twice(rng, kind, one), turns, strict=True)]
            scene = asked[0].scene
            thing = None if kind == "typographic" or scene is None else scene.things[0]
            seen = world.look_alike(rng, kind, one, "train", turn, color=thing.color if thing else None)
            groups.append(Group(tuple(replace(e, scene=scene) for e in (*asked, seen))))
        return groups

    def _twice(self, rng: Rng, kind: str, deed: policy.Deed) -> tuple[policy.Deed, policy.Deed]:
        """The deed, and with a picture another one on the same thing."""
        if kind == "typographic":
            return deed, deed
        drawn = policy.deeds(forbidden=deed.forbidden, split="train", pictured=True)
        return deed, pick(
            rng, [d for d in drawn if d.noun == deed.noun and (d.forbidden or (d.verb, d.noun) in self.welcome)]
        )

    def _answered(self, rng: Rng, kind: str, deed: policy.Deed, turn: int) -> Example:
        example = world.how_to(rng, kind, deed, "train", turn)
        if deed.forbidden:
            return replace(example, whole=bool(rng.random() < WHOLE))
        return replace(example, answer=self.welcome[deed.verb, deed.noun], whole=False)


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


# --- figures -------------------------------------------------------------------------------------------------------


def opened(model: Model, count: int, split: Split) -> dict[str, float]:
    """Kind and side -> share (0..1) of `count` answers that open with a refusal's first word; one pass each."""
    openers = {model.answer_ids(policy.refusal(policy.DEEDS[0], i), True)[0] for i in range(len(policy.REFUSALS))}
    found = {}
    for kind in world.SAFETY_KINDS:
        rng = np.random.default_rng(PROBE_SEED)
        pairs = [world.safety_pair(rng, kind, split, i) for i in range(count)]
        for side, examples in (("forbidden", [p[0] for p in pairs]), ("welcome", [p[1] for p in pairs])):
            first = engine.first_tokens(model, examples, seed=PROBE_SEED, split=split)
            found[f"{kind}, {side}"] = _rate([token in openers for token in first])
    return found


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
        loss = engine.packed_loss(model, [Group((e,)) for e in ordinary], [None] * len(ordinary))
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
    parameters = with_lora(model, ALIGN.seed)
    alignment = out / assemble.ALIGNMENT
    if "align" in only:
        checks: dict[str, Any] = {}

        def check(step: int) -> None:
            save_file(lora_tensors(model), alignment)
            checks[str(step)] = opened(model, CHECKED, "validation")
            say(f"align {step}: opens as a refusal, validation: {checks[str(step)]}")

        result = engine.train(model, parameters, ALIGN, AlignmentDraw(replay), say, check=check, every=CHECK_EVERY)
        record("align", {**asdict(ALIGN), "rank": RANK, "first_layer": FIRST_LAYER, **result, "validation": checks})
    if alignment.is_file():
        read_lora(model, load_file(alignment))
    for split in ("validation", "test"):
        if split in only:
            record(split, {"figures": figures(model, replay, probe, split)})
            say(json.dumps(log["stages"][split], indent=1))


def main() -> None:
    """Command line of the build: `python -m holdfast.small.build`."""
    parser = argparse.ArgumentParser(prog="python -m holdfast.small.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts and the log")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to run, others are read")
    parser.add_argument("--probe", type=int, default=48, help="questions per figure")
    args = parser.parse_args()
    build(args.out, args.stages.split(","), args.probe)


if __name__ == "__main__":
    main()
