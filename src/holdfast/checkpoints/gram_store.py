"""Gram matrices on disk, one file per distinct layer input: what an edit needs that a diagonal cannot tell it.

    FOLDER/provenance.json          of what these are: model, samples, tokens; written before the first matrix
    FOLDER/<first module>.safetensors   `lower`: fp32, (c (c + 1) / 2,), rows of the lower triangle one after another
    FOLDER/index.json               written last: every file with its modules, block, width, counts and sha256

H is the mean of 2 x x^T per token. The matrices of a 7B model take 11 GB here and 22 GB unpacked, so nobody holds them
together: a walk writes one as it is finished, an edit reads one layer's at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast.errors import CalibrationError
from holdfast.files import atomic_path, parse_json, read_json, sha256, write_json
from holdfast.functional.factorize import ieee_matmul

if TYPE_CHECKING:
    from holdfast.calibration.grams import LayerGram
    from holdfast.functional.hessian import InputGram

FORMAT_VERSION = 1
INDEX_FILE, PROVENANCE_FILE = "index.json", "provenance.json"
_METADATA_KEY = "holdfast"
# Rows of a triangle that are packed at a time.
_TILE = 512


@dataclass(frozen=True, kw_only=True)
class GramInput:
    """One distinct input: its file, the modules that read it, its width c, and how much was seen."""

    file: str
    modules: tuple[str, ...]
    block: int
    width: int
    sequences: int
    tokens: int
    sha256: str

    @property
    def leader(self) -> str:
        """The layer that the matrix is stored under; the others that share its input point to it."""
        return self.modules[0]


@dataclass(frozen=True)
class GramStore:
    """The finished Gram matrices of one model on one set of samples.

    meta: what they are of, as plain data, fingerprints among it. block_count: decoder blocks of the model.
    """

    folder: Path
    inputs: tuple[GramInput, ...]
    meta: Mapping[str, Any]
    block_count: int
    _by_module: dict[str, GramInput] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise CalibrationError(f"{self.folder} holds no Gram matrix; calibrate with at least one layer.")
        for entry in self.inputs:
            for module in entry.modules:
                if self._by_module.setdefault(module, entry) is not entry:
                    raise CalibrationError(f"{self.folder} names {module} twice; calibrate again.")

    @classmethod
    def open(cls, folder: Path | str, *, expected: Mapping[str, Any] | None = None) -> GramStore:
        """What a `GramWriter` finished. expected: the meta that it must have.

        Raises: CalibrationError: nothing there, unfinished, of another format, damaged, or not what is expected: it
            says which part differs.
        """
        folder = Path(folder)
        if not (folder / INDEX_FILE).is_file():
            state = "is unfinished" if (folder / PROVENANCE_FILE).is_file() else "does not exist or is no Gram store"
            raise CalibrationError(f"{folder} {state}: it has no {INDEX_FILE}. Calibrate (again) into this folder.")
        data = _read_json(folder / INDEX_FILE)
        if data.get("format_version") != FORMAT_VERSION:
            raise CalibrationError(
                f"{folder} has Gram store format {data.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
                "calibrate again."
            )
        try:
            inputs = tuple(GramInput(**{**row, "modules": tuple(row["modules"])}) for row in data["inputs"])
            store = cls(folder, inputs, data["meta"], data["block_count"])
        except (KeyError, TypeError) as error:
            raise CalibrationError(f"{folder / INDEX_FILE} cannot be read ({error}); calibrate again.") from error
        if expected is not None:
            require_same(store.meta, expected, folder)
        return store

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the layers as in memory, in block order."""
        return tuple(sorted(self._by_module, key=lambda name: (self._by_module[name].block, name)))

    @property
    def blocks(self) -> dict[str, int]:
        """Layer -> 0-based index of its decoder block."""
        return {name: self._by_module[name].block for name in self.modules}

    def entry(self, module: str) -> GramInput:
        """Raises CalibrationError: the store does not have the layer."""
        found = self._by_module.get(module)
        if found is None:
            raise CalibrationError(
                f"The Gram matrices in {self.folder} have no layer {module}: they are of another model, or were made "
                "for an adapter that does not change it. Calibrate again."
            )
        return found

    def gram(self, module: str) -> Float[Tensor, "c c"]:
        """The Gram matrix of the input of `module`, fp32, both triangles; a new tensor.

        Raises: CalibrationError: no such layer, a file that is missing, damaged, another's, or holds NaN or inf.
        """
        entry = self.entry(module)
        path = self.folder / entry.file
        if not path.is_file():
            raise CalibrationError(f"{path} is gone; calibrate again.")
        if _sha256(path) != entry.sha256:
            raise CalibrationError(f"{path} was changed or damaged since it was written; calibrate again.")
        lower, _ = _read(path)
        wanted = entry.width * (entry.width + 1) // 2
        if lower.shape != (wanted,) or lower.dtype != torch.float32:
            raise CalibrationError(
                f"{path} holds {lower.dtype} of shape {tuple(lower.shape)}; expected float32 ({wanted},), the lower "
                f"triangle of ({entry.width}, {entry.width}). Calibrate again."
            )
        if not bool(torch.isfinite(lower).all()):
            raise CalibrationError(f"{path} holds NaN or infinities: an activation overflowed. Calibrate again.")
        return unpack(lower, entry.width)

    def digest(self) -> str:
        """sha256 over modules and contents: stores with one digest edit alike."""
        rows = sorted([*entry.modules, entry.sha256] for entry in self.inputs)
        return hashlib.sha256(json.dumps([self.block_count, rows]).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens that the matrices are sums over."""
        return self.inputs[0].tokens


class GramWriter:
    """Consumer of a calibration walk that puts each layer's Gram into its file and lets go of it.

    A folder that a killed walk left is taken up: `finished` are the layers that need not be walked again. The same walk
    gives the same bytes.

    Raises: CalibrationError: the folder holds Gram matrices of something else.
    """

    def __init__(self, folder: Path | str, meta: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.meta = json.loads(json.dumps(meta))
        self._inputs: dict[str, GramInput] = {}
        self._block_count = 0
        path = self.folder / PROVENANCE_FILE
        if path.is_file():
            require_same(_read_json(path), self.meta, self.folder)
            for file in sorted(self.folder.glob("*.safetensors")):
                self._take_up(file)
        else:
            write_json(path, self.meta)

    @property
    def finished(self) -> set[str]:
        """Layers whose Gram is on disk."""
        return {module for entry in self._inputs.values() for module in entry.modules}

    @staticmethod
    def workspace_bytes(widest: int) -> int:
        """What writing one matrix of that width needs beside it: the packed triangle, and a tile."""
        return 2 * widest * (widest + 1) + 8 * _TILE * widest

    def __call__(self, layer: LayerGram) -> None:
        self.write(
            layer.modules,
            pack(layer.gram),
            block=layer.block,
            block_count=layer.block_count,
            width=layer.gram.in_features,
            sequences=layer.gram.sequences,
            tokens=layer.gram.tokens,
        )

    def write(self, modules: Sequence[str], lower: Float[Tensor, " t"], *, block_count: int, **counts: int) -> None:
        """One packed triangle. Raises CalibrationError: NaN or inf in it."""
        if not bool(torch.isfinite(lower).all()):
            raise CalibrationError(
                f"The Gram matrix of {modules[0]} holds NaN or infinities: an activation overflowed. Run the model in "
                "float32 or bfloat16, and check its weights."
            )
        path = self.folder / f"{modules[0]}.safetensors"
        record = {"modules": list(modules), "block_count": block_count, **counts}
        text = json.dumps({"format_version": FORMAT_VERSION, **record}, sort_keys=True)
        with atomic_path(path) as temporary:
            save_file({"lower": lower.to("cpu", torch.float32).contiguous()}, temporary, {_METADATA_KEY: text})
        self._note(path, record)

    def finish(self) -> GramStore:
        """Write the index; the store is there from now on."""
        inputs = sorted(self._inputs.values(), key=lambda entry: (entry.block, entry.leader))
        data = {
            "format_version": FORMAT_VERSION,
            "meta": self.meta,
            "block_count": self._block_count,
            "inputs": [asdict(entry) for entry in inputs],
        }
        write_json(self.folder / INDEX_FILE, data)
        return GramStore.open(self.folder)

    def _take_up(self, file: Path) -> None:
        try:
            _, record = _read(file, tensor=False)
        except CalibrationError:
            file.unlink()  # atomic writes leave none; whatever it is, the walk makes it again
            return
        self._note(file, record)

    def _note(self, path: Path, record: Mapping[str, Any]) -> None:
        values = {key: record[key] for key in ("block", "width", "sequences", "tokens")}
        entry = GramInput(file=path.name, modules=tuple(record["modules"]), sha256=_sha256(path), **values)
        self._inputs[entry.leader] = entry
        self._block_count = record["block_count"]


def running_mean(past: GramStore | None, new: GramStore, out: Path | str, meta: Mapping[str, Any]) -> GramStore:
    """The mean of the Grams of several steps, one matrix at a time: (n past + new) / (n + 1), n the `steps` of `past`.

    Every step counts alike, however many tokens it had. meta: of the result; its `steps` is written here.
    Raises: CalibrationError: the two are of other layers or widths.
    """
    steps = 0 if past is None else int(past.meta.get("steps", 1))
    writer = GramWriter(out, {**meta, "steps": steps + 1})
    if past is not None and set(past.modules) != set(new.modules):
        odd = sorted(set(past.modules) ^ set(new.modules))[0]
        raise CalibrationError(
            f"The Gram matrices of earlier tasks ({past.folder}) and of this one ({new.folder}) are of other layers: "
            f"{odd} is in one of them only. Train every task of a stream with an adapter on the same layers."
        )
    for entry in new.inputs:
        if entry.leader in writer.finished:
            continue
        lower = _lower(new, entry.leader)
        if past is not None:
            earlier = past.entry(entry.leader)
            if earlier.width != entry.width:
                raise CalibrationError(
                    f"{entry.leader} has {earlier.width} inputs in {past.folder} and {entry.width} in {new.folder}; "
                    "the past is of another model."
                )
            # fp32 weights sum to 1: a mean of hundreds of steps loses nothing that matters to a damped solve.
            lower = lower.mul_(1 / (steps + 1)).add_(_lower(past, entry.leader), alpha=steps / (steps + 1))
        writer.write(
            entry.modules,
            lower,
            block=entry.block,
            block_count=new.block_count,
            width=entry.width,
            sequences=entry.sequences,
            tokens=entry.tokens,
        )
    return writer.finish()


def pack(gram: InputGram) -> Float[Tensor, " t"]:
    """Rows of the lower triangle of H, fp32, c (c + 1) / 2 numbers; without a second (c, c) matrix."""
    state, scale, c = gram.state(), gram.scale, gram.in_features
    device = state.lower.device if state.lower is not None else gram.device
    out = torch.empty(c * (c + 1) // 2, dtype=torch.float32, device=device)
    for rows, mask, place in _triangle(c, device):
        if state.lower is not None:
            tile = state.lower[rows, : rows.stop]
        else:
            assert state.rows is not None
            with ieee_matmul():
                tile = state.rows[:, rows].to(gram.dtype).T @ state.rows[:, : rows.stop].to(gram.dtype)
        out[place] = (tile[mask] * scale).to(torch.float32)
    return out


def unpack(lower: Float[Tensor, " t"], width: int) -> Float[Tensor, "c c"]:
    """The full symmetric matrix of a packed lower triangle, in its dtype."""
    full = torch.empty(width, width, dtype=lower.dtype, device=lower.device)
    for rows, mask, place in _triangle(width, lower.device):
        full[rows, : rows.stop][mask] = lower[place]
        full[: rows.start, rows] = full[rows, : rows.start].T
        corner = full[rows, rows]
        full[rows, rows] = torch.tril(corner) + torch.tril(corner, -1).T
    return full


def require_same(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    """Raises CalibrationError that names what differs between what a store is of and what is asked for."""
    expected = json.loads(json.dumps(expected))
    differing = [f"{key} (found {_show(a)}, expected {_show(b)})" for key, a, b in _differences(found, expected)]
    if differing:
        raise CalibrationError(
            f"{folder} holds Gram matrices of something else: {'; '.join(differing[:3])}. Calibrate into another "
            "folder, or remove this one."
        )


def _differences(found: Any, expected: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for name in sorted(set(found) | set(expected)):
            yield from _differences(found.get(name), expected.get(name), f"{key}.{name}" if key else name)
    elif found != expected:
        yield key, found, expected


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _triangle(width: int, device: torch.device | None) -> Iterable[tuple[slice, Tensor, slice]]:
    """Tiles of rows: the rows, which of their entries are on or below the diagonal, where those lie when packed."""
    for start in range(0, width, _TILE):
        stop = min(width, start + _TILE)
        mask = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril_(start)
        yield slice(start, stop), mask, slice(start * (start + 1) // 2, stop * (stop + 1) // 2)


def _lower(store: GramStore, module: str) -> Tensor:
    entry = store.entry(module)
    path = store.folder / entry.file
    if not path.is_file() or _sha256(path) != entry.sha256:
        raise CalibrationError(f"{path} is gone, or was changed since it was written; calibrate again.")
    return _read(path)[0]


def _read(path: Path, *, tensor: bool = True) -> tuple[Tensor, Mapping[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY, "null")
            record = parse_json(text, f"The metadata of {path}", error=CalibrationError)
            lower = file.get_tensor("lower") if tensor else torch.empty(0)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is no readable Gram matrix ({error}); calibrate again.") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise CalibrationError(f"{path} is no Gram matrix of this version; calibrate again.")
    return lower, record


def _read_json(path: Path) -> Any:
    try:
        data = read_json(path, "the record of Gram matrices", error=CalibrationError)
    except (OSError, CalibrationError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}); calibrate again.") from error
    if not isinstance(data, dict):
        raise CalibrationError(f"{path} holds no JSON object; calibrate again.")
    return data


def _sha256(path: Path) -> str:
    digest: str = sha256(path).hexdigest()
    return digest


__all__ = ["FORMAT_VERSION", "GramInput", "GramStore", "GramWriter", "pack", "require_same", "running_mean", "unpack"]
