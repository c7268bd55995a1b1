"""Theorem 1 of 2303.00848 as a number: the ELBO of noise-augmented data, against closed forms."""

import math

import pytest
import torch

from logsnr import exact
from logsnr.likelihood import augmented_elbo
from logsnr.weightings import EDM, ELBO, Custom, EDMMonotonic, EpsCosine, Sigmoid, V

VARIANCES = torch.tensor([0.05, 0.3, 1.4], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model(variances=VARIANCES):
    return exact.Gaussian(torch.zeros(3, dtype=torch.float64), torch.diag(variances))


def samples(n=64):
    return torch.randn(n, 3, generator=generator(1), dtype=torch.float64) * VARIANCES.sqrt()


def cross_entropy(x, weighting, lo, hi):
    """E_{l ~ p_w, q(z|x)}[-log p_l(z)] `[N]` of the exact model, by quadrature over density and atom."""
    mixture = weighting.augmentation(lo, hi)
    lam = torch.linspace(lo, hi, 60001, dtype=torch.float64)

    def nats(l):
        a2, s2 = torch.sigmoid(l)[:, None, None], torch.sigmoid(-l)[:, None, None]
        v = a2 * VARIANCES + s2
        return 0.5 * ((2 * math.pi * v).log() + (a2 * x.square() + s2) / v).sum(-1)

    return torch.trapezoid(mixture.density(lam)[:, None] * nats(lam), lam, dim=0) + mixture.atom * nats(lam[-1:])[0]


@pytest.mark.parametrize("weighting", [Sigmoid(2), EDMMonotonic(), ELBO(), Sigmoid(-1).shift(1.0)])
def test_the_exact_model_attains_the_cross_entropy_of_the_augmented_data(weighting):
    """Per sample: with the exact denoiser the bound is tight, up to the prior's e^-14."""
    lo, hi, x = -14.0, 8.0, samples()
    result = augmented_elbo(
        model(), x, weighting, logsnr_range=(lo, hi), generator=generator(2), evaluations_per_image=64
    )
    expected = cross_entropy(x, weighting, lo, hi)
    assert abs(result.nats - float(expected.mean())) < 4 * result.stderr + 1e-5
    assert result.stderr < 0.02 * abs(result.nats) + 0.01
    assert float(result.per_sample.mean()) == pytest.approx(result.nats, abs=1e-12)
    assert result.nats == pytest.approx(result.weighted_loss + result.prior + result.entropy, abs=1e-12)


def test_the_models_own_covariance_as_control_leaves_only_the_level():
    lo, hi, x = -14.0, 6.0, samples()
    many = torch.randn(40000, 3, generator=generator(5), dtype=torch.float64) * VARIANCES.sqrt()
    without, known = (
        augmented_elbo(model(), x, Sigmoid(2), logsnr_range=(lo, hi), generator=generator(2), train=train)
        for train in (None, many)
    )
    assert known.stderr < 0.6 * without.stderr
    assert abs(known.nats - float(cross_entropy(x, Sigmoid(2), lo, hi).mean())) < 4 * known.stderr + 1e-5


def test_a_wrong_model_is_worse():
    """Averaged over data, the bound of another model exceeds that of the exact one."""
    x, args = samples(400), {"logsnr_range": (-14.0, 6.0), "evaluations_per_image": 32}
    right = augmented_elbo(model(), x, V(), generator=generator(3), **args)
    wrong = augmented_elbo(model(3 * VARIANCES), x, V(), generator=generator(3), **args)
    # V falls so steeply that its data are all but pure noise: the gap is small, and resolved.
    assert wrong.nats > right.nats
    right, wrong = (
        augmented_elbo(m, x, Sigmoid(2), generator=generator(3), **args) for m in (model(), model(3 * VARIANCES))
    )
    assert wrong.nats - right.nats > 10 * math.hypot(right.stderr, wrong.stderr)


def test_the_scale_of_w_means_nothing():
    w = Sigmoid(2)
    scaled = Custom(lambda l: w.log(l) + 7.0, in_log=True)
    one, two = (
        augmented_elbo(model(), samples(), v, logsnr_range=(-10.0, 6.0), generator=generator(4)).nats
        for v in (w, scaled)
    )
    assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize(
    ("x", "weighting", "span", "words"),
    [
        (samples(), EpsCosine(), (-10.0, 8.0), ["EpsCosine", "rises", "envelope"]),
        (samples(), EDM(), (-10.0, 8.0), ["EDM", "rises"]),
        (samples(), ELBO(), (8.0, -10.0), ["(8.0, -10.0)", "lo < hi"]),
        (samples().long(), ELBO(), (-10.0, 8.0), ["int64", "floats"]),
        (samples()[:, :2], ELBO(), (-10.0, 8.0), ["(64, 2)", "(3,)"]),
        (samples(), Custom(lambda l: (l > 0).double()), (-10.0, 8.0), ["w at lo = -10.0", "move lo"]),
    ],
)
def test_bad_input(x, weighting, span, words):
    with pytest.raises(ValueError) as error:
        augmented_elbo(model(), x, weighting, logsnr_range=span, generator=generator())
    for word in words:
        assert word in str(error.value)


def test_edm_is_an_elbo_where_it_falls():
    result = augmented_elbo(model(), samples(), EDM(), logsnr_range=(-3.3, 8.0), generator=generator())
    assert math.isfinite(result.nats)
    assert "nats" in str(result)
