"""Folders as a user has them, ways to spoil them, and a call of any verb that says how it ended."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_run
import pico

ESC = "\x1b]0;owned\x07\x1b[2J"
DEEP = "[" * 100_000 + "]" * 100_000
SURROGATE = '"\\ud83d"'
DIGITS = "9" * 5000
# A pattern whose matching by backtracking takes longer than the universe has been there.
BOMB = r"(.*a|b|ab)*(.+)+(\w+\.?)+z!"


ALL = os.environ.get("HOLDFAST_HOSTILE") == "all"


class Hang(BaseException):
    """A verb did not come back."""


@dataclass(frozen=True)
class End:
    """How a verb ended. code: exit status; text: what it said; grew: bytes of main memory beyond the peak before."""

    code: Any
    text: str
    seconds: float
    grew: int


def world(root: Path, base: Path) -> Path:
    """base, adapter, data, stream file, run file: small and whole."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base, root / "base")
    write_adapter(root / "adapter", root / "base")
    run = pico.run_file(root / "data", root / "base")
    assert run.is_file()
    samples = [{"prompt": f"Do {i}", "answer": "no", "image": "images/red.png"} for i in range(3)]
    (root / "data" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    fake_run.write_run(root / "run", methods={"seqft": 0.6, "hpa": 0.9}, n=4)
    safe = [{"prompt": f"Forbidden {i}", "answer": "I cannot."} for i in range(2)]
    (root / "data" / "safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in safe))
    return root


def copy(world: Path, target: Path) -> Path:
    """A fresh world to spoil; its run file names its own base."""
    shutil.copytree(world, target)
    run = target / "data" / "run.yaml"
    run.write_text(run.read_text().replace(str(world), str(target)))
    return target


def write_adapter(folder: Path, base: Path, **config: Any) -> Path:
    """A LoRA adapter for every q_proj of `base`, written by hand: PEFT takes seconds to import."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    with safe_open(base / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith("q_proj.weight") and "language_model" in key:
                rows, columns = file.get_slice(key).get_shape()
                name = f"base_model.model.{key.removesuffix('.weight')}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    assert tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return folder


# Parts of a fast tokenizer's file.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
PIECE = {"Sequence": {"id": "A", "type_id": 0}}
AROUND = {
    "type": "TemplateProcessing",
    "single": [PIECE],
    "pair": [PIECE, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


def sequence(key: str, parts: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: parts}


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {
        "type": "Replace",
        "pattern": {"String": pattern} if isinstance(pattern, str) else pattern,
        "content": content,
    }


def special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def change_json(path: Path, **changes: Any) -> None:
    """Keys of a JSON object set anew; a value that is a `Raw` stands in the file as it is."""
    data = json.loads(path.read_text())
    raws = {f"@@{i}@@": value for i, value in enumerate(changes.values()) if isinstance(value, Raw)}
    back = {value: mark for mark, value in raws.items()}
    text = json.dumps({**data, **{k: back.get(v, v) if isinstance(v, Raw) else v for k, v in changes.items()}})
    for mark, value in raws.items():
        text = text.replace(json.dumps(mark), value)
    path.write_text(text)


class Raw(str):
    """JSON text as it is to stand in a file."""


def replace_by_fifo(path: Path) -> None:
    """A named pipe that nobody writes into: whoever opens it to read waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def replace_by_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def replace_by_socket(path: Path) -> None:
    import socket

    path.unlink(missing_ok=True)
    place = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(place)


def header(path: Path, items: dict[str, Any] | str | Callable[[], str], data: bytes = b"") -> None:
    """A safetensors file with this header, given as an object, as text, or as what makes it."""
    items = items() if callable(items) else items
    text = (items if isinstance(items, str) else json.dumps(items)).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _very_many() -> str:
    entry = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    return "{" + ", ".join(f'"t{i}": {entry}' for i in range(300_000)) + "}"


def call(argv: Sequence[object], capfd: Any, seconds: float = 20.0) -> End:
    """The `holdfast` command in this process, stopped after so many seconds of the processor, or ten times as many."""
    from holdfast.cli import main

    def late(number: int, frame: Any) -> None:
        del number, frame
        raise Hang

    capfd.readouterr()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 10 * seconds))
    before = [(signal.signal(number, late), signal.setitimer(timer, most)) for number, timer, most in timers]
    old_argv, sys.argv = sys.argv, ["holdfast", *map(str, argv)]
    code: Any = 0
    trace = ""
    try:
        main()
    except SystemExit as error:
        code = error.code or 0
    except Hang:
        code = "HANG"
    except BaseException as error:  # noqa: BLE001 (what the boundary let through is what is looked for)
        code, trace = f"TRACEBACK {type(error).__name__}", str(error)[:200]
    finally:
        for (number, timer, _), (handler, old) in zip(timers, before, strict=True):
            signal.setitimer(timer, *old)  # pytest's own, as long as it was
            signal.signal(number, handler)
        sys.argv = old_argv
    shown = capfd.readouterr()
    grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    return End(code, shown.out + shown.err + trace, time.process_time() - started, grew)


Spoil = Callable[[Path], None]


def spoiled() -> dict[str, tuple[str, Spoil]]:
    """name -> (group of verbs, what is done to a fresh world)."""
    found: dict[str, tuple[str, Spoil]] = {}

    def config(file: str, group: str, name: str, **changes: Any) -> None:
        found[f"{file}: {name}"] = (group, lambda w: change_json(w / file, **changes))

    def text(file: str, group: str, name: str, content: str | bytes) -> None:
        raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        found[f"{file}: {name}"] = (group, lambda w: (w / file).write_bytes(raw) and None)

    adapter = "adapter/adapter_config.json"
    for key in ("rank_pattern", "alpha_pattern"):
        config(adapter, "adapter", f"bomb as {key}", **{key: {BOMB: 4}})
        config(adapter, "adapter", f"no pattern in {key}", **{key: {"(": 4}})
        config(adapter, "adapter", f"nested repeats in {key}", **{key: {"(" * 500 + "a" + ")*" * 500: 4}})
        config(adapter, "adapter", f"{key} of lists", **{key: [1]})
    config(adapter, "adapter", "bomb as target_modules", target_modules=BOMB)
    config(adapter, "adapter", "bomb as exclude_modules", exclude_modules=BOMB)
    config(adapter, "adapter", "bomb as layers_pattern", layers_pattern=BOMB, layers_to_transform=[0])
    config(adapter, "adapter", "DoRA with a bomb", use_dora=True, target_modules=BOMB)
    config(adapter, "adapter", "huge alpha", lora_alpha=1e300)
    config(adapter, "adapter", "alpha of 400 digits", lora_alpha=Raw("9" * 400))
    config(adapter, "adapter", "alpha of 5000 digits", lora_alpha=Raw(DIGITS))
    config(adapter, "adapter", "negative rank", r=-2)
    config(adapter, "adapter", "rank 1e400", r=Raw("1e400"))
    config(adapter, "adapter", "rank NaN", r=Raw("NaN"))
    config(adapter, "adapter", "rank as text", r="2")
    config(adapter, "adapter", "float rank", r=2.0)
    config(adapter, "adapter", "deep", modules_to_save=Raw(DEEP))
    config(adapter, "adapter", "surrogate", base_model_name_or_path=Raw(SURROGATE))
    config(adapter, "adapter", "escape", peft_type=ESC)
    config(adapter, "adapter", "modules_to_save 5", modules_to_save=5)
    config(adapter, "adapter", "300 letters", base_model_name_or_path="x" * 300)
    text(adapter, "adapter", "list", "[]")
    text(adapter, "adapter", "empty", "")
    text(adapter, "adapter", "latin-1", b'{"peft_type": "\xe9"}')
    text(adapter, "adapter", "twice", '{"peft_type": "LORA", "r": 2, "r": 3, "lora_alpha": 4}')
    for file, group in ((adapter, "adapter"), ("base/config.json", "base"), ("base/tokenizer.json", "load")):
        found[f"{file}: fifo"] = (group, lambda w, f=file: replace_by_fifo(w / f))
        found[f"{file}: folder"] = (group, lambda w, f=file: replace_by_folder(w / f))
        found[f"{file}: deep"] = (group, lambda w, f=file: (w / f).write_text(DEEP) and None)
        found[f"{file}: socket"] = (group, lambda w, f=file: replace_by_socket(w / f))
    weights = "adapter/adapter_model.safetensors"
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers: dict[str, tuple[Any, bytes]] = {
        "float shape": ({"a": {**one, "shape": [2.0]}}, b"\0" * 8),
        "text shape": ({"a": {**one, "shape": "2"}}, b"\0" * 8),
        "negative shape": ({"a": {**one, "shape": [-1, -2]}}, b"\0" * 8),
        "huge shape": ({"a": {**one, "shape": [10**18, 10**18]}}, b"\0" * 8),
        "bool shape": ({"a": {**one, "shape": [True, 2]}}, b"\0" * 8),
        "float offsets": ({"a": {**one, "data_offsets": [0.0, 8.0]}}, b"\0" * 8),
        "three offsets": ({"a": {**one, "data_offsets": [0, 4, 8]}}, b"\0" * 8),
        "overlap": ({"a": one, "b": {**one, "data_offsets": [4, 12]}}, b"\0" * 12),
        "hole": ({"a": one, "b": {**one, "data_offsets": [12, 20]}}, b"\0" * 20),
        "hole at the start": ({"a": {**one, "data_offsets": [8, 16]}}, b"\0" * 16),
        "same twice": ({"a": one, "b": one}, b"\0" * 8),
        "key twice": (f'{{"a": {json.dumps(one)}, "a": {json.dumps(one)}}}', b"\0" * 8),
        "dtype and size": ({"a": {**one, "dtype": "F64"}}, b"\0" * 8),
        "dtype unknown": ({"a": {**one, "dtype": "F13"}}, b"\0" * 8),
        "dtype a list": ({"a": {**one, "dtype": []}}, b"\0" * 8),
        "list": ("[]", b""),
        "entry a list": ({"a": []}, b""),
        "metadata a list": ({"__metadata__": [], "a": one}, b"\0" * 8),
        "surrogate": ('{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 8),
        "escape": ({ESC: one}, b"\0" * 8),
        "deep": ('{"a": ' + DEEP + "}", b""),
        "digits": ('{"a": {"dtype": "F32", "shape": [' + DIGITS + '], "data_offsets": [0, 8]}}', b"\0" * 8),
        "NaN": ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', b"\0" * 8),
        "300,000 tensors": (_very_many, b""),
        "empty": ({}, b""),
    }
    files = ((weights, "adapter"), ("base/model.safetensors", "base"), ("curvature.safetensors", "curvature"))
    for file, group in files:
        for name, (items, data) in headers.items():
            found[f"{file}: {name}"] = (group, lambda w, f=file, i=items, d=data: header(w / f, i, d))
        text(file, group, "half a header", (1000).to_bytes(8, "little") + b"{")
        text(file, group, "length of 2^63", (2**63).to_bytes(8, "little") + b"{}")
        text(file, group, "nothing", b"")
        found[f"{file}: fifo"] = (group, lambda w, f=file: replace_by_fifo(w / f))
        found[f"{file}: folder"] = (group, lambda w, f=file: replace_by_folder(w / f))
    base = "base/config.json"

    def inner_of(file: str, part: str, name: str, **changes: Any) -> None:
        def spoil(w: Path) -> None:
            data = json.loads((w / file).read_text())
            data[part].update(changes)
            (w / file).write_text(json.dumps(data))

        found[f"{file}: {name}"] = ("load", spoil)

    def inner(name: str, part: str, **changes: Any) -> None:
        inner_of(base, part, name, **changes)

    inner("a million layers", "text_config", num_hidden_layers=10**6)
    inner("a million layers of the tower", "vision_config", num_hidden_layers=10**6)
    inner("vocabulary of 2^62", "text_config", vocab_size=2**62)
    inner("hidden size of 10^9", "text_config", hidden_size=10**9)
    inner("picture of 10^7", "vision_config", image_size=10**7)
    inner("no heads", "text_config", num_attention_heads=0)
    inner("heads as text", "text_config", num_attention_heads="many")
    inner("negative layers", "text_config", num_hidden_layers=-1)
    inner("positions of 10^12", "text_config", max_position_embeddings=10**12)
    config(base, "load", "surrogate", model_type=Raw(SURROGATE))
    config(base, "load", "escape", model_type=ESC)
    config(base, "load", "text_config 5", text_config=5)
    config(base, "load", "architectures 5", architectures=5)
    config(base, "load", "dtype", dtype="evil")
    config(base, "load", "digits", image_token_id=Raw(DIGITS))
    config(base, "load", "remote code", auto_map={"AutoConfig": "evil.Evil"}, model_type="evil")
    template = "base/chat_template.jinja"
    text(template, "load", "endless", "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}")
    text(
        template,
        "load",
        "doubling",
        "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    )
    text(template, "load", "product", "{{ 'x' * 10 ** 12 }}")
    text(template, "load", "recursion", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    text(template, "load", "syntax", "{% for %}")
    text(template, "load", "sandbox", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = "base/tokenizer.json"
    config(tokenizer, "load", "growth", normalizer=sequence("normalizers", [replace("o", "o" * 50)] * 8))
    config(tokenizer, "load", "doubling", pre_tokenizer=sequence("pretokenizers", [BYTES] * 40))
    config(tokenizer, "load", "bomb in a normalizer", normalizer=replace({"Regex": r"^(\w|\w)*(\s|.)*$y"}, "x"))
    config(
        tokenizer,
        "load",
        "bomb in a splitter",
        pre_tokenizer=sequence("pretokenizers", [{**SPLIT, "pattern": {"Regex": r"(.|.|\w)*\z\A"}}, BYTES]),
    )
    config(tokenizer, "load", "no such piece", post_processor={**AROUND, "single": [special("<nope>"), PIECE]})
    config(tokenizer, "load", "many pieces", post_processor={**AROUND, "single": [PIECE] * 5000})
    for key, value in (("eos_token_id", "x"), ("eos_token_id", [10**30]), ("eos_token_id", {"a": 1})):
        config("base/generation_config.json", "load", f"{key} {value!r}", **{key: value})
    for key, value in (
        ("size", {"shortest_edge": 10**6}),
        ("crop_size", {"height": 40_000, "width": 40_000}),
        ("image_std", [0, 0, 0]),
        ("image_mean", ["a", "b", "c"]),
    ):
        inner_of("base/processor_config.json", "image_processor", f"{key} {value!r}", **{key: value})
    config("base/processor_config.json", "load", "a billion image tokens", num_additional_image_tokens=10**9)
    config("base/processor_config.json", "load", "patches of 0", patch_size=0)
    text("base/tokenizer.json", "load", "digits", '{"version": ' + DIGITS + "}")
    text("base/processor_config.json", "load", "surrogate", '{"processor_class": "\\ud800"}')
    text("base/processor_config.json", "load", "list", "[]")
    samples = "data/samples.jsonl"
    lines = {
        "deep": DEEP,
        "digits": f'{{"prompt": {DIGITS}}}',
        "surrogate": f'{{"prompt": {SURROGATE}, "answer": "a"}}',
        "infinity": '{"prompt": "a", "answer": Infinity}',
        "1e400": '{"prompt": "a", "answer": 1e400}',
        "escape id": json.dumps({"id": ESC, "prompt": "a", "image": ESC + ".png"}),
        "300 letters": json.dumps({"prompt": "a", "answer": "b", "image": "x" * 300 + ".png"}),
        "list": "[1]",
        "null": "null",
        "NUL": json.dumps({"prompt": "a\0b", "answer": "b", "image": "a\0.png"}),
        "up": json.dumps({"prompt": "a", "answer": "b", "image": "../../etc/passwd"}),
        "device": json.dumps({"prompt": "a", "answer": "b", "image": "/dev/zero"}),
        "gzip": "\x1f\x8b",
    }
    for name, line in lines.items():
        text(samples, "samples", name, line + "\n")
    text(samples, "samples", "binary", bytes(range(256)))
    for file in (samples, "data/images/red.png", "data/unsafe.jsonl", "data/run.yaml", "data/colour-train.json"):
        group = "samples" if file == samples else "stream"
        found[f"{file}: fifo"] = (group, lambda w, f=file: replace_by_fifo(w / f))
        found[f"{file}: folder"] = (group, lambda w, f=file: replace_by_folder(w / f))
        found[f"{file}: socket"] = (group, lambda w, f=file: replace_by_socket(w / f))
        found[f"{file}: to itself"] = (group, lambda w, f=file: replace_by_loop(w / f))
        found[f"{file}: nothing"] = (group, lambda w, f=file: (w / f).write_bytes(b"") and None)
    run = "data/run.yaml"
    yamls = {
        "deep": DEEP,
        "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)),
        "itself": "a: &a [*a]\n",
        "digits": f"name: {DIGITS}\n",
        "surrogate": 'name: "\\ud800"\n',
        "escape": json.dumps({"name": ESC}),
        "bomb": json.dumps({"model": "../base", "methods": ["seqft"], "stream": {"name": "s", "root": ".", "tasks": [
            {"name": "a", "train": "{a,b}" * 40 + ".json", "test": "x.json"}]}}),
        "python": "!!python/object/apply:os.system ['true']\n",
        "twice": "model: a\nmodel: b\n",
        "number": "5\n",
        "key": "{[1]: 2}\n",
        "tab": "a:\n\t- b\n",
        "control": "name: \x01\n",
        "date": "name: 2020-01-01\n",
        "infinity": "seed: .inf\n",
    }  # fmt: skip
    for name, content in yamls.items():
        text(run, "stream", name, content)
    step = f"run/methods/hpa/1-{fake_run.TASKS[0]}"
    for file in ("run/config.json", "run/theta_0/record.json", f"{step}/record.json", f"{step}/edit.json"):
        for name, content in (
            ("deep", DEEP),
            ("digits", f'{{"format": {DIGITS}}}'),
            ("list", "[]"),
            ("surrogate", f'{{"format": {SURROGATE}}}'),
            ("empty", ""),
            ("object", "{}"),
        ):
            text(file, "report", name, content)
        found[f"{file}: fifo"] = ("report", lambda w, f=file: replace_by_fifo(w / f))
        found[f"{file}: folder"] = ("report", lambda w, f=file: replace_by_folder(w / f))
    answers = f"run/theta_0/predictions/task-{fake_run.TASKS[0]}.jsonl"
    for name, content in (("deep", DEEP), ("list", "[1]"), ("escape", json.dumps({"id": ESC, "prompt": ESC}))):
        text(answers, "report", name, content + "\n{}\n")
    found["run/picture.png: fifo"] = ("report", lambda w: replace_by_fifo(w / "run/picture.png"))
    text("edit.json", "inspect", "deep", DEEP)
    text("edit.json", "inspect", "digits", '{"format_version": ' + DIGITS + "}")
    text("edit.json", "inspect", "list", "[]")
    text("edit.json", "inspect", "wrong parts", '{"format_version": 1, "rule": 5, "layers": 5}')
    found["edit.json: fifo"] = ("inspect", lambda w: replace_by_fifo(w / "edit.json"))
    found["edit.json: folder"] = ("inspect", lambda w: replace_by_folder(w / "edit.json"))
    return found


def verbs(group: str, w: Path) -> list[list[object]]:
    """What is tried on a world that was spoiled in a file of this group."""
    out = w / "out"
    edit = ["edit", w / "base", w / "adapter", "--rule", "interpolation", "--out", out, "--no-verify"]
    calibrate = ["calibrate", w / "base", "--safety", w / "data/safe.jsonl", "--task", w / "data/samples.jsonl"]
    return {
        "adapter": [
            edit,
            ["evaluate", w / "base", "--adapter", w / "adapter", "--tasks", w / "data/run.yaml", "--out", w / "e"],
        ],
        "base": [edit],
        "load": [["calibrate", *calibrate[1:], "--out", w / "c.safetensors"], ["doctor", w / "data/run.yaml"]],
        "curvature": [["edit", w / "base", w / "adapter", "--calibration", w / "curvature.safetensors", "--out", out]],
        "samples": [["calibrate", *calibrate[1:], "--out", w / "c.safetensors"]],
        "stream": [["doctor", w / "data/run.yaml"], ["run", w / "data/run.yaml", "--out", w / "r"]],
        "report": [["report", w / "run", "--out", w / "page"], ["label", w / "run", "--html", w / "form.html"]],
        "inspect": [["inspect", w / "edit.json"]],
    }[group]  # fmt: skip
