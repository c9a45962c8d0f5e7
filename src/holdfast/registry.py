"""Names -> code: what holdfast brings, what installed distributions add, what a user writes.

Wherever a name is taken (a run file, a stream file, an option, a call) it is one of

- built in: a line of a room's table, such as `holdfast.methods.METHODS`;
- put into such a table from Python or by a plug-in file: `METHODS["half"] = ("my_edit:Half", {})`;
- an entry point of an installed distribution, in the room's group (`holdfast.methods`, `holdfast.judges`,
  `holdfast.scorers`, `holdfast.readers`, `holdfast.safety_readers`, `holdfast.tuners`, `holdfast.rules`);
- `package.module:Class` itself, of a module that can be imported or of a plug-in file.

A plug-in file is Python code that a run file lists (`plugins: [my_edit.py]`); it is imported under its stem. One name
means one thing: a second claim to it is an error that names both. Nothing here knows a particular method or judge.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal

from holdfast.errors import ConfigError, UnknownNameError, nearest, unknown_name

BY_PATH = "package.module:Class"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one name stands for.

    where: "module:attribute". options: those that make a named variant of it. source: how the name came here.
    target: the object, where it was registered itself instead of by its place.
    distribution, version: of an entry point. plugin: the file that put it into the table.
    """

    name: str
    where: str
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Literal["builtin", "python", "plugin", "distribution", "path"] = "builtin"
    target: Any = field(default=None, repr=False)
    distribution: str = ""
    version: str = ""
    plugin: str = ""

    @property
    def came_from(self) -> str:
        """Its source for people: "builtin", "my-edits 0.2", "my_edit.py", "Python"."""
        named = {
            "builtin": "builtin",
            "python": "Python",
            "plugin": Path(self.plugin).name,
            "distribution": f"{self.distribution} {self.version}",
            "path": self.where.partition(":")[0],
        }
        return named[self.source]


class Registry:
    """The names of one kind of part.

    kind: what errors call a part. group: of the entry points. table: name -> "module:attribute", or (that, options of a
    named variant), or the object in its place; it stays open, and what is put into it later counts.
    needs: attributes of a class of this kind. made_needs: attributes of what it makes. Both are asked of code that is
    not built in only.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        table: dict[str, Any],
        *,
        needs: Iterable[str] = (),
        made_needs: Iterable[str] = (),
    ) -> None:
        self.kind = kind
        self.group = group
        self.table = table
        self.builtin = dict(table)
        self.plugin_of: dict[str, str] = {}
        self._needs = tuple(needs)
        self._made_needs = tuple(made_needs)
        _REGISTRIES[group] = self
        for name, value in _pending.pop(group, {}).items():
            table.setdefault(name, value)

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        """Every short name: those of the table in its order, then those of installed distributions."""
        return [*self.table, *sorted({point.name for point in _entry_points(self.group)} - set(self.table))]

    def entries(self) -> Iterator[Entry]:
        """What every short name stands for. Raises ConfigError: a name is claimed twice."""
        for name in self.names():
            yield self.find(name)

    def find(self, name: str, *, kind: str = "", code_by_path: bool = True) -> Entry:
        """What `name` stands for; nothing is imported.

        kind: for errors, instead of the registry's own. code_by_path: whether `package.module:Class` counts. False for
        a name that was read from a folder of weights, which must not choose what code runs.

        Raises: UnknownNameError: no such name. ConfigError: two sources claim it.
        """
        if not isinstance(name, str):
            raise ConfigError(f"{kind or self.kind}: found {name!r}, expected a name or {BY_PATH}.")
        own = self._own(name)
        points = _points_named(self.group, name)
        if own is None and not points:
            _points_on.cache_clear()  # something may have been installed meanwhile
            points = _points_named(self.group, name)
        claims = [*([own] if own else []), *(self._of_point(point) for point in points)]
        if len(claims) > 1:
            raise ConfigError(
                f"{self.kind} {name!r} is claimed twice: by "
                + " and by ".join(_claim(entry) for entry in claims)
                + f". One name means one thing: rename one of them, or use {BY_PATH} and uninstall the other."
            )
        if claims:
            return claims[0]
        if ":" in name and code_by_path:
            return Entry(name=name, where=name, source="path")
        error = unknown_name(kind or self.kind, name, self.names())
        raise UnknownNameError(f"{error} Code of your own is named {BY_PATH}.") if code_by_path else error

    def load(self, name: str, *, kind: str = "", code_by_path: bool = True) -> Any:
        """The class or function that `name` stands for, imported now.

        Raises: UnknownNameError: no such name. ConfigError: two sources claim it, it cannot be imported (with the
            import's own message), or it is no such part.
        """
        entry = self.find(name, kind=kind, code_by_path=code_by_path)
        target = entry.target if entry.target is not None else _imported(entry.where, f"{self.kind} {name!r}")
        if entry.source != "builtin":
            self._check(name, entry.where, target, self._needs)
        return target

    def made(self, name: str, value: Any) -> Any:
        """`value`, which the class of `name` made. Raises ConfigError: it lacks what a part of this kind has."""
        if self.find(name).source != "builtin":
            self._check(name, type(value).__qualname__, value, self._made_needs, made=True)
        return value

    def options(self, name: str) -> Mapping[str, Any]:
        """Options that make `name` a variant of its class."""
        return self.find(name).options

    def origin(self, name: str) -> dict[str, Any]:
        """Of which code `name` is, for a record: `origin_of` it, with the distribution of an entry point."""
        entry = self.find(name)
        found = origin_of(self.load(name))
        if entry.source == "distribution":
            found |= {"distribution": entry.distribution, "version": entry.version}
        return found

    def refuse_unshareable(self, name: str) -> None:
        """Raises ConfigError: `name` stands for code that another process cannot import."""
        entry = self.find(name)
        module, _, attribute = entry.where.partition(":")
        if module == "__main__" or "<" in attribute:
            place = "in the script or notebook that runs" if module == "__main__" else "inside a function"
            raise ConfigError(
                f"{self.kind} {name!r} ({entry.where}) is defined {place}, so the processes of jobs=N cannot import "
                f"it. Put it into a file of its own and list that under `plugins:`, name it as {BY_PATH}, or use "
                "jobs=1."
            )

    def _own(self, name: str) -> Entry | None:
        """The table's entry."""
        return self.entry(name, self.table[name]) if name in self.table else None

    def entry(self, name: str, value: Any) -> Entry:
        """What `value` in the table says of `name`. Raises ConfigError: it is none of the forms of a table."""
        target, options = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
        if not ((isinstance(target, str) and ":" in target) or callable(target)) or not isinstance(options, Mapping):
            raise ConfigError(
                f"{self.kind} {name!r} is registered as {value!r}; expected {BY_PATH!r}, or a pair of that and options."
            )
        plugin = self.plugin_of.get(name, "")
        return Entry(
            name=name,
            where=target if isinstance(target, str) else _place(target),
            options=options,
            source="plugin" if plugin else "builtin" if self.builtin.get(name) == value else "python",
            target=None if isinstance(target, str) else target,
            plugin=plugin,
        )

    def _of_point(self, point: metadata.EntryPoint) -> Entry:
        return Entry(
            name=point.name,
            where=point.value.partition("[")[0].strip(),
            source="distribution",
            distribution=point.dist.name if point.dist else "",
            version=point.dist.version if point.dist else "",
        )

    def _check(self, name: str, where: str, value: Any, needs: Iterable[str], *, made: bool = False) -> None:
        lacks = [attribute for attribute in needs if not hasattr(value, attribute)]
        if lacks or not (made or callable(value)):
            what = f"lacks {', '.join(lacks)}" if lacks else f"is {value!r:.60}"
            wanted = self._made_needs if made else self._needs
            expected = f"something with {', '.join(wanted)}" if wanted else "something that can be called"
            raise ConfigError(f"{self.kind} {name!r}: {where} {what}; expected {expected}.")


@dataclass(frozen=True)
class Plugin:
    """A plug-in file that is loaded: its module's name is its stem, its digest that of the text that ran."""

    path: Path
    sha256: str

    @property
    def module(self) -> str:
        """Name that the plug-in's module is imported under."""
        return self.path.stem


_REGISTRIES: dict[str, Registry] = {}
_plugins: dict[str, Plugin] = {}
# For registries whose room is not imported yet, in a process that was told what another one has.
_pending: dict[str, dict[str, Any]] = {}
# Modules that the starting process had and that no search path leads to.
_module_files: dict[str, str] = {}


def load_plugins(paths: Iterable[Path | str]) -> list[Plugin]:
    """Import plug-in files under their stems, each once as long as it does not change.

    What a file puts into a table is known from then on. A file of the same stem that was loaded before is replaced.

    Raises: ConfigError: no such file, a stem that is no name or is another module's, two files of one stem, code that
        fails (with its own message), or a name that is taken.
    """
    wanted = [Path(path).expanduser().absolute() for path in paths]
    stems: dict[str, Path] = {}
    for path in wanted:
        other = stems.setdefault(path.stem, path)
        if other != path:
            raise ConfigError(f"plug-ins {other} and {path} would both be module {path.stem!r}; rename one of them.")
    return [_load_plugin(path) for path in wanted]


def origin_of(target: Any) -> dict[str, Any]:
    """Of which code a class or function is: {"class"}, and for code from elsewhere what tells a change.

    That is "distribution" and "version" where an installed distribution brought the module, and "file" and "sha256" of
    the file that defines it. Helpers which that file imports are not looked at.
    """
    found: dict[str, Any] = {"class": _place(target)}
    if is_builtin(target):
        return found
    module = str(getattr(target, "__module__", ""))
    top = module.partition(".")[0]
    distribution = _distribution_of(top) if top not in _plugins else None
    if distribution is not None:
        found |= {"distribution": distribution.name, "version": distribution.version}
    if module in _plugins:
        return found | {"file": _plugins[module].path.name, "sha256": _plugins[module].sha256}
    file = getattr(sys.modules.get(module), "__file__", None)
    if file and Path(file).is_file():
        found |= {"file": Path(file).name, "sha256": _sha256(Path(file).read_bytes())}
    return found


def origins(parts: Iterable[tuple[str, Registry, str]]) -> dict[str, dict[str, Any]]:
    """{what: {name: origin}} of those of (what, registry, name) that are not built in, for a record."""
    found: dict[str, dict[str, Any]] = {}
    for what, registry, name in parts:
        if registry.find(name).source != "builtin":
            found.setdefault(what, {})[name] = registry.origin(name)
    return found


def is_builtin(target: Any) -> bool:
    """Whether a class or function is holdfast's own."""
    return str(getattr(target, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def export() -> dict[str, Any]:
    """What another process must know to find the names of this one, as plain data: see `restore`."""
    tables: dict[str, dict[str, Any]] = {}
    for group, registry in _REGISTRIES.items():
        for name, value in registry.table.items():
            entry = registry.entry(name, value)
            if entry.source == "python":
                module = entry.where.partition(":")[0]
                tables.setdefault(group, {})[name] = {
                    "where": entry.where,
                    "options": dict(entry.options),
                    "module": module,
                    "file": getattr(sys.modules.get(module), "__file__", None),
                }
    plugins = [{"path": str(plugin.path), "sha256": plugin.sha256} for plugin in _plugins.values()]
    return {"search_path": list(sys.path), "plugins": plugins, "tables": tables}


def restore(exported: Mapping[str, Any]) -> None:
    """Know in this process what `export` told in another.

    Raises: ConfigError: a plug-in file changed meanwhile, or as `load_plugins`.
    """
    sys.path[:] = [*exported["search_path"], *(path for path in sys.path if path not in exported["search_path"])]
    loaded = load_plugins(plugin["path"] for plugin in exported["plugins"])
    for plugin, told in zip(loaded, exported["plugins"], strict=True):
        if plugin.sha256 != told["sha256"]:
            raise ConfigError(f"plug-in {plugin.path} changed after the run had begun; start the run again.")
    for group, added in exported["tables"].items():
        for name, entry in added.items():
            if entry["file"]:
                _module_files[entry["module"]] = entry["file"]
            value = (entry["where"], entry["options"]) if entry["options"] else entry["where"]
            if group in _REGISTRIES:
                _REGISTRIES[group].table[name] = value
            else:
                _pending.setdefault(group, {})[name] = value


class _FromBytes(importlib.machinery.SourceFileLoader):
    """Runs exactly the text that was digested: Python's bytecode cache does not see a change within a second."""

    def __init__(self, fullname: str, path: str, text: bytes) -> None:
        super().__init__(fullname, path)
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._text, self.path)


def _load_plugin(path: Path) -> Plugin:
    if path.suffix != ".py" or not path.is_file():
        found = "this is none" if path.exists() else "there is none"
        raise ConfigError(f"plug-in {path}: expected a Python file (.py), and {found}.")
    name = path.stem
    if not name.isidentifier():
        raise ConfigError(f"plug-in {path}: {name!r} cannot be a module's name; use letters, digits and '_'.")
    text = path.read_bytes()
    plugin = Plugin(path, _sha256(text))
    old = _plugins.get(name)
    if old == plugin and name in sys.modules:
        return plugin
    if old is None:
        refuse_hiding(path)
    before = {group: dict(registry.table) for group, registry in _REGISTRIES.items()}
    _forget(name)
    try:
        _run(path, text)
        for registry in _REGISTRIES.values():
            _adopt(registry, path, before.get(registry.group, registry.builtin))
    except ConfigError:
        for group, registry in _REGISTRIES.items():
            registry.table.clear()
            registry.table.update(before.get(group, registry.builtin))
        sys.modules.pop(name, None)
        raise
    _plugins[name] = plugin
    return plugin


def _forget(module: str) -> None:
    """Drop a plug-in and the names that it brought."""
    old = _plugins.pop(module, None)
    if old is None:
        return
    for registry in _REGISTRIES.values():
        for name in [name for name, path in registry.plugin_of.items() if path == str(old.path)]:
            del registry.plugin_of[name]
            registry.table.pop(name, None)


def _adopt(registry: Registry, path: Path, before: Mapping[str, Any]) -> None:
    """Note which names a plug-in brought. Raises ConfigError: it took one that meant something else."""
    for name, value in registry.table.items():
        if name in before and before[name] == value:
            continue
        entry = registry.entry(name, value)
        if name in before:
            was = registry.entry(name, before[name])
            if (was.where, dict(was.options)) != (entry.where, dict(entry.options)):
                raise ConfigError(
                    f"plug-in {path} puts {entry.where} in the place of {registry.kind} {name!r}, which is "
                    f"{_claim(was)}. One name means one thing: choose another name."
                )
        registry.plugin_of[name] = str(path)


def _run(path: Path, text: bytes) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=_FromBytes(path.stem, str(path), text))
    assert spec is not None and spec.loader is not None  # a loader was given
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"plug-in {path}{place} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def refuse_hiding(path: Path) -> None:
    """Raises ConfigError: a plug-in file of this name would take the place of a module that something else imports."""
    there = sys.modules.get(path.stem)
    try:
        spec = there.__spec__ if there is not None else importlib.util.find_spec(path.stem)
    except (ValueError, ImportError):
        spec = None
    file = getattr(there, "__file__", None) or (spec.origin if spec is not None else None)
    if file is not None and not _same_file(file, path):
        raise ConfigError(f"plug-in {path} would hide the module {path.stem!r} ({file}); rename the file.")


def _same_file(file: str, path: Path) -> bool:
    return path.exists() and Path(file).exists() and Path(file).samefile(path)


def _imported(where: str, what: str) -> Any:
    """The attribute `where` names. Raises ConfigError, with the import's own message."""
    module_name, _, attribute = where.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{what}: {where!r} names no code; expected {BY_PATH}.")
    value: Any = _import_module(module_name, what)
    for part in attribute.split("."):
        if not hasattr(value, part):
            hint = nearest(part, [name for name in dir(value) if not name.startswith("_")])
            raise ConfigError(
                f"{what}: {module_name} has no {attribute!r}."
                + (f" Did you mean {module_name}:{hint}?" if hint else "")
            )
        value = getattr(value, part)
    return value


def _import_module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{what}: module {name} cannot be imported: {error}.") from error
        if name in _module_files:
            return _run_module_file(name, Path(_module_files[name]), what)
        raise ConfigError(
            f"{what}: there is no module {error.name!r}. Install its package, put its folder on PYTHONPATH, or list "
            "its file under `plugins:` of the run file (`holdfast --plugin FILE` elsewhere)."
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what}: module {name} cannot be imported: {type(error).__name__}: {error}") from error


def _run_module_file(name: str, file: Path, what: str) -> ModuleType:
    """A module that the starting process had loaded from `file` without a search path."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what}: module {name} cannot be imported from {file}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise ConfigError(f"{what}: {file} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _place(target: Any) -> str:
    named = target if hasattr(target, "__qualname__") else type(target)
    return f"{named.__module__}:{named.__qualname__}"


def _claim(entry: Entry) -> str:
    """Who claims a name, for an error."""
    if entry.source == "distribution":
        return f"the distribution {entry.came_from} ({entry.where})"
    if entry.source == "plugin":
        return f"the plug-in {entry.plugin} ({entry.where})"
    return f"{'holdfast itself' if entry.source == 'builtin' else 'a line of Python'} ({entry.where})"


def _points_named(group: str, name: str) -> list[metadata.EntryPoint]:
    return [point for point in _entry_points(group) if point.name == name]


def _entry_points(group: str) -> tuple[metadata.EntryPoint, ...]:
    return _points_on(tuple(sys.path), group)


@lru_cache(maxsize=64)
def _points_on(search_path: tuple[str, ...], group: str) -> tuple[metadata.EntryPoint, ...]:
    """Entry points of what is installed on a search path; reading them takes some ten milliseconds."""
    del search_path
    return tuple(metadata.entry_points(group=group))


@lru_cache(maxsize=64)
def _distribution_of(top: str) -> metadata.Distribution | None:
    names = metadata.packages_distributions().get(top)
    return metadata.distribution(names[0]) if names else None


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
