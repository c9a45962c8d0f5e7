"""A checkpoint folder that appears whole or not at all, and that a killed run takes up where it stopped.

Beside OUT a folder `.OUT.partial` grows: `plan.json` (what is being written, by hash), `folder/` (what will become
OUT) and `marks/` (one file per finished shard, written after the shard's fsync). Publishing is one rename of `folder/`
to OUT. Started again with the same plan and input files, finished shards are kept; with others, nothing is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.checkpoints.reader import read_json
from holdfast.checkpoints.tensor_file import TORCH_DTYPES
from holdfast.errors import CheckpointError, HoldfastError, StorageError
from holdfast.files import Lock, fsync, fsync_folder, storage_error, write_json

DEFAULT_SHARD_BYTES = 256 << 20
PROVENANCE_FILE = "holdfast.json"
# Size and time of the input files. Apart from the provenance: the times are this machine's, the rest is not.
INPUTS_FILE = "inputs.json"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """Name, element type (the header's name for it) and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be written: its tensors in the order of their bytes, and the header that says so."""

    file: str
    tensors: tuple[OutputTensor, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes, header included."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def plan_shards(tensors: Sequence[OutputTensor], *, shard_bytes: int, stem: str = "model") -> tuple[Shard, ...]:
    """Cut tensors, in order, into files of at most `shard_bytes` of data each; a larger tensor gets its own file.

    Raises: CheckpointError: `shard_bytes` is not positive.
    """
    if shard_bytes <= 0:
        raise CheckpointError(f"shard_bytes is {shard_bytes}; expected a positive number of bytes.")
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if not groups[0]:
        raise CheckpointError("There is no tensor to write.")
    single = len(groups) == 1
    shards = []
    for number, group in enumerate(groups, 1):
        # Wide elements first, so that every tensor starts at a multiple of its element size.
        ordered = tuple(sorted(group, key=lambda t: -_itemsize(t.dtype)))
        file = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(Shard(file, ordered, _header(ordered)))
    return tuple(shards)


def _itemsize(dtype: str) -> int:
    return TORCH_DTYPES[dtype].itemsize if dtype in TORCH_DTYPES else 1


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    items: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        items[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(items, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_index(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`, as transformers writes it."""
    return {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.tensors)},
        "weight_map": {t.name: shard.file for shard in shards for t in shard.tensors},
    }


class ShardWriter:
    """Appends bytes to a temporary file; `finish` makes it durable and gives it its name."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._path, self._expected = path, shard.nbytes
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._written = 0
        try:
            self._handle: int | None = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise storage_error(error, path) from error
        self._write(memoryview(shard.header))

    def write(self, piece: Tensor) -> None:
        """Append the bytes of a contiguous uint8 tensor.

        Raises: StorageError: the disk is full; the temporary file is removed.
        piece: (n,) uint8.
        """
        self._write(memoryview(piece.numpy()))  # type: ignore[arg-type]

    def _write(self, view: memoryview) -> None:
        assert self._handle is not None
        done = 0
        try:
            while done < len(view):
                done += os.write(self._handle, view[done : done + (1 << 30)])
        except OSError as error:
            self.discard()
            raise storage_error(error, self._path) from error
        self._written += len(view)

    def finish(self) -> None:
        """fsync, check the length, rename.

        Raises: CheckpointError: more or fewer bytes were written than planned. StorageError: the disk is full.
        """
        assert self._handle is not None
        if self._written != self._expected:
            self.discard()
            raise CheckpointError(f"{self._path}: wrote {self._written} bytes where {self._expected} were planned.")
        try:
            fsync(self._handle)
            os.close(self._handle)
            self._handle = None
            self._temporary.replace(self._path)
            fsync_folder(self._path.parent)
        except OSError as error:
            self.discard()
            raise storage_error(error, self._path) from error

    def discard(self) -> None:
        """Close and remove the temporary file: it would only hold space that the next attempt needs."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self._temporary.unlink(missing_ok=True)


class Staging:
    """The partial folder of one OUT and one plan.

    plan: plain data that decides every byte of the result (inputs by fingerprint, rule, options, layout).
    inputs: `file_stamps` of every file that is read, kept as `inputs.json`: a fingerprint does not see all bytes.

    Raises: StorageError: OUT exists, a partial of another plan is in the way, the input files have changed since,
        another process writes it.
    """

    def __init__(
        self, out: Path, plan: Mapping[str, Any], *, inputs: Mapping[str, Mapping[str, int]] | None = None
    ) -> None:
        # A rename onto a link would fail, after all the work.
        self.out = out = out.resolve()
        self._inputs = None if inputs is None else {name: dict(stamp) for name, stamp in inputs.items()}
        self.plan_hash = hash_plan(plan)
        self.root = out.parent / f".{out.name}.partial"
        self.folder = self.root / "folder"
        self._marks = self.root / "marks"
        self._lock: Lock | None = None
        self.already_published = self._check_out(plan)
        if not self.already_published:
            self._open(plan)

    def _check_out(self, plan: Mapping[str, Any]) -> bool:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        provenance = self.out / PROVENANCE_FILE
        found = read_json(provenance, "a provenance record") if provenance.is_file() else {}
        if found.get("plan_hash") == self.plan_hash:
            self._require_same_inputs(self.out, self.out)
            # Killed after the rename and before the end, or simply asked for twice.
            shutil.rmtree(self.root, ignore_errors=True)
            return True
        why = f" ({_difference(found, plan)})" if "plan" in found else ""
        raise StorageError(f"{self.out} exists and is not this edit's result{why}. Choose another --out, or remove it.")

    def _require_same_inputs(self, folder: Path, result: Path) -> None:
        """Raise StorageError where the files that `folder` was made from are not those of now; without a record, pass.

        result: what to remove to start over.
        """
        path = folder / INPUTS_FILE
        if self._inputs is None or not path.is_file():
            return
        found = read_json(path, "the record of input files")
        changed = sorted(name for name in {*found, *self._inputs} if found.get(name) != self._inputs.get(name))
        if changed:
            old, new = (stamps.get(changed[0]) for stamps in (found, self._inputs))
            raise StorageError(
                f"{result} was made from files that have been written since, or from copies of them: {changed[0]} "
                f"({len(changed)} of {len({*found, *self._inputs})}) was {_stamp(old)} and is {_stamp(new)}. To edit "
                f"what is there now, remove {result} or choose another --out. Where you know that the weights are the "
                f"same (copied with `cp -r`, downloaded again), remove {path} to keep what was done."
            )

    def _open(self, plan: Mapping[str, Any]) -> None:
        try:
            self._marks.mkdir(parents=True, exist_ok=True)
            lock = self.root / "lock"
            self._lock = Lock(lock, busy=f"Another process is writing {self.out} (it holds {lock}).")
            # A process killed within an atomic write leaves its temporary file, which would be published.
            for left_over in (*self.root.glob("*.tmp"), *self.root.glob("*/*.tmp")):
                left_over.unlink()
            recorded = self.root / "plan.json"
            self.folder.mkdir(exist_ok=True)
            if recorded.exists():
                found = read_json(recorded, "the plan of a partial result")
                if found.get("plan_hash") != self.plan_hash:
                    raise StorageError(
                        f"{self.root} holds an unfinished result of other inputs or options ({_difference(found, plan)}"
                        "). Repeat that command to finish it, remove the folder, or choose another --out."
                    )
                self._require_same_inputs(self.folder, self.root)
            if self._inputs is not None:
                write_json(self.folder / INPUTS_FILE, self._inputs)
            write_json(recorded, {"plan_hash": self.plan_hash, "plan": dict(plan)})
        except OSError as error:
            self.release()
            raise storage_error(error, self.root) from error
        except StorageError:
            self.release()
            raise

    def finished(self, shard: Shard) -> dict[str, Any] | None:
        """What was recorded with a shard that an earlier run finished, or None."""
        mark = self._marks / f"{shard.file}.json"
        path = self.folder / shard.file
        if not mark.is_file() or not path.is_file() or path.stat().st_size != shard.nbytes:
            return None
        return read_json(mark, "the mark of a finished shard")

    def open_shard(self, shard: Shard) -> ShardWriter:
        """A writer of `shard` in the folder that is not published yet."""
        return ShardWriter(self.folder / shard.file, shard)

    def mark(self, shard: Shard, record: Mapping[str, Any]) -> None:
        """Note that a shard is on disk; `record` comes back from `finished` after a crash."""
        write_json(self._marks / f"{shard.file}.json", dict(record))

    def require_space(self, shards: Sequence[Shard]) -> None:
        """Raise StorageError when the disk cannot hold the shards that are still to be written."""
        needed = sum(shard.nbytes for shard in shards if self.finished(shard) is None)
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise StorageError(
                f"{self.out} needs {needed / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB left; nothing was "
                "written. Free some space or choose an --out on another disk."
            )

    def publish(self) -> None:
        """Rename the folder to OUT; the partial's remains go.

        Raises: StorageError: the folder cannot be renamed or made durable.
        """
        try:
            for path in (self.folder, *self.folder.rglob("*")):
                if path.is_dir():
                    fsync_folder(path)
                    continue
                with path.open("rb") as file:
                    fsync(file.fileno())
            self.folder.rename(self.out)
            fsync_folder(self.out.parent)
        except OSError as error:
            raise storage_error(error, self.out) from error
        self.release()
        shutil.rmtree(self.root, ignore_errors=True)

    def release(self) -> None:
        """Give up the lock; what is finished stays for the next run."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def kept(self) -> str:
        """A sentence about what a failure leaves behind."""
        done = sum(1 for _ in self._marks.glob("*.json")) if self._marks.is_dir() else 0
        if not done:
            return "Nothing was kept."
        return f"{done} finished file(s) are kept in {self.root}, and the same command goes on from there."

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        held = self._lock is not None
        if held and isinstance(error, HoldfastError) and not any(self._marks.glob("*.json")):
            # Nothing in it can be gone on from: it would only be in the way, and take space.
            shutil.rmtree(self.root, ignore_errors=True)
        self.release()


def hash_plan(plan: Mapping[str, Any]) -> str:
    """sha256 of a plan's canonical JSON."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _stamp(stamp: Mapping[str, int] | None) -> str:
    if stamp is None:
        return "no part of it"
    changed = datetime.fromtimestamp(stamp["mtime_ns"] / 1e9, UTC)
    return f"{stamp['bytes']} bytes of {changed:%Y-%m-%d %H:%M:%S} UTC"


def _difference(found: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    old = found.get("plan", {})
    names = sorted(key for key in {*old, *plan} if old.get(key) != plan.get(key))
    return "differs in " + ", ".join(names) if names else "its plan is unreadable"
