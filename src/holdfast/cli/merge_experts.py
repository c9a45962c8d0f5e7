"""`holdfast merge-experts EXPERTS --out OUT`: experts as one LoRA or one plain checkpoint, without a router."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.choices import ExportName


def command(
    experts: Annotated[Path, typer.Argument(help="CRAM folder, such as the cram/ of a run's step.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it appears whole or not at all.")],
    expert: Annotated[
        str | None, typer.Option(help="Merge this expert alone: exact for requests routed to it.")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Requests that mean weights and drift are taken from.")] = None,
    export: Annotated[ExportName, typer.Option(help="adapter: a PEFT folder. dense: a full checkpoint.")] = "adapter",
    base: Annotated[str | None, typer.Option(help="Base model; by default the one that the folder names.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Where the router's CLIP or SigLIP lies now.")] = None,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Fold CRAM's experts into one update: one exactly, several by their mean routing weight, with the drift shown."""
    import dataclasses
    import tempfile

    from holdfast.cli.samples import read_samples
    from holdfast.cli.terminal import Console
    from holdfast.errors import ConfigError
    from holdfast.tuners.cram.folder import open_folder
    from holdfast.tuners.cram.merge import drift, export_merged, mean_mass
    from holdfast.tuners.folders import base_of

    if expert is None and samples is None:
        raise ConfigError("Name one --expert, or pass --samples to take mean routing weights from.")
    asked = read_samples(samples) if samples is not None else []
    cram = open_folder(experts, base=base, encoder=encoder)
    mass = {expert: 1.0} if expert is not None else mean_mass(cram, asked)
    found = drift(cram, mass, asked) if asked else None
    record: dict[str, Any] = {"weights": mass, "drift": dataclasses.asdict(found) if found else None}
    if cram.guard is not None:
        record["guard"] = "dropped"
    if export == "adapter":
        export_merged(cram, mass, out, record=record)
    else:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=_made(out.absolute().parent)) as scratch:
            adapter = Path(scratch) / "adapter"
            export_merged(cram, mass, adapter)
            _write_dense(base_of(cram.loaded), adapter, out)
    console = Console(stderr=True)
    if cram.guard is not None:
        console.print(
            "The guard does not come with it: one merged update cannot send a request to the base alone. Forbidden "
            "requests are answered by the merged model; measure it with `holdfast gate`, or serve the folder itself."
        )
    for name, weight in mass.items():
        console.print(f"{name}: weight {weight:.4f}", markup=False)
    if found is not None:
        console.print(
            f"drift over {found.requests} requests, first answer token: KL {found.kl:.3g} nats, same token in "
            f"{found.agreement:.1%}"
        )
    else:
        console.print(f"exact for every request that is routed to {expert} alone", markup=False)
    return {"out": str(out), "export": export, **record}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_dense(base: dict, adapter: Path, out: Path) -> None:
    from holdfast.editing.editor import edit_checkpoint
    from holdfast.methods.seqft import KeepUpdate
    from holdfast.stream.protocol import Checkpoint

    before = Checkpoint.from_json(base)
    after = Checkpoint(base=before.base, adapters=(*before.adapters, str(adapter)))
    edit_checkpoint(before, after, rule=KeepUpdate(), out=out, verify=False)
