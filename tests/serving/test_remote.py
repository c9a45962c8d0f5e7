"""The router in front of a vLLM server: a stand-in answers here, `make serve-test` has the real one."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_kit
from holdfast.checkpoints.value import Checkpoint
from holdfast.errors import AdapterError, ConfigError, ModelError
from holdfast.serving import remote
from holdfast.serving.api_error import ApiError
from holdfast.serving.protocol import ChatRequest, Limits
from holdfast.serving.remote import ZEROS, RemoteEngine
from holdfast.tuners.cram.folder import load_expert
from holdfast.tuners.cram.guard import Evidence, Guard
from holdfast.tuners.cram.standalone import Decision, export_router


@dataclass
class StandIn:
    """A server of vLLM's kind. models: what it lists. asked: (path, body). refusing: status -> sentence, once."""

    models: list[str]
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    failing: tuple[int, str] | None = None
    first_token: dict[int, float] = field(default_factory=dict)
    url: str = ""


def serve_stand_in(state: StandIn) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            rows = {"data": [{"id": name} for name in state.models]}
            self._send(200, rows if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (state.asked if self.path.endswith("completions") else state.told).append((self.path, body))
            if state.failing is not None and self.path.endswith("completions"):
                (status, sentence), state.failing = state.failing, None
                self._send(status, {"error": {"message": sentence, "type": "x", "param": None, "code": status}})
            elif self.path == "/v1/load_lora_adapter":
                state.models.append(body["lora_name"])
                self._send(200, {})
            elif body.get("stream"):
                self._stream(body["model"])
            else:
                self._send(200, answer(body))

        def _send(self, status: int, data: Any) -> None:
            raw = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def _stream(self, model: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for piece in (" ", "by ", " ", model, " "):
                chunk = {"choices": [{"delta": {"content": piece}, "finish_reason": None}]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            last = {"choices": [{"delta": {}, "finish_reason": "length"}]}
            usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
            self.wfile.write(f"data: {json.dumps(last)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"message": {"content": f" by {body['model']} "}, "finish_reason": "stop"}
        if body.get("logprobs"):
            rows = [{"token": f"token_id:{i}", "logprob": value} for i, value in state.first_token.items()]
            choice["logprobs"] = {"content": [{"top_logprobs": rows}]}
        return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def stand_in():
    state = StandIn(models=["base", "warm", "cold", "maths"])
    server = serve_stand_in(state)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def router(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "router"
    export_router(world.cram, out)
    return out


def engine(world, stand_in, **options) -> RemoteEngine:
    checkpoint = Checkpoint(base=str(world.base), adapters=(str(options.pop("cram", world.cram)),))
    limits = options.pop("limits", Limits(timeout_s=30))
    return RemoteEngine(checkpoint, name="cram", limits=limits, url=stand_in.url, **options)


async def said(made: RemoteEngine, *requests: ChatRequest) -> list[Any]:
    """The pieces of each request's answer, or its ApiError."""
    found: list[Any] = []
    for request in requests:
        try:
            found.append([piece async for piece in made.answer(request)])
        except ApiError as error:
            found.append(error)
    return found


def run(made: RemoteEngine, *requests: ChatRequest) -> list[Any]:
    async def whole() -> list[Any]:
        await made.start()
        try:
            return await said(made, *requests)
        finally:
            await made.stop()

    return asyncio.run(whole())


def request(world, task: str = "warm", number: int = 0, model: str = "cram", **options) -> ChatRequest:
    return ChatRequest(model=model, sample=world.samples[task][number], max_tokens=6, **options)


def test_each_request_goes_to_its_expert_with_the_rule_of_tokenisation(world, stand_in, router):
    names = [("warm", 0), ("cold", 1), ("maths", 2)]
    found = run(engine(world, stand_in, router=router), *(request(world, *name) for name in names))
    for (task, number), pieces in zip(names, found, strict=True):
        expected = world.routes[f"{task}-{number}"]
        (piece,) = pieces
        best = max(expected["weights"], key=expected["weights"].get) if not expected["abstained"] else "base"
        assert (
            piece.text == f"by {ZEROS if best == 'base' else best}"
            and piece.finish == "stop"
            and piece.completion_tokens == 2
        )
        assert piece.route["answered_by"] == best and piece.route["group"] == expected["group"]
    for _, body in stand_in.asked:
        # The template does not spell the beginning, so the tokenizer adds it, as the transformers path does.
        assert body["add_special_tokens"] is True and body["temperature"] == 0.0 and body["max_tokens"] == 6
    picture = stand_in.asked[0][1]["messages"][0]["content"][0]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_stream_is_stripped_like_an_answer(world, stand_in, router):
    (pieces,) = run(engine(world, stand_in, router=router), request(world, model="cram:cold", stream=True))
    assert "".join(piece.text for piece in pieces) == "by  cold" and pieces[-1].finish == "length"
    assert pieces[-1].route == {"answered_by": "cold", "reason": "asked for by name"} and pieces[-1].prompt_tokens == 3


def test_what_the_base_would_refuse_the_base_answers(world, stand_in, router, monkeypatch):
    guard = Guard(
        form="openings",
        false_alarm=0.01,
        openings=(40,),
        opening_texts=("i",),
        refusals=Evidence(log_odds=None),
        tasks={},
        threshold=0.0,
        caught=1.0,
        screened={},
    )
    opened = remote.open_exported(router)
    opened.stored = replace(opened.stored, guard=guard)
    monkeypatch.setattr(remote, "open_exported", lambda folder: opened)
    stand_in.first_token = {40: -0.1, 7: -3.0}
    ((refused,),) = run(engine(world, stand_in, router=router), request(world))
    assert refused.text == f"by {ZEROS}" and refused.route["reason"] == "guarded" and refused.route["guard_score"] > 2
    asked = stand_in.asked[0][1]
    assert asked["model"] == ZEROS and asked["max_tokens"] == 1 and asked["return_tokens_as_token_ids"] is True
    stand_in.first_token = {7: -0.1}
    ((let,),) = run(engine(world, stand_in, router=router), request(world))
    assert let.route["reason"] == "routed" and let.route["guard_score"] < -10
    opened.stored = replace(opened.stored, guard=replace(guard, form="probe"))
    with pytest.raises(AdapterError, match=r"its guard is a probe, .* --backend transformers"):
        run(engine(world, stand_in, router=router))


def test_a_request_of_several_experts_goes_where_it_is_told(world, stand_in, router, monkeypatch):
    shared = Decision(weights={"warm": 0.6, "cold": 0.4, "maths": 0.0}, group="warm", similarity={}, reason="routed")
    monkeypatch.setattr(remote.StandaloneRouter, "decide", lambda self, samples: [shared] * len(samples))
    ((first,),) = run(engine(world, stand_in, router=router), request(world))
    assert first.text == "by warm" and first.route["exact"] is False and first.route["largest_share_off_by"] == 0.4
    (refused,) = run(engine(world, stand_in, router=router, mixed="refuse"), request(world))
    assert refused.status == 409 and "warm 0.60, cold 0.40" in refused.message
    made = engine(world, stand_in, router=router, mixed="merge")
    seen = {}

    async def keep(path, body):
        if path == "/v1/load_lora_adapter" and body["lora_name"] != ZEROS:
            seen[body["lora_name"]] = load_expert(Path(body["lora_path"]))

    monkeypatch.setattr(made, "_told", keep)
    (one,), (two,) = run(made, request(world), request(world))
    assert one.text == two.text == "by mixture-1x3-0x5" and list(seen) == ["mixture-1x3-0x5"]
    assert one.route["served_weights"] == {"warm": 0.625, "cold": 0.375} and one.route["largest_share_off_by"] == 0.025
    folders = remote.open_exported(router).folders
    warm, cold = load_expert(folders["warm"]), load_expert(folders["cold"])
    for name, (a, b) in seen["mixture-1x3-0x5"].items():
        parts = [0.625 * warm[name][1] @ warm[name][0], 0.375 * cold[name][1] @ cold[name][0]]
        assert torch.allclose(b @ a, sum(parts), atol=1e-6)


@pytest.mark.parametrize(
    "status, sentence, code",
    [
        (400, "This model's maximum context length is 64", "context_length_exceeded"),
        (400, "temperature is odd", "invalid_value"),
        (429, "busy", "overloaded"),
        (500, "boom", "backend_error"),
    ],
)
def test_the_servers_errors_are_told_on(world, stand_in, router, status, sentence, code):
    stand_in.failing = (status, sentence)
    (error,) = run(engine(world, stand_in, router=router), request(world))
    assert isinstance(error, ApiError) and error.code == code and sentence in error.message
    assert error.status == (502 if status == 500 else status)


def test_a_server_that_is_gone_or_slow_is_no_answer(world, stand_in, router):
    made = engine(world, stand_in, router=router)

    async def whole() -> list[Any]:
        await made.start()
        await made._client.aclose()
        import httpx2

        made._client = httpx2.AsyncClient(base_url="http://127.0.0.1:9", trust_env=False)
        found = await said(made, request(world))
        made._limits = Limits(timeout_s=1e-6)
        found += await said(made, request(world))
        made._limits = Limits(waiting=1)
        made._line = 1
        found += await said(made, request(world))
        await made.stop()
        return found

    gone, slow, busy = asyncio.run(whole())
    assert (gone.status, gone.code) == (503, "backend_down")
    assert (slow.status, slow.code) == (504, "timeout") and (busy.status, busy.headers) == (429, {"Retry-After": "1"})


def test_a_new_expert_is_handed_to_the_server_before_it_is_asked(world, stand_in, router, tmp_path, monkeypatch):
    folder = shutil.copytree(world.cram, tmp_path / "cram")
    monkeypatch.setattr(remote, "_WATCH_S", 0.02)
    made = engine(world, stand_in, router=router, cram=folder)
    data = json.loads((folder / "router.json").read_text())

    async def whole() -> None:
        await made.start()
        data["experts"][2]["name"] = "sums"
        (folder / "router.json").write_text(json.dumps(data))
        for _ in range(200):
            if "sums" in made.state["experts"]:
                break
            await asyncio.sleep(0.02)
        assert "cram:sums" in made.models
        (folder / "router.json").write_text("{")
        for _ in range(200):
            if "problem" in made.state:
                break
            await asyncio.sleep(0.02)
        assert "the old experts answer on" in made.state["problem"] and made.state["ok"]
        await made.stop()

    asyncio.run(whole())
    (zeros, loaded) = [body for path, body in stand_in.told if path == "/v1/load_lora_adapter"]
    # The base is asked for as an adapter, too: beside others, rows without one are wrong on vLLM's CPU build.
    assert zeros["lora_name"] == ZEROS
    assert loaded["lora_name"] == "sums" and loaded["lora_path"].endswith("02-maths")


def test_what_vllm_would_serve_in_part_or_not_at_all_is_refused_at_the_start(world, stand_in, router, tmp_path):
    stand_in.models.remove("cold")
    with pytest.raises(ModelError, match=r"maths, warm, but not cold. Start it with --served-model-name"):
        run(engine(world, stand_in, router=router))
    whole = adapter_kit.train(world.base, tmp_path / "whole", target_modules=["q_proj", "linear_1"])
    limits = Limits()
    with pytest.raises(AdapterError, match="lie outside the text decoder"):
        run(
            RemoteEngine(
                Checkpoint(base=str(world.base), adapters=(str(whole),)), name="x", limits=limits, url="http://x"
            )
        )
    text = adapter_kit.train(world.base, tmp_path / "text", target_modules=["up_proj"])
    made = RemoteEngine(Checkpoint(base=str(world.base), adapters=(str(text),)), name="x", limits=limits)
    command = " ".join(made.command(7))
    assert "--enable-lora --max-lora-rank 8 --max-loras 1" in command and f"--lora-modules x={text}" in command
    if "vllm" not in sys.modules:
        with pytest.raises(ConfigError, match=r"has no vLLM, .*pip install vllm.*--vllm-python.*--vllm-url"):
            run(made)
