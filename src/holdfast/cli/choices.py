"""Options with a fixed set of values. Typer lists them in --help and refuses any other.

The same words as in the library, mostly written again: importing them there would import torch for a --help. A test
holds the two together.
"""

from __future__ import annotations

from typing import Literal

from holdfast.functional.hpa_config import CurvatureForm as CurvatureFormName
from holdfast.functional.hpa_config import Projection as ProjectionName
from holdfast.functional.hpa_config import Ranking as CriterionName

ActivationsName = Literal["each", "old", "new"]
AlignName = Literal["auto", "id", "order"]
BackendName = Literal["transformers", "vllm"]
CoefficientName = Literal["drop", "measure", "keep"]
DtypeName = Literal["float32", "bfloat16", "float16"]
ExportName = Literal["dense", "adapter"]
ImageModeName = Literal["upright", "published"]
Kind = Literal["methods", "scorers", "judges", "readers", "safety-readers", "tuners", "rules", "families", "streams"]
MixedName = Literal["first", "merge", "refuse"]
ModeName = Literal["paper", "strict"]
NormalizationName = Literal["sequence", "token", "sum"]
OnFailureName = Literal["error", "retry"]
TokensName = Literal["all", "text", "answer"]
WorldName = Literal["tiny", "small"]

__all__ = [
    "ActivationsName",
    "AlignName",
    "BackendName",
    "CoefficientName",
    "CriterionName",
    "CurvatureFormName",
    "DtypeName",
    "ExportName",
    "ImageModeName",
    "Kind",
    "MixedName",
    "ModeName",
    "NormalizationName",
    "OnFailureName",
    "ProjectionName",
    "TokensName",
    "WorldName",
]
