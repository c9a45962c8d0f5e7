"""A model whose decoder blocks stay on disk: everything else is loaded, a block's weights come and go with its use.

The model's own forward runs; whoever drives it (`calibrate`) materialises the blocks that this run will reach.
"""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from holdfast.checkpoints.merged import MergedCheckpoint, open_checkpoint
from holdfast.checkpoints.tied import set_vocabulary, untie_in_memory
from holdfast.checkpoints.value import Source, as_checkpoint
from holdfast.errors import ModelError
from holdfast.models.families import decoder_blocks, family_of
from holdfast.models.loaded import LoadedModel
from holdfast.models.precision import default_device, resolve_dtype
from holdfast.models.settings import quiet_transformers, read_config, read_processor


class StreamedBlocks:
    """Loads and frees the weights of decoder blocks by index; adapters are merged as weights are read."""

    def __init__(self, model: PreTrainedModel, checkpoint: MergedCheckpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._blocks = decoder_blocks(model)
        self.nbytes = [sum(p.numel() * p.element_size() for p in block.parameters()) for _, block in self._blocks]

    def materialize(self, indices: range) -> None:
        """Read the weights of these blocks (0-based) from the checkpoint to the device."""
        for index in indices:
            prefix, block = self._blocks[index]
            _fill(block, prefix, self._checkpoint, self._device)

    def release(self, indices: range) -> None:
        """Give the memory of these blocks back; their parameters are on meta again."""
        for index in indices:
            for module in self._blocks[index][1].modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def load_streamed(
    source: Source,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> LoadedModel:
    """Like `load`, without the decoder blocks' weights: memory for the tower, the embeddings and what is materialised.

    Raises: ModelError: as `load`; also a checkpoint that stores its weights in another layout than the model holds them
        (fused on load), which only transformers' full loader can turn. CheckpointError: missing or truncated shards.
    """
    value = as_checkpoint(source)
    base = value.base
    config = read_config(base)
    target = torch.device(device) if device is not None else default_device()
    weight_dtype = resolve_dtype(dtype, config, target)
    checkpoint = open_checkpoint(value)
    if checkpoint.untied:
        untie_in_memory(config)
    set_vocabulary(config, checkpoint.vocabulary)
    if checkpoint.quantised:
        del config.quantization_config
    with quiet_transformers():
        processor = read_processor(base, config, value.adapters, settings=value.settings)
        # Buffers (rotary frequencies) are computed, not stored: they stay real.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForImageTextToText.from_config(config, dtype=weight_dtype, trust_remote_code=False)
    model.eval().requires_grad_(False)
    model.tie_weights()
    inside = [f"{name}." for name, _ in decoder_blocks(model)]
    _fill(model, "", checkpoint, target, skip=tuple(inside))
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner.named_buffers(recurse=False):
            setattr(buffer_owner, name, buffer.to(target))
    model.tie_weights()
    return LoadedModel(
        model=model,
        processor=processor,
        name=str(value),
        family=family_of(config),
        source=value,
        blocks_on_disk=StreamedBlocks(model, checkpoint, target),
    )


@torch.no_grad()
def _fill(
    root: nn.Module, prefix: str, checkpoint: MergedCheckpoint, device: torch.device, skip: tuple[str, ...] = ()
) -> None:
    """Give every parameter (and stored buffer) below `root` its value from disk, in the parameter's dtype."""
    filled: dict[int, nn.Parameter] = {}
    for inner, module in root.named_modules():
        path = ".".join(part for part in (prefix, inner) if part)
        if skip and f"{path}.".startswith(skip):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled:
                value = _read(checkpoint, f"{path}.{name}" if path else name, parameter)
                filled[id(parameter)] = nn.Parameter(value.to(device, parameter.dtype), requires_grad=False)
            setattr(module, name, filled[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            key = checkpoint.names.find(f"{path}.{name}" if path else name)
            if key is not None and tuple(checkpoint.entries[key].shape) == tuple(buffer.shape):
                setattr(module, name, checkpoint.read(key).to(device, buffer.dtype))


def _read(checkpoint: MergedCheckpoint, name: str, parameter: nn.Parameter) -> torch.Tensor:
    key = checkpoint.names.find(name)
    if key is None:
        raise ModelError(
            f"{checkpoint.folder} stores no tensor for {name}: this family's weights are regrouped when they are "
            "loaded, so its blocks cannot be streamed from disk. Allow enough memory for the whole model."
        )
    shape = tuple(checkpoint.entries[key].shape)
    if shape != tuple(parameter.shape):
        raise ModelError(
            f"{checkpoint.folder}: {key} is {shape} on disk and {tuple(parameter.shape)} by config.json; weights and "
            "configuration belong to different models."
        )
    return checkpoint.read(key) if checkpoint.is_plain(key) else checkpoint.read_float(key)
