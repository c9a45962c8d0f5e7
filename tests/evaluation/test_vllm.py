"""The vLLM seam against a stand-in module: what it is asked, and what it refuses. `make serve-test` runs the engine."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

import adapter_kit
from holdfast.checkpoints.value import Checkpoint
from holdfast.errors import AdapterError, ConfigError, ModelError
from holdfast.evaluation import CheckpointEvaluator, EvaluationConfig
from holdfast.evaluation.engine_log import listened, root_cause
from holdfast.evaluation.vllm import VllmBackend
from holdfast.evaluation.vllm_options import VllmOptions
from holdfast.stream.protocol import silent


class Engine:
    def __init__(self, **options):
        if options.get("max_model_len") == 1:
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        self.options = options
        self.asked, self.calls = [], []
        Engine.last = self

    def chat(self, messages, *, sampling_params, use_tqdm, **more):
        self.asked += list(zip(messages, sampling_params, strict=True))
        self.calls.append(more)
        return [SimpleNamespace(outputs=[SimpleNamespace(text=f" {m[-1]['content'][-1]['text']} ")]) for m in messages]


@pytest.fixture
def vllm(monkeypatch):
    module = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options, __version__="0.0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    lora = SimpleNamespace(LoRARequest=lambda name, number, path: (name, number, path))
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace(request=lora))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", lora)
    return module


def test_an_evaluation_runs_through_vllm(vllm, pico_folder, pico_stream, tmp_path):
    options = VllmOptions(eager=True, max_model_len=64, gpu_memory=0.5, tensor_parallel=2)
    evaluator = CheckpointEvaluator(EvaluationConfig(backend="vllm", batch_size=4), vllm_options=options)
    where = Checkpoint(base=str(pico_folder))
    rows = evaluator(where, stream=pico_stream, step=None, out_dir=tmp_path, progress=silent)
    assert rows["scores"]["colour"]["n"] == 5 and rows["safety"]["forbidden"]["n"] == 4
    (message,), sampling = Engine.last.asked[0]
    assert [part["type"] for part in message["content"]] == ["image_pil", "text"]
    assert message["content"][0]["image_pil"].mode == "RGB"
    assert sampling == {"temperature": 0.0, "max_tokens": 4}
    assert Engine.last.options | {"trust_remote_code": False} == Engine.last.options
    asked = {"enforce_eager": True, "max_model_len": 64, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 2}
    assert Engine.last.options | asked == Engine.last.options


@pytest.mark.parametrize("spelled", [False, True])
def test_the_engine_is_told_whether_the_tokenizer_adds_its_beginning(vllm, pico_folder, pico_stream, tmp_path, spelled):
    # vLLM's chat adds none by itself; the transformers path adds it unless the template has spelled it.
    import shutil

    folder = shutil.copytree(pico_folder, tmp_path / "model")
    if spelled:
        template = folder / "chat_template.jinja"
        template.write_text("<s>" + template.read_text())
    VllmBackend(Checkpoint(base=str(folder))).answer(list(pico_stream.tasks[0].test), max_new_tokens=1)
    (call,) = Engine.last.calls
    assert call["tokenization_kwargs"] == {"add_special_tokens": not spelled}
    assert call["chat_template"].startswith("<s>") is spelled


def test_seeded_answers_depend_on_the_sample_and_not_on_its_place(vllm, pico_folder, pico_stream):
    backend = VllmBackend(Checkpoint(base=str(pico_folder)), seed=1, temperature=0.7)
    samples = list(pico_stream.tasks[0].test)
    backend.answer(samples, max_new_tokens=4)
    backend.answer(samples[::-1], max_new_tokens=4)
    seeds = [sampling["seed"] for _, sampling in Engine.last.asked]
    assert seeds[:5] == seeds[:4:-1] and len(set(seeds)) == 5


def test_an_adapter_is_served_where_vllm_has_all_of_it(vllm, pico_folder, pico_stream, tmp_path):
    text = adapter_kit.train(pico_folder, tmp_path / "text", target_modules=r".*language_model.*q_proj")
    whole = adapter_kit.train(pico_folder, tmp_path / "whole", target_modules=["q_proj", "linear_1"])
    samples = list(pico_stream.tasks[0].test)
    VllmBackend(Checkpoint(base=str(pico_folder), adapters=(str(text),))).answer(samples, max_new_tokens=1)
    assert Engine.last.options["enable_lora"] and Engine.last.options["max_lora_rank"] == 8
    assert Engine.last.calls[0]["lora_request"] == [("text", 1, str(text))] * len(samples)
    with pytest.raises(AdapterError, match=r"3 of 5 modules lie outside the text decoder .*silence, \d.*Merge it"):
        VllmBackend(Checkpoint(base=str(pico_folder), adapters=(str(whole),)))
    where = Checkpoint(base=str(pico_folder), adapters=(str(text),))
    narrow = VllmBackend(where, options=VllmOptions(max_lora_rank=2))
    with pytest.raises(AdapterError, match="rank 4, and vLLM has room for 2"):
        narrow.answer(samples, max_new_tokens=1)
    config = json.loads((text / "adapter_config.json").read_text()) | {
        "rank_pattern": {},
        "alpha_pattern": {"q_proj": 2},
    }
    (text / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"have a scale of their own .*vLLM applies lora_alpha / r = 2 to all"):
        VllmBackend(Checkpoint(base=str(pico_folder), adapters=(str(text),)))


def test_an_adapter_with_a_tokenizer_of_its_own_is_refused(vllm, pico_folder, tmp_path):
    adapter = adapter_kit.train(pico_folder, tmp_path / "a", target_modules=["up_proj"])
    where = Checkpoint(base=str(pico_folder), adapters=(str(adapter),))
    (adapter / "chat_template.jinja").write_bytes((pico_folder / "chat_template.jinja").read_bytes())
    VllmBackend(where)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content[0].text }}")
    with pytest.raises(AdapterError, match=r"chat template in this folder differ .*vLLM reads the base's"):
        VllmBackend(where)


def test_what_it_cannot_do_is_refused(vllm, monkeypatch, pico_folder, pico_stream):
    with pytest.raises(AdapterError, match=r"has 2 on top of each other. Merge the lower ones"):
        VllmBackend(Checkpoint(base="m", adapters=("a1", "a2")))
    broken = VllmBackend(Checkpoint(base=str(pico_folder)), options=VllmOptions(max_model_len=1))
    with pytest.raises(ModelError, match=r"vLLM 0\.0 cannot load it: Engine core"):
        broken.answer(pico_stream.tasks[0].test, max_new_tokens=1)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"not installed by default.*pip install vllm"):
        VllmBackend(Checkpoint(base="m"))
    for wrong in ({"gpu_memory": 0}, {"gpu_memory": 90}, {"max_model_len": 0}, {"tensor_parallel": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            VllmOptions(**wrong)


LOG = """(EngineCore pid=7) INFO 11-25 22:38:40 [core.py:9] loading
(EngineCore pid=7) ERROR 11-25 22:38:41 [core.py:11] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-25 22:38:41 [core.py:11]   File "a.py", line 3, in b
(EngineCore pid=7) ERROR 11-25 22:38:41 [core.py:11] ValueError: There is no module named 'vision_tower.embeddings'
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_is_found_where_the_engine_wrote_it():
    found = root_cause(LOG, RuntimeError("Engine core initialization failed. See root cause above."))
    assert found == "ValueError: There is no module named 'vision_tower.embeddings'"
    nested = RuntimeError("Engine core initialization failed")
    nested.__cause__ = OSError("no such file")
    assert root_cause("", nested) == "no such file"


def test_what_an_engine_writes_to_stdout_reaches_stderr(capfd):
    import subprocess

    with listened() as log:
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        assert "from a child" in log()
    print("result")
    seen = capfd.readouterr()
    assert seen.out == "result\n" and "from a child" in seen.err
