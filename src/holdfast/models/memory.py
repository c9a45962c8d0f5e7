"""Is a device there, and how much may a new allocation take: of the machine, of its container, of the device?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch

from holdfast.errors import ConfigError

if sys.platform != "win32":
    import resource

# Of what is free: the rest is for fragments, caches and whoever else is there.
_SHARE = {"cpu": 0.7, "cuda": 0.85}
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def free_memory_bytes() -> int:
    """Main memory that is free: as the kernel estimates it, and within every limit on this process (`quotas`)."""
    return min([int(psutil.virtual_memory().available), *quotas().values()])


def quotas() -> dict[str, int]:
    """Limits on this process's memory -> bytes that each leaves it now; empty where only the machine limits it.

    Control groups (containers, Slurm, systemd) of either version, the process's own and every one above it; and the
    address space (`ulimit -v`).
    """
    found: dict[str, int] = {}
    for name, left in _left_in_groups(_CGROUPS, _OWN_GROUPS):
        if name not in found or left < found[name]:
            found[name] = left
    space = _left_of_address_space()
    if space is not None:
        found["ulimit -v"] = space
    return found


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


# Version 1 says "no limit" with the largest number of pages.
_UNLIMITED = 2**60


def _left_in_groups(root: Path, own: Path) -> Iterator[tuple[str, int]]:
    """(what limits, bytes left) of each group that this process is in. own: its list of them, /proc/self/cgroup."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        lines = []
    # A container sees its own group as the root, whatever the path says.
    places = {(root, "/", "memory.max", "memory.current"): None}
    for _, controllers, path in lines:
        names = ("memory.max", "memory.current")
        base = root
        if "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif controllers:
            continue
        for part in (PurePosixPath(path), *PurePosixPath(path).parents):
            places[base, str(part), *names] = None
    for base, path, limit, used in places:
        left = _left_in_group(base / path.lstrip("/"), limit, used)
        if left is not None:
            yield "control group (container, Slurm or systemd)", left


def _left_in_group(folder: Path, limit: str, used: str) -> int | None:
    """Bytes below a group's limit, or None without one."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max" or int(most) >= _UNLIMITED:
            return None
        taken = int((folder / used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Pages of files that nobody uses now are given back before anything is refused.
        idle = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        return max(0, int(most) - taken + idle)
    except (OSError, ValueError):
        return None


def _left_of_address_space() -> int | None:
    if sys.platform == "win32":
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    return max(0, soft - int(psutil.Process().memory_info().vms))
