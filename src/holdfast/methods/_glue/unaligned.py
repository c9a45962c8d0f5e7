"""The model without its alignment, which some rivals compare theta_0 with: is it there, and does it fit?"""

from __future__ import annotations

import torch

from holdfast.checkpoints.merged import open_checkpoint
from holdfast.errors import ConfigError
from holdfast.stream.protocol import TaskContext

# Not linear layers of the language model.
_NOT_TUNED = ("vision", "visual", "embed", "head", "projector")


def require_fit(ctx: TaskContext, unaligned: str, name: str) -> None:
    """Before a task is learned: `unaligned` has every weight of theta_0 that may be tuned, in its shape, and is not it.

    name: of the method that asks.

    Raises: ConfigError: it has not, or has the same values in all of them. ModelError, CheckpointError: it cannot be
        read.
    """
    moved = False  # an alignment may leave layers alone, but not all
    with open_checkpoint(ctx.theta_0) as aligned, open_checkpoint(unaligned) as other:
        for key, entry in aligned.entries.items():
            if len(entry.shape) != 2 or any(part in key for part in _NOT_TUNED):
                continue
            there_as = other.names.find(key)
            found = None if there_as is None else other.entries[there_as]
            if found is None or tuple(found.shape) != tuple(entry.shape):
                there = "has none" if found is None else f"has it with shape {tuple(found.shape)}"
                raise ConfigError(
                    f"{name}: unaligned is {unaligned!r}, and {key} of the model that is tuned has shape "
                    f"{tuple(entry.shape)}; {unaligned} {there}. Name the same model as it was before its alignment."
                )
            if not moved and there_as is not None:
                moved = not torch.equal(aligned.read_float(key), other.read_float(there_as))
    if not moved:
        raise ConfigError(
            f"{name}: unaligned is {unaligned!r}, whose weights are those of the model that is tuned: nothing tells "
            "what its alignment changed. Name the same model as it was before its alignment."
        )


__all__ = ["require_fit"]
