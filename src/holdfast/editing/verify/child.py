"""The clean process of the no-op guard: load an export as any user would, and say what came out.

Run as `python -m holdfast.editing.verify.child REQUEST.json`. The request: `export` (the folder), `kind` (dense |
adapter), `base` and `base_adapters` (what an adapter goes on), `after` (the folder that a dense export must have the
tensors of), `modules` {name in memory: stored type}, `input_ids` (or null: the model is not run), `result` (a JSON file
to write) and `logits` (a safetensors file to write).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from holdfast.bounds import bounded
from holdfast.checkpoints.naming import NameIndex, strip_peft_prefix
from holdfast.checkpoints.value import Checkpoint
from holdfast.errors import AdapterError


def tensor_hash(tensor: Tensor, dtype: torch.dtype) -> str:
    """sha256 of a tensor's bytes in its stored type.

    tensor: of any shape.
    """
    raw = tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy()).hexdigest()  # type: ignore[arg-type]


def module_index(model: nn.Module) -> NameIndex:
    """Finds a module of a live model under any spelling of its name."""
    return NameIndex([name for name, _ in model.named_modules() if name], what="the loaded model")


def probe_ids(config: Any, *, sequences: int = 2, length: int = 12) -> list[list[int]]:
    """Token ids that stand for text in any vocabulary: none that the configuration gives a meaning (image, padding)."""
    special: set[int] = set()

    def collect(value: Any, key: str = "") -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                collect(item, str(name))
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item, key)
        elif isinstance(value, int) and "token" in key:
            special.add(value)

    collect(config.to_dict())
    allowed = [i for i in range(config.get_text_config().vocab_size) if i not in special]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(allowed), (sequences, length), generator=generator)
    return [[allowed[i] for i in row] for row in picks.tolist()]


def forward(model: Any, input_ids: Sequence[Sequence[int]]) -> Tensor:
    """Logits (sequences, tokens, vocabulary), fp32 on the CPU."""
    device = next(model.parameters()).device
    ids = torch.tensor(input_ids, device=device)
    with torch.no_grad():
        answer: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return answer.logits.float().cpu()


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """LoRA layers of a PEFT model that are switched on and were given their factors, by the layer they sit on."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {}
    modules: Any = model.named_modules()
    for name, module in modules:
        if not isinstance(module, LoraLayer) or module.disable_adapters:
            continue
        for active in module.active_adapters:
            # A factor that the file did not have stays without memory when the base has none.
            b = _factor_b(module, active)
            if b is not None and not b.is_meta:
                found[strip_peft_prefix(name)] = module
    return found


def _factor_b(layer: Any, adapter: str) -> Tensor | None:
    """B of a LoRA layer, an embedding's too.

    Returns: (out, rank), or a convolution's (out, rank, 1, 1).
    """
    if adapter in layer.lora_B:
        b: Tensor = layer.lora_B[adapter].weight
        return b
    found: Tensor | None = dict(layer.lora_embedding_B).get(adapter)
    return found


def adapter_modules(model: nn.Module) -> dict[str, Any]:
    """Of `lora_layers`, those that do something: B is not all zero."""
    return {
        name: layer
        for name, layer in lora_layers(model).items()
        if any(b is not None and bool(b.any()) for b in (_factor_b(layer, name) for name in layer.active_adapters))
    }


def attach_input_scale(model: nn.Module, folder: Path) -> int:
    """Apply an edited adapter's input-scaling vectors to the base layers of a PEFT model; returns how many there are.

    W diag(scale) x = W (scale * x): a forward pre-hook on the base layer, which the LoRA branch does not pass through.
    """
    from holdfast.checkpoints.adapter import LoraAdapter

    adapter = LoraAdapter(folder)
    names = module_index(model)
    for module in adapter.input_scale:
        scale = adapter.read_scale(module)
        if scale is None:
            continue
        layer: Any = model.get_submodule(names.require(f"base_model.model.{module}"))

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], scale: Tensor = scale) -> tuple[Tensor, ...]:
            return (inputs[0] * scale.to(inputs[0]), *inputs[1:])

        layer.base_layer.register_forward_pre_hook(hook)
    adapter.close()
    return len(adapter.input_scale)


def copy_extra_weights(model: nn.Module, folder: Path) -> None:
    """Put the trained weights that lie beside an adapter into a model, as the tool that saved them does.

    Raises: AdapterError: pickled, or not this model's.
    """
    from holdfast.checkpoints.contents import require_safe_adapter

    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    names = NameIndex(parameters, what="the base model")
    for path in require_safe_adapter(folder):
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for key in file.keys():  # noqa: SIM118  (no mapping)
                parameters[names.require(strip_peft_prefix(key))].copy_(file.get_tensor(key))


def _load(request: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    from holdfast.checkpoints.adapter import LoraAdapter
    from holdfast.checkpoints.tied import set_vocabulary
    from holdfast.models.load import load
    from holdfast.models.merge import PEFT_SECONDS, resize_vocabulary
    from holdfast.models.settings import quiet_transformers, read_config

    dense = request["kind"] == "dense"
    rows = None
    if not dense:
        adapter = LoraAdapter(request["export"])
        rows = adapter.vocabulary
        adapter.close()
    with quiet_transformers():
        if request["input_ids"] is None:
            from accelerate import init_empty_weights
            from transformers import AutoModelForImageTextToText

            with init_empty_weights():
                config = read_config(request["export"] if dense else request["base"])
                set_vocabulary(config, rows)
                model: Any = AutoModelForImageTextToText.from_config(config)
            if not dense:
                _stand_in(model, torch.float64 if "float64" in request["modules"].values() else torch.float32)
        elif dense:
            model = load(request["export"], dtype=torch.float32, device="cpu").model
        else:
            base = Checkpoint(base=request["base"], adapters=tuple(request["base_adapters"]))
            model = load(base, dtype=torch.float32, device="cpu").model
            resize_vocabulary(model, rows)
        if dense:
            return model, {}
        from peft import PeftModel

        without_weights = request["input_ids"] is None
        if not without_weights:
            copy_extra_weights(model, Path(request["export"]))
        with bounded(f"{request['export']}: loading it with PEFT", seconds=PEFT_SECONDS, error=AdapterError):
            model = PeftModel.from_pretrained(model, request["export"], low_cpu_mem_usage=without_weights)
        active = adapter_modules(model)
        return model.eval(), {
            "active_modules": len(active),
            "adapter_hashes": _adapter_hashes(lora_layers(model), request["modules"]),
            "scaled_modules": attach_input_scale(model, Path(request["export"])),
        }


def _stand_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Zeros of every parameter's shape that share one number, where the model has no weights.

    PEFT moves an adapter to where its base weight is, and casts it to that type: on the meta device its factors would
    be lost, in a half type they would be rounded.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))


def _adapter_hashes(loaded: Mapping[str, Any], wanted: Mapping[str, str]) -> dict[str, str]:
    names = NameIndex(loaded, what="the adapter's modules")
    hashes = {}
    for name, dtype in wanted.items():
        found = names.find(name)
        if found is not None:
            layer = loaded[found]
            weight = layer.lora_A[layer.active_adapters[0]].weight
            hashes[name] = tensor_hash(weight, getattr(torch, dtype))
    return hashes


def _read_files(request: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A dense export without running it: every tensor finds its place in the model, every edited one is read.

    `weight_hashes`: by module, of what can be read, has the module's shape and is finite. `faults`: a sentence for
    each tensor that has not. What AFTER does not store under the model's names (regrouped on load) is no fault.
    """
    folder = Path(request["export"])
    files = _files_by_key(folder)
    stored, given = NameIndex(files, what=str(folder)), NameIndex(_files_by_key(Path(request["after"])), what="AFTER")
    faults = []
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    matched = 0
    for name, parameter in parameters.items():
        key = stored.find(name)
        if key is None:
            if given.find(name) is not None:
                faults.append(f"{name} is missing")
            continue
        matched += 1
        with safe_open(files[key], framework="pt") as file:
            shape = tuple(file.get_slice(key).get_shape())
        if shape != tuple(parameter.shape):
            faults.append(f"{key} is {shape}, the model has {tuple(parameter.shape)}")
    hashes = {}
    for name, dtype in request["modules"].items():
        key = stored.find(f"{name}.weight")
        if key is None:
            faults.append(f"{name}.weight is missing")
            continue
        with safe_open(files[key], framework="pt") as file:
            tensor = file.get_tensor(key)
        if bool(tensor.isfinite().all()):
            hashes[name] = tensor_hash(tensor, getattr(torch, dtype))
        else:
            faults.append(f"{key} holds NaN or inf")
    return {"weight_hashes": hashes, "faults": faults, "matched_tensors": matched}


def _files_by_key(folder: Path) -> dict[str, Path]:
    """Shard of every tensor, in the order in which transformers looks: one file, else an index."""
    path = folder / "model.safetensors"
    if not path.is_file():
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / file for key, file in weight_map.items()}
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def main(path: str) -> None:
    """Load the result in this clean process and write what it computes to the request's answer file."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    model, result = _load(request)
    if request["kind"] == "dense" and request["input_ids"] is None:
        result |= _read_files(request, model)
    elif request["kind"] == "dense":
        names = module_index(model)
        result["weight_hashes"] = {
            name: tensor_hash(model.get_submodule(names.require(name)).weight, getattr(torch, dtype))  # type: ignore[arg-type]
            for name, dtype in request["modules"].items()
        }
    if request["input_ids"] is not None:
        save_file({"logits": forward(model, request["input_ids"])}, request["logits"])
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
