"""What stands beside the source agrees with it: examples name what exists, floors are tested, guides lead somewhere."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from blocks import python

import logsnr
from logsnr.adapters import OLDEST_DIFFUSERS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block.text, id=f"{page.relative_to(ROOT)}:{block.line}") for page in PAGES for block in python(page)
]
SCRIPTS = [
    pytest.param(path.read_text(encoding="utf-8"), id=str(path.relative_to(ROOT)))
    for folder in ("examples", "benchmarks", "tools")
    for path in sorted((ROOT / folder).glob("*.py"))
]


def absent(text):
    """Names of logsnr that a program uses and that do not exist: imported ones, and `ls.room.name`."""
    tree = ast.parse(text)
    ours = {"logsnr"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {alias.asname for alias in node.names if alias.name == "logsnr" and alias.asname}
            for alias in node.names:
                if alias.name.split(".")[0] == "logsnr":
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "logsnr":
            module = importlib.import_module(node.module)
            yield from (f"{node.module}.{a.name}" for a in node.names if not found(module, a.name))
        elif isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split(".")
            if chain[0] not in ours or not all(part.isidentifier() for part in chain):
                continue
            here = logsnr
            for name in chain[1:]:
                if not found(here, name):
                    yield ast.unparse(node)
                    break
                here = getattr(here, name)
                if not isinstance(here, ModuleType):
                    break


def found(module, name):
    if hasattr(module, name):
        return True
    try:
        importlib.import_module(f"{module.__name__}.{name}")
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("block", BLOCKS)
def test_python_of_the_pages_names_what_exists(block):
    assert list(absent(block)) == []


@pytest.mark.parametrize("text", SCRIPTS)
def test_scripts_name_what_exists(text):
    assert list(absent(text)) == []


def test_an_absent_name_is_found():
    text = "import logsnr as ls\nfrom logsnr.sampling import nothing\nls.solvers.ge\nls.solvers.gee(ls.grids.karas)"
    assert sorted(absent(text)) == ["logsnr.sampling.nothing", "ls.grids.karas", "ls.solvers.gee"]


def floors():
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for text in group:
            name, at_least, version = text.partition(">=")
            if at_least:
                yield name, version


def test_the_declared_least_versions_are_those_that_are_tested():
    """One floor for each package, wherever it is named; CI installs under .ci/minimum.txt."""
    lines = (ROOT / ".ci" / "minimum.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == sorted(f"{n}=={v}" for n, v in set(floors()))
    assert dict(floors())["diffusers"] == ".".join(map(str, OLDEST_DIFFUSERS))


def test_python_versions_are_declared_as_they_are_tested():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    declared = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    tested = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert declared == re.findall(r"3\.\d+", tested[1])
    assert declared[0] == oldest
    major, minor = oldest.split(".")
    assert f"sys.version_info < ({major}, {minor})" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_pre_commit_runs_what_make_lint_runs():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    made = [line.removeprefix("\t$(BIN)/").removesuffix(" .") for line in recipe.splitlines()[1:]]
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert hooks == made


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert headings[0] == logsnr.__version__


def test_the_migration_table_leads_to_what_exists():
    """Every dotted path of its right-hand column is a module, or a name in one."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("### Migration")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+)` \| (.+) \|$", text, flags=re.M)
    assert len(rows) > 40
    for _, new in rows:
        for path in re.findall(r"logsnr(?:\.\w+)+", new):
            room, name = path.rsplit(".", 1)
            assert found(importlib.import_module(room), name), path


def test_where_a_newcomer_looks_there_is_something():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is ...?")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", guide, flags=re.M)[1:]
    assert len(rows) >= 12
    for question, answer in rows:
        paths = re.findall(r"`([\w./]+\.py)`", answer)
        assert all((ROOT / "src" / "logsnr" / path).exists() for path in paths), answer
        named = re.findall(r"`(\w+)` (?:in|of) `([\w./]+\.py)`", answer)
        assert named, question
        for name, path in named:
            assert re.search(rf"\b{name}\b", (ROOT / "src" / "logsnr" / path).read_text(encoding="utf-8")), answer


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_answers_without_torch(option):
    code = (
        "import sys, logsnr.cli\n"
        f"sys.argv = ['logsnr', {option!r}]\n"
        "try:\n    logsnr.cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *_, last = done.stdout.strip().splitlines()
    assert last == "[]"
    assert first.strip().startswith({"--help": "Usage: logsnr", "--version": f"logsnr {logsnr.__version__}"}[option])
