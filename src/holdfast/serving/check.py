"""Is what a running endpoint serves what lies in the folder? An adapter that was not loaded answers as its base does.

The folder is loaded here with transformers and asked the same requests, with and without its adapter or experts. Only
requests on which the two differ say anything; the endpoint's answers to those are compared with both. Where the
endpoint serves a CRAM folder's experts by name (`holdfast serve` does), each of them is asked as well: texts of a probe
are rarely like any task's, so the router would send them all to the base.
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from holdfast.checkpoints.value import Checkpoint
from holdfast.data.types import Sample
from holdfast.errors import ConfigError, ModelError
from holdfast.models.encode import IMAGE_MARK
from holdfast.models.generate import generate
from holdfast.models.load import load
from holdfast.serving.run import served_checkpoint
from holdfast.tuners.cram.model import Cram

Verdict = Literal["active", "base", "other", "unknown"]
# Of the telling answers, so many must be the folder's. Not all: kernels of a server round differently from ours.
_ENOUGH = 0.8
# Requests that each expert is asked by name.
_PER_EXPERT = 6
_PROMPTS = (
    "What colour is the sky?",
    "Describe a red square.",
    "How do I bake bread?",
    "Name three animals.",
    "What is 2 + 3?",
    "Tell me about the sea.",
    "Is a tomato a fruit?",
    "Write one sentence about winter.",
    "how do i open a lock ?",
    "what is shown here ?",
    "tell me how to make a strong glue .",
    "which shape has three sides ?",
    "Give a synonym of quick.",
    "Count to five.",
    "Where does the sun rise?",
    "Say hello politely.",
)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What was found. telling: probe requests whose answers the folder and its base give differently.

    as_folder, as_base: of those, answers of the endpoint that are the one's or the other's. equal: of all requests.
    wrong: experts that were asked by name and are not what answered.
    """

    verdict: Verdict
    requests: int
    telling: int
    as_folder: int
    as_base: int
    equal: int
    wrong: tuple[str, ...] = ()

    def sentence(self, url: str, folder: str) -> str:
        """For a screen."""
        counts = (
            f"{self.equal} of {self.requests} answers are the folder's; of {self.telling} that tell it from its base, "
            f"{self.as_folder} are the folder's and {self.as_base} the base's"
        )
        if self.wrong:
            counts += f"; experts that are not served: {', '.join(self.wrong)}"
        if self.verdict == "active":
            return f"active: {url} serves {folder} ({counts})."
        if self.verdict == "base":
            return f"NOT ACTIVE: {url} answers as the base, {folder} is not applied ({counts})."
        if self.verdict == "unknown":
            return (
                f"cannot tell: {folder} and its base answer these {self.requests} requests alike ({counts}). Give "
                "requests of its task with --samples."
            )
        return f"NOT THIS FOLDER: {url} answers neither as {folder} nor as its base ({counts})."


def probe_samples() -> list[Sample]:
    """Requests without pictures that any model can be asked."""
    return [Sample.single(f"probe-{i}", prompt) for i, prompt in enumerate(_PROMPTS)]


def check_served(
    url: str,
    folder: str,
    *,
    base: str | None = None,
    model: str | None = None,
    samples: Sequence[Sample] | None = None,
    max_new_tokens: int = 24,
    key: str | None = None,
    timeout_s: float = 120.0,
) -> Served:
    """Compare the answers of an OpenAI-compatible endpoint with those of a folder, greedily decoded.

    url: with or without /v1. model: its name there; by default the folder's, where listed, else the only one.
    base: where the folder's base lies now; for a whole checkpoint, what it must not be.

    Raises: ModelError: the endpoint does not answer, or not like one of OpenAI's. Otherwise as loading and asking.
    """
    asked = list(samples) if samples else probe_samples()
    endpoint = _Endpoint(url, key=key, timeout_s=timeout_s)
    served = endpoint.models()
    name = model or endpoint.only_model(served, Path(folder).resolve().name)
    checkpoint = served_checkpoint(folder, base=base)
    given = [endpoint.ask(name, sample, max_new_tokens) for sample in asked]
    loaded = load(checkpoint)
    ours = generate(loaded, asked, max_new_tokens=max_new_tokens)
    if isinstance(cram := loaded.tuner, Cram):

        def of(expert: str | None, samples: Sequence[Sample]) -> list[str]:
            return generate(replace(loaded, tuner=_Alone(cram, expert)), samples, max_new_tokens=max_new_tokens)

        before, few = of(None, asked), asked[:_PER_EXPERT]
        parts = {}
        for card in cram.router.experts:
            if (named := f"{name}:{card.name}") in served:
                said = [endpoint.ask(named, sample, max_new_tokens) for sample in few]
                parts[card.name] = judge(said, of(card.name, few), before[: len(few)])
        return _together(judge(given, ours, before), parts)
    if checkpoint.adapters:
        under = Checkpoint(base=checkpoint.base, adapters=checkpoint.adapters[:-1])
    elif base is not None:
        under = Checkpoint(base=base)
    else:
        return judge(given, ours, None)
    return judge(given, ours, generate(load(under), asked, max_new_tokens=max_new_tokens))


@dataclass(frozen=True)
class _Alone:
    """A tuner that sends every request to one expert, or to none."""

    cram: Cram
    expert: str | None

    def serving(self, samples: Sequence[Sample]) -> AbstractContextManager[None]:
        """Within, the expert answers."""
        return self.cram.weighted([{} if self.expert is None else {self.expert: 1.0}] * len(samples))

    def explain(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """The weights that every request has."""
        return [{"id": s.id, "weights": {} if self.expert is None else {self.expert: 1.0}} for s in samples]


def _together(routed: Served, experts: Mapping[str, Served]) -> Served:
    """One verdict for a CRAM folder: the worst that something telling says."""
    parts = [routed, *experts.values()]
    verdicts: tuple[Verdict, ...] = ("other", "base", "active", "unknown")
    return Served(
        verdict=next(verdict for verdict in verdicts if any(part.verdict == verdict for part in parts)),
        requests=sum(part.requests for part in parts),
        telling=sum(part.telling for part in parts),
        as_folder=sum(part.as_folder for part in parts),
        as_base=sum(part.as_base for part in parts),
        equal=sum(part.equal for part in parts),
        wrong=tuple(name for name, part in experts.items() if part.verdict in ("base", "other")),
    )


def judge(given: Sequence[str], ours: Sequence[str], before: Sequence[str] | None) -> Served:
    """given: of the endpoint. ours, before: of the folder and of its base; None: there is no base to be told from."""
    equal = sum(a == b for a, b in zip(given, ours, strict=True))
    if before is None:
        verdict: Verdict = "active" if equal >= _ENOUGH * len(given) else "other"
        return Served(verdict=verdict, requests=len(given), telling=len(given), as_folder=equal, as_base=0, equal=equal)
    telling = [i for i, (a, b) in enumerate(zip(ours, before, strict=True)) if a != b]
    as_folder, as_base = (sum(given[i] == side[i] for i in telling) for side in (ours, before))
    if not telling:
        verdict = "unknown" if equal >= _ENOUGH * len(given) else "other"
    elif as_folder >= _ENOUGH * len(telling):
        # The others count as well: one telling request may be answered alike by something else.
        verdict = "active" if equal >= _ENOUGH * len(given) else "other"
    else:
        verdict = "base" if as_base > as_folder else "other"
    return Served(
        verdict=verdict,
        requests=len(given),
        telling=len(telling),
        as_folder=as_folder,
        as_base=as_base,
        equal=equal,
    )


class _Endpoint:
    def __init__(self, url: str, *, key: str | None, timeout_s: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address of a server; expected http://HOST:PORT or http://HOST:PORT/v1.")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        # No proxy: the endpoint is the one that was named.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def models(self) -> list[str]:
        names: list[str] = self._ask("/models", lambda found: [str(row["id"]) for row in found["data"]])
        return names

    def only_model(self, names: Sequence[str], wanted: str) -> str:
        if wanted in names:
            return wanted
        if len(names) != 1:
            raise ConfigError(f"{self.url} serves {', '.join(names)}; say with --model which of them is the folder.")
        return names[0]

    def ask(self, model: str, sample: Sample, max_tokens: int) -> str:
        body = {"model": model, "messages": to_messages(sample), "max_tokens": max_tokens, "temperature": 0}
        text = self._ask("/chat/completions", lambda found: found["choices"][0]["message"]["content"], body)
        return str(text or "").strip()

    def _ask(self, path: str, read: Callable[[Any], Any], body: Any = None) -> Any:
        """What `read` finds in the answer. Raises ModelError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return read(json.load(response))
        except urllib.error.HTTPError as error:
            raise ModelError(
                f"{self.url}{path} answers {error.code}: {error.read()[:300].decode(errors='replace')}"
            ) from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise ModelError(f"{self.url}{path} does not answer like a server of OpenAI's kind: {error!r}") from None


def to_messages(sample: Sample) -> list[dict[str, Any]]:
    """A request as OpenAI's messages, its pictures as data URIs. Pictures without a mark come first."""
    images = iter(sample.images)
    marked = any(IMAGE_MARK in turn.text for turn in sample.request if turn.role == "user")
    messages: list[dict[str, Any]] = []
    first = True
    for turn in sample.request:
        if turn.role != "user":
            messages.append({"role": turn.role, "content": [{"type": "text", "text": turn.text}]})
            continue
        parts: list[dict[str, Any]] = []
        if first and not marked:
            parts += [_image_part(path) for path in images]
        first = False
        for number, text in enumerate(turn.text.split(IMAGE_MARK)):
            if number:
                parts.append(_image_part(next(images)))
            if text := (text.strip() if marked else text):
                parts.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": parts})
    return messages


_KINDS = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}


def _image_part(path: Path) -> dict[str, Any]:
    kind = _KINDS.get(path.suffix.lower(), "png")
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


__all__ = ["Served", "check_served", "judge", "probe_samples", "to_messages"]
