"""Adapter folders that are more than one LoRA: a tuner of holdfast puts them on a loaded model.

Such a folder says which tuner reads it in `holdfast_tuner.json`: {"tuner": NAME}. NAME is only looked up among the
registered tuners: `TUNERS`, and entry points `holdfast.tuners` of what is installed. A folder never brings code, nor
names any by its place.
"""

from __future__ import annotations

from pathlib import Path

from holdfast.checkpoints.contents import TUNER_FILE
from holdfast.errors import AdapterError
from holdfast.files import read_json
from holdfast.models.loaded import LoadedModel, Tuner
from holdfast.registry import Registry

MARKER = TUNER_FILE


# name -> "module:function", called as attach(loaded, folder) -> Tuner
TUNERS: dict[str, str] = {
    "cram": "holdfast.tuners.cram:attach",
    "moelora": "holdfast.tuners.moelora:attach",
}
REGISTRY = Registry("tuner", "holdfast.tuners", TUNERS)


def is_tuner_folder(folder: str | Path) -> bool:
    """Whether an adapter folder belongs to a tuner of holdfast, and not to plain PEFT."""
    return (Path(folder) / MARKER).is_file()


def tuner_name(folder: str | Path) -> str:
    """Which tuner reads a folder.

    Raises: AdapterError: an unreadable marker.
    """
    path = Path(folder) / MARKER
    try:
        return str(read_json(path, "the record of a tuner", error=AdapterError)["tuner"])
    except (OSError, AdapterError, KeyError, TypeError) as error:
        raise AdapterError(f'{path} cannot be read; expected {{"tuner": NAME}}: {error!r}') from error


def attach_tuner(loaded: LoadedModel, folder: str | Path) -> Tuner:
    """Put a tuner's folder on a loaded base.

    Raises: AdapterError: an unreadable marker, or what the tuner says. UnknownNameError: no such tuner here.
    """
    name = tuner_name(folder)
    attach = REGISTRY.load(name, kind=f"tuner (in {Path(folder) / MARKER})", code_by_path=False)
    return attach(loaded, Path(folder))


__all__ = ["MARKER", "REGISTRY", "TUNERS", "Tuner", "attach_tuner", "is_tuner_folder", "tuner_name"]
