"""Experiment trackers (TensorBoard, Weights & Biases, MLflow, Trackio, ...), through transformers' own `report_to`.

What is followed is no part of a run's configuration: it changes no result, and a run may be resumed without it. So the
names stand in the environment, where every process of a run finds them.
"""

from __future__ import annotations

import os

from holdfast.errors import ConfigError

VARIABLE = "HOLDFAST_REPORT_TO"


def trackers(names: str | None = None) -> list[str]:
    """Names of transformers' integrations, from a list with commas (by default HOLDFAST_REPORT_TO).

    Raises: ConfigError: one that transformers does not know or whose package is not installed.
    """
    given = names if names is not None else os.environ.get(VARIABLE, "")
    wanted = [name.strip() for name in given.split(",") if name.strip() not in ("", "none")]
    if not wanted:
        return []
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in wanted:
        if name not in available:
            shown = ", ".join(sorted(available)) or "none"
            raise ConfigError(
                f"tracker {name!r} is not available here (available: {shown}). Install its package, for example "
                "`pip install tensorboard`, `wandb`, `mlflow` or `trackio`, and use the name that transformers' "
                "`report_to` has for it."
            )
    return wanted
