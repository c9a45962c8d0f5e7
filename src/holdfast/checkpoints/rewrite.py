"""Map a function over the tensors of checkpoints, with a few buffers in memory: read, compute and write overlap.

Every output tensor is either a copy of bytes or the result of a function of input tensors. One thread reads ahead into
reused buffers, the caller's thread computes, one writes, one waits for fsync; nothing of the size of a shard is ever
held. Shapes and types are known beforehand, so each file's header is written first and tensors follow as they come.
"""

from __future__ import annotations

import hashlib
import math
import queue
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from holdfast.checkpoints.adapter_settings import Content, overlay
from holdfast.checkpoints.tensor_file import DTYPE_NAMES, EDITABLE_DTYPES, TORCH_DTYPES, TensorEntry
from holdfast.checkpoints.writer import INPUTS_FILE, PROVENANCE_FILE, Shard, ShardWriter, Staging
from holdfast.errors import CheckpointError, NumericalError
from holdfast.files import storage_error

# Pieces of a plain copy, and the limit between small buffers (many) and large ones (few).
COPY_BYTES = 8 << 20
_SMALL_BUFFERS = 8
# All large read buffers together. Twice the inputs of the largest layer fit whatever this says, to overlap the stages.
BUFFER_BYTES = 384 << 20
_MAX_LARGE_BUFFERS = 8

# Weights in any format, and what a trainer leaves behind: never copied beside an edited checkpoint.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tmp")
_NOT_COPIED = (
    *("README.md", PROVENANCE_FILE, INPUTS_FILE, "edit.json", "verification.json"),
    *("trainer_state.json", "rng_state.pth"),
)
_COPIED_FOLDERS = ("additional_chat_templates",)


class ByteSource(Protocol):
    """Anything that can put a byte range of a named tensor into a buffer (a checkpoint or an adapter)."""

    def read_range(self, key: str, buffer: Tensor, start: int, stop: int) -> Tensor:
        """Bytes start..stop of a tensor at the beginning of `buffer`, (n,) uint8; returns that part of it, (stop -
        start,).
        """
        ...


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor to be read: from where, and its entry there."""

    source: ByteSource
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Copy:
    """The output is the input's bytes. With `compare`, the record says whether they differ from that tensor's."""

    input: Input
    compare: Input | None = None


@dataclass(frozen=True, slots=True)
class Compute:
    """The output is `run(*inputs)`: tensors in their stored types, in buffers that `run` may overwrite.

    `run` returns the output, of the planned type and shape, and a row for the record (or None). It may return one of
    its inputs.
    """

    inputs: tuple[Input, ...]
    run: Callable[..., tuple[Tensor, Mapping[str, Any] | None]]


@dataclass
class RewriteResult:
    """rows: output name -> what its function reported; changed: copied tensors that differ from their comparison."""

    rows: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    resumed_shards: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in the record of one finished shard."""
        self.rows.update(record["rows"])
        self.changed.extend(record["changed"])


def rewrite(
    staging: Staging,
    shards: Sequence[Shard],
    recipe: Mapping[str, Copy | Compute],
    *,
    buffer_bytes: int = BUFFER_BYTES,
    progress: Callable[..., None] | None = None,
) -> RewriteResult:
    """Write every shard that is not finished yet into the staging folder; nothing is published.

    recipe: for each tensor of `shards`, where it comes from. progress: called as progress("tensor", name=, done=,
        total=) after each tensor.

    Raises: what the recipe's functions raise; StorageError: the disk is full; CheckpointError: an input became
        shorter, or a function returned another shape or type than planned. NumericalError: NaN or inf in an output.
    """
    staging.require_space(shards)
    records = {shard.file: staging.finished(shard) for shard in shards}
    todo = [shard for shard in shards if records[shard.file] is None]
    total = sum(len(shard.tensors) for shard in shards)
    resumed = [tensor.name for shard in shards if shard not in todo for tensor in shard.tensors]

    def report(name: str, done: int) -> None:
        if progress is not None:
            progress("tensor", name=name, done=done, total=total)

    for done, name in enumerate(resumed, 1):
        report(name, done)
    if todo:
        with _Pipeline(staging, todo, recipe, buffer_bytes) as pipeline:
            for done, name in enumerate(pipeline.run(records), len(resumed) + 1):
                report(name, done)
    result = RewriteResult(resumed_shards=len(shards) - len(todo))
    for shard in shards:
        record = records[shard.file]
        assert record is not None
        result.add(record)
    return result


@dataclass(slots=True)
class _Step:
    """One piece of work: an edited tensor, or one byte range of a copied one."""

    shard: Shard
    name: str
    what: Copy | Compute
    start: int
    stop: int
    is_first: bool  # of its shard
    is_last: bool  # of its shard
    ends_tensor: bool


class _Pool:
    """A fixed number of buffers of one size; `take` waits for one."""

    def __init__(self, nbytes: int, count: int) -> None:
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(torch.empty(nbytes, dtype=torch.uint8))

    def take(self) -> Tensor:
        buffer = self._free.get()
        if buffer is None:
            self.stop()
            raise CheckpointError("The rewrite was stopped.")
        return buffer

    def give(self, buffer: Tensor) -> None:
        self._free.put(buffer)

    def stop(self) -> None:
        """Whoever waits wakes up and gives up; so does whoever comes later, once the buffers are gone."""
        self._free.put(None)


class _Pipeline:
    def __init__(
        self, staging: Staging, shards: Sequence[Shard], recipe: Mapping[str, Copy | Compute], buffer_bytes: int
    ) -> None:
        self._staging, self._recipe, self._shards = staging, recipe, shards
        self._steps = [step for shard in shards for step in self._cut(shard)]
        sizes = [[i.entry.nbytes for i in _inputs(s)] for s in self._steps if _is_compute(s)]
        large = [size for step in sizes for size in step if size > COPY_BYTES]
        most_small = max((sum(size <= COPY_BYTES for size in step) for step in sizes), default=0)
        most_large = max((sum(size > COPY_BYTES for size in step) for step in sizes), default=0)
        # Untouched pages cost nothing, so small models do not pay for the bounds.
        self._small = _Pool(COPY_BYTES, max(_SMALL_BUFFERS, 2 * most_small))
        largest = max(large, default=0)
        fitting = min(_MAX_LARGE_BUFFERS, buffer_bytes // largest) if largest else 0
        self._large = _Pool(largest, max(2 * most_large, fitting))
        self._read_ahead = _SMALL_BUFFERS
        self._reading = ThreadPoolExecutor(1, "holdfast-read")
        self._writing = ThreadPoolExecutor(1, "holdfast-write")
        self._syncing = ThreadPoolExecutor(1, "holdfast-sync")
        self._writer: ShardWriter | None = None
        self._pending: deque[Future] = deque()

    def _pool(self, nbytes: int) -> _Pool:
        return self._small if nbytes <= COPY_BYTES else self._large

    def _cut(self, shard: Shard) -> Iterator[_Step]:
        pieces: list[tuple[str, Copy | Compute, int, int, bool]] = []
        for tensor in shard.tensors:
            what = self._recipe[tensor.name]
            if isinstance(what, Compute) or tensor.nbytes <= COPY_BYTES:
                pieces.append((tensor.name, what, 0, tensor.nbytes, True))
            else:
                for start in range(0, tensor.nbytes, COPY_BYTES):
                    stop = min(start + COPY_BYTES, tensor.nbytes)
                    pieces.append((tensor.name, what, start, stop, stop == tensor.nbytes))
        for number, (name, what, start, stop, ends) in enumerate(pieces):
            yield _Step(shard, name, what, start, stop, number == 0, number == len(pieces) - 1, ends)

    def run(self, records: dict[str, dict[str, Any] | None]) -> Iterator[str]:
        """Do all steps; fills `records` by shard file and yields the name of each finished tensor."""
        reads: deque[Future] = deque()
        ahead = iter(self._steps)
        rows: dict[str, Any] = {}
        changed: list[str] = []
        for step in self._steps:
            while len(reads) < self._read_ahead and (upcoming := next(ahead, None)) is not None:
                reads.append(self._reading.submit(self._read, upcoming))
            buffers = reads.popleft().result()
            output, row, differs = _perform(step, buffers)
            if row is not None:
                rows[step.name] = dict(row)
            if differs and step.name not in changed:
                changed.append(step.name)
            record = None
            if step.is_last:
                record = records[step.shard.file] = {"rows": rows, "changed": changed}
                rows, changed = {}, []
            self._release(b for b in buffers if not _holds(b, output))
            held = [b for b in buffers if _holds(b, output)]
            self._pending.append(self._writing.submit(self._write, step, output, held, record))
            while self._pending and self._pending[0].done():
                self._pending.popleft().result()
            if step.ends_tensor:
                yield step.name
        for pool in (self._writing, self._syncing):
            # A finished write may have queued an fsync, so the writes come first.
            pool.shutdown(wait=True)
            while self._pending and self._pending[0].done():
                self._pending.popleft().result()

    def _read(self, step: _Step) -> list[Tensor]:
        buffers: list[Tensor] = []
        try:
            for source in _inputs(step):
                start, stop = (0, source.entry.nbytes) if _is_compute(step) else (step.start, step.stop)
                buffers.append(self._pool(stop - start).take())
                source.source.read_range(source.entry.name, buffers[-1], start, stop)
        except BaseException:
            self._release(iter(buffers))
            raise
        return buffers

    def _release(self, buffers: Iterator[Tensor]) -> None:
        for buffer in buffers:
            self._pool(buffer.numel()).give(buffer)

    def _write(self, step: _Step, output: Tensor, held: list[Tensor], record: dict[str, Any] | None) -> None:
        try:
            if step.is_first:
                self._writer = self._staging.open_shard(step.shard)
            assert self._writer is not None
            self._writer.write(output)
            if record is not None:
                self._pending.append(self._syncing.submit(self._finish, self._writer, step.shard, record))
                self._writer = None
        finally:
            self._release(iter(held))

    def _finish(self, writer: ShardWriter, shard: Shard, record: dict[str, Any]) -> None:
        writer.finish()
        self._staging.mark(shard, record)

    def __enter__(self) -> _Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self._small.stop()
        self._large.stop()
        for pool in (self._reading, self._writing):
            pool.shutdown(wait=True, cancel_futures=True)
        # Whole shards that only wait for their fsync are worth keeping, so these are never cancelled.
        self._syncing.shutdown(wait=True)
        if self._writer is not None:
            self._writer.discard()


def _inputs(step: _Step) -> tuple[Input, ...]:
    if isinstance(step.what, Compute):
        return step.what.inputs
    return (step.what.input,) if step.what.compare is None else (step.what.input, step.what.compare)


def _is_compute(step: _Step) -> bool:
    return isinstance(step.what, Compute)


def _perform(step: _Step, buffers: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Any] | None, bool]:
    """The bytes to write, the row of an edit, and whether a copy differs from its comparison."""
    if isinstance(step.what, Copy):
        size = step.stop - step.start
        piece, entry = buffers[0][:size], step.what.input.entry
        if entry.dtype in EDITABLE_DTYPES and not _is_finite(piece.view(TORCH_DTYPES[entry.dtype])):
            raise NumericalError(
                f"{step.name} holds NaN or inf in {entry.path}, and would be copied into the result as it is: that "
                "checkpoint is damaged, or the training that made it diverged. Nothing was published."
            )
        return piece, None, len(buffers) > 1 and not _equal_bytes(piece, buffers[1][:size])
    tensors = [
        buffer[: source.entry.nbytes].view(source.entry.torch_dtype).view(source.entry.shape)
        for buffer, source in zip(buffers, step.what.inputs, strict=True)
    ]
    output, row = step.what.run(*tensors)
    raw = output.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() != step.stop:
        raise CheckpointError(
            f"The edit of {step.name} returned {output.dtype} {tuple(output.shape)}, {raw.numel()} bytes; the plan "
            f"has {step.stop} bytes for it."
        )
    if DTYPE_NAMES.get(output.dtype) in EDITABLE_DTYPES and not _is_finite(output):
        raise NumericalError(
            f"{step.name} would be written with NaN or inf: an input holds them, or the result is too large for "
            f"{output.dtype}. Nothing was published."
        )
    return raw, row, False


def _is_finite(values: Tensor) -> bool:
    """Extremes show both: aminmax hands NaN on, and needs a thirtieth of the time of `isfinite` in bf16."""
    return values.numel() == 0 or all(math.isfinite(extreme) for extreme in values.aminmax())


def _equal_bytes(a: Tensor, b: Tensor) -> bool:
    if a.numel() % 8 == 0:
        # Eight bytes at a time; buffers are aligned far beyond that.
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def _holds(buffer: Tensor, output: Tensor) -> bool:
    return buffer.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()


def copy_side_files(source: Path, target: Path, adapters: Sequence[Path] = ()) -> list[str]:
    """Copy configuration, tokenizer and processor files (everything but weights); returns their names, sorted.

    adapters: folders whose tokenizer, template and processor win over those of `source`.

    Raises: StorageError: the target cannot be written.
    """
    return copy_contents(side_contents(source, adapters), target)


def copy_contents(contents: Mapping[str, Content], target: Path) -> list[str]:
    """Write files and contents by their names into a folder; returns the names, sorted.

    Raises: StorageError: the target cannot be written.
    """
    names = []
    for name, content in sorted(contents.items()):
        if isinstance(content, bytes):
            _copy(lambda c=content, n=name: (target / n).write_bytes(c), target)  # type: ignore[misc]
            names.append(name)
        elif content.is_dir():
            _copy(lambda p=content: shutil.copytree(p, target / p.name, dirs_exist_ok=True), target)  # type: ignore[misc]
            names.append(f"{name}/")
        else:
            _copy(lambda p=content: shutil.copyfile(p, target / p.name), target)  # type: ignore[misc]
            names.append(name)
    return names


def hash_side_files(source: Path, adapters: Sequence[Path] = ()) -> dict[str, str]:
    """sha256 of each file that `copy_side_files` would copy, by its path within the folder."""
    return hash_contents(side_contents(source, adapters))


def hash_contents(contents: Mapping[str, Content]) -> dict[str, str]:
    """sha256 of each file of `contents`, by its path within the folder."""
    found = {}
    for name, content in sorted(contents.items()):
        if isinstance(content, bytes):
            found[name] = hashlib.sha256(content).hexdigest()
            continue
        for file in sorted(content.rglob("*")) if content.is_dir() else [content]:
            if file.is_file():
                found[str(file.relative_to(content.parent))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def side_contents(source: Path, adapters: Sequence[Path] = ()) -> dict[str, Content]:
    """name -> file, folder or content, of everything beside the weights."""
    return overlay({path.name: path for path in _side_files(source)}, adapters)


def _side_files(source: Path) -> list[Path]:
    return [
        path
        for path in sorted(source.iterdir())
        if (path.name in _COPIED_FOLDERS if path.is_dir() else path.is_file() and not _left_behind(path.name))
    ]


def _copy(action: Callable[[], Any], target: Path) -> None:
    try:
        action()
    except OSError as error:
        raise storage_error(error, target) from error


def _left_behind(name: str) -> bool:
    return (
        name.startswith(".")
        or name in _NOT_COPIED
        or name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))
        or name.startswith(("events.out", "optimizer", "scheduler"))
    )
