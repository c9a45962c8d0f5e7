"""bf16 on this CPU: a matrix product against fp32, and a model in its three forms.

    OMP_NUM_THREADS=1 python benchmarks/bf16_on_cpu.py

A CPU without bf16 instructions emulates them. `load` then computes in fp32: it widens the weights (twice the memory),
or, where they would not fit, keeps them in bf16 and widens each decoder block while it runs. The model is a LLaVA of
random weights, four blocks of width 1024: 256 tokens at once, then one token more, as when an answer is written.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from holdfast.models.precision import cpu_has_bf16
from holdfast.models.widened import widen_while_running

PROMPT = 256


def gigaflops(dtype: torch.dtype, size: int, repeats: int) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return repeats * 2 * size**3 / (time.perf_counter() - began) / 1e9


def build() -> Any:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=2000,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval().bfloat16()


@torch.no_grad()
def measure(model: Any) -> tuple[float, float, float]:
    """(GB of weights, seconds for the prompt, seconds for one more token), the best of three."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    ids = torch.arange(PROMPT)[None] + 10
    times = []
    for _ in range(3):
        began = time.perf_counter()
        found = model(input_ids=ids, use_cache=True)
        prompt = time.perf_counter() - began
        began = time.perf_counter()
        model(input_ids=ids[:, :1], past_key_values=found.past_key_values)
        times.append((prompt, time.perf_counter() - began))
    return weights, min(t for t, _ in times), min(t for _, t in times)


def main() -> None:
    print(f"bf16 instructions: {'yes' if cpu_has_bf16() else 'no'}")
    wide = gigaflops(torch.float32, 1024, 4)
    narrow = gigaflops(torch.bfloat16, 1024, 1)
    print(f"fp32 {wide:.1f} GF/s, bf16 {narrow:.2f} GF/s, fp32 {wide / narrow:.0f} times as fast")
    forms = {"bf16 as stored": build(), "fp32 whole": build().float(), "bf16, block by block": build()}
    widen_while_running(forms["bf16, block by block"])
    print(f"{'':<22} {'weights':>9} {f'{PROMPT} tokens':>11} {'one token':>10}")
    for name, model in forms.items():
        weights, prompt, token = measure(model)
        print(f"{name:<22} {weights:6.3f} GB {prompt:9.3f} s {token * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
