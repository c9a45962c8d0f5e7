"""A folder, behind a port: what it is, which engine answers for it, and an end that loses no request."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from holdfast.checkpoints.adapter import CONFIG_FILE, is_adapter
from holdfast.checkpoints.reader import read_json
from holdfast.checkpoints.value import Checkpoint
from holdfast.errors import AdapterError, ConfigError, ModelError
from holdfast.models.tuner import is_tuner_folder
from holdfast.serving.engine import Engine
from holdfast.serving.protocol import Limits

BackendName = Literal["transformers", "vllm"]
_EXTRA = "holdfast serve needs Starlette, uvicorn and httpx2; install them with `pip install 'holdfast[serve]'`"


def served_checkpoint(folder: str, *, base: str | None = None) -> Checkpoint:
    """What a folder (or hub id) is: a checkpoint, an adapter on its base, or a CRAM folder on its base.

    base: where the base lies, instead of what the folder's own record says.

    Raises: ModelError: none of the three. AdapterError: its base is not named.
    """
    from holdfast.tuners.cram.standalone import is_router_export

    path = Path(folder)
    if is_tuner_folder(path):
        from holdfast.tuners.cram.stored_router import read_router

        stored = Checkpoint.from_json(read_router(path).base)
        under = Checkpoint(base=base) if base else stored
        return under.under(path)
    if path.is_dir() and is_adapter(path):
        named = base or read_json(path / CONFIG_FILE, "a PEFT configuration").get("base_model_name_or_path")
        if not named:
            raise AdapterError(f"{path / CONFIG_FILE} names no base; give it with --base.")
        return Checkpoint(base=str(named), adapters=(str(path),))
    if is_router_export(path):
        raise ModelError(f"{folder} is an exported router, which answers nothing: give its CRAM folder, and --router.")
    if path.exists() and not _is_checkpoint(path):
        raise ModelError(
            f"{folder or path} is neither a checkpoint (config.json), nor a PEFT adapter ({CONFIG_FILE}), nor a CRAM "
            "folder (holdfast_tuner.json); expected one of the three."
        )
    return Checkpoint(base=folder)


def _is_checkpoint(path: Path) -> bool:
    # A run of holdfast has a config.json of its own.
    config = path / "config.json"
    return config.is_file() and "model_type" in read_json(config, "a model's configuration")


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError: the port is in use, or no address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(1024)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); another server may hold it. Choose "
            "another --port, or 0 for any."
        ) from error
    return made


def serve(
    make_engine: Callable[[], Engine],
    *,
    host: str,
    port: int,
    limits: Limits,
    ready: Callable[[str], Any] | None = None,
    after_start: Callable[[str], Any] | None = None,
) -> None:
    """Listen until SIGTERM or SIGINT, then answer what has come and end.

    The port is taken before the model is loaded, so that a taken one is known at once. ready: called with the address
    once requests are answered. after_start: called in a thread with it; an error of it ends the server.

    Raises: ConfigError: the port is in use, or the extra is missing. Otherwise what the engine's start raises.
    """
    try:
        import uvicorn

        from holdfast.serving.app import build_app
    except ImportError as error:
        raise ConfigError(f"{_EXTRA} ({error}).") from None
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    with listening_socket(host, port) as listening:
        asyncio.run(_serve(make_engine, listening, limits, uvicorn, build_app, ready, after_start))


async def _serve(
    make_engine: Callable[[], Engine],
    listening: socket.socket,
    limits: Limits,
    uvicorn: Any,
    build_app: Any,
    ready: Callable[[str], Any] | None,
    after_start: Callable[[str], Any] | None,
) -> None:
    engine = make_engine()
    config = uvicorn.Config(
        build_app(engine, limits),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(limits.timeout_s) + 1,
        timeout_keep_alive=30,
    )
    server = uvicorn.Server(config)
    starting = asyncio.ensure_future(engine.start())
    loop = asyncio.get_running_loop()

    def end() -> None:
        starting.cancel()
        server.should_exit = True

    # A signal while the model loads ends it. They stay: uvicorn hands a signal that it has heeded on at its end, and
    # without a handler that would kill this process before the engine has let go.
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, end)
    try:
        await starting
    except asyncio.CancelledError:
        await engine.stop()
        return
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    problem: list[Exception] = []

    async def started() -> None:
        while not server.started:
            await asyncio.sleep(0.02)
        try:
            if ready is not None:
                ready(address)
            if after_start is not None:
                await asyncio.to_thread(after_start, address)
        except Exception as error:  # noqa: BLE001 (raised below: a probe that fails in any way has not passed)
            problem.append(error)
            server.should_exit = True

    watching = asyncio.create_task(started())
    try:
        await server.serve(sockets=[listening])
    finally:
        watching.cancel()
        await engine.stop()
    if problem:
        raise problem[0]


def with_files(limits: Limits, files: Path | None) -> Limits:
    """The limits with a folder whose pictures may be named. Raises ConfigError: no folder."""
    if files is None:
        return limits
    if not files.is_dir():
        raise ConfigError(f"{files} is no folder; --allow-files names one whose pictures clients may name.")
    return replace(limits, files=files)


def announce(address: str, names: Any) -> str:
    """One line of JSON for whoever started the server and waits for it."""
    return json.dumps({"url": f"{address}/v1", "models": list(names)})


__all__ = ["BackendName", "announce", "listening_socket", "serve", "served_checkpoint", "with_files"]
