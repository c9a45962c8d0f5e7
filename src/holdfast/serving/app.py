"""HTTP: OpenAI's chat completions, the list of models, and whether all is well."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from holdfast.errors import nearest
from holdfast.serving.api_error import ApiError
from holdfast.serving.engine import Engine, Piece
from holdfast.serving.protocol import ChatRequest, Limits, read_body, read_request
from holdfast.version import __version__

_log = logging.getLogger(__name__)


def build_app(engine: Engine, limits: Limits) -> Starlette:
    """The application around a started engine."""
    created = int(time.time())

    async def health(_: Request) -> Response:
        state = {**engine.state, "holdfast": __version__}
        return JSONResponse(state, status_code=200 if state["ok"] else 503)

    async def models(_: Request) -> Response:
        rows = [
            {"id": name, "object": "model", "created": created, "owned_by": "holdfast", "description": what}
            for name, what in engine.models.items()
        ]
        return JSONResponse({"object": "list", "data": rows})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        _require_model(engine, name)
        return JSONResponse({"id": name, "object": "model", "created": created, "owned_by": "holdfast"})

    async def chat(request: Request) -> Response:
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        # In a thread: megabytes of JSON and Base64 would hold up everyone's tokens.
        data = await asyncio.to_thread(read_body, await _body(request, limits))
        if isinstance(data.get("model"), str):
            _require_model(engine, data["model"])
        asked = await asyncio.to_thread(read_request, data, limits, id=identity)
        pieces = engine.answer(asked)
        try:
            # The first piece decides between an answer and an error of the right status.
            first = await anext(pieces)
        except BaseException:
            asked.close()
            raise
        if asked.stream:
            events = _events(first, pieces, asked, identity)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            found = [first, *[piece async for piece in pieces]]
        finally:
            asked.close()
        return JSONResponse(_completion(found, asked, identity))

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    handlers: Mapping[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _own_fault}
    return Starlette(routes=routes, exception_handlers=handlers)


def _require_model(engine: Engine, name: str) -> None:
    if name not in engine.models:
        hint = nearest(name, engine.models)
        nearer = f" The nearest is {hint!r}." if hint else ""
        listed = ", ".join(engine.models)
        raise ApiError(
            404, f"There is no model {name!r} here; there are {listed}.{nearer}", code="model_not_found", param="model"
        )


async def _body(request: Request, limits: Limits) -> bytes:
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limits.body_bytes:
                raise ApiError(
                    413,
                    f"The body is larger than {limits.body_bytes / 1e6:g} MB; send smaller pictures.",
                    code="too_large",
                )
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(400, "The client went away before its request was complete.", code="incomplete") from None
    return b"".join(parts)


def _completion(pieces: list[Piece], asked: ChatRequest, identity: str) -> dict[str, Any]:
    last = pieces[-1]
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
    return {
        "id": identity,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [{"index": 0, "message": message, "finish_reason": last.finish, "logprobs": None}],
        "usage": _usage(last),
        **({} if last.route is None else {"holdfast": dict(last.route)}),
    }


def _usage(last: Piece) -> dict[str, int]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }


async def _events(
    first: Piece, pieces: AsyncIterator[Piece], asked: ChatRequest, identity: str
) -> AsyncIterator[bytes]:
    """Server-sent events, as OpenAI streams them; the last chunk with a choice says who answered."""
    created = int(time.time())

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        data = {
            "id": identity,
            "object": "chat.completion.chunk",
            "created": created,
            "model": asked.model,
            "choices": choices,
            **more,
        }
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

    def choice(delta: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]

    async def whole() -> AsyncIterator[Piece]:
        yield first
        async for piece in pieces:
            yield piece

    try:
        yield event(choice({"role": "assistant", "content": ""}))
        last = first
        async for piece in whole():
            last = piece
            if piece.text:
                yield event(choice({"content": piece.text}))
        more = {} if last.route is None else {"holdfast": dict(last.route)}
        yield event(choice({}, last.finish), **more)
        if asked.include_usage:
            yield event([], usage=_usage(last))
    except ApiError as error:
        # The status has been sent; clients of OpenAI read an error out of the stream.
        yield f"data: {json.dumps(error.body(), ensure_ascii=False)}\n\n".encode()
    except Exception as error:  # noqa: BLE001 (the client hears of it in the stream, the log has all)
        _log.exception("a stream failed")
        yield f"data: {json.dumps(_fault(error).body(), ensure_ascii=False)}\n\n".encode()
    finally:
        with contextlib.suppress(RuntimeError):
            await pieces.aclose()  # type: ignore[attr-defined]
        asked.close()
    yield b"data: [DONE]\n\n"


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ApiError(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}. This server has POST /v1/chat/completions, GET "
        "/v1/models and GET /health.",
        code="not_found" if error.status_code == 404 else "method_not_allowed",
    )
    return JSONResponse(found.body(), status_code=error.status_code)


async def _own_fault(_: Request, error: Exception) -> Response:
    return JSONResponse(_fault(error).body(), status_code=500)


def _fault(error: Exception) -> ApiError:
    return ApiError(500, f"{type(error).__name__}: {error}", code="internal_error")


__all__ = ["build_app"]
