"""transformers behind the endpoint: one worker thread, small dynamic batches, tokens handed out as they come.

Requests that arrive together answer together; a batch is not joined once it runs, so a long answer holds up those that
come after it by its own length at most. That serves a small team; vLLM (`remote`) is the way to many users.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from holdfast.checkpoints.value import Checkpoint
from holdfast.data.types import Sample
from holdfast.errors import DataError, HoldfastError
from holdfast.models.encode import decode, encode_request
from holdfast.models.generate import greedy_config
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.models.settings import quiet_transformers
from holdfast.models.tuner import is_tuner_folder
from holdfast.serving.api_error import ApiError, bad_request
from holdfast.serving.engine import BASE, Piece, chosen_part, model_names
from holdfast.serving.protocol import ChatRequest, Limits
from holdfast.tuners.cram.folder import Stamp, folder_stamp, from_pretrained
from holdfast.tuners.cram.model import MODULE, Cram
from holdfast.tuners.cram.standalone import Decision, decisions

_log = logging.getLogger(__name__)
# How long the first request of a batch waits for others.
_GATHER_S = 0.005


@dataclass(eq=False)
class _Job:
    """A request in line. out: its pieces, an ApiError, or None behind the last; handed over to the event loop."""

    request: ChatRequest
    deadline: float
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Piece | ApiError | None] = field(default_factory=asyncio.Queue)
    gone: bool = False

    def give(self, what: Piece | ApiError | None) -> None:
        self.loop.call_soon_threadsafe(self.out.put_nowait, what)


class LocalEngine:
    """A checkpoint, a base with an adapter, or a base with a CRAM folder, in this process.

    name: what clients call it. batch_size: requests that answer together at most.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        limits: Limits,
        batch_size: int = 16,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        self._checkpoint, self._name, self._limits = checkpoint, name, limits
        self._batch_size, self._dtype, self._device = batch_size, dtype, device
        self._loaded: LoadedModel | None = None
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._line = 0
        self._thread: threading.Thread | None = None
        self._folder = next((Path(a) for a in checkpoint.adapters if is_tuner_folder(a)), None)
        self._stamp: Stamp | None = None
        self._problem: str | None = None

    @property
    def models(self) -> Mapping[str, str]:
        """Name -> what it is."""
        cram = self._cram
        if cram is None:
            return {self._name: "the checkpoint"}
        return model_names(self._name, tuple(card.name for card in cram.router.experts))

    @property
    def state(self) -> dict[str, Any]:
        """For /health."""
        alive = self._thread is not None and self._thread.is_alive()
        found: dict[str, Any] = {"ok": alive, "backend": "transformers", "model": self._name, "waiting": self._line}
        if self._cram is not None:
            found["experts"] = [card.name for card in self._cram.router.experts]
        if self._problem:
            found["problem"] = self._problem
        return found

    @property
    def _cram(self) -> Cram | None:
        tuner = self._loaded.tuner if self._loaded is not None else None
        return tuner if isinstance(tuner, Cram) else None

    async def start(self) -> None:
        """Load the model. Raises: as `models.load`; ConfigError: as `model_names`."""
        self._stamp = self._folder_stamp()
        self._loaded = await asyncio.to_thread(load, self._checkpoint, dtype=self._dtype, device=self._device)
        _ = self.models  # names that cannot be served are known before a request comes
        self._thread = threading.Thread(target=self._work, name="holdfast-answers", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the worker behind what is in line."""
        self._waiting.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, self._limits.timeout_s)

    async def answer(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """The answer, piece by piece. Raises ApiError."""
        if self._line >= self._limits.waiting:
            raise ApiError(429, f"{self._line} requests are waiting; come back in a second.", code="overloaded")
        job = _Job(request, time.monotonic() + self._limits.timeout_s, asyncio.get_running_loop())
        self._line += 1
        self._waiting.put(job)
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(job.out.get(), max(0.0, job.deadline - time.monotonic()) + 1.0)
                except TimeoutError:
                    raise _too_late(self._limits) from None
                if piece is None:
                    return
                if isinstance(piece, ApiError):
                    raise piece
                yield piece
        finally:
            # A client that has gone takes its row out of the batch.
            job.gone = True
            self._line -= 1

    # The worker

    def _work(self) -> None:
        held: list[_Job] = []
        while True:
            if not held:
                job = self._take(None)
                if job is _END:
                    return
                if job is not None:
                    held.append(job)
            end = time.monotonic() + _GATHER_S
            ended = False
            while len(held) < self._batch_size and (left := end - time.monotonic()) > 0:
                job = self._take(left)
                if job is _END:
                    ended = True
                    break
                if job is None:
                    break
                held.append(job)
            if self._folder is not None:
                self._renew()
            batch, held = self._next(held)
            if batch:
                self._run(batch)
            if ended:
                while held:
                    batch, held = self._next(held)
                    self._run(batch)
                return

    def _take(self, timeout_s: float | None) -> Any:
        """The next job; None where there is none in time (a second, where nobody waits: the folder is looked at)."""
        try:
            job = self._waiting.get(timeout=1.0 if timeout_s is None else timeout_s)
        except queue.Empty:
            return None
        return _END if job is None else job

    def _next(self, held: list[_Job]) -> tuple[list[_Job], list[_Job]]:
        """Those that answer together now, and the rest: routed requests and chosen experts take turns."""
        alive = []
        for job in held:
            if job.gone:
                continue
            if time.monotonic() > job.deadline:
                job.give(_too_late(self._limits))
                continue
            alive.append(job)
        if not alive:
            return [], []
        routed = chosen_part(alive[0].request.model) is None
        same = [job for job in alive if (chosen_part(job.request.model) is None) == routed][: self._batch_size]
        return same, [job for job in alive if job not in same]

    def _run(self, jobs: list[_Job]) -> None:
        assert self._loaded is not None
        try:
            _Batch(self._loaded, self._cram, jobs, self._limits).run()
        except HoldfastError as error:
            if len(jobs) > 1:
                # One of them is at fault; the others shall not hear of it.
                for job in jobs:
                    self._run([job])
                return
            jobs[0].give(_as_api_error(error))
        except Exception as error:  # noqa: BLE001 (the worker must go on; the client hears of it, the log has all)
            _log.exception("a batch of %d failed", len(jobs))
            if isinstance(error, torch.OutOfMemoryError):
                gc.collect()
            for job in jobs:
                job.give(ApiError(500, f"{type(error).__name__}: {error}", code="internal_error"))
        finally:
            if (cram := self._cram) is not None:
                # Keyed by the pictures' places, which are gone: nothing would ever be found again.
                cram.forget_scores()

    def _folder_stamp(self) -> Stamp | None:
        if self._folder is None:
            return None
        return folder_stamp(self._folder)

    def _renew(self) -> None:
        """Take up the folder where it has changed (a task was learned): between two batches, or not at all."""
        stamp = self._folder_stamp()
        cram = self._cram
        if stamp is None or stamp == self._stamp or cram is None or self._loaded is None:
            return
        assert self._folder is not None
        self._stamp = stamp
        cram.detach()
        try:
            renewed = from_pretrained(self._folder, self._loaded)
            model_names(self._name, tuple(card.name for card in renewed.router.experts))
        except Exception as error:  # noqa: BLE001 (whatever it is, the worker must go on, with experts that answer)
            self._problem = f"{self._folder} has changed and cannot be taken up, the old experts answer on: {error}"
            _log.error("%s", self._problem, exc_info=None if isinstance(error, HoldfastError) else error)
            if isinstance(half := getattr(self._loaded.model, MODULE, None), Cram):
                half.detach()
            renewed = cram.attached_again()
        else:
            self._problem = None
            _log.info("experts now: %s", ", ".join(card.name for card in renewed.router.experts))
        self._loaded = replace(self._loaded, tuner=renewed)


_END: Any = object()


class _Batch:
    """Requests that answer together."""

    def __init__(self, loaded: LoadedModel, cram: Cram | None, jobs: Sequence[_Job], limits: Limits) -> None:
        self.loaded, self.cram, self.jobs, self.limits = loaded, cram, list(jobs), limits
        self.samples: list[Sample] = [job.request.sample for job in jobs]

    @torch.inference_mode()
    def run(self) -> None:
        loaded = self.loaded
        inputs = {k: v.to(loaded.device) for k, v in encode_request(loaded, self.samples).items()}
        lengths = inputs["attention_mask"].sum(1).tolist()
        width = inputs["input_ids"].shape[1]
        rows = [
            _Row(loaded, job, prompt=length, room=self._room(length, job.request))
            for job, length in zip(self.jobs, lengths, strict=True)
        ]
        told = _Told(rows, width, self._routes)
        config: GenerationConfig = greedy_config(loaded, max(row.most for row in rows))
        noise = LogitsProcessorList([_Noise(self.jobs)] if any(j.request.temperature for j in self.jobs) else [])
        with self._asked(), quiet_transformers():
            tokens = loaded.model.generate(  # type: ignore[operator]
                **inputs,
                generation_config=config,
                logits_processor=noise,
                stopping_criteria=StoppingCriteriaList([told]),
            )
        routes = self._routes()
        for row, ids, route in zip(rows, tokens[:, width:].tolist(), routes, strict=True):
            if not row.ended:
                row.end(ids, route)

    def _room(self, prompt: int, request: ChatRequest) -> int:
        bound = self.loaded.context_length
        most = request.most_tokens(self.limits)
        return most if bound is None else max(1, min(most, bound - prompt))

    def _asked(self) -> Any:
        if self.cram is None:
            return self.loaded.serving(self.samples)
        parts = [chosen_part(job.request.model) for job in self.jobs]
        if parts[0] is None:
            return self.cram.serving(self.samples)
        return self.cram.weighted([{} if part in (None, BASE) else {str(part): 1.0} for part in parts])

    def _routes(self) -> list[Mapping[str, Any] | None]:
        if self.cram is None:
            return [None] * len(self.jobs)
        parts = [chosen_part(job.request.model) for job in self.jobs]
        if parts[0] is not None:
            return [{"answered_by": part, "reason": "asked for by name"} for part in parts]
        assert self.cram.last_routing is not None
        found: list[Decision] = decisions(self.cram.last_routing, self.cram.router)
        return [decision.to_json() for decision in found]


class _Row:
    """One request's answer as it grows."""

    def __init__(self, loaded: LoadedModel, job: _Job, *, prompt: int, room: int) -> None:
        self._tokenizer, self._name, self._job = loaded.tokenizer, loaded.name, job
        self._ends = frozenset(loaded.eos_token_ids)
        self.prompt, self.most = prompt, room
        self._sent = ""
        self._stopped: str | None = None  # the text before a stop sequence
        self.ended = False

    def is_over(self, ids: list[int]) -> bool:
        """Whether nothing more is wanted after these new tokens; what is new is sent where the client listens."""
        request = self._job.request
        if self._job.gone or len(ids) >= self.most or ids[-1] in self._ends:
            return True
        if time.monotonic() > self._job.deadline:
            return True
        if request.stream or request.stop:
            text = self._text(ids)
            if (cut := _before_stop(text, request.stop)) is not None:
                self._stopped = cut
                return True
            if request.stream:
                self._send(_settled(text, request.stop))
        return False

    def end(self, ids: list[int], route: Mapping[str, Any] | None) -> None:
        """Send what is left, and how it ended."""
        self.ended = True
        new = self._until_end(ids)[: self.most]
        # At the bound what follows is padding, which some tokenizers spell as their end.
        ended = len(new) < min(len(ids), self.most)
        if not ended and self._stopped is None and len(new) < self.most:
            self._job.give(_too_late_after(len(new)))
            return
        text = self._text(new)
        cut = self._stopped if self._stopped is not None else _before_stop(text, self._job.request.stop)
        whole = (text if cut is None else cut).strip()
        finish: Any = "stop" if cut is not None or ended else "length"
        rest = whole[len(self._sent) :]
        self._job.give(
            Piece(
                text=rest,
                finish=finish,
                prompt_tokens=self.prompt,
                completion_tokens=len(new) + bool(ended),
                route=route,
            )
        )
        self._job.give(None)

    def _send(self, text: str) -> None:
        text = text.lstrip()
        # White space at the end may be the answer's end, which is stripped; half a character may become another.
        ready = text.rstrip("\ufffd").rstrip()
        if len(ready) > len(self._sent) and ready.startswith(self._sent):
            self._job.give(Piece(text=ready[len(self._sent) :]))
            self._sent = ready

    def _text(self, ids: list[int]) -> str:
        return decode(self._tokenizer, self._until_end(ids), name=self._name)

    def _until_end(self, ids: list[int]) -> list[int]:
        return next((ids[:i] for i, token in enumerate(ids) if token in self._ends), ids)


class _Told(StoppingCriteria):
    """Ends each row at its own bound, and hands its new text on; who answers has been decided by the first token."""

    def __init__(
        self, rows: Sequence[_Row], width: int, routes: Callable[[], Sequence[Mapping[str, Any] | None]]
    ) -> None:
        self._rows, self._width, self._routes = rows, width, routes
        self._over = [False] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        del scores, kwargs
        for i, ids in enumerate(input_ids[:, self._width :].tolist()):
            if not self._over[i] and self._rows[i].is_over(ids):
                self._over[i] = True
                # Its answer does not wait for the others'.
                self._rows[i].end(ids, self._routes()[i])
        return torch.tensor(self._over, device=input_ids.device)


class _Noise(LogitsProcessor):
    """Sampling for the rows that asked for it, greedy for the others: argmax(logits / T + Gumbel noise)."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self._temperatures = [job.request.temperature for job in jobs]
        self._generators = []
        for job in jobs:
            generator = torch.Generator()
            if job.request.seed is None:
                generator.seed()
            else:
                generator.manual_seed(job.request.seed % 2**63)
            self._generators.append(generator)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        del input_ids
        made = scores.float().clone()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature:
                noise = torch.empty(made.shape[1]).exponential_(generator=generator).log()
                made[row] = made[row] / temperature - noise.to(made.device)
        return made


def _before_stop(text: str, stop: Sequence[str]) -> str | None:
    places = [at for mark in stop if (at := text.find(mark)) >= 0]
    return text[: min(places)] if places else None


def _settled(text: str, stop: Sequence[str]) -> str:
    """What of a growing text cannot become part of a stop sequence any more."""
    longest = 0
    for mark in stop:
        for length in range(min(len(mark) - 1, len(text)), 0, -1):
            if text.endswith(mark[:length]):
                longest = max(longest, length)
                break
    return text[: len(text) - longest] if longest else text


def _as_api_error(error: HoldfastError) -> ApiError:
    text = str(error)
    if "has a context of" in text:
        return bad_request(text, param="messages", code="context_length_exceeded")
    if isinstance(error, DataError):
        return bad_request(text, param="messages")
    return ApiError(500, text, code=type(error).__name__)


def _too_late(limits: Limits) -> ApiError:
    return ApiError(504, f"no answer within {limits.timeout_s:g} s; ask for fewer tokens, or later.", code="timeout")


def _too_late_after(tokens: int) -> ApiError:
    return ApiError(504, f"the time was up after {tokens} tokens; ask for fewer.", code="timeout")


__all__ = ["LocalEngine"]
