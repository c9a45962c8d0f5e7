"""End to end: calibrate a random 1B-shaped LLaVA under --memory 4GiB, then edit; peak memory, time by phase.

    python benchmarks/calibrate_1b.py [--memory 4GiB] [--safety 8] [--task 128] [--device cpu] [--work DIR] [--adapter]

The model is LLaVA-1.5's own architecture with TinyLlama-1.1B's decoder (2048 x 22, ffn 5632) and CLIP ViT-L/14-336, in
bf16 shards of random numbers; AFTER is the same with every decoder linear changed by a tenth of its size, or with
`--adapter` a LoRA of rank 16 on attention alone, of which only what it changes is calibrated. Both commands run in
processes of their own and print their peak resident memory (on a GPU, --memory bounds the device's).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ c['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def processor() -> LlavaProcessor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", image_token="<image>"
    )
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, resample=3
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def write_model(folder: Path, layers: int = 22, tower_layers: int = 24, change: float = 0.0) -> int:
    """A checkpoint of random bf16 numbers, a shard per block, without ever holding the model. Returns its bytes.

    change: standard deviation of what is added to the decoder's linears.
    """
    made = processor()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=tower_layers,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=32064,
            max_position_embeddings=4096,
        ),
        image_token_index=made.image_token_id,
        image_seq_length=576,
        dtype="bfloat16",
    )
    with init_empty_weights():
        model = LlavaForConditionalGeneration(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        block = name.split(".layers.")[1].split(".")[0] if "language_model.layers." in name else "rest"
        shards.setdefault(block, {})[name] = tensor.shape
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    generator, tuning = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for number, names in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in names.items():
            if name.endswith("position_ids"):
                tensors[name] = torch.arange(shape.numel()).reshape(shape)
            elif "norm" in name and name.endswith("weight"):
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                value = torch.randn(shape, generator=generator) * 0.02
                if change and "language_model.layers." in name:
                    value += torch.randn(shape, generator=tuning) * change
                tensors[name] = value.bfloat16()
            weight_map[name] = file
            total += tensors[name].numel() * tensors[name].element_size()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    made.save_pretrained(folder)
    return total


def write_samples(path: Path, count: int, seed: int) -> None:
    numbers = random.Random(seed)
    lines = []
    for i in range(count):
        image = Image.effect_noise((400, 320), 60 + seed).convert("RGB")
        image.save(path.parent / f"{path.stem}-{i}.png")
        words = " ".join(numbers.choice(("red", "green", "circle", "left", "two")) for _ in range(8))
        record = {
            "id": f"{path.stem}-{i}",
            "image": f"{path.stem}-{i}.png",
            "prompt": f"Describe: {words}",
            "answer": words,
        }
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")


def write_adapter(folder: Path, model: Path, layers: int, rank: int = 16) -> None:
    """A LoRA of random numbers on the attention of every block, as PEFT saves it."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"q_proj": 2048, "k_proj": 256, "v_proj": 256, "o_proj": 2048}
    tensors = {}
    for block in range(layers):
        for linear, rows in shapes.items():
            stem = f"base_model.model.model.language_model.layers.{block}.self_attn.{linear}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, 2048, generator=generator) * 0.02
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(shapes), base_model_name_or_path=str(model))
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# VmHWM is of the program after exec; getrusage's maximum would include what this process held when it forked.
COMMAND = """
import atexit, sys
from pathlib import Path

def say():
    peak = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1]
    print(f"peak {int(peak) / 2**20:.2f} GiB", flush=True)

atexit.register(say)
from holdfast.cli import main
main()
"""


def run(name: str, arguments: list[str]) -> None:
    """One holdfast command in a process of its own; prints its peak memory, wall clock and CPU seconds."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, env=environment)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: wall {time.perf_counter() - began:.0f} s, CPU {cpu:.0f} s", flush=True)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--memory", default="4GiB")
    options.add_argument("--safety", type=int, default=8)
    options.add_argument("--task", type=int, default=128)
    options.add_argument("--layers", type=int, default=22, help="decoder blocks; fewer for a quick look")
    options.add_argument("--tower-layers", type=int, default=24)
    options.add_argument("--device", default="cpu", help="of the calibration; an edit runs on the CPU")
    options.add_argument("--adapter", action="store_true", help="AFTER is a LoRA on attention")
    options.add_argument("--work", type=Path, default=None)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-1b-", dir=chosen.work) as name:
        work = Path(name)
        began = time.perf_counter()
        total = write_model(work / "model", chosen.layers, chosen.tower_layers)
        print(f"model: {total / 2**30:.2f} GiB of bf16 weights, written in {time.perf_counter() - began:.0f} s")
        write_samples(work / "safety.jsonl", chosen.safety, 1)
        write_samples(work / "task.jsonl", chosen.task, 2)
        if chosen.adapter:
            write_adapter(work / "after", work / "model", chosen.layers)
        else:
            write_model(work / "after", chosen.layers, chosen.tower_layers, change=0.002)
        command = ["calibrate", str(work / "model"), "--after", str(work / "after"), "--memory", chosen.memory]
        command += ["--safety", str(work / "safety.jsonl"), "--task", str(work / "task.jsonl")]
        command += ["--out", str(work / "curvature.safetensors"), "--device", chosen.device]
        run("calibrate", command)
        command = ["edit", str(work / "model"), str(work / "after"), "--out", str(work / "out"), "--no-verify"]
        command += ["--export", "adapter"] if chosen.adapter else []
        run("edit", [*command, "--calibration", str(work / "curvature.safetensors")])
        print(
            f"{chosen.layers} blocks, --memory {chosen.memory}, {chosen.safety} + {chosen.task} samples, "
            f"{device_name(chosen.device)}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"Python {platform.python_version()}"
        )


if __name__ == "__main__":
    main()
