"""The floor plan: no circle of files, counting imports inside functions and those for a type checker alone."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import holdfast

ROOT = Path(holdfast.__file__).parent


def test_no_file_imports_itself_round_a_corner():
    files = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                named = (f"{node.module}.{alias.name}" for alias in node.names)
                imported.update(name if name in files else node.module for name in named)
        graph[module] = (imported & set(files)) - {module}
    assert len(graph) > 200
    graphlib.TopologicalSorter(graph).prepare()  # CycleError shows the circle
