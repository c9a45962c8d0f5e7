"""`holdfast serve` over HTTP: the answers of an evaluation, OpenAI's own client, and every request that is wrong."""

from __future__ import annotations

import base64
import io
import json
import threading
import time

import pytest
from PIL import Image

from holdfast.serving.check import to_messages

pytest.importorskip("uvicorn", reason="needs the extra holdfast[serve]")
pytest.importorskip("starlette", reason="needs the extra holdfast[serve]")
openai = pytest.importorskip("openai")


def data_uri(width: int = 8, height: int = 8, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(content, **more) -> dict:
    return {"model": "cram", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def test_answers_and_routes_are_those_of_an_evaluation(server, world, client):
    from concurrent.futures import ThreadPoolExecutor

    asked = {s.id: s for rows in world.samples.values() for s in rows if s.id in world.answers}

    def ask(sample):
        return client.chat.completions.create(model="cram", messages=to_messages(sample), max_tokens=6, temperature=0)

    with ThreadPoolExecutor(6) as pool:  # together, so that they share batches
        found = dict(zip(asked, pool.map(ask, asked.values()), strict=True))
    assert {i: reply.choices[0].message.content for i, reply in found.items()} == world.answers
    for i, reply in found.items():
        route, expected = reply.model_extra["holdfast"], world.routes[i]
        assert route["weights"] == {name: w for name, w in expected["weights"].items() if w > 0}
        assert route["reason"] == ("abstained" if expected["abstained"] else "routed")
        assert route["group"] == expected["group"]
        assert reply.usage.completion_tokens <= 6 and reply.usage.prompt_tokens > 5


def test_a_stream_is_the_answer_in_pieces(server, world, client):
    sample = world.samples["warm"][0]
    whole = client.chat.completions.create(model="cram", messages=to_messages(sample), max_tokens=24)
    events = list(
        client.chat.completions.create(
            model="cram",
            messages=to_messages(sample),
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(texts) == whole.choices[0].message.content and len([t for t in texts if t]) > 1
    last = [event for event in events if event.choices][-1]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.model_extra["holdfast"] == whole.model_extra["holdfast"]
    assert events[-1].usage == whole.usage


def test_base_and_experts_can_be_asked_for_by_name(server, world, client):
    names = [model.id for model in client.models.list()]
    assert names == ["cram", "cram:base", "cram:warm", "cram:cold", "cram:maths"]
    messages = to_messages(world.samples["warm"][0])
    said = {}
    for name in names[1:]:
        reply = client.chat.completions.create(model=name, messages=messages, max_tokens=6)
        assert reply.model_extra["holdfast"] == {"answered_by": name.partition(":")[2], "reason": "asked for by name"}
        said[name] = reply.choices[0].message.content
    assert len(set(said.values())) == 4  # random experts: each says something else
    status, health = server.get("/health")
    assert status == 200 and health["experts"] == ["warm", "cold", "maths"]


def test_sampling_depends_on_the_seed_and_stop_ends_an_answer(server, client):
    def ask(**more):
        reply = client.chat.completions.create(
            model="cram", messages=[{"role": "user", "content": "1 + 1 = "}], max_tokens=12, **more
        )
        return reply.choices[0].message.content

    once, again, other = (ask(temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert once == again != other
    whole = ask()
    mark = whole[3]
    assert ask(stop=mark) == whole.partition(mark)[0].strip()


TEXT = [{"type": "text", "text": "What?"}]
BAD = {
    "no JSON": (b"{", 400, "invalid_json", "no JSON"),
    "half a character": (rb'{"model": "cram", "\ud800": 1}', 400, "invalid_json", "no JSON"),
    "nothing": (b"", 400, "invalid_json", "no JSON"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "invalid_json", "no JSON"),
    "too deep": (b"[" * 100_000, 400, "invalid_json", "no JSON"),
    "too many digits": (b'{"model": "cram", "seed": 1' + b"0" * 5000 + b"}", 400, "invalid_json", "no JSON"),
    "no number": (
        b'{"model": "cram", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        400,
        "invalid_value",
        "from 0 to 2",
    ),
    "a list of models": ({"model": ["cram"], "messages": []}, 400, "invalid_value", "GET /v1/models"),
    "messages by name": ({"model": "cram", "messages": {"role": "user"}}, 400, "invalid_value", "at least one message"),
    "a message of text": ({"model": "cram", "messages": ["x"]}, 400, "invalid_value", "messages[0] is a str"),
    "a role of lists": ({"model": "cram", "messages": [{"role": ["user"]}]}, 400, "invalid_value", "role is"),
    "a part of numbers": (chat([1]), 400, "invalid_value", "expected text, or image_url"),
    "a part without text": (chat([{"type": "text"}]), 400, "invalid_value", "expected text, or image_url"),
    "sound": (chat([{"type": "input_audio"}]), 400, "invalid_value", "expected text, or image_url"),
    "a picture of the system's": (
        {"model": "cram", "messages": [{"role": "system", "content": [picture(data_uri())]}]},
        400,
        "invalid_value",
        "in the user's",
    ),
    "half a picture": (chat([*TEXT, picture(data_uri(300, 300)[:-200])]), 400, "invalid_value", "cannot"),
    "a stream of text": (chat("x", stream="yes"), 400, "invalid_value", "expected true or false"),
    "options of a list": (chat("x", stream_options=[1]), 400, "invalid_value", "expected an object"),
    "JSON only": (chat("x", response_format={"type": "json_object"}), 400, "invalid_value", "response_format"),
    "log-probabilities": (chat("x", logprobs=True), 400, "invalid_value", "logprobs"),
    "no object": (b"[1]", 400, "invalid_value", "expected an object"),
    "no model": ({"messages": []}, 400, "invalid_value", "GET /v1/models"),
    "unknown model": (chat("x") | {"model": "crom"}, 404, "model_not_found", "nearest is 'cram'"),
    "unknown expert": (chat("x") | {"model": "cram:wram"}, 404, "model_not_found", "there are cram, "),
    "no messages": ({"model": "cram"}, 400, "invalid_value", "at least one message"),
    "no content": (chat(None), 400, "invalid_value", "expected a text or a list of parts"),
    "wrong role": ({"model": "cram", "messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "role is"),
    "the assistant last": (
        {"model": "cram", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        400,
        "invalid_value",
        "expected the user's",
    ),
    "a mark in a text": (chat("look: <image>"), 400, "invalid_value", "send the picture as an image_url part"),
    "only a picture": (chat([picture(data_uri())]), 400, "invalid_value", "no instruction text"),
    "a URL": (chat([*TEXT, picture("http://127.0.0.1:1/a.png")]), 400, "image_url_not_allowed", "fetches nothing"),
    "a file": (chat([*TEXT, picture("file:///etc/passwd")]), 400, "image_url_not_allowed", "none is read here"),
    "a file that cannot be": (
        chat([*TEXT, picture("file:///%00" + "x" * 5000)]),
        400,
        "image_url_not_allowed",
        "none is read here",
    ),
    "a path": (chat([*TEXT, picture("/etc/passwd")]), 400, "image_url_not_allowed", "fetches nothing"),
    "no picture": (chat([*TEXT, picture("data:image/png;base64,aGVsbG8=")]), 400, "invalid_image", "can be read"),
    "no Base64": (chat([*TEXT, picture("data:image/png;base64,***")]), 400, "invalid_image", "no Base64"),
    "no kind": (chat([*TEXT, picture("data:text/html;base64,aGVsbG8=")]), 400, "invalid_image", "expected data:image"),
    "too large": (chat([*TEXT, picture(data_uri(2000, 1000))]), 400, "image_too_large", "2000 x 1000 pixels"),
    "too many": (chat([*TEXT, *[picture(data_uri())] * 3]), 400, "invalid_value", "more than 2 pictures"),
    "too long": (chat("word " * 600), 400, "context_length_exceeded", "has a context of 512"),
    "too many tokens": (chat("x", max_tokens=65), 400, "invalid_value", "expected 1 to 64"),
    "no tokens": (chat("x", max_tokens=0), 400, "invalid_value", "expected 1 to 64"),
    "tokens of text": (chat("x", max_tokens="4"), 400, "invalid_value", "expected a whole number"),
    "a seed of 65 bits": (chat("x", seed=2**63), 400, "invalid_value", "64 bits"),
    "hot": (chat("x", temperature=3), 400, "invalid_value", "from 0 to 2"),
    "a stop of numbers": (chat("x", stop=[1]), 400, "invalid_value", "expected a text, or up to 4"),
    "two choices": (chat("x", n=2), 400, "invalid_value", "n = 2 is not served here"),
    "a tool": (chat("x", tools=[{"type": "function"}]), 400, "invalid_value", "tools"),
    "an unheard-of field": (chat("x", best_of=3), 400, "invalid_value", "best_of is no field"),
}


def test_a_request_that_is_wrong_gets_an_error_of_openais_shape(server):
    # One test: each case is a few milliseconds, and a server takes seconds to start in every process that runs tests.
    for case, (body, status, code, sentence) in BAD.items():
        found, reply = server.post(body, raw=body if isinstance(body, bytes) else None)
        assert (found, reply["error"]["code"]) == (status, code), (case, reply)
        assert sentence in reply["error"]["message"], (case, reply)
        assert set(reply["error"]) == {"message", "type", "param", "code"}, case
    assert server.get("/health")[0] == 200


def test_a_wrong_request_does_not_spoil_its_neighbours(server, world):
    results = {}

    def ask(name, body):
        results[name] = server.post(body)

    good = {"model": "cram", "messages": to_messages(world.samples["warm"][0]), "max_tokens": 6}
    bodies = {"good": good, "long": chat("word " * 600), "good too": good}
    threads = [threading.Thread(target=ask, args=item) for item in bodies.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = {results[name][1]["choices"][0]["message"]["content"] for name in ("good", "good too")}
    assert answers == {world.answers["warm-0"]} and results["long"][0] == 400


def test_other_places_and_verbs_are_errors_too(server):
    assert server.get("/v1/completions")[0] == 404
    status, reply = server.get("/v1/chat/completions")
    assert status == 405 and "POST /v1/chat/completions" in reply["error"]["message"]
    assert server.get("/v1/models/cram")[1]["id"] == "cram" and server.get("/v1/models/x")[0] == 404


def test_a_client_that_goes_away_leaves_its_place(server):
    import socket

    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps(chat("1 + 1 = ", max_tokens=64, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        connection.recv(64)
    end = time.monotonic() + 20
    while server.get("/health")[1]["waiting"] and time.monotonic() < end:
        time.sleep(0.05)
    assert server.get("/health")[1]["waiting"] == 0


def test_check_served_tells_the_folder_from_its_base(server, world, monkeypatch):
    from holdfast.serving import check
    from holdfast.serving.check import check_served

    texts = world.samples["maths"][:6]
    active = check_served(server.url, str(world.cram), samples=texts, max_new_tokens=6)
    assert active.verdict == "active" and active.telling and active.equal == active.requests == 6 + 3 * 6
    silent = check_served(server.url, str(world.cram), samples=texts, max_new_tokens=6, model="cram:base")
    assert silent.verdict == "base" and "NOT ACTIVE" in silent.sentence("u", "f")
    # One expert is dead, which no request that the router sends elsewhere would show.
    ask = check._Endpoint.ask
    dead = {"cram:cold": "cram:base"}
    monkeypatch.setattr(check._Endpoint, "ask", lambda self, model, *rest: ask(self, dead.get(model, model), *rest))
    found = check_served(server.url, str(world.cram), samples=texts, max_new_tokens=6)
    assert found.verdict == "base" and found.wrong == ("cold",) and "not served: cold" in found.sentence("u", "f")
