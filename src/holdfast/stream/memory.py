"""The most memory that this process held while something ran. Costs are told by it, results never depend on it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes since it was made.

    `host`: the resident set, with all that the process held before (libraries, an allocator's reserve); Linux alone.
    `device`: what torch allocated, summed over the CUDA devices. What cannot be known is not said. One at a time: a
    new one starts both anew.
    """

    def __init__(self) -> None:
        self._host = _restart_host()
        self._cuda = _cuda()
        if self._cuda is not None:
            for number in range(self._cuda.device_count()):
                self._cuda.reset_peak_memory_stats(number)

    def bytes(self) -> dict[str, int]:
        """What is known of the peak so far; see the class."""
        found: dict[str, int] = {}
        if self._host and (peak := _resident_peak()) is not None:
            found["host"] = peak
        # A phase may have been the first to touch a device.
        cuda = self._cuda or _cuda()
        if cuda is not None:
            found["device"] = sum(cuda.max_memory_allocated(number) for number in range(cuda.device_count()))
        return found


def highest(peaks: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The higher of two peaks, kind by kind."""
    return {kind: max(peaks.get(kind, 0), other.get(kind, 0)) for kind in dict.fromkeys((*peaks, *other))}


def _restart_host() -> bool:
    """Whether the kernel's mark of the highest resident set could be set back."""
    try:
        _RESET.write_text("5")
    except OSError:  # not Linux, or a container that does not allow it
        return False
    return True


def _resident_peak() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _cuda() -> Any | None:
    """torch.cuda where it is in use already: a question must not initialize it in a process that needs none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
