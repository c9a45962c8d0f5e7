"""A PEFT LoRA adapter on disk: its factors by module, its exact scaling, and a refusal of what is not handled.

W' = W + s B A with A (rank, c), B (r, rank) and s = alpha / rank, or alpha / sqrt(rank) with `use_rslora`;
`rank_pattern` and `alpha_pattern` give single modules their own. What changes a weight otherwise (DoRA, convolutions,
embeddings, a base changed by PiSSA) is a `DenseUpdate`, merged and never edited as factors. Options that nobody here
knows are refused by name: read as plain LoRA they would be wrong. `checkpoints.support` lists all kinds.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.checkpoints.contents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INPUT_SCALE_FILE,
    kind_of,
    require_safe_adapter,
)
from holdfast.checkpoints.dense_update import DenseKind, DenseUpdate, Part
from holdfast.checkpoints.naming import NameIndex, normalised, strip_peft_prefix
from holdfast.checkpoints.patterns import try_patterns, values_by_module
from holdfast.checkpoints.reader import read_json
from holdfast.checkpoints.support import adapter_kind
from holdfast.checkpoints.tensor_file import EDITABLE_DTYPES, TensorEntry, TensorFile
from holdfast.checkpoints.tied import EMBEDDING, HEAD
from holdfast.checkpoints.value import as_checkpoint
from holdfast.errors import AdapterError, CheckpointError

CONFIG_FILE = ADAPTER_CONFIG
WEIGHTS_FILE = ADAPTER_WEIGHTS

# Keys of adapter_config.json that leave the meaning of the stored factors alone: which modules, how they were
# initialised or trained, bookkeeping. Any other key with a value that says something is refused.
_HARMLESS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "loftq_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
        "velora_config",
        "lora_ga_config",
    }
)
# These initialisations subtract the initial factors from the base weights: only with them is the update known.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
# What PEFT calls a part of a module's update in a file; a file made of the model's own state has the adapter's name in
# it too (`lora_A.default.weight`).
_PART = re.compile(
    r"^(?P<module>.+)\.(?:"
    r"lora_(?P<factor>[AB])(?:\.\w+)?\.weight|"
    r"lora_embedding_(?P<embedding>[AB])(?:\.\w+)?|"
    r"(?P<magnitude>lora_magnitude_vector)(?:\.\w+)?(?:\.weight)?|"
    r"(?P<tokens>token_adapter\.trainable_tokens_delta)(?:\.\w+)?"
    r")$"
)
# How PEFT spells each part behind the module's name.
_TAILS = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
    "tokens": "token_adapter.trainable_tokens_delta",
}
# Folders in which a trainer keeps the factors that the training began with, inside the adapter's folder or beside it.
_INITIAL = re.compile(r"(^|[_-])(init|initial)([_-]|$)")
# Of a rank or an alpha: beyond, products leave what fp32 holds, and nobody trains so.
_LARGEST = 1_000_000


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """One module's factors: A (rank, c), B (r, rank), W' = W + scaling * B A.

    transposed: the base stores the weight as (c, r), `fan_in_fan_out`.
    """

    module: str
    a: TensorEntry
    b: TensorEntry
    rank: int
    scaling: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(r, c) of the update."""
        return self.b.shape[0], self.a.shape[1]


class LoraAdapter:
    """An adapter folder, opened: `modules` (name as in memory -> factors) and `saved` (whole tensors it replaces).

    dense: module -> what changes its weight otherwise than plain LoRA on a linear layer; merged, never edited as
        factors. ties: what is done to one end of a tied embedding is done to the other (`ensure_weight_tying`).
    base_parameters: the names in `saved` that PEFT loads into the base's own parameter, which a tied base shares
        between both ends.
    input_scale: module -> entry of a vector (c,) that the edit wrote beside the factors; the base weight's column j is
        multiplied by `scale[j]` before the update is added. Empty for an adapter of any other tool.

    Raises: AdapterError: no adapter, a kind that is not handled, factors that do not fit each other or the config.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._initial: LoraAdapter | None = None
        if not (self.folder / CONFIG_FILE).is_file():
            raise AdapterError(f"{self.folder} is no PEFT adapter: it has no {CONFIG_FILE}.")
        extra = require_safe_adapter(self.folder)
        if not (self.folder / WEIGHTS_FILE).is_file():
            raise AdapterError(f"{self.folder} has no {WEIGHTS_FILE}.")
        try:
            self.config = read_json(self.folder / CONFIG_FILE, "a PEFT configuration")
            _refuse_unusual(self.folder, self.config)
            self._file = TensorFile(self.folder / WEIGHTS_FILE)
            self._scales = self._open_scales()
            self._extra = tuple(TensorFile(path) for path in extra)
            init = self.config.get("init_lora_weights")
            if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
                self._initial = self._open_initial(init)
        except AdapterError:
            raise
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
        self.ties = bool(self.config.get("ensure_weight_tying"))
        self.base_parameters: set[str] = set()
        # Key in the file -> (module as the file calls it, what follows the module in a file that PEFT wrote).
        self.parts: dict[str, tuple[str, str]] = {}
        self.modules: dict[str, LoraEntry] = {}
        self.dense: dict[str, DenseUpdate] = {}
        self.saved: dict[str, TensorEntry] = {}
        self._pair()
        self.input_scale = self._match_scales()

    def _open_scales(self) -> TensorFile | None:
        path = self.folder / INPUT_SCALE_FILE
        return TensorFile(path) if path.is_file() else None

    def _open_initial(self, init: str) -> LoraAdapter:
        """The factors that training began with; PiSSA and its like took them out of the base."""
        places = (self.folder, self.folder.resolve().parent)
        for place in places:
            found = sorted(
                path
                for path in place.iterdir()
                if _INITIAL.search(path.name.lower()) and (path / CONFIG_FILE).is_file() and path != self.folder
            )
            if len(found) > 1:
                raise AdapterError(
                    f"{self.folder} was initialised with {init!r}, and any of {', '.join(p.name for p in found)} in "
                    f"{place} could be its initial adapter; leave the right one there."
                )
            if found:
                initial = read_json(found[0] / CONFIG_FILE, "a PEFT configuration")
                kind = initial.get("init_lora_weights")
                if isinstance(kind, str) and kind.lower().startswith(_CHANGES_BASE):
                    raise AdapterError(
                        f"{found[0] / CONFIG_FILE} has init_lora_weights {kind!r}; expected true, as PEFT's guide "
                        "saves an initial adapter (its factors are to be taken as they are)."
                    )
                return LoraAdapter(found[0])
        raise AdapterError(f"{self.folder} was initialised with {init!r}, {adapter_kind('pissa').sentence}")

    def _pair(self) -> None:
        """Sort the file's tensors into factors of linear layers, dense updates and whole tensors."""
        factors: dict[str, dict[str, TensorEntry]] = {}
        for key, entry in self._file.entries.items():
            name = strip_peft_prefix(key)
            part = _PART.match(name)
            if part is not None:
                which = part.lastgroup
                role = part[which] if which in ("factor", "embedding") else str(which)
                role = f"embedding_{role}" if which == "embedding" else role
                factors.setdefault(part["module"], {})[role] = entry
                self.parts[key] = (part["module"], _TAILS[role])
            elif ".lora_" in name or "token_adapter" in name:
                raise AdapterError(
                    f"{self.folder} holds {key}, which is no part of a LoRA that is handled: only lora_A and lora_B of "
                    "linear layers, convolutions and embeddings, DoRA's magnitudes and trainable tokens are. Merge "
                    "this adapter into its base with PEFT and pass the merged folder."
                )
            else:
                name = name.replace(".modules_to_save.default.", ".modules_to_save.")
                # A trained bias of an adapted layer sits in that layer's base_layer.
                plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                self.saved[plain] = entry
                module, _, last = plain.rpartition(".")
                self.parts[key] = (module, f"base_layer.{last}" if ".base_layer." in name else last)
                if ".modules_to_save." not in name and not self._is_module_to_save(plain):
                    self.base_parameters.add(plain)
        names, where = sorted(factors), str(self.folder / CONFIG_FILE)
        try_patterns(self.config, names, where=where)
        self._own = {
            key: values_by_module(self.config.get(key) or {}, names, where=f"{where}: {key}")
            for key in ("rank_pattern", "alpha_pattern")
        }
        for name, roles in sorted(factors.items()):
            if set(roles) <= {"A", "B"} and self._initial is None and not _is_convolution(roles):
                self.modules[name] = self._entry(name, roles)
            else:
                self.dense[name] = self._dense(name, roles)
        if not self.modules and not self.dense:
            raise AdapterError(f"{self.folder} holds no LoRA factors (lora_A, lora_B); there is nothing to edit.")
        for file in self._extra:
            for key, entry in file.entries.items():
                # Its tool loads it into the base's own parameters, over what the adapter's file says.
                name = strip_peft_prefix(key)
                self.saved[name] = entry
                self.base_parameters.add(name)

    def _dense(self, name: str, roles: Mapping[str, TensorEntry]) -> DenseUpdate:
        parts = {role: Part(self._file, entry) for role, entry in roles.items()}
        if set(roles) == {"tokens"}:
            return DenseUpdate(module=name, kind="tokens", parts=parts, indices=self._token_indices(name))
        embedding = any(role.startswith("embedding_") for role in roles)
        wanted = {"embedding_A", "embedding_B"} if embedding else {"A", "B"}
        if not wanted <= set(roles) or set(roles) - wanted - {"magnitude"}:
            raise AdapterError(
                f"{self.folder}: {name} has {', '.join(sorted(roles))} only; both factors are needed, of one kind."
            )
        first, second = (roles[role] for role in sorted(wanted))
        rank, alpha = self.rank_and_alpha(name)
        if first.shape[0] != rank or len(second.shape) < 2 or second.shape[1] != rank:
            raise AdapterError(
                f"{self.folder}: {name} has A {first.shape} and B {second.shape}, but the configuration gives it rank "
                f"{rank}."
            )
        for entry in roles.values():
            if entry.dtype not in EDITABLE_DTYPES:
                raise AdapterError(f"{self.folder}: {entry.name} is {entry.dtype}; expected a floating type.")
        scaling = self._scaling(rank, alpha)
        if self._initial is not None:
            before = self._initial.modules.get(name)
            if before is None or (before.a.shape, before.b.shape) != (first.shape, second.shape):
                raise AdapterError(
                    f"{self._initial.folder} is not what {self.folder} began with: it has no factors of "
                    f"{name} with A {first.shape} and B {second.shape}."
                )
            parts |= {
                "initial_A": Part(self._initial._file, before.a),
                "initial_B": Part(self._initial._file, before.b),
            }
        kind: DenseKind = "embedding" if embedding else "conv" if _is_convolution(roles) else "linear"
        return DenseUpdate(
            module=name,
            kind=kind,
            parts=parts,
            scaling=scaling,
            transposed=bool(self.config.get("fan_in_fan_out")) and kind == "linear",
        )

    def _token_indices(self, module: str) -> tuple[int, ...]:
        """Rows of an embedding that `trainable_token_indices` names: a list, or a list by module."""
        given = self.config.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((rows for end, rows in given.items() if f".{module}".endswith(f".{end}")), None)
        if not isinstance(given, list) or not all(isinstance(row, int) and row >= 0 for row in given):
            raise AdapterError(
                f"{self.folder / CONFIG_FILE}: trainable_token_indices is {given!r} for {module}; expected token ids."
            )
        return tuple(given)

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embedding or head that it holds whole, or None."""
        rows = [entry.shape[0] for name, entry in self.saved.items() if normalised(name) in (EMBEDDING, HEAD)]
        return rows[0] if rows else None

    def _is_module_to_save(self, name: str) -> bool:
        """Whether PEFT gives the module of this tensor a copy of its own (PEFT: _set_trainable)."""
        listed = self.config.get("modules_to_save") or ()
        module = name.rpartition(".")[0]
        return any(isinstance(end, str) and module.endswith(end) for end in listed)

    def changes_one_end(self, name: str) -> bool:
        """Whether the change of `name`, a saved tensor or a LoRA module, spares what a tied base shares it with."""
        if name in self.dense and self.dense[name].kind == "tokens":
            return False  # PEFT gives the other end the same rows
        return not self.ties and (name in self.modules or name in self.dense or name not in self.base_parameters)

    def weight_names(self) -> list[tuple[str, str]]:
        """(name in `saved` or `modules`, name of the tensor that it changes), of all."""
        modules = (*self.modules, *self.dense)
        return [*((name, name) for name in self.saved), *((module, f"{module}.weight") for module in modules)]

    def _entry(self, name: str, pair: Mapping[str, TensorEntry]) -> LoraEntry:
        if len(pair) != 2:
            raise AdapterError(f"{self.folder}: {name} has lora_{next(iter(pair))} only; both are needed.")
        a, b = pair["A"], pair["B"]
        for factor in (a, b):
            if factor.dtype not in EDITABLE_DTYPES:
                raise AdapterError(f"{self.folder}: {factor.name} is {factor.dtype}; expected a floating type.")
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise AdapterError(
                f"{self.folder}: the factors of {name} are {a.shape} and {b.shape}; expected two matrices, or two "
                "kernels of a convolution."
            )
        rank, alpha = self.rank_and_alpha(name)
        if a.shape[0] != b.shape[1] or a.shape[0] != rank:
            raise AdapterError(
                f"{self.folder}: {name} has A {a.shape} and B {b.shape}, but the configuration gives it rank {rank}."
            )
        scaling = self._scaling(rank, alpha)
        return LoraEntry(name, a, b, a.shape[0], scaling, bool(self.config.get("fan_in_fan_out")))

    def rank_and_alpha(self, module: str) -> tuple[float, float]:
        """What the configuration gives a module."""
        return self._option("rank_pattern", module, "r"), self._option("alpha_pattern", module, "lora_alpha")

    def _scaling(self, rank: float, alpha: float) -> float:
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def _option(self, patterns: str, module: str, default: str) -> float:
        """A module's own value: of the first pattern that matches the end of its name (PEFT: get_pattern_key)."""
        value: float = self._own[patterns].get(module, self.config[default])
        return value

    def _match_scales(self) -> dict[str, TensorEntry]:
        if self._scales is None:
            return {}
        unknown = sorted(set(self._scales.entries) - set(self.modules))
        if unknown:
            raise AdapterError(f"{self.folder / INPUT_SCALE_FILE} scales {unknown[0]}, which has no LoRA factors here.")
        for name, entry in self._scales.entries.items():
            if entry.shape != (self.modules[name].shape[1],):
                raise AdapterError(
                    f"{self.folder / INPUT_SCALE_FILE}: {name} has {entry.shape}; expected one factor per column, "
                    f"({self.modules[name].shape[1]},)."
                )
        return dict(self._scales.entries)

    def read_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A (rank, c) and B (r, rank) in fp32 (fp64 stays).

        Raises: AdapterError: NaN or inf.
        """
        entry = self.modules[module]
        factors = []
        for part in (entry.a, entry.b):
            factor = self._file.read(part)
            if not bool(factor.isfinite().all()):
                raise AdapterError(f"{self.folder}: {part.name} holds NaN or inf; the training that made it diverged.")
            factors.append(factor if part.dtype == "F64" else factor.float())
        return factors[0], factors[1]

    def apply_dense(self, module: str, weight: Tensor) -> Tensor:
        """A module's weight under its dense update, in fp32 or wider.

        weight: the base's (r, c), or a convolution's (out, in, height, width). Returns: of the same shape.

        Raises: AdapterError: NaN or inf, or factors for another shape.
        """
        try:
            return self.dense[module].apply(weight)
        except ValueError as error:
            raise AdapterError(f"{self.folder}: {error}") from error

    def read_scale(self, module: str) -> Tensor | None:
        """The input-scaling vector (c,) of a module, fp32, or None."""
        entry = self.input_scale.get(module)
        return None if entry is None or self._scales is None else self._scales.read(entry).float()

    def read_saved(self, name: str) -> Tensor:
        """A whole tensor that the adapter replaces, in its stored type.

        Of the shape it is stored in, (out, in) for a linear.
        """
        entry = self.saved[name]
        return next(file for file in (self._file, *self._extra) if file.path == entry.path).read(entry)

    def raw(self, entry: TensorEntry) -> Tensor:
        """Any tensor of the adapter file in its stored type.

        Of the shape it is stored in, such as A (rank, in).
        """
        return self._file.read(entry)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the adapter file, by its key."""
        return self._file.entries

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's metadata, as the trainer wrote it."""
        return self._file.metadata

    def read_range(self, key: str, buffer: Tensor, start: int, stop: int) -> Tensor:
        """Raw bytes of a tensor of the adapter file (for its fingerprint).

        buffer: (n,) uint8, n >= stop - start. Returns: (stop - start,), a view of it.
        """
        return self._file.read_into(self._file.entries[key], buffer, start, stop)

    @property
    def meaning(self) -> dict[str, Any]:
        """What beside the factors decides the update (for the fingerprint): scaling by module, and input scales."""
        found: dict[str, Any] = {name: [e.rank, e.scaling, e.transposed] for name, e in self.modules.items()}
        found |= {name: update.meaning() for name, update in self.dense.items()}
        if self.ties:
            found["ensure_weight_tying"] = True
        if self._initial is not None:
            with self._initial._file.path.open("rb") as opened:
                found["initial adapter"] = hashlib.file_digest(opened, "sha256").hexdigest()
        if self._scales is not None:
            digest = hashlib.sha256()
            for name, entry in sorted(self.input_scale.items()):
                digest.update(name.encode() + self._scales.read(entry).float().numpy().tobytes())
            found[INPUT_SCALE_FILE] = digest.hexdigest()
        for file in self._extra:
            with file.path.open("rb") as opened:
                found[file.path.name] = hashlib.file_digest(opened, "sha256").hexdigest()
        return found

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        initial = None if self._initial is None else self._initial._file
        files = (self._file, self._scales, *self._extra, initial)
        return tuple(file.path for file in files if file is not None)

    def why_not_factors(self) -> str | None:
        """Why this adapter's file alone, edited, would not serve as an adapter; None where it would."""
        if self._initial is not None:
            init = self.config.get("init_lora_weights")
            return f"it was initialised with {init!r} and means something with its initial adapter only"
        return None

    @property
    def extra_files(self) -> tuple[Path, ...]:
        """Trained weights that another tool saved beside the adapter; they are part of `saved`."""
        return tuple(file.path for file in self._extra)

    def match(self, base: NameIndex) -> dict[str, str]:
        """Module, dense ones too -> key of its weight in the base; every module and saved tensor must have one.

        Raises: AdapterError: a module that the base does not have.
        """
        for name in self.saved:
            self.key_of_saved(name, base)
        modules = (*self.modules, *self.dense)
        return {module: base.require(f"{module}.weight", error=AdapterError) for module in modules}

    def key_of_saved(self, name: str, base: NameIndex) -> str:
        """The key in the base of a whole tensor. Raises AdapterError, naming the file where it is not the adapter's."""
        path = self.saved[name].path
        try:
            return base.require(name, error=AdapterError)
        except CheckpointError as error:
            if path == self._file.path:
                raise
            raise AdapterError(
                f"{path} holds trained weights beside the adapter that do not fit the base: {error} Merge all into "
                "the base with the tool that trained it, or move the file away if it is no part of the model."
            ) from error

    def close(self) -> None:
        """Close the adapter's files."""
        for file in self._extra:
            file.close()
        self._file.close()
        if self._scales is not None:
            self._scales.close()
        if self._initial is not None:
            self._initial.close()


def _is_convolution(roles: Mapping[str, TensorEntry]) -> bool:
    return {"A", "B"} <= set(roles) and len(roles["A"].shape) > 2 and len(roles["B"].shape) == len(roles["A"].shape)


def is_adapter(folder: Path | str) -> bool:
    """Whether the folder holds a PEFT adapter. Raises CheckpointError where it holds a full model too."""
    return kind_of(folder) == "adapter"


def is_one_adapter(source: str | Path) -> bool:
    """Whether a source names one adapter that can be edited as one: LoRA factors on linear layers."""
    value = as_checkpoint(source)
    if value.adapters or not is_adapter(value.base):
        return False
    adapter = LoraAdapter(value.base)
    try:
        return bool(adapter.modules) and adapter.why_not_factors() is None
    finally:
        adapter.close()


def _refuse_unusual(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder} is a {kind!r} adapter; {adapter_kind('other').sentence}")
    unusual = sorted(
        key for key, value in config.items() if key not in _HARMLESS and value not in (None, False, {}, [])
    )
    if unusual:
        raise AdapterError(
            f"{folder}: {unusual[0]} = {config[unusual[0]]!r} changes what the LoRA factors mean and is not handled. "
            "Merge the adapter into its base with PEFT and pass the merged folder."
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith("loftq"):
        raise AdapterError(f"{folder} was initialised with {init!r}, {adapter_kind('loftq').sentence}")
    values = [(key, config.get(key)) for key in ("r", "lora_alpha")]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise AdapterError(f"{folder / CONFIG_FILE}: {name} is {patterns!r}; expected {{module pattern: number}}.")
        values += [(f"{name}[{pattern!r:.80}]", value) for pattern, value in patterns.items()]
    for key, value in values:
        whole = key == "r" or key.startswith("rank_pattern")
        kinds = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= _LARGEST:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {key} is {value!r:.40}; expected a positive number{', whole' * whole} and at "
                f"most {_LARGEST}."
            )
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise AdapterError(f"{folder / CONFIG_FILE}: modules_to_save is {saved!r:.80}; expected a list of names.")
