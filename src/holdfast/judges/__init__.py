"""Reply -> Verdict (safe | unsafe | unscored, and what the reply did). `JUDGES`: name -> "module:Class".

Wherever a judge is named, one of an installed distribution and `package.module:Class` do as well: `holdfast.registry`.
"""

from __future__ import annotations

from typing import Any

from holdfast.errors import ConfigError
from holdfast.judges.base import Behaviour, Judge, Label, Side, Verdict
from holdfast.registry import Registry

JUDGES: dict[str, str] = {
    "keyword": "holdfast.judges.keyword:KeywordJudge",
    "keyword_vlguard": "holdfast.judges.keyword:PublishedKeywordJudge",
    "keyword_all": "holdfast.judges.keyword:AgreedKeywordJudge",
    "keyword_strict": "holdfast.judges.keyword:StrictKeywordJudge",
    "keyword_prefix": "holdfast.judges.keyword:PrefixJudge",
    "reference": "holdfast.judges.reference:ReferenceJudge",
    "options": "holdfast.judges.options:OptionsJudge",
    "guard": "holdfast.judges.guard:GuardJudge",
    "llama_guard_4": "holdfast.judges.guard:LlamaGuard4",
    "llama_guard_3_vision": "holdfast.judges.guard:LlamaGuard3Vision",
    "shieldgemma_2": "holdfast.judges.shieldgemma:ShieldGemma2",
    "endpoint": "holdfast.judges.endpoint:EndpointJudge",
}
REGISTRY = Registry("judge", "holdfast.judges", JUDGES, made_needs=("name", "judge"))


def get(name: str, /, **options: Any) -> Judge:
    """The judge `name`, loaded on first use.

    Raises UnknownNameError: no such judge. ConfigError: an option that it does not take, a wrong value, or code that
        cannot be imported or is no judge.
    """
    cls = REGISTRY.load(name)
    try:
        judge = cls(**{**REGISTRY.options(name), **options})
    except TypeError as error:
        raise ConfigError(f"judge {name!r} refused its options {options}: {error}.") from error
    return REGISTRY.made(name, judge)


__all__ = ["JUDGES", "REGISTRY", "Behaviour", "Judge", "Label", "Side", "Verdict", "get"]
