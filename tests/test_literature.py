"""Settings of others: each is its own formula, as its authors run it."""

import math
import re
from itertools import pairwise

import pytest
import torch
from test_exact import models

import logsnr as ls
from logsnr.errors import LogsnrError
from logsnr.evaluation.compare import ours, searched
from logsnr.sampling.literature import _table, neuralsolver
from logsnr.sampling.names import named_plan


def noise(n=16, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("high", [math.inf, 40.0])
@pytest.mark.parametrize(("of", "nfe"), [("sit", 5), ("sit", 10), ("flowdcn", 6), ("flowdcn", 15)])
def test_neuralsolver_is_its_loop_over_velocities(of, nfe, high):
    """x += dt (sum_{j<i} c_ij v_j + (1 - sum_{j<i} c_ij) v_i), v = x0 - eps at (1 - s) x0 + s eps (2505.21114)."""
    model = models()["mixture"]
    found = _table()["neuralsolver"]["of"][of][str(nfe)]
    coefficients, total = [[], *found["coefficients"]], sum(found["steps"])
    assert len(found["steps"]) == nfe
    assert abs(total - 1) < 3e-4
    first = high / (1 + high) if math.isfinite(high) else 1.0
    s, past = first, []
    x = noise() * math.hypot(1 - s, s)  # the flow's state of a state of unit variance
    for step, row in zip(found["steps"], coefficients, strict=True):
        estimate = model(x / math.hypot(1 - s, s), s / (1 - s) if s < 1 else math.inf)
        past.append(estimate.x0 - estimate.eps)
        dt = first * step / total
        x = x + dt * (sum((c * v for c, v in zip(row, past[:-1], strict=True)), 0 * x) + (1 - sum(row)) * past[-1])
        s -= dt
    torch.testing.assert_close(ls.sample(model, neuralsolver(nfe, 0, high, of=of), noise=noise()), x)


def test_optimal_steps_are_eulers_flow_steps_on_the_printed_times():
    times = _table()["oss"]["times"]["flux"]
    plan = ls.published["oss-flux"](10)
    model, s = models()["mixture"], times[0]
    x = noise() * math.hypot(1 - s, s)
    for s, following in pairwise([*times[:-1], 0.0]):
        estimate = model(x / math.hypot(1 - s, s), s / (1 - s))
        x = x + (following - s) * (estimate.eps - estimate.x0)
    torch.testing.assert_close(ls.sample(model, plan, noise=noise()), x)
    # of other numbers the times lie at even distances along the list, geometrically between two of them
    five = [sigma / (1 + sigma) for sigma in ls.grids.oss(5, "flux")]
    assert five == pytest.approx([*times[:-1:2], 0.0])
    between = math.sqrt(times[0] * times[1])
    assert ls.grids.oss(20, "flux", last="min")[1] == pytest.approx(between / (1 - between))
    assert ls.grids.oss(20, "wan")[0] == math.inf


def test_align_your_steps_and_dpm_solver_are_their_solvers_on_their_levels():
    assert ls.published["ays-sdxl"](10) == ls.solvers.dpmpp(ls.grids.ays(10, "sdxl"), 2)
    plan = ls.published["dpm-solver++-sd"](20)
    table = ls.TimestepTable.stable_diffusion()
    assert (plan.sigmas[0], plan.sigmas[-1]) == (table.sigma(999.0), table.sigma(0.0))
    assert len(ls.published["dpm-solver++-sd"](5).rows[-1]) == 1  # few steps end in a lower order
    assert len(plan.rows[-1]) == 2


def test_each_says_its_source_and_runs_its_printed_numbers():
    for name, setting in ls.published.items():
        plan = setting(setting.steps[0])
        assert plan.nfe == setting.steps[0], name
        assert re.search(r"\(.*\d{4}\.\d{5}\)", setting.source), name
        assert plan.meta["source"] == setting.source
    with pytest.raises(LogsnrError, match="ays-sd15"):
        ls.published["ays-sd1"]
    with pytest.raises(LogsnrError, match=r"nfe.*4.*5"):
        ls.published["neuralsolver-sit"](4)
    with pytest.raises(LogsnrError, match=r"last level is sigma 0\.0999"):
        neuralsolver(10, low=1.0)
    with pytest.raises(LogsnrError, match="flowdcn"):
        neuralsolver(10, of="flow-dcn")


def test_searched_plans_take_part_in_comparisons_and_have_names():
    model = models()["mixture"]
    low, high = model.sampling_range
    names = {(entry.solver, entry.evaluations) for entry in searched(model, [4, 5, 10])}
    assert names == {(f"NeuralSolver ({of})", n) for of in ("SiT", "FlowDCN") for n in (5, 10)}
    assert [entry.evaluations for entry in searched(model, [6], ["neuralsolver sit"])] == [6]
    assert searched(model, [6], ["ge"]) == []
    assert not any(entry.family == "NeuralSolver" for entry in ours(model, [5]))
    assert named_plan("NeuralSolver (FlowDCN)", 6, low, high) == neuralsolver(6, low, high, of="flowdcn")
