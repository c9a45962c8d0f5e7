"""What every list of phrases is searched in: one spelling of a reply, and the answer without the thought before it.

A published list keeps its published rule (`phrases.vlguard`) and is searched in the reply as it came; every list of
ours is searched in `plain(reply)`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# Typographic and look-alike signs that NFKC leaves as they are.
_APOSTROPHES = "\u2018\u2019\u201a\u201b\u02bb\u02bc\u02b9\u02c8\u00b4\u0060\u2032\u2035\u05f3\ua78c\uff07"
_QUOTES = "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\u2036\u301d\u301e\u301f\u2039\u203a\uff02"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_SIGNS = {ord(c): "'" for c in _APOSTROPHES} | {ord(c): '"' for c in _QUOTES}
# A dash between letters is a hyphen, one between words a pause: the sentence reader wants to tell them apart.
_SIGNS |= {ord(c): "-" for c in "\u2010\u2011\ufe63\uff0d"} | {ord(c): " - " for c in "\u2013\u2014\u2015\u2012\ufe58"}
_SIGNS |= {
    ord(c): " "
    for c in "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
}
# Soft hyphens, joiners, direction marks, variation selectors, byte order marks: seen by no reader.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)

_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[^\n]*$", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*(?:[-*_=][ \t]*){3,}$", re.MULTILINE)
_LINE_MARK = re.compile(r"^[ \t]*(?:(?:>[ \t]?)+|#{1,6}[ \t]+)+", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]\n]*)\]\((?:[^()\s]|\([^()\s]*\))*(?:\s+\"[^\"]*\")?\)")
_HTML = re.compile(
    r"</?(?:p|br|b|i|em|strong|u|s|div|span|h[1-6]|ul|ol|li|blockquote|font|center)\b[^<>]*>", re.IGNORECASE
)
_EMPHASIS = re.compile(r"(?<![\w\\])(\*{1,3}|_{1,3}|~~)(?=\S)|(?<=\S)(\*{1,3}|_{1,3}|~~)(?!\w)|\*{2,3}")


def spell(text: str) -> str:
    """`text` in one spelling: NFKC, straight quotes, plain spaces, no invisible signs. Lines, case and marks stay."""
    text = _INVISIBLE.sub("", text.translate(_SIGNS))
    # NFKC writes an acute accent as a space and a combining mark, so the signs go first; full-width forms come after.
    return unicodedata.normalize("NFKC", text).translate(_SIGNS)


def plain(text: str) -> str:
    """`text` in one spelling, its lines kept: NFKC, straight quotes, plain spaces, no markdown marks, lower case.

    The words stay; what goes are marks that no reader sees as words (emphasis, headings, quoting bars, fences, links'
    targets, invisible signs).
    """
    text = _HTML.sub(lambda m: "\n" if m.group(0).lower()[:3] in ("<br", "<p>", "<li", "<di") else "", spell(text))
    text = _FENCE.sub("", text)
    text = _RULE.sub("", text)
    text = _LINE_MARK.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _EMPHASIS.sub("", text)
    # casefold writes a German sharp s as "ss"; lower keeps words as they are listed.
    return "\n".join(" ".join(line.split()) for line in text.lower().splitlines()).strip()


def flat(text: str) -> str:
    """`plain(text)` on one line."""
    return " ".join(plain(text).split())


# --- the thought before the answer ---------------------------------------------------------------------------------

_NAMES = (
    r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning|reason|reflection|analysis|scratch_?pad|inner_monologue|"
    r"internal|cot|chain_of_thought|planning|deliberation)"
)
# Opening and closing marks of a block of thought, by family; "\1" in the closing mark is the name that was opened.
_BLOCKS: tuple[tuple[re.Pattern[str], str], ...] = (
    # <think> of DeepSeek-R1, Qwen3 and many others; <thinking>, <reasoning>, <seed:think> ...
    (re.compile(rf"<\s*({_NAMES})\b[^<>]*>", re.IGNORECASE), r"<\s*/\s*\1\s*>"),
    # Kimi
    (re.compile(r"◁\s*(think)\s*▷", re.IGNORECASE), r"◁\s*/\s*\1\s*▷"),
    # Magistral and other Mistral models
    (re.compile(r"\[\s*(think|thinking|reasoning|analysis)\s*\]", re.IGNORECASE), r"\[\s*/\s*\1\s*\]"),
    # Tokens of their own: <|begin_of_thought|> ... <|end_of_thought|>, <|think|> ... <|/think|>
    (re.compile(r"<\|\s*begin_of_(thought|thinking|reasoning|think)\s*\|>", re.IGNORECASE), r"<\|\s*end_of_\1\s*\|>"),
    (
        re.compile(r"<\|\s*(thought|thinking|reasoning|think|analysis)(?:_start|_begin)?\s*\|>", re.IGNORECASE),
        r"<\|\s*(?:/\s*\1|\1_end|end_(?:of_)?\1)\s*\|>",
    ),
    (
        re.compile(r"<\|\s*(?:start|begin)_(thought|thinking|reasoning|think)\s*\|>", re.IGNORECASE),
        r"<\|\s*end_\1\s*\|>",
    ),
    # Command A: <|START_THINKING|>; Gemma's <unused94>thought ... <unused95>
    (re.compile(r"<unused94>\s*(thought)?", re.IGNORECASE), r"<unused95>"),
    (re.compile(r"```\s*(thinking|thought|reasoning|think)\b[^\n]*\n", re.IGNORECASE), r"\n```"),
)  # fmt: skip
_FINAL_MARK = re.compile(
    r"<\|\s*(?:start_response|begin_of_solution|begin_of_answer|response|answer|solution)\s*\|>|"
    r"</?\s*(?:answer|response|final|final_answer|output|solution)\s*>|"
    r"<\|\s*(?:end_response|end_of_solution|end_of_answer|end|return|im_end|eot_id|endoftext|eom_id)\s*\|>|</s>",
    re.IGNORECASE,
)
# OpenAI's harmony: <|start|>assistant<|channel|>analysis<|message|> ... <|end|>; only the final channel is an answer.
_CHANNEL = re.compile(
    r"(?:<\|start\|>\s*\w*\s*)?<\|channel\|>\s*([a-z]+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>", re.IGNORECASE
)
_CHANNEL_END = re.compile(r"<\|(?:end|return|call)\|>")
# What stays of harmony where a server strips special tokens: "analysisThe user asks ...assistantfinalHere is ..."
_BARE_CHANNEL = re.compile(r"\A\s*(?:assistant)?\s*(?:analysis|commentary)(?=[A-Z\s\"'(])", re.DOTALL)
_BARE_FINAL = re.compile(r"assistant\s*final|(?<=[.!?\s\"')])final(?=[A-Z*#])")
# Thoughts with a heading of their own, and an answer with one.
_TITLED = re.compile(
    r"\A[\s>*#_]*(?:thought|thoughts|thinking|thinking process|reasoning|chain of thought|internal monologue|"
    r"scratchpad|analysis|my thoughts|step-by-step reasoning)[\s*_]*:[\s*_]*",
    re.IGNORECASE,
)
_TITLED_ANSWER = re.compile(
    r"^[\s>*#_]*(?:final answer|final response|final|answer|response|reply|output|assistant)[\s*_]*:[\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
_STRAY_CLOSE = re.compile(
    rf"<\s*/\s*(?:{_NAMES})\s*>|◁\s*/\s*think\s*▷|\[\s*/\s*(?:think|thinking)\s*\]|"
    r"<\|\s*(?:/\s*think|end_of_(?:thought|thinking)|end_thinking|END_THINKING)\s*\|>|<unused95>",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A reply without the model's thoughts.

    text: the answer. cut: characters of thought that were left out. unclosed: a thought begins and does not end, so
    that what the model would have answered is not known.
    """

    text: str
    cut: int = 0
    unclosed: bool = False

    @property
    def note(self) -> str:
        """A sentence for the evidence, or nothing."""
        return f"{self.cut} characters of reasoning left out; " if self.cut else ""


def answer_of(reply: str) -> Answer:
    """The answer in `reply`: blocks of thought, analysis channels and titled thoughts are left out.

    A block that is never closed leaves no answer that can be told from the thought: `unclosed`.
    """
    if _CHANNEL.search(reply):
        return _harmony(reply)
    if _BARE_CHANNEL.match(reply):
        finals = list(_BARE_FINAL.finditer(reply))
        if not finals:
            # "Analysis of the market" is a title, not a channel: the bare form runs straight into its text.
            if re.match(r"\A\s*(?:assistant)?(?:analysis|commentary)[A-Z\"'(]", reply):
                return Answer(text="", cut=len(reply), unclosed=True)
        else:
            return Answer(text=_without_marks(reply[finals[-1].end() :]), cut=finals[-1].end())
    text, cut = reply, 0
    # One block after another, and blocks inside blocks: the outermost mark is found first, then what follows it.
    for _ in range(64):
        found = min(
            ((m, close) for opening, close in _BLOCKS if (m := opening.search(text)) is not None),
            key=lambda pair: pair[0].start(),
            default=None,
        )
        if found is None:
            break
        opened, close = found
        name = re.escape(opened.group(1) or "") if opened.re.groups else ""
        end = _matching_end(text, opened, re.compile(close.replace(r"\1", name), re.IGNORECASE))
        if end is None:
            if _quoted(text, opened.start()):
                break
            return Answer(text=text[: opened.start()].strip(), cut=cut + len(text) - opened.start(), unclosed=True)
        cut += end - opened.start()
        text = text[: opened.start()] + "\n" + text[end:]
    # Chat templates may open the block in the prompt: only its end stands in the reply.
    strays = list(_STRAY_CLOSE.finditer(text))
    if strays:
        cut += strays[-1].end()
        text = text[strays[-1].end() :]
    if titled := _TITLED.match(text):
        answers = list(_TITLED_ANSWER.finditer(text, titled.end()))
        if answers:
            cut += answers[-1].end()
            text = text[answers[-1].end() :]
    return Answer(text=_without_marks(text) if cut else text, cut=cut)


def _matching_end(text: str, opened: re.Match[str], close: re.Pattern[str]) -> int | None:
    """Where the block that `opened` begins ends, blocks of the same kind inside it counted; None: never."""
    depth, at = 1, opened.end()
    while depth:
        ending = close.search(text, at)
        if ending is None:
            # A thought may name its own mark without opening a block: then the last end counts.
            ends = list(close.finditer(text, opened.end()))
            return ends[-1].end() if ends else None
        depth += len(opened.re.findall(text[at : ending.start()])) - 1
        at = ending.end()
    return at


def _quoted(text: str, at: int) -> bool:
    """Whether the mark at `at` is spoken of (in code or quotes) rather than opened."""
    return text[max(0, at - 1) : at] in ("`", '"', "'", "\u201c", "\u2018")


def _harmony(reply: str) -> Answer:
    parts = list(_CHANNEL.finditer(reply))
    texts = []
    for index, part in enumerate(parts):
        stop = parts[index + 1].start() if index + 1 < len(parts) else len(reply)
        ended = _CHANNEL_END.search(reply, part.end(), stop)
        if part.group(1).lower() == "final":
            texts.append(reply[part.end() : ended.start() if ended else stop])
    before = reply[: parts[0].start()].strip()
    if not texts:
        return Answer(text=before, cut=len(reply) - len(before), unclosed=True)
    text = _without_marks("\n".join([before, *texts]))
    return Answer(text=text, cut=len(reply) - len(text))


def _without_marks(text: str) -> str:
    return _FINAL_MARK.sub("", text).strip()
