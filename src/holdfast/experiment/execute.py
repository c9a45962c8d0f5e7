"""An experiment, run or resumed into its directory; the summary at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.experiment.resolve import Progress, parts_of, resolve
from holdfast.experiment.run_config import RunConfig
from holdfast.experiment.workers import run_methods, set_threads
from holdfast.stream.protocol import silent
from holdfast.stream.summary import write_summary


def run(
    config: RunConfig,
    out: Path | str,
    *,
    methods: Sequence[str] | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run (or resume) every method of `config`, or those named, into the directory `out`; returns the summary.

    jobs: so many methods at once, each in its own process; the results are those of jobs=1.

    Raises: ConfigError, UnknownNameError, DataError: a mistake in `config`, before anything is computed. RunError: the
        directory holds another run, or other code of a plug-in. And whatever a method raises.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; expected 1 or more.")
    set_threads(config.threads)
    experiment = resolve(config, out, methods=methods, progress=progress)
    if jobs > 1:
        for _, names, name in parts_of(config, list(experiment.methods)):
            names.refuse_unshareable(name)
    with experiment.held():
        run_methods(experiment, list(experiment.methods), jobs=jobs)
        return write_summary(Path(out))
