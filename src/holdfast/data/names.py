"""Names of tasks and safety sets, and the files that they become."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from holdfast.errors import ConfigError

_LONGEST = 120


def slug(name: str) -> str:
    """The file name of a task or a safety set: letters, digits, `.`, `_` and `-` only, and no more than 120 of them."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "task"
    if len(plain) <= _LONGEST:
        return plain
    # Long names often differ at their end; a file system allows 255 bytes, prefixes and suffixes included.
    return f"{plain[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def refuse_shared_names(kind: str, names: Sequence[str], where: str) -> None:
    """Refuse two names that are, or become, the same: the answers of one would be read as those of the other.

    Raises: ConfigError: a name is there twice, or two names have one file name.
    """
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(f"{where}: {kind} name(s) used twice: {', '.join(double)}.")
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(slug(name), name)
        if other != name:
            raise ConfigError(
                f"{where}: the {kind}s {other!r} and {name!r} would write to the same files ({slug(name)!r}). Rename "
                "one of them; letters, digits, '.', '_' and '-' tell names apart."
            )
