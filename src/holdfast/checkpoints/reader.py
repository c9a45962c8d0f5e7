"""Tensors of a checkpoint folder by name, lazily, over a single safetensors file or an index of shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from holdfast import files
from holdfast.checkpoints.contents import INDEX_FILE, PICKLED_ADAPTER, PICKLED_MODELS, SINGLE_FILE, TUNER_FILE
from holdfast.checkpoints.naming import NameIndex, strip_wrappers
from holdfast.checkpoints.tensor_file import TensorEntry, TensorFile
from holdfast.errors import CheckpointError

_PICKLES = (*PICKLED_MODELS, PICKLED_ADAPTER)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: CheckpointError: no such file, no ordinary one, not JSON, a key that stands twice, or not an object.
    """
    try:
        value = files.read_json(path, what, error=CheckpointError, unique=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected {what}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected {what}, a JSON object.")
    return value


def has_wrapped_names(folder: Path) -> bool:
    """Whether a folder's weights have a wrapper's names in them; False where they cannot be read."""
    try:
        with CheckpointReader(folder) as reader:
            return reader.wrapped
    except CheckpointError:
        return False  # whoever loads it says what is wrong


class CheckpointReader:
    """A folder of model weights, read tensor by tensor; opening reads headers only.

    `entries` maps on-disk keys to their place, in the order in which they lie on disk. Names of wrappers (`_orig_mod`,
    `_fsdp_wrapped_module`, `module.`, ...) are left out of the keys, and `wrapped` says that there were some. Every
    shard that the index names is opened and checked at once, so a truncated or missing shard is found before anything
    is written.

    Raises: CheckpointError: no folder, no safetensors, a shard missing or truncated, an index that disagrees with the
        shards.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is no folder; expected a checkpoint with {SINGLE_FILE} or an index.")
        self._files: dict[Path, TensorFile] = {}
        try:
            self.entries: dict[str, TensorEntry] = self._open()
        except BaseException:
            self.close()
            raise
        self.names = NameIndex(self.entries, what=f"checkpoint {self.folder}")

    def _open(self) -> dict[str, TensorEntry]:
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if single.is_file():
            # As transformers: an index beside it is of another save.
            entries = dict(self._file(single).entries)
        elif index.is_file():
            weight_map = read_json(index, "an index of shards").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no `weight_map`; expected {{tensor name: shard file}}.")
            for key, name in weight_map.items():
                if (
                    not isinstance(name, str)
                    or not name
                    or PurePath(name).is_absolute()
                    or ".." in PurePath(name).parts
                ):
                    raise CheckpointError(
                        f"{index} says that {key} lies in {name!r}; expected the name of a file in {self.folder}. Copy "
                        "the shard there (a link will do) and name it so."
                    )
            for name in sorted(set(weight_map.values())):
                if not (self.folder / name).is_file():
                    count = sum(file == name for file in weight_map.values())
                    raise CheckpointError(
                        f"{index} names the shard {name} for {count} tensor(s), but {self.folder} has no such file; "
                        "copy or download the missing shard."
                    )
                self._file(self.folder / name)
            entries = {}
            for key, name in weight_map.items():
                entry = self._files[self.folder / name].entries.get(key)
                if entry is None:
                    raise CheckpointError(f"{index} says that {name} holds {key}, but its header does not.")
                entries[key] = entry
            entries |= self._unlisted(index, entries)
        else:
            pickled = [name for name in _PICKLES if (self.folder / name).exists()]
            hint = (
                f"It has {pickled[0]}: pickled weights are never loaded; save them again as safetensors."
                if pickled
                else "Pass the folder of a model saved with `save_pretrained`."
            )
            if (self.folder / TUNER_FILE).is_file():
                hint = (
                    f"It has {TUNER_FILE}: it holds experts that a tuner puts on a base, and no weights to read or "
                    "edit. Experts that are adapters of their own have folders below it."
                )
            raise CheckpointError(f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. {hint}")
        entries = self._unwrapped(entries)
        return dict(sorted(entries.items(), key=lambda item: (item[1].path.name, item[1].offset)))

    def _unwrapped(self, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """The entries without what FSDP, torch.compile and data parallelism put into names.

        A file that was saved from within such a wrapper names the same model; nobody else could load it.
        """
        plain = {key: strip_wrappers(key) for key in entries}
        self.wrapped = any(key != name for key, name in plain.items())
        if not self.wrapped:
            return entries
        if len(set(plain.values())) < len(plain):
            names = list(plain.values())
            twice = next(key for key, name in plain.items() if names.count(name) > 1 and key != name)
            raise CheckpointError(
                f"{self.folder} holds {plain[twice]} twice, once as {twice}: with and without a wrapper's name in it. "
                "Save the model again, unwrapped."
            )
        return {plain[key]: replace(entry, name=plain[key]) for key, entry in entries.items()}

    def _unlisted(self, index: Path, listed: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Tensors of the shards that the index leaves out: transformers loads whole files, so they are the model's.

        Raises: CheckpointError: two shards hold one of them, and the index does not say which counts.
        """
        found: dict[str, TensorEntry] = {}
        for file in self._files.values():
            for key, entry in file.entries.items():
                if key in listed:
                    continue
                if key in found:
                    raise CheckpointError(
                        f"{found[key].path.name} and {file.path.name} both hold {key}, and {index} does not say which "
                        "counts. Name the right one there."
                    )
                found[key] = entry
        return found

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def entry(self, key: str) -> TensorEntry:
        """Place, type and shape of one tensor; an unknown key is an error with the nearest one."""
        found = self.entries.get(key)
        return found if found is not None else self.entries[self.names.require(key)]

    def read(self, key: str, buffer: Tensor | None = None) -> Tensor:
        """One tensor in its stored type. With `buffer` (uint8, large enough) nothing is allocated."""
        entry = self.entry(key)
        return self._files[entry.path].read(entry, buffer)

    def read_range(self, key: str, buffer: Tensor, start: int, stop: int) -> Tensor:
        """Raw bytes start..stop of a tensor at the beginning of `buffer`.

        buffer: (n,) uint8, n >= stop - start. Returns: (stop - start,), a view of it.
        """
        entry = self.entry(key)
        return self._files[entry.path].read_into(entry, buffer, start, stop)

    @property
    def meaning(self) -> dict[str, Any]:
        """What beside the tensors decides the weights (for the fingerprint): nothing."""
        return {}

    @property
    def shard_paths(self) -> tuple[Path, ...]:
        """Its safetensors files, in the order of the index."""
        return tuple(self._files)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.entries.values())

    def config(self) -> dict[str, Any]:
        """`config.json` of the folder."""
        return read_json(self.folder / "config.json", "a model's config.json")

    def close(self) -> None:
        """Close its files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
