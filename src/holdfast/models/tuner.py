"""Adapter folders that are more than one LoRA: a tuner of holdfast puts them on a loaded model.

Such a folder says which tuner reads it in `holdfast_tuner.json`: {"tuner": NAME}. NAME is only looked up among the
packages of `holdfast.tuners`, each with a function `attach(loaded, folder) -> Tuner`. A folder never brings code.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.data.types import Sample
from holdfast.errors import AdapterError, unknown_name

if TYPE_CHECKING:
    from holdfast.models.load import LoadedModel

MARKER = "holdfast_tuner.json"
_TUNERS = "holdfast.tuners"


class Tuner(Protocol):
    """What a tuner leaves on a model."""

    def serving(self, samples: Sequence[Sample]) -> AbstractContextManager[None]:
        """Within, forward passes and `generate` are about these requests, in this order."""
        ...

    def explain(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """What would answer each request: {"id", "weights": {adapter: share}, "abstained", ...}, plain data."""
        ...


def is_tuner_folder(folder: str | Path) -> bool:
    """Whether an adapter folder belongs to a tuner of holdfast, and not to plain PEFT."""
    return (Path(folder) / MARKER).is_file()


def attach_tuner(loaded: LoadedModel, folder: str | Path) -> Tuner:
    """Put a tuner's folder on a loaded base.

    Raises: AdapterError: an unreadable marker, or what the tuner says. UnknownNameError: no such tuner here.
    """
    path = Path(folder) / MARKER
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["tuner"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f'{path} cannot be read; expected {{"tuner": NAME}}: {error!r}') from error
    package = importlib.import_module(_TUNERS)
    available = [module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg]
    if name not in available:
        raise unknown_name(f"tuner (in {path})", str(name), available)
    return importlib.import_module(f"{_TUNERS}.{name}").attach(loaded, Path(folder))
