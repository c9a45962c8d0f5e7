"""`holdfast calibrate-data MODEL --prompts DATA --out FILE`: the aligned model's own safe answers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.choices import DtypeName, ImageModeName

if TYPE_CHECKING:
    from holdfast.data.types import Sample


def command(
    model: Annotated[str, typer.Argument(help="The aligned model: folder or hub id.")],
    prompts: Annotated[Path, typer.Option(help="Harmful requests, JSON or JSON lines; `category` names the risk.")],
    out: Annotated[Path, typer.Option(help="JSON-lines file to write; images of elsewhere are copied beside it.")],
    images: Annotated[Path | None, typer.Option(help="Folder that image paths start from; that of --prompts.")] = None,
    test_set: Annotated[
        list[Path] | None, typer.Option(help="A test set (data file, or stream YAML) that no prompt may be part of.")
    ] = None,
    per_category: Annotated[int, typer.Option(help="Safe answers to keep per risk category.")] = 2,
    category_key: Annotated[str, typer.Option(help="Key of a prompt that names its risk category.")] = "category",
    judge: Annotated[str, typer.Option(help="Judge of the answers (`holdfast list judges`).")] = "keyword",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Requests per batch.")] = 16,
    allow_short: Annotated[bool, typer.Option("--allow-short", help="Accept categories with too few answers.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out where it exists.")] = False,
    image_mode: Annotated[
        ImageModeName,
        typer.Option("--image-mode", help="upright (EXIF applied, white below), or published (opened plainly)."),
    ] = "upright",
    max_pixels: Annotated[int | None, typer.Option(help="Show at most so many pixels of each picture.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; an accelerator where there is one.")] = None,
    as_record: Annotated[bool, typer.Option("--json", help="Print the result as JSON; text goes to stderr.")] = False,
) -> dict[str, Any]:
    """Ask the aligned model harmful requests and keep its own safe answers, for `calibrate --safety`."""
    from holdfast import judges
    from holdfast.calibration.own_answers import own_safe_answers, refuse_overlap
    from holdfast.cli.samples import read_samples, read_test_sets, write_samples
    from holdfast.data.images import PictureConfig, pictures
    from holdfast.errors import DataError, StorageError
    from holdfast.files import require_writable
    from holdfast.models.load import load
    from holdfast.models.memory import find_device

    opened = PictureConfig(images=image_mode, max_pixels=max_pixels)
    root = images or prompts.parent
    for given in (prompts, *(test_set or ())):
        if out.resolve() == given.resolve():
            raise StorageError(f"--out {out} is {given}, which is read; it would be lost. Choose another --out.")
    require_writable(out, overwrite=overwrite)
    if device is not None:
        find_device(device)
    verdict_of = judges.get(judge)
    requests = read_samples(prompts, images=root)
    test_sets = read_test_sets(test_set or [])
    # Before the model is loaded: that takes long, and this is about the data alone.
    refuse_overlap(requests, test_sets)

    def is_safe(samples: object, replies: object) -> list[bool]:
        verdicts = verdict_of.judge(samples, replies)  # type: ignore[arg-type]
        return [v.label == "safe" and v.behaviour != "collapse" for v in verdicts]

    with pictures(opened):
        made = own_safe_answers(
            load(model, dtype=dtype, device=device),
            requests,
            is_safe,
            per_category=per_category,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            category_key=category_key,
            test_sets=test_sets,
            allow_short=allow_short,
        )
    if not made.samples:
        asked = sum(made.asked.values())
        raise DataError(
            f"{model} gave no safe answer to any of {asked} prompts, judged by {judge}: an empty {out} would calibrate "
            "nothing. Check that this is the aligned model and that the judge knows its refusals."
        )
    write_samples(out, _with_images_beside(made.samples, out), image_root=out.parent.resolve())
    print(f"{out}: {len(made.samples)} samples, judged by {judge}")
    for category, kept in made.kept.items():
        note = " (short)" if category in made.short else ""
        print(f"  {category or 'all prompts'}: kept {kept}, asked {made.asked[category]}{note}")
    counts = {"samples": len(made.samples), "kept": made.kept, "asked": made.asked, "short": list(made.short)}
    return {"out": str(out), "judge": judge, **counts}


def _with_images_beside(samples: Sequence[Sample], out: Path) -> list[Sample]:
    """Samples whose images lie below OUT's folder, copied there where they do not.

    Readers start from the data file's own folder and follow no path that leaves it.
    """
    from holdfast.files import storage_errors

    root = out.parent.resolve()
    copies = root / f"{out.stem}-images"
    kept = []
    for number, sample in enumerate(samples):
        images = []
        for place, image in enumerate(sample.images):
            inside = Path(image).resolve().is_relative_to(root)
            images.append(Path(image).resolve() if inside else copies / f"{number:04d}-{place}-{Path(image).name}")
            if not inside:
                with storage_errors(images[-1]):
                    copies.mkdir(exist_ok=True)
                    shutil.copyfile(image, images[-1])
        kept.append(replace(sample, images=tuple(images)))
    return kept
