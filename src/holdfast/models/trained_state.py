"""The state of a model in training that is its trained tensors alone: what adapters which are not PEFT's share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from holdfast.errors import AdapterError


class TrainedState(nn.Module):
    """A module whose state is what `trained` names: a checkpoint of the trainer never holds the base."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors, of any shape, by the names that a saved state has them under.

        Raises: NotImplementedError: an adapter says which.
        """
        raise NotImplementedError

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained tensors alone, detached."""
        del args, kwargs
        return {name: value.detach() for name, value in self.trained().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Take back the trained tensors that `state_dict` gave; everything else is the base's.

        Raises: AdapterError: other tensors than are in training.
        """
        del args, kwargs
        own = self.trained()
        if set(own) != set(state_dict):
            raise AdapterError(f"The saved training state holds {len(state_dict)} tensors, expected {len(own)}.")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])
