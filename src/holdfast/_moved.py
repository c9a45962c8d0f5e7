"""Where modules of version 0.1 are now. An old import path is the same module object; the table goes in version 0.3."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "holdfast.checkpoints.curvature": "holdfast.checkpoints.curvature_file",
    "holdfast.checkpoints.storage": "holdfast.files",
    "holdfast.data.doctor": "holdfast.data.examine",
    "holdfast.data.files": "holdfast.data.source_files",
    "holdfast.data.memory": "holdfast.models.estimate",
    "holdfast.data.safety": "holdfast.data.safety_set",
    "holdfast.editing.card": "holdfast.editing.account",
    "holdfast.editing.live": "holdfast.editing.in_place",
    "holdfast.editing.probe": "holdfast.editing.verify.child",
    "holdfast.editing.report": "holdfast.editing.account",
    "holdfast.editing.rule": "holdfast.rules.base",
    "holdfast.editing.targets": "holdfast.editing.plan",
    "holdfast.evaluation.config": "holdfast.evaluation.evaluation_config",
    "holdfast.methods.column_factors": "holdfast.methods._glue.column_factors",
    "holdfast.methods.gram_sweep": "holdfast.methods._glue.gram_sweep",
    "holdfast.methods.hpa_rule": "holdfast.rules.hpa",
    "holdfast.methods.live": "holdfast.api",
    "holdfast.methods.lora_layers": "holdfast.methods._glue.lora_layers",
    "holdfast.methods.sweep": "holdfast.rules.what_if",
    "holdfast.models.calibrate": "holdfast.calibration.curvature",
    "holdfast.models.grams": "holdfast.calibration.grams",
    "holdfast.models.own_answers": "holdfast.calibration.own_answers",
    "holdfast.models.replay": "holdfast.calibration.resume_forward",
    "holdfast.models.walk": "holdfast.calibration.walk",
    "holdfast.parallel": "holdfast.experiment.workers",
    "holdfast.reports.load": "holdfast.reports.read_runs",
    "holdfast.reports.samples": "holdfast.reports.sample_pages",
    "holdfast.scorers.files": "holdfast.scorers.predictions",
    "holdfast.tiny.run": "holdfast.tiny.recipe",
    "holdfast.training.config": "holdfast.training.training_config",
    "holdfast.tuners.cram.config": "holdfast.tuners.cram.cram_config",
    "holdfast.tuners.cram.encoders": "holdfast.tuners.cram.router_features",
    "holdfast.tuners.cram.storage": "holdfast.tuners.cram.folder",
    "holdfast.tuners.cram.training": "holdfast.tuners.cram.objective",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers an import of an old path with the module's new place."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        self._specs[module.__name__] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module ran when it was imported under its own name; it keeps that name's spec."""
        module.__spec__ = self._specs[module.__name__]


def install() -> None:
    """Make old import paths work, once per process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
