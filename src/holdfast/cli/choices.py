"""Options with a fixed set of values. Typer lists them in --help and refuses any other.

The same words as in the library, written again: importing them there would import torch for a --help. A test holds the
two together.
"""

from __future__ import annotations

from typing import Literal

ActivationsName = Literal["each", "old", "new"]
AlignName = Literal["auto", "id", "order"]
BackendName = Literal["transformers", "vllm"]
CoefficientName = Literal["drop", "measure", "keep"]
CriterionName = Literal["eps+phi", "eps", "phi"]
CurvatureFormName = Literal["divide", "multiply"]
DtypeName = Literal["float32", "bfloat16", "float16"]
ExportName = Literal["dense", "adapter"]
Kind = Literal["methods", "scorers", "judges", "families", "streams"]
ModeName = Literal["paper", "strict"]
NormalizationName = Literal["sequence", "token", "sum"]
OnFailureName = Literal["error", "retry"]
ProjectionName = Literal["layer", "column", "none"]
TokensName = Literal["all", "text", "answer"]
