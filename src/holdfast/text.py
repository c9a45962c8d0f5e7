"""Text from outside, made fit for people: nothing in it acts on a terminal, and no line of it is endless."""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` for a terminal: line breaks and tabs stay, every other control is written out instead of obeyed.

    Escape sequences could repaint the screen or the question, direction marks could turn a word round. Within a JSON
    string the written form means the same character, so JSON stays JSON.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if not _acts(c) else f"\\x{ord(c):02x}" if ord(c) < 0x20 else f"\\u{ord(c):04x}" for c in text)


def one_line(text: str, most: int = 200) -> str:
    """`text` in one visible line of at most `most` characters, its middle left out where it is longer."""
    line = visible(" ".join(text.split()))
    if len(line) <= most:
        return line
    head = (most - 3) * 2 // 3
    return f"{line[:head]}...{line[head + 3 - most :]}"


def _acts(c: str) -> bool:
    code = ord(c)
    if c in "\n\t":
        return False
    return (
        code < 0x20
        or 0x7F <= code <= 0x9F
        or 0xD800 <= code <= 0xDFFF
        or code in (0x200E, 0x200F, 0x061C, 0x2028, 0x2029)
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
    )
