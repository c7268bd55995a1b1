"""A sample of `make compatibility`: pipelines of every kind, judged; and its page, which names every class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scheduling import loop

diffusers = pytest.importorskip("diffusers", minversion="0.40")

from compatibility.judge import EQUAL, Case, apart, in_double, judge, quiet  # noqa: E402
from compatibility.page import judged_part, supported  # noqa: E402
from compatibility.pipelines import case  # noqa: E402
from compatibility.results import kept  # noqa: E402

from logsnr.adapters import GradientEstimationScheduler  # noqa: E402
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


class Insensitive:
    """A pipeline of whose result a sampler changes a thousandth; stock's runs have `own` steps, others 5."""

    def __init__(self, own: int) -> None:
        self.scheduler, self.own = diffusers.DDIMScheduler(), own

    def set_progress_bar_config(self, **options: bool) -> None:
        pass

    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        stock = type(self.scheduler) is diffusers.DDIMScheduler
        self.scheduler.set_timesteps(self.own if stock else 5)
        return 1 + 1e-4 * loop(self.scheduler, torch.randn(1, 3, 8, 8, generator=generator))


@pytest.mark.parametrize("own", [5, 6])
def test_equal_is_measured_by_what_a_sampler_can_change(own: int) -> None:
    verdict = judge(lambda: Case(Insensitive(own), {}))
    assert verdict.runs
    assert verdict.difference < EQUAL
    assert verdict.equal == verdict.accounted == (own == 5)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_pipeline_is_stocks_at_gamma_1_or_differs_for_a_reason(name: str) -> None:
    verdict = judge(lambda: case(name))
    assert verdict.runs, verdict.error
    assert verdict.accounted, verdict.difference
    assert bool(verdict.reason) == (name in ("KandinskyV22PriorPipeline", "WanPipeline, two experts"))


def test_unclip_loses_what_single_precision_does() -> None:
    """Its last step multiplies by beta/(1 - alpha), which is 1: with its table in double precision it is ours."""
    name = "KandinskyV22PriorPipeline"
    with quiet():
        one = case(name)
        stock = one.pipe.scheduler
        ours = one.run(GradientEstimationScheduler.from_config(stock.config, gamma=1.0, mu=0.5))
        single, double = apart(ours, one.run(stock)), apart(ours, one.run(in_double(stock)))
    assert single > 5e-5
    assert double < 1e-6


def test_the_page_is_of_the_verdicts_that_are_kept() -> None:
    assert PAGE.read_text().startswith(judged_part(kept()))


def test_the_page_names_every_class() -> None:
    """Of the diffusers that it was written with; another one has others."""
    text = PAGE.read_text()
    if f"with diffusers {diffusers.__version__};" not in text:
        pytest.skip("written with another diffusers")
    pipelines = [name for name in dir(diffusers) if name.endswith("Pipeline") and "Modular" not in name]
    pipelines.remove("DiffusionPipeline")
    assert not {name for name in (*pipelines, *SUPPORTED, *REFUSED) if f"`{name}`" not in text}
    assert supported("DPMSolverMultistepScheduler") in text
