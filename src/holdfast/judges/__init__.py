"""Reply -> Verdict (safe | unsafe | unscored, and what the reply did). Registry: name -> "module:Class"."""

from __future__ import annotations

import importlib
from typing import Any

from holdfast.errors import ConfigError, unknown_name
from holdfast.judges.base import Behaviour, Judge, Label, Side, Verdict

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


def get(name: str, /, **options: Any) -> Judge:
    """The judge `name`, loaded on first use.

    Raises UnknownNameError: no such judge. ConfigError: an option that it does not take, or a wrong value.
    """
    if name not in JUDGES:
        raise unknown_name("judge", name, JUDGES)
    module, _, attribute = JUDGES[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    try:
        return cls(**options)
    except TypeError as error:
        raise ConfigError(f"judge {name!r} refused its options {options}: {error}.") from error


__all__ = ["JUDGES", "Behaviour", "Judge", "Label", "Side", "Verdict", "get"]
