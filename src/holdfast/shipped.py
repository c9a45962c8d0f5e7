"""Run files and stream files that come with holdfast: inside an installed package, in configs/ of a source checkout."""

from __future__ import annotations

from pathlib import Path

import yaml

from holdfast.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def folder() -> Path:
    """The folder of the run files that come with this installation; their streams lie in its streams/.

    Raises: ConfigError: neither a wheel nor a source checkout, so there is no such folder.
    """
    checkout = _PACKAGE.parent.parent
    for place, marks in ((_PACKAGE / "configs", ()), (checkout / "configs", (checkout / "pyproject.toml",))):
        if place.is_dir() and all(mark.is_file() for mark in marks):
            return place
    raise ConfigError(
        f"The run files that come with holdfast are not beside {_PACKAGE}; install the wheel again, or work in a "
        "source checkout."
    )


def run_files() -> dict[str, Path]:
    """Name -> run file, of every one that comes with holdfast."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def stream_files() -> dict[str, Path]:
    """Name -> stream file, of every one that comes with holdfast."""
    return {path.stem: path for path in sorted((folder() / "streams").glob("*.yaml"))}


def stream_of(run_file: Path) -> Path | None:
    """The stream file that `run_file` names beside itself, or None where the stream is written into it."""
    stream = yaml.safe_load(run_file.read_text(encoding="utf-8")).get("stream")
    return run_file.parent / stream if isinstance(stream, str) else None


def first_comment(path: Path) -> str:
    """The first comment line of a YAML file: what it is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""
