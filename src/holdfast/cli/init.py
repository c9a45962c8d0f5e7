"""`holdfast init NAME`: a run file that comes with the package, written out to be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    name: Annotated[
        str | None, typer.Argument(help="A run file that comes with holdfast, such as llava-1.5-7b.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to; stream files go to its streams/.")] = Path(),
    listed: Annotated[bool, typer.Option("--list", help="Show the names that there are, and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Write a complete run file and the stream file it names, ready for `holdfast doctor` and `holdfast run`."""
    from holdfast.errors import ConfigError, StorageError, unknown_name
    from holdfast.files import atomic_path
    from holdfast.shipped import first_comment, run_files, stream_of

    files = run_files()
    if listed:
        width = max(map(len, files))
        for known, path in files.items():
            typer.echo(f"{known:<{width}}  {first_comment(path)}".rstrip())
        return {"files": {known: first_comment(path) for known, path in files.items()}}
    if name is None:
        raise ConfigError("Name a run file to write; `holdfast init --list` shows what there is.")
    if name not in files:
        raise unknown_name("run file", name, files)
    source = files[name]
    stream = stream_of(source)
    targets = {out / source.name: source}
    if stream is not None:
        targets[out / stream.relative_to(source.parent)] = stream
    # The same bytes are no loss: two run files may name one stream.
    there = [t for t, origin in targets.items() if t.exists() and t.read_bytes() != origin.read_bytes()]
    if there and not overwrite:
        raise StorageError(
            f"{', '.join(map(str, there))} exists and may hold changes of yours. Choose another --out, or pass "
            "--overwrite."
        )
    for target, origin in targets.items():
        with atomic_path(target) as temporary:
            temporary.write_bytes(origin.read_bytes())
        typer.echo(f"wrote {target}")
    typer.echo(f"Change `model:` and `stream:` in {out / source.name}, then: holdfast doctor {out / source.name}")
    return {"written": [str(target) for target in targets]}
