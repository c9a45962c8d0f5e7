"""What an anchored edit of an adapter keeps on the task's inputs and moves on safety's, layer by layer.

    python benchmarks/anchor_layers.py ADAPTER --task STORE --safety STORE --benign STORE [--more STORE]

STORE: a folder of Gram matrices, as `small_sweep.py` leaves them in OUT/.../shared. --more: of those and further
samples of the task; what it has seen beyond --task is held out. In %, medians over the layers: how much of what the
tuning changed in a layer's outputs on its inputs is kept (1 - |(E - D) x|^2 / |D x|^2), how much is left on safety
inputs (|E x|^2 / |D x|^2), and how long the edited change is (|E| / |D|).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from five_seeds import names
from holdfast.checkpoints.gram_store import GramStore
from holdfast.functional.anchor import AnchorGrams, AnchorStrength
from holdfast.rules.anchor import AnchorConfig

_USUAL = AnchorConfig().damping


def factors(folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, A, M) of every layer of the adapter: |s B v|^2 is v^T M v, whatever the rows of B are."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, lora_a in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_A\.weight", name)
        if found:
            lora_b = tensors[name.replace("lora_A", "lora_B")].double() * scale
            yield found[1], lora_a.double(), lora_b.T @ lora_b


def energy(lora_a: Tensor, metric: Tensor, gram: Tensor | None = None) -> float:
    """Mean |s B A x|^2 over the inputs of `gram`; without one |s B A|^2. lora_a: (rank, c); metric: (rank, rank)."""
    seen = lora_a if gram is None else lora_a @ gram
    return float(torch.einsum("rc,rc->", metric @ lora_a, seen))


def tokens(store: GramStore) -> int:
    """How many tokens a store has seen."""
    return store.entry(next(iter(store.modules))).tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    for name in ("task", "safety", "benign", "more"):
        parser.add_argument(f"--{name}", type=Path, required=name != "more")
    parser.add_argument("--damping", type=names, default=["0.0003", "0.003", "0.03", "0.3", "1"])
    parser.add_argument("--weight", type=names, default=["1", "0.3"])
    parser.add_argument("--benign-share", type=float, default=0.6)
    args = parser.parse_args()
    task, safety, benign = (GramStore.open(folder) for folder in (args.task, args.safety, args.benign))
    more = GramStore.open(args.more) if args.more else None
    rows: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    largest, below = [], []
    for adapter_name, lora_a, metric in factors(args.adapter):
        (layer,) = (name for name in task.modules if adapter_name.endswith(name.removeprefix("model.")))
        on_task, on_safety = task.gram(layer).double(), safety.gram(layer).double()
        hold = on_safety * (1 - args.benign_share) + benign.gram(layer).double() * args.benign_share
        seen = [on_task]
        if more is not None:
            few, many = tokens(task), tokens(more)
            seen.append((more.gram(layer).double() * many - on_task * few) / (many - few))
        spectrum = torch.linalg.eigvalsh(on_task)
        largest.append(float(spectrum[-1] / spectrum.sum()))
        below.append(float((spectrum < _USUAL * spectrum.mean()).double().mean()))
        for damping in args.damping:
            grams = AnchorGrams(on_task, hold, damping=float(damping))
            for weight in args.weight:
                edited = grams.factor(AnchorStrength(safety_weight=float(weight))).apply(lora_a)
                kept = [1 - energy(edited - lora_a, metric, gram) / energy(lora_a, metric, gram) for gram in seen]
                left = energy(edited, metric, on_safety) / energy(lora_a, metric, on_safety)
                length = (energy(edited, metric) / energy(lora_a, metric)) ** 0.5
                rows[damping, weight].append([*kept, left, length])
    headings = ["lam", "mu_s", "kept", *(["kept, held out"] if more else []), "left on safety", "length"]
    print(
        f"the task's Grams: the largest direction has {100 * statistics.median(largest):.0f} % of the trace (at most "
        f"{100 * max(largest):.0f} %), {100 * statistics.median(below):.0f} % of the directions have less than "
        f"{_USUAL:g} of the mean (medians)\n"
    )
    print("| " + " | ".join(headings) + " |\n|" + "---:|" * len(headings))
    for (damping, weight), found in rows.items():
        cells = (f"{100 * statistics.median(column):.1f}" for column in zip(*found, strict=True))
        print(f"| {damping} | {weight} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
