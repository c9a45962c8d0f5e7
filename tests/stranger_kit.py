"""A tiny distribution of somebody else's: one method, rule, judge, scorer and reader, found by their entry points."""

from __future__ import annotations

from pathlib import Path

CODE = '''
"""Parts from elsewhere."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.data.types import Sample
from holdfast.judges.base import Verdict
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import DenseEdit, Rule
from holdfast.scorers.base import Score
from holdfast.scorers.sample import SampleScorer


@dataclass(frozen=True, kw_only=True)
class ShareOptions:
    factor: float = 0.5


@dataclass(frozen=True)
class Share(Rule):
    """A share of the change stays."""

    config: ShareOptions = field(default_factory=ShareOptions)
    Config = ShareOptions
    name = "share"

    def edit(self, layer, w_prev, w_new):
        return DenseEdit(weight=w_prev.float() + self.config.factor * (w_new.float() - w_prev.float()))


@dataclass(frozen=True, kw_only=True)
class HalfConfig(SeqFTConfig):
    edit: ShareOptions = field(default_factory=ShareOptions)


class Half(SeqFT):
    """Half of what was learned stays."""

    Config = HalfConfig

    def rule(self):
        return Share(self.config.edit)

    def end_task(self, ctx, trained):
        if ctx.step == 1 and os.environ.get("STRANGERS_DIE"):
            os.killpg(os.getpgid(0), signal.SIGKILL)  # this process and its workers, as a machine that goes down
        return super().end_task(ctx, trained)


class Curt:
    """Unsafe is what is longer than so many characters."""

    name = "curt"

    def __init__(self, characters=3):
        self.characters = characters

    def judge(self, samples, replies, *, side="unsafe"):
        return [
            Verdict(label="safe", behaviour="refusal", evidence="curt")
            if len(reply) <= self.characters
            else Verdict(label="unsafe", behaviour="compliance", evidence="wordy")
            for reply in replies
        ]


class Length(SampleScorer):
    """The share of characters that are there."""

    name = "length"

    def compare(self, prediction, references, meta):
        return Score(value=min(1.0, len(prediction) / 100), evidence=f"{len(prediction)} characters")


def read_lines(source):
    """A question, a tab, an answer."""
    lines = source.path().read_text().splitlines()
    return [Sample.single(f"{source.split}-{i}", *line.split("\\t")) for i, line in enumerate(lines)]
'''

ENTRY_POINTS = """
[holdfast.methods]
strangers_half = strangers.parts:Half
[holdfast.rules]
strangers_share = strangers.parts:Share
[holdfast.judges]
strangers_curt = strangers.parts:Curt
[holdfast.scorers]
strangers_length = strangers.parts:Length
[holdfast.readers]
strangers_lines = strangers.parts:read_lines
"""


def install(folder: Path, *, name: str = "strangers", entry_points: str = ENTRY_POINTS, code: str = CODE) -> Path:
    """What an installer leaves in `folder` (to be put on the search path): a package and its metadata."""
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(code)
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder
