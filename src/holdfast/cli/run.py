"""`holdfast run FILE.yaml`: a model, a stream of tasks, methods; a second call with the same --out resumes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.presets import HELP, PresetName


def command(
    file: Annotated[Path, typer.Argument(help="Run file: model, stream, methods (see configs/).")],
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method of the file, or one that it does not name; repeatable.")
    ] = None,
    preset: Annotated[
        PresetName | None, typer.Option(help=f"One method instead of the file's, its edit set. {HELP}.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/<name of the file>.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="So many methods at once, each in a process of its own.")] = 1,
    model: Annotated[str | None, typer.Option(help="Folder or hub id, instead of the file's.")] = None,
    stream: Annotated[
        list[str] | None,
        typer.Option(help="Instead of the file's tasks: a stream file, or a hub dataset (owner/name); repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the file's.")] = None,
    report: Annotated[bool, typer.Option(help="Write report.html and PNGs at the end.")] = True,
    report_to: Annotated[
        str | None,
        typer.Option(
            help="Trackers that training reports to, by transformers' names: tensorboard,wandb,mlflow,trackio."
        ),
    ] = None,
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp", help="Under a launcher: share the base's weights out over the processes (FSDP2)."),
    ] = False,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Tune a model task after task with every method, and ask it everything after each task.

    Under `accelerate launch` or `torchrun` the processes learn each task and ask each checkpoint together.
    """
    from dataclasses import replace

    from holdfast import experiment
    from holdfast.cli.presets import with_preset
    from holdfast.errors import ConfigError

    if report_to is not None:
        from holdfast.training.trackers import VARIABLE, trackers

        os.environ[VARIABLE] = ",".join(trackers(report_to))
    if preset is not None and method:
        raise ConfigError("--preset names a method and --method another; pass one of the two.")
    config = experiment.read_run(file)
    if preset is not None:
        config = with_preset(config, preset)
    if model is not None:
        config = replace(config, model=model)
    if seed is not None:
        config = replace(config, seed=seed)
    if stream:
        from holdfast.data.hub_stream import replace_stream

        config = replace(config, stream=replace_stream(config.stream, stream), tasks=None)
    if method:
        config = experiment.only(config, method)
    return finish(config, out or Path("runs") / file.stem, jobs=jobs, report=report, shard=fsdp)


def finish(config: object, out: Path, *, jobs: int, report: bool, shard: bool = False) -> dict[str, Any]:
    """Run, show, report: what `run` and `demo` have in common. Returns the summary (summary.json)."""
    from rich.markup import escape

    from holdfast import experiment
    from holdfast.cli.console import run_bars, summary_table
    from holdfast.cli.terminal import Console

    assert isinstance(config, experiment.RunConfig)
    tasks = len(config.tasks or config.stream.tasks)
    if int(os.environ.get("RANK", "0")):
        # One of several processes that work on the run, but not the first: it has nothing to show.
        return experiment.run(config, out, jobs=jobs, shard=shard)
    with run_bars(list(config.methods), tasks) as progress:
        summary = experiment.run(config, out, jobs=jobs, shard=shard, progress=progress)
    console = Console()
    console.print(summary_table(summary))
    if report:
        from holdfast.reports import write_report

        files = write_report([out])
        for line in files.lines:
            console.print(f"- {escape(line)}")
        console.print(f"report   {escape(str(files.html))}", soft_wrap=True)
        console.print(f"pictures {escape(str(out / 'figures'))}", soft_wrap=True)
    console.print(f"figures  {escape(str(out / 'summary.json'))}", soft_wrap=True)
    return summary
