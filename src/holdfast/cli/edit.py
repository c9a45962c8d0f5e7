"""`holdfast edit BEFORE AFTER --out OUT`: give a tuned checkpoint its refusals and old skills back, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.choices import CoefficientName, CriterionName, CurvatureFormName, ExportName, ProjectionName
from holdfast.cli.presets import HELP, PresetName
from holdfast.cli.units import format_bounds
from holdfast.functional.hpa_config import ALPHA_BOUNDS, FOCUS_RATIO, KEEP_BOUNDS

if TYPE_CHECKING:
    from holdfast.checkpoints.curvature_file import Curvature


def command(
    context: typer.Context,
    before: Annotated[str, typer.Argument(help="The model that the tuning started from: folder or hub id.")],
    after: Annotated[str, typer.Argument(help="The tuned model, or an adapter on BEFORE; several as A+B.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it appears whole or not at all.")],
    calibration: Annotated[Path | None, typer.Option(help="What `holdfast calibrate` wrote.")] = None,
    safety: Annotated[Path | None, typer.Option(help="Instead of --calibration: the model's own safe answers.")] = None,
    task: Annotated[Path | None, typer.Option(help="Instead of --calibration: samples of the task.")] = None,
    grams: Annotated[
        Path | None, typer.Option(help="For --rule anchor: what `holdfast calibrate-grams` wrote.")
    ] = None,
    past: Annotated[
        Path | None, typer.Option(help="For --rule anchor: Gram matrices of earlier tasks of this stream.")
    ] = None,
    export: Annotated[ExportName, typer.Option(help="dense: a full checkpoint. adapter: a PEFT folder.")] = "dense",
    rule: Annotated[
        str, typer.Option(help="The edit of one layer: of `holdfast list rules`, or package.module:Class.")
    ] = "hpa",
    preset: Annotated[
        PresetName | None, typer.Option(help=f"Instead of --rule and its options. {HELP} (with --grams).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the rule; repeatable.")
    ] = None,
    options: Annotated[Path | None, typer.Option(help="YAML or JSON file with options of the rule.")] = None,
    keep: Annotated[
        str, typer.Option(help="Percent of weight columns that get their old values back, in the last..first block.")
    ] = format_bounds(KEEP_BOUNDS),
    focus: Annotated[
        float, typer.Option(help="How many columns are candidates, as a multiple of --keep.")
    ] = FOCUS_RATIO,
    alpha: Annotated[
        str, typer.Option(help="Bounds of the task's weight against safety's, low..high.")
    ] = format_bounds(ALPHA_BOUNDS),
    ranking: Annotated[
        CriterionName,
        typer.Option(
            "--ranking",
            "--saliency",
            help="Score that ranks columns: eps+phi is the paper's; eps or phi alone for comparison.",
        ),
    ] = "eps+phi",
    curvature_form: Annotated[
        CurvatureFormName, typer.Option(help="Use of the inverse's diagonal: divide is the paper's method.")
    ] = "divide",
    projection: Annotated[
        ProjectionName,
        typer.Option(
            help="Projection on the old weights that is taken away: per layer (the paper's), per column, none."
        ),
    ] = "layer",
    coefficient: Annotated[
        CoefficientName,
        typer.Option(help="For --export adapter, of the projection: drop (base not read), measure, keep."),
    ] = "measure",
    shard: Annotated[str, typer.Option(help="Largest output file, such as 256MiB or 4GiB.")] = "256MiB",
    memory: Annotated[str | None, typer.Option(help="With --safety and --task: memory for the calibration.")] = None,
    allow_other_calibration: Annotated[
        bool,
        typer.Option(
            "--allow-other-calibration", help="Accept a calibration made with other weights of this architecture."
        ),
    ] = False,
    allow_other_base: Annotated[
        bool,
        typer.Option(
            "--allow-other-base",
            help="Accept weights of AFTER that look as if they came from another model than BEFORE.",
        ),
    ] = False,
    measured_safety: Annotated[
        Path | None, typer.Option(help='For the card: JSON, {"set": {"before": rate, "after": rate}}, rates 0..1.')
    ] = None,
    verify: Annotated[bool, typer.Option(help="Reload the result in a clean process and compare.")] = True,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Give a tuned model its refusals and old skills back: HPA's edit (arXiv 2511.20158) of every tuned layer.

    Of the change from BEFORE to AFTER, the weight columns that matter most for refusals return to BEFORE; no training,
    no GPU needed. Killed and started again, it goes on where it stopped.
    """
    from holdfast.checkpoints.curvature_file import Curvature
    from holdfast.checkpoints.reader import read_json
    from holdfast.cli.progress import bars
    from holdfast.cli.rule_options import preset_rule, read_rule
    from holdfast.cli.units import parse_bounds, parse_bytes
    from holdfast.editing.account import check_safety
    from holdfast.editing.editor import edit_checkpoint
    from holdfast.errors import ConfigError

    if preset is not None:
        rule = preset_rule(context, preset)
    sets = None
    if grams is not None:
        from dataclasses import replace

        from holdfast.calibration.gram_sets import GramSets
        from holdfast.checkpoints.gram_store import GramStore

        sets = GramSets.open(grams)
        if past is not None:
            sets = replace(sets, past=GramStore.open(past))
    elif past is not None:
        raise ConfigError("--past goes with --grams.")
    edit_rule = read_rule(
        context,
        rule,
        set_ or [],
        options,
        given={} if sets is None else {"grams": sets},
        flags={
            "keep_bounds": parse_bounds(keep, "--keep"),
            "focus_ratio": focus,
            "alpha_bounds": parse_bounds(alpha, "--alpha"),
            "ranking": ranking,
            "curvature_form": curvature_form,
            "projection": projection,
        },
    )
    given = (calibration is not None, safety is not None, task is not None)
    if given not in ((True, False, False), (False, True, True)) and (edit_rule.needs_curvature or any(given)):
        raise ConfigError("Pass --calibration FILE, or both --safety DATA and --task DATA.")
    shard_bytes = parse_bytes(shard)
    measured = check_safety(read_json(measured_safety, "measured safety")) if measured_safety is not None else None
    if calibration is not None:
        curvature = Curvature.load(calibration)
    elif safety is None or task is None:
        curvature = None  # a rule that needs none
    else:
        curvature = _own_calibration(before, after, safety, task, out, export, memory)
    with bars("editing") as progress:
        report = edit_checkpoint(
            before,
            after,
            rule=edit_rule,
            out=out,
            curvature=curvature,
            blocks=None if sets is None else (sets.task.blocks, sets.task.block_count),
            export=export,
            coefficient=coefficient,
            shard_bytes=shard_bytes,
            allow_other_calibration=allow_other_calibration,
            allow_other_base=allow_other_base,
            safety=measured,
            verify=verify,
            progress=progress,
        )
    from holdfast.cli.inspect import show

    show(out, report)
    if report.seconds:
        print("seconds: " + ", ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items()))
    return report.to_json()


def _own_calibration(
    before: str, after: str, safety: Path, task: Path, out: Path, export: str, memory: str | None
) -> Curvature:
    """Calibrate, and keep the result beside OUT: an edit that fails, or is repeated, does not cost it again."""
    from holdfast.calibration.curvature import CalibrationConfig, collect_curvature, is_calibration_of
    from holdfast.checkpoints.curvature_file import Curvature
    from holdfast.checkpoints.value import as_checkpoint
    from holdfast.cli.progress import bars
    from holdfast.cli.samples import read_calibration_sets
    from holdfast.cli.units import parse_memory
    from holdfast.editing.editor import require_room
    from holdfast.editing.pair import tuned_checkpoint

    memory_bytes = parse_memory(memory, "--memory") if memory else None
    base, tuned = as_checkpoint(before), tuned_checkpoint(before, after)
    sets = read_calibration_sets(safety, task)
    config = CalibrationConfig()
    kept = out.parent / f".{out.name}.calibration.safetensors"
    if kept.is_file():
        curvature = Curvature.load(kept)
        if is_calibration_of(curvature, base, tuned, *sets, config):
            print(f"calibration: {kept}, of these models, samples and options")
            return curvature
    require_room(out, before, after, export)  # type: ignore[arg-type]
    with bars("calibrating") as progress:
        curvature = collect_curvature(
            base,
            tuned,
            *sets,
            config=config,
            memory_bytes=memory_bytes,
            adapted_only=True,
            progress=progress,
        )
    curvature.save(kept)
    print(f"calibration: kept as {kept}, for --calibration and for this command again")
    return curvature
