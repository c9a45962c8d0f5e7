"""What answers: the seam between HTTP and a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from holdfast.errors import ConfigError
from holdfast.serving.protocol import ChatRequest


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer. The last one has `finish`; texts together are the answer, stripped.

    route: who answers and why, where a router decided; known with the last piece at the latest.
    """

    text: str = ""
    finish: Literal["stop", "length"] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    route: Mapping[str, Any] | None = field(default=None)


class Engine(Protocol):
    """A served folder."""

    @property
    def models(self) -> Mapping[str, str]:
        """Name that a client may ask for -> what it is."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """Plain data for /health; {"ok": bool, ...}."""
        ...

    async def start(self) -> None:
        """Get ready; returns when requests may come. Raises HoldfastError: it never will be."""
        ...

    def answer(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """The answer, as it comes. Raises ApiError."""
        ...

    async def stop(self) -> None:
        """Let go of the model; requests that are answered have been."""
        ...


BASE = "base"


def model_names(name: str, experts: tuple[str, ...]) -> dict[str, str]:
    """The names of a CRAM folder: itself (routed), its base, and each expert.

    Raises: ConfigError: an expert that is called as the base is, or a name that holds the ":" before an expert's.
    """
    if ":" in name:
        raise ConfigError(f"{name!r} holds a ':', which parts a folder's name from an expert's; give --served-name.")
    if BASE in experts:
        raise ConfigError(f"An expert is called {BASE!r}, which is the base's own name here; rename its task.")
    return {
        name: "routed",
        f"{name}:{BASE}": "the base alone",
        **{f"{name}:{expert}": f"expert {expert}" for expert in experts},
    }


def chosen_part(model: str) -> str | None:
    """What a model name asks for beside the router: "base" or an expert; None for the routed folder."""
    return model.partition(":")[2] or None


__all__ = ["BASE", "Engine", "Piece", "chosen_part", "model_names"]
