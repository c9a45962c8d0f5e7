"""vLLM behind the endpoint: the router in front, the experts as LoRA modules of one vLLM server.

Nothing of a request is kept, so any number of these processes stand before one server. The server is started here, or
one that runs is used. The guard asks the base for one token with its log-probabilities before a request goes on.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2

from holdfast.checkpoints.adapter import LoraAdapter
from holdfast.checkpoints.adapter_config import largest_rank, max_lora_rank, what_vllm_drops
from holdfast.checkpoints.value import Checkpoint
from holdfast.data.images import open_image
from holdfast.data.types import Sample
from holdfast.errors import AdapterError, ConfigError, DataError, HoldfastError, ModelError
from holdfast.evaluation.engine_log import root_cause
from holdfast.evaluation.vllm import GUARD_LOGPROBS, HOW_TO_INSTALL, adapters_to_serve
from holdfast.evaluation.vllm_options import VllmOptions
from holdfast.models.encode import adds_special_tokens, conversation, render
from holdfast.models.load import read_processor
from holdfast.models.tuner import is_tuner_folder
from holdfast.serving.api_error import ApiError, bad_request
from holdfast.serving.engine import BASE, Piece, chosen_part, model_names
from holdfast.serving.protocol import ChatRequest, Limits
from holdfast.tuners.cram.folder import Stamp, folder_stamp, read_router, save_expert
from holdfast.tuners.cram.merge import mixture_of_folders, quantised, save_nothing
from holdfast.tuners.cram.standalone import Decision, StandaloneRouter, open_exported, open_on_base

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
MixedName = Literal["first", "merge", "refuse"]
_WATCH_S = 2.0
# Shares of a mixture are multiples of one over this.
MIXTURE_STEPS = 8
_MIXTURES_KEPT = 64
# vLLM's CPU kernels (0.32) give rows without a LoRA the last slot's, where they share a batch with rows that have one
# (`lora/ops/torch_ops`: index -1). So the base is asked for as a LoRA of zeros, which is exact everywhere.
ZEROS = "holdfast-base"


class RemoteEngine:
    """A vLLM server that holds the base and the adapters, and what decides between them.

    url: of a running server whose LoRA modules bear the experts' names and whose base is called "base"; None starts
    one.
    python: the interpreter that has vLLM. arguments: more for its command line. router: folder of `export-router`.
    mixed: where several experts share a request, its largest share answers ("first"), or one LoRA that is made once
        per mixture, in eighths ("merge"), or it is refused.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        limits: Limits,
        url: str | None = None,
        python: str | None = None,
        router: Path | None = None,
        mixed: MixedName = "first",
        options: VllmOptions | None = None,
        arguments: Sequence[str] = (),
        dtype: str | None = None,
        start_timeout_s: float = 900.0,
    ) -> None:
        self._checkpoint, self._name, self._limits, self._mixed = checkpoint, name, limits, mixed
        self._folder = next((Path(a) for a in checkpoint.adapters if is_tuner_folder(a)), None)
        self._plain = [a for a in checkpoint.adapters if not is_tuner_folder(a)]
        self._router_folder = router
        self._options, self._dtype = options or VllmOptions(), dtype
        self._python, self._arguments = python or sys.executable, list(arguments)
        self._given_url, self._url = url, url
        self._start_timeout_s = start_timeout_s
        self._server: subprocess.Popen[bytes] | None = None
        self._log_lines: list[str] = []
        self._router: StandaloneRouter | None = None
        self._processor: Any = None
        self._client: httpx2.AsyncClient | None = None
        self._lock = asyncio.Lock()
        self._line = 0
        self._problem: str | None = None
        self._watching: asyncio.Task[None] | None = None
        self._zeros: Path | None = None
        self._base_name = BASE
        self._mixtures: dict[str, Path] = {}
        self._mixture_folder: tempfile.TemporaryDirectory[str] | None = None
        self._stamp: Stamp | None = None

    @property
    def models(self) -> Mapping[str, str]:
        """Name -> what it is."""
        if self._router is None:
            return {self._name: "the checkpoint"}
        return model_names(self._name, tuple(card.name for card in self._router.router.experts))

    @property
    def state(self) -> dict[str, Any]:
        """For /health."""
        alive = self._client is not None and (self._server is None or self._server.poll() is None)
        found: dict[str, Any] = {"ok": alive, "backend": "vllm", "model": self._name, "waiting": self._line}
        if self._router is not None:
            found["experts"] = [card.name for card in self._router.router.experts]
            found["router_bytes"] = self._router.bytes_held
            found["router_load_seconds"] = round(self._router.load_seconds, 2)
        if self._problem:
            found["problem"] = self._problem
        return found

    # Start and end

    async def start(self) -> None:
        """The router, the server, and a word between them.

        Raises: AdapterError: an adapter that vLLM would serve in part. ConfigError: vLLM is missing where it is to
        be started. ModelError: it does not start, or another base or other modules are behind `url`.
        """
        try:
            adapters_to_serve(self._checkpoint)
            await asyncio.to_thread(self._open)
            if self._given_url is None:
                await asyncio.to_thread(self._start_server)
            assert self._url is not None
            bound = httpx2.Timeout(self._limits.timeout_s, connect=10.0)
            pool = httpx2.Limits(max_connections=2 * self._limits.waiting, max_keepalive_connections=64)
            base_url = self._url.rstrip("/").removesuffix("/v1")
            self._client = httpx2.AsyncClient(base_url=base_url, timeout=bound, limits=pool, trust_env=False)
            await self._wait_until_up()
            await self._check_modules()
        except BaseException:
            await self.stop()
            raise
        if self._folder is not None:
            self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Close the connections, and end the server that was started here."""
        if self._watching is not None:
            self._watching.cancel()
        if self._client is not None:
            await self._client.aclose()
        if self._mixture_folder is not None:
            self._mixture_folder.cleanup()
        if self._server is not None and self._server.poll() is None:
            self._server.terminate()
            try:
                await asyncio.to_thread(self._server.wait, 20)
            except subprocess.TimeoutExpired:
                # Its engine and workers too, which are processes of its session.
                os.killpg(self._server.pid, signal.SIGKILL)

    def _open(self) -> None:
        if self._folder is None:
            self._processor = read_processor(self._checkpoint.base, adapters=self._plain)
            return
        if self._router_folder is not None:
            self._router = open_exported(self._router_folder)
        else:
            self._router = open_on_base(self._folder, base=self._checkpoint.base)
        if self._router.guard is not None and self._router.guard.form != "openings":
            raise AdapterError(
                f"{self._folder}: its guard is a probe, which reads a state that no server gives. Fit the guard with "
                "form openings, or serve with --backend transformers."
            )
        self._processor = self._router.processor
        self._stamp = self._folder_stamp()
        if self._router.folders:
            self._zeros = self._scratch() / ZEROS
            like = next(iter(read_router(self._folder).folders))
            save_nothing(self._zeros, like, base=self._checkpoint.base)

    def _scratch(self) -> Path:
        """A folder for adapters that are made here."""
        if self._mixture_folder is None:
            self._mixture_folder = tempfile.TemporaryDirectory(prefix="holdfast-mixtures-")
        return Path(self._mixture_folder.name)

    def _modules(self) -> dict[str, Path]:
        """LoRA module -> its folder."""
        if self._folder is not None:
            stored = read_router(self._folder)
            return {card.name: path for card, path in zip(stored.router.experts, stored.folders, strict=True)}
        # One at most: `evaluation.vllm.adapters_to_serve` has looked.
        return {self._name: Path(self._plain[0])} if self._plain else {}

    def command(self, port: int) -> list[str]:
        """The command that starts vLLM on this base with these adapters.

        Raises: AdapterError: an adapter that it would serve in part, or has no room for.
        """
        modules = self._modules()
        # `vllm serve` asks for the metadata of a package that the CPU build does not have.
        made = [self._python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
        made += ["--model", self._checkpoint.base, "--served-model-name", BASE if modules else self._name]
        made += ["--disable-log-stats", "--max-logprobs", str(max(20, GUARD_LOGPROBS))]
        if modules:
            ranks = {name: check_servable(folder) for name, folder in modules.items()}
            rank = self._largest_mixture(ranks) if self._mixed == "merge" else max(ranks.values())
            room = self._options.max_lora_rank or max_lora_rank(rank)
            if room is None or room < rank:
                raise AdapterError(
                    f"{self._checkpoint}: an adapter has rank {rank} and vLLM is to have room for {room or 512}; raise "
                    "--max-lora-rank, or merge it into its base (`holdfast edit --rule keep --export dense`)."
                )
            modules |= {} if self._zeros is None else {ZEROS: self._zeros}
            made += ["--enable-lora", "--max-lora-rank", str(room), "--max-loras", str(min(8, len(modules)))]
            made += ["--lora-modules", *(f"{name}={folder.resolve()}" for name, folder in modules.items())]
        if self._dtype:
            made += ["--dtype", self._dtype]
        for flag, value in self._options.engine_arguments().items():
            option = f"--{flag.replace('_', '-')}"
            made += [option] if value is True else [option, str(value)]
        return made + self._arguments

    def _largest_mixture(self, ranks: Mapping[str, int]) -> int:
        """The rank of all experts of a group together, of the largest group."""
        if self._router is None:
            return max(ranks.values())
        groups: dict[int, int] = {}
        for card in self._router.router.experts:
            groups[card.group] = groups.get(card.group, 0) + ranks.get(card.name, 0)
        return max(groups.values())

    def _start_server(self) -> None:
        port = _free_port()
        command = self.command(port)
        found = subprocess.run(
            [self._python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"],
            capture_output=True,
            check=False,
        )
        if found.returncode:
            raise ConfigError(
                f"{self._python} has no vLLM, so it cannot be started. {HOW_TO_INSTALL} Then name its Python with "
                "--vllm-python, or the address of a running server with --vllm-url."
            )
        # So that experts can be added while it runs; it listens on this machine alone.
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        self._server = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C is for this process, which lets the server answer what has come.
            start_new_session=True,
        )
        threading.Thread(target=self._read_log, name="holdfast-vllm-log", daemon=True).start()
        self._url = f"http://127.0.0.1:{port}"
        _log.info("vLLM starts: %s", " ".join(command))

    def _read_log(self) -> None:
        assert self._server is not None and self._server.stdout is not None
        for raw in self._server.stdout:
            line = raw.decode(errors="replace")
            self._log_lines.append(line)
            del self._log_lines[:-2000]
            sys.stderr.write(line)

    async def _wait_until_up(self) -> None:
        assert self._client is not None
        end = time.monotonic() + (self._start_timeout_s if self._server is not None else 10.0)
        problem = ""
        while time.monotonic() < end:
            if self._server is not None and self._server.poll() is not None:
                await asyncio.sleep(0.3)
                cause = root_cause("".join(self._log_lines), ModelError(f"exit status {self._server.returncode}"))
                raise ModelError(f"{self._checkpoint}: vLLM does not start: {cause}")
            try:
                if (await self._client.get("/health")).status_code == 200:
                    return
            except httpx2.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            await asyncio.sleep(0.5)
        raise ModelError(
            f"No vLLM server answers at {self._url} ({problem or 'not healthy'}); start it, or look at its log."
        )

    async def _check_modules(self) -> None:
        """Every name that requests will be sent to must be there."""
        assert self._client is not None
        try:
            listed = (await self._client.get("/v1/models")).json()["data"]
            served = {row["id"] for row in listed}
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{self._url}/v1/models says nothing that can be read: {error!r}") from error
        if self._zeros is not None and ZEROS not in served:
            try:
                await self._told("/v1/load_lora_adapter", {"lora_name": ZEROS, "lora_path": str(self._zeros)})
                served.add(ZEROS)
            except ApiError as error:
                _log.warning(
                    "the server takes no adapter while it runs (%s), so the base is asked without one; on vLLM's CPU "
                    "build that is wrong beside other adapters: set VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 there",
                    error.message,
                )
        self._base_name = ZEROS if ZEROS in served else BASE
        wanted = {BASE, *self._modules()} if self._modules() else {self._name}
        if missing := sorted(wanted - served):
            raise ModelError(
                f"The server at {self._url} serves {', '.join(sorted(served))}, but not {', '.join(missing)}. Start it "
                f"with --served-model-name {BASE} and --lora-modules NAME=FOLDER for each expert."
            )

    # Requests

    async def answer(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """The answer, piece by piece. Raises ApiError."""
        if self._line >= self._limits.waiting:
            raise ApiError(429, f"{self._line} requests are waiting; come back in a second.", code="overloaded")
        self._line += 1
        pieces: AsyncIterator[Piece] | None = None
        deadline = time.monotonic() + self._limits.timeout_s
        try:
            # Each wait on its own: a stream is begun in one task and goes on in another.
            messages = await asyncio.to_thread(self._messages, request.sample)
            target, route = await _before(deadline, self._choose(request, messages))
            pieces = self._ask(target, route, request, messages)
            while True:
                try:
                    yield await _before(deadline, anext(pieces))
                except StopAsyncIteration:
                    return
        except TimeoutError:
            raise ApiError(504, f"no answer within {self._limits.timeout_s:g} s.", code="timeout") from None
        except (httpx2.ConnectError, httpx2.RemoteProtocolError, httpx2.ReadError) as error:
            raise ApiError(
                503, f"the vLLM server does not answer: {type(error).__name__}", code="backend_down"
            ) from None
        except httpx2.TimeoutException:
            raise ApiError(504, "the vLLM server took too long.", code="timeout") from None
        except DataError as error:
            raise bad_request(str(error), param="messages") from None
        finally:
            self._line -= 1
            if pieces is not None:
                with suppress(RuntimeError):
                    await pieces.aclose()  # type: ignore[attr-defined]

    def _messages(self, sample: Sample) -> dict[str, Any]:
        """What is sent of a conversation: OpenAI's messages, and the rule of tokenisation for them."""
        text = render(self._processor, sample, sample.request, ask=True, name=self._checkpoint.base)
        images = iter(sample.images)
        messages = conversation(sample, sample.request)
        for message in messages:
            message["content"] = [
                {"type": "image_url", "image_url": {"url": _data_uri(next(images))}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ]
        return {"messages": messages, "add_special_tokens": adds_special_tokens(self._processor.tokenizer, text)}

    async def _choose(self, request: ChatRequest, messages: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
        """The server's name of what answers, and why."""
        if self._router is None:
            return self._name, None
        if (part := chosen_part(request.model)) is not None:
            return self._base_name if part == BASE else part, {"answered_by": part, "reason": "asked for by name"}
        router = self._router
        async with self._lock:
            # One at a time: the encoder's threads would only fight each other.
            (decision,) = await asyncio.to_thread(router.decide, [request.sample])
        if router.guard is not None:
            decision = router.under_guard(decision, await self._first_token(messages))
        route: dict[str, Any] = decision.to_json()
        if decision.is_one_hot:
            return decision.expert or self._base_name, route
        if self._mixed == "refuse":
            raise ApiError(
                409, f"several experts share this request: {_shares(decision)}.", code="several_experts", param=None
            )
        served = {str(decision.expert): 1.0}
        if self._mixed == "merge":
            served = quantised(decision.weights, MIXTURE_STEPS)
        # How far what answers is from what the router asked for, at most, in one expert's share.
        off = max(abs(served.get(name, 0.0) - weight) for name, weight in decision.weights.items())
        route |= {"exact": False, "served_weights": served, "largest_share_off_by": round(off, 4)}
        return (next(iter(served)) if len(served) == 1 else await self._mixture(router, served)), route

    async def _mixture(self, router: StandaloneRouter, weights: Mapping[str, float]) -> str:
        """The server's name of a LoRA that is this mixture, made where it is asked for the first time."""
        names = [card.name for card in router.router.experts]
        name = "mixture-" + "-".join(f"{names.index(n)}x{round(w * MIXTURE_STEPS)}" for n, w in sorted(weights.items()))
        async with self._lock:
            if name in self._mixtures:
                return name
            if len(self._mixtures) >= _MIXTURES_KEPT:
                oldest = next(iter(self._mixtures))
                await self._told("/v1/unload_lora_adapter", {"lora_name": oldest})
                shutil.rmtree(self._mixtures.pop(oldest), ignore_errors=True)
            place = self._scratch() / name
            await asyncio.to_thread(
                lambda: save_expert(place, mixture_of_folders(router.folders, weights), base=self._checkpoint.base)
            )
            await self._told("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(place)})
            self._mixtures[name] = place
        return name

    async def _told(self, path: str, body: Mapping[str, Any]) -> None:
        assert self._client is not None
        answer = await self._client.post(path, json=body)
        if answer.status_code != 200:
            raise ApiError(502, f"vLLM does not do {path}: {answer.text[:300]}", code="backend_error")

    async def _first_token(self, messages: Mapping[str, Any]) -> dict[int, float]:
        body = {
            **messages,
            "model": self._base_name,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": GUARD_LOGPROBS,
            "return_tokens_as_token_ids": True,
        }
        answer = await self._post(body)
        first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {int(row["token"].removeprefix("token_id:")): min(0.0, float(row["logprob"])) for row in first}

    async def _post(self, body: Mapping[str, Any]) -> Any:
        assert self._client is not None
        response = await self._client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise _from_server(response.status_code, response.text)
        return response.json()

    async def _ask(
        self, target: str, route: Mapping[str, Any] | None, request: ChatRequest, messages: Mapping[str, Any]
    ) -> AsyncIterator[Piece]:
        body: dict[str, Any] = {
            **messages,
            "model": target,
            "temperature": request.temperature,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
        }
        if request.temperature:
            # The full distribution, as the transformers backend samples.
            body |= {"top_k": -1, "min_p": 0.0}
        if request.max_tokens is not None:
            body["max_tokens"] = request.max_tokens
        if request.seed is not None:
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop)
        if not request.stream:
            answer = await self._post(body)
            choice, usage = answer["choices"][0], answer["usage"]
            yield Piece(
                text=(choice["message"]["content"] or "").strip(),
                finish=_finish(choice["finish_reason"]),
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
                route=route,
            )
            return
        async for piece in self._stream(body, route):
            yield piece

    async def _stream(self, body: dict[str, Any], route: Mapping[str, Any] | None) -> AsyncIterator[Piece]:
        assert self._client is not None
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        began, held, finish, usage = False, "", None, {"prompt_tokens": 0, "completion_tokens": 0}
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
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
        yield Piece(
            finish=_finish(finish),
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            route=route,
        )

    # Experts that come while the server runs

    def _folder_stamp(self) -> Stamp | None:
        assert self._folder is not None
        return folder_stamp(self._folder)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            stamp = self._folder_stamp()
            if stamp is None or stamp == self._stamp:
                continue
            self._stamp = stamp
            try:
                await self._renew()
                self._problem = None
            except (HoldfastError, httpx2.HTTPError, OSError) as error:
                self._problem = f"{self._folder} has changed and cannot be taken up, the old experts answer on: {error}"
                _log.error("%s", self._problem)

    async def _renew(self) -> None:
        """Hand new experts to the server, then let the new router decide."""
        assert self._folder is not None and self._router is not None and self._client is not None
        stored = await asyncio.to_thread(read_router, self._folder)
        known = {card.name for card in self._router.router.experts}
        for card, path in zip(stored.router.experts, stored.folders, strict=True):
            if card.name in known:
                continue
            check_servable(path)
            body = {"lora_name": card.name, "lora_path": str(path.resolve())}
            answer = await self._client.post("/v1/load_lora_adapter", json=body)
            if answer.status_code != 200:
                raise AdapterError(f"vLLM does not take expert {card.name!r}: {answer.text[:300]}")
        self._router = self._router.with_router(stored, self._folder)
        _log.info("experts now: %s", ", ".join(card.name for card in stored.router.experts))


async def _before(deadline: float, what: Awaitable[_T]) -> _T:
    """Raises TimeoutError."""
    return await asyncio.wait_for(what, max(0.0, deadline - time.monotonic()))  # type: ignore[arg-type]


def check_servable(folder: Path) -> int:
    """The rank of an adapter that vLLM serves whole. Raises AdapterError: one that it would serve in part."""
    adapter = LoraAdapter(folder)
    try:
        dropped, rank = what_vllm_drops(adapter), largest_rank(adapter)
    finally:
        adapter.close()
    if dropped:
        raise AdapterError(
            f"{folder}: vLLM would not serve all of this adapter: {'; '.join(dropped)}. Merge it into its base "
            "(`holdfast edit BASE ADAPTER --rule keep --export dense`), or serve with --backend transformers."
        )
    return rank


def _shares(decision: Decision) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in decision.weights.items() if weight > 0)


def _data_uri(path: Path) -> str:
    """The picture as the transformers path shows it (upright, no transparency), so that both see the same pixels."""
    buffer = io.BytesIO()
    open_image(path).save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _finish(reason: Any) -> Literal["stop", "length"]:
    return "length" if reason == "length" else "stop"


def _from_server(status: int, text: str) -> ApiError:
    """An error of vLLM, told on: what the client did wrong stays its fault."""
    try:
        error = json.loads(text)
        error = error.get("error", error)
        message, param = str(error.get("message", text)), error.get("param")
    except (ValueError, AttributeError):
        message, param = text, None
    if status == 400 and ("context length" in message or "max_model_len" in message or "longer than" in message):
        return bad_request(message[:500], param="messages", code="context_length_exceeded")
    if status in (400, 404, 422):
        return ApiError(400, message[:500], code="invalid_value", param=param)
    if status == 429:
        return ApiError(429, message[:500], code="overloaded")
    return ApiError(502, f"the vLLM server answers {status}: {message[:300]}", code="backend_error")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


__all__ = ["MixedName", "RemoteEngine", "check_servable"]
