"""`holdfast score PREDICTIONS --scorer NAME`: a prediction file of any fork, scored by its published rule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.choices import AlignName, ModeName


def command(
    predictions: Annotated[Path, typer.Argument(help="Prediction file: JSON lines, or a JSON list.")],
    scorer: Annotated[str, typer.Option(help="Scorer name; `holdfast list scorers` shows all.")],
    mode: Annotated[
        ModeName, typer.Option(help="paper: as published, quirks included. strict: as one would want.")
    ] = "strict",
    references: Annotated[Path | None, typer.Option(help="File of gold answers; without it the rows' own.")] = None,
    stream: Annotated[Path | None, typer.Option(help="Stream file whose task holds the gold answers.")] = None,
    task: Annotated[str | None, typer.Option(help="The task of --stream.")] = None,
    root: Annotated[Path | None, typer.Option(help="Data root of --stream, instead of the file's own.")] = None,
    align: Annotated[AlignName, typer.Option(help="How predictions meet gold answers.")] = "auto",
    option: Annotated[list[str] | None, typer.Option(help="Scorer option as key=value; repeat for more.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write one JSON line per item here.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    allow_problems: Annotated[
        bool, typer.Option("--allow-problems", help="Exit with 0 although ids are unknown, repeated or missing.")
    ] = False,
) -> None:
    """Score a file of answers; unknown, repeated, conflicting and missing ids are named, and the exit code is 1."""
    import json

    from holdfast import scorers
    from holdfast.data.source_files import write_text
    from holdfast.errors import ConfigError
    from holdfast.scorers.alignment import score_file
    from holdfast.scorers.predictions import read_predictions, read_references, references_of

    if references is not None and stream is not None:
        raise ConfigError("--references and --stream both name gold answers; give one of them.")
    if (stream is None) != (task is None):
        raise ConfigError("--stream and --task belong together: the stream file, and the task's name in it.")
    chosen = scorers.get(scorer, mode, **_options(option or []))
    gold = read_references(references) if references is not None else None
    if stream is not None and task is not None:
        from holdfast.data.streams import load_stream

        (only,) = load_stream(stream, root=root, task_names=[task], parts=("test",), safety=False).tasks
        gold = references_of(only.test, f"{stream}, task {task}")
    outcome = score_file(read_predictions(predictions), gold, chosen, align=align)
    if out is not None:
        rows = [
            {
                "id": item.id,
                "prediction": item.prediction,
                "references": list(item.references),
                "value": item.score.value,
                "evidence": item.score.evidence,
            }
            for item in outcome.items
        ]
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if json_:
        typer.echo(json.dumps(outcome.summary(), ensure_ascii=False, indent=2))
    else:
        _show(outcome, predictions)
    if outcome.problems and not allow_problems:
        raise typer.Exit(1)


def _options(pairs: list[str]) -> dict[str, Any]:
    from holdfast.errors import ConfigError
    from holdfast.files import parse_yaml

    options = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.isidentifier():
            raise ConfigError(f"--option {pair!r}: expected key=value, such as rule=sefe.")
        options[key] = parse_yaml(value, f"--option {key}: {value!r:.80}")
    return options


def _show(outcome: Any, path: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from holdfast.cli.terminal import Console

    console = Console()
    table = Table(
        title=escape(f"{path.name}: {outcome.scorer} ({outcome.mode})"), show_header=False, title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    value = "none: nothing could be scored" if outcome.value is None else f"{outcome.value:.2%}"
    table.add_row("score", value)
    table.add_row("items", str(outcome.n))
    if outcome.scorer in ("exact_match", "option_letter", "gqa", "imagenet", "ocrvqa", "grounding") and outcome.n:
        right = sum(item.score.value or 0.0 for item in outcome.items)
        table.add_row("right", f"{right:.0f} of {outcome.n}")
    for key, figure in outcome.figures.items():
        if key not in ("n", "scored") and figure not in (0, "", [], {}, None):
            table.add_row(key, escape(_figure(figure)))
    for kind, names in outcome.problems.items():
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        table.add_row(f"[red]{kind}[/red]", escape(f"{len(names)}: {shown}"))
    for note in outcome.notes:
        table.add_row("note", escape(note))
    console.print(table)


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figure(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)
