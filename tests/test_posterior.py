"""The batch posterior: the exact posterior mean of a whole data set, a consistent estimate of it otherwise."""

from __future__ import annotations

import pytest
import torch

import logsnr as ls
from logsnr.denoiser import noisy
from logsnr.posterior import batch_posterior
from logsnr.training.config import recipe_from
from logsnr.training.objectives import build_objective


def drawn(n, *shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, eps = (torch.randn(n, *shape, generator=generator, dtype=dtype) for _ in range(2))
    sigma = torch.logspace(-2, 2, n, dtype=dtype)[torch.randperm(n, generator=generator)]
    return x, eps, sigma


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_of_a_whole_data_set_it_is_the_exact_posterior_mean(dtype, atol):
    """Batch = data: x_bar is the answer of `PointCloud`, and the state is the one that it was."""
    x, eps, sigma = drawn(24, 1, 3, 3, dtype=dtype)
    mean, noise = batch_posterior(x, eps, sigma)
    z = noisy(x, eps, sigma)
    cloud = ls.exact.PointCloud(x.double())
    expected = cloud(z.double(), sigma.double())
    torch.testing.assert_close(mean.double(), expected.x0, rtol=0, atol=atol)
    torch.testing.assert_close(noisy(mean, noise, sigma), z, rtol=0, atol=10 * atol)
    torch.testing.assert_close(noise.double(), expected.eps, rtol=1e-4, atol=100 * atol)


def test_the_exact_denoiser_of_the_batch_has_no_error_left():
    """Its loss is zero at every level, where on single samples it is the variance of the posterior."""
    x, eps, sigma = drawn(16, 2)
    logsnr = -2 * sigma.log()
    schedule = ls.schedules.Linear(-10, 10)
    losses = []
    for target in ("sample", "batch"):
        objective = ls.WeightedELBO(ls.weightings.ELBO(), schedule, target=target)
        losses.append(objective.loss_at(ls.exact.PointCloud(x), x, eps, logsnr).loss)
    assert losses[1].max() < 1e-10
    assert losses[0].max() > 0.1


def test_as_the_batch_grows_it_is_the_posterior_mean_of_the_data():
    """Mean squared error over Gaussian data falls as 1/B: bias and variance of a self-normalised estimate."""
    cov = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    exact = ls.exact.Gaussian(torch.zeros(2, dtype=torch.float64), cov)
    root, errors = torch.linalg.cholesky(cov), []
    for n in (64, 1024):
        total = 0.0
        for seed in range(8):
            x, eps, _ = drawn(n, 2, seed=seed)
            x, sigma = x @ root.T, torch.full((n,), 1.0, dtype=torch.float64)
            mean, _ = batch_posterior(x, eps, sigma)
            total += float((mean - exact(noisy(x, eps, sigma), sigma).x0).square().mean()) / 8
        errors.append(total)
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.3)


def test_only_samples_of_equal_conditions_count():
    x, eps, sigma = drawn(12, 3)
    classes = torch.tensor([0, 1, 2] * 4)
    mean, noise = batch_posterior(x, eps, sigma, {"class_labels": classes})
    for label in range(3):
        one = classes == label
        alone = batch_posterior(x[one], eps[one], sigma[one])
        torch.testing.assert_close((mean[one], noise[one]), alone, rtol=1e-12, atol=1e-12)


def test_where_noise_is_weak_nothing_changes():
    x, eps, _ = drawn(8, 5, dtype=torch.float32)
    mean, noise = batch_posterior(x, eps, torch.full((8,), 1e-6))
    assert torch.equal(mean, x)
    assert torch.equal(noise, eps)


def test_a_recipe_names_it():
    objective = {"weighting": "sigmoid", "schedule": "cosine", "logsnr": [-8, 8], "target": "batch"}
    section = recipe_from({"steps": 1, "objective": objective}).objective
    assert build_objective(section, dim=4, sigma_data=0.5).target == "batch"
    assert section.describe() == "sigmoid, batch posterior on [-8, 8], drawn by cosine"
