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
