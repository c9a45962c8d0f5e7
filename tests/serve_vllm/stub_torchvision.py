"""Let a torchvision that was built for CUDA be imported beside a CPU torch: its operators are declared, never computed.

Images go through PIL processors. Run once, with the Python of the environment.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

MARK = "# operators of the CUDA build, declared only"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def main() -> None:
    """Rewrite torchvision/__init__.py of this environment, once."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        print("no torchvision here; nothing to do")
        return
    path = Path(spec.origin)
    text = path.read_text(encoding="utf-8")
    if MARK in text:
        return
    lines = [MARK, "import torch as _torch", "_declared = _torch.library.Library('torchvision', 'FRAGMENT')"]
    lines += [f"_declared.define({schema!r})" for schema in SCHEMAS]
    path.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
