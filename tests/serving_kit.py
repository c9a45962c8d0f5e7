"""A `holdfast serve` process and what asks it, without any client library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any


@dataclass
class Server:
    """url: with /v1."""

    process: subprocess.Popen
    url: str

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.root.removeprefix("http://").split(":")
        return host, int(port)

    def post(self, body: Any, path: str = "/v1/chat/completions", *, raw: bytes | None = None) -> tuple[int, Any]:
        data = raw if raw is not None else json.dumps(body).encode()
        return self._open(urllib.request.Request(self.root + path, data=data, method="POST"))

    def get(self, path: str) -> tuple[int, Any]:
        return self._open(urllib.request.Request(self.root + path))

    @staticmethod
    def _open(request: urllib.request.Request) -> tuple[int, Any]:
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def started(*arguments: str, env: dict[str, str] | None = None) -> Server:
    """`holdfast serve ARGUMENTS --port 0`, once it answers."""
    command = [sys.executable, "-m", "holdfast", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the server ended with {process.wait()}"
    return Server(process, json.loads(line)["url"])


def ended(server: Server) -> int:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(timeout=60)
    assert server.process.stdout is not None
    server.process.stdout.close()
    return code


def chat_text(server: Server, model: str, text: str, max_tokens: int = 4) -> str:
    status, reply = server.post(
        {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}
    )
    assert status == 200, reply
    return reply["choices"][0]["message"]["content"]
