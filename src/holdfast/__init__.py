"""holdfast: tune a multimodal LLM again and again, and hold fast to what it knows and what it refuses.

Importing the package is cheap: nothing heavy (torch, transformers) is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from holdfast import _moved
from holdfast.version import __version__

_moved.install()

# Public names and where they live; resolved on first use so that `import holdfast` never waits for torch.
_LAZY = {
    "harmonize": "holdfast.api:harmonize",
}

if TYPE_CHECKING:
    from holdfast.api import harmonize as harmonize


def __getattr__(name: str) -> Any:
    target = _LAZY.get(name)
    if target is None:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


__all__ = ["__version__", "harmonize"]
