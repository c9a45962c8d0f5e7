"""A vLLM server that is started here: its command line, its log, and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.checkpoints.adapter_config import max_lora_rank
from holdfast.errors import AdapterError, ConfigError, ModelError
from holdfast.evaluation.engine_log import root_cause
from holdfast.evaluation.vllm import GUARD_LOGPROBS, HOW_TO_INSTALL
from holdfast.evaluation.vllm_options import VllmOptions

_LINES_KEPT = 2000
_END_S = 20.0


def server_command(
    python: str,
    port: int,
    *,
    base: str,
    served_name: str,
    modules: Mapping[str, Path],
    rank: int,
    options: VllmOptions,
    dtype: str | None,
    arguments: Sequence[str],
) -> list[str]:
    """The command that starts vLLM's server on loopback.

    modules: LoRA module -> its folder. rank: the largest that has to fit. arguments: more, as they are.
    Raises: AdapterError: vLLM has no room for `rank`.
    """
    # `vllm serve` asks for the metadata of a package that the CPU build does not have.
    made = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    made += ["--model", base, "--served-model-name", served_name]
    made += ["--disable-log-stats", "--max-logprobs", str(GUARD_LOGPROBS)]
    if modules:
        room = options.max_lora_rank or max_lora_rank(rank)
        if room is None or room < rank:
            raise AdapterError(
                f"An adapter on {base} has rank {rank} and vLLM is to have room for {room or 512}; raise "
                "--max-lora-rank, or merge it into its base (`holdfast edit --rule keep --export dense`)."
            )
        made += ["--enable-lora", "--max-lora-rank", str(room), "--max-loras", str(min(8, len(modules)))]
        made += ["--lora-modules", *(f"{name}={folder.resolve()}" for name, folder in modules.items())]
    if dtype:
        made += ["--dtype", dtype]
    for flag, value in options.engine_arguments().items():
        option = f"--{flag.replace('_', '-')}"
        made += [option] if value is True else [option, str(value)]
    return [*made, *arguments]


class VllmProcess:
    """The server's process, whose output goes to stderr and whose last lines are kept."""

    def __init__(self, command: Sequence[str]) -> None:
        """command: as `server_command` makes it. Raises ConfigError: its Python has no vLLM."""
        python = command[0]
        try:
            found = subprocess.run(
                [python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"],
                capture_output=True,
                check=False,
            ).returncode
        except OSError as error:
            raise ConfigError(f"--vllm-python {python} cannot be run ({error.strerror}); name a Python.") from None
        if found:
            raise ConfigError(
                f"{python} has no vLLM, so it cannot be started. {HOW_TO_INSTALL} Then name its Python with "
                "--vllm-python, or the address of a running server with --vllm-url."
            )
        # So that experts can be added while it runs; it listens on this machine alone.
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C is for this process, which lets the server answer what has come.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, name="holdfast-vllm-log", daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace")
            self._lines.append(line)
            sys.stderr.write(line)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def why_it_ended(self) -> str:
        """The line of its log that says why."""
        self._reader.join(timeout=2.0)
        return root_cause("".join(self._lines), ModelError(f"exit status {self._process.returncode}"))

    def stop(self) -> None:
        """End it and what it started; answers that it is giving are given."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                # Its engine and workers too, which are processes of its session.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


__all__ = ["VllmProcess", "free_port", "server_command"]
