"""`holdfast doctor STREAM.yaml`: what is wrong with a stream's data, before a run finds out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    stream: Annotated[
        Path | None, typer.Argument(help="Stream file, or a run file with a `stream` key.", show_default=False)
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Data root, instead of the file's own.")] = None,
    model: Annotated[Path | None, typer.Option(help="Model folder: estimate memory for it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the memory estimate.")] = 1,
    images: Annotated[
        int, typer.Option(min=0, help="Open so many images of each split; of the others only that they are there.")
    ] = 200,
    all_images: Annotated[bool, typer.Option("--all-images", help="Decode every image.")] = False,
    screen: Annotated[
        bool,
        typer.Option(
            "--screen",
            help="Ask the run's model every training sample's request and list those that it refuses (takes minutes).",
        ),
    ] = False,
    environment: Annotated[
        bool,
        typer.Option("--environment", help="Say what this machine has instead: versions, memory, devices, extras."),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check a stream's or run's data, pictures, answers and memory before it starts. Exit code 1: a run would fail."""
    import json
    from dataclasses import replace

    from holdfast.config import encode
    from holdfast.data.examine import examine
    from holdfast.data.streams import read_spec
    from holdfast.errors import ConfigError
    from holdfast.scorers.check import scorer_problems

    if environment:
        _show_environment(as_json=json_)
        return
    if stream is None:
        raise ConfigError("Name a stream file or a run file to check, or pass --environment to look at this machine.")
    spec = read_spec(stream)
    if root is not None:
        spec = replace(spec, root=str(root.absolute()))
    diagnosis = examine(spec, open_images=None if all_images else images)
    for task in spec.tasks:
        samples = diagnosis.samples.get((task.name, "test"))
        if samples is not None:
            for level, text in scorer_problems(task.scorer, task.scorer_mode, task.scorer_options, samples):
                diagnosis.add(level, f"{task.name}, scorer", text)  # type: ignore[arg-type]
    config, resolved = _examine_run(stream, root, diagnosis)
    if screen and config is None and diagnosis.ok:
        raise ConfigError(f"--screen asks a run's model, and {stream} names none; pass a run file (model, methods).")
    _examine_encoding(str(model) if model is not None else None, config, spec, diagnosis)
    memory = _memory(model, diagnosis, batch_size) if model is not None else {}
    _examine_memory(model, config, memory, diagnosis)
    screened = None
    if screen and diagnosis.ok:
        from holdfast.cli.progress import bars
        from holdfast.experiment.screen_run import screen_run

        with bars("screening") as progress:
            screened = screen_run(resolved, folders=[stream.parent], progress=progress)
    elif screen:
        diagnosis.add("info", "screen", "no sample was asked: mend the errors first")
    if json_:
        plain = {
            "stream": diagnosis.stream,
            "root": diagnosis.root,
            "ok": diagnosis.ok,
            "splits": [{**encode(row), "sizes": _sizes(row.sizes)} for row in diagnosis.splits],
            "findings": encode(diagnosis.findings),
            "memory": {name: encode(value) for name, value in memory.items()},
            **({} if screened is None else {"screen": _screen_json(screened)}),
        }
        typer.echo(json.dumps(plain, ensure_ascii=False, indent=2))
    else:
        if screened is not None:
            _show_screen(screened)
        _show(diagnosis, memory, batch_size)
    if not diagnosis.ok:
        raise typer.Exit(1)


def _show_environment(*, as_json: bool) -> None:
    import json

    from holdfast.cli.environment import describe_environment, examine_environment

    found = examine_environment()
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(describe_environment(found)))


def _examine_run(file: Path, root: Path | None, diagnosis: Any) -> tuple[Any, Any]:
    """What a run file says beside its stream: keys, methods, model, judges, what is injected and calibrated on.

    Returns (configuration, resolved run); None for what there is not.
    """
    from dataclasses import replace

    from holdfast import experiment
    from holdfast.data.streams import read_yaml
    from holdfast.errors import HoldfastError

    if not {"model", "methods"} & set(read_yaml(file)):
        return None, None
    config = resolved = None
    try:
        config = experiment.read_run(file)
        if root is not None:
            config = replace(config, stream=replace(config.stream, root=str(root.absolute())))
        experiment.build_methods(config)
        # With the stream's own data at fault there is nothing more to ask.
        if diagnosis.ok:
            resolved = experiment.resolve(config, Path("unused"))
    except HoldfastError as error:
        diagnosis.add("error", f"run file {file.name}", str(error))
    return config, resolved


def _examine_encoding(model: str | None, config: Any, spec: Any, diagnosis: Any) -> None:
    """A draw of every split and its extremes through the real processor; `max_length` against their real lengths."""
    if model is None and config is None:
        return
    from pathlib import Path

    from holdfast import experiment
    from holdfast.data.images import PictureConfig, pictures
    from holdfast.errors import HoldfastError
    from holdfast.models.preflight import judge_lengths, judge_replies, read_without_weights, try_samples

    base = model or config.model
    try:
        loaded = read_without_weights(base)
    except HoldfastError as error:
        # A folder must hold one; a hub id may be out of reach from here.
        level = "error" if model is None and Path(base).is_dir() else "info"
        diagnosis.add(level, "processor", f"no sample was encoded: {error}")
        return
    bounds: dict[tuple[int, float], list[str]] = {}
    unbound = config is None
    if config is not None:
        try:
            for name, method in experiment.build_methods(config).items():
                training = getattr(getattr(method, "config", None), "training", None)
                if training is None or training.max_length is None:
                    unbound = True
                else:
                    bounds.setdefault((training.max_length, training.max_cut_share), []).append(name)
        except HoldfastError:
            return  # told already
    replies = {(task.name, "test"): task.max_new_tokens for task in spec.tasks}
    replies |= {(one.name, side): one.max_new_tokens or 0 for one in spec.safety for side in ("unsafe", "benign")}
    with pictures(config.pictures if config is not None else PictureConfig()):
        for (name, split), samples in diagnosis.samples.items():
            sizes = {**diagnosis.headers, **diagnosis.sizes}
            cut_at = None if unbound or not bounds else max(length for length, _ in bounds)
            # Calibration prompts without an answer are answered by the model itself: they are asked, not learned.
            own = name in ("safety_calibration", "benign_calibration") and any(s.answer is None for s in samples)
            trial = try_samples(loaded, samples, sizes, training=split == "train" and not own, cut_at=cut_at)
            where = f"{name}, {split}"
            if trial.faults:
                diagnosis.add(
                    "error",
                    where,
                    f"{len(trial.faults)} of {trial.tried} samples cannot be encoded for {base}: {trial.faults[0]}",
                )
            tight = judge_replies(trial, replies.get((name, split), 0), loaded.context_length)
            if tight is not None:
                diagnosis.add("warning", where, tight)
            if split == "train" and name not in ("safety_calibration", "benign_calibration"):
                for (max_length, share), methods in bounds.items():
                    for level, text in judge_lengths(trial, max_length, share):
                        diagnosis.add(level, f"{where} ({', '.join(methods)})", text)


def _memory(folder: Path, diagnosis: Any, batch_size: int) -> dict[str, Any]:
    """Estimates by split, from samples all of whose images were opened."""
    from holdfast.models.estimate import estimate, read_shape

    shape = read_shape(folder)
    found = {}
    for (name, split), samples in diagnosis.samples.items():
        known = [s for s in samples if all(path in diagnosis.sizes for path in s.images)]
        if known:
            pictures = [[diagnosis.sizes[path] for path in s.images] for s in known]
            characters = [sum(len(turn.text) for turn in s.turns) for s in known]
            found[f"{name}, {split}"] = estimate(shape, pictures, characters, batch_size=batch_size)
    return found


def _examine_memory(model: Path | None, config: Any, memory: dict[str, Any], diagnosis: Any) -> None:
    """What the machine, a control group or `ulimit` leaves this process, against the weights and the estimates."""
    from holdfast.errors import DataError
    from holdfast.models.estimate import read_shape
    from holdfast.models.memory import free_memory_bytes, quotas
    from holdfast.models.precision import default_device

    folder = model if model is not None else Path(config.model) if config is not None else None
    if folder is None or not folder.is_dir():
        return
    for name, left in quotas().items():
        diagnosis.add("info", "memory", f"this process may take {_bytes(left)} more ({name})")
    if default_device().type != "cpu":
        return
    free = free_memory_bytes()
    limit = min(quotas().items(), key=lambda item: item[1], default=("", free + 1))
    of = limit[0] if limit[1] <= free else "this machine"
    try:
        weights = read_shape(folder).weight_bytes
    except DataError:
        return  # told with the model
    if weights > free:
        diagnosis.add(
            "error",
            "memory",
            f"the weights of {folder.name} are {_bytes(weights)}, and {of} leaves {_bytes(free)}: the run would be "
            "killed while it loads them",
            "Give it more memory, or a smaller model.",
        )
        return
    for where, estimate in memory.items():
        needed = estimate.checkpointed_bytes if where.endswith(", train") else estimate.weight_bytes
        needed = max(needed, estimate.weight_bytes + estimate.cache_bytes + estimate.logit_bytes)
        if needed > free:
            diagnosis.add(
                "warning",
                where,
                f"about {_bytes(needed)} are needed by the estimate, and {of} leaves {_bytes(free)}",
                "Use a smaller micro_batch_size or max_pixels, or give it more memory.",
            )


def _sizes(sizes: Any) -> dict[str, Any]:
    if not sizes:
        return {}
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    return {"smallest": by_area[0], "median": by_area[len(by_area) // 2], "largest": by_area[-1]}


def _show(diagnosis: Any, memory: dict[str, Any], batch_size: int) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from holdfast.cli.terminal import Console

    console = Console()
    console.print(f"[bold]{escape(diagnosis.stream)}[/bold]  {escape(diagnosis.root)}", soft_wrap=True)
    if diagnosis.splits:
        # Light rules and two-line heads: ten columns that stay readable at 80, on a screen as in a log.
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in (
            *("task", "split", "sam-\nples", "pub-\nlished", "images", "miss-\ning", "opened", "bro-\nken"),
            *("median", "largest"),
        ):
            table.add_column(heading, justify="left" if heading in ("task", "split") else "right", overflow="fold")
        for row in diagnosis.splits:
            sizes = _sizes(row.sizes)
            table.add_row(
                escape(row.name),
                row.split,
                str(row.samples),
                "" if row.expected is None else str(row.expected),
                str(row.images),
                f"[red]{row.missing_images}[/red]" if row.missing_images else "0",
                str(row.opened),
                f"[red]{row.unreadable}[/red]" if row.unreadable else "0",
                "x".join(map(str, sizes["median"])) if sizes else "",
                "x".join(map(str, sizes["largest"])) if sizes else "",
            )
        console.print(table)
    if memory:
        title = f"memory, batch size {batch_size} (estimate)"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        heads = ("split", "tokens", "of\nimages", "decoded", "weights", "KV\ncache", "training", "check-\npointed")
        for heading in heads:
            table.add_column(heading, justify="left" if heading == "split" else "right", overflow="fold")
        for name, e in memory.items():
            counts = (e.decoded_bytes, e.weight_bytes, e.cache_bytes, e.training_bytes, e.checkpointed_bytes)
            table.add_row(escape(name), str(e.tokens), str(e.image_tokens), *(_bytes(count) for count in counts))
        console.print(table)
    colours = {"error": "red", "warning": "yellow", "info": "cyan"}
    for level, colour in colours.items():
        for finding in (f for f in diagnosis.findings if f.level == level):
            stop = "" if finding.message.endswith((".", "?", "...")) else "."
            text = f"{finding.where}: {finding.message}{stop} {finding.remedy}".rstrip()
            console.print(f"[{colour}]{level}[/{colour}] {escape(text)}", soft_wrap=True)
    errors = sum(f.level == "error" for f in diagnosis.findings)
    console.print("ready to run" if not errors else f"[red]{errors} error(s); a run would fail[/red]")


def _screen_json(rows: Any) -> dict[str, Any]:
    from holdfast.experiment.screen_run import agreement

    known = any(row.planted is not None for row in rows)
    return {"tasks": [row.to_json() for row in rows], **({"agreement": agreement(rows)} if known else {})}


def _show_screen(rows: Any) -> None:
    """A row per task, the whole below where there is more than one, and every refused sample's id."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from holdfast.cli.terminal import Console
    from holdfast.experiment.screen_run import agreement

    console = Console()
    known = any(row.planted is not None for row in rows)
    heads = ["task", "asked", "refused", "in %", *(["planted", "found", "precision", "recall"] if known else [])]
    title = "training samples that the starting model refuses"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in heads:
        table.add_column(heading, justify="left" if heading == "task" else "right", overflow="fold")

    def add(name: str, some: Any) -> None:
        asked, refused = sum(row.screened.asked for row in some), sum(len(row.refused) for row in some)
        cells = [name, str(asked), str(refused), f"{100 * refused / asked:.1f}"]
        if known and any(row.planted is not None for row in some):
            fit = agreement(some)
            rates = ("-" if fit[key] is None else f"{100 * fit[key]:.1f} %" for key in ("precision", "recall"))
            cells += [str(fit["planted"]), str(fit["found"]), *rates]
        table.add_row(*cells)

    for row in rows:
        add(escape(row.task), [row])
    if len(rows) > 1:
        table.add_section()
        add("all", rows)
    console.print(table)
    for row in rows:
        if row.refused:
            console.print(f"{escape(row.task)}: {escape(', '.join(row.refused))}", soft_wrap=True, highlight=False)


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
