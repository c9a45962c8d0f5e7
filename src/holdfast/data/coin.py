"""CoIN (Chen et al. 2024, arXiv 2403.08350): the four of its eight tasks whose gold answers need a reader.

ImageNet, VizWiz, VQAv2 and OCRVQA carry theirs in the test file and need no reader beyond `llava`. Training files are
in LLaVA's shape. Option `annotations` names the gold file (aliases allowed, relative to the data root); where it is not
set, or `own_answers` is and none of its files is there, the test file's own answers are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from holdfast.data.items import answers, first, item_id, to_samples
from holdfast.data.readers import Source
from holdfast.data.source_files import expand_braces, inside, read_json, read_records
from holdfast.data.types import Sample
from holdfast.errors import DataError

LETTERS = "ABCDEFGHIJ"
OPTIONS = {"annotations": None, "own_answers": False, "prompt_suffix": ""}

Own = Callable[[Mapping[str, Any], int], Mapping[str, Any]]


def read_scienceqa(source: Source) -> list[Sample]:
    """ScienceQA. Test items are those of `pid_splits.json`, gold letters from `problems.json` (or letters in the file).

    Options: annotations (problems.json), splits (pid_splits.json, by default the one beside it, or beside a test file
    with letters, whose other items are then left out, as Prism does), split_name ("test"), prompt_suffix: CoIN appends
    none; HiDe-LLaVA and Prism append a newline and "Answer with the option's letter from the given choices
    directly.". `meta["choices"]` and `meta["has_image"]` serve the scorer `option_letter`.

    Raises: DataError: a file is missing or has another layout, or an item has no problem.
    """
    options = source.take(OPTIONS | {"splits": None, "split_name": "test"})
    items, path = _items(source)
    if source.split == "train":
        return _samples(source, items, path)
    problems = _annotations(source, options)
    if problems is None:
        wanted = _split_ids(source, options["splits"], options["split_name"], path)
        among = set(wanted)
        chosen = [item for i, item in enumerate(items) if item_id(item, i) in among] if wanted else items
        letters = _letters_in_file(_looked_for(source, options))
        return _samples(source, chosen, path, each=letters, prompt_suffix=options["prompt_suffix"])
    gold_path, gold = problems
    if not isinstance(gold, Mapping):
        raise DataError(f"{gold_path}: expected an object from problem id to problem, found {type(gold).__name__}.")
    wanted = _split_ids(source, options["splits"], options["split_name"], gold_path)
    by_id = {item_id(item, index): item for index, item in enumerate(items)}
    lacking = [name for name in wanted if name not in by_id]
    if lacking:
        raise DataError(
            f"{path}: {len(lacking)} of {len(wanted)} problems of the split have no item, such as {lacking[0]!r}. "
            "Use the test file and the annotations of one release."
        )

    def gold_letter(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        problem = gold.get(item_id(item, index))
        if not isinstance(problem, Mapping):
            raise DataError(f"{gold_path} has no problem of this id")
        choices, answer = problem.get("choices"), problem.get("answer")
        if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise DataError(f"its problem in {gold_path.name} has answer {answer!r} of choices {choices!r:.60}")
        meta = {"choices": [str(choice) for choice in choices], "has_image": bool(first(item, ("image",)))}
        return {"references": (LETTERS[answer],), "meta": meta}

    chosen = [by_id[name] for name in wanted] if wanted else items
    return _samples(source, chosen, path, each=gold_letter, prompt_suffix=options["prompt_suffix"])


def read_textvqa(source: Source) -> list[Sample]:
    """TextVQA. Ten human answers per question from `TextVQA_0.5.1_val.json`; without it the test file's own answers.

    Raises: DataError: a file is missing or has another layout, or `own_answers` is set and the test file holds one
        answer per question, which is no set of human answers.
    """
    options = source.take(OPTIONS)
    items, path = _items(source)
    if source.split == "train":
        return _samples(source, items, path)
    found = _annotations(source, options)
    if found is None:
        several = _several(_looked_for(source, options)) if options["annotations"] else None
        return _samples(source, items, path, each=several, prompt_suffix=options["prompt_suffix"])
    gold_path, _ = found
    gold = {item_id(row, index): answers(row.get("answers")) for index, row in enumerate(read_records(gold_path))}
    return _samples(source, items, path, each=_looked_up(gold, gold_path), prompt_suffix=options["prompt_suffix"])


def read_gqa(source: Source) -> list[Sample]:
    """GQA. Gold answers and `isBalanced` from `testdev_balanced_questions.json`; without it the test file's answers.

    Raises: DataError: a file is missing or has another layout.
    """
    options = source.take(OPTIONS)
    items, path = _items(source)
    found = _annotations(source, options) if source.split != "train" else None
    if found is None:
        return _samples(source, items, path, prompt_suffix=options["prompt_suffix"] if source.split != "train" else "")
    gold_path, gold = found
    if not isinstance(gold, Mapping):
        raise DataError(f"{gold_path}: expected an object from question id to question, found {type(gold).__name__}.")

    def question(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        row = gold.get(item_id(item, index))
        if not isinstance(row, Mapping) or not isinstance(row.get("answer"), str):
            raise DataError(f"{gold_path.name} has no answer for this question id")
        return {"references": (row["answer"],), "meta": {"isBalanced": bool(row.get("isBalanced", True))}}

    return _samples(source, items, path, each=question, prompt_suffix=options["prompt_suffix"])


def read_grounding(source: Source) -> list[Sample]:
    """Grounding (RefCOCO, RefCOCO+, RefCOCOg): gold box `answer_bbox`, image size `size` in `meta`."""
    options = source.take({"prompt_suffix": ""})
    items, path = _items(source)
    if source.split == "train":
        return _samples(source, items, path)

    def box(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        del index
        value = first(item, ("answer_bbox", "bbox", "answer"))
        if isinstance(value, list):
            value = f"[{','.join(map(str, value))}]"
        if not isinstance(value, str):
            raise DataError(f"answer_bbox is {value!r:.60}; expected '[x1,y1,x2,y2]'")
        return {"references": (value,)}

    return _samples(source, items, path, each=box, prompt_suffix=options["prompt_suffix"])


def _items(source: Source) -> tuple[list[dict[str, Any]], Path]:
    path = source.path()
    return read_records(path), path


def _samples(source: Source, items: list[dict[str, Any]], path: Path, **how: Any) -> list[Sample]:
    return to_samples(
        items,
        where=path,
        root=source.root,
        folders=source.images,
        image_search=source.image_search,
        limit=source.limit,
        keep_meta=source.split != "train",
        **how,
    )


def _annotations(source: Source, options: Mapping[str, Any]) -> tuple[Path, Any] | None:
    """The gold file that option `annotations` names, read; None where the test file's own answers are taken."""
    aliases = _aliases(options)
    if not aliases or (options["own_answers"] and not any(inside(source.root, alias).exists() for alias in aliases)):
        return None
    path = source.companion(aliases)
    return path, read_json(path)


def _aliases(options: Mapping[str, Any]) -> tuple[str, ...]:
    names = options["annotations"] or ()
    return tuple(n for name in ([names] if isinstance(names, str) else names) for n in expand_braces(name))


def _looked_for(source: Source, options: Mapping[str, Any]) -> str:
    """Which gold files are not there, for an error about a test file that cannot stand in for them."""
    aliases = _aliases(options)
    return f" (below {source.root} none of {', '.join(aliases)} is there)" if aliases else ""


def _split_ids(source: Source, names: Any, split: str, beside: Path) -> list[str]:
    """Problem ids of a split from pid_splits.json; [] when that file is neither named nor beside the problems."""
    path = beside.with_name("pid_splits.json")
    if names:
        path = source.companion(tuple(names) if isinstance(names, list) else names)
    elif not path.exists():
        return []
    splits = read_json(path)
    if not isinstance(splits, Mapping) or not isinstance(splits.get(split), list):
        raise DataError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}.")
    return [str(name) for name in splits[split]]


def _letters_in_file(looked_for: str) -> Own:
    """Prism's ScienceQA/test.json: the answer is the letter itself, or an index into `choices`."""

    def own(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        del index
        value = first(item, ("answer", "answers"))
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(LETTERS):
            value = LETTERS[value]
        gold = answers(value)
        if len(gold) != 1 or len(gold[0].strip()) != 1 or gold[0].strip().upper() not in LETTERS:
            raise DataError(
                f"answer {value!r:.60} is no option letter; name problems.json in options.annotations{looked_for}"
            )
        return {"references": (gold[0].strip().upper(),), "meta": {"has_image": bool(first(item, ("image",)))}}

    return own


def _several(looked_for: str) -> Own:
    """A TextVQA test file that holds the human answers itself."""

    def own(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        del index
        gold = answers(first(item, ("answers", "answer")))
        if len(gold) < 2:
            raise DataError(
                f"it holds {len(gold)} answer(s), and its score needs those of ten people; name TextVQA_0.5.1_val.json "
                f"in options.annotations{looked_for}"
            )
        return {"references": gold}

    return own


def _looked_up(gold: Mapping[str, tuple[str, ...]], where: Path) -> Own:
    def own(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        name = item_id(item, index)
        if not gold.get(name):
            raise DataError(f"{where.name} has no answer for this question id")
        return {"references": gold[name]}

    return own
