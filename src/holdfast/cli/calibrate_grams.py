"""`holdfast calibrate-grams MODEL --after A --safety S --task T --out DIR`: what `edit --rule anchor` needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.choices import DtypeName, TokensName


def command(
    model: Annotated[str, typer.Argument(help="The aligned model BEFORE the task: folder or hub id.")],
    after: Annotated[str, typer.Option(help="The model AFTER the task, or its adapter (several: A+B).")],
    safety: Annotated[Path, typer.Option(help="MODEL's own safe answers (`holdfast calibrate-data`).")],
    task: Annotated[Path, typer.Option(help="Samples of the task: prompts with answers.")],
    out: Annotated[Path, typer.Option(help="Folder to make, with a store of Gram matrices for each set.")],
    benign: Annotated[
        Path | None, typer.Option(help="MODEL's own answers to harmless requests; keeps over-refusal down.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Where image paths start from; the file's own folder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N task samples only.")] = None,
    memory: Annotated[str | None, typer.Option(help="What may be held in memory, such as 8GiB.")] = None,
    tokens: Annotated[TokensName, typer.Option(help="Which tokens of a sequence count.")] = "all",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward.")] = 16,
    dtype: Annotated[DtypeName | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; an accelerator where there is one.")] = None,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Collect the second moments of every layer's inputs for the anchored edit; one layer's are in memory at a time.

    A later task takes OUT/task as `edit --past`: no sample is kept, second moments alone. Killed and started again, it
    goes on where it stopped.
    """
    from holdfast.calibration.curvature import adapted_layers
    from holdfast.calibration.gram_sets import GramSets, collect_grams
    from holdfast.checkpoints.value import as_checkpoint
    from holdfast.cli.progress import bars
    from holdfast.cli.samples import read_calibration_sets, read_samples
    from holdfast.cli.units import parse_memory
    from holdfast.editing.pair import tuned_checkpoint

    before, tuned = as_checkpoint(model), tuned_checkpoint(model, after)
    safe, learned = read_calibration_sets(safety, task, safety_images=images, task_images=images)
    sets = {"safety": (before, safe), "task": (tuned, learned[:limit])}
    if benign is not None:
        sets["benign"] = (before, read_samples(benign, images=images))
    changed = adapted_layers(before, tuned)
    for name, (source, samples) in sets.items():
        with bars(f"{name}: {len(samples)} samples") as progress:
            collect_grams(
                source,
                samples,
                out / name,
                tokens=tokens,
                batch_size=batch_size,
                changed=changed,
                memory_bytes=parse_memory(memory, "--memory") if memory else None,
                dtype=dtype,
                device=device,
                progress=progress,
            )
    found = GramSets.open(out)
    print(f"{out}: {len(found.task.modules)} layers in {found.task.block_count} blocks")
    for name, store in found.stores.items():
        print(f"  {name}: {store.tokens} tokens")
    tokens_of = {name: store.tokens for name, store in found.stores.items()}
    sizes = {"layers": len(found.task.modules), "blocks": found.task.block_count}
    return {"out": str(out), **sizes, "tokens": tokens_of}
