"""A training step of CRAM (older experts routed, penalty on) against PEFT LoRA of the new expert's rank, and routing.

    python benchmarks/cram_train_step.py --out cram_train_step.json

A line per number of older experts. One LLaVA with random weights; both sides tune the same attention linears, on the
same batch, in turn. The routing's share of a prefill is measured on the same model: everything that `serving` adds in
front of the first block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from holdfast.files import write_json
from holdfast.functional.cram import RankRule
from holdfast.models.loaded import LoadedModel
from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.model import Cram, find_targets
from holdfast.tuners.cram.objective import CramTraining
from holdfast.tuners.cram.router import ExpertCard, Features, Router

IMAGE = 1
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: with --threads 1, on a machine that others use


class Tokenizer:
    """Words are their length: the router's text side needs ids, not language."""

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        del add_special_tokens
        return {"input_ids": [[2 + len(w) % 900 for w in t.split()] for t in texts]}


@dataclass
class Processor:
    """What `LoadedModel` asks of a processor here."""

    tokenizer: Tokenizer
    image_token_id: int = IMAGE


def build(width: int, blocks: int, dtype: torch.dtype) -> LoadedModel:
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            vocab_size=1000,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=112,
            patch_size=14,
        ),
        image_token_index=IMAGE,
        image_seq_length=64,
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)
    return LoadedModel(model=model, processor=Processor(Tokenizer()), name="random LLaVA")


def batch_of(loaded: LoadedModel, size: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 1000, (size, tokens), generator=torch.Generator().manual_seed(1))
    ids[:, 4:68] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "pixel_values": torch.randn(size, 3, 112, 112, dtype=loaded.dtype),
    }


def card(name: str, width: int, ranks: dict[str, int]) -> ExpertCard:
    return ExpertCard(
        name=name,
        group=0,
        samples=10,
        images=10,
        text_centroid=torch.randn(width),
        text_scatter=1.0,
        image_centroid=torch.randn(1, width),
        image_scatter=float(width) ** 0.5 * 4,
        text_floor=None,
        image_radius=None,
        ranks=ranks,
    )


def attach(loaded: LoadedModel, experts: int, rank: int) -> Cram:
    # No dropout on either side: PEFT would pay for it in the same way.
    config = CramConfig(dropout=0.0, abstain="off", rank=RankRule(r_min=1, r_max=rank), sigma_scale=1.0)
    targets = find_targets(loaded.model, config)
    factors = [
        {
            n: (torch.randn(rank, m.in_features) * 0.01, torch.randn(m.out_features, rank) * 0.01)
            for n, (_, m) in targets.items()
        }
        for _ in range(experts)
    ]
    width = loaded.model.config.text_config.hidden_size
    cards = [card(f"task{i}", width, dict.fromkeys(targets, rank)) for i in range(experts)]
    return Cram(loaded, Router(config, cards), factors)


def steps(loaded: LoadedModel, inputs: dict[str, torch.Tensor], old: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of each side, in turn; forward, backward and AdamW."""
    size, width = inputs["input_ids"].shape[0], loaded.model.config.text_config.hidden_size
    times: dict[str, list[float]] = {"peft": [], "cram": []}
    features = Features(
        text=torch.randn(size, width), image=torch.randn(size, width), has_image=torch.ones(size, dtype=torch.bool)
    )
    extras = {"cram_text": features.text, "cram_image": features.image, "cram_has_image": features.has_image}
    for _ in range(args.rounds):
        names = list(find_targets(loaded.model, CramConfig()))
        lora = LoraConfig(r=args.rank, lora_alpha=args.rank, lora_dropout=0.0, target_modules=names)
        wrapped = get_peft_model(loaded.model, lora)
        times["peft"] += run(wrapped, inputs, None, args)
        wrapped.unload()
        loaded.model.requires_grad_(False)
        cram = attach(loaded, old, args.rank)
        new = {
            p.name: (torch.randn(args.rank, p.in_features), torch.zeros(p.out_features, args.rank)) for p in cram.layers
        }
        training = CramTraining(cram, new, card("new", width, {}), stable=True)
        times["cram"] += run(training, {**inputs, **extras}, training.penalty, args)
        training.unload()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "peft_step_s": round(medians["peft"], 4),
        "cram_step_s": round(medians["cram"], 4),
        "cram_over_peft": round(medians["cram"] / medians["peft"], 4),
        "of_fastest": round(min(times["cram"]) / min(times["peft"]), 4),
    }


def run(model: Any, inputs: dict[str, torch.Tensor], penalty: Any, args: argparse.Namespace) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    found = []
    for _ in range(args.inner + 1):
        started = CLOCKS[args.clock]()
        outputs = model(**inputs)
        loss = outputs.loss if penalty is None else outputs.loss + penalty(model, inputs, outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(CLOCKS[args.clock]() - started)
    model.eval()
    return found[1:]  # the first step warms up


@torch.inference_mode()
def routing(loaded: LoadedModel, inputs: dict[str, torch.Tensor], old: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a prefill, and of all that choosing experts adds to it (not of the experts themselves)."""
    from holdfast.data.types import Sample

    cram = attach(loaded, old, args.rank)
    size = inputs["input_ids"].shape[0]
    samples = [Sample.single(str(i), f"what is in picture number {i} of this series?") for i in range(size)]
    asked = {k: v for k, v in inputs.items() if k != "labels"}
    hidden = torch.randn(
        size, inputs["input_ids"].shape[1], loaded.model.config.text_config.hidden_size, dtype=loaded.dtype
    )
    prefills, choices = [], []
    for _ in range(args.rounds * args.inner + 1):
        started = CLOCKS[args.clock]()
        with cram.serving(samples):
            loaded.model(**asked)
        prefills.append(CLOCKS[args.clock]() - started)
        started = CLOCKS[args.clock]()
        text = cram.encoder.text(samples)
        image, has_image = cram.encoder.pool(hidden, inputs["input_ids"])
        cram.decide(Features(text=text, image=image, has_image=has_image))
        choices.append(CLOCKS[args.clock]() - started)
    cram.detach()
    prefill, choice = statistics.median(prefills[1:]), statistics.median(choices[1:])
    return {"prefill_s": round(prefill, 4), "routing_s": round(choice, 5), "routing_share": round(choice / prefill, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rank", type=int, default=9)
    parser.add_argument("--old-experts", type=int, nargs="+", default=[1, 3, 9])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--inner", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = build(args.width, args.blocks, getattr(torch, args.dtype))
    inputs = batch_of(loaded, args.batch, args.tokens)
    rows = []
    for old in args.old_experts:
        rows.append({"old_experts": old, **steps(loaded, inputs, old, args), **routing(loaded, inputs, old, args)})
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "old_experts")}
        write_json(args.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
