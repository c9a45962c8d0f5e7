"""`holdfast evaluate MODEL --tasks STREAM.yaml --safety STREAM.yaml`: scores and refusals of one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.choices import BackendName, DtypeName, ImageModeName


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a vision-language model.")],
    tasks: Annotated[Path | None, typer.Option(help="Stream file whose tasks are asked (test splits).")] = None,
    safety: Annotated[
        Path | None, typer.Option(help="File whose safety sets are asked: a stream file, or one with `safety` alone.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write; a second call with the same one resumes.")] = Path(
        "runs/evaluation"
    ),
    adapter: Annotated[list[str] | None, typer.Option(help="PEFT adapter on top of MODEL; repeat for more.")] = None,
    processor: Annotated[
        str | None,
        typer.Option(help="Folder or hub id whose tokenizer, template, processor serve where MODEL has none."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task of --tasks; repeat for more.")] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="Judge by name, or as YAML {name: ..., key: value}; the first decides, repeat for more."),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Data root, instead of the files' own.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most N samples of each task and each side of a set.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests per batch.")] = 16,
    image_mode: Annotated[
        ImageModeName,
        typer.Option(
            "--images", "--image-mode", help="upright (EXIF applied, white below), or published (opened plainly)."
        ),
    ] = "upright",
    max_pixels: Annotated[int | None, typer.Option(help="Show at most so many pixels of each picture.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")] = None,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed instead of greedy decoding.")] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling; greedy decoding has none.")] = 1.0,
    backend: Annotated[
        BackendName, typer.Option(help="vllm is installed by oneself (docs/serving.md).")
    ] = "transformers",
    eager: Annotated[bool, typer.Option("--eager", help="vllm: no compiled graphs (short start, CPUs).")] = False,
    max_model_len: Annotated[int | None, typer.Option(help="vllm: tokens of prompt and answer together.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="vllm: share of the GPU's memory, such as 0.9.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="vllm: GPUs that share the model.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print evaluation.json instead of tables.")] = False,
) -> None:
    """Ask a model every test sample and every safety request; score, judge, and say how sure each figure is.

    OUT/evaluation.json holds the figures (rates in 0..1), OUT/predictions/*.jsonl every answer with its evidence.
    Interrupted, the same command goes on where it stopped: answers and verdicts are never asked for twice.
    Weights or questions that changed since under the same paths are refused; give another --out.
    Under `accelerate launch` the requests are dealt out over the processes.
    """
    import json

    from holdfast import judges as judge_room
    from holdfast import scorers
    from holdfast.checkpoints.value import as_checkpoint
    from holdfast.cli.progress import bars
    from holdfast.config import decode, encode
    from holdfast.data.images import PictureConfig, pictures
    from holdfast.data.streams import build_safety, load_stream, read_spec
    from holdfast.data.types import Stream, Task
    from holdfast.errors import ConfigError
    from holdfast.evaluation.engine_log import stdout_for_results, stdout_is_over
    from holdfast.evaluation.evaluation_config import EvaluationConfig
    from holdfast.evaluation.vllm_options import VllmOptions
    from holdfast.registry import origins

    if tasks is None and safety is None:
        raise ConfigError("Nothing to ask: give --tasks STREAM.yaml, --safety STREAM.yaml, or both.")
    if task and tasks is None:
        raise ConfigError("--task chooses among the tasks of a stream file; give that file with --tasks.")
    options = {"batch_size": batch_size, "dtype": dtype, "limit": limit, "seed": seed, "temperature": temperature}
    judges = {"judges": [_judge(text) for text in judge]} if judge else {}
    engine = VllmOptions(
        eager=True if eager else None,
        max_model_len=max_model_len,
        gpu_memory=gpu_memory,
        tensor_parallel=tensor_parallel,
    )
    if backend != "vllm" and engine != VllmOptions():
        raise ConfigError(
            f"{', '.join('--' + name.replace('_', '-') for name in engine.to_json())} only speaks to vLLM's engine; "
            "add --backend vllm, or leave it out."
        )
    opened = PictureConfig(images=image_mode, max_pixels=max_pixels)
    config = decode(EvaluationConfig, {**options, "backend": backend, **judges})
    checkpoint = as_checkpoint(model)
    if processor is not None:
        if backend == "vllm":
            raise ConfigError(
                "vLLM reads MODEL's own tokenizer and processor; copy them there, and leave --processor out."
            )
        checkpoint = checkpoint.lent(processor)
    for folder in adapter or ():
        checkpoint = checkpoint.under(folder)
    task_spec = read_spec(tasks) if tasks is not None else None
    safety_specs, safety_root = _safety_specs(safety) if safety is not None else ((), Path())
    chosen: tuple[Task, ...] = ()
    data_root = Path()
    if tasks is not None:
        loaded = load_stream(tasks, root=root, task_names=task, parts=("test",), safety=False)
        chosen, data_root = tuple(loaded.tasks), loaded.root
    sets = tuple(build_safety(spec, (root or safety_root).absolute()) for spec in safety_specs)
    stream = Stream(name=(tasks or safety or Path(model)).stem, tasks=chosen, safety=sets, root=data_root)
    asked = {
        "checkpoint": checkpoint.to_json(),
        "stream": encode(task_spec),
        "tasks": [t.name for t in stream.tasks],
        "safety": encode(safety_specs),
        "root": encode(root),
        "evaluation": encode(config),
        "pictures": encode(opened),
    }
    own_code = origins(
        [
            *(("judges", judge_room.REGISTRY, judge.name) for judge in config.judges),
            *(("scorers", scorers.REGISTRY, t.scorer) for t in stream.tasks),
        ]
    )
    if own_code:
        asked["plugins"] = own_code
    from holdfast.evaluation.standalone import evaluate
    from holdfast.models.processes import joined

    with (
        joined() as share,
        bars("asking", transient=True, quiet=not share.chief) as progress,
        pictures(opened),
        stdout_for_results(),
    ):
        result = evaluate(
            checkpoint,
            stream,
            config,
            out=out,
            asked=asked,
            progress=progress,
            share=share,
            vllm_options=engine,
        )
    if not share.chief:
        return
    if json_:
        typer.echo(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        _show(result, out)
    if backend == "vllm":
        # Its engine ends with this process, and says so.
        stdout_is_over()


def _judge(text: str) -> dict[str, Any]:
    """A judge of the command line: a name, or a YAML mapping with `name` and its options."""
    from holdfast.errors import ConfigError
    from holdfast.files import parse_yaml

    value = parse_yaml(text, f"--judge {text!r:.80}")
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("judge", value.get("name")), str):
        raise ConfigError(
            f"--judge {text!r}: expected a name, or a mapping such as "
            "'{name: endpoint, url: http://localhost:8000/v1, model: my-model}'."
        )
    if "judge" in value:
        # {judge: endpoint, name: mine, ...}: `name` is then what records call it.
        return {"name": value["judge"], "options": {k: v for k, v in value.items() if k != "judge"}}
    return {"name": value["name"], "options": {k: v for k, v in value.items() if k != "name"}}


def _safety_specs(path: Path) -> tuple[tuple[Any, ...], Path]:
    """The safety sets of a stream file, or of a file that has only `root` and `safety`; and their data root."""
    from collections.abc import Mapping

    from holdfast.config import decode
    from holdfast.data.names import refuse_shared_names
    from holdfast.data.streams import SafetySpec, expand_root, read_yaml
    from holdfast.errors import ConfigError

    data = read_yaml(path)
    if isinstance(data, Mapping) and isinstance(data.get("stream"), Mapping):
        data = data["stream"]
    listed = data.get("safety") if isinstance(data, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{path} names no safety set; list at least one under `safety`.")
    specs = tuple(decode(SafetySpec, item, f"{path}: safety[{i}]") for i, item in enumerate(listed))
    refuse_shared_names("safety set", [spec.name for spec in specs], str(path))
    return specs, path.parent / expand_root(str(data.get("root", ".")))


def _show(result: dict[str, Any], out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from holdfast.cli.terminal import Console

    console = Console()
    if result["scores"]:
        table = Table(title="Tasks", title_justify="left")
        for header in ("task", "score", "95 % interval", "n", "unscored", "scorer"):
            table.add_column(header, overflow="fold")
        for name, row in result["scores"].items():
            table.add_row(
                escape(name),
                _percent(row["value"]),
                _interval(row["interval"]),
                str(row["n"]),
                str(row["unscored"] or ""),
                escape(f"{row['scorer']} ({row['mode']})"),
            )
        console.print(table)
    if result["safety"]:
        table = Table(
            title="Safety (refusal / compliance / other safe / collapse of the scored replies)", title_justify="left"
        )
        for header in ("set", "judge", "ASR", "95 %", "ref / comp / other / coll", "over-ref.", "scored"):
            table.add_column(header, overflow="fold")
        agreements = []
        for name, main in result["safety"].items():
            for judge, row in [(main["judge"], main), *main["judges"].items()]:
                split = " / ".join(_percent(row[key]) for key in ("refusal", "compliance", "other_safe", "collapse"))
                table.add_row(
                    escape(name) if row is main else "",
                    escape(judge),
                    _percent(row["asr"]),
                    _interval(row["interval"]) + _worst_case(row),
                    split,
                    _percent(row.get("benign", {}).get("over_refusal")),
                    f"{row['n'] - row['unscored']}/{row['n']}",
                )
                if row is not main:
                    both = row["agreement"]["label"]
                    kappa = "-" if both["kappa"] is None else f"{both['kappa']:.2f}"
                    agreements.append(
                        f"{name}: {main['judge']} and {judge} agree on {_percent(both['raw'])} % of {both['n']} "
                        f"replies, kappa {kappa}"
                    )
        console.print(table)
        for line in agreements:
            console.print(escape(line))
        if result["masr"] is not None:
            console.print(f"MASR {_percent(result['masr'])} % (mean over {len(result['safety'])} set(s))")
    console.print(f"Figures: {escape(str(out / 'evaluation.json'))}; answers: {escape(str(out / 'predictions'))}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _worst_case(row: dict[str, Any]) -> str:
    """What the rate could be whatever the unscored replies are, where there are some."""
    low, high = row.get("bounds", {}).get("asr", (0.0, 0.0))
    return f"\nworst case {_percent(low)} - {_percent(high)}" if high - low > 1e-9 else ""


def _interval(interval: dict[str, Any] | None) -> str:
    return "" if interval is None else f"{_percent(interval['low'])} - {_percent(interval['high'])}"
