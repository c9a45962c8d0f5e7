"""A base that one device cannot hold: every process keeps its shard of each decoder block (FSDP2).

Embeddings, head and vision tower stay whole on every device; the blocks are nearly all of a large model. Tensors that
are trained are made later and stay whole too: they are small. All processes run every forward pass together, for each
gathers a block's weights from all of them while the block runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from holdfast.checkpoints.value import Source, as_checkpoint
from holdfast.errors import ModelError
from holdfast.models.families import decoder_blocks
from holdfast.models.loaded import LoadedModel
from holdfast.models.streaming import load_streamed
from holdfast.models.tuner import is_tuner_folder
from holdfast.share import current


def load_shards(source: Source, *, dtype: torch.dtype | str | None = None) -> LoadedModel:
    """The model of `source`, frozen, with its blocks shared out over the processes of `current()`.

    Each block is read whole by every process and cut at once: no process ever holds more than one.

    Raises: ModelError: a tuner's folder on top; otherwise as `load_streamed`.
    """
    share = current()
    adapters = as_checkpoint(source).adapters
    if adapters and is_tuner_folder(adapters[-1]):
        raise ModelError(
            f"{adapters[-1]} decides per request which adapters answer, which a base that is shared out over several "
            "processes cannot do. Run it on devices that hold the base."
        )
    streamed = load_streamed(source, dtype=dtype, device=share.device)
    store, blocks = streamed.blocks_on_disk, decoder_blocks(streamed.model)
    assert store is not None
    mesh = init_device_mesh(share.device.type, (share.world,))
    for index, (_, block) in enumerate(blocks):
        store.materialize(range(index, index + 1))
        fully_shard(block, mesh=mesh)
    return LoadedModel(
        model=streamed.model,
        processor=streamed.processor,
        name=streamed.name,
        family=streamed.family,
        source=streamed.source,
    )


def is_sharded(model: Any) -> bool:
    """Whether a model's blocks are shared out."""
    return any(isinstance(p, DTensor) for p in model.parameters())
