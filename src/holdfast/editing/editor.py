"""Edit a checkpoint on disk with a rule: no model is built, one layer is in memory, the result appears whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from safetensors.torch import save_file

from holdfast.checkpoints.adapter import CONFIG_FILE, INPUT_SCALE_FILE, WEIGHTS_FILE
from holdfast.checkpoints.adapter_settings import (
    Content,
    describe_missing,
    describe_overlay,
    fill_missing,
    overlay,
)
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.reader import INDEX_FILE, SINGLE_FILE
from holdfast.checkpoints.rewrite import RewriteResult, copy_contents, hash_contents, rewrite, side_contents
from holdfast.checkpoints.value import Checkpoint, Source, as_checkpoint
from holdfast.checkpoints.writer import (
    DEFAULT_SHARD_BYTES,
    PROVENANCE_FILE,
    Shard,
    Staging,
    plan_shards,
    shard_index,
)
from holdfast.editing.account import REPORT_FILE, VERIFICATION_FILE, EditReport, check_safety, model_card, versions
from holdfast.editing.adapter_names import PresentNames, present_names
from holdfast.editing.descent import describe_moved_further, describe_no_change
from holdfast.editing.pair import Pair, open_pair, tuned_checkpoint
from holdfast.editing.plan import (
    Blocks,
    LoraTarget,
    Target,
    check_calibration,
    decoder_layers,
    describe_calibration,
    describe_unprotected,
    find_targets,
    lora_targets,
)
from holdfast.editing.recipes import (
    DIFFERS_FIELD,
    SCALE_FIELD,
    CoefficientChoice,
    Recipe,
    adapter_recipe,
    dense_recipe,
    output_tensors,
    read_scale_field,
)
from holdfast.editing.verify.compare import verify_export
from holdfast.errors import CalibrationError, ConfigError, ExportError, StorageError
from holdfast.files import atomic_path, write_json
from holdfast.registry import is_builtin, origin_of
from holdfast.rules.base import EditRule, GramRule

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
            then `blocks` = (module name -> 0-based block, number of blocks), or the model's structure, says which; a
            rule with Gram matrices of its own has its layers.
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
    _check_options(rule, curvature, export, coefficient)
    if safety is not None:
        check_safety(safety)
    clock = _Clock()
    with open_pair(before, after) as pair:
        if curvature is not None and not allow_other_calibration:
            check_calibration(curvature, pair)
        if isinstance(rule, GramRule):
            if not allow_other_calibration:
                rule.check_models(pair.fingerprints())
            blocks = blocks or rule.layers()
        layers: Curvature | Blocks
        if curvature is not None:
            layers = curvature
        else:
            layers = Blocks(*blocks) if blocks is not None else decoder_layers(pair.before.folder)
        targets = find_targets(pair, layers, seed=seed)
        names = None
        if export == "adapter" and pair.lora is not None:
            known = [target.layer.name for target in targets]
            names = present_names(pair.lora, pair.before.folder, known)
        edit = _Edit(
            before=as_checkpoint(before),
            after=tuned_checkpoint(before, after),
            after_name=str(as_checkpoint(after)),
            pair=pair,
            targets=targets,
            names=names,
            rule=rule,
            curvature=curvature,
            export=export,
            coefficient=coefficient,
            safety=safety,
        )
        output = edit.adapter_output() if export == "adapter" else edit.dense_output(shard_bytes, allow_other_base)
        plan = edit.plan(seed=seed, shard_bytes=shard_bytes)
        clock.lap("open")
        with Staging(Path(out), plan, inputs=pair.stamps()) as staging:
            if staging.already_published:
                return edit.published(Path(out), verify=verify)
            try:
                result = rewrite(staging, output.shards, output.recipe, progress=edit.layers_only(progress))
            except StorageError as error:
                raise StorageError(f"{error} {staging.kept}") from error
            clock.lap("edit")
            report = edit.report(result, staging.plan_hash, output.unprotected)
            _write_small_files(staging, edit, report, result, plan, output.shards)
            clock.lap("write")
            if verify:
                kept = f"Nothing was published; what was written stays in {staging.folder}."
                report = edit.verified(staging.folder, report, kept)
                clock.lap("verify")
            edit.write_card(staging.folder, report)
            staging.publish()
    return report.with_seconds(clock.seconds)


@dataclass(frozen=True)
class _Output:
    """What is written: every tensor's recipe, the files they go to, and the keys that change without protection."""

    recipe: Recipe
    shards: tuple[Shard, ...]
    unprotected: list[str]


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """One edit of an open pair, step by step; the arguments of `edit_checkpoint` that more than one step needs."""

    before: Checkpoint
    after: Checkpoint
    after_name: str
    pair: Pair
    targets: list[Target]
    names: PresentNames | None
    rule: EditRule
    curvature: Curvature | None
    export: Export
    coefficient: CoefficientChoice
    safety: Mapping[str, Any] | None

    def adapter_output(self) -> _Output:
        keys = {} if self.names is None else self.names.keys
        recipe, unprotected = adapter_recipe(self.pair, self.targets, self.rule, self.coefficient, keys)
        entries = self.pair.lora.entries if self.pair.lora is not None else {}
        tensors = output_tensors({keys[name]: entry for name, entry in entries.items()})
        # PEFT reads one file; its size is bounded by the rank.
        whole = max(1, sum(tensor.nbytes for tensor in tensors))
        return _Output(recipe, plan_shards(tensors, shard_bytes=whole, stem=_stem(WEIGHTS_FILE)), unprotected)

    def dense_output(self, shard_bytes: int, allow_other_base: bool) -> _Output:
        recipe, unprotected = dense_recipe(self.pair, self.targets, self.rule, allow_other_base=allow_other_base)
        lost = {key: self.pair.before.entries[key] for key in self.pair.only_before}
        tensors = output_tensors({**self.pair.after.entries, **lost})
        return _Output(recipe, plan_shards(tensors, shard_bytes=shard_bytes, stem=_stem(SINGLE_FILE)), unprotected)

    def plan(self, *, seed: int, shard_bytes: int) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        return {
            "export": self.export,
            "rule": self.rule.name,
            "settings": dict(self.rule.settings()),
            # A rule of somebody's own may change between a kill and a resume.
            **({} if is_builtin(type(self.rule)) else {"rule_code": origin_of(type(self.rule))}),
            "coefficient": self.coefficient if self.export == "adapter" else None,
            "fingerprints": self.pair.fingerprints(),
            "side_files": hash_contents(self.contents()),
            "calibration": self.curvature.digest() if self.curvature is not None else None,
            "layers": [[t.layer.name, t.layer.block, t.key] for t in self.targets],
            "block_count": self.targets[0].layer.block_count,
            "seed": seed,
            "shard_bytes": shard_bytes if self.export == "dense" else None,
            "safety": dict(self.safety) if self.safety else None,
            "versions": {name: versions()[name] for name in ("holdfast", "torch")},
            # Only where there is something to say: the plans of other edits stay as they were.
            **({"renamed": self.names.renamed} if self.names is not None and self.names.renamed else {}),
            **({"only_before": self.pair.only_before} if self.pair.only_before else {}),
        }

    def report(self, result: RewriteResult, plan_hash: str, unprotected: list[str]) -> EditReport:
        rows = self._rows(result)
        return EditReport(
            rule=self.rule.name,
            settings=dict(self.rule.settings()),
            export=self.export,
            coefficient=self.coefficient if self.export == "adapter" else None,
            layers=rows,
            inputs=self._inputs(),
            plan_hash=plan_hash,
            warnings=[
                *_warnings([*unprotected, *_changed(result)], self.pair, rows, self.curvature),
                *describe_overlay(side_contents(self.side_folder()), self.settings_folders()),
                *describe_missing(side_contents(self.side_folder()), self.lent_settings(), "AFTER", "BEFORE's"),
                *self._renamed(),
            ],
            versions=versions(),
        )

    def _renamed(self) -> list[str]:
        renamed = {} if self.names is None else self.names.renamed
        if not renamed:
            return []
        old, new = next(iter(renamed.items()))
        return [f"{len(renamed)} tensor(s) of the adapter are written under their present names: {old} is {new}"]

    def published(self, out: Path, *, verify: bool) -> EditReport:
        """The report of a finished OUT; checked now, where it was never checked."""
        report = EditReport.load(out / REPORT_FILE)
        if verify and report.verification is None:
            report = self.verified(out, report, f"{out} was published without this check; do not use it.")
            self.write_card(out, report)
        return report

    def verified(self, folder: Path, report: EditReport, consequence: str) -> EditReport:
        """The report with what the guard found, which is written beside it. consequence: the end of its error."""
        try:
            report = verify_export(
                folder,
                report,
                before=self.before,
                after=self.after,
                pair=self.pair,
                targets=self.targets,
                rule=self.rule,
                coefficient=self.coefficient,
            )
        except ExportError as error:
            raise ExportError(f"{error} {consequence}") from error
        write_json(folder / VERIFICATION_FILE, report.verification)
        return report

    def write_card(self, folder: Path, report: EditReport) -> None:
        with atomic_path(folder / "README.md") as temporary:
            temporary.write_text(model_card(report, safety=self.safety), encoding="utf-8")

    def layers_only(self, progress: Callable[..., None] | None) -> Callable[..., None] | None:
        """`progress` told of edited layers by their names, and of no other tensor."""
        if progress is None:
            return None
        names = {self._written_key(target): target.layer.name for target in self.targets}
        done = 0

        def report(event: str, *, name: str, **values: Any) -> None:
            nonlocal done
            if name in names:
                done += 1
                progress("edit_layer", name=names[name], done=done, total=len(names))

        return report

    def _written_key(self, target: Target) -> str:
        """The output tensor that a target's edit is in."""
        if self.export != "adapter" or not isinstance(target, LoraTarget) or self.names is None:
            return target.key
        return self.names.keys[target.lora.a.name]

    def _rows(self, result: RewriteResult) -> list[dict[str, Any]]:
        rows = []
        for target in self.targets:
            row = {key: value for key, value in result.rows[self._written_key(target)].items() if key != SCALE_FIELD}
            record = self.curvature.record_of(target.layer.name) if self.curvature is not None else {}
            rows.append({**row, **record})
        return rows

    def _inputs(self) -> dict[str, Any]:
        found = self.pair.fingerprints()
        inputs: dict[str, Any] = {
            "before": {"source": str(self.before), "fingerprint": found["before"]},
            "after": {"source": self.after_name, "fingerprint": found["after"]},
        }
        if self.curvature is not None:
            inputs["calibration"] = _calibration_input(self.curvature)
        return inputs

    def settings_folders(self) -> list[Path]:
        """Adapter folders whose tokenizer, template and processor a dense result gets over those of the base."""
        return [] if self.export == "adapter" else [adapter.folder for adapter in self.pair.after.adapters]

    def lent_settings(self) -> dict[str, Content]:
        """BEFORE's tokenizer, template and processor, which a dense result gets where AFTER's folder has none."""
        return {} if self.export == "adapter" else side_contents(self.pair.before.folder)

    def contents(self) -> dict[str, Content]:
        """name -> file or content, of all that lies beside the weights of the result."""
        found = fill_missing(side_contents(self.side_folder()), self.lent_settings())
        return overlay(found, self.settings_folders())

    def side_folder(self) -> Path:
        """Whose configuration and tokenizer the result gets: the adapter's, or AFTER's (tuning may add tokens)."""
        lora = self.pair.lora
        return lora.folder if self.export == "adapter" and lora is not None else self.pair.after.folder


def _write_small_files(
    staging: Staging,
    edit: _Edit,
    report: EditReport,
    result: RewriteResult,
    plan: Mapping[str, Any],
    shards: tuple[Shard, ...],
) -> None:
    """All but the weights and the card: side files, scaling vectors, index, report, provenance."""
    folder = staging.folder
    copy_contents(edit.contents(), folder)
    if edit.export == "dense" and edit.pair.after.has_own_config:
        write_json(folder / "config.json", edit.pair.after.config())
    if edit.names is not None:
        if edit.names.config is not None:
            write_json(folder / CONFIG_FILE, edit.names.config)
        rows = {
            edit.names.modules[target.lora.module]: result.rows[edit.names.keys[target.lora.a.name]]
            for target in lora_targets(edit.targets)
        }
        scales = {module: read_scale_field(row[SCALE_FIELD]) for module, row in rows.items() if SCALE_FIELD in row}
        if scales:
            with atomic_path(folder / INPUT_SCALE_FILE) as temporary:
                save_file({name: scales[name] for name in sorted(scales)}, temporary)
        for path in edit.pair.lora.extra_files if edit.pair.lora is not None else ():
            with atomic_path(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    elif len(shards) > 1:
        write_json(folder / INDEX_FILE, shard_index(shards))
    report.save(folder / REPORT_FILE)
    provenance = {"plan_hash": staging.plan_hash, "plan": dict(plan), "inputs": dict(report.inputs)}
    write_json(folder / PROVENANCE_FILE, provenance)


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


def _calibration_input(curvature: Curvature) -> dict[str, Any]:
    counted = {
        side: {key: record[key] for key in ("sequences", "tokens") if key in record}
        for side, record in curvature.meta.get("sets", {}).items()
    }
    return {
        "source": "curvature",
        "fingerprint": [curvature.digest()],
        "sets": counted,
        "config": dict(curvature.meta.get("config", {})),
    }


def _stem(file: str) -> str:
    return file.removesuffix(".safetensors")


def _warnings(unprotected: list[str], pair: Pair, rows: list[dict[str, Any]], curvature: Curvature | None) -> list[str]:
    sentences = describe_unprotected(unprotected) if unprotected else []
    if curvature is not None:
        sentences += describe_calibration(curvature, pair)
    sentences = describe_no_change(rows) + describe_moved_further(rows) + sentences + _other_base(pair)
    sentences += [f"{key}: in AFTER only, copied" for key in pair.only_after]
    if pair.only_before:
        count = f"{pair.only_before[0]} ({len(pair.only_before)} tensor(s))"
        sentences.append(f"{count}: in BEFORE only, where transformers never builds it; copied from there")
    for key, (old, new) in pair.resized.items():
        sentences.append(f"{key}: {old} rows before and {new} after (tokens were added or cut); AFTER's is copied")
    if pair.retyped:
        key, (before, after) = next(iter(pair.retyped.items()))
        sentences.append(
            f"{len(pair.retyped)} tensor(s) are {before} before and {after} after ({key}, ...): BEFORE's were rounded "
            "to AFTER's type first, and the result has AFTER's types"
        )
    return sentences


def _changed(result: RewriteResult) -> list[str]:
    """Copied tensors that are not BEFORE's."""
    return [*result.changed, *(name for name, row in result.rows.items() if row.get(DIFFERS_FIELD))]


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


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now
