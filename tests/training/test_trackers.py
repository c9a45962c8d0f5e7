"""Trackers are transformers' own, by its names; one that is not installed is an error before the first step."""

from __future__ import annotations

import pytest
import transformers.integrations

from holdfast.errors import ConfigError
from holdfast.training.trackers import VARIABLE, trackers


@pytest.mark.parametrize("given", ["", "none", " , ", "none,"])
def test_without_a_name_nothing_is_followed(given, monkeypatch):
    assert trackers(given) == []
    monkeypatch.setenv(VARIABLE, given)
    assert trackers() == []
    monkeypatch.delenv(VARIABLE)
    assert trackers() == []


def test_names_are_those_of_transformers_and_must_be_installed(monkeypatch):
    monkeypatch.setattr(
        transformers.integrations, "get_available_reporting_integrations", lambda: ["tensorboard", "trackio"]
    )
    assert trackers("trackio, tensorboard") == ["trackio", "tensorboard"]
    monkeypatch.setenv(VARIABLE, "tensorboard")
    assert trackers() == ["tensorboard"]
    for wrong in ("wandb", "tensorbord", "tensorboard,nothing"):
        with pytest.raises(ConfigError, match=r"available: tensorboard, trackio\)\. Install its package"):
            trackers(wrong)
