"""Log-densities by the probability flow, against closed forms."""

import math

import pytest
import torch

from logsnr import exact
from logsnr.likelihood import bits_per_dim, ode_bits_per_dim, ode_log_likelihood
from logsnr.noise import sigma_from_logsnr
from logsnr.pixels import Pixels

pytest.importorskip("torchdiffeq")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(dim=4):
    A = torch.randn(dim, dim, generator=generator(1), dtype=torch.float64)
    return exact.Gaussian(torch.zeros(dim, dtype=torch.float64), 0.3 * A @ A.T / dim + 0.01 * torch.eye(dim))


def mixture():
    means = torch.tensor([[-1.0, 0.5], [0.8, 0.2], [0.0, -1.0]], dtype=torch.float64)
    covs = torch.stack(
        [torch.diag(torch.tensor(v, dtype=torch.float64)) for v in ([0.02, 0.1], [0.2, 0.01], [0.05, 0.05])]
    )
    return exact.GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, covs)


def density_at(model, x, hi):
    """log p of y = x + sigma eps at y = x."""
    sigma = sigma_from_logsnr(hi)
    alpha = 1 / math.hypot(1, sigma)
    return model.log_density(alpha * x, sigma) + x.shape[1] * math.log(alpha)


@pytest.mark.parametrize("model", [gaussian(), mixture()], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("hi", [4.0, 10.0])
def test_exact_trace_is_the_closed_form(model, hi):
    x = model.sample(12, generator=generator(2))
    result = ode_log_likelihood(model, x, logsnr_range=(-22.0, hi), trace="exact", rtol=1e-7, atol=1e-7)
    assert torch.allclose(result.log_density, density_at(model, x, hi), atol=2e-4)
    assert result.stderr == 0
    assert 0 < result.evaluations < 600


def test_hutchinson_is_unbiased():
    model = gaussian()
    x = model.sample(40, generator=generator(2))
    result = ode_log_likelihood(model, x, logsnr_range=(-22.0, 6.0), probes=8, generator=generator(3))
    assert 0 < result.stderr < 1
    assert abs(float((result.log_density - density_at(model, x, 6.0)).mean())) < 4 * result.stderr + 1e-3


def test_one_probe_has_no_standard_error():
    model = gaussian()
    result = ode_log_likelihood(
        model, model.sample(2, generator=generator()), logsnr_range=(-8, 4.0), generator=generator()
    )
    assert math.isnan(result.stderr)


def test_batches_agree():
    model = mixture()
    x = model.sample(7, generator=generator(2))
    one, two = (
        ode_log_likelihood(model, x, logsnr_range=(-15.0, 6.0), trace="exact", chunk=b).log_density for b in (3, 7)
    )
    assert torch.allclose(one, two, atol=2e-3)


def test_uniform_dequantisation_is_the_closed_form_at_the_same_draws():
    model, hi = gaussian(), 9.0
    images = torch.randint(4, 13, (10, 4), generator=generator(4), dtype=torch.uint8)
    result = ode_bits_per_dim(
        model,
        images,
        pixels=Pixels(17),
        logsnr_range=(-22.0, hi),
        dequantise="uniform",
        draws=2,
        trace="exact",
        generator=generator(5),
        rtol=1e-7,
        atol=1e-7,
    )
    same, x, spacing = generator(5), Pixels(17).encode(images).double(), Pixels(17).spacing
    nats = [
        -density_at(model, x + spacing * (torch.rand(x.shape, generator=same, dtype=torch.float64) - 0.5), hi)
        - 4 * math.log(spacing)
        for _ in range(2)
    ]
    assert torch.allclose(result.per_image, torch.stack(nats).mean(0) / (4 * math.log(2)), atol=2e-4)
    assert "uniform" in str(result)


def test_gaussian_dequantisation_is_the_variational_bound_of_an_exact_model():
    """The flow and the diffusion of an exact denoiser have the same marginals, so both bounds are one number."""
    model, span = gaussian(), (-16.0, 7.0)
    images = torch.randint(2, 15, (60, 4), generator=generator(4), dtype=torch.uint8)
    flow = ode_bits_per_dim(
        model, images, pixels=Pixels(17), logsnr_range=span, draws=6, trace="exact", generator=generator(5)
    )
    bound = bits_per_dim(
        model, images, pixels=Pixels(17), logsnr_range=span, generator=generator(6), evaluations_per_image=256
    )
    assert abs(flow.bits_per_dim - bound.bits_per_dim) < 4 * math.hypot(flow.stderr, bound.stderr)
    assert math.hypot(flow.stderr, bound.stderr) < 0.05 * bound.bits_per_dim


@pytest.mark.parametrize(
    ("span", "kind", "words"),
    [
        ((-5.0, 5.0), "gaussian", r"the reconstruction term .* alone is 1\.\d+ bits/dim.* to about 7.88"),
        ((-1.0, 7.8), "gaussian", r"the prior term .* to about -5.00"),
        ((-1.0, 5.0), "uniform", r"the prior term .* to about -5.00"),
    ],
)
def test_warns_with_the_size_of_the_end_that_is_short(span, kind, words):
    images = torch.randint(17, (2, 4), generator=generator(4), dtype=torch.uint8)
    with pytest.warns(UserWarning, match=words) as found:
        ode_bits_per_dim(
            gaussian(), images, pixels=Pixels(17), logsnr_range=span, dequantise=kind, rtol=1e-2, generator=generator()
        )
    assert len(found) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: ode_log_likelihood(m, torch.zeros(1, 4), logsnr_range=(-5, 5)), ["generator = None", "needs both"]),
        (lambda m: ode_log_likelihood(m, torch.zeros(1, 3), logsnr_range=(-5, 5), trace="exact"), ["(1, 3)", "(4,)"]),
        (
            lambda m: ode_log_likelihood(m, torch.zeros(1, 4, dtype=torch.uint8), logsnr_range=(-5, 5), trace="exact"),
            ["uint8", "ode_bits_per_dim"],
        ),
        (lambda m: ode_log_likelihood(m, torch.zeros(1, 4), logsnr_range=(-5, 5), trace="jvp"), ["'jvp'", "'exact'"]),
        (lambda m: ode_log_likelihood(m, torch.zeros(1, 4), logsnr_range=(5, 5), trace="exact"), ["(5, 5)"]),
        (
            lambda m: ode_bits_per_dim(
                m, torch.zeros(1, 4, dtype=torch.uint8), pixels=Pixels(17), draws=1, generator=generator()
            ),
            ["draws = 1", "at least 2"],
        ),
        (
            lambda m: ode_bits_per_dim(m, torch.zeros(1, 4), pixels=Pixels(17), generator=generator()),
            ["float32", "uint8"],
        ),
        (
            lambda m: ode_bits_per_dim(
                m, torch.full((1, 4), 17, dtype=torch.uint8), pixels=Pixels(17), generator=generator()
            ),
            ["17", "0 ... 16"],
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:
        call(gaussian())
    for word in words:
        assert word in str(error.value)
