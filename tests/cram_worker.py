"""One of two processes: both phases under FSDP2; rank 0 also learns alone, to compare."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))

import cram_kit
from holdfast.models.encode import encode_training
from holdfast.models.families import decoder_blocks
from holdfast.models.load import load
from holdfast.tuners.cram.objective import BatchFeatures, CramTraining, buffer_factors
from holdfast.tuners.cram.phases import consolidate, history_rows
from holdfast.tuners.cram.router import card_from_features


def learn(folder: Path, pictures: Path, accelerator: Accelerator | None) -> dict[str, torch.Tensor]:
    """Two steps of SGD on the buffer, consolidation, two steps on the expert; each rank sees half of each batch."""
    tasks = cram_kit.requests(pictures)
    factors, phases = None, []
    for stable in (False, True):
        loaded = load(folder)
        cram = cram_kit.with_experts(loaded, {"warm": tasks["warm"]}, groups=(0,), sigma_scale=50.0)
        samples = tasks["cold"]
        features = cram.features(samples)
        card, _ = card_from_features("cold", 0, features, cram.config, seed=0)
        extras = BatchFeatures(samples, features)
        training = CramTraining(cram, factors or buffer_factors(cram, seed=0), card, stable=stable)
        if accelerator is not None:
            mesh = init_device_mesh("cpu", (2,))
            for _, block in decoder_blocks(loaded.model):
                fully_shard(block, mesh=mesh)
            fully_shard(training, mesh=mesh)
            assert hasattr(training.cram.layers[0].trained_a, "full_tensor"), "the trained factors are sharded too"
        optimizer = torch.optim.SGD([p for p in training.parameters() if p.requires_grad], lr=0.5)
        for number in range(2):
            # Answers of one length, so that a mean over the batch is the mean of two means over its halves.
            batch = [samples[i] for i in ((0, 2, 4, 6), (8, 10, 0, 2))[number]]
            if accelerator is not None:
                batch = batch[accelerator.process_index :: 2]
            inputs = {**encode_training(loaded, batch), **extras(batch)}
            loss = training(**inputs).loss
            loss = loss + training.penalty(training, inputs, None)
            accelerator.backward(loss) if accelerator is not None else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        factors = training.factors()
        history = history_rows(cram, 0)
        training.unload()
        if accelerator is not None:
            accelerator.free_memory()
        phases.append(factors)
        if not stable:
            made = consolidate(factors, history, cram.config, seed=0)
            factors = {n: (e.lora_a, e.lora_b) for n, e in made.items()}
    return {f"{n}.{k}": t.contiguous() for n, pair in phases[1].items() for k, t in zip("AB", pair, strict=True)}


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    rank = accelerator.process_index
    (out / f"pictures{rank}").mkdir()
    save_file(learn(folder, out / f"pictures{rank}", accelerator), out / f"rank{rank}.safetensors")
    if rank == 0:
        save_file(learn(folder, out / f"pictures{rank}", None), out / "single.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main()
