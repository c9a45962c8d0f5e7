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
from safetensors.torch import load_file, save_file

import adapter_kit
from holdfast.checkpoints.value import Checkpoint
from holdfast.errors import AdapterError, ConfigError, ModelError
from holdfast.serving import remote
from holdfast.serving.api_error import ApiError
from holdfast.serving.protocol import ChatRequest, Limits
from holdfast.serving.remote import ZEROS, RemoteEngine
from holdfast.serving.vllm_client import VllmClient
from holdfast.tuners.cram.folder import load_expert
from holdfast.tuners.cram.guard import Evidence, Guard
from holdfast.tuners.cram.standalone import Decision, export_router


@dataclass
class StandIn:
    """A server of vLLM's kind. models: what it lists. asked, told: (path, body), of requests and of adapters.

    failing: status and sentence of the next answer. roots: folder behind a model. context: tokens, as it says.
    """

    models: list[str]
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    failing: tuple[int, str] | None = None
    first_token: dict[int, float] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    context: int | None = None
    url: str = ""


def serve_stand_in(state: StandIn) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            listed = [{"id": name, "root": state.roots.get(name)} for name in state.models]
            rows = {"data": [row | {"max_model_len": state.context} for row in listed]}
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
            elif self.path == "/v1/unload_lora_adapter":
                state.models.remove(body["lora_name"])
                self._send(200, {})
            elif body["model"] not in state.models:
                sentence = f"The model `{body['model']}` does not exist."
                self._send(404, {"error": {"message": sentence, "type": "NotFoundError", "param": "model"}})
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


def zeros(stand_in: StandIn) -> str:
    """What the base is called at the server: an adapter of the process that handed it over."""
    return [body["lora_name"] for _, body in stand_in.told if body["lora_name"].startswith(ZEROS)][-1]


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
            piece.text == (f"by {zeros(stand_in)}" if best == "base" else f"by {best}")
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
    stored = remote.read_router(world.cram)
    monkeypatch.setattr(remote, "read_router", lambda folder: replace(stored, guard=guard))
    stand_in.first_token = {40: -0.1, 7: -3.0}
    ((refused,),) = run(engine(world, stand_in, router=router), request(world))
    assert refused.text == f"by {zeros(stand_in)}"
    assert refused.route["reason"] == "guarded" and refused.route["guard_score"] > 2
    asked = stand_in.asked[0][1]
    assert asked["model"] == zeros(stand_in) and asked["max_tokens"] == 1
    assert asked["return_tokens_as_token_ids"] is True
    stand_in.first_token = {7: -0.1}
    ((let,),) = run(engine(world, stand_in, router=router), request(world))
    assert let.route["reason"] == "routed" and let.route["guard_score"] < -10
    guard = replace(guard, form="probe")
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
    load = VllmClient.load

    async def keep(self, name, path):
        if "mixture" in name:
            seen[name] = load_expert(Path(path))
        await load(self, name, path)

    monkeypatch.setattr(VllmClient, "load", keep)
    (one,), (two,) = run(made, request(world), request(world))
    (name,) = seen
    assert one.text == two.text == f"by {name}" and name.endswith("-coldx3-warmx5")
    assert one.route["served_weights"] == {"warm": 0.625, "cold": 0.375} and one.route["largest_share_off_by"] == 0.025
    folders = remote.open_exported(router).folders
    warm, cold = load_expert(folders["warm"]), load_expert(folders["cold"])
    for linear, (a, b) in seen[name].items():
        parts = [0.625 * warm[linear][1] @ warm[linear][0], 0.375 * cold[linear][1] @ cold[linear][0]]
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
        await made._client.close()
        made._client = VllmClient("http://127.0.0.1:9", Limits())
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
        # Learned anew under its old name: what the server holds under that name is another expert now.
        shutil.copytree(folder / "experts/00-warm", folder / "experts/01-cold", dirs_exist_ok=True)
        data["experts"][1]["sha256"] = data["experts"][0]["sha256"]
        (folder / "router.json").write_text(json.dumps(data))
        for _ in range(200):
            if "sums" in made.state["experts"]:
                break
            await asyncio.sleep(0.02)
        assert "cram:sums" in made.models
        (cold,) = (await said(made, request(world, model="cram:cold")))[0]
        assert cold.text == f"by cold-{data['experts'][1]['sha256'][:12]}"
        (folder / "router.json").write_text("{")
        for _ in range(200):
            if "problem" in made.state:
                break
            await asyncio.sleep(0.02)
        assert "the old experts answer on" in made.state["problem"] and made.state["ok"]
        await made.stop()

    asyncio.run(whole())
    (zeros, cold, loaded) = [body for path, body in stand_in.told if path == "/v1/load_lora_adapter"]
    # The base is asked for as an adapter, too: beside others, rows without one are wrong on vLLM's CPU build.
    assert zeros["lora_name"].startswith(ZEROS) and cold["lora_path"].endswith("01-cold")
    assert loaded["lora_name"].startswith("sums-") and loaded["lora_path"].endswith("02-maths")
    # A server that goes on is left without what lay in this process's folder.
    assert not [name for name in stand_in.models if name.startswith(ZEROS)]


def test_a_server_that_was_restarted_is_given_again_what_it_lost(world, stand_in, router, monkeypatch):
    shared = Decision(weights={"warm": 0.5, "cold": 0.5, "maths": 0.0}, group="warm", similarity={}, reason="routed")
    monkeypatch.setattr(remote.StandaloneRouter, "decide", lambda self, samples: [shared] * len(samples))
    made = engine(world, stand_in, router=router, mixed="merge")

    async def whole() -> list[Any]:
        await made.start()
        asked = [request(world), request(world, model="cram:base"), request(world, model="cram:base", stream=True)]
        found = await said(made, *asked)
        stand_in.models[:] = ["base", "warm", "cold", "maths"]
        found += await said(made, *asked)
        stand_in.models.remove("cold")
        found += await said(made, request(world, model="cram:cold"))
        await made.stop()
        return found

    *found, lost = asyncio.run(whole())
    text = ["".join(piece.text for piece in pieces) for pieces in found]
    assert text[:3] == text[3:] and text[0].startswith("by mixture-") and text[1].startswith(f"by {ZEROS}")
    # An expert that the server was started with is not ours to give; the fault is the server's, not the client's.
    assert (lost.status, lost.code) == (503, "backend_error") and "`cold` does not exist" in lost.message


def test_two_processes_before_one_server_do_not_meet(world, stand_in, router):
    async def whole() -> list[Any]:
        first, second = (engine(world, stand_in, router=router) for _ in range(2))
        await first.start()
        await second.start()
        await first.stop()
        found = await said(second, request(world, model="cram:base"))
        await second.stop()
        return found

    ((piece,),) = asyncio.run(whole())
    assert piece.text.startswith(f"by {ZEROS}-")


def test_other_weights_behind_an_experts_name_are_refused(world, stand_in, router, tmp_path):
    stand_in.roots = {"warm": str(world.cram / "experts" / "01-cold"), "cold": "/not/of/this/machine"}
    with pytest.raises(ModelError, match=r"serves .*01-cold as warm, whose weights are not those in .*00-warm"):
        run(engine(world, stand_in, router=router))
    stand_in.roots = {"base": "hub/base", "warm": str(world.cram / "experts" / "00-warm"), "cold": "hub/base"}
    with pytest.raises(ModelError, match=r"serves its base, hub/base, under the name cold"):
        run(engine(world, stand_in, router=router))
    folder = shutil.copytree(world.cram, tmp_path / "cram")
    shutil.copytree(folder / "experts/01-cold", folder / "experts/00-warm", dirs_exist_ok=True)
    with pytest.raises(AdapterError, match="are not those that its router was written with"):
        run(engine(world, stand_in, router=router, cram=folder))


def test_an_exported_router_does_not_hide_another_base(world, stand_in, router, tmp_path):
    other = shutil.copytree(world.base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(key for key in tensors if "layers.1." in key and key.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name] + 0.01}, other / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(base=str(other), adapters=(str(world.cram),))
    made = RemoteEngine(checkpoint, name="cram", limits=Limits(), url=stand_in.url, router=router)
    with pytest.raises(AdapterError, match=r"was trained on another base .*: 1 of \d+ weights have other values"):
        run(made)


def test_a_request_that_names_no_length_keeps_the_servers_bound(world, stand_in, router):
    open_ended = [replace(request(world), max_tokens=None)]
    for bound, stand_in.context, expected in ((1024, None, 256), (100, None, 100), (100, 64, 64), (1024, 8192, 256)):
        run(engine(world, stand_in, router=router, limits=Limits(timeout_s=30, max_tokens=bound)), *open_ended)
        assert stand_in.asked[-1][1]["max_tokens"] == expected


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
    # As an edit with `--coefficient keep` writes it beside the factors.
    scaled = shutil.copytree(text, tmp_path / "scaled")
    modules = [key for key in load_file(text / "adapter_model.safetensors") if key.endswith("lora_A.weight")]
    name = modules[0].removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    width = load_file(text / "adapter_model.safetensors")[modules[0]].shape[1]
    save_file({name: torch.full((width,), 1.5)}, scaled / "holdfast_input_scale.safetensors")
    with pytest.raises(AdapterError, match=r"input-scaling vectors of 1 modules .* by up to 0.5 away from 1"):
        run(
            RemoteEngine(
                Checkpoint(base=str(world.base), adapters=(str(scaled),)), name="x", limits=limits, url="http://x"
            )
        )
    if "vllm" not in sys.modules:
        with pytest.raises(ConfigError, match=r"has no vLLM, .*pip install vllm.*--vllm-python.*--vllm-url"):
            run(made)
