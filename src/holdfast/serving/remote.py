"""vLLM behind the endpoint: the router in front, the experts as LoRA modules of one vLLM server.

Nothing of a request is kept, so any number of these processes stand before one server. The server is started here
(`vllm_process`), or one that runs is used (`vllm_client`). The guard asks the base for one token with its
log-probabilities before a request goes on.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from holdfast.checkpoints.adapter import WEIGHTS_FILE
from holdfast.checkpoints.adapter_config import rank_for_vllm
from holdfast.checkpoints.value import Checkpoint
from holdfast.data.images import open_image
from holdfast.data.types import Sample
from holdfast.errors import AdapterError, DataError, HoldfastError, ModelError
from holdfast.evaluation.vllm import adapters_to_serve
from holdfast.evaluation.vllm_options import VllmOptions
from holdfast.files import sha256
from holdfast.models.encode import adds_special_tokens, conversation, render
from holdfast.models.settings import read_processor
from holdfast.models.tuner import is_tuner_folder
from holdfast.serving.api_error import ApiError, bad_request
from holdfast.serving.engine import BASE, Piece, chosen_part, model_names
from holdfast.serving.protocol import ChatRequest, Limits
from holdfast.serving.vllm_client import UnknownModuleError, VllmClient
from holdfast.serving.vllm_process import VllmProcess, free_port, server_command
from holdfast.tuners.cram.folder import Stamp, check_base_files, check_experts, folder_stamp
from holdfast.tuners.cram.merge import mixture_of_folders, quantised, save_nothing
from holdfast.tuners.cram.standalone import Decision, StandaloneRouter, open_exported, open_on_base
from holdfast.tuners.cram.stored_router import StoredRouter, read_router
from holdfast.tuners.lora_folder import save_lora

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
        self._url = url
        self._start_timeout_s = start_timeout_s
        self._process: VllmProcess | None = None
        self._client: VllmClient | None = None
        self._router: StandaloneRouter | None = None
        self._processor: Any = None
        self._deciding, self._mixing = asyncio.Lock(), asyncio.Lock()
        self._line = 0
        self._problem: str | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stamp: Stamp | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        # Names at the server are told apart from those of other processes in front of it.
        self._own = uuid.uuid4().hex[:8]
        # Expert, or BASE -> its name at the server.
        self._served: dict[str, str] = {BASE: BASE}
        # Names at the server that were handed to it while it ran -> their folders, to be handed over again.
        self._handed: dict[str, Path] = {}
        self._mixtures: list[str] = []

    @property
    def models(self) -> Mapping[str, str]:
        """Name -> what it is."""
        if self._router is None:
            return {self._name: "the checkpoint"}
        return model_names(self._name, tuple(card.name for card in self._router.router.experts))

    @property
    def state(self) -> dict[str, Any]:
        """For /health."""
        alive = self._client is not None and (self._process is None or self._process.alive)
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
            url = self._url
            if url is None:
                port = free_port()
                command = self.command(port)
                self._process = await asyncio.to_thread(VllmProcess, command)
                _log.info("vLLM starts: %s", " ".join(command))
                url = f"http://127.0.0.1:{port}"
            self._client = VllmClient(url, self._limits)
            await self._wait_until_up(self._client)
            await self._check_modules(self._client)
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
            if self._process is None:
                # Its folder goes with this process; a server that outlives it must not look for it.
                for name in [*self._mixtures, *([self._served[BASE]] if self._served[BASE] in self._handed else [])]:
                    with suppress(ApiError):
                        await self._client.unload(name)
            await self._client.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)
        if self._scratch is not None:
            self._scratch.cleanup()

    def _open(self) -> None:
        if self._folder is None:
            self._processor = read_processor(self._checkpoint.base, adapters=self._plain)
            return
        self._stamp = folder_stamp(self._folder)
        stored = read_router(self._folder)
        check_experts(self._folder, stored)
        if self._router_folder is not None:
            # Its encoder alone: what decides is the folder's own router, which may have learned since.
            self._router = open_exported(self._router_folder).with_router(stored, self._folder)
            if Path(self._checkpoint.base).is_dir():
                # It may lie on the server's machine alone; a canary tells the rest.
                check_base_files(self._folder, stored, Path(self._checkpoint.base))
        else:
            self._router = open_on_base(self._folder, base=self._checkpoint.base)
        if self._router.guard is not None and self._router.guard.form != "openings":
            raise AdapterError(
                f"{self._folder}: its guard is a probe, which reads a state that no server gives. Fit the guard with "
                "form openings, or serve with --backend transformers."
            )
        _ = self.models  # names that cannot be served are known before a server starts
        self._processor = self._router.processor
        self._served |= {card.name: card.name for card in stored.router.experts}
        if stored.folders:
            save_nothing(self._place(ZEROS), stored.folders[0], base=self._checkpoint.base)

    def _place(self, name: str) -> Path:
        """Where an adapter lies that is made here."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="holdfast-adapters-")
        return Path(self._scratch.name) / name

    def _modules(self) -> dict[str, Path]:
        """LoRA module that the server is started with -> its folder."""
        if self._router is not None:
            return dict(self._router.folders)
        # One at most: `evaluation.vllm.adapters_to_serve` has looked.
        return {self._name: Path(self._plain[0])} if self._plain else {}

    def command(self, port: int) -> list[str]:
        """The command that starts vLLM on this base with these adapters.

        Raises: AdapterError: an adapter that it would serve in part, or has no room for.
        """
        modules = self._modules()
        ranks = {name: rank_for_vllm(folder) for name, folder in modules.items()}
        rank = self._largest_mixture(ranks) if self._mixed == "merge" else max(ranks.values(), default=0)
        if self._folder is not None and modules:
            modules[ZEROS] = self._place(ZEROS)
        return server_command(
            self._python,
            port,
            base=self._checkpoint.base,
            served_name=BASE if modules or self._folder is not None else self._name,
            modules=modules,
            rank=rank,
            options=self._options,
            dtype=self._dtype,
            arguments=self._arguments,
        )

    def _largest_mixture(self, ranks: Mapping[str, int]) -> int:
        """The rank of all experts of a group together, of the largest group."""
        if self._router is None:
            return max(ranks.values(), default=0)
        groups: dict[int, int] = {}
        for card in self._router.router.experts:
            groups[card.group] = groups.get(card.group, 0) + ranks.get(card.name, 0)
        return max(groups.values(), default=0)

    async def _wait_until_up(self, client: VllmClient) -> None:
        end = time.monotonic() + (self._start_timeout_s if self._process is not None else 10.0)
        problem: str | None = "no answer"
        while time.monotonic() < end:
            if self._process is not None and not self._process.alive:
                raise ModelError(f"{self._checkpoint}: vLLM does not start: {self._process.why_it_ended()}")
            if (problem := await client.what_is_wrong()) is None:
                return
            await asyncio.sleep(0.5)
        raise ModelError(f"No vLLM server answers at {client.url} ({problem}); start it, or look at its log.")

    async def _check_modules(self, client: VllmClient) -> None:
        """Every name that requests will be sent to must be there, and be what lies in the folder."""
        served = await client.modules()
        modules = self._modules()
        if self._folder is not None and modules:
            if ZEROS in served:
                self._served[BASE] = ZEROS
            else:
                own = f"{ZEROS}-{self._own}"
                try:
                    await self._hand_over(own, self._place(ZEROS))
                    self._served[BASE] = own
                except ApiError as error:
                    _log.warning(
                        "the server takes no adapter while it runs (%s), so the base is asked without one; on vLLM's "
                        "CPU build that is wrong beside other adapters: set VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 there",
                        error.message,
                    )
        wanted = {BASE, *modules} if modules or self._folder is not None else {self._name}
        if missing := sorted(wanted - set(served)):
            raise ModelError(
                f"The server at {client.url} serves {', '.join(sorted(served))}, but not {', '.join(missing)}. Start "
                f"it with --served-model-name {BASE} and --lora-modules NAME=FOLDER for each expert."
            )
        for name, folder in modules.items():
            root = served[name]
            if root is not None and root == served[BASE]:
                raise ModelError(
                    f"The server at {client.url} serves its base, {root}, under the name {name}, so the adapter would "
                    f"be silently absent. Start it with --served-model-name {BASE} --lora-modules {name}={folder}."
                )
            other = root is not None and await asyncio.to_thread(_is_another, Path(root), folder)
            if other:
                raise ModelError(
                    f"The server at {client.url} serves {root} as {name}, whose weights are not those in {folder}. "
                    f"Start it with --lora-modules {name}={folder}."
                )

    async def _hand_over(self, name: str, folder: Path) -> None:
        """Register a LoRA module at the running server. Raises ApiError."""
        assert self._client is not None
        await self._client.load(name, str(folder.resolve()))
        self._handed[name] = folder

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
            return self._served[part], {"answered_by": part, "reason": "asked for by name"}
        router = self._router
        if router.guard is None:
            decision = await self._decide(router, request.sample)
        else:
            # The server computes while the encoder does.
            asking = asyncio.ensure_future(self._first_token(messages))
            try:
                decision = router.under_guard(await self._decide(router, request.sample), await asking)
            finally:
                asking.cancel()
                # Where the router has refused, nobody asks what became of it.
                asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        route: dict[str, Any] = decision.to_json()
        if decision.is_one_hot:
            return self._served[decision.expert or BASE], route
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
        if len(served) == 1:
            return self._served[next(iter(served))], route
        return await self._mixture(router, served), route

    async def _decide(self, router: StandaloneRouter, sample: Sample) -> Decision:
        async with self._deciding:
            # One at a time: the encoder's threads would only fight each other.
            (decision,) = await asyncio.to_thread(router.decide, [sample])
        return decision

    async def _mixture(self, router: StandaloneRouter, weights: Mapping[str, float]) -> str:
        """The server's name of a LoRA that is this mixture, made where it is asked for the first time."""
        assert self._client is not None
        parts = "-".join(f"{self._served[n]}x{round(w * MIXTURE_STEPS)}" for n, w in sorted(weights.items()))
        name = f"mixture-{self._own}-{parts}"
        async with self._mixing:
            if name in self._mixtures:
                return name
            if len(self._mixtures) >= _MIXTURES_KEPT:
                oldest = self._mixtures.pop(0)
                await self._client.unload(oldest)
                shutil.rmtree(self._handed.pop(oldest), ignore_errors=True)
            place = self._place(f"mixture-{uuid.uuid4().hex}")
            factors = await asyncio.to_thread(mixture_of_folders, router.folders, weights)
            await asyncio.to_thread(save_lora, place, factors, base=self._checkpoint.base)
            await self._hand_over(name, place)
            self._mixtures.append(name)
        return name

    async def _first_token(self, messages: Mapping[str, Any]) -> dict[int, float]:
        assert self._client is not None
        base = self._served[BASE]
        try:
            return await self._client.first_token(base, messages)
        except UnknownModuleError:
            if not await self._handed_over_again(base):
                raise
        return await self._client.first_token(base, messages)

    async def _handed_over_again(self, name: str) -> bool:
        """Whether a server that was restarted has an adapter again; False for those that it has to be started with."""
        assert self._client is not None
        if name in self._handed and name not in await self._client.modules():
            await self._hand_over(name, self._handed[name])
        return name in self._handed

    async def _ask(
        self, target: str, route: Mapping[str, Any] | None, request: ChatRequest, messages: Mapping[str, Any]
    ) -> AsyncIterator[Piece]:
        assert self._client is not None
        # vLLM shortens an answer to what its context leaves, but refuses a bound above the context.
        most = min(request.most_tokens(self._limits), self._client.context_length or sys.maxsize)
        body: dict[str, Any] = {
            **messages,
            "model": target,
            "temperature": request.temperature,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "max_tokens": most,
        }
        if request.temperature:
            # The full distribution, as the transformers backend samples.
            body |= {"top_k": -1, "min_p": 0.0}
        if request.seed is not None:
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop)
        for attempt in (1, 2):
            try:
                if request.stream:
                    async for piece in self._client.stream(body):
                        yield piece if piece.finish is None else replace(piece, route=route)
                else:
                    yield replace(await self._client.complete(body), route=route)
            except UnknownModuleError:
                # Said before the first piece.
                if attempt == 2 or not await self._handed_over_again(target):
                    raise
            else:
                return

    # Experts that come while the server runs

    async def _watch(self) -> None:
        assert self._folder is not None
        while True:
            await asyncio.sleep(_WATCH_S)
            stamp = folder_stamp(self._folder)
            if stamp is None or stamp == self._stamp:
                continue
            self._stamp = stamp
            try:
                await self._renew()
                self._problem = None
            except (HoldfastError, ApiError, OSError) as error:
                self._problem = f"{self._folder} has changed and cannot be taken up, the old experts answer on: {error}"
                _log.error("%s", self._problem)

    async def _renew(self) -> None:
        """Hand new and changed experts to the server, then let the new router decide."""
        assert self._folder is not None and self._router is not None and self._client is not None
        stored = await asyncio.to_thread(read_router, self._folder)
        renewed = self._router.with_router(stored, self._folder)
        check_experts(self._folder, stored)
        model_names(self._name, tuple(renewed.folders))
        known = _digests(self._router.stored)
        served = {BASE: self._served[BASE]}
        there = await self._client.modules()
        for name, digest in _digests(stored).items():
            if known.get(name) == digest:
                served[name] = self._served[name]
                continue
            rank_for_vllm(renewed.folders[name])
            # A name of its own: under an old one the server would go on with what it has cached of the old weights.
            served[name] = f"{name}-{digest[:12]}"
            if served[name] not in there:
                await self._hand_over(served[name], renewed.folders[name])
        self._router, self._served = renewed, served
        _log.info("experts now: %s", ", ".join(renewed.folders))


def _digests(stored: StoredRouter) -> dict[str, str]:
    """Expert -> sha256 of its weights."""
    return {card.name: digest for card, digest in zip(stored.router.experts, stored.digests, strict=True)}


def _is_another(there: Path, here: Path) -> bool:
    """Whether an adapter's folder holds other weights than another; False where it cannot be read from here."""
    if there.resolve() == here.resolve():
        return False
    try:
        return bool(sha256(there / WEIGHTS_FILE).digest() != sha256(here / WEIGHTS_FILE).digest())
    except (OSError, HoldfastError):
        return False


async def _before(deadline: float, what: Awaitable[_T]) -> _T:
    """Raises TimeoutError."""
    return await asyncio.wait_for(what, max(0.0, deadline - time.monotonic()))  # type: ignore[arg-type]


def _shares(decision: Decision) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in decision.weights.items() if weight > 0)


def _data_uri(path: Path) -> str:
    """The picture as the transformers path shows it (upright, no transparency), so that both see the same pixels."""
    buffer = io.BytesIO()
    open_image(path).save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


__all__ = ["MixedName", "RemoteEngine"]
