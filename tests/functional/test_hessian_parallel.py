"""Grams of two processes become one: the same bits in both, whatever each has seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from holdfast.functional.hessian import InputGram

WORKER = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from holdfast.functional.hessian import InputGram

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
batches = load_file(f"{folder}/batches.safetensors")
results = {}
for case in sorted({name.split("/")[0] for name in batches}):
    gram = InputGram(48)
    for name in sorted(batches):
        if name.startswith(f"{case}/{rank}/"):
            gram.update(batches[name])
    gram.all_reduce()
    results |= {
        f"{case}/counts": torch.tensor([gram.sequences, gram.tokens, int(gram.form == "dual")]),
        f"{case}/hessian": gram.hessian(),
        f"{case}/diagonal": gram.inverse_diagonal(),
    }
save_file(results, f"{folder}/rank{rank}.safetensors")
dist.destroy_process_group()
"""


def test_two_processes_end_with_the_sums_of_one(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)

    def batch(tokens: int) -> torch.Tensor:
        return torch.randn(2, tokens, 48, generator=g)

    cases = {
        "many tokens": ([batch(40)], [batch(25), batch(30)]),
        "few tokens": ([batch(3)], [batch(5)]),
        "few on one side": ([batch(40)], [batch(4)]),
        "few each, many together": ([batch(7)], [batch(9)]),
        "one saw nothing": ([], [batch(40)]),
        "one saw nothing, the other little": ([batch(4)], []),
    }
    batches = {
        f"{case}/{rank}/{i}": x
        for case, parts in cases.items()
        for rank, part in enumerate(parts)
        for i, x in enumerate(part)
    }
    save_file(batches, tmp_path / "batches.safetensors")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [w.wait(timeout=200) for w in workers] == [0, 0]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    for case, parts in cases.items():
        alone = InputGram(48)
        for x in (x for part in parts for x in part):
            alone.update(x)
        for name in ("counts", "hessian", "diagonal"):
            assert torch.equal(first[f"{case}/{name}"], second[f"{case}/{name}"]), (case, name)
        assert first[f"{case}/counts"].tolist() == [alone.sequences, alone.tokens, int(alone.form == "dual")], case
        torch.testing.assert_close(first[f"{case}/hessian"], alone.hessian(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(first[f"{case}/diagonal"], alone.inverse_diagonal(), rtol=1e-6, atol=0)


def test_without_a_group_nothing_happens() -> None:
    gram = InputGram(8).update(torch.ones(1, 9, 8))
    assert gram.all_reduce() is gram and gram.tokens == 9
