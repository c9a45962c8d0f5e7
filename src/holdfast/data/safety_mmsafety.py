"""MM-SafetyBench (Liu et al. 2023, arXiv 2311.17600): 13 scenarios, each question with three kinds of image.

`data/processed_questions/<scenario>.json` is an object `{"0": {"Question", "Changed Question", "Key Phrase", ...}}`;
pictures are `imgs/<scenario>/<variant>/<id>.jpg`. No benign side is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from holdfast.data.safety_set import choose, choose_many, field_of, image_folder, image_path, safety_set
from holdfast.data.source_files import find, read_json
from holdfast.data.types import SafetySet, Sample
from holdfast.errors import DataError

SCENARIOS = (
    "01-Illegal_Activitiy",  # sic
    "02-HateSpeech",
    "03-Malware_Generation",
    "04-Physical_Harm",
    "05-EconomicHarm",
    "06-Fraud",
    "07-Sex",
    "08-Political_Lobbying",
    "09-Privacy_Violence",
    "10-Legal_Opinion",
    "11-Financial_Advice",
    "12-Health_Consultation",
    "13-Gov_Decision",
)
# There a safe answer may well help, as long as it says that it is no professional's: keyword lists mis-report them.
ADVICE_SCENARIOS = tuple(s for s in SCENARIOS if s[:2] in ("08", "10", "11", "12", "13"))
# The picture of SD shows the key phrase, so the question does not name it; with typography the text stands in the
# picture, and the question points at "this phrase". Pairing TYPO with the SD question asks about nothing.
QUESTION = {"SD": "Rephrased Question(SD)", "SD_TYPO": "Rephrased Question", "TYPO": "Rephrased Question"}
OBTAIN = (
    "`git clone https://github.com/isXinLiu/MM-SafetyBench <root>`, then unpack its images as "
    "<root>/data/imgs/<scenario>/{SD,SD_TYPO,TYPO}/ (the link is in its README)."
)


def read(
    root: Path,
    *,
    name: str,
    variant: Literal["SD", "TYPO", "SD_TYPO"] = "SD_TYPO",
    scenarios: str | Sequence[str] | None = None,
    max_new_tokens: int = 256,
) -> SafetySet:
    """All questions of `scenarios` (None: the 13) with the pictures of `variant`, each with its own question field.

    `meta["advice"]` is true in the scenarios where a safe answer is a careful one rather than a refusal.

    Raises: DataError: files are missing or of another layout. UnknownNameError: no such scenario.
    """
    choose("MM-SafetyBench variant", variant, QUESTION)
    samples = []
    images: Path | None = None
    folder = root
    for scenario in choose_many("MM-SafetyBench scenario", scenarios, SCENARIOS):
        path = find(
            root,
            [f"{p}processed_questions/{scenario}.json" for p in ("data/", "")] + [f"{scenario}.json"],
            what=name,
            obtain=OBTAIN,
        )
        folder = path.parent
        items = read_json(path)
        if not isinstance(items, dict) or not all(isinstance(item, dict) for item in items.values()):
            raise DataError(f"{path}: expected an object of questions by number, found {type(items).__name__}.")
        for key in sorted(items, key=lambda k: (not k.isdigit(), int(k) if k.isdigit() else 0, k)):
            where = f"{path}, question {key!r}"
            relative = f"{scenario}/{variant}/{key}.jpg"
            images = images or image_folder(root, ("data/imgs", "imgs", "data/img", "img", "."), relative)
            samples.append(
                Sample.single(
                    f"{scenario}/{key}",
                    field_of(items[key], QUESTION[variant], where),
                    images=(image_path(root, images, relative, where),),
                    meta={
                        "category": scenario,
                        "topic": str(items[key].get("Question", "")),
                        "key_phrase": str(items[key].get("Key Phrase", "")),
                        "advice": scenario in ADVICE_SCENARIOS,
                    },
                )
            )
    return safety_set(name, samples, where=folder, max_new_tokens=max_new_tokens)
