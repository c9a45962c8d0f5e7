"""Which language a reply is in, as far as its text shows it.

The words of a language are recognised by py3langid (139 languages, 5 MB, offline); a script that one language alone is
written in needs no detector. A short or undecided text has no language: what is called foreign must be evident.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from holdfast.errors import JudgeError

# Languages with refusal lists of their own: the twelve most spoken (Ethnologue 2025: English, Mandarin, Hindi, Spanish,
# French, Standard Arabic, Bengali, Portuguese, Russian, Indonesian, Urdu, German) and Japanese, the thirteenth.
READ = ("en", "zh", "hi", "es", "fr", "ar", "bn", "pt", "ru", "id", "ur", "de", "ja")
# Written so alike that their refusals are the same words, or that a detector tells them apart by chance.
_ALIKE = {
    "ms": "id", "jv": "id", "ace": "id",
    "yue": "zh", "wuu": "zh",
    "ary": "ar", "arz": "ar",
    "gl": "pt", "an": "es", "ext": "es", "oc": "fr", "gcf": "fr", "gcr": "fr", "wa": "fr",
    "lb": "de", "pcm": "en", "as": "bn",
}  # fmt: skip
# A detector is believed from so many words (or signs, where words are not spaced) and so much probability on.
_WORDS, _SIGNS, _SURE = 4, 8, 0.9
_FUNCTION_WORDS = frozenset(
    """
    the of and to with you your they their this that these those it its it's are were been which would could should
    can cannot can't does don't not but because there here what when how about into then take put use make get by i'm
    my our his her is or at if than we she
    """.split()  # noqa: SIM905
)
_LATIN_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+|[\w./\\-]*[/\\][\w./\\-]+|\b\w*[_=(){}<>]\w*\b", re.DOTALL
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """code: ISO 639-1 where there is one; "" where the text does not show it. script: of most of its letters."""

    code: str
    script: str

    @property
    def read(self) -> bool:
        """Whether there are lists for it; a short Latin text is taken for one that there are lists for."""
        return self.code in READ or (not self.code and self.script in ("", "LATIN"))


def language_of(text: str) -> Language:
    """The language of `text`; code "" where it is too short or undecided.

    Raises JudgeError: the detector is not installed and the text needs it.
    """
    words = _NO_WORDS.sub(" ", text)
    scripts = Counter(script for c in words if c.isalpha() and (script := _script(c)))
    if not scripts:
        return Language(code="", script="")
    script, count = scripts.most_common(1)[0]
    letters = sum(scripts.values())
    if scripts["KANA"] >= 2 and scripts["KANA"] + scripts["CJK"] >= 0.3 * letters:
        return Language(code="ja", script="KANA")
    if scripts["CJK"] >= 0.3 * letters:
        return Language(code="zh", script="CJK")
    alone = {
        "BENGALI": "bn",
        "HANGUL": "ko",
        "THAI": "th",
        "GREEK": "el",
        "HEBREW": "he",
        "TAMIL": "ta",
        "TELUGU": "te",
    }
    if script in alone and count >= 0.5 * letters and count >= _SIGNS // 2:
        return Language(code=alone[script], script=script)
    found = _LATIN_WORD.findall(words.lower())
    if script == "LATIN":
        known = sum(w in _FUNCTION_WORDS for w in found)
        if len(found) < _WORDS or known >= 0.2 * len(found):
            # Too short to tell, or English by its small words.
            return Language(code="en" if known >= 0.2 * len(found) and found else "", script=script)
    elif count < _SIGNS:
        return Language(code="", script=script)
    code, sure = _detect(" ".join(words.split()))
    code = _ALIKE.get(code, code)
    if script == "LATIN" and code != "en":
        # Names and loan words make a short English text look foreign.
        sure -= 0.3 * known / max(1, len(found))
    # Few languages share another script, and each of its words is evidence.
    enough = _SURE if script == "LATIN" else 0.5
    return Language(code=code if sure >= enough and code != "zxx" else "", script=script)


def _script(sign: str) -> str:
    code = ord(sign)
    if code < 0x250:
        return "LATIN"
    if 0x3040 <= code <= 0x30FF:
        return "KANA"
    if 0x3400 <= code <= 0x9FFF or 0x20000 <= code <= 0x3FFFF:
        return "CJK"
    return unicodedata.name(sign, "").partition(" ")[0]


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise JudgeError(
            "A reply is in a language that has to be told from others, and the package py3langid is not installed. "
            "It is a dependency of holdfast: run `pip install py3langid`."
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _detect(text: str) -> tuple[str, float]:
    """(language, probability), languages that are read alike taken together."""
    ranked: Counter[str] = Counter()
    for code, probability in _identifier().rank(text[:2000])[:12]:
        ranked[_ALIKE.get(code, code)] += probability
    code, probability = ranked.most_common(1)[0]
    return code, float(probability)
