"""Closed-form denoisers: Tweedie, densities that integrate to 1, limits, and draws with the right moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from logsnr.exact import Gaussian, GaussianMixture, PointCloud, Subspace

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def covariance(d: int, seed: int) -> Tensor:
    a = randn(d, d, seed=seed)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=F64)


def models(d: int = 3) -> dict[str, Gaussian | GaussianMixture | PointCloud | Subspace]:
    return {
        "gaussian": Gaussian(randn(d, seed=1), covariance(d, 2)),
        "mixture": GaussianMixture(
            torch.tensor([0.2, 0.5, 0.3], dtype=F64),
            2 * randn(3, d, seed=3),
            torch.stack([covariance(d, 4), 0.01 * covariance(d, 5), covariance(d, 6)]),
        ),
        "points": PointCloud(randn(7, d, seed=7)),
        "subspace": Subspace(randn(d, 2, seed=8), randn(d, seed=9), scale=1.7),
    }


LEVELS = [0.05, 0.6, 3.0, 200.0, 1e6]


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("sigma", LEVELS)
def test_score_is_the_gradient_of_the_log_density_and_tweedie_holds(name: str, sigma: float) -> None:
    model = models()[name]
    z = model.sample(16, generator=generator(), sigma=sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_density(z, sigma).sum(), z)
    with torch.no_grad():
        estimate, score = model(z, sigma), model.score(z, sigma)
        alpha, s = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        torch.testing.assert_close(score, gradient, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(estimate.eps, -s * score, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alpha * estimate.x0 + s * estimate.eps, z, rtol=1e-10, atol=1e-10)


def test_score_of_a_flat_subspace_is_the_gradient_of_its_residual_density() -> None:
    model = Subspace(randn(4, 2), randn(4, seed=1))
    z = randn(5, 4, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_density(z, 0.7).sum(), z)
    torch.testing.assert_close(model.score(z, 0.7), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0, 30.0, 1e5, math.inf])
def test_density_of_a_mixture_integrates_to_one(sigma: float) -> None:
    model = GaussianMixture([0.3, 0.7], [[-2.0], [1.0]], [[[0.25]], [[0.04]]]).double()
    z = torch.linspace(-12, 12, 20001, dtype=F64).unsqueeze(1)
    assert float(torch.trapezoid(model.log_density(z, sigma).exp(), z[:, 0])) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0, math.inf])
def test_density_of_points_integrates_to_one(sigma: float) -> None:
    model = PointCloud(torch.tensor([[-1.0], [0.2], [2.0]], dtype=F64))
    z = torch.linspace(-12, 12, 20001, dtype=F64).unsqueeze(1)
    assert float(torch.trapezoid(model.log_density(z, sigma).exp(), z[:, 0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.3, 4.0, math.inf])
def test_density_of_a_scaled_subspace_integrates_to_one(sigma: float) -> None:
    model = Subspace(torch.tensor([[1.0], [2.0]], dtype=F64), torch.tensor([0.5, 0.0], dtype=F64), scale=1.5)
    axis = torch.linspace(-10, 10, 401, dtype=F64)
    z = torch.cartesian_prod(axis, axis)
    density = model.log_density(z, sigma).exp().view(401, 401)
    assert float(torch.trapezoid(torch.trapezoid(density, axis), axis)) == pytest.approx(1, abs=1e-9)


def test_subspace_is_the_gaussian_of_its_covariance() -> None:
    b, o = torch.linalg.qr(randn(4, 2))[0], randn(4, seed=1)
    flat, full = Subspace(b, o, scale=0.8), Gaussian(o, 0.64 * b @ b.T)
    z = randn(6, 4, seed=2)
    assert flat.sigma_data == pytest.approx(full.sigma_data, rel=1e-12)
    for sigma in (1e-3, 0.7, 50.0):
        torch.testing.assert_close(flat(z, sigma).x0, full(z, sigma).x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flat(z, sigma).eps, full(z, sigma).eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flat.log_density(z, sigma), full.log_density(z, sigma), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(z, 0.0).x0, full(z, 0.0).x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(z, math.inf).eps, z)


def test_gaussian_per_eigenvalue() -> None:
    lam, sigma = torch.tensor([2.0, 0.5, 0.0], dtype=F64), 0.9
    q = torch.linalg.qr(randn(3, 3))[0]
    y = randn(5, 3, seed=1)
    estimate = Gaussian(torch.zeros(3, dtype=F64), q @ torch.diag(lam) @ q.T)(y / math.hypot(1, sigma), sigma)
    torch.testing.assert_close(estimate.x0 @ q, lam / (lam + sigma**2) * (y @ q), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimate.eps @ q, sigma / (lam + sigma**2) * (y @ q), rtol=1e-12, atol=1e-12)


def test_both_ends() -> None:
    z = randn(6, 3)
    for name in ("gaussian", "mixture"):
        model = models()[name]
        torch.testing.assert_close(model(z, 0.0).x0, z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(z, 0.0).eps, torch.zeros_like(z))
        torch.testing.assert_close(model.score(z, math.inf), -z, rtol=1e-12, atol=1e-12)
    for name, mean in (
        ("gaussian", randn(3, seed=1)),
        ("mixture", torch.tensor([0.2, 0.5, 0.3], dtype=F64) @ (2 * randn(3, 3, seed=3))),
        ("points", randn(7, 3, seed=7).mean(0)),
        ("subspace", randn(3, seed=9)),
    ):
        estimate = models()[name](z, math.inf)
        torch.testing.assert_close(estimate.x0, mean.expand(6, 3), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(estimate.eps, z, rtol=1e-12, atol=1e-12)
    rank_one = torch.outer(randn(3), randn(3))
    degenerate = Gaussian(torch.zeros(3, dtype=F64), rank_one @ rank_one.T)
    line = randn(3) / randn(3).norm()
    torch.testing.assert_close(degenerate(z, 0.0).x0, torch.outer(z @ line, line), rtol=1e-9, atol=1e-9)


def test_flat_subspace_projects() -> None:
    b, o = randn(5, 2), randn(5, seed=1)
    y, sigma = randn(4, 5, seed=2), 3.0
    projector = b @ torch.linalg.inv(b.T @ b) @ b.T
    expected = o + (y - o) @ projector.T
    estimate = Subspace(b, o)(y / math.hypot(1, sigma), sigma)
    torch.testing.assert_close(estimate.x0, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimate.eps, (y - expected) / sigma, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="finite sigma or a finite scale"):
        Subspace(b, o)(y, math.inf)
    assert not Subspace(b, o).finite_at_inf
    with pytest.raises(ValueError, match="give a finite scale"):
        Subspace(b, o).sample(2, generator=generator())


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 8.0])
def test_points_are_the_softmax_and_half_the_gradient_of_the_smoothed_distance(sigma: float) -> None:
    points, y = randn(11, 2, 3), randn(5, 2, 3, seed=1).requires_grad_()
    d2 = (y[:, None] - points).square().flatten(2).sum(2)
    weights = (-d2 / (2 * sigma**2)).softmax(1)
    estimate = PointCloud(points)(y.detach() / math.hypot(1, sigma), sigma)
    torch.testing.assert_close(estimate.x0, torch.einsum("bm,mij->bij", weights, points).detach())
    smoothed = -2 * sigma**2 * (-d2 / (2 * sigma**2)).logsumexp(1)
    (gradient,) = torch.autograd.grad(smoothed.sum(), y)
    torch.testing.assert_close(0.5 * gradient, sigma * estimate.eps, rtol=1e-8, atol=1e-8)


def test_two_points_are_a_tanh() -> None:
    a = 0.7
    y = torch.linspace(-3, 3, 41, dtype=F64).unsqueeze(1)
    for sigma in (0.2, 1.0, 5.0):
        x0 = PointCloud(torch.tensor([[-a], [a]], dtype=F64))(y / math.hypot(1, sigma), sigma).x0
        torch.testing.assert_close(x0, a * torch.tanh(a * y / sigma**2), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_points_tend_to_the_nearest_one(dtype: torch.dtype) -> None:
    points, z = randn(50, 4).to(dtype), randn(20, 4, seed=1).to(dtype)
    nearest = points[torch.cdist(z, points).argmin(1)]
    for sigma in (0.0, 1e-300, 1e-30, 1e-6):
        torch.testing.assert_close(PointCloud(points, chunk=7)(z, sigma).x0, nearest)
    levels = torch.tensor([0.0, 1e-30] * 10, dtype=dtype)
    torch.testing.assert_close(PointCloud(points, chunk=7)(z, levels).x0, nearest)


@pytest.mark.parametrize("name", models())
def test_batched_sigma_is_looped_sigma(name: str) -> None:
    model = models()[name]
    levels = torch.tensor([1e-3, 0.1, 1.0, 20.0, 1e8, math.inf], dtype=F64)
    z = randn(6, 3)
    estimate, density, score = model(z, levels), model.log_density(z, levels), model.score(z, levels)
    for i, sigma in enumerate(levels.tolist()):
        one = model(z[i : i + 1], sigma)
        torch.testing.assert_close(estimate.x0[i : i + 1], one.x0, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(estimate.eps[i : i + 1], one.eps, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(density[i : i + 1], model.log_density(z[i : i + 1], sigma), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(score[i : i + 1], model.score(z[i : i + 1], sigma), rtol=1e-9, atol=1e-12)


def test_points_do_not_depend_on_the_chunk() -> None:
    points, z = randn(23, 3), randn(9, 3, seed=1)
    for sigma in (0.01, 0.5, math.inf):
        whole = PointCloud(points)
        for chunk in (1, 4, 23, 100):
            parts = PointCloud(points, chunk=chunk)
            torch.testing.assert_close(parts(z, sigma).x0, whole(z, sigma).x0, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(parts.log_density(z, sigma), whole.log_density(z, sigma), rtol=1e-12, atol=1e-12)


def test_points_tell_near_duplicates_apart_in_float32() -> None:
    # Squared norms near 1600 have an ulp of 1.2e-4; the squared distances here are of that size.
    points = torch.full((2, 64), 5.0)
    points[1, 0] += 0.01
    sigma = 0.01
    z = (points[:1] + sigma * torch.randn(200, 64, generator=generator())) / math.hypot(1, sigma)
    weight32 = (PointCloud(points)(z, sigma).x0[:, 0] - 5) / 0.01
    weight64 = (PointCloud(points.double())(z.double(), sigma).x0[:, 0] - 5) / (points[1, 0].double() - 5)
    assert float((weight32 - weight64).abs().max()) < 1e-3


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("sigma", [0.0, 0.8, math.inf])
def test_draws_have_the_moments_of_the_noisy_state(name: str, sigma: float) -> None:
    model, n = models()[name], 40000
    mean, cov = {
        "gaussian": lambda: (randn(3, seed=1), covariance(3, 2)),
        "mixture": _mixture_moments,
        "points": lambda: (randn(7, 3, seed=7).mean(0), randn(7, 3, seed=7).T.cov(correction=0)),
        "subspace": lambda: (randn(3, seed=9), 1.7**2 * _projector(randn(3, 2, seed=8))),
    }[name]()
    assert model.sigma_data == pytest.approx(math.sqrt(float(cov.trace()) / 3), rel=1e-9)
    alpha2 = 1 / (1 + sigma**2)
    mean, cov = alpha2**0.5 * mean, alpha2 * cov + (1 - alpha2) * torch.eye(3, dtype=F64)
    z = model.sample(n, generator=generator(5), sigma=sigma)
    assert bool(((z.mean(0) - mean).abs() < 4 * (cov.diagonal() / n).sqrt()).all())
    products = (z - mean)[:, :, None] * (z - mean)[:, None, :]
    assert bool(((products.mean(0) - cov).abs() < 4 * products.std(0) / n**0.5 + 1e-12).all())
    again = model.sample(n, generator=generator(5), sigma=sigma)
    assert torch.equal(z, again)


def _mixture_moments() -> tuple[Tensor, Tensor]:
    w, m = torch.tensor([0.2, 0.5, 0.3], dtype=F64), 2 * randn(3, 3, seed=3)
    covs = torch.stack([covariance(3, 4), 0.01 * covariance(3, 5), covariance(3, 6)])
    centred = m - w @ m
    return w @ m, torch.einsum("k,kij->ij", w, covs) + torch.einsum("k,ki,kj->ij", w, centred, centred)


def _projector(b: Tensor) -> Tensor:
    return b @ torch.linalg.inv(b.T @ b) @ b.T


def test_answers_in_the_dtype_of_the_state_whatever_the_buffers() -> None:
    for name, model in models().items():
        z = randn(4, 3).float()
        estimate = model(z, 0.5)
        assert estimate.x0.dtype == estimate.eps.dtype == torch.float32, name
        torch.testing.assert_close(estimate.x0.double(), model(z.double(), 0.5).x0, rtol=1e-4, atol=1e-5)
        levels = torch.full((4,), 0.5, dtype=F64)
        assert model(z, levels).x0.dtype == torch.float32, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "0.5: it must be symmetric"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1: all must be >= 0"),
        (lambda: Gaussian([[0.0]], [[1.0]]), r"mean has shape \(1, 1\): give \[D\]"),
        (lambda: Gaussian([0.0], [[math.nan]]), "not finite"),
        (lambda: GaussianMixture([0.5, 0.6], [[0.0], [1.0]], [[[1.0]], [[1.0]]]), "sum 1.1"),
        (lambda: GaussianMixture([1.5, -0.5], [[0.0], [1.0]], [[[1.0]], [[1.0]]]), "smallest value -0.5"),
        (lambda: GaussianMixture([1.0], [[0.0], [1.0]], [[[1.0]], [[1.0]]]), r"give weights \[2\]"),
        (lambda: PointCloud([1.0, 2.0]), r"give \[M, \*shape\]"),
        (lambda: PointCloud([[1.0]], chunk=0), "chunk = 0"),
        (lambda: Subspace([[1.0, 2.0], [1.0, 2.0]]), "rank 1"),
        (lambda: Subspace([[1.0], [0.0]], [0.0]), "does not fit basis"),
        (lambda: Subspace([[1.0], [0.0]], scale=0.0), "scale = 0.0"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
