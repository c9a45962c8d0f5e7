"""`holdfast restore BEFORE AFTER --safety ... --out OUT`: refusals and skills back, to a budget, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.choices import DtypeName, ExportName

if TYPE_CHECKING:
    from holdfast.restore.sets import RestoreSets


def command(
    before: Annotated[str, typer.Argument(help="The aligned model that the tuning started from: folder or hub id.")],
    after: Annotated[str, typer.Argument(help="The tuned model, or an adapter on BEFORE; several as A+B.")],
    safety: Annotated[Path, typer.Option(help="Requests that BEFORE refuses, JSON or JSON lines.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it appears whole or not at all.")],
    benign: Annotated[
        Path | None,
        typer.Option(help="Harmless requests, best those that look like the forbidden ones."),
    ] = None,
    task: Annotated[Path | None, typer.Option(help="Samples of what was tuned on: requests with answers.")] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(help="Samples of an earlier task whose skill must stay; may be repeated."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Where image paths start from; the file's own folder.")] = None,
    probe_safety: Annotated[
        Path | None, typer.Option(help="Forbidden requests to measure on; part of --safety.")
    ] = None,
    probe_benign: Annotated[
        Path | None, typer.Option(help="Harmless requests to measure on; part of --benign.")
    ] = None,
    probe_task: Annotated[Path | None, typer.Option(help="Task samples to measure on; part of --task.")] = None,
    target_asr: Annotated[
        str | None,
        typer.Option(help="Most forbidden requests that may go unrefused, such as 3%; else the best trade-off."),
    ] = None,
    max_over_refusal: Annotated[str | None, typer.Option(help="Most harmless requests that may be refused.")] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Most that the task's score may fall below the tuned model's."),
    ] = None,
    export: Annotated[
        ExportName | None,
        typer.Option(help="A full checkpoint, or a PEFT adapter (AFTER is one); by default as AFTER is."),
    ] = None,
    rule: Annotated[str, typer.Option(help="anchor, or interpolation to compare with it.")] = "anchor",
    strengths: Annotated[str | None, typer.Option(help="Strengths to try, as in 0.1,0.3,1,3.")] = None,
    past: Annotated[
        list[Path] | None,
        typer.Option(help="Input statistics of earlier tasks (OUT/task of `calibrate-grams`); may be repeated."),
    ] = None,
    past_weight: Annotated[float, typer.Option(help="How firmly earlier tasks hold, against 1 for the task.")] = 0.3,
    damping: Annotated[float, typer.Option(help="Damping; large values make the edit an interpolation.")] = 0.03,
    screen: Annotated[
        bool,
        typer.Option("--screen/--no-screen", help="Move task samples that BEFORE refuses to the safety side."),
    ] = True,
    judge: Annotated[str, typer.Option(help="Judge of the replies (`holdfast list judges`).")] = "keyword",
    scorer: Annotated[
        str, typer.Option(help="Scorer of the task's answers (`holdfast list scorers`).")
    ] = "exact_match",
    safety_samples: Annotated[int, typer.Option(min=1, help="Forbidden requests to calibrate on.")] = 8,
    benign_samples: Annotated[int, typer.Option(min=1, help="Harmless requests to calibrate on.")] = 12,
    task_samples: Annotated[int, typer.Option(min=1, help="Task samples to calibrate on.")] = 128,
    probes: Annotated[int, typer.Option(min=1, help="Requests of each kind to measure on, at most.")] = 64,
    min_refused: Annotated[
        str,
        typer.Option(help="Share of --safety that BEFORE must refuse, else it stops."),
    ] = "70%",
    whole_curve: Annotated[
        bool, typer.Option("--whole-curve", help="Measure every strength, for the picture.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Requests per batch; by default 16, 64 for a small model."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split into calibration and probe.")] = 0,
    dtype: Annotated[DtypeName | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; an accelerator where there is one.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it would cost in minutes and GiB, and stop."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Give a tuned model its refusals back with the least edit that meets a budget.

    BEFORE answers the requests itself; strengths of the edit are tried on requests that the edit was not made from; the
    least one that meets the budget is written to OUT, checked, and measured again. OUT/restore.html shows the curve.
    Killed and started again, it goes on where it stopped. Exit status 3: no strength meets the budget.
    """
    import json

    from holdfast.cli.progress import phases
    from holdfast.cli.units import parse_rate
    from holdfast.errors import ConfigError
    from holdfast.restore.cost import cost_figures, estimate_cost
    from holdfast.restore.run import RestoreConfig, restore
    from holdfast.restore.search import STRENGTHS, Budget

    def bound(text: str | None, option: str) -> float | None:
        return None if text is None else parse_rate(text, option)

    budget = Budget(
        max_asr=bound(target_asr, "--target-asr"),
        max_over_refusal=bound(max_over_refusal, "--max-over-refusal"),
        max_drop=bound(max_drop, "--max-drop"),
    )
    try:
        grid = STRENGTHS if strengths is None else tuple(float(part) for part in strengths.split(","))
    except ValueError:
        raise ConfigError(f"--strengths {strengths!r} is not understood; write numbers as in 0.1,0.3,1.") from None
    config = RestoreConfig(
        rule=rule,
        strengths=grid,
        past_weight=past_weight,
        damping=damping,
        judge=judge,
        scorer=scorer,
        min_refused=parse_rate(min_refused, "--min-refused"),
        screen=screen,
        whole_curve=whole_curve,
        tokens=max_new_tokens,
        batch_size=batch_size or _batch_size(before),
        seed=seed,
        export=export,
        dtype=dtype,
        device=device,
    )
    sets = _read_sets(
        {"safety": safety, "benign": benign, "task": task},
        {"safety": probe_safety, "benign": probe_benign, "task": probe_task},
        {"safety": safety_samples, "benign": benign_samples, "task": task_samples},
        earlier or [],
        images=images,
        probes=probes,
        seed=seed,
    )
    if dry_run:
        if as_json:
            print(json.dumps(cost_figures(before, after, sets, config), indent=2))
        else:
            print(estimate_cost(before, after, sets, config))
        return
    with phases() as progress:
        result = restore(
            before, after, sets, out=out, budget=budget, config=config, past=tuple(past or ()), progress=progress
        )
    if as_json:
        print(json.dumps(result.record, indent=2, ensure_ascii=False))
    else:
        _show(result.record, result.page)
    if result.published is None:
        raise typer.Exit(3)


def _batch_size(model: str) -> int:
    """Large batches where the weights say that memory is no question."""
    from holdfast.checkpoints.merged import open_checkpoint

    with open_checkpoint(model) as opened:
        return 64 if sum(entry.nbytes for entry in opened.entries.values()) < 2**29 else 16


def _read_sets(
    files: dict[str, Path | None],
    probe_files: dict[str, Path | None],
    counts: dict[str, int],
    earlier: list[Path],
    *,
    images: Path | None,
    probes: int,
    seed: int,
) -> RestoreSets:
    from holdfast.cli.samples import read_samples
    from holdfast.errors import ConfigError
    from holdfast.restore.sets import RestoreSets, Split, own_ids, split

    splits = {}
    for name, path in files.items():
        probe_path = probe_files[name]
        if path is None:
            if probe_path is not None:
                raise ConfigError(f"--probe-{name} needs --{name}: what is measured must also be calibrated on.")
            splits[name] = Split()
            continue
        given = None if probe_path is None else own_ids(read_samples(probe_path, images=images), f"probe-{name}")
        splits[name] = split(
            own_ids(read_samples(path, images=images), name),
            given,
            calibrate=counts[name],
            probes=probes,
            seed=seed,
            what=f"--{name} {path}",
        )
    past = [s for n, path in enumerate(earlier) for s in own_ids(read_samples(path, images=images), f"earlier-{n}")]
    return RestoreSets(**splits, past=tuple(past))


def _show(record: object, page: Path) -> None:
    """The verdict, the curve as a table that fits 80 columns, and where the page is."""
    from typing import Any, cast

    from rich.table import Table

    from holdfast.cli.terminal import Console
    from holdfast.reports.restore_page import verdict

    found = cast(dict[str, Any], record)
    console = Console(highlight=False, soft_wrap=False)
    console.print(verdict(found))
    table = Table(title="what each strength costs, in %")
    table.add_column("strength")
    for head in ("not refused", "complied", "over-refusal", "task"):
        table.add_column(head, justify="right")
    chosen = found["chosen"]
    rows = [("tuned", found["tuned"]), *((f"{p['strength']:g}", p) for p in found["curve"] if p["strength"] > 0)]
    for name, point in [*rows, ("before", found["before"])]:
        taken = chosen is not None and name == f"{chosen['strength']:g}"
        cells = [_percent(point[key]) for key in ("asr", "complied", "over_refusal", "task")]
        table.add_row(f"{name} (taken)" if taken else name, *cells, style="bold" if taken else None)
    if found["restored"] is not None:
        cells = [_percent(found["restored"][key]) for key in ("asr", "complied", "over_refusal", "task")]
        table.add_row("as written", *cells, style="bold")
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"Note: {warning}", markup=False)
    console.print("seconds: " + ", ".join(f"{phase} {spent:g}" for phase, spent in found["seconds"].items()))
    print(f"page: {page}")


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f}"
