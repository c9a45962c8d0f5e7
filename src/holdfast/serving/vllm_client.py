"""Talking to a vLLM server: completions, LoRA modules, and its errors told on in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import httpx2

from holdfast.errors import ModelError
from holdfast.evaluation.vllm import GUARD_LOGPROBS
from holdfast.serving.api_error import ApiError, bad_request
from holdfast.serving.engine import Piece
from holdfast.serving.protocol import Limits

_CHAT = "/v1/chat/completions"


class UnknownModuleError(ApiError):
    """The server does not know the model or LoRA module that it was asked for: it was restarted, or let go of it."""


class VllmClient:
    """One server's endpoints. Whatever goes wrong while a request is answered is an ApiError.

    url: with or without /v1.
    """

    def __init__(self, url: str, limits: Limits) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        bound = httpx2.Timeout(limits.timeout_s, connect=10.0)
        pool = httpx2.Limits(max_connections=2 * limits.waiting, max_keepalive_connections=64)
        self._client = httpx2.AsyncClient(base_url=self.url, timeout=bound, limits=pool, trust_env=False)
        # Tokens of prompt and answer together, once the server has said it (`modules`).
        self.context_length: int | None = None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def what_is_wrong(self) -> str | None:
        """None where the server is up and healthy."""
        try:
            status = (await self._client.get("/health")).status_code
        except httpx2.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        return None if status == 200 else f"/health answers {status}"

    async def modules(self) -> dict[str, str | None]:
        """Every name that it serves -> the folder behind it, where it says so. Raises ModelError."""
        try:
            listed = (await self._client.get("/v1/models")).json()["data"]
            lengths = [row["max_model_len"] for row in listed if row.get("max_model_len")]
            self.context_length = min(lengths, default=None)
            return {str(row["id"]): row.get("root") for row in listed}
        except (httpx2.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{self.url}/v1/models says nothing that can be read: {error!r}") from error

    async def load(self, name: str, path: str) -> None:
        """Register a LoRA module. Raises ApiError: the server does not take it."""
        await self._told("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload(self, name: str) -> None:
        """Let go of a LoRA module. Raises ApiError."""
        await self._told("/v1/unload_lora_adapter", {"lora_name": name})

    async def _told(self, path: str, body: Mapping[str, Any]) -> None:
        with _told_on():
            answer = await self._client.post(path, json=body)
        if answer.status_code != 200:
            message, _ = _said(answer.text)
            raise ApiError(502, f"vLLM does not do {path}: {message[:300]}", code="backend_error")

    async def first_token(self, model: str, messages: Mapping[str, Any]) -> dict[int, float]:
        """The likeliest first tokens of an answer with their log-probabilities. Raises ApiError."""
        body = {
            **messages,
            "model": model,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": GUARD_LOGPROBS,
            "return_tokens_as_token_ids": True,
        }
        answer = await self._post(body)
        try:
            first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            return {int(row["token"].removeprefix("token_id:")): min(0.0, float(row["logprob"])) for row in first}
        except (LookupError, TypeError, ValueError) as error:
            raise _unreadable(error) from None

    async def complete(self, body: Mapping[str, Any]) -> Piece:
        """A whole answer, stripped. Raises ApiError."""
        answer = await self._post(body)
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            return Piece(
                text=(choice["message"]["content"] or "").strip(),
                finish=_finish(choice["finish_reason"]),
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
            )
        except (LookupError, TypeError) as error:
            raise _unreadable(error) from None

    async def _post(self, body: Mapping[str, Any]) -> Any:
        with _told_on():
            response = await self._client.post(_CHAT, json=body)
        if response.status_code != 200:
            raise _from_server(response.status_code, response.text)
        try:
            return response.json()
        except ValueError as error:
            raise _unreadable(error) from None

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[Piece]:
        """An answer as it comes, stripped; the last piece says how it ended. Raises ApiError."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        began, held, finish, usage = False, "", None, {"prompt_tokens": 0, "completion_tokens": 0}
        with _told_on():
            async with self._client.stream("POST", _CHAT, json=body) as response:
                if response.status_code != 200:
                    raise _from_server(response.status_code, (await response.aread()).decode(errors="replace"))
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise ApiError(502, str(event["error"])[:300], code="backend_error")
                    usage = event.get("usage") or usage
                    for choice in event["choices"]:
                        finish = choice.get("finish_reason") or finish
                        held += choice["delta"].get("content") or ""
                    # The answer is stripped, as everywhere: no blank at its beginning, none sent before it is inside.
                    held = held if began else held.lstrip()
                    ready = held.rstrip()
                    if ready:
                        yield Piece(text=ready)
                        began, held = True, held[len(ready) :]
        if finish is None:
            raise ApiError(502, "the vLLM server ended its answer in the middle.", code="backend_error")
        yield Piece(
            finish=_finish(finish),
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
        )


@contextmanager
def _told_on() -> Iterator[None]:
    """Within, what the connection suffers is an ApiError."""
    try:
        yield
    except httpx2.TimeoutException:
        raise ApiError(504, "the vLLM server took too long.", code="timeout") from None
    except httpx2.HTTPError as error:
        raise ApiError(503, f"the vLLM server does not answer: {type(error).__name__}", code="backend_down") from None
    except (json.JSONDecodeError, LookupError, TypeError) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> ApiError:
    return ApiError(502, f"the vLLM server's answer cannot be read: {error!r:.200}", code="backend_error")


def _finish(reason: Any) -> Literal["stop", "length"]:
    return "length" if reason == "length" else "stop"


def _said(text: str) -> tuple[str, str | None]:
    """Message and field of an error's body."""
    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error.get("message", text)), error.get("param")
    except (ValueError, AttributeError):
        return text, None


def _from_server(status: int, text: str) -> ApiError:
    """An error of vLLM, told on: what the client did wrong stays its fault."""
    message, param = _said(text)
    if status == 400 and ("context length" in message or "max_model_len" in message or "longer than" in message):
        return bad_request(message[:500], param="messages", code="context_length_exceeded")
    if status == 404:
        # Not the client's: the name is one that was chosen here.
        return UnknownModuleError(503, f"the vLLM server: {message[:300]}", code="backend_error")
    if status in (400, 422):
        return ApiError(400, message[:500], code="invalid_value", param=param)
    if status == 429:
        return ApiError(429, message[:500], code="overloaded")
    return ApiError(502, f"the vLLM server answers {status}: {message[:300]}", code="backend_error")


__all__ = ["UnknownModuleError", "VllmClient"]
