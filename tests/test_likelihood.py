"""The variational bound against closed forms on exact Gaussian denoisers."""

import math

import pytest
import torch

from logsnr import exact
from logsnr.likelihood import bits_per_dim, default_logsnr_range, prior_nats, reconstruction_nats
from logsnr.pixels import Pixels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_diffusion_nats(x, variance, lo, hi, points=20001):
    """1/2 int E||eps_hat - eps||^2 dlambda for N(0, variance) per dimension at fixed x, by quadrature.

    eps_hat = s z/n^2, n^2 = alpha^2 variance + s^2, so eps_hat - eps = alpha s x/n^2 - alpha^2 variance eps/n^2.
    """
    lam = torch.linspace(lo, hi, points, dtype=torch.float64)
    a2, s2 = torch.sigmoid(lam), torch.sigmoid(-lam)
    n2 = a2 * variance + s2
    per_x2 = torch.trapezoid(a2 * s2 / n2**2, lam)
    constant = torch.trapezoid((a2 * variance / n2) ** 2, lam)
    return 0.5 * (x.flatten(1).square().sum(1) * per_x2 + x[0].numel() * constant)


def test_diffusion_term_equals_the_closed_form_of_a_gaussian_model():
    dim, levels, variance = 6, 17, 0.3
    images = torch.randint(0, levels, (40, dim), generator=generator(1), dtype=torch.uint8)
    model = exact.Gaussian(torch.zeros(dim), variance * torch.eye(dim))
    lo, hi = -6.0, 7.0
    result = bits_per_dim(model, images, pixels=Pixels(levels), logsnr_range=(lo, hi), generator=generator(2))
    expected = gaussian_diffusion_nats(Pixels(levels).encode(images).double(), variance, lo, hi)
    unit = 1 / (dim * math.log(2))
    assert abs(result.diffusion - float(expected.mean()) * unit) < 4 * result.stderr
    assert result.stderr < 0.05
    assert result.bits_per_dim == pytest.approx(result.diffusion + result.reconstruction + result.prior, abs=1e-12)
    assert float(result.per_image.mean()) == pytest.approx(result.bits_per_dim, abs=1e-12)
    # what the choice of these 40 images adds: the error of a mean of independent ones
    assert result.data_stderr == pytest.approx(float(result.per_image.std()) / 40**0.5, rel=1e-12)


@pytest.mark.parametrize(("evaluations", "seeds"), [pytest.param(8, 24, marks=pytest.mark.heavy), (32, 16)])
def test_standard_error_is_the_spread_over_seeds(evaluations, seeds):
    """With one stratum for each replicate, and with the four of the default."""
    images = torch.randint(0, 17, (6, 4), generator=generator(1), dtype=torch.uint8)
    model = exact.Gaussian(torch.zeros(4), 0.3 * torch.eye(4))
    runs = [
        bits_per_dim(model, images, pixels=Pixels(17), generator=generator(seed), evaluations_per_image=evaluations)
        for seed in range(seeds)
    ]
    spread = torch.tensor([r.bits_per_dim for r in runs]).std()
    claimed = torch.tensor([r.stderr for r in runs]).square().mean().sqrt()
    # A spread over n seeds is known to 1/sqrt(2 n - 2): three of these either way, and no factor of two.
    assert abs(math.log(float(claimed / spread))) < 3 / (2 * seeds - 2) ** 0.5 < math.log(2)


def test_more_evaluations_shrink_the_error_at_least_as_fast_as_independent_draws():
    images = torch.randint(0, 17, (16, 4), generator=generator(1), dtype=torch.uint8)
    model = exact.Gaussian(torch.zeros(4), 0.3 * torch.eye(4))
    few, many = (
        sum(
            bits_per_dim(model, images, pixels=Pixels(17), generator=generator(s), evaluations_per_image=n).stderr
            for s in range(8)
        )
        for n in (8, 64)
    )
    assert many < few / 2.2  # 1/sqrt(8) = 1/2.8 in expectation


@pytest.mark.parametrize(
    ("logsnr", "bits"),
    [(10.0, 1.8336), *(pytest.param(*golden, marks=pytest.mark.heavy) for golden in ((13.3, 0.010453), (8.0, 3.2764)))],
)
def test_reconstruction_of_interior_pixels_golden(logsnr, bits):
    """Fact A8: 8-bit reconstruction per dimension at VDM's gamma_0 = -13.3, and at -10 and -8."""
    x = Pixels(256).encode(torch.full((64, 3072), 128, dtype=torch.uint8))
    nats = reconstruction_nats(x, Pixels(256), logsnr, generator=generator())
    per_dim = nats / 3072 / math.log(2)
    assert abs(float(per_dim.mean()) - bits) < 4 * float(per_dim.std()) / 8 + 1e-6


def test_reconstruction_probabilities_sum_to_one():
    """Summed over every candidate level, the softmax that the term takes the logarithm of is 1."""
    pixels, sigma = Pixels(5), 0.4
    centres = pixels.centres.double()
    eps = torch.randn(1, 1, generator=generator(3), dtype=torch.float64)
    true = 2
    y = centres[true] + sigma * eps
    logits = -0.5 * ((y - centres) / sigma).square()
    nats = reconstruction_nats(centres[true].reshape(1, 1), pixels, -2 * math.log(sigma), generator=generator(3))
    assert float(nats) == pytest.approx(-float(logits.log_softmax(-1)[0, true]), abs=1e-12)


def test_prior_golden():
    """Fact A8: KL to N(0, I) at log-SNR -5 with E x^2 = 1/3 is .0016255 bits per dimension."""
    x = torch.full((1, 10), (1 / 3) ** 0.5, dtype=torch.float64)
    assert float(prior_nats(x, -5.0)) / 10 / math.log(2) == pytest.approx(0.0016255, abs=5e-8)


def test_default_range_keeps_the_noise_per_cell():
    assert default_logsnr_range(256) == (-5.0, 13.3)
    _, hi = default_logsnr_range(17)
    assert math.exp(-hi / 2) / Pixels(17).spacing == pytest.approx(math.exp(-13.3 / 2) / Pixels(256).spacing)


@pytest.mark.filterwarnings("ignore:log-SNR range")
def test_loss_curve_is_the_mean_error_per_bin():
    dim, variance = 16, 0.5
    model = exact.Gaussian(torch.zeros(dim), variance * torch.eye(dim))
    images = torch.randint(0, 17, (200, dim), generator=generator(1), dtype=torch.uint8)
    result = bits_per_dim(model, images, pixels=Pixels(17), logsnr_range=(-4.0, 6.0), generator=generator(2))
    centres, errors = result.loss_curve
    x2 = float(Pixels(17).encode(images).double().square().mean())
    a2, s2 = torch.sigmoid(centres), torch.sigmoid(-centres)
    n2 = a2 * variance + s2
    expected = a2 * s2 / n2**2 * x2 + (a2 * variance / n2) ** 2
    assert torch.allclose(errors, expected, rtol=0.05, atol=0.01)


def test_repeats_with_the_generator():
    images = torch.randint(0, 17, (5, 4), generator=generator(1), dtype=torch.uint8)
    model = exact.Gaussian(torch.zeros(4), torch.eye(4))
    one, two = (bits_per_dim(model, images, pixels=Pixels(17), generator=generator(4)) for _ in range(2))
    assert one.bits_per_dim == two.bits_per_dim
    assert one.evaluations == 5 * 32


@pytest.mark.parametrize(
    ("images", "kwargs", "words"),
    [
        (torch.zeros(2, 4), {}, ["float32", "uint8"]),
        (torch.full((2, 4), 17, dtype=torch.uint8), {}, ["17", "0 ... 16"]),
        (torch.zeros(2, 5, dtype=torch.uint8), {}, ["(2, 5)", "(4,)"]),
        (torch.zeros(0, 4, dtype=torch.uint8), {}, ["at least one"]),
        (torch.zeros(2, 4, dtype=torch.uint8), {"evaluations_per_image": 12}, ["12", "multiple of 8"]),
        (torch.zeros(2, 4, dtype=torch.uint8), {"logsnr_range": (3.0, 3.0)}, ["(3.0, 3.0)", "lo < hi"]),
    ],
)
def test_bad_input_names_the_value_and_the_fix(images, kwargs, words):
    model = exact.Gaussian(torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError) as error:
        bits_per_dim(model, images, pixels=Pixels(17), generator=generator(), **kwargs)
    for word in words:
        assert word in str(error.value)


def test_the_codec_is_the_denoisers_own():
    model = exact.Gaussian(torch.zeros(4), 0.3 * torch.eye(4))
    images = torch.randint(0, 17, (4, 4), generator=generator(1), dtype=torch.uint8)
    told = bits_per_dim(model, images, pixels=Pixels(17), generator=generator(2), evaluations_per_image=8)
    with pytest.raises(ValueError, match=r"no pixel codec: give pixels=Pixels\(grey_levels\), Pixels\(256\) for 8-bit"):
        bits_per_dim(model, images, generator=generator())
    model.pixels = Pixels(17)
    own = bits_per_dim(model, images, generator=generator(2), evaluations_per_image=8)
    assert own.bits_per_dim == told.bits_per_dim
    assert own.logsnr_range == default_logsnr_range(Pixels(17)) == default_logsnr_range(17)
    with pytest.raises(ValueError, match=r"pixels = Pixels\(grey_levels=256\), but .* of 17 grey levels: leave pixels"):
        bits_per_dim(model, images, pixels=Pixels(256), generator=generator())


def test_warns_when_the_range_reaches_beyond_the_training():
    model = exact.Gaussian(torch.zeros(4), torch.eye(4))
    model.trained_range = (0.5, 3.0)
    with pytest.warns(UserWarning, match="beyond the denoiser's trained range"):
        bits_per_dim(
            model,
            torch.zeros(1, 4, dtype=torch.uint8),
            pixels=Pixels(17),
            generator=generator(),
            evaluations_per_image=8,
        )
