"""A chat completion request as a value: strictly read, bounded, with its pictures in a folder of their own.

What this server does not do (tools, several choices, penalties) is refused by name, never left out in silence. Pictures
come as data URIs; neither a URL nor a file of this machine is read, except files below a folder that the operator
names.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import tempfile
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.data.images import image_size
from holdfast.data.types import Role, Sample, Turn
from holdfast.errors import ConfigError, DataError
from holdfast.models.encode import IMAGE_MARK
from holdfast.serving.api_error import ApiError, bad_request

# Tokens of an answer to a request that names no number.
LONGEST_UNASKED = 256


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    body_bytes, images, image_pixels: of one request; image_pixels of each picture, read from its header before it is
    decoded. max_tokens: of an answer. waiting: requests in line; more are told to come back. timeout_s: from arrival to
    the last token. files: pictures below this folder may be named by file:// URLs; None: none.
    """

    body_bytes: int = 32_000_000
    images: int = 8
    image_pixels: int = 36_000_000
    max_tokens: int = 1024
    waiting: int = 256
    timeout_s: float = 120.0
    files: Path | None = None

    def __post_init__(self) -> None:
        for name in ("body_bytes", "image_pixels", "max_tokens", "waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if self.images < 0 or not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ConfigError(f"images {self.images} (0 or more) and timeout_s {self.timeout_s} (above 0) are bounds.")


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """model: the name that was asked for. sample: the conversation. temperature: 0 decodes greedily (the default).

    max_tokens: None where the client left it open. folder: holds the pictures, removed by `close`.
    """

    model: str
    sample: Sample
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def most_tokens(self, limits: Limits) -> int:
        """The most tokens of the answer, also where the client left it open."""
        return self.max_tokens or min(LONGEST_UNASKED, limits.max_tokens)

    def close(self) -> None:
        """Remove the pictures."""
        if self.folder is not None:
            self.folder.cleanup()


# Fields that change nothing about an answer here.
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# Fields that are taken at the value that means "nothing", and refused at any other.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1, 1.0),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_READ = frozenset(
    {
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "seed",
        "stop",
        "stream",
        "stream_options",
    }
)
_ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PICTURES = {"image/png": ".png", "image/jpeg": ".jpg", "image/jpg": ".jpg", "image/webp": ".webp", "image/gif": ".gif"}


def read_body(body: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises ApiError."""
    try:
        text = body.decode("utf-8-sig")
        data = json.loads(text)
        if "\\u" in text:
            # Half a character (an unpaired surrogate) can be neither tokenised nor said back.
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise bad_request(f"The body is a {type(data).__name__}; expected an object with model and messages.")
    return data


def read_request(data: Mapping[str, Any], limits: Limits, *, id: str) -> ChatRequest:
    """The request that a body asks for; pictures are written to a temporary folder. id: of the request, for errors.

    Raises: ApiError: 400, naming the field.
    """
    for name in data:
        if name in _IGNORED or name in _READ:
            continue
        if name not in _NEUTRAL:
            raise bad_request(f"{name} is no field that this server knows; leave it out.", param=name)
        if data[name] is not None and data[name] not in _NEUTRAL[name]:
            raise bad_request(
                f"{name} = {data[name]!r:.80} is not served here; leave it out or give {_NEUTRAL[name][0]!r}.",
                param=name,
            )
    model = data.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request(f"model is {model!r}; expected one of the names of GET /v1/models.", param="model")
    options = data.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        raise bad_request(f"stream_options is {options!r:.80}; expected an object.", param="stream_options")
    asked: dict[str, Any] = {
        "max_tokens": _max_tokens(data, limits),
        "temperature": _temperature(data.get("temperature")),
        "seed": _seed(data.get("seed")),
        "stop": _stop(data.get("stop")),
        "stream": _flag(data.get("stream"), "stream"),
        "include_usage": _flag((options or {}).get("include_usage"), "stream_options.include_usage"),
    }
    folder = tempfile.TemporaryDirectory(prefix="holdfast-request-")
    try:
        sample = _sample(data.get("messages"), limits, Path(folder.name), id)
    except BaseException:
        folder.cleanup()
        raise
    return ChatRequest(model=model, sample=sample, folder=folder, **asked)


def _max_tokens(data: Mapping[str, Any], limits: Limits) -> int | None:
    given = [name for name in ("max_completion_tokens", "max_tokens") if data.get(name) is not None]
    if not given:
        return None
    value = _whole(data[given[0]], given[0])
    assert value is not None
    if not 1 <= value <= limits.max_tokens:
        raise bad_request(f"{given[0]} is {value}; expected 1 to {limits.max_tokens}.", param=given[0])
    return value


def _whole(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_request(f"{name} is {value!r:.80}; expected a whole number.", param=name)
    return value


def _seed(value: Any) -> int | None:
    seed = _whole(value, "seed")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise bad_request(f"seed is {value!r:.80}; expected a number of 64 bits.", param="seed")
    return seed


def _temperature(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2:
        raise bad_request(f"temperature is {value!r:.80}; expected a number from 0 to 2.", param="temperature")
    return float(value)


def _flag(value: Any, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name} is {value!r:.80}; expected true or false.", param=name)
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or len(found) > 4 or not all(isinstance(text, str) and text for text in found):
        raise bad_request(f"stop is {value!r:.80}; expected a text, or up to 4 of them.", param="stop")
    return tuple(found)


def _sample(messages: Any, limits: Limits, folder: Path, id: str) -> Sample:
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages is empty or no list; expected at least one message.", param="messages")
    images: list[Path] = []

    def keep(url: Any, where: str) -> None:
        if len(images) >= limits.images:
            raise bad_request(f"more than {limits.images} pictures in one request.", param="messages")
        images.append(_picture(url, limits, folder / f"{len(images)}", where))

    turns = [_turn(message, f"messages[{i}]", keep) for i, message in enumerate(messages)]
    if turns[-1].role != "user":
        raise bad_request(f"the last message is of the {turns[-1].role}; expected the user's.", param="messages")
    return Sample(id=id, turns=tuple(turns), images=tuple(images))


def _turn(message: Any, where: str, keep: Callable[[Any, str], None]) -> Turn:
    if not isinstance(message, Mapping):
        raise bad_request(f"{where} is a {type(message).__name__}; expected an object.", param="messages")
    named = message.get("role")
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise bad_request(f"{where}.role is {named!r:.40}; expected system, user or assistant.", param="messages")
    if message.get("tool_calls"):
        raise bad_request(f"{where} calls tools, which are not served here.", param="messages")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise bad_request(f"{where}.content is {content!r:.40}; expected a text or a list of parts.", param="messages")
    pieces: list[tuple[str, str]] = []
    for number, part in enumerate(parts):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if IMAGE_MARK in part["text"]:
                raise bad_request(
                    f"{place} spells {IMAGE_MARK}, which marks a picture's place; send the picture as an image_url "
                    "part.",
                    param="messages",
                )
            pieces.append(("text", part["text"]))
        elif kind == "image_url" and role == "user":
            url = part.get("image_url")
            keep(url.get("url") if isinstance(url, Mapping) else url, place)
            pieces.append(("image", IMAGE_MARK))
        else:
            raise bad_request(
                f"{place} is {kind!r:.40} in a message of the {role}; expected text, or image_url in the user's.",
                param="messages",
            )
    return Turn(role=role, text="\n".join(text for _, text in pieces))


def _picture(url: Any, limits: Limits, place: Path, where: str) -> Path:
    if not isinstance(url, str):
        raise bad_request(f"{where} has no url; expected data:image/png;base64,...", param="messages")
    if url.startswith("file://"):
        path = _allowed_file(url, limits, where)
    elif url.startswith("data:"):
        path = _written(url, place, where)
    else:
        raise bad_request(
            f"{where} names {url!r:.60}; this server fetches nothing. Send the picture itself: "
            "data:image/png;base64,...",
            param="messages",
            code="image_url_not_allowed",
        )
    try:
        width, height = image_size(path)
    except DataError:
        raise bad_request(f"{where} is no picture that can be read.", param="messages", code="invalid_image") from None
    if width * height > limits.image_pixels:
        raise bad_request(
            f"{where} has {width} x {height} pixels, more than {limits.image_pixels / 1e6:g} million. Shrink it.",
            param="messages",
            code="image_too_large",
        )
    return path


def _written(url: str, place: Path, where: str) -> Path:
    head, comma, data = url.partition(",")
    media, _, encoding = head.removeprefix("data:").rpartition(";")
    if not comma or encoding != "base64" or media.lower() not in _PICTURES:
        raise bad_request(
            f"{where} is {head!r:.60}; expected data:image/png;base64,... ({', '.join(sorted(_PICTURES))}).",
            param="messages",
            code="invalid_image",
        )
    path = place.with_suffix(_PICTURES[media.lower()])
    try:
        path.write_bytes(base64.b64decode(data, validate=True))
    except binascii.Error as error:
        raise bad_request(f"{where} is no Base64: {error}.", param="messages", code="invalid_image") from None
    return path


def _allowed_file(url: str, limits: Limits, where: str) -> Path:
    refused = bad_request(
        f"{where} names a file of the server; "
        + ("none is read here." if limits.files is None else "only those below the allowed folder are read."),
        param="messages",
        code="image_url_not_allowed",
    )
    if limits.files is None:
        raise refused
    try:
        path = Path(urllib.parse.unquote(url.removeprefix("file://"))).resolve()
        allowed = path.is_relative_to(limits.files.resolve()) and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        raise refused from None
    if not allowed:
        raise refused
    return path


__all__ = ["LONGEST_UNASKED", "ApiError", "ChatRequest", "Limits", "read_body", "read_request"]
