"""The reference pages of the documentation, made from the code when the documentation is built (a hook of MkDocs).

Nothing of it is written by hand: verbs and options come from the command line's parser, configurations from their
dataclasses, names from the registries, functions and classes from the source. `tests/test_docs.py` asks that nothing
is left out and that every option is explained.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import html
import importlib
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import holdfast

PACKAGE = Path(holdfast.__file__).parent

# Which part of the package a page of the reference is about, and what the part is for.
PARTS = {
    "api": "edits of live models: `holdfast.harmonize`",
    "restore": "refusals and skills back, to a budget; the gate",
    "experiment": "a run file and what it becomes",
    "methods": "one method of a stream each",
    "rules": "one edit of a layer each",
    "functional": "the mathematics: tensors in, tensors out",
    "editing": "edits streamed over checkpoints and adapters, and their checks",
    "calibration": "input statistics of a model's layers",
    "checkpoints": "safetensors, adapters and calibration files on disk",
    "models": "loading, encoding, generating",
    "training": "supervised tuning of one task",
    "tuners": "tuners beside LoRA: CRAM",
    "evaluation": "asking a model, scoring and judging",
    "judges": "what a reply to a forbidden request did",
    "scorers": "whether an answer is right",
    "metrics": "figures of continual learning and safety, and their intervals",
    "data": "streams, samples and safety sets",
    "stream": "the runner, its records and its summary",
    "reports": "report.html, tables, model cards",
    "labels": "people's labels beside a run",
    "tiny": "the embedded model and its world",
    "small": "the second world, on a pretrained language model",
    "config": "the strict decoder of YAML",
    "registry": "names, plug-ins and entry points",
    "errors": "every error that a user can act on",
}

# The command line has a page of its own; the others are no concern of a caller.
_ELSEWHERE = {"__init__", "__main__", "_moved", "cli", "version", "shipped", "files"}

# Units of numeric options by the words of their names, where the description does not say them.
UNITS = {
    "_s": "seconds",
    "seconds": "seconds",
    "percent": "%",
    "_bytes": "bytes",
    "tokens": "tokens",
    "length": "tokens",
    "steps": "optimizer steps",
    "epochs": "passes over the data",
    "batch_size": "samples",
    "samples": "samples",
    "limit": "samples",
    "pixels": "pixels",
    "workers": "processes",
    "threads": "threads",
    "share": "0..1",
    "ratio": "0..1",
    "fraction": "0..1",
    "dropout": "0..1",
    "max_asr": "0..1",
    "max_over_refusal": "0..1",
    "max_drop": "0..1",
    "min_refused": "0..1",
    "bounds": "% for keep_bounds, else a factor",
}


def parts() -> dict[str, str]:
    """Part of the package -> what it is for: PARTS, and whatever else there is by its own first line."""
    there = {p.stem: p for p in sorted(PACKAGE.iterdir()) if p.suffix == ".py" or (p / "__init__.py").is_file()}
    found = {name: purpose for name, purpose in PARTS.items() if name in there}
    for name, path in there.items():
        if name not in found and name not in _ELSEWHERE:
            source = path / "__init__.py" if path.is_dir() else path
            found[name] = _first(ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or name).rstrip(".")
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/; called by MkDocs."""
    from mkdocs.structure.files import File

    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def uris() -> set[str]:
    """Paths below docs/ of the generated pages; cheap, where `pages` imports every method."""
    return {f"reference/{name}.md" for name in ("cli", "options", "names", "api", *(f"api/{p}" for p in parts()))}


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown of every generated page."""
    found = {
        "reference/cli.md": cli_page(),
        "reference/options.md": options_page(),
        "reference/names.md": names_page(),
    }
    for part, purpose in parts().items():
        found[f"reference/api/{part}.md"] = api_page(part, purpose)
    lines = [
        "# Python, part by part",
        "",
        "Every public function and class, with its signature, shapes and errors.",
        "",
    ]
    lines += ["| part | what it is for |", "| --- | --- |"]
    lines += [f"| [`holdfast.{part}`](api/{part}.md) | {purpose} |" for part, purpose in parts().items()]
    found["reference/api.md"] = "\n".join(lines) + "\n"
    assert set(found) == uris()
    return found


# ---------------------------------------------------------------------------------------------------- command line


def cli_page() -> str:
    """Every verb with its arguments and options, from the parser."""
    import typer

    from holdfast.cli import VERBS, app
    from holdfast.cli.root import root

    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", "Every verb, every option. `holdfast VERB --help` prints the same.", ""]
    lines += ["| verb | what it does |", "| --- | --- |"]
    for name, command in group.commands.items():
        lines.append(f"| [`{name}`](#holdfast-{name}) | {_cell(_first(command.help or ''))} |")
    lines += ["", "Before the verb:", "", *_option_table(group, root), ""]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(a.name.upper() if a.required else f"[{a.name.upper()}]" for a in arguments)
        lines += [
            f"## holdfast {name}",
            "",
            "```text",
            f"holdfast {name} {usage} [OPTIONS]".replace("  ", " "),
            "```",
            "",
        ]
        lines += [html.escape(inspect.cleandoc(command.help or ""), quote=False), ""]
        if arguments:
            lines += ["| argument | what it is |", "| --- | --- |"]
            lines += [f"| `{a.name.upper()}` | {_cell(a.help or '')} |" for a in arguments]
            lines.append("")
        lines += [*_option_table(command, importlib.import_module(VERBS[name]).command), ""]
    return "\n".join(lines)


def _option_table(command: Any, function: Any) -> list[str]:
    rows = ["| option | takes | default | what it is |", "| --- | --- | --- | --- |"]
    hints = typing.get_type_hints(function)
    for option in command.params:
        if option.param_type_name != "option" or "--help" in option.opts:
            continue
        names = ", ".join(f"`{n}`" for n in [*option.opts, *option.secondary_opts])
        takes = "a switch" if option.is_flag else _takes(option, hints[option.name])
        default = "" if option.default in (None, False, ()) or option.required else f"`{_plain(option.default)}`"
        rows.append(
            f"| {names} | {takes} | {'required' if option.required else default} | {_cell(option.help or '')} |"
        )
    return rows


_WORDS = {int: "whole number", float: "number", str: "text", Path: "path"}


def _takes(option: Any, hint: Any) -> str:
    """What is written behind an option, from the annotation of the verb's function."""
    kind = hint
    while typing.get_origin(kind) is not None and typing.get_origin(kind) is not typing.Literal:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        shown = " or ".join(f"`{choice}`" for choice in typing.get_args(kind))
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        shown = " or ".join(f"`{choice.value}`" for choice in kind)
    else:
        shown = _WORDS.get(kind, "text")
    low, high = getattr(option, "min", None), getattr(option, "max", None)
    bounds = (f" from {low:g}" if low is not None else "") + (f" to {high:g}" if high is not None else "")
    return shown + bounds + (", repeatable" if option.multiple else "")


# -------------------------------------------------------------------------------------------------- configurations


def configurations() -> list[tuple[str, type]]:
    """(heading, dataclass) of everything that a run file, or a call from Python, may set."""
    from holdfast import methods, rules
    from holdfast.calibration.curvature import CalibrationConfig
    from holdfast.data.images import PictureConfig
    from holdfast.evaluation.evaluation_config import EvaluationConfig, JudgeConfig
    from holdfast.experiment import run_config
    from holdfast.restore.restore_config import RestoreConfig
    from holdfast.restore.search import Budget
    from holdfast.training.training_config import TrainingConfig
    from holdfast.tuners.cram.cram_config import CramConfig

    found: list[tuple[str, type]] = [
        ("A run file", run_config.RunConfig),
        ("`injection:` of a run file", run_config.InjectionConfig),
        ("`safety_calibration:` of a run file", run_config.OwnAnswersConfig),
        ("`benign_calibration:` of a run file", run_config.OwnBenignConfig),
        ("`safety_gate:` of a run file", run_config.SafetyGateConfig),
        ("`evaluation:` of a run file", EvaluationConfig),
        ("`evaluation.judges` of a run file, each", JudgeConfig),
        ("`training:` of every method", TrainingConfig),
        ("`calibration:` of methods that edit", CalibrationConfig),
        ("`cram:` of the CRAM methods", CramConfig),
        ("Pictures", PictureConfig),
        ("`holdfast.restore`: the search", RestoreConfig),
        ("`holdfast.restore`: the budget", Budget),
    ]
    for registry, kind in ((methods.REGISTRY, "Method"), (rules.REGISTRY, "Rule")):
        for name in registry.names():
            where = registry.find(name).where
            module, _, attribute = where.partition(":")
            config = getattr(getattr(importlib.import_module(module), attribute), "Config", None)
            if config is not None and dataclasses.is_dataclass(config):
                found.append((f"{kind} `{name}`", config))
    return found


def options_page() -> str:
    """Every option of every configuration: type, default, unit and what it is."""
    lines = [
        "# Options",
        "",
        "Every option of every configuration, from the code. Rates are 0..1 in files. `null` is YAML for none.",
        "",
    ]
    seen: dict[type, str] = {}
    for heading, config in configurations():
        lines += [f"## {heading}", ""]
        if config in seen:
            lines += [f"The same as {seen[config]}.", ""]
            continue
        seen[config] = heading
        lines += [html.escape(_first(inspect.getdoc(config) or ""), quote=False), ""]
        rows = list(rows_of(config))
        if not rows:
            lines += ["It has no options.", ""]
            continue
        lines += ["| option | type | default | unit | what it is |", "| --- | --- | --- | --- | --- |"]
        for name, kind, default, unit, text in rows:
            lines.append(f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(unit)} | {_cell(text)} |")
        lines.append("")
    return "\n".join(lines)


def rows_of(config: type) -> Iterator[tuple[str, str, str, str, str]]:
    """(option, type, default, unit, description) of each field of a configuration."""
    described = {name: text for base in reversed(config.__mro__) for name, text in described_in(base).items()}
    for field in dataclasses.fields(config):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        if field.default is not dataclasses.MISSING:
            default = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            default = "its own defaults" if dataclasses.is_dataclass(made) else _plain(made)
        else:
            default = "required"
        text = described.get(field.name, "")
        yield field.name, kind, default, _unit(field.name, kind), text or _section(config, field.name)


def _section(config: type, name: str) -> str:
    """What is to be said of a field that is a configuration itself: the first line about that one."""
    try:
        hint = typing.get_type_hints(config).get(name)
    except NameError:
        return ""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return _first(inspect.getdoc(part) or "")
    return ""


def described_in(config: type) -> dict[str, str]:
    """Option -> description, from a docstring whose paragraphs begin `name, other: text`."""
    text = inspect.cleandoc(config.__doc__ or "")
    names = set(getattr(config, "__dataclass_fields__", {}))
    found: dict[str, str] = {}
    current: list[str] = []
    for line in text.splitlines():
        for piece in _pieces(line, names):
            head = re.match(r"\s*((?:[a-z_]\w*(?:\[[^\]]*\])?)(?:(?:, | and | or )[a-z_]\w*)*):\s*(.*)", piece)
            given = re.findall(r"[a-z_]\w*", head.group(1)) if head else []
            if head and any(name in names for name in given):
                current = [name for name in given if name in names]
                for name in current:
                    found[name] = head.group(2).strip()
            elif current and line.strip():
                for name in current:
                    found[name] = f"{found[name]} {piece.strip()}".strip()
            else:
                current = []
    return found


def _pieces(line: str, names: set[str]) -> list[str]:
    """A docstring line, parted where another option's description begins behind a full stop."""
    starts = [
        m.start(1)
        for m in re.finditer(r"[.;]\s+((?:[a-z_]\w*)(?:(?:, | and )[a-z_]\w*)*): ", line)
        if any(name in names for name in re.findall(r"\w+", m.group(1)))
    ]
    edges = [0, *starts, len(line)]
    return [line[a:b] for a, b in itertools.pairwise(edges) if line[a:b].strip()] or [line]


def _unit(name: str, kind: str) -> str:
    if not re.search(r"\b(int|float)\b", kind):
        return ""
    for word, unit in UNITS.items():
        if name.endswith(word):
            return unit
    return ""


# ----------------------------------------------------------------------------------------------------------- names


def names_page() -> str:
    """What `holdfast list` prints."""
    from holdfast.cli.list import REGISTRIES, entries

    lines = [
        "# Names",
        "",
        "What a run file, a stream file or an option may name; `holdfast list KIND` prints the same.",
        "",
    ]
    for kind in REGISTRIES:
        lines += [f"## {kind}", "", "| name | what it is |", "| --- | --- |"]
        lines += [f"| `{name}` | {_cell(line)} |" for name, _, line in entries(kind)]
        lines.append("")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- modules


def api_page(part: str, purpose: str) -> str:
    """Public functions and classes of one part, read from the source."""
    lines = [f"# holdfast.{part}", "", purpose[0].upper() + purpose[1:] + ".", ""]
    for module, tree in public_modules(part):
        items = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        if not items:
            continue
        lines += [f"## {module}", "", *_prose(ast.get_docstring(tree) or "")]
        for node in items:
            lines += _function(node, module) if isinstance(node, ast.FunctionDef) else _class(node, module)
    return "\n".join(lines) + "\n"


def public_modules(part: str) -> Iterator[tuple[str, ast.Module]]:
    """(dotted name, tree) of the modules of a part whose names do not begin with an underscore."""
    root = PACKAGE / part
    paths = sorted(root.rglob("*.py")) if root.is_dir() else [PACKAGE / f"{part}.py"]
    for path in paths:
        relative = path.relative_to(PACKAGE).with_suffix("")
        if any(p.startswith("_") and p != "__init__" for p in relative.parts):
            continue
        name = ".".join(["holdfast", *(p for p in relative.parts if p != "__init__")])
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def _function(node: ast.FunctionDef, owner: str, level: int = 3) -> list[str]:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = _folded(f"{node.name}(", _arguments(node.args), f"){returns}")
    anchor = f"{owner}.{node.name}"
    return [
        f"{'#' * level} {node.name} {{ #{anchor} }}",
        "",
        "```python",
        signature,
        "```",
        "",
        *_prose(ast.get_docstring(node) or ""),
    ]


def _class(node: ast.ClassDef, module: str) -> list[str]:
    bases = ", ".join(ast.unparse(b) for b in node.bases)
    lines = [f"### {node.name} {{ #{module}.{node.name} }}", "", "```python"]
    lines.append(f"class {node.name}" + (f"({bases})" if bases else ""))
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            value = f" = {ast.unparse(item.value)}" if item.value else ""
            lines.append(f"    {item.target.id}: {ast.unparse(item.annotation)}{value}")
    lines += ["```", "", *_prose(ast.get_docstring(node) or "")]
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
            lines += _function(item, f"{module}.{node.name}", level=4)
    return lines


def _arguments(arguments: ast.arguments) -> list[str]:
    # ast writes all of them on one line; each with its own default is what a reader looks for.
    found: list[str] = []
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for given, default in zip(positional, defaults, strict=True):
        found.append(ast.unparse(given) + (f" = {ast.unparse(default)}" if default else ""))
    if arguments.vararg:
        found.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        found.append("*")
    for given, keyword in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(ast.unparse(given) + (f" = {ast.unparse(keyword)}" if keyword else ""))
    if arguments.kwarg:
        found.append(f"**{ast.unparse(arguments.kwarg)}")
    return found


def _folded(head: str, arguments: list[str], tail: str) -> str:
    line = head + ", ".join(arguments) + tail
    return line if len(line) <= 88 else "\n".join([head, *(f"    {a}," for a in arguments), tail])


def _prose(text: str) -> list[str]:
    """A docstring: its first paragraph as prose, the rest as it was written."""
    first, _, rest = text.partition("\n\n")
    lines = [html.escape(" ".join(first.split()), quote=False).replace("[", "\\["), ""] if first else []
    if rest.strip():
        lines += ["```text", *textwrap.dedent(rest).strip("\n").replace("```", "'''").splitlines(), "```", ""]
    return lines


def _first(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _plain(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, dict | tuple | list) and not value:
        return "none"
    if isinstance(value, tuple | list):
        return ", ".join(map(_plain, value))
    return str(getattr(value, "value", value))


def _cell(text: str) -> str:
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|").replace("*", "\\*")
