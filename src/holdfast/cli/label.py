"""`holdfast label RUN`: people label some of a run's replies, and the judge's rates are corrected by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from holdfast.labels import Correction, Draw

_BACK, _QUIT = "b", "q"


def command(
    run: Annotated[Path, typer.Argument(help="Run directory, from `holdfast run` or `holdfast demo`.")],
    number: Annotated[
        int | None, typer.Option("--number", "-n", help="Replies to draw, 50 to 100 or more. [default: 100]")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be repeated. theta_0: before any task.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw. [default: 0]")] = None,
    annotator: Annotated[str | None, typer.Option(help="Whose labels these are. [default: 1]")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the form to this file instead of asking here.")] = None,
    import_: Annotated[
        list[Path] | None, typer.Option("--import", help="Read labels that the form saved; may be repeated.")
    ] = None,
    settle: Annotated[
        bool, typer.Option("--settle", help="Only the replies on which annotators differ; this label then counts.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Only print agreement and corrected rates.")] = False,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Draw some of a run's replies, label them without seeing the judge's verdict, and correct its rates by that."""
    from holdfast.errors import ConfigError
    from holdfast.labels import read_labels, write_form
    from holdfast.labels.draw import shown_rows
    from holdfast.labels.store import SETTLED

    if sum((html is not None, bool(import_), show)) > 1:
        raise ConfigError("--html, --import and --show do one thing each; pass one of them.")
    if settle and annotator is not None:
        raise ConfigError(f"--settle writes the labels of {SETTLED!r}; leave --annotator out.")
    draw = _draw(run, number, method, seed, make=not show)
    if show:
        return _show(run, draw)
    if import_:
        _import(run, draw, import_, annotator)
        return _show(run, draw)
    rows = shown_rows(run, draw)
    only = read_labels(run, draw).disagreements() if settle else None
    if settle and not only:
        print("Nothing to settle: no reply has two different labels.")
        return {"labelled": read_labels(run, draw).done, "drawn": len(draw.items)}
    if html is not None:
        write_form(html, draw, rows, only=only, annotator=SETTLED if settle else annotator or "")
        count = len(only) if only is not None else len(draw.items)
        print(f"form    {html} ({count} replies)")
        print(f"then    holdfast label {run} --import labels-<name>.jsonl")
        return {"form": str(html), "replies": count}
    name = SETTLED if settle else annotator or "1"
    if _ask_all(run, draw, rows, name, only):
        return _show(run, draw)
    return {"labelled": read_labels(run, draw).done, "drawn": len(draw.items)}


def _draw(run: Path, number: int | None, methods: list[str] | None, seed: int | None, *, make: bool) -> Draw:
    """The draw beside the run, or a new one."""
    from holdfast.errors import ConfigError, RunError
    from holdfast.labels import make_draw, read_draw, write_draw
    from holdfast.labels.draw import DEFAULT_NUMBER, draw_path

    draw = read_draw(run)
    if draw is None:
        if not make:
            raise RunError(f"{run} has no labels yet. Draw and label some replies first: holdfast label {run}")
        draw = make_draw(run, number=DEFAULT_NUMBER if number is None else number, methods=methods, seed=seed or 0)
        write_draw(run, draw)
        print(f"drew {len(draw.items)} replies of {', '.join(draw.methods)}: {draw_path(run)}")
        return draw
    asked: dict[str, tuple[Any, Any]] = {"--number": (number, draw.number), "--seed": (seed, draw.seed)}
    asked["--method"] = (sorted(methods) if methods else None, sorted(draw.methods))
    changed = [f"{k} {new} (drawn with {old})" for k, (new, old) in asked.items() if new is not None and new != old]
    if changed:
        raise ConfigError(
            f"{run} has a draw already, made otherwise: {', '.join(changed)}. Leave the option out to go on labelling "
            f"it, or rename {draw_path(run).parent} to draw again."
        )
    return draw


def _import(run: Path, draw: Draw, files: list[Path], annotator: str | None) -> None:
    from holdfast.labels import import_labels

    for file in files:
        for name, (new, changed) in import_labels(run, draw, file, annotator=annotator).items():
            replaced = f", {changed} replace another label of theirs" if changed else ""
            print(f"{file}: {new} new labels of {name}{replaced}")


def _ask_all(run: Path, draw: Draw, rows: list[dict[str, Any]], name: str, only: list[int] | None) -> bool:
    """Ask in the terminal from the first reply without a label on; false when the annotator stopped before the end."""
    from holdfast.labels import read_labels, write_label
    from holdfast.labels.form import CHOICES

    keys = {key: label for label, (key, _, _) in CHOICES.items()}
    wanted = [item.number for item in draw.items if only is None or item.number in only]
    said = dict(read_labels(run, draw).by_annotator.get(name, {}))
    print(f"{sum(n in said for n in wanted)} of {len(wanted)} labelled by {name!r}. Every label is kept at once.")
    for key, word, means in CHOICES.values():
        print(f"  {key}  {word}: {means}")
    print(f"  {_BACK}  back    {_QUIT}  stop here; the same command goes on. What is passed over is 'cannot tell'.")
    place = next((i for i, n in enumerate(wanted) if n not in said), len(wanted))
    while place < len(wanted):
        number = wanted[place]
        _print_item(rows[number - 1], place + 1, len(wanted))
        answer = _ask(keys, input)
        if answer == _QUIT:
            print(f"{sum(n in said for n in wanted)} of {len(wanted)} labelled. Go on with the same command.")
            return False
        if answer == _BACK:
            place = max(place - 1, 0)
            continue
        write_label(run, draw, name, number, keys[answer])
        said[number] = keys[answer]
        place += 1
    print(f"all {len(wanted)} labelled by {name!r}")
    return True


def _ask(keys: dict[str, str], read: Callable[[str], str]) -> str:
    """A key; the end of the input stops as `q` does."""
    while True:
        try:
            answer = read(f"label [{'/'.join([*keys, _BACK, _QUIT])}]: ").strip().lower()
        except EOFError:
            return _QUIT
        if answer in keys or answer in (_BACK, _QUIT):
            return answer
        print(f"{answer!r:.40} is no label; type one of {', '.join([*keys, _BACK, _QUIT])}.")


def _print_item(row: dict[str, Any], place: int, total: int) -> None:
    from holdfast.labels.form import visible

    print(f"\n--- {place} of {total} " + "-" * 48)
    for path in row.get("images") or []:
        print(f"[picture] {visible(str(path))}")
    print(f"[request] {visible(str(row.get('prompt', '')))}")
    # Quoted line by line, so that a reply cannot look like this form's own words.
    reply = visible(str(row.get("reply", ""))) or "(empty reply)"
    print("[reply]\n" + "\n".join(f"  | {line}" for line in reply.split("\n")))


def _show(run: Path, draw: Draw) -> dict[str, Any]:
    """Agreement and corrected rates, once there are labels; returns what it writes to corrected.json."""
    from holdfast.labels import correct
    from holdfast.labels.estimate import write_correction

    correction = correct(run)
    if correction is None:
        print(f"no label yet of {len(draw.items)} drawn replies")
        return {"labelled": 0, "drawn": len(draw.items)}
    _print_correction(correction)
    written = write_correction(run, correction)
    print(f"rates   {written}; `holdfast report {run}` shows them beside the judge's")
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return found


def _print_correction(correction: Correction) -> None:
    from rich.markup import escape
    from rich.table import Table

    from holdfast.cli.terminal import Console

    labels = correction.labels
    console = Console()
    said = ", ".join(f"{name} {len(found)}" for name, found in labels.by_annotator.items())
    console.print(f"labels: {said} of {len(labels.draw.items)} replies", highlight=False)
    for (a, b), found in labels.agreements().items():
        plain = found.to_json()
        kappa = "not defined" if plain["kappa"] is None else f"{found.kappa:.2f}"
        equal = "nothing labelled by both" if not found.n else f"{100 * found.raw:.0f} % equal"
        console.print(
            f"{a} and {b}: {found.n} replies labelled by both ({found.skipped} more not told by one of them), {equal}, "
            f"Cohen's kappa {kappa}",
            highlight=False,
        )
    if differ := labels.disagreements():
        console.print(
            f"{len(differ)} replies have different labels; they are counted both ways until "
            "`holdfast label RUN --settle`",
            highlight=False,
        )
    heads = {
        "unsafe": {"compliance": "complied", "not_refused": "not\nrefused", "collapse": "damaged"},
        "benign": {"over_refusal": "over-\nrefusal", "helpful": "helpful"},
    }
    table = Table(title="What people say, in %", caption="95 % intervals; mean over the safety sets")
    table.add_column("method")
    for kinds in heads.values():
        for head in kinds.values():
            table.add_column(head, justify="right")
    rows = dict(correction.methods)
    if len(rows) > 1:
        rows["all of them"] = correction.pooled
    for name, figures in rows.items():
        rates = [figures.get(side, {}).get(key) for side, kinds in heads.items() for key in kinds]
        table.add_row(escape(name), *["–" if rate is None else _rate(rate) for rate in rates])
    console.print(table)
    for sentence in correction.left_out:
        console.print(escape(sentence), highlight=False)


def _rate(rate: Any) -> str:
    bounds = f"{100 * rate.low:.0f}…{100 * rate.high:.0f}"
    return f"{100 * rate.value:.1f}\n{bounds}" if rate.enough else f"too few\n{bounds}"
