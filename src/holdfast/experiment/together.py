"""A run that several processes work on: what is not made for them, and what its directory records of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.errors import ConfigError
from holdfast.experiment.run_config import RunConfig
from holdfast.share import Share, current
from holdfast.stream.protocol import LearnsTogether, Method
from holdfast.training.training_config import TrainingConfig


def refuse_together(config: RunConfig, methods: Mapping[str, Method], share: Share) -> None:
    """Raises ConfigError: something of this run is not made for the processes that were started for it."""
    if share.world == 1:
        return
    if config.evaluation.backend == "vllm":
        raise ConfigError(
            f"evaluation.backend is vllm, which takes the devices for itself, and {share.world} processes were "
            "started for the run. Set it to transformers, or run in one process."
        )
    if share.sharded and config.safety_gate is not None:
        raise ConfigError(
            "safety_gate asks every checkpoint on one device, and this run shares the base out over several "
            "(FSDP2). Leave one of the two out; `holdfast gate` asks a finished checkpoint."
        )
    for label, method in methods.items():
        ways = method.together if isinstance(method, LearnsTogether) else frozenset()
        if share.way in ways:
            training = getattr(getattr(method, "config", None), "training", None)
            if isinstance(training, TrainingConfig):
                training.refuse_uneven(share.world)
            continue
        able = (
            "it can learn with a base that is whole in each process: leave --fsdp out"
            if ways
            else "it learns in one process alone: start one"
        )
        what = "with a base that is shared out over them (FSDP2)" if share.sharded else "together"
        raise ConfigError(
            f"Method {label!r} cannot learn in {share.world} processes {what}; {able}, or run the other methods "
            "with --method."
        )


def recorded_share() -> dict[str, Any]:
    """Sums over another number of processes differ in the last bits, so it is part of what a directory belongs to."""
    share = current()
    return {"processes": {"number": share.world, "base": share.way}} if share.world > 1 else {}
