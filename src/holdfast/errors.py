"""One exception tree: one class per failure that a user can act on.

Every message says what was wrong, what was expected and what to do, with the name and the value of each thing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HoldfastError(Exception):
    """Base of every error that holdfast raises on purpose."""


class ConfigError(HoldfastError):
    """A configuration has a wrong key, type or value."""


class UnknownNameError(ConfigError):
    """A name (method, scorer, judge, family, stream, key) that does not exist."""


class DataError(HoldfastError):
    """A data file, an image or a sample is missing, malformed or out of bounds."""


class ModelError(HoldfastError):
    """A model cannot be loaded or is of a kind that is not handled."""


class CheckpointError(HoldfastError):
    """Checkpoint files are missing, truncated, inconsistent or hold values that cannot be edited."""


class AdapterError(CheckpointError):
    """A PEFT adapter does not fit the base, or is of a kind that cannot be handled exactly."""


class CalibrationError(HoldfastError):
    """A calibration is empty, one-sided, non-finite or belongs to another model."""


class NumericalError(HoldfastError):
    """A numerical step failed (a Gram matrix that cannot be factorised, NaN or inf in an input)."""


class TrainingError(HoldfastError):
    """Training stopped: the loss is not finite, or nothing is trainable."""


class RunError(HoldfastError):
    """A run directory belongs to another run, or its record is damaged."""


class GateError(HoldfastError):
    """A step's checkpoint does not hold the run's safety gate; nothing of the step is published."""


class StorageError(HoldfastError):
    """A file could not be written: no space, no permission, or the output exists."""


class JudgeError(HoldfastError):
    """A judge cannot be reached or is misconfigured (a single unusable verdict is 'unscored', never an error)."""


class ExportError(HoldfastError):
    """An exported artefact, loaded back, does not do what the in-memory edit does."""


# Names that a wrong one is compared with.
_COMPARED = 2000


def nearest(name: str, available: Iterable[str]) -> str | None:
    """The available name most like `name`, or None when nothing is close."""
    names = list(available)
    if len(names) > _COMPARED:
        # Comparing takes a tenth of a millisecond a name; a name with a slip in it has nearly the same length.
        names = [other for other in names if abs(len(other) - len(name)) <= 2][:_COMPARED]
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, available: Iterable[str]) -> UnknownNameError:
    """An error that names the unknown thing, the nearest known one and all that are available."""
    names = sorted(available)
    hint = nearest(name, names)
    suggestion = f" Did you mean {hint!r}?" if hint else ""
    return UnknownNameError(f"Unknown {kind} {name!r}.{suggestion} Available: {', '.join(names) or 'none'}.")
