"""Calibrated plans outlive their making: in a file, in every sampler, and against baselines that were tuned too."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from logsnr import exact
from logsnr.adapters.kdiffusion import as_kdiffusion, sample_gradient_estimation
from logsnr.calibration import calibrate
from logsnr.calibration.baselines import aligned, aligned_levels, step_divergences
from logsnr.calibration.descent import Space, normal_equations
from logsnr.calibration.rollout import squares, tempered
from logsnr.calibration.teacher import remember
from logsnr.errors import LogsnrError
from logsnr.noise import alpha_s
from logsnr.sampling import Plan, sample
from logsnr.sampling.teacher import teacher_plan

F64 = torch.float64
TEACHER = {"n": 16, "teacher": 24, "rollouts": 60}


@cache
def model() -> exact.GaussianMixture:
    g = torch.Generator().manual_seed(0)
    means, factors = torch.randn(4, 16, generator=g), torch.randn(4, 16, 16, generator=g) * 0.1
    return exact.GaussianMixture(torch.ones(4) / 4, means, factors @ factors.mT + 0.02 * torch.eye(16))


@cache
def plan() -> Plan:
    """Within Stable Diffusion's levels, so that its table can run it."""
    return calibrate(model(), 5, sigma_range=(0.05, 14.0), **TEACHER)


def noise(n: int = 6) -> Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(5))


def test_a_file_keeps_it_to_the_last_bit(tmp_path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    loaded = Plan.load(path)
    assert (loaded, loaded.hash, loaded.meta) == (plan(), plan().hash, json.loads(json.dumps(plan().meta)))
    assert loaded.meta["plan_hash"] == loaded.hash
    assert torch.equal(sample(model(), loaded, noise=noise()), sample(model(), plan(), noise=noise()))
    data = json.loads(path.read_text())
    data["version"] = 2
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="format 2, of a newer logsnr"):
        Plan.load(path)


def test_three_ways_to_run_it_give_the_same_samples() -> None:
    """`sample`, k-diffusion's function, and the diffusers scheduler: within 1e-4 of the RMS."""
    pytest.importorskip("diffusers")
    from logsnr.adapters import GradientEstimationScheduler

    wanted = sample(model(), plan(), noise=noise())
    size = float(wanted.square().mean().sqrt())
    first = plan().sigmas[0]
    x = noise() / alpha_s(first)[0]
    other = sample_gradient_estimation(as_kdiffusion(model()), x, list(plan().sigmas), plan=plan(), disable=True)
    assert float((other - wanted).square().mean().sqrt()) < 1e-4 * size

    scheduler = GradientEstimationScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", plan=plan()
    )
    scheduler.set_timesteps(5)
    z = noise() * scheduler.init_noise_sigma
    for t, sigma in zip(scheduler.timesteps, plan().sigmas, strict=False):
        eps = model()(scheduler.scale_model_input(z, t), sigma).eps
        z = scheduler.step(eps, t, z).prev_sample
    assert float((z - wanted).square().mean().sqrt()) < 1e-4 * size


def test_a_plan_for_another_range_is_refused() -> None:
    pytest.importorskip("diffusers")
    from logsnr.adapters import GradientEstimationScheduler

    far = Plan((200.0, 1.0, 0.0), ((1.0,), (1.0,)))
    with pytest.raises(ValueError, match="sigma = 200 is outside the model's range"):
        GradientEstimationScheduler(plan=far).set_timesteps(2)


# What descent minimises


def test_tempered_errors_are_errors_where_they_are_small() -> None:
    q = torch.tensor([0.1, 0.2, 0.4], dtype=F64)
    assert tempered(q, 1e6) == pytest.approx(float(q.mean()), rel=1e-6)
    assert tempered(q, float("inf")) == float(q.mean())
    with_outlier = torch.cat([q, torch.tensor([1e6], dtype=F64)])
    assert tempered(with_outlier, 1.0) < 10


def test_weighted_equations_are_the_slope_of_the_tempered_error() -> None:
    """d/dp mean_i c log(1 + q_i/c) = 2 J^T W r, against central differences of the loss itself."""
    z = noise(20).double()
    plan = teacher_plan(24, 0.05, 14.0)
    batch, _ = remember(model(), plan, z, None, chunk=20)
    template = Plan((10.0, 1.0, 0.0), ((1.0,), (1.3, -0.3)))
    space = Space(template=template, low=0.05, high=14.0)
    p = space.vector(template)
    scale = 0.3 * float(squares(model(), template, batch, 20, None).mean())
    _, pull = normal_equations(model(), space, p, batch, 7, None, scale)
    for i in range(len(p)):
        step = torch.zeros_like(p)
        step[i] = 1e-4
        up, down = (tempered(squares(model(), space.plan(v), batch, 20, None), scale) for v in (p + step, p - step))
        assert 2 * float(pull[i]) == pytest.approx((up - down) / 2e-4, rel=0.1, abs=2e-3 * abs(up))


# Align Your Steps


def cached():
    z = noise(12).double()
    return remember(model(), teacher_plan(9, 0.1, 10.0), z, None, chunk=12)[1]


def test_divergences_are_the_integral_of_the_bound() -> None:
    store = cached()
    cost = step_divergences(store)
    sigma = store.sigmas[:-1]
    x0 = [store.states[i] - sigma[i] * store.eps[i] for i in range(9)]
    for j, k in ((0, 1), (2, 5), (0, 8)):
        apart = [float((x0[j] - x0[m]).flatten(1).square().sum(1).mean()) for m in range(j, k + 1)]
        rule = [(apart[i] + apart[i + 1]) / 2 * (sigma[j + i + 1] ** -2 - sigma[j + i] ** -2) / 2 for i in range(k - j)]
        # per sample: the cache's rows hold all 12 of them
        assert float(cost[j, k]) == pytest.approx(sum(rule), rel=1e-6)


def test_aligned_levels_are_the_best_of_all() -> None:
    store = cached()
    cost = step_divergences(store)

    def total(path: tuple[int, ...]) -> float:
        return sum(float(cost[a, b]) for a, b in pairwise(path))

    best = min(((0, *inner, 8) for inner in combinations(range(1, 8), 3)), key=total)
    assert aligned_levels(store, 4) == tuple(store.sigmas[i] for i in best)
    assert aligned(store, 4).nfe == 4
    assert aligned(store, 4).sigmas[-1] == 0
    assert aligned_levels(store, 1) == (store.sigmas[0], store.sigmas[8])
    with pytest.raises(LogsnrError, match=r"n = 9: must be in \[1, 8\]"):
        aligned_levels(store, 9)
