"""MLLM-DCL (Zhao et al. 2025; HF Impression2805/MLLM-CL): five domains, each with its own folder of images.

`{RS,Med,AD,Sci,Fin}/{images/,train.json,test.json}`. Two domains get a suffix at test time, and one of the two depends
on the gold answer: it tells the model whether the question is a yes/no one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from holdfast.data.items import ANSWER_KEYS, answers, first, image_names, to_samples
from holdfast.data.readers import Source
from holdfast.data.source_files import read_records
from holdfast.data.types import Sample
from holdfast.errors import DataError, unknown_name

MED_SUFFIX = " Answer the question with a single word (or phrase)."
FIN_YES_NO_SUFFIX = " Only answer with yes or no directly."
FIN_LETTER_SUFFIX = " Answer with the given letter directly, e.g., A, B, C, D."
DOMAINS = ("RS", "Med", "AD", "Sci", "Fin")


def read(source: Source) -> list[Sample]:
    """Samples of one split of one domain.

    Options: domain (RS, Med, AD, Sci, Fin); suffix: "paper" (the published suffixes) or "none". For Sci
    `meta["source"]` (the file name up to "_") and `meta["prompt"]` serve the scorer `dcl_sci`.

    Raises: UnknownNameError: no such domain. DataError: a file has another layout.
    """
    options = source.take({"domain": None, "suffix": "paper"})
    domain = options["domain"]
    if domain not in DOMAINS:
        raise unknown_name(f"option domain of task {source.name!r}", str(domain), DOMAINS)
    if options["suffix"] not in ("paper", "none"):
        raise unknown_name(f"option suffix of task {source.name!r}", str(options["suffix"]), ("paper", "none"))
    path = source.path()
    test = source.split != "train"

    def own(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        del index
        gold = answers(first(item, ANSWER_KEYS))
        if not gold:
            raise DataError("no answer")
        how: dict[str, Any] = {"prompt_suffix": suffix(domain, gold[0]) if options["suffix"] == "paper" else ""}
        if domain == "Sci":
            names = image_names(item)
            base = PurePosixPath(names[0].replace("\\", "/")).name if names else ""
            how["meta"] = {"source": base.split("_")[0] or None, "prompt": str(item.get("text", ""))}
        return how

    return to_samples(
        read_records(path),
        where=path,
        root=source.root,
        folders=source.images,
        image_search=source.image_search,
        limit=source.limit,
        keep_meta=test,
        each=own if test else None,
    )


def suffix(domain: str, gold: str) -> str:
    """The text that the published test script appends to a prompt of `domain`, given the gold answer."""
    if domain == "Med":
        return MED_SUFFIX
    if domain == "Fin":
        return FIN_YES_NO_SUFFIX if gold in ("Yes", "No") else FIN_LETTER_SUFFIX
    return ""
