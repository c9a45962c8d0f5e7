"""Sample -> Score. `SCORERS`: name -> "module:Class", loaded on first use.

Wherever a scorer is named, one of an installed distribution and `package.module:Class` do as well: `holdfast.registry`.
"""

from __future__ import annotations

from typing import Any

from holdfast.errors import ConfigError
from holdfast.registry import Registry
from holdfast.scorers.base import Mode, Score, Scorer

SCORERS: dict[str, str] = {
    "exact_match": "holdfast.scorers.match:ExactMatch",
    "containment": "holdfast.scorers.match:Containment",
    "option_letter": "holdfast.scorers.option:OptionLetter",
    "gqa": "holdfast.scorers.match:Gqa",
    "imagenet": "holdfast.scorers.match:TwoWayContainment",
    "ocrvqa": "holdfast.scorers.match:OcrVqa",
    "vqa": "holdfast.scorers.vqa:VqaSoftAccuracy",
    "anls": "holdfast.scorers.anls:Anls",
    "relaxed_accuracy": "holdfast.scorers.numeric:RelaxedAccuracy",
    "grounding": "holdfast.scorers.grounding:Grounding",
    "iou": "holdfast.scorers.grounding:Iou",
    "dcl_rs": "holdfast.scorers.dcl:DclShortAnswer",
    "dcl_med": "holdfast.scorers.dcl:DclContainment",
    "dcl_ad": "holdfast.scorers.dcl:DclDriving",
    "dcl_sci": "holdfast.scorers.dcl:DclScience",
    "dcl_fin": "holdfast.scorers.dcl:DclFinance",
    "acl_ocr": "holdfast.scorers.acl:AclOcr",
    "acl_math": "holdfast.scorers.acl:AclMath",
    "acl_vp": "holdfast.scorers.acl:AclPerception",
    "captions": "holdfast.scorers.captions:Captions",
}
REGISTRY = Registry("scorer", "holdfast.scorers", SCORERS, made_needs=("name", "mode", "score", "aggregate"))


def get(name: str, mode: Mode = "strict", **options: Any) -> Scorer:
    """The scorer `name` in `mode`: "paper" (what published numbers used) or "strict" (what one would want).

    Raises UnknownNameError: no such scorer. ConfigError: no such mode, an option that the scorer does not take, or
        code that cannot be imported or is no scorer.
    """
    cls = REGISTRY.load(name)
    if mode not in ("paper", "strict"):
        raise ConfigError(f"scorer {name!r}: mode is {mode!r}; expected 'paper' or 'strict'.")
    try:
        scorer = cls(mode=mode, **{**REGISTRY.options(name), **options})
    except TypeError as error:
        raise ConfigError(f"scorer {name!r} refused its options {options}: {error}.") from error
    return REGISTRY.made(name, scorer)


__all__ = ["REGISTRY", "SCORERS", "Mode", "Score", "Scorer", "get"]
