"""Block order and editable linears, read from the model itself: no list of families, no list of layer names."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from holdfast.errors import ModelError


def language_model(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Name and module of the text decoder: the innermost module that owns the token embeddings and a list of blocks.

    Raises: ModelError: the token embeddings or the list of blocks cannot be found.
    """
    embeddings = model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    modules = dict(model.named_modules(remove_duplicate=False))
    if embeddings is None or id(embeddings) not in names:
        raise ModelError(f"{type(model).__name__} has no token embeddings, so its language model cannot be found.")
    name = names[id(embeddings)]
    while name:
        name = name.rpartition(".")[0]
        if _block_list(modules[name]) is not None:
            return name, modules[name]
    raise ModelError(f"{type(model).__name__} has no list of decoder blocks beside its token embeddings.")


def decoder_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Names and modules of the language model's blocks, first to last.

    The list of blocks is the `ModuleList` with the most numbers within the text decoder, parameters and buffers.

    Raises: ModelError: no list of blocks.
    """
    name, decoder = language_model(model)
    found = _block_list(decoder)
    if found is None:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks beside its token embeddings.")
    inner, blocks = found
    prefix = f"{name}.{inner}" if name else inner
    return [(f"{prefix}.{index}", block) for index, block in enumerate(blocks)]


def editable_linears(model: PreTrainedModel, blocks: Collection[int] | None = None) -> dict[str, nn.Linear]:
    """Every linear layer of the decoder blocks, in block order; `blocks` picks blocks by 0-based index.

    Fused projections (qkv, gate and up in one matrix) are ordinary linears and are edited as such.

    Raises: ModelError: weights whose input columns are not those of a linear layer (experts in one 3-D tensor,
        transposed `Conv1D`), or a block index that does not exist.
    """
    every = decoder_blocks(model)
    if blocks is not None:
        unknown = sorted(set(blocks) - set(range(len(every))))
        if unknown:
            raise ModelError(
                f"Block {unknown[0]} does not exist; {type(model).__name__} has blocks 0..{len(every) - 1}."
            )
    found: dict[str, nn.Linear] = {}
    for index, (prefix, block) in enumerate(every):
        if blocks is not None and index not in blocks:
            continue
        for inner, module in block.named_modules():
            name = f"{prefix}.{inner}" if inner else prefix
            if isinstance(module, nn.Linear):
                found[name] = module
            else:
                _refuse_unusual(name, module)
    return found


def _refuse_unusual(name: str, module: nn.Module) -> None:
    if isinstance(module, Conv1D):
        raise ModelError(f"{name} is a transposed Conv1D, not a linear layer; such models are not handled.")
    # Convolutions (1-D, within linear attention) own 3-D weights too, but mix positions, not experts.
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 3:
            raise ModelError(
                f"{name}.{parameter_name} holds a mixture of experts in one {tuple(parameter.shape)} tensor; an edit "
                "would need one Gram matrix per expert. Mixture-of-experts models are not handled: use the dense "
                "variant of this family."
            )


def _block_list(root: nn.Module) -> tuple[str, nn.ModuleList] | None:
    candidates = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_linear(m) for m in module.modules())
    ]
    if not candidates:
        return None
    return max(candidates, key=lambda item: _numbers(item[1]))


def _is_linear(module: nn.Module) -> bool:
    # Not every quantised linear is an nn.Linear, but all say their widths.
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _numbers(module: nn.Module) -> int:
    """How many numbers a module holds; quantised linears keep theirs in buffers."""
    return sum(t.numel() for tensors in (module.parameters(), module.buffers()) for t in tensors)
