"""A sample of `make compatibility`: pipelines of every kind, judged; and its page, which names every class."""

from __future__ import annotations

from pathlib import Path

import pytest

diffusers = pytest.importorskip("diffusers", minversion="0.40")

from compatibility.judge import judge  # noqa: E402
from compatibility.page import supported  # noqa: E402
from compatibility.pipelines import case  # noqa: E402

from logsnr.adapters.diffusers.classes import REFUSED, SUPPORTED  # noqa: E402

SAMPLE = (
    "DDIMPipeline",  # clips, and says so to step
    "IFPipeline",  # thresholds as DPM-Solver does, and learns its variance
    "CogView4Pipeline",  # labels and levels
    "LTXConditionPipeline",  # tokens at times of their own
    "WanPipeline, two experts",  # one network above a label, another below
    "KandinskyV22PriorPipeline",  # draws noise, and says where a step goes
)
PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_pipeline_is_stocks_at_gamma_1_or_differs_for_a_reason(name: str) -> None:
    verdict = judge(lambda: case(name))
    assert verdict.runs, verdict.error
    assert verdict.accounted, verdict.difference
    assert bool(verdict.reason) == (name in ("KandinskyV22PriorPipeline", "WanPipeline, two experts"))


def test_the_page_names_every_class() -> None:
    """Of the diffusers that it was written with; another one has others."""
    text = PAGE.read_text()
    if f"with diffusers {diffusers.__version__};" not in text:
        pytest.skip("written with another diffusers")
    pipelines = [name for name in dir(diffusers) if name.endswith("Pipeline") and "Modular" not in name]
    pipelines.remove("DiffusionPipeline")
    assert not {name for name in (*pipelines, *SUPPORTED, *REFUSED) if f"`{name}`" not in text}
    assert supported("DPMSolverMultistepScheduler") in text
