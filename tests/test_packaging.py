"""What an installed holdfast holds and needs: a wheel is built and looked into, imports are held against pyproject."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import holdfast
from holdfast import experiment, shipped
from holdfast.cli.environment import EXTRAS
from holdfast.errors import ConfigError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
# Installed by oneself: its own versions of torch would decide ours.
ONESELF = {"vllm"}
# Of the extra `dev`, as pytest is: a skip would hide a wheel that cannot be built.
NO_BUILDER = "hatchling, which builds wheel and sdist, is not installed: pip install -e '.[dev]'"


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", text, maxsplit=1)[0].lower().replace("_", "-") for text in requirements}


def imported() -> dict[str, set[str]]:
    """Distribution -> files of the package that import it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in {m.partition(".")[0] for m in modules} - sys.stdlib_module_names - {"holdfast"}:
                found.setdefault(DISTRIBUTIONS.get(module, module), set()).add(path.name)
    return found


def test_every_package_that_is_imported_is_declared():
    extras = PROJECT["optional-dependencies"]
    declared = names(
        [*PROJECT["dependencies"], *(r for name in ("captions", "hf", "serve", "ray") for r in extras[name])]
    )
    undeclared = {name: files for name, files in imported().items() if name not in declared | ONESELF}
    # pyarrow is what `datasets` reads tables with.
    assert {name for name in undeclared if name != "pyarrow"} == set(), undeclared


def test_every_package_that_is_declared_is_imported():
    assert names(PROJECT["dependencies"]) - set(imported()) == set()


def test_the_version_is_one():
    assert PROJECT["version"] == holdfast.__version__
    assert PROJECT["authors"] == [{"name": "holdfast contributors"}] and PROJECT["urls"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    assert find_spec("hatchling"), NO_BUILDER
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_types_configs_and_what_the_code_reads(wheel):
    held = set(wheel.namelist())
    assert "holdfast/py.typed" in held
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs and {f"holdfast/{name}" for name in configs} <= held
    # Templates, the embedded model, its tokenizer: everything beside the code.
    package = ROOT / "src" / "holdfast"
    data = {
        p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert {f"holdfast/{name}" for name in data} <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", "configs/"))]
    (entry,) = [name for name in held if name.endswith("METADATA")]
    text = wheel.read(entry).decode()
    assert "Author: holdfast contributors" in text and "Project-URL:" in text
    assert {"psutil", "tokenizers"} <= {
        line.split()[1].split(">")[0] for line in text.splitlines() if "Requires-Dist" in line
    }


def test_an_installed_wheel_lists_and_writes_its_run_files(wheel, tmp_path):
    """Outside any checkout: the package alone on the path."""
    wheel.extractall(tmp_path / "site")
    code = "from holdfast.cli import main; main()"

    def verb(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert verb("--version") == f"holdfast {holdfast.__version__}\n"
    assert "coin.yaml" in verb("list", "streams")
    assert "llava-1.5-7b" in verb("init", "--list")
    verb("init", "llava-1.5-7b")
    assert (tmp_path / "llava-1.5-7b.yaml").is_file() and (tmp_path / "streams" / "hpa.yaml").is_file()


def test_every_run_file_that_comes_along_names_streams_that_come_along(monkeypatch, tmp_path):
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    assert set(shipped.run_files()) >= {"llava-1.5-7b", "qwen2.5-vl-7b", "cram-llava-1.5-7b"}
    for path in shipped.run_files().values():
        stream = shipped.stream_of(path)
        assert stream is not None and stream in shipped.stream_files().values()
        assert shipped.first_comment(path)
        experiment.read_run(path)


def test_without_its_files_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "lib" / "holdfast")
    # Somebody else's configs/ two folders up is not ours.
    (tmp_path / "configs").mkdir()
    with pytest.raises(ConfigError, match="install the wheel again"):
        shipped.folder()
    (tmp_path / "lib" / "holdfast" / "configs").mkdir(parents=True)
    assert shipped.folder() == tmp_path / "lib" / "holdfast" / "configs"


def test_the_conda_recipe_asks_for_what_pyproject_asks_for():
    text = (ROOT / "recipes" / "conda" / "meta.yaml").read_text(encoding="utf-8")
    run = text.partition("  run:\n")[2].partition("\ntest:")[0]
    renamed = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    listed = {line.strip(" -").replace(" ", "") for line in run.splitlines() if line.strip()} - {"python>=3.11"}
    wanted = set()
    for requirement in PROJECT["dependencies"]:
        name = re.split(r"[<>=]", requirement, maxsplit=1)[0]
        wanted.add(requirement.replace(name, renamed.get(name, name), 1))
    assert listed == wanted
    assert f'set version = "{PROJECT["version"]}"' in text


@pytest.mark.parametrize(
    "name",
    ["CITATION.cff", "mkdocs.yml", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / ".github").rglob("*.yml"))],
)
def test_what_other_tools_read_is_yaml(name):
    found = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(found, dict) and found
    if name == "CITATION.cff":
        assert found["version"] == PROJECT["version"] and found["license"] == PROJECT["license"]


def test_an_sdist_holds_what_builds_and_tests_it_and_nothing_of_this_machine(tmp_path):
    assert find_spec("hatchling"), NO_BUILDER
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "src/holdfast/py.typed", "mkdocs.yml"} <= names
    # What the tests read beside the package.
    read = {"recipes/conda/meta.yaml", ".github/workflows/test.yml", "CITATION.cff", "examples/stream.py"}
    assert read <= names
    assert "src/holdfast/tiny/models/aligned/model.safetensors" in names and "tests/test_packaging.py" in names
    strange = [n for n in names if n.startswith((".", "runs", "shared", "build", "dist")) or "__pycache__" in n]
    assert not [n for n in strange if n != ".gitignore" and not n.startswith(".github")]


def test_every_extra_is_explained_where_people_look():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.M))
    extras = set(PROJECT["optional-dependencies"])
    assert listed == extras
    assert extras <= set(EXTRAS)


def test_the_readme_is_short_and_leads_on():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    assert len(re.findall(r"^\|(?:-+:?\|)+$", text, flags=re.M)) == 1  # one table
    for word in (
        "AP, average performance",
        "BWT, backward",
        "MASR, mean attack success rate",
        "pip install",
        "make demo",
    ):
        assert word in " ".join(text.split()), word
