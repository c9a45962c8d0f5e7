"""What this machine has, for `holdfast doctor --environment`: versions, cores, memory, devices, extras."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

PACKAGES = (
    *("holdfast", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "tokenizers"),
    *("datasets", "numpy", "pillow"),
)
# What an extra is for, in words; its packages come from the installed distribution.
EXTRAS = {
    "captions": "caption scorers (CIDEr, BLEU, METEOR, ROUGE-L)",
    "hf": "streams and safety sets on the Hugging Face Hub",
    "serve": "serving (`holdfast serve`)",
    "ray": "sweeps on a cluster (`holdfast sweep --ray`)",
    "judges": "judges: nothing more than the package",
    "small": "the small world, on a pretrained language model",
    "docs": "building the documentation",
    "dev": "tests and checks",
}


def examine_environment() -> dict[str, Any]:
    """Versions, cores, bf16 instructions, memory, devices, and what each extra lacks; plain data, bytes and counts."""
    import torch

    from holdfast.models.memory import free_memory_bytes
    from holdfast.models.precision import cpu_has_bf16

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_build": torch.__version__.partition("+")[2] or "as published",
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "cpu_bf16": cpu_has_bf16(),
        "free_memory_bytes": free_memory_bytes(),
        "devices": _devices(torch),
        "offline": os.environ.get("HF_HUB_OFFLINE") == "1",
        "data": os.environ.get("HOLDFAST_DATA"),
        "cache": os.environ.get("HOLDFAST_CACHE"),
        "extras": missing_by_extra(),
    }


def describe_environment(found: dict[str, Any]) -> list[str]:
    """The same as lines of at most 80 columns, then what follows from it."""
    versions = [f"{name} {version or 'not installed'}" for name, version in found["versions"].items()]
    devices = [f"{d['name']}, {d['memory_bytes'] / 2**30:.0f} GiB" for d in found["devices"]] or ["none"]
    lines = [
        f"Python       {found['python']} on {found['system']}",
        *_wrapped("packages     ", versions),
        f"torch build  {found['torch_build']}",
        f"cores        {found['cores']} (torch uses {found['torch_threads']} threads)",
        f"bf16         {'the processor has instructions for it' if found['cpu_bf16'] else 'no instructions for it'}",
        f"free memory  {found['free_memory_bytes'] / 2**30:.1f} GiB",
        *_wrapped("accelerators ", devices),
        f"hub          {'offline (HF_HUB_OFFLINE=1)' if found['offline'] else 'may be asked'}",
        f"data         {found['data'] or 'HOLDFAST_DATA is not set: stream files that use it need it'}",
        f"cache        {found['cache'] or '~/.cache/holdfast (HOLDFAST_CACHE is not set)'}",
    ]
    for extra, lacking in found["extras"].items():
        what = f"extra {extra:<9}" if len(extra) < 10 else f"extra {extra} "
        lines += [f"{what} {EXTRAS.get(extra, '')}: " + ("complete" if not lacking else "")]
        if lacking:
            lines += [*_wrapped("    lacks ", lacking), f'    pip install "holdfast[{extra}]"']
    if not found["cpu_bf16"] and not found["devices"]:
        lines.append("note: without bf16 instructions training on the processor runs in float32, slower by 2-4 times.")
    return [line.rstrip().removesuffix(":") for line in lines]


def missing_by_extra() -> dict[str, list[str]]:
    """Extra -> requirements of it that are not installed, or installed in another version."""
    from packaging.requirements import Requirement

    try:
        distribution = metadata.distribution("holdfast")
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(text) for text in distribution.requires or []]
    found: dict[str, list[str]] = {}
    for extra in distribution.metadata.get_all("Provides-Extra") or []:
        wanted = [
            r
            for r in parsed
            if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
        ]
        found[extra] = [str(r).partition(";")[0].strip() for r in wanted if r.name != "holdfast" and not _meets(r)]
    return found


def _meets(requirement: Any) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    # A container's share, where the system says it; os.cpu_count() counts the whole machine.
    asked = getattr(os, "sched_getaffinity", None)
    return len(asked(0)) if asked is not None and sys.platform != "win32" else os.cpu_count() or 1


def _devices(torch: Any) -> list[dict[str, Any]]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda":
        return [{"kind": kind, "name": kind, "memory_bytes": 0}]
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"kind": kind, "name": p.name, "memory_bytes": int(p.total_memory)} for p in properties]


def _wrapped(head: str, words: list[str], width: int = 78) -> list[str]:
    lines, current = [], head
    for word in words:
        if len(current) + len(word) + 2 > width and current.strip() != head.strip():
            lines.append(current.rstrip(", "))
            current = " " * len(head)
        current += f"{word}, "
    return [*lines, current.rstrip(", ")]
