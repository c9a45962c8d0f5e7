"""Which samples of a task does the aligned model itself refuse? Harm in tuning data, found before it is learned.

A task sample that theta_0 refuses says nothing of the task: calibrated on, it asks an edit to keep what harmful samples
taught. With theta_0's own refusal as its answer it belongs to safety. The question costs one short answer a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.data.types import Sample, Turn
from holdfast.errors import DataError
from holdfast.models.generate import generate
from holdfast.models.loaded import LoadedModel

# (requests, replies) -> which replies are refusals.
IsRefusal = Callable[[Sequence[Sample], Sequence[str]], Sequence[bool]]


@dataclass(frozen=True, kw_only=True)
class Screened:
    """kept: samples as they were, in order. refused: the others, answered by the model's own refusal. asked: of all.

    places: of the refused ones among all; ids are unique in a task only, and several tasks may be screened at once.
    """

    kept: tuple[Sample, ...]
    refused: tuple[Sample, ...]
    places: tuple[int, ...] = ()

    @property
    def asked(self) -> int:
        """Number of prompts that were asked."""
        return len(self.kept) + len(self.refused)

    def to_json(self) -> dict[str, Any]:
        """Counts, and every refused sample by its place and id with the reply that decided."""
        return {
            "asked": self.asked,
            "kept": len(self.kept),
            "refused": [
                {"place": place, "id": sample.id, "reply": sample.answer}
                for place, sample in zip(self.places, self.refused, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], samples: Sequence[Sample]) -> Screened:
        """What `to_json` recorded of these samples. Raises DataError: it was made of others."""
        rows = data["refused"]
        places = {sample.id: place for place, sample in enumerate(samples)}  # for a record of an earlier version
        replies = {row.get("place", places.get(row["id"], -1)): row["reply"] for row in rows}
        found = split(samples, replies)
        if found.asked != data["asked"] or [s.id for s in found.refused] != [row["id"] for row in rows]:
            raise DataError(
                f"The record of a screening is of {data['asked']} other samples than the {len(samples)} here. Remove "
                "it to have them screened again."
            )
        return found


def screen(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    is_refusal: IsRefusal,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[..., None] | None = None,
) -> Screened:
    """Ask the model every sample's request, greedily, and part the samples by whether it refuses.

    A conversation of several turns is asked for its last answer, with the earlier ones before it. A sample whose own
    target is a refusal is kept: it teaches what the model does anyway.
    """
    requests = [replace(sample, turns=sample.request) for sample in samples]
    done = 0

    def count(indices: list[int], texts: list[str]) -> None:
        nonlocal done
        done += len(texts)
        if progress is not None:
            progress("screen", done=done, total=len(requests))

    replies = generate(loaded, requests, max_new_tokens=max_new_tokens, batch_size=batch_size, on_batch=count)
    verdicts = is_refusal(requests, replies)
    taught = is_refusal(requests, [sample.answer or "" for sample in samples])
    found = zip(samples, replies, verdicts, taught, strict=True)
    return split(samples, {at: reply for at, (_, reply, refuses, own) in enumerate(found) if refuses and not own})


def split(samples: Sequence[Sample], refusals: Mapping[int, str]) -> Screened:
    """Part samples by the places in `refusals` (place among the samples -> the model's reply)."""
    places = [at for at in range(len(samples)) if at in refusals]
    refused = [
        replace(
            samples[at],
            turns=(*samples[at].request, Turn(role="assistant", text=refusals[at])),
            references=(refusals[at],),
        )
        for at in places
    ]
    return Screened(
        kept=tuple(s for at, s in enumerate(samples) if at not in refusals),
        refused=tuple(refused),
        places=tuple(places),
    )


__all__ = ["IsRefusal", "Screened", "screen", "split"]
