"""Edit a checkpoint on disk with a rule: no model is built, one layer is in memory, the result appears whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from safetensors.torch import save_file

from holdfast.checkpoints.adapter import INPUT_SCALE_FILE, WEIGHTS_FILE
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.reader import INDEX_FILE, SINGLE_FILE
from holdfast.checkpoints.rewrite import RewriteResult, copy_side_files, hash_side_files, rewrite
from holdfast.checkpoints.writer import (
    DEFAULT_SHARD_BYTES,
    PROVENANCE_FILE,
    Shard,
    Staging,
    plan_shards,
    shard_index,
)
from holdfast.editing.card import check_safety, model_card
from holdfast.editing.descent import describe_no_change
from holdfast.editing.pair import Pair, Source, describe, open_pair
from holdfast.editing.plan import (
    Target,
    check_calibration,
    decoder_layers,
    describe_calibration,
    describe_unprotected,
    find_targets,
)
from holdfast.editing.recipes import (
    SCALE_FIELD,
    CoefficientChoice,
    adapter_recipe,
    dense_recipe,
    output_tensors,
    read_scale_field,
)
from holdfast.editing.report import REPORT_FILE, VERIFICATION_FILE, EditReport, versions
from holdfast.editing.verify.compare import verify_export
from holdfast.errors import CalibrationError, ConfigError, ExportError, StorageError
from holdfast.files import atomic_path, write_json
from holdfast.registry import is_builtin, origin_of
from holdfast.rules.base import EditRule

Export = Literal["dense", "adapter"]


def edit_checkpoint(
    before: Source,
    after: Source,
    *,
    rule: EditRule,
    out: str | Path,
    curvature: Curvature | None = None,
    export: Export = "dense",
    coefficient: CoefficientChoice = "measure",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    seed: int = 0,
    blocks: tuple[Mapping[str, int], int] | None = None,
    allow_other_calibration: bool = False,
    allow_other_base: bool = False,
    verify: bool = True,
    safety: Mapping[str, Any] | None = None,
    progress: Callable[..., None] | None = None,
) -> EditReport:
    """Edit the change from `before` to `after` layer by layer and publish the result as the folder `out`.

    Killed at any point and called again with the same arguments, it takes up where it stopped and ends with the same
    bytes (`verification.json`, the model card and `inputs.json` apart, whose figures depend on the machine). A finished
    `out` of the same arguments is left alone and its report returned; with `verify`, one that was never checked is
    checked now. Input files that were written since are noticed by size and time, and refused.

    Args:
        before: folder, hub id, or checkpoint value (base and adapters): what the update started from.
        after: the same, or the folder of a LoRA adapter trained on `before`.
        rule: what is done to a layer. curvature: which layers, and their diagonals; None for a rule that needs none:
            then `blocks` = (module name -> 0-based block, number of blocks), or the model's structure, says which.
        export: "dense" writes a full checkpoint; "adapter" a PEFT folder with the edited A (`after` is an adapter).
        coefficient: for "adapter", of what the rule takes from the base weight (HPA's projection): "drop" (the base is
            not read), "measure" (read once, dropped, the error reported), "keep" (an input-scaling vector per layer in
            `holdfast_input_scale.safetensors`, applied by holdfast's loaders; PEFT alone ignores it).
        shard_bytes: bound on the data of one output file.
        allow_other_calibration: accept a calibration made with other weights of the same architecture.
        allow_other_base: accept weights of `after` that have nothing in common with those of `before`.
        verify: load the result in a clean process and compare it with the edit in memory, before publishing.
        safety: {set: {"before": rate, "after": rate}} for the model card, where measured.
        progress: called as progress("edit_layer", name=, done=, total=).

    Raises: CheckpointError, AdapterError: inputs that do not belong together or are damaged. CalibrationError: another
        model's. NumericalError: NaN or inf. StorageError: disk full, `out` exists. ExportError: the reloaded result is
        not the edit; nothing is published.
    """
    out = Path(out)
    _check_options(rule, curvature, export, coefficient)
    if safety is not None:
        check_safety(safety)
    clock = _Clock()
    with open_pair(before, after) as pair:
        if curvature is not None and not allow_other_calibration:
            check_calibration(curvature, pair)
        if curvature is None and blocks is None:
            blocks = decoder_layers(pair.before.folder)
        module_blocks, block_count = blocks if blocks is not None else (None, None)
        targets = find_targets(pair, curvature=curvature, blocks=module_blocks, block_count=block_count, seed=seed)
        if export == "adapter":
            recipe, unprotected = adapter_recipe(pair, targets, rule, coefficient)
            assert pair.lora is not None
            tensors, stem = output_tensors(pair.lora.entries), WEIGHTS_FILE.removesuffix(".safetensors")
            # PEFT reads one file; its size is bounded by the rank.
            shards = plan_shards(tensors, shard_bytes=max(1, sum(t.nbytes for t in tensors)), stem=stem)
        else:
            recipe, unprotected = dense_recipe(pair, targets, rule, allow_other_base=allow_other_base)
            stem = SINGLE_FILE.removesuffix(".safetensors")
            shards = plan_shards(output_tensors(pair.after.entries), shard_bytes=shard_bytes, stem=stem)
        plan: dict[str, Any] = {
            "export": export,
            "rule": rule.name,
            "settings": dict(rule.settings()),
            # A rule of somebody's own may change between a kill and a resume.
            **({} if is_builtin(type(rule)) else {"rule_code": origin_of(type(rule))}),
            "coefficient": coefficient if export == "adapter" else None,
            "fingerprints": pair.fingerprints(),
            "side_files": hash_side_files(_side_folder(pair, export)),
            "calibration": curvature.digest() if curvature is not None else None,
            "layers": [[t.layer.name, t.layer.block, t.key] for t in targets],
            "block_count": targets[0].layer.block_count,
            "seed": seed,
            "shard_bytes": shard_bytes if export == "dense" else None,
            "safety": dict(safety) if safety else None,
            "versions": {name: versions()[name] for name in ("holdfast", "torch")},
        }
        clock.lap("open")
        with Staging(out, plan, inputs=pair.stamps()) as staging:
            checked = {
                "before": before,
                "after": after,
                "pair": pair,
                "targets": targets,
                "rule": rule,
                "coefficient": coefficient,
            }
            if staging.already_published:
                report = EditReport.load(out / REPORT_FILE)
                if not verify or report.verification is not None:
                    return report
                report = _verified(out, report, f"{out} was published without this check; do not use it.", checked)
                _write_card(out, report, safety)
                return report
            result = rewrite(staging, shards, recipe, progress=_layers_only(progress, targets, export))
            clock.lap("edit")
            rows = _rows(result, targets, export, curvature)
            report = EditReport(
                rule=rule.name,
                settings=plan["settings"],
                export=export,
                coefficient=plan["coefficient"],
                layers=rows,
                inputs=_inputs(before, after, pair, curvature),
                plan_hash=staging.plan_hash,
                warnings=_warnings([*unprotected, *result.changed], pair, rows, curvature),
                versions=versions(),
            )
            _write_small_files(staging, report, result, plan, shards, pair, targets)
            clock.lap("write")
            if verify:
                kept = f"Nothing was published; what was written stays in {staging.folder}."
                report = _verified(staging.folder, report, kept, checked)
                clock.lap("verify")
            _write_card(staging.folder, report, safety)
            staging.publish()
    return report.with_seconds(clock.seconds)


def require_room(out: str | Path, before: Source, after: Source, export: Export) -> None:
    """What can be known before a long calibration: the pair belongs together, `out` is free, its disk is large enough.

    Raises: CheckpointError, AdapterError: as `edit_checkpoint`. StorageError: `out` exists or would not fit.
    """
    out = Path(out).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StorageError(f"{out} exists. Choose another --out, or remove it.")
    with open_pair(before, after) as pair:
        entries = pair.lora.entries if export == "adapter" and pair.lora is not None else pair.after.entries
        needed = sum(entry.nbytes for entry in entries.values())
    partial = out.parent / f".{out.name}.partial"
    written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    place = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(place).free
    if needed - written > free:
        raise StorageError(
            f"{out} needs {(needed - written) / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB left. Free some "
            "space or choose an --out on another disk."
        )


def _check_options(rule: EditRule, curvature: Curvature | None, export: str, coefficient: str) -> None:
    for name, value, kind in (("export", export, Export), ("coefficient", coefficient, CoefficientChoice)):
        if value not in get_args(kind):
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(get_args(kind))}.")
    if rule.needs_curvature and curvature is None:
        raise CalibrationError(
            f"The rule {rule.name!r} weighs safety against the task and needs a calibration; pass one made by "
            "`holdfast calibrate`."
        )


def _rows(
    result: RewriteResult, targets: list[Target], export: str, curvature: Curvature | None
) -> list[dict[str, Any]]:
    rows = []
    for target in targets:
        written = target.lora.a.name if export == "adapter" and target.lora is not None else target.key
        row = {key: value for key, value in result.rows[written].items() if key != SCALE_FIELD}
        rows.append({**row, **(curvature.record_of(target.layer.name) if curvature is not None else {})})
    return rows


def _inputs(before: Source, after: Source, pair: Pair, curvature: Curvature | None) -> dict[str, Any]:
    found = pair.fingerprints()
    inputs: dict[str, Any] = {
        "before": {"source": describe(before), "fingerprint": found["before"]},
        "after": {"source": describe(after), "fingerprint": found["after"]},
    }
    if curvature is not None:
        counted = {
            side: {key: record[key] for key in ("sequences", "tokens") if key in record}
            for side, record in curvature.meta.get("sets", {}).items()
        }
        inputs["calibration"] = {
            "source": "curvature",
            "fingerprint": [curvature.digest()],
            "sets": counted,
            "config": dict(curvature.meta.get("config", {})),
        }
    return inputs


def _warnings(unprotected: list[str], pair: Pair, rows: list[dict[str, Any]], curvature: Curvature | None) -> list[str]:
    sentences = describe_unprotected(unprotected) if unprotected else []
    if curvature is not None:
        sentences += describe_calibration(curvature, pair)
    sentences = describe_no_change(rows) + sentences + _other_base(pair)
    return sentences + [f"{key}: in AFTER only, copied" for key in pair.only_after]


def _verified(folder: Path, report: EditReport, consequence: str, checked: Mapping[str, Any]) -> EditReport:
    """The report with what the guard found, which is written beside it. consequence: the end of the guard's error."""
    try:
        report = verify_export(folder, report, **checked)
    except ExportError as error:
        raise ExportError(f"{error} {consequence}") from error
    write_json(folder / VERIFICATION_FILE, report.verification)
    return report


def _write_card(folder: Path, report: EditReport, safety: Mapping[str, Any] | None) -> None:
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(model_card(report, safety=safety), encoding="utf-8")


def _other_base(pair: Pair) -> list[str]:
    """Adapters record a path or hub id; moved folders are common, so a name that differs is a warning only."""
    named = pair.lora.config.get("base_model_name_or_path") if pair.lora is not None else None
    if not isinstance(named, str) or not named:
        return []
    config = pair.before.base.config().get("_name_or_path")
    last = {PurePath(name).name for name in (str(pair.before.folder), config or "") if name}
    # A hub snapshot lies under models--ORG--NAME.
    if PurePath(named).name in last or f"models--{named.replace('/', '--')}" in pair.before.folder.parts:
        return []
    return [f"the adapter was trained on {named} by its own record; BEFORE is {pair.before.folder}"]


def _write_small_files(
    staging: Staging,
    report: EditReport,
    result: RewriteResult,
    plan: Mapping[str, Any],
    shards: tuple[Shard, ...],
    pair: Pair,
    targets: list[Target],
) -> None:
    folder = staging.folder
    copy_side_files(_side_folder(pair, report.export), folder)
    if report.export == "adapter":
        scales = {
            target.lora.module: read_scale_field(result.rows[target.lora.a.name][SCALE_FIELD])
            for target in targets
            if target.lora is not None and SCALE_FIELD in result.rows[target.lora.a.name]
        }
        if scales:
            with atomic_path(folder / INPUT_SCALE_FILE) as temporary:
                save_file({name: scales[name] for name in sorted(scales)}, temporary)
    else:
        if len(shards) > 1:
            write_json(folder / INDEX_FILE, shard_index(shards))
    report.save(folder / REPORT_FILE)
    write_json(
        folder / PROVENANCE_FILE, {"plan_hash": staging.plan_hash, "plan": dict(plan), "inputs": dict(report.inputs)}
    )


def _side_folder(pair: Pair, export: str) -> Path:
    """Whose configuration and tokenizer the result gets: the adapter's, or AFTER's (tuning may have added tokens)."""
    return pair.lora.folder if export == "adapter" and pair.lora is not None else pair.after.folder


def _layers_only(
    progress: Callable[..., None] | None, targets: list[Target], export: str
) -> Callable[..., None] | None:
    if progress is None:
        return None
    names = {
        target.lora.a.name if export == "adapter" and target.lora is not None else target.key: target.layer.name
        for target in targets
    }
    done = 0

    def report(event: str, *, name: str, **values: Any) -> None:
        nonlocal done
        if name in names:
            done += 1
            progress("edit_layer", name=names[name], done=done, total=len(names))

    return report


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now
