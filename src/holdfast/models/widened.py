"""fp32 arithmetic over 16-bit weights: a decoder block is widened while it runs, all else for good.

A CPU without bf16 instructions multiplies bf16 matrices tens of times slower than fp32 ones, and fp16 everywhere. Where
the model does not fit into memory in fp32, its blocks stay as they are stored and cost a copy each time they run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from holdfast.models.families import decoder_blocks

_HALF = (torch.bfloat16, torch.float16)


def widen_while_running(model: PreTrainedModel) -> int:
    """Compute in fp32 from now on, block by block; returns how many bytes stay in 16 bits.

    The results are those of the whole model in fp32, bit for bit.
    """
    blocks = [block for _, block in decoder_blocks(model)]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for parameter in model.parameters():
        if parameter.dtype in _HALF and id(parameter) not in inside:
            parameter.data = parameter.data.float()
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner.named_buffers(recurse=False):
            if buffer.dtype in _HALF:
                setattr(buffer_owner, name, buffer.float())
    for block in blocks:
        block.forward = _widened(block, block.forward)  # type: ignore[method-assign]
    return sum(p.numel() * p.element_size() for block in blocks for p in block.parameters() if p.dtype in _HALF)


def _widened(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        held = [(parameter, parameter.data) for parameter in block.parameters() if parameter.dtype in _HALF]
        try:
            for parameter, data in held:
                parameter.data = data.float()
            return forward(*args, **kwargs)
        finally:
            for parameter, data in held:
                parameter.data = data

    return run


__all__ = ["widen_while_running"]
