"""One safetensors file: its header, and reads of single tensors into memory that the caller owns.

The format is 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
It is parsed here, not through `safe_open`, because an edit streams: a read into a reused buffer runs at disk speed,
a fresh tensor per read at a fifth of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holdfast.errors import CheckpointError, HoldfastError
from holdfast.files import open_regular, parse_json
from holdfast.text import one_line

# https://github.com/huggingface/safetensors: names of element types in a header.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
EDITABLE_DTYPES = ("F16", "BF16", "F32", "F64")

# A header holds names and numbers only; the safetensors library refuses more than this too.
_MAX_HEADER_BYTES = 100_000_000
# The largest published checkpoints have 200,000 tensors in all their files together.
MAX_TENSORS = 250_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: file, byte range, element type (the header's name for it) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its type in torch.

        Raises: CheckpointError: an element type that torch has no name for.
        """
        dtype = TORCH_DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.name} in {self.path} has element type {self.dtype}, which cannot be read.")
        return dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return self.nbytes // self.numel if self.numel else 1


class _HeaderError(HoldfastError):
    """A header that is no usable JSON."""


def _require_seamless(entries: Iterable[TensorEntry], start: int) -> None:
    """Raise ValueError where two tensors share bytes, or some bytes belong to none. entries: by their offset."""
    at, last = start, "the header"
    for entry in entries:
        if entry.offset < at and entry.nbytes:
            raise ValueError(f"{entry.name} and {last} share bytes")
        if entry.offset > at:
            raise ValueError(f"{entry.offset - at} bytes between {last} and {entry.name} belong to no tensor")
        at, last = max(at, entry.offset + entry.nbytes), entry.name


class TensorFile:
    """A safetensors file opened for reading; the header is checked against the file's real size at once.

    As the format asks, tensors lie one after another, without a gap or an overlap, and no name stands twice.

    Raises: CheckpointError: missing, no safetensors file, or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle: int | None = open_regular(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; download or copy the checkpoint again.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
        try:
            self.entries, self.metadata, self.data_start = self._parse()
        except BaseException:
            self.close()
            raise

    def _parse(self) -> tuple[dict[str, TensorEntry], dict[str, str], int]:
        assert self._handle is not None
        size = os.fstat(self._handle).st_size
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little") if size >= 8 else -1
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path} ({size} bytes) is not a safetensors file: its first 8 bytes are no header length."
            )
        if size < 8 + length:
            raise self._truncated(8 + length, size)
        try:
            raw = os.pread(self._handle, length, 8)
            if raw.count(b"data_offsets") > MAX_TENSORS:
                raise ValueError(f"it describes more than {MAX_TENSORS} tensors")
            header = parse_json(raw, "it", error=_HeaderError, unique=True)
            metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
            entries = {name: self._entry(name, item, 8 + length) for name, item in header.items()}
            entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
            _require_seamless(entries.values(), 8 + length)
        except (ValueError, KeyError, TypeError, AttributeError, _HeaderError) as error:
            raise CheckpointError(
                f"{self.path} has a damaged safetensors header: {one_line(str(error), 300)}. Copy or download it again."
            ) from error
        end = max((e.offset + e.nbytes for e in entries.values()), default=8 + length)
        if size != end:
            raise self._truncated(end, size)
        return entries, metadata, 8 + length

    def _entry(self, name: str, item: dict, data_start: int) -> TensorEntry:
        kind, shape, (start, stop) = item["dtype"], item["shape"], item["data_offsets"]
        shown = f"{name} of {kind!r:.40} {shape!r:.80}"
        if not isinstance(kind, str) or not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"{shown} has no element type and whole sizes")
        if type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
            raise ValueError(f"{shown} cannot take bytes {start!r:.40} to {stop!r:.40}")
        entry = TensorEntry(name, kind, tuple(shape), self.path, data_start + start, stop - start)
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is not None and entry.numel * dtype.itemsize != entry.nbytes:
            raise ValueError(f"{shown} cannot take bytes {start} to {stop}")
        return entry

    def _truncated(self, expected: int, size: int) -> CheckpointError:
        what = "truncated" if size < expected else "longer than its header says"
        return CheckpointError(
            f"{self.path} is {what}: it has {size} bytes, its header describes {expected}. Copy or download it again."
        )

    def read_into(self, entry: TensorEntry, buffer: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Bytes start..stop of a tensor into the beginning of a uint8 `buffer`; returns that part of the buffer.

        buffer: (n,) uint8, n >= stop - start. Returns: (stop - start,), a view of it.

        Raises: CheckpointError: the file was closed, or ends before the tensor does.
        """
        stop = entry.nbytes if stop is None else stop
        target = buffer[: stop - start]
        view = memoryview(target.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            if self._handle is None:
                raise CheckpointError(f"{self.path} was closed while it was read.")
            # A single system call moves at most 2 GiB.
            got = os.preadv(self._handle, [view[done : done + (1 << 30)]], entry.offset + start + done)
            if got == 0:
                raise CheckpointError(f"{self.path} became shorter while {entry.name} was read; is it being written?")
            done += got
        return target

    def read(self, entry: TensorEntry, buffer: Tensor | None = None) -> Tensor:
        """The tensor in its stored type; in `buffer` (uint8, at least `entry.nbytes`) when given, else freshly made.

        Of the stored shape, (out, in) for a linear. buffer: (n,).
        """
        if buffer is None:
            buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        return self.read_into(entry, buffer).view(entry.torch_dtype).view(entry.shape)

    def close(self) -> None:
        """Close the file; once closed it stays so."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()
