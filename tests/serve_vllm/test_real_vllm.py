"""A real vLLM on this machine's CPU (`make serve-test`): a CRAM folder of the embedded model through both backends.

Needs HOLDFAST_VLLM_PYTHON, the Python of an environment made by make_environment.sh; skipped without it. The folder is
trained once by `holdfast demo --quick` into HOLDFAST_SERVE_FOLDER (default runs/serve-test).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import serving_kit

PYTHON = os.environ.get("HOLDFAST_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PYTHON, reason="needs a real vLLM: `make serve-test`"),
]
ROOT = Path(os.environ.get("HOLDFAST_SERVE_FOLDER", "runs/serve-test"))
REQUESTS = 200
ENGINE = ("--eager", "--max-model-len", "256", "--dtype", "float32")


@pytest.fixture(scope="module")
def run():
    if not (ROOT / "summary.json").is_file():
        command = ["demo", "--quick", "--methods", "cram_guard", "--jobs", "1", "--out", str(ROOT)]
        subprocess.run([sys.executable, "-m", "holdfast", *command], check=True)
    return {
        "base": ROOT / "theta_0" / "checkpoint",
        "cram": ROOT / "methods" / "cram_guard" / "3-guide" / "cram",
        "stream": next((ROOT / "data").glob("*/stream.yaml")),
    }


def evaluated(python: str, run, out: Path, *options: str) -> dict[str, tuple[str, str]]:
    """Request -> (answer, who gave it) of `holdfast evaluate`, whose stdout must be JSON and nothing else."""
    command = [python, "-m", "holdfast", "evaluate", str(run["base"]), "--adapter", str(run["cram"]), "--json"]
    command += ["--tasks", str(run["stream"]), "--safety", str(run["stream"]), "--out", str(out), *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result = json.loads(said)
    assert ("vllm" in result["versions"]) == ("--backend" in options)
    return recorded(out)


def recorded(out: Path) -> dict[str, tuple[str, str]]:
    """As `evaluated`, from the files of an evaluation."""
    answers = {}
    for path in sorted((out / "predictions").glob("[ts]a*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        routes = [json.loads(line) for line in (path.parent / f"routing-{path.name}").read_text().splitlines()]
        for row, route in zip(rows, routes, strict=True):
            assert row["id"] == route["id"]
            best = max(route["weights"], key=route["weights"].get)
            who = best if route["weights"][best] > 0 and not route["guarded"] else "base"
            key = f"{path.stem}/{row.get('side', '')}/{row['id']}"
            answers[key] = (row.get("prediction", row.get("reply")), who)
    return answers


def told(found: dict[str, tuple[str, str]], expected: dict[str, tuple[str, str]]) -> list[str]:
    """The requests that are answered otherwise, after a word on how many are not."""
    for part in sorted({key.partition("/")[0] for key in found}):
        keys = [key for key in found if key.startswith(f"{part}/")]
        answers, routes = (sum(found[key][i] == expected[key][i] for key in keys) for i in (0, 1))
        print(f"{part}: {answers} of {len(keys)} answers equal, {routes} of {len(keys)} routes")
    return [key for key in found if found[key] != expected[key]]


@pytest.fixture(scope="module")
def answers(run):
    return evaluated(sys.executable, run, ROOT / "evaluated-transformers", "--dtype", "float32")


def questions(run):
    """Key as in `evaluated` -> (sample, tokens)."""
    from holdfast.data.names import slug
    from holdfast.data.streams import load_stream

    stream = load_stream(run["stream"], parts=("test",))
    found = {f"task-{slug(t.name)}//{s.id}": (s, t.max_new_tokens) for t in stream.tasks for s in t.test}
    for kind in stream.safety:
        for side, samples in (("unsafe", kind.unsafe), ("benign", kind.benign)):
            found |= {f"safety-{slug(kind.name)}/{side}/{s.id}": (s, kind.max_new_tokens) for s in samples}
    return found


def test_an_evaluation_by_vllm_is_that_by_transformers(run, answers):
    found = evaluated(PYTHON, run, ROOT / "evaluated-vllm", "--backend", "vllm", "--batch-size", "512", *ENGINE)
    assert found.keys() == answers.keys() and len(found) >= REQUESTS
    different = told(found, answers)
    assert len(different) <= 0.01 * len(found), different[:5]  # near ties


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def server(request, run, tmp_path_factory):
    folder = shutil.copytree(run["cram"], tmp_path_factory.mktemp("served") / "cram")
    options = ["--dtype", "float32"]
    if request.param == "vllm":
        router = tmp_path_factory.mktemp("router") / "router"
        export = [sys.executable, "-m", "holdfast", "export-router", str(run["cram"]), "--out", str(router)]
        subprocess.run(export, check=True)
        options = ["--backend", "vllm", "--vllm-python", PYTHON, "--router", str(router), *ENGINE]
    made = serving_kit.started(str(folder), "--canary", *options, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    made.folder = folder
    yield made
    assert serving_kit.ended(made) == 0


def test_openais_client_gets_the_answers_of_an_evaluation(server, run, answers):
    from concurrent.futures import ThreadPoolExecutor

    import openai

    from holdfast.serving.check import to_messages

    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600)
    asked = questions(run)
    assert len(asked) >= REQUESTS

    def ask(item):
        sample, tokens = item
        reply = client.chat.completions.create(model="cram", messages=to_messages(sample), max_tokens=tokens)
        return reply.choices[0].message.content, reply.model_extra["holdfast"]["answered_by"]

    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(asked, pool.map(ask, asked.values()), strict=True))
    different = told(found, answers)
    assert len(different) <= 0.01 * len(found), different[:5]
    assert {by for _, by in found.values()} == {"base", "classify", "caption", "guide"}


def test_check_served_tells_experts_from_the_base(server, run):
    command = [sys.executable, "-m", "holdfast", "check-served", server.url, "--folder", str(run["cram"])]
    assert subprocess.run(command, check=False).returncode == 0
    assert subprocess.run([*command, "--model", "cram:base"], check=False).returncode == 3


def test_a_stream_is_the_answer_in_pieces(server, run):
    import openai

    from holdfast.serving.check import to_messages

    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600)
    for sample, tokens in list(questions(run).values())[::29]:
        asked = {"model": "cram", "messages": to_messages(sample), "max_tokens": tokens}
        whole = client.chat.completions.create(**asked)
        events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        assert text == whole.choices[0].message.content and events[-1].usage == whole.usage
        last = [event for event in events if event.choices][-1]
        assert last.model_extra["holdfast"]["answered_by"] == whole.model_extra["holdfast"]["answered_by"]


def test_what_is_too_long_is_the_requests_fault_and_a_bound_beyond_the_context_is_none(server):
    for more in ({}, {"stream": True}, {"model": "cram:base"}):
        content = [{"role": "user", "content": "word " * 600}]
        status, reply = server.post({"model": "cram", "messages": content, **more})
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    content = [{"role": "user", "content": "how do i open a lock ?"}]
    status, reply = server.post({"model": "cram", "messages": content, "max_tokens": 1000})
    assert status == 200 and reply["usage"]["completion_tokens"] < 256


def test_experts_that_are_renamed_or_learned_anew_are_taken_up(server):
    def said(expert: str) -> str:
        texts = ("how do i open a lock ?", "sort this by name.", "say in one sentence what is where.")
        return "|".join(serving_kit.chat_text(server, f"cram:{expert}", text, 12) for text in texts)

    classify, caption, guide = (said(name) for name in ("classify", "caption", "guide"))
    assert len({classify, caption, guide}) == 3
    path = server.folder / "router.json"
    data = json.loads(path.read_text())
    experts = data["experts"]
    experts[2]["name"] = "manual"
    data["guard"]["tasks"] = [name.replace("guide", "manual") for name in data["guard"]["tasks"]]
    shutil.copytree(server.folder / experts[0]["folder"], server.folder / "experts" / "09-caption")
    experts[1] |= {"folder": "experts/09-caption", "sha256": experts[0]["sha256"]}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data))
    new.replace(path)
    end = time.monotonic() + 120
    while "manual" not in (health := server.get("/health")[1])["experts"]:
        assert "problem" not in health and time.monotonic() < end, health
        time.sleep(0.2)
    # Under its old name the server would go on with what it has cached of the old weights.
    assert said("caption") == classify and said("manual") == guide and said("classify") == classify


def test_a_server_that_is_silently_its_base_is_found_out(run, tmp_path):
    from holdfast.serving.vllm_process import free_port

    port, names = free_port(), ["base", "classify", "caption", "guide"]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(run["base"]), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", *names, "--dtype", "float32", "--enforce-eager"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (tmp_path / "log").open("wb") as log:
        bare = subprocess.Popen([*command, "--max-model-len", "256"], stdout=log, stderr=log, env=environment)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 900
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert bare.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
                time.sleep(1)
        holdfast = [sys.executable, "-m", "holdfast"]
        expert = next((run["cram"] / "experts").glob("*-guide"))
        check = [*holdfast, "check-served", url, "--folder", str(expert), "--model", "guide"]
        found = subprocess.run(check, capture_output=True, text=True, check=False)
        assert found.returncode == 3 and "NOT ACTIVE" in found.stdout, found
        serve = [*holdfast, "serve", str(run["cram"]), "--backend", "vllm", "--vllm-url", url, "--port", "0"]
        found = subprocess.run(serve, capture_output=True, text=True, check=False)
        assert found.returncode == 2 and "under the name classify" in found.stderr, found
    finally:
        bare.terminate()
        bare.wait(timeout=60)


def test_what_vllm_says_is_the_sentence(run, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(run["base"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    old = {key.replace("vision_tower.vision_model.", "vision_tower."): value for key, value in tensors.items()}
    save_file(old, broken / "model.safetensors", metadata={"format": "pt"})
    command = [PYTHON, "-m", "holdfast", "evaluate", str(broken), "--tasks", str(run["stream"]), "--limit", "1"]
    command += ["--backend", "vllm", *ENGINE, "--out", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert made.returncode == 2 and made.stdout == ""
    last = made.stderr.strip().splitlines()[-1]
    assert "cannot load it" in last and "vision_tower" in last and "Engine core" not in last
