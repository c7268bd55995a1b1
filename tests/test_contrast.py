"""A factor on the state in a plan, and the last step that has the teacher's variance."""

from __future__ import annotations

import json
import math

import pytest
import torch

import logsnr as ls
from logsnr import exact, grids, solvers
from logsnr.adapters import GradientEstimationScheduler
from logsnr.calibration import calibrate
from logsnr.calibration.contrast import Moments, last_step, moments, weights_of, with_last
from logsnr.calibration.rollout import Rollout
from logsnr.calibration.teacher import taught
from logsnr.noise import alpha_s
from logsnr.sampling.plan import Plan
from logsnr.sampling.teacher import teacher_plan

F64 = torch.float64
KEEP = (1.0, 0.9, 1.1, 1.02)


def mixture():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(5, 6, generator=g, dtype=F64)
    factors = torch.randn(5, 6, 6, generator=g, dtype=F64) * 0.35 / math.sqrt(6)
    return exact.GaussianMixture(
        torch.ones(5, dtype=F64) / 5, means, factors @ factors.mT + 0.02 * torch.eye(6, dtype=F64)
    )


MODEL = mixture()
BASE = solvers.ge(grids.log_linear(4, 20.0, 0.05), 1.5)
PLAN = Plan(BASE.sigmas, BASE.rows, "eps", None, {}, KEEP)
NOISE = torch.randn(64, 6, generator=torch.Generator().manual_seed(1), dtype=F64)


def test_factors_multiply_the_state():
    """eps rows: z' = k (alpha'/alpha) z + alpha' (sigma' - sigma) e_bar; a row [1] too, where the factor is not 1."""
    z, past = NOISE, []
    for i, row in enumerate(PLAN.rows):
        sigma, target = PLAN.sigmas[i : i + 2]
        past.insert(0, MODEL(z, sigma).eps)
        mean = sum(c * e for c, e in zip(row, past, strict=False))
        alpha, alpha_ = alpha_s(sigma)[0], alpha_s(target)[0]
        z = KEEP[i] * alpha_ / alpha * z + alpha_ * (target - sigma) * mean
    assert torch.allclose(ls.sample(MODEL, PLAN, noise=NOISE), z, rtol=1e-10)
    one = Plan((3.0, 1.0), ((1.0,),), "eps", None, {}, (1.1,))
    z = alpha_s(1.0)[0] * (1.1 * NOISE / alpha_s(3.0)[0] - 2 * MODEL(NOISE, 3.0).eps)
    assert torch.allclose(ls.sample(MODEL, one, noise=NOISE), z, rtol=1e-10)


@pytest.mark.parametrize("basis", ["eps", "x0", "velocity"])
def test_every_loop_takes_them(basis):
    plan = Plan(BASE.sigmas, BASE.rows, basis, None, {}, KEEP)
    end = ls.sample(MODEL, plan, noise=NOISE)
    noises = taught(MODEL, teacher_plan(16, 0.05, 20.0), NOISE, None, chunk=64)
    assert torch.allclose(Rollout(MODEL, basis, noises).run(plan), end, rtol=1e-9)
    if basis == "x0":  # the only one that a step to 0 does not use
        other = Plan(BASE.sigmas, BASE.rows, basis, None, {}, (*KEEP[:-1], 3.0))
        assert torch.allclose(ls.sample(MODEL, other, noise=NOISE), end)


def test_the_scheduler_takes_them():
    pytest.importorskip("diffusers")
    config = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "beta_schedule": "scaled_linear"}
    scheduler = GradientEstimationScheduler.from_config(
        {**config, "beta_start": 0.00085, "beta_end": 0.012},
        plan=Plan((14.0, 5.0, 1.0, 0.1, 0.0), BASE.rows, keep=KEEP),
    )
    scheduler.set_timesteps(4)
    x = NOISE.clone()
    for t, sigma in zip(scheduler.timesteps, scheduler.plan.sigmas, strict=False):
        x = scheduler.step(MODEL(x, sigma).eps, t, x).prev_sample
    assert scheduler.plan.keep == KEEP
    assert torch.allclose(x, ls.sample(MODEL, scheduler.plan, noise=NOISE), rtol=1e-6, atol=1e-7)


def test_files_and_hashes_of_plans_without_them_stay():
    assert "keep" not in BASE.to_dict()
    assert Plan(BASE.sigmas, BASE.rows, keep=(1, 1, 1, 1)) == BASE
    assert Plan(BASE.sigmas, BASE.rows, keep=(1, 1, 1, 1)).hash == BASE.hash != PLAN.hash
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    assert PLAN.tail(1).keep == KEEP[1:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": (1.0, 2.0)}, "keep has 2 entries: give one per step, 4"),
        ({"keep": (1.0, 2.0, math.nan, 1.0)}, "factors must be finite"),
        ({"keep": (2.0, 1.0, 1.0, 1.0), "sigmas": (math.inf, 4.0, 1.0, 0.1, 0.0), "basis": "x0"}, "must be 1 there"),
    ],
)
def test_factors_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Plan(**{"sigmas": BASE.sigmas, "rows": BASE.rows, **changes})


def test_the_last_step_is_the_least_error_of_that_variance():
    """Against Newton's method on the Lagrangian's own equations, and no other numbers of that variance are better."""
    noises = taught(MODEL, teacher_plan(64, *MODEL.sampling_range), NOISE, None, chunk=64)
    plan = solvers.ge(grids.flow_range(4, MODEL.sampling_range[1], 0.1), 1.5)
    found, prior = moments(MODEL, plan, noises, 40), weights_of(plan)
    w = last_step(found, prior)
    end = Rollout(MODEL, plan.basis, noises).run(with_last(plan, w.tolist()))

    def variance(x):
        return float((x - x.mean(0)).square().sum())

    assert variance(end) == pytest.approx(variance(noises.end), rel=1e-9)
    assert found.variance == pytest.approx(variance(noises.end), rel=1e-9)
    assert float((end - noises.end).square().sum()) == pytest.approx(
        found.square - 2 * float(w @ found.pull) + float(w @ found.gram @ w), rel=1e-9
    )
    ridge = 1e-3 * (found.square - 2 * float(prior @ found.pull) + float(prior @ found.gram @ prior))

    def cost(v):
        return float(v @ found.gram @ v - 2 * v @ found.pull + ridge * (v - prior).square().sum())

    g = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            v = w + size * torch.randn(len(w), generator=g, dtype=F64)
            v = v * math.sqrt(found.variance / float(v @ found.centred @ v))
            assert cost(v) >= cost(w) - 1e-9 * abs(cost(w))


def test_a_variance_out_of_reach_is_left():
    eye = torch.eye(2, dtype=F64)
    assert last_step(Moments(gram=2 * eye, pull=eye[0], centred=eye, square=1.0, variance=1e9), eye[0]) is None


def test_calibrated_plans_have_the_teachers_contrast():
    """Of fresh samples: the variance is nearer the teacher's, the error at most a percent larger."""
    memo: dict = {}
    plain, other = (
        calibrate(MODEL, 4, effort="quick", memo=memo, contrast=contrast, n=192) for contrast in (False, True)
    )
    assert "contrast" not in plain.meta["found"]
    assert other.meta["found"]["contrast"] is True
    assert other.meta["selection"]["rmse"] <= 1.01 * plain.meta["selection"]["rmse"]
    noise = torch.randn(4000, 6, generator=torch.Generator().manual_seed(7))
    end = ls.sample(MODEL, teacher_plan(64, *MODEL.sampling_range), noise=noise)
    lost = [float(end.var(0).sum() - ls.sample(MODEL, p, noise=noise).var(0).sum()) for p in (plain, other)]
    assert abs(lost[1]) < 0.5 * abs(lost[0])
