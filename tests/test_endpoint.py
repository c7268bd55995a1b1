"""Counting evaluations and same-noise errors."""

import pytest
import torch

from logsnr import exact, grids, heun, sample, solvers
from logsnr.sampling.counted import Counted, rmse


def test_counts_every_evaluation_and_changes_nothing():
    model = exact.Gaussian(torch.zeros(2), torch.eye(2))
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    grid = grids.log_linear(7, 20.0, 0.05)
    counted = Counted(model)
    x = sample(counted, solvers.ge(grid), noise=noise)
    assert counted.evaluations == 7
    assert torch.equal(x, sample(model, solvers.ge(grid), noise=noise))
    counted.evaluations = 0
    heun(counted, grid, noise=noise)
    assert counted.evaluations == 2 * 7 - 1
    assert counted.shape == model.shape
    assert counted.finite_at_inf == model.finite_at_inf


def test_rmse_is_per_dimension():
    a = torch.zeros(4, 3)
    assert rmse(a + torch.tensor([3.0, 0.0, 0.0]), a) == pytest.approx(3**0.5)
    with pytest.raises(ValueError, match="one noise"):
        rmse(a, a[:2])


def test_guidance_counts_twice_where_it_acts():
    from logsnr import guidance

    class Conditional(exact.Gaussian):
        def forward(self, z, sigma, *, shift=0.0):
            return super().forward(z, sigma)

    model = Conditional(torch.zeros(2), torch.eye(2))
    guided = guidance.cfg(model, 2.0, {"shift": 0.0}, interval=(0.5, 5.0))
    grid = grids.from_sigmas([10.0, 4.0, 1.0, 0.2, 0.0])
    counted = Counted(guided)
    sample(counted, solvers.ddim(grid), noise=torch.zeros(1, 2), cond={"shift": 1.0})
    assert counted.evaluations == 1 + 2 + 2 + 1
