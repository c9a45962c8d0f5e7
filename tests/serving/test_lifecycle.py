"""The beginning and the end of a server, and experts that come while it runs."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from typing import ClassVar

import pytest
from PIL import Image
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.errors import AdapterError, ConfigError, ModelError
from holdfast.serving.api_error import ApiError
from holdfast.serving.check import judge
from holdfast.serving.engine import model_names
from holdfast.serving.protocol import Limits, read_request
from holdfast.serving.run import listening_socket, serve, served_checkpoint
from holdfast.tuners.cram.standalone import export_router
from serving_kit import chat_text, ended, started

pytest.importorskip("uvicorn", reason="needs the extra holdfast[serve]")
pytest.importorskip("starlette", reason="needs the extra holdfast[serve]")


def test_a_folder_is_one_of_three(world, tmp_path):
    assert served_checkpoint(str(world.cram)).adapters == (str(world.cram),)
    assert served_checkpoint(str(world.base)).adapters == ()
    expert = next((world.cram / "experts").iterdir())
    assert served_checkpoint(str(expert)).base == str(world.base)
    (tmp_path / "none").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"methods": ["cram"]}')
    (tmp_path / "file").write_text("x")
    for place in ("none", "run", "file", "run/config.json"):
        with pytest.raises(ModelError, match=r"neither a checkpoint .* nor a PEFT adapter .* nor a CRAM folder"):
            served_checkpoint(str(tmp_path / place))
    export_router(world.cram, tmp_path / "router")
    with pytest.raises(ModelError, match="is an exported router, which answers nothing"):
        served_checkpoint(str(tmp_path / "router"))
    nameless = shutil.copytree(expert, tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="names no base; give it with --base"):
        served_checkpoint(str(nameless))


def test_a_taken_port_is_named_before_the_model_is_loaded():
    with listening_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on .*Choose another --port"):
            listening_socket("127.0.0.1", port)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--vllm-url", "http://x"], "--vllm-url only speaks to vLLM"),
        (["--eager"], "--eager only speaks to vLLM"),
        (["--mixed", "refuse"], "--mixed only speaks to vLLM"),
        (["--backend", "vllm", "--vllm-url", "http://x", "--eager"], "--eager is for a vLLM that is started here"),
        (["--backend", "vllm", "--vllm-args", "'"], "cannot be read: No closing quotation"),
        (["--allow-files", "/nowhere/at/all"], "is no folder"),
        (["--backend", "vllm", "--gpu-memory", "2"], "gpu_memory is 2"),
    ],
)
def test_options_that_do_nothing_are_refused(world, options, sentence):
    result = CliRunner().invoke(app, ["serve", str(world.cram), *options])
    assert isinstance(result.exception, ConfigError) and sentence in str(result.exception)


def test_experts_come_while_it_runs_and_a_broken_folder_changes_nothing_and_sigterm_answers_first(world, tmp_path):
    folder = shutil.copytree(world.cram, tmp_path / "cram")
    router = json.loads((folder / "router.json").read_text())
    server = started(str(folder), "--max-tokens", "400")
    try:
        # As a stream's next step writes it: another folder in this one's place, by renames.
        router["experts"][2]["name"] = "sums"
        write(folder / "router.json", router)
        wait(lambda: server.get("/health")[1]["experts"] == ["warm", "cold", "sums"])
        assert server.get("/v1/models/cram:sums")[0] == 200
        write(folder / "router.json", router | {"experts": router["experts"][:2]})
        wait(lambda: "problem" in server.get("/health")[1])
        status, health = server.get("/health")
        assert status == 200 and "the old experts answer on" in health["problem"]
        assert chat_text(server, "cram:sums", "1 + 1")

        replies = []
        asking = threading.Thread(target=lambda: replies.append(server.post(long_request())))
        asking.start()
        wait(lambda: server.get("/health")[1]["waiting"] == 1)
        server.process.send_signal(signal.SIGTERM)
        asking.join(timeout=60)
        assert replies and replies[0][0] == 200 and replies[0][1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert server.process.wait(timeout=30) == 0
        with pytest.raises(OSError):
            socket.create_connection(server.address, timeout=2)
    finally:
        ended(server)


def long_request() -> dict:
    return {"model": "cram", "messages": [{"role": "user", "content": "0 + 0 = 0123456789"}], "max_tokens": 400}


def write(path, data) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data))
    new.replace(path)


def wait(true, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


class Nobody:
    """An engine that is never asked."""

    models: ClassVar = {"x": "nothing"}
    state: ClassVar = {"ok": True}
    stopped = False

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize("place", ["ready", "after_start"])
def test_whatever_goes_wrong_after_the_start_ends_the_server(place):
    engine = Nobody()

    def fails(address: str) -> None:
        raise RuntimeError(f"no memory for a probe of {address}")

    with pytest.raises(RuntimeError, match="no memory for a probe of http://127"):
        serve(lambda: engine, host="127.0.0.1", port=0, limits=Limits(), **{place: fails})
    assert engine.stopped


def test_names_that_cannot_be_told_apart_are_refused():
    assert list(model_names("cram", ("warm",))) == ["cram", "cram:base", "cram:warm"]
    for name, expert in (("a:b", "warm"), ("cram", "base")):
        with pytest.raises(ConfigError, match=r"give --served-name|rename its task"):
            model_names(name, (expert,))


def test_files_are_read_below_the_allowed_folder_alone(tmp_path):
    folder = tmp_path / "allowed"
    folder.mkdir()
    for place in (folder / "a.png", tmp_path / "b.png"):
        Image.new("RGB", (4, 4)).save(place)
    (folder / "out.png").symlink_to(tmp_path / "b.png")
    limits = Limits(files=folder)

    def asked(url: str):
        parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}]
        data = {"model": "m", "messages": [{"role": "user", "content": parts}]}
        request = read_request(data, limits, id="1")
        request.close()
        return request

    assert asked(f"file://{folder}/a.png").sample.images == (folder / "a.png",)
    outside = [f"{tmp_path}/b.png", f"{folder}/../b.png", f"{folder}/%2e%2e/b.png", f"{folder}/out.png"]
    for path in (*outside, f"{folder}/", f"{folder}/none.png", f"{folder}/%00", f"{folder}/{'x' * 5000}", "a.png"):
        with pytest.raises(ApiError, match="only those below the allowed folder are read"):
            asked(f"file://{path}")


@pytest.mark.parametrize(
    "given, ours, before, verdict",
    [
        ("ab", "ab", "xy", "active"),
        ("xy", "ab", "xy", "base"),
        ("pq", "ab", "xy", "other"),
        ("ab", "ab", "ab", "unknown"),
        ("ab", "ab", None, "active"),
        ("pq", "ab", None, "other"),
        # The one that tells is right by chance.
        ("apqrs", "abcde", "xbcde", "other"),
    ],
)
def test_the_verdict_of_a_check(given, ours, before, verdict):
    assert judge(given, ours, before).verdict == verdict
