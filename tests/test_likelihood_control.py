"""Pilot levels and control variates: unbiased whatever they say, and worth what they cost."""

import math

import pytest
import torch

from logsnr import exact
from logsnr.denoiser import Denoiser, Estimate
from logsnr.likelihood import (
    Controls,
    GaussianControl,
    Pilot,
    bits_per_dim,
    expected_reconstruction_nats,
    prior_nats,
    reconstruction_nats,
)
from logsnr.likelihood.control import draw_errors
from logsnr.pixels import Pixels

LO, HI = -6.0, 7.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=24, dim=6, levels=17, seed=1):
    """Grey levels of which many are black."""
    images = torch.randint(0, levels, (n, dim), generator=generator(seed), dtype=torch.uint8)
    return torch.where(torch.rand(n, dim, generator=generator(seed + 1)) < 0.4, 0, images)


def model(dim=6, variance=0.3):
    return exact.Gaussian(torch.zeros(dim), variance * torch.eye(dim))


def bound_of_gaussian(images, variance, lo, hi, levels=17):
    """The bound in bits/dim of an isotropic Gaussian model, by quadrature."""
    x = Pixels(levels).encode(images).double()
    lam = torch.linspace(lo, hi, 40001, dtype=torch.float64)
    a2, s2 = torch.sigmoid(lam), torch.sigmoid(-lam)
    n2 = a2 * variance + s2
    per_x2 = torch.trapezoid(a2 * s2 / n2**2, lam)
    constant = torch.trapezoid((a2 * variance / n2) ** 2, lam)
    diffusion = 0.5 * (x.square().sum(1) * per_x2 + x.shape[1] * constant)
    nats = diffusion + expected_reconstruction_nats(images, Pixels(levels), hi) + prior_nats(x, lo)
    return float(nats.mean()) / (x.shape[1] * math.log(2))


@pytest.mark.parametrize("kind", ["default", pytest.param("train", marks=pytest.mark.heavy), "wrong pilot"])
def test_mean_over_seeds_is_the_analytic_bound(kind):
    images = data()
    expected = bound_of_gaussian(images, 0.3, LO, HI)
    extra = {"train": data(60, seed=5)} if kind == "train" else {}
    if kind == "wrong pilot":  # levels and coefficients from nowhere
        extra["pilot"] = Pilot(
            range=(LO, HI),
            spread=torch.rand(5, generator=generator(3)).double(),
            betas=torch.randn(5, 2, generator=generator(4)).double(),
            means=torch.empty(0),
            controls=Controls(extremes=(-1 + 1 / 17,)),
        )
    runs = torch.tensor(
        [
            bits_per_dim(
                model(),
                images,
                pixels=Pixels(17),
                logsnr_range=(LO, HI),
                generator=generator(seed),
                evaluations_per_image=8,
                **extra,
            ).bits_per_dim
            for seed in range(32)
        ]
    ).double()
    assert abs(float(runs.mean()) - expected) < 4 * float(runs.std()) / 32**0.5


def test_estimate_is_within_three_of_its_own_standard_errors():
    images = data(64)
    result = bits_per_dim(model(), images, pixels=Pixels(17), logsnr_range=(LO, HI), generator=generator(11))
    assert abs(result.bits_per_dim - bound_of_gaussian(images, 0.3, LO, HI)) < 3 * result.stderr


def test_expected_reconstruction_is_the_mean_of_its_draws():
    images, pixels, logsnr = data(4000, 3), Pixels(17), 6.0
    x = pixels.encode(images)
    draws = reconstruction_nats(x, pixels, logsnr, generator=generator(2))
    exact_mean = expected_reconstruction_nats(images, pixels, logsnr)
    assert abs(float((draws - exact_mean).mean())) < 4 * float((draws - exact_mean).std()) / 4000**0.5


@pytest.mark.parametrize(("logsnr", "bits"), [(13.3, 0.010453), (10.0, 1.8336), (8.0, 3.2764)])
def test_expected_reconstruction_golden(logsnr, bits):
    """Fact A8, to all its digits."""
    nats = expected_reconstruction_nats(torch.full((1, 1), 128, dtype=torch.uint8), Pixels(256), logsnr)
    assert float(nats) / math.log(2) == pytest.approx(bits, rel=5e-5)


def test_controls_have_mean_zero_for_every_image_and_level():
    x = Pixels(17).encode(data(3))
    controls = Controls.of(x, GaussianControl(Pixels(17).encode(data(50, seed=7))))
    assert len(controls.extremes) >= 1
    n = 40000
    for row in x:
        eps = torch.randn(n, 6, generator=generator(6))
        values = controls(row.expand(n, 6), eps, torch.full((n,), 0.4))
        assert bool((values.mean(0).abs() <= 4.5 * values.std(0) / n**0.5 + 1e-12).all())


def test_gaussian_control_is_all_the_noise_of_a_gaussian_model():
    """The error of the exact Gaussian denoiser less its control does not depend on eps, at any level."""
    A = torch.randn(5, 5, generator=generator(1), dtype=torch.float64)
    x = torch.randn(400, 5, generator=generator(2), dtype=torch.float64) @ A + 0.3
    control = GaussianControl(x, shrink=0.0)
    denoiser = exact.Gaussian(x.mean(0), torch.cov(x.T))
    one = x[:1].expand(50, 5)
    for logsnr in (-5.0, 0.0, 5.0):
        level = torch.full((50,), logsnr, dtype=torch.float64)
        error, value = draw_errors(
            denoiser, one, level, cond=None, generator=generator(3), chunk=50, controls=Controls(gaussian=control)
        )
        assert float(error.std()) > 1e-3
        assert float((error - value[:, 1]).std()) < 1e-9 * (1 + float(error.mean()))


def test_levels_follow_their_density():
    pilot = Pilot(
        range=(-2.0, 3.0), spread=torch.tensor([1.0, 0.0, 4.0]).double(), betas=torch.zeros(3, 0), means=torch.empty(0)
    )
    share = pilot.probabilities(torch.ones_like)
    assert float(share.sum()) == pytest.approx(1, abs=1e-12)
    assert float(share.min()) > 0
    u = (torch.arange(30000, dtype=torch.float64) + 0.5) / 30000
    logsnr, density = pilot.levels(u, share)
    assert float((1 / density).mean()) == pytest.approx(5.0, rel=1e-3)  # int dlambda
    assert float((logsnr / density).mean()) == pytest.approx(2.5, rel=1e-3)  # int lambda dlambda
    assert bool((logsnr.diff() > 0).all())


def test_a_pilot_and_controls_pay():
    images = data(40)
    budget = {"pixels": Pixels(17), "logsnr_range": (LO, HI)}

    def spread(**extra):
        runs = [bits_per_dim(model(), images, generator=generator(s), **budget, **extra).stderr ** 2 for s in range(6)]
        return (sum(runs) / 6) ** 0.5

    plain = spread(pilot=Pilot.uniform(LO, HI))
    free, gaussian = spread(), spread(train=data(400, seed=9))
    assert free < 0.7 * plain
    assert gaussian < 0.7 * free


def test_a_small_pilot_learns_from_what_it_serves():
    """Fed the draws of later passes it knows the levels as well as a pilot of as many draws; to each its own seed."""
    x = Pixels(17).encode(data(40))
    span = {"logsnr_range": (LO, HI)}

    def pilot(evaluations, seed):
        return Pilot.measure(model(), x, generator=generator(seed), evaluations=evaluations, **span)

    reference = pilot(96_000, 1)
    small, large = pilot(192, 2), pilot(9_600, 3)
    fed = small.after(large.draws)
    assert len(fed.draws) == 192 + 9_600
    assert fed.evaluations == small.evaluations == 192

    def off(found):
        return float((found.spread / reference.spread).log().square().mean().sqrt())

    assert off(fed) < 1.2 * off(large) < 0.3 * off(small)
    again = small.after(reference.draws)
    assert again.after(large.draws) is again  # enough
    uniform = Pilot.uniform(LO, HI)
    assert uniform.after(large.draws) is uniform


@pytest.mark.heavy
def test_learning_makes_estimates_better(monkeypatch):
    """From 4 draws a bin on: variances summed over 10 estimates, with the pilot that learns and with the same that does
    not.  (40 estimates say .76 +- .09.)"""
    x, span = Pixels(17).encode(data(40)), {"logsnr_range": (LO, HI)}
    exact = bound_of_gaussian(data(40), 0.3, LO, HI)

    def variances():
        for seed in range(10):
            pilot = Pilot.measure(model(), x, generator=generator(seed), evaluations=96, **span)
            found = bits_per_dim(
                model(),
                data(40),
                pixels=Pixels(17),
                generator=generator(seed),
                pilot=pilot,
                evaluations_per_image=64,
                **span,
            )
            assert abs(found.bits_per_dim - exact) < 5 * found.stderr  # with 7 degrees of freedom
            yield found.stderr**2

    learned = sum(variances())
    monkeypatch.setattr(Pilot, "after", lambda self, *draws: self)
    assert learned < 0.85 * sum(variances())


def test_every_bin_of_a_pilot_sees_all_images():
    x = torch.arange(48.0)[:, None].expand(48, 6)  # 48 shares factors with 24 bins
    pilot = Pilot.measure(Numbered(), x, logsnr_range=(-1, 1), generator=generator(), evaluations=48 * 24)
    bins = ((pilot.draws.logsnr + 1) * 12).long().clamp(max=23)
    for b in range(24):
        assert sorted(pilot.draws.error[bins == b].tolist()) == list(range(48))


class Numbered(Denoiser):
    """Its error is the number of the image."""

    def __init__(self):
        super().__init__()
        self.shape, self.sigma_data, self.trained_range = (6,), 1.0, (1e-3, 1e3)

    def forward(self, z, sigma, **cond):
        raise NotImplementedError

    def eps_error(self, x, eps, sigma, **cond):
        return x[:, 0].floor()


def test_stops_at_the_tolerance():
    images = data(12)
    args = {"pixels": Pixels(17), "logsnr_range": (LO, HI), "evaluations_per_image": 8}
    first = bits_per_dim(model(), images, generator=generator(1), **args)
    goal = first.stderr / 3
    result = bits_per_dim(model(), images, generator=generator(1), tolerance=goal, **args)
    assert result.stderr <= goal
    assert 8 * 12 < result.evaluations <= 1024 * 12
    assert abs(result.bits_per_dim - bound_of_gaussian(images, 0.3, LO, HI)) < 5 * result.stderr
    with pytest.warns(UserWarning, match="above tolerance"):
        capped = bits_per_dim(
            model(), images, generator=generator(1), tolerance=1e-6, max_evaluations_per_image=32, **args
        )
    assert capped.evaluations == 32 * 12


def test_pilot_of_other_images_is_reused():
    other = Pixels(17).encode(data(30, seed=8))
    pilot = Pilot.measure(model(), other, logsnr_range=(LO, HI), generator=generator(1), evaluations=480)
    result = bits_per_dim(
        model(), data(), pixels=Pixels(17), logsnr_range=(LO, HI), generator=generator(2), pilot=pilot
    )
    assert result.pilot_evaluations == pilot.evaluations == 480
    assert abs(result.bits_per_dim - bound_of_gaussian(data(), 0.3, LO, HI)) < 4 * result.stderr


class Broken(Denoiser):
    """Answers nan at small noise."""

    shape, sigma_data, trained_range = (6,), 1.0, (0.0, math.inf)

    def forward(self, z, sigma, **cond):
        bad = torch.where(torch.as_tensor(sigma).reshape(-1, 1) < 0.1, math.nan, 0.0) * z
        return Estimate(bad, bad)


@pytest.mark.parametrize(
    ("denoiser", "extra", "words"),
    [
        (model(), {"tolerance": 0.0}, ["tolerance = 0.0", "positive"]),
        (model(), {"tolerance": 0.1, "max_evaluations_per_image": 16}, ["16", "evaluations_per_image = 32"]),
        (model(), {"pilot": Pilot.uniform(-5.0, 7.5)}, ["(-5.0, 7.5)", "measure another"]),
        (model(), {"train": data(1)}, ["1 sample", "at least two"]),
        (Broken(), {}, ["not finite", "log-SNR"]),
    ],
)
def test_bad_input_is_one_clear_line(denoiser, extra, words):
    with pytest.raises(ValueError) as error:
        bits_per_dim(denoiser, data(), pixels=Pixels(17), logsnr_range=(LO, HI), generator=generator(), **extra)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("span", "words"),
    [((-5.0, 5.0), "reconstruction term .* to about 7.88"), ((-1.0, 7.8), "prior term .* to about -5.00")],
)
def test_warns_with_the_size_of_the_end_that_is_short(span, words):
    with pytest.warns(UserWarning, match=words):
        bits_per_dim(
            model(), data(), pixels=Pixels(17), logsnr_range=span, generator=generator(), evaluations_per_image=8
        )


def test_pilot_needs_enough_draws():
    with pytest.raises(ValueError, match="evaluations = 30, bins = 24"):
        Pilot.measure(model(), torch.zeros(4, 6), logsnr_range=(LO, HI), generator=generator(), evaluations=30)
