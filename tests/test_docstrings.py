"""Every public function says what it is, of which shape its tensors are, and what it raises. Read from the source.

Public: of the package, no name on the way begins with an underscore. What a class inherits its documentation for is
still one thing to say: what it does here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "holdfast"

# Files that are being rewritten: names come and go there this week. The list
# may only become shorter: one that needs no leave any more fails the test too.
ON_LEAVE = ("data/images", "data/items", "judges/")

# Functions that make the error which is raised: raise unknown_name(...).
MAKERS = {"unknown_name": "UnknownNameError", "storage_error": "StorageError"}
# (r, c), (n,), (batch, tokens, 3), (): dimensions in words or letters.
SHAPE = re.compile(r"(?<!\w)\((?:\w+,|[\w*+-][\w*+ -]*(?:, ?[\w*+-][\w*+ -]*)+)?\)")
TYPED = re.compile(r"\b(?:Float|Int|Bool|Num|Shaped|UInt8|Complex)\[[^\]]*\]")


@dataclass(frozen=True)
class Function:
    name: str
    node: ast.FunctionDef

    @property
    def text(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def has_bare_tensor(self) -> bool:
        """Whether a tensor comes or goes whose annotation shows no shape."""
        arguments = [*self.node.args.posonlyargs, *self.node.args.args, *self.node.args.kwonlyargs]
        annotations = [a.annotation for a in arguments if a.annotation] + [self.node.returns or ast.Constant(None)]
        return any(re.search(r"\bTensor\b", TYPED.sub("", ast.unparse(a))) for a in annotations)

    @property
    def raised(self) -> set[str]:
        """Names of the errors that its own statements raise; one caught and raised again is not its own."""
        return {name for statement in self.node.body for name in _raised(statement)}


def _raised(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
        return
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        called = node.exc.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        name = MAKERS.get(name, name)
        if name[:1].isupper():
            yield name
    for child in ast.iter_child_nodes(node):
        yield from _raised(child)


def functions() -> Iterator[Function]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if any(part.startswith("_") and part not in ("__init__", "_glue") for part in relative.split("/")):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
            for found in inner:
                if isinstance(found, ast.FunctionDef) and not found.name.startswith("_"):
                    owner = f"{node.name}." if found is not node else ""  # type: ignore[attr-defined]
                    yield Function(f"{relative}:{owner}{found.name}", found)


ALL = list(functions())


def faults() -> dict[str, set[str]]:
    """Kind -> names of the functions that have it."""
    return {
        "no docstring": {f.name for f in ALL if not f.text.strip()},
        "a tensor without a shape, neither in an annotation nor in the text": {
            f.name for f in ALL if f.has_bare_tensor and not SHAPE.search(f.text) and "ny shape" not in f.text
        },
        # The docstring of a verb is its help page; what goes wrong there is printed as the error's own sentence.
        "raises, and its docstring does not say so": {
            f.name
            for f in ALL
            if f.raised and not f.name.startswith("cli/") and not re.search(r"\b[Rr]aises?\b", f.text)
        },
    }


FAULTS = faults()


def test_there_are_functions_to_ask() -> None:
    assert len(ALL) > 500


@pytest.mark.parametrize("kind", FAULTS)
def test_every_public_function_is_documented(kind: str) -> None:
    found = sorted(name for name in FAULTS[kind] if not name.startswith(ON_LEAVE))
    assert not found, f"{kind}: {', '.join(found)}"


@pytest.mark.parametrize("prefix", ON_LEAVE)
def test_nothing_is_on_leave_that_need_not_be(prefix: str) -> None:
    assert any(name.startswith(prefix) for names in FAULTS.values() for name in names)


@pytest.mark.parametrize(
    "text, shaped",
    [
        ("(r, c)", True),
        ("(n,) bool", True),
        ("a (B, T, d) state", True),
        ("f(x)", False),
        ("(the first)", False),
        ("a scalar, ()", True),
        ("none", False),
        ("(see: there)", False),
    ],
)
def test_what_counts_as_a_shape(text: str, shaped: bool) -> None:
    assert bool(SHAPE.search(text)) == shaped
