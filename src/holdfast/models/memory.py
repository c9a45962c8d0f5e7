"""Is a device there, and how much may a new allocation take: of the machine, of its container, of the device?"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from holdfast.errors import ConfigError

# Of what is free: the rest is for fragments, caches and whoever else is there.
_SHARE = {"cpu": 0.7, "cuda": 0.85}
_CGROUPS = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int:
    """Main memory that is free: as the kernel estimates it, and within the limit of the process's control group."""
    free = int(psutil.virtual_memory().available)
    limited = _left_in_cgroup(_CGROUPS)
    return free if limited is None else min(free, limited)


def find_device(name: torch.device | str) -> torch.device:
    """The device of that name. Raises ConfigError: there is no such kind, or none of it on this machine."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if found is not None else 0
    there = ["cpu", *(f"{found.type}:{index}" for index in range(count) if found is not None)]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and (device.type in ("cpu", "meta") or f"{device.type}:{device.index or 0}" in there):
        return device
    raise ConfigError(f"device is {str(name)!r}; expected one of this machine: {', '.join(there)}.")


def usable_bytes(device: torch.device) -> int:
    """What may be planned with on `device` beside what is held already."""
    if device.type == "cuda":
        return int(_SHARE["cuda"] * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE["cpu"] * free_memory_bytes())


def _left_in_cgroup(root: Path) -> int | None:
    """Bytes below `memory.max` (cgroup v2; a container sees its own group as the root), or None without a limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Pages of files that nobody uses now are given back before anything is refused.
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
