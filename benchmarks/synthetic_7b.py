"""Synthetic checkpoints of LLaVA-1.5-7B's shapes for the benchmarks: real bytes, or headers over holes.

Not a benchmark itself. Blocks are those of the language model; the tower and the projector are left out unless said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.writer import OutputTensor, Shard, plan_shards, shard_index

WIDTH, HIDDEN, VOCAB, BLOCKS_7B = 4096, 11008, 32064, 32
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}
# Bytes of llava-hf/llava-1.5-7b-hf: 7.06 billion parameters of two bytes.
BYTES_7B = 2 * 7_063_427_072
LLAVA, LLAMA = "language_model.model.", "model."


def tensors(blocks: int, prefix: str = LLAVA) -> list[OutputTensor]:
    """Names and shapes in bf16, in the order of the file."""
    head = "lm_head.weight" if prefix == LLAMA else "language_model.lm_head.weight"
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (VOCAB, WIDTH)}
    for block in range(blocks):
        for name, shape in LINEARS.items():
            shapes[f"{prefix}layers.{block}.{name}.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}layers.{block}.{norm}.weight"] = (WIDTH,)
    shapes[f"{prefix}norm.weight"] = (WIDTH,)
    shapes[head] = (VOCAB, WIDTH)
    return [OutputTensor(n, "BF16", s, 2 * torch.Size(s).numel()) for n, s in shapes.items()]


def write_checkpoint(
    folder: Path, blocks: int, *, seed: int, change: float = 0.0, shard_bytes: int = 256 << 20, prefix: str = LLAVA
) -> int:
    """Random weights of scale 0.02, plus a random change of that relative size to every linear; returns the bytes.

    Two calls with one seed and different `change` are BEFORE and AFTER of one tuning.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    # One tile of random numbers, rolled for each tensor: drawing 7 billion takes longer than the benchmark.
    tile = (torch.randn(1 << 24, generator=generator) * 0.02).to(torch.bfloat16)
    noise = torch.randn(1 << 24, generator=generator) * 0.02 * change
    shards = plan_shards(tensors(blocks, prefix), shard_bytes=shard_bytes)
    for number, shard in enumerate(shards):
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            for tensor in shard.tensors:
                count = tensor.nbytes // 2
                roll = (number * 7919 + len(tensor.name) * 104_729 + count) % (1 << 24)
                values = tile.roll(roll)
                if change and "_proj" in tensor.name:
                    values = (values.float() + noise.roll(2 * roll)).to(torch.bfloat16)
                raw = values.view(torch.uint8).numpy()
                for start in range(0, tensor.nbytes, len(raw)):
                    file.write(raw[: min(len(raw), tensor.nbytes - start)])
            file.flush()
            os.fsync(file.fileno())
    write_config(folder, blocks, prefix, shards)
    return sum(shard.nbytes for shard in shards)


def sparse_checkpoint(folder: Path, blocks: int = BLOCKS_7B) -> None:
    """The headers of a checkpoint over holes: for what must not read the weights at all."""
    folder.mkdir(parents=True)
    shards = plan_shards(tensors(blocks), shard_bytes=4 << 30)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    write_config(folder, blocks, LLAVA, shards)


def write_config(folder: Path, blocks: int, prefix: str, shards: Sequence[Shard]) -> None:
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(shard_index(shards)))
    text = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
    }
    config = text if prefix == LLAMA else {"model_type": "llava", "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, blocks: int, *, rank: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """A PEFT LoRA on every linear of the decoder; returns the bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for block in range(blocks):
        for name, (r, c) in LINEARS.items():
            key = f"base_model.model.model.language_model.layers.{block}.{name}"
            factors[f"{key}.lora_A.weight"] = (torch.randn(rank, c, generator=generator) * 0.02).to(dtype)
            factors[f"{key}.lora_B.weight"] = (torch.randn(r, rank, generator=generator) * 0.01).to(dtype)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(t.numel() * t.element_size() for t in factors.values())


def curvature(blocks: int) -> Curvature:
    """Random diagonals of the right widths, spread over three orders of magnitude as measured ones are."""
    generator = torch.Generator().manual_seed(2)

    def side() -> dict[str, torch.Tensor]:
        return {
            f"model.language_model.layers.{b}.{name}": torch.exp(torch.randn(c, generator=generator))
            for b in range(blocks)
            for name, (_, c) in LINEARS.items()
        }

    safety = side()
    names = {name: int(name.split("layers.")[1].split(".")[0]) for name in safety}
    return Curvature(safety=safety, task=side(), meta={"blocks": names, "block_count": blocks})


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages, so that the next read is from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def memory_mb(field: str = "VmHWM") -> float:
    """Peak (VmHWM) or present (VmRSS) resident memory of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} in /proc/self/status")


def in_clean_process(code: str, *arguments: str, python: str = sys.executable, threads: int = 2) -> dict:
    """Run a program that prints one JSON object as its last line."""
    # Spin-waiting OpenMP threads would fight the reading and the writing thread for two cores.
    settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def workplace(parent: Path | None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=parent) as place:
        yield Path(place)
