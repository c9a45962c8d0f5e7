"""`holdfast gate MODEL --safety ... --max-asr 3%`: does a model keep to a budget? An exit status for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.choices import DtypeName


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub id; with --adapter, the base.")],
    safety: Annotated[Path, typer.Option(help="Requests that must be refused, JSON or JSON lines.")],
    benign: Annotated[Path | None, typer.Option(help="Harmless requests that must not be.")] = None,
    task: Annotated[Path | None, typer.Option(help="Requests of the task with gold answers.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="An adapter on MODEL; may be repeated.")] = None,
    processor: Annotated[
        str | None,
        typer.Option(help="Folder or hub id whose tokenizer, template, processor serve where MODEL has none."),
    ] = None,
    max_asr: Annotated[str | None, typer.Option(help="Most forbidden requests that may go unrefused: 3%.")] = None,
    max_over_refusal: Annotated[str | None, typer.Option(help="Most harmless requests that may be refused.")] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Most that the task's score may be below the reference's.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The model that --max-drop counts from.")] = None,
    reference_task: Annotated[str | None, typer.Option(help="Instead of --reference: its score, such as 87%.")] = None,
    images: Annotated[Path | None, typer.Option(help="Where image paths start from; the file's own folder.")] = None,
    judge: Annotated[str, typer.Option(help="Judge of the replies (`holdfast list judges`).")] = "keyword",
    scorer: Annotated[
        str, typer.Option(help="Scorer of the task's answers (`holdfast list scorers`).")
    ] = "exact_match",
    limit: Annotated[int | None, typer.Option(min=1, help="The first N requests of each kind only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per batch.")] = 32,
    dtype: Annotated[DtypeName | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; an accelerator where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Ask a model, compare its figures with bounds. Exit status 0: all hold; 3: one is broken; 2: nothing was asked."""
    import json
    from dataclasses import replace

    from holdfast.checkpoints.value import as_checkpoint
    from holdfast.cli.samples import read_samples
    from holdfast.cli.units import parse_rate
    from holdfast.restore.gate import gate
    from holdfast.restore.measure import Probe, make_judge, make_scorer
    from holdfast.restore.search import Budget

    def bound(text: str | None, option: str) -> float | None:
        return None if text is None else parse_rate(text, option)

    budget = Budget(
        max_asr=bound(max_asr, "--max-asr"),
        max_over_refusal=bound(max_over_refusal, "--max-over-refusal"),
        max_drop=bound(max_drop, "--max-drop"),
    )
    sides = [
        () if path is None else tuple(read_samples(path, images=images)[:limit]) for path in (safety, benign, task)
    ]
    probe = Probe(
        safety=sides[0],
        benign=sides[1],
        task=sides[2],
        judge=make_judge(judge),
        scorer=make_scorer(scorer),
        max_new_tokens=max_new_tokens,
        task_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    asked = as_checkpoint(model)
    lender = processor if processor is not None else reference
    if lender is not None:  # people save the weights of a tuned model alone
        asked = asked.lent(as_checkpoint(lender).base)
    verdict = gate(
        replace(asked, adapters=(*asked.adapters, *(str(path) for path in adapter or ()))),
        probe,
        budget,
        reference=None if reference is None else as_checkpoint(reference),
        reference_task=bound(reference_task, "--reference-task"),
        dtype=dtype,
        device=device,
    )
    if as_json:
        print(json.dumps(verdict.record, indent=2))
    else:
        _show(verdict.record)
    if not verdict.passed:
        raise typer.Exit(3)


def _show(record: object) -> None:
    from typing import Any, cast

    found = cast(dict[str, Any], record)
    point, budget, probe = found["model"], found["budget"], found["probe"]
    drop = None if found["reference_task"] is None or point["task"] is None else found["reference_task"] - point["task"]
    rows = [
        ("forbidden requests not refused", point["asr"], budget["max_asr"], "asr", probe["safety"]),
        (
            "harmless requests refused",
            point["over_refusal"],
            budget["max_over_refusal"],
            "over_refusal",
            probe["benign"],
        ),
        ("task, below the reference", drop, budget["max_drop"], "task", probe["task"]),
    ]
    for name, value, limit, key, count in rows:
        if limit is None:
            continue
        word = "BROKEN" if key in found["broken"] else "holds"
        shown = "not measured" if value is None else f"{100 * value:.1f} %"
        print(f"{word:<7}{name}: {shown} of {count}, at most {100 * limit:g} %")
    for warning in found["warnings"]:
        print(f"Note: {warning}")
