"""The documentation builds strict and offline, every block of a tutorial runs, every printed command exists."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from holdfast import judges, scorers
from holdfast.cli import VERBS, app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Written for readers: pages of the documentation, and what lies beside the code.
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
GROUP: Any = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is to be saved as, its text and its first line's number."""

    language: str
    file: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").split("\n")
    start, head = None, ""
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start, head = number, line[3:]
            continue
        title = re.search(r'title="([^"]+)"', head)
        language = head.split()[0] if head.split() else ""
        yield Block(language, title.group(1) if title else "", "\n".join(lines[start + 1 : number]), start + 1)
        start = None
    assert start is None, f"{page}: the block of line {start} has no end"


def commands(text: str) -> list[list[str]]:
    """Command lines of a shell block as words; a backslash continues a line, `#` begins a comment."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@cache
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "hooks" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Each as it stands, but for how long it tunes, how many strengths it tries and how many questions it asks.
QUICKER = {
    r"\bmax_steps: \d+, batch_size: 16": "max_steps: 1, batch_size: 4",
    r"\bmax_steps: 20\b": "max_steps: 4",
    r"\bguard_requests: 16\b": "guard_requests: 4",
    r"\btest=\d+, ": "test=1, ",
    r"\bsafety=\d+, ": "safety=1, ",
    r"\b0\.1,0\.35,0\.8\b": "0.35",
    # One report of a run is enough: its pictures cost as much as the run.
    r"(--out team/run)\b": r"\1 --no-report",
    r"(--out lab/run --method seqft)\b": r"\1 --no-report",
    r"--probes 16 --task-samples 32": "--probes 4 --task-samples 12",
}


def quicker(text: str) -> str:
    for pattern, short in QUICKER.items():
        text = re.sub(pattern, short, text)
    return text


@pytest.mark.timeout(900)  # a quarter of a minute of work; on a crowded machine that takes its time
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_block_of_a_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    run = 0
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.language == "bash":
            for words in commands(quicker(block.text)):
                assert words[0] == "holdfast", f"{where}: {words[0]!r} is not run by this test"
                app(words[1:], standalone_mode=False)
        elif block.language == "python":
            exec(compile(quicker(block.text), where, "exec"), names)  # noqa: S102  # our own pages
        else:
            assert block.file, f"{where}: a block of {block.language!r} that is neither run nor saved"
            (tmp_path / block.file).write_text(quicker(block.text) + "\n", encoding="utf-8")
        run += 1
    assert run >= 4


@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs_as_it_stands(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40 and f"python examples/{script.name}" in (
        ast.get_docstring(ast.parse(text)) or ""
    )
    monkeypatch.chdir(tmp_path)
    before = set(judges.JUDGES), set(scorers.SCORERS)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:  # what a script registers is its own
        for table, known in zip((judges.JUDGES, scorers.SCORERS), before, strict=True):
            for name in set(table) - known:
                del table[name]
    assert capsys.readouterr().out.strip()


def test_what_makes_the_tutorials_quicker_is_in_them() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in TUTORIALS)
    assert all(re.search(pattern, text) for pattern in QUICKER)


def printed() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("", "bash", "sh"):
                for line in block.text.replace("\\\n", " ").splitlines():
                    if line.startswith("holdfast "):
                        yield f"{page.name}, line {block.line}", shlex.split(line, comments=True)


def test_every_command_that_is_printed_exists() -> None:
    found = list(printed())
    assert len(found) > 30
    for where, words in found:
        rest = words[1:]
        while rest and rest[0].startswith("-"):  # options before the verb take one value
            rest = rest[2:] if rest[0] == "--plugin" else rest[1:]
        if not rest:
            continue
        assert rest[0] in VERBS, f"{where}: there is no verb {rest[0]!r}"
        known = {name for p in GROUP.commands[rest[0]].params for name in (*p.opts, *p.secondary_opts)}
        unknown = [w for w in rest[1:] if w.startswith("-") and w != "..." and w.partition("=")[0] not in known]
        assert unknown in ([], ["--help"]), f"{where}: holdfast {rest[0]} has no {unknown}"


def test_links_between_pages_lead_somewhere() -> None:
    generated = reference().uris()
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if re.match(r"[a-z]+:", target):
                continue
            path = (page.parent / target).resolve()
            inside = path.is_relative_to(DOCS) and path.relative_to(DOCS).as_posix() in generated
            assert path.exists() or inside, f"{page.relative_to(ROOT)}: {target} is not there"


def test_every_file_that_is_named_is_there() -> None:
    """A path of ours in a text, from the repository or from one of its parts on."""
    ours = {
        path.relative_to(ROOT).as_posix()
        for part in ("src", "tests", "benchmarks", "examples")
        for path in (ROOT / part).rglob("*.py")
    }
    for page in PAGES:
        for name in re.findall(r"`([\w-]+(?:/[\w-]+)+\.py)`", page.read_text(encoding="utf-8")):
            found = any(path == name or path.endswith(f"/{name}") for path in ours)
            assert found or name.startswith("vllm/"), f"{page.relative_to(ROOT)}: {name} is not there"


def test_every_option_of_every_configuration_is_explained() -> None:
    made = reference()
    bare = [
        f"{config.__qualname__}.{name}"
        for _, config in made.configurations()
        for name, _, _, _, text in made.rows_of(config)
        if not text
    ]
    assert bare == []


def test_the_reference_leaves_no_verb_and_no_part_out() -> None:
    made = reference()
    page = made.cli_page()
    for verb in VERBS:
        assert f"## holdfast {verb}\n" in page
        for option in GROUP.commands[verb].params:
            assert all(f"`{name}`" in page for name in option.opts if name.startswith("--"))
    assert set(made.PARTS) <= set(made.parts()), "a part that is gone"
    assert all(f"reference/api/{part}.md" in made.uris() for part in made.parts())
    assert "edit_weight" in made.api_page("functional", "x")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("mkdocs", "material"):  # of the extra `dev`, as this test itself: a skip would hide broken pages
        assert importlib.util.find_spec(needed), f"{needed} is not installed: pip install -e '.[dev]'"
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.mark.timeout(900)
def test_the_pages_build_strict_and_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link\b(?![^>]*rel="(?:canonical|next|prev)")[^>]*\bhref="([^"]+)"', text)
        assert not [url for url in loaded if re.match(r"(?:https?:)?//", url)], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"@import|url\(['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style
