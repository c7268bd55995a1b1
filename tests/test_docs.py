"""Every block of Python in the docs runs as printed, page by page, in one folder."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import logsnr as ls
from logsnr.adapters import export_diffusers

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text(encoding="utf-8"))


@pytest.fixture
def given(tmp_path, monkeypatch, request):
    """What a page takes for granted: a pipeline in hand, a folder that its commands made, minutes to calibrate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ls, "calibrate", partial(ls.calibrate, n=6, rollouts=40, teacher=16))
    page = request.node.callspec.params["page"].stem
    if page == "pipelines":
        export_diffusers(ls.load("zoo:digits"), tmp_path / "pipelines" / "digits", keep_classes=True)
    if page != "diffusers":
        return {}
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tiny

    plans = {f"plan_{n}": ls.solvers.ge(ls.grids.log_linear(n, 14.0, 0.03)) for n in (6, 10)}
    plans["plan_6"].save(tmp_path / "plan.json")
    latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pipe": tiny.stable_diffusion(), "latents": latents, **plans}


HEAVY = {"calibration"}


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=[pytest.mark.heavy] * (page.stem in HEAVY)) for page in PAGES]
)
def test_blocks_of_a_page_run_in_order(page, given):
    names = dict(given)
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)):
        exec(compile(block, f"{page.name}, block {i}", "exec"), names)


# A result table: a table of Markdown with three or more cells, beside its first column, that begin with a decimal.
MEASURED = re.compile(r"[*+~-]*\d*\.\d")
# A command: a line of code, indented, fenced or between backticks, that runs something of this repository.
COMMAND = re.compile(
    r"(?:^|`)[ \t]*(?:\w+=\S+ )*(?:torchrun |make [a-z]|logsnr [a-z]|python (?:benchmarks|tools|tests)/)", re.M
)


def sections(page):
    """A page by its `##`; of docs/results all of it, which is what one command wrote."""
    text = page.read_text(encoding="utf-8")
    return [text] if page.parent.name == "results" else re.split(r"^(?=## )", text, flags=re.M)


def is_result(table):
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return sum(bool(MEASURED.match(cell)) for row in rows for cell in row[1:]) >= 3


def unexplained(section):
    """Result tables of a section without a command, by their first lines."""
    tables = re.findall(r"(?:^[ ]*\|.*\|[ ]*$\n?)+", section, flags=re.M)
    return [] if COMMAND.search(section) else [table.splitlines()[0] for table in tables if is_result(table)]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_every_table_of_results_has_its_command(page):
    assert [table for section in sections(page) for table in unexplained(section)] == []


def test_a_table_of_results_without_a_command_is_found():
    table = "| model | 5 | 8 |\n| --- | --- | --- |\n| a | **.123** | .045 +- .001 |\n| b | 1.20 | - |\n"
    words = "| option | meaning |\n| --- | --- |\n| `a` | 0.5 by default |\n"
    assert unexplained(f"Measured by hand:\n\n{table}") == ["| model | 5 | 8 |"]
    assert unexplained(words) == []
    for told in (
        "`python benchmarks/few_step.py --data x`",
        "    logsnr compare zoo:digits --nfe 5",
        "`OMP_NUM_THREADS=1 make bench`",
    ):
        assert unexplained(f"{told}\n\n{table}") == []
    assert unexplained(f"see benchmarks/few_step.py\n\n{table}") == ["| model | 5 | 8 |"]
