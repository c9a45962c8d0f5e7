"""`holdfast calibrate MODEL --safety DATA --task DATA --out FILE`: one number per input column, layer and set."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.choices import ActivationsName, DtypeName, ImageModeName, NormalizationName, OnFailureName, TokensName
from holdfast.cli.units import parse_memory


def command(
    model: Annotated[str, typer.Argument(help="The aligned model BEFORE the task: folder or hub id.")],
    safety: Annotated[Path, typer.Option(help="Its own safe answers (`holdfast calibrate-data`), JSON or JSON lines.")],
    task: Annotated[Path, typer.Option(help="Samples of the task: prompts with answers, or LLaVA conversations.")],
    out: Annotated[Path, typer.Option(help="Calibration file to write, *.safetensors.")],
    after: Annotated[
        str | None,
        typer.Option(help="The model AFTER the task, or its adapter (several: A+B); by default MODEL serves for both."),
    ] = None,
    safety_images: Annotated[Path | None, typer.Option(help="Where image paths of --safety start from.")] = None,
    task_images: Annotated[Path | None, typer.Option(help="Where image paths of --task start from.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first N task samples only (the paper takes 128).")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What may be held in memory, such as 8GiB.")] = None,
    damping: Annotated[
        float, typer.Option(help="Damping: this share of the mean diagonal is added to the diagonal.")
    ] = 0.01,
    shrinkage: Annotated[float, typer.Option(help="Shrinkage towards the diagonal, for few tokens; 0..1.")] = 0.0,
    normalization: Annotated[
        NormalizationName, typer.Option(help="What the second moments are averaged over.")
    ] = "sequence",
    tokens: Annotated[TokensName, typer.Option(help="Which tokens of a sequence count.")] = "all",
    activations: Annotated[
        ActivationsName, typer.Option(help="Whose inputs are read: each set its own model's, or one model's for both.")
    ] = "each",
    on_failure: Annotated[
        OnFailureName,
        typer.Option(help="When a matrix cannot be factorised: stop, or retry with more damping (recorded)."),
    ] = "error",
    batch_size: Annotated[int, typer.Option(help="Sequences per forward.")] = 16,
    every_linear: Annotated[
        bool, typer.Option("--every-linear", help="Also the layers that an adapter given as --after leaves alone.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out where it exists.")] = False,
    image_mode: Annotated[
        ImageModeName,
        typer.Option(
            "--images", "--image-mode", help="upright (EXIF applied, white below), or published (opened plainly)."
        ),
    ] = "upright",
    max_pixels: Annotated[int | None, typer.Option(help="Show at most so many pixels of each picture.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; an accelerator where there is one.")] = None,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any] | None:
    """Collect input statistics for `edit`: what each layer reads on refusals, and what on the task.

    Where --after is an adapter, only the layers that it changes are measured: all that an edit of it needs.

    Under `accelerate launch` the samples are dealt out over the processes and their Grams are summed.
    """
    from accelerate import PartialState

    from holdfast.calibration.curvature import CalibrationConfig, collect_curvature
    from holdfast.checkpoints.value import as_checkpoint
    from holdfast.cli.progress import bars
    from holdfast.cli.samples import read_calibration_sets
    from holdfast.config import decode
    from holdfast.data.images import PictureConfig, pictures
    from holdfast.editing.pair import tuned_checkpoint
    from holdfast.files import require_writable

    require_writable(out, overwrite=overwrite)
    config = decode(
        CalibrationConfig,
        {
            "damping": damping,
            "shrinkage": shrinkage,
            "normalization": normalization,
            "tokens": tokens,
            # MODEL serves for both then, and the record says so.
            "activations": "old" if after is None else activations,
            "on_failure": on_failure,
            "batch_size": batch_size,
        },
    )
    memory_bytes = parse_memory(memory, "--memory") if memory else None
    safety_samples, task_samples = read_calibration_sets(
        safety, task, safety_images=safety_images, task_images=task_images
    )
    before = as_checkpoint(model)
    tuned = before if after is None else tuned_checkpoint(model, after)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    state = PartialState(cpu=device == "cpu") if several else None
    chief = state is None or state.is_main_process
    seconds: dict[str, float] = {}
    record: dict[str, Any] | None = None  # the other processes have nothing to say
    opened = PictureConfig(images=image_mode, max_pixels=max_pixels)
    with bars("calibrating") if chief else nullcontext() as progress, pictures(opened):
        curvature = collect_curvature(
            before,
            tuned,
            safety_samples,
            task_samples[:limit],
            config=config,
            memory_bytes=memory_bytes,
            adapted_only=not every_linear,
            dtype=dtype,
            device=device if device is not None or state is None else state.device,
            progress=progress,
            seconds=seconds,
        )
    if chief:
        curvature.save(out)
        sets = curvature.meta["sets"]
        if after is None:
            print("activations: old, MODEL's for both sets; the method takes the task's from the tuned model (--after)")
        print(f"{out}: {len(curvature.modules)} layers in {curvature.block_count} blocks")
        for name, figures in sets.items():
            scarce = min(figures["tokens_over_width"].values())
            print(
                f"  {name}: {figures['sequences']} sequences, {figures['tokens']} tokens, at least {scarce:.2f} tokens "
                f"per input column, {len(figures['fallbacks'])} fallbacks"
            )
        print("seconds: " + ", ".join(f"{phase} {spent:.1f}" for phase, spent in seconds.items()))
        found = {"out": str(out), "layers": len(curvature.modules), "blocks": curvature.block_count}
        record = {**found, "sets": sets, "seconds": seconds}
    if state is not None:
        state.destroy_process_group()
    return record
