"""An experiment, run or resumed into its directory; the summary at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.experiment.build import parts_of
from holdfast.experiment.resolve import Progress, resolve
from holdfast.experiment.run_config import RunConfig, only
from holdfast.experiment.workers import run_methods, set_threads
from holdfast.share import ALONE, Share
from holdfast.stream.protocol import silent
from holdfast.stream.summary import write_summary


def run(
    config: RunConfig,
    out: Path | str,
    *,
    methods: Sequence[str] | None = None,
    jobs: int = 1,
    shard: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run (or resume) every method of `config`, or those named, into the directory `out`; returns the summary.

    methods: names of `config`, or any other that there is, which then has its defaults (`holdfast run --method`).
    jobs: so many methods at once, each in its own process; the results are those of jobs=1.
    shard: share the base's weights out over the processes that `accelerate launch` or `torchrun` started (FSDP2), for
        one that no device holds. Without it each of them has the whole base. The first of them alone writes; the
        summary is its own, the others get an empty one; `progress` is called in each.

    Raises: ConfigError, UnknownNameError, DataError: a mistake in `config`, before anything is computed. RunError: the
        directory holds another run, or other code of a plug-in. And whatever a method raises.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; expected 1 or more.")
    if methods is not None:
        config = only(config, methods)
    set_threads(config.threads)
    with _joined(shard) as share:
        if jobs > 1 and share.world > 1:
            raise ConfigError(
                f"jobs is {jobs}, and {share.world} processes were started that learn every task together. Leave one "
                "of the two out."
            )
        experiment = resolve(config, out, progress=progress)
        if jobs > 1:
            for _, names, name in parts_of(config, list(experiment.methods)):
                names.refuse_unshareable(name)
        with experiment.held():
            run_methods(experiment, list(experiment.methods), jobs=jobs)
            return share.by_chief(lambda: write_summary(Path(out))) or {}


def _joined(shard: bool) -> AbstractContextManager[Share]:
    """Without a launcher nothing of torch is imported before a mistake in the run file is said."""
    if not shard and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext(ALONE)
    from holdfast.models.processes import joined

    return joined(shard=shard)
