"""Inversion returns to where it came from; interpolated noises are as normal as their ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from logsnr.exact import GaussianMixture
from logsnr.sampling import ddim_invert, grids, interpolate, invert, reconstruct, sample, solvers
from logsnr.sampling.counted import Counted

F64 = torch.float64
GRID = grids.log_linear(12, 30.0, 0.02)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def mixture() -> GaussianMixture:
    covs = torch.stack([0.05 * torch.eye(2), 0.2 * torch.eye(2), torch.tensor([[0.3, 0.1], [0.1, 0.1]])]).double()
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), 1.5 * randn(3, 2, seed=9), covs)


@pytest.mark.parametrize("sigma_range", [None, (0.002, 80.0), (0.0, math.inf), (0.0, 10.0)])
def test_data_to_noise_and_back(sigma_range: tuple[float, float] | None) -> None:
    model = mixture()
    x = model.sample(64, generator=generator())
    noise = invert(model, x, sigma_range=sigma_range, rtol=1e-10, atol=1e-10)
    back = reconstruct(model, noise, sigma_range=sigma_range, rtol=1e-10, atol=1e-10)
    assert float((back - x).abs().max()) < 1e-6
    assert not torch.equal(noise, x)


def test_inverted_data_is_distributed_as_noise() -> None:
    x = mixture().sample(4000, generator=generator())
    noise = invert(mixture(), x, sigma_range=(0.0, math.inf), rtol=1e-6, atol=1e-6)
    assert float(noise.mean(0).abs().max()) < 4 / math.sqrt(4000)
    torch.testing.assert_close(noise.T.cov(), torch.eye(2, dtype=F64), rtol=0, atol=4 * math.sqrt(2 / 4000))


@pytest.mark.parametrize("grid", [GRID, GRID[:-1], (math.inf, *GRID[1:]), grids.flow(12, shift=3.0)])
def test_refined_ddim_inversion_is_the_inverse_of_ddim(grid: tuple[float, ...]) -> None:
    model = Counted(mixture())
    noise = randn(64, 2)
    x = sample(model, solvers.ddim(grid), noise=noise)
    errors = []
    for refine in (0, 4, 60):
        model.evaluations = 0
        back = ddim_invert(model, x, grid, refine=refine)
        assert model.evaluations == 12 * (1 + refine) - (len(grid) == 12) * (1 + refine)
        errors.append(float((back - noise).abs().median()))
    if math.isfinite(grid[0]):
        assert errors[0] > 3 * errors[1] > 0
        assert errors[2] < 1e-6
    else:  # from pure noise every start of the first step is one: x0 = E[x] forgets which noise it was
        assert ddim_invert(model, x, grid, refine=8).isfinite().all()


def test_plain_ddim_inversion_is_euler_upwards() -> None:
    model, grid = mixture(), GRID[:-1]
    x = model.sample(16, generator=generator(), sigma=grid[-1])
    y = x * math.hypot(1, grid[-1])
    for low, high in zip(grid[:0:-1], grid[-2::-1], strict=True):
        y = y + (high - low) * model(y / math.hypot(1, low), low).eps
    torch.testing.assert_close(ddim_invert(model, x, grid), y / math.hypot(1, grid[0]), rtol=1e-12, atol=1e-12)


def test_what_inversion_refuses() -> None:
    x = randn(2, 2)
    with pytest.raises(ValueError, match=r"sigma_range = \(1.0, 0.5\)"):
        invert(mixture(), x, sigma_range=(1.0, 0.5))
    with pytest.raises(ValueError, match="refine = -1: must be at least 0"):
        ddim_invert(mixture(), x, GRID, refine=-1)
    with pytest.raises(ValueError, match="strictly decrease"):
        ddim_invert(mixture(), x, GRID[::-1])


# interpolation


@pytest.mark.parametrize("mode", ["slerp", "linear"])
def test_interpolation_begins_and_ends_where_it_should(mode: str) -> None:
    a, b = randn(5, 3, 4), randn(5, 3, 4, seed=1)
    torch.testing.assert_close(interpolate(a, b, 0.0, mode), a, rtol=0, atol=1e-15)
    torch.testing.assert_close(interpolate(a, b, 1.0, mode), b, rtol=0, atol=1e-15)
    path = interpolate(a, b, torch.linspace(0, 1, 7), mode)
    assert path.shape == (7, 5, 3, 4)
    for t, z in zip(torch.linspace(0, 1, 7).double(), path, strict=True):
        torch.testing.assert_close(z, interpolate(a, b, float(t), mode), rtol=1e-12, atol=1e-12)
    swapped = interpolate(b, a, torch.linspace(1, 0, 7), mode)
    torch.testing.assert_close(path, swapped, rtol=1e-6, atol=1e-6)


def test_slerp_keeps_norms_and_turns_at_a_constant_rate() -> None:
    a, b = (n / n.norm(dim=1, keepdim=True) * 3 for n in (randn(6, 5), randn(6, 5, seed=1)))
    path = interpolate(a, b, torch.linspace(0, 1, 9, dtype=F64))
    torch.testing.assert_close(path.norm(dim=2), torch.full((9, 6), 3.0, dtype=F64), rtol=1e-12, atol=0)
    steps = (path[1:] - path[:-1]).norm(dim=2)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-9, atol=0)


def test_slerp_of_parallel_noises_is_their_chord() -> None:
    a = randn(3, 5)
    torch.testing.assert_close(interpolate(a, a, 0.3), a)
    torch.testing.assert_close(interpolate(a, 2 * a, 0.3), 1.3 * a)
    assert interpolate(a, a + 1e-9, 0.5).isfinite().all()
    assert interpolate(torch.zeros(2, 3), torch.zeros(2, 3), 0.5).isfinite().all()


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_marginals_stay_normal(t: float) -> None:
    """Mean, variance, excess kurtosis of 200k values within 4 standard errors; slerp also keeps each sample's norm."""
    a, b = randn(50, 4096), randn(50, 4096, seed=1)
    n = a.numel()
    for mode in ("linear", "slerp"):
        z = interpolate(a, b, t, mode)
        assert abs(float(z.mean())) < 4 / math.sqrt(n)
        assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
        assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
        assert float((z.norm(dim=1) / 64 - 1).abs().max()) < 0.06
    gap = interpolate(a, b, t) - interpolate(a, b, t, "linear")
    assert float(gap.square().mean().sqrt()) < 0.25  # one great circle, at slightly different speeds


def test_linear_in_two_dimensions_is_exactly_normal_and_the_plain_chord_is_not() -> None:
    a, b = randn(100_000, 1), randn(100_000, 1, seed=1)
    half = interpolate(a, b, 0.5, "linear")
    assert float(half.var()) == pytest.approx(1, abs=4 * math.sqrt(2e-5))
    assert float(((a + b) / 2).var()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), 0.5), r"noises of shape \(2, 3\) and \(2, 4\)"),
        ((torch.zeros(3), torch.zeros(3), 0.5), "give two batches"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 1.5), r"t = 1.5: give one number in \[0, 1\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 0.5, "cubic"), "mode 'cubic' is not one of slerp, linear"),
    ],
)
def test_what_interpolation_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interpolate(*arguments)
