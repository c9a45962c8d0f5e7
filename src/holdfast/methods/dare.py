"""DARE (Yu et al., ICML 2024) after each task: entries of the change return at random. See `holdfast.rules.dare`."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.methods._glue.rule_options import part_of
from holdfast.methods.seqft import SeqFT, SeqFTConfig
from holdfast.rules.base import EditRule
from holdfast.rules.dare import DareOptions, DareRule


@dataclass(frozen=True, kw_only=True)
class DareConfig(SeqFTConfig, DareOptions):
    """Options of DARE in a stream: the edit's, over those of tuning."""


class Dare(SeqFT):
    """DARE: entries of the change return at random, the others are scaled up."""

    Config = DareConfig
    config: DareConfig

    def rule(self) -> EditRule:
        """DARE with this method's options."""
        return DareRule(part_of(self.config, DareOptions))


__all__ = ["Dare", "DareConfig", "DareRule"]
