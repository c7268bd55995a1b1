"""The passport: every finding where it should be and nowhere else, on models whose faults are known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logsnr as ls
from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.evaluation.passport import Passport, Relabelled, examine
from logsnr.evaluation.passport.card import LabelScan
from logsnr.evaluation.passport.findings import label_trouble
from logsnr.exact import Gaussian
from logsnr.noise import alpha_s
from logsnr.training import load_data
from logsnr.training.config import DataConfig

SMALL = {"trajectories": 4, "levels": 9}
TINY = {"images": 32, "trajectories": 2, "levels": 5}


class Wrapped(Denoiser):
    """A denoiser around another, with its own faults."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner
        self.shape, self.sigma_data, self.trained_range = inner.shape, inner.sigma_data, inner.trained_range

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        return self.inner(z, sigma, **cond)


class Mistaken(Wrapped):
    """Takes sigma for c sigma, at the same y."""

    def __init__(self, inner: Denoiser, c: float) -> None:
        super().__init__(inner)
        self.c = c

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        sigma = float(sigma)
        (alpha, s), (alpha_, _) = alpha_s(sigma), alpha_s(self.c * sigma)
        x0 = self.inner(z * (alpha_ / alpha), self.c * sigma).x0
        return Estimate(x0, (z - alpha * x0) / s)


class Isotropic(Wrapped):
    """Knows only the data's standard deviation: what an EDM network answers before training."""

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s = alpha_s(float(sigma))
        d2 = self.sigma_data**2
        n2 = alpha * alpha * d2 + s * s
        return Estimate(alpha * d2 / n2 * z, s / n2 * z)


class Broken(Wrapped):
    """Answers with nan at high noise."""

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        found = self.inner(z, sigma)
        return found if float(sigma) < 5 else Estimate(found.x0 * math.nan, found.eps * math.nan)


class Half(Isotropic):
    """Trained below sigma 2 only."""

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        return self.inner(z, sigma) if float(sigma) < 2 else super().forward(z, sigma)


class Noise(nn.Module):
    """The exact eps of a mixture as a network that is told log-SNR, and mistakes sigma for c sigma.

    `gain` scales its middle up and its end down: beyond 65504 only float32 holds it.
    """

    def __init__(self, mixture: Denoiser, c: float = 1.0, gain: float = 1.0) -> None:
        super().__init__()
        dim = mixture.dim
        self.up, self.down = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up.weight.data = gain * torch.eye(dim)
        self.down.weight.data = torch.eye(dim) / gain
        self.mixture, self.c = mixture, c

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        eps = self.mixture(z, self.c * math.exp(-0.5 * float(label[0]))).eps
        return self.down(self.up(eps))


def network(mixture: Denoiser, **options: float) -> NetworkDenoiser:
    return NetworkDenoiser(
        Noise(mixture, **options),
        ls.predictions.Eps(),
        shape=mixture.shape,
        sigma_data=mixture.sigma_data,
        trained_range=(0.01, 80.0),
    )


def mixture(dim: int = 64, components: int = 4) -> ls.exact.GaussianMixture:
    g = torch.Generator().manual_seed(1)
    means = 0.5 * torch.randn(components, dim, generator=g)
    axes = torch.linalg.qr(torch.randn(components, dim, dim, generator=g))[0]
    covs = 0.3 * axes * torch.logspace(0, -2, dim) @ axes.mT
    return ls.exact.GaussianMixture(torch.full((components,), 1 / components), means, (covs + covs.mT) / 2)


def digits() -> tuple[ls.exact.GaussianMixture, Tensor]:
    """A Gaussian per digit, of one covariance, fitted to training digits; and the held-out ones."""
    data = load_data(DataConfig())
    x = ls.Pixels(17).encode(data.train_images).flatten(1)
    assert data.train_labels is not None
    # 150 images per digit are too few for covariances of their own: such a model would know them by heart.
    means = torch.stack([x[data.train_labels == k].mean(0) for k in range(10)])
    within = torch.cov((x - means[data.train_labels]).T) + 1e-3 * torch.eye(64)
    model = ls.exact.GaussianMixture(torch.full((10,), 0.1), means, within.expand(10, 64, 64))
    return model, ls.Pixels(17).encode(data.test_images).flatten(1)


def narrow(model: Denoiser, low: float, high: float) -> Denoiser:
    model.trained_range = (low, high)
    return model


@pytest.fixture(scope="module")
def exact() -> ls.exact.GaussianMixture:
    return mixture()


@pytest.fixture(scope="module")
def samples(exact) -> Tensor:
    return exact.sample(1500, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def good(exact, samples) -> Passport:
    return examine(exact, samples, name="exact", **SMALL)


def pipeline() -> Denoiser:
    diffusers = pytest.importorskip("diffusers")
    from logsnr.adapters.diffusers.pipelines import denoiser_from

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    return denoiser_from(diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler()))


# findings: each where it should be, and nowhere else


def troubles(passport: Passport) -> set[str]:
    return {f.kind for f in passport.troubles}


MATRIX = {
    "exact, its own samples": (lambda m: m, False, SMALL, set()),
    "exact network": (lambda m: network(m), True, SMALL, set()),
    "sigma off by +10 %": (lambda m: Mistaken(m, 1.1), True, SMALL, {"labels"}),
    "sigma off by -10 %": (lambda m: Mistaken(m, 0.9), True, SMALL, {"labels"}),
    "a network's label off by 10 %": (lambda m: network(m, c=1.1), True, SMALL, {"labels"}),
    "off by 10 %, without data": (lambda m: Mistaken(m, 1.1), False, TINY, set()),
    "untrained": (Isotropic, True, SMALL, {"undertrained"}),
    "untrained, its own samples": (Isotropic, False, TINY, set()),
    "too short, both ends": (lambda m: narrow(Wrapped(m), 0.2, 3.0), True, SMALL, {"short"}),
    "too short above": (lambda m: narrow(Wrapped(m), 0.01, 3.0), True, TINY, {"short"}),
    "too short, its own samples": (lambda m: narrow(Wrapped(m), 0.01, 2.0), False, TINY, {"short"}),
    "nan at high noise": (Broken, True, TINY, {"non_finite"}),
    "nan at high noise, without data": (Broken, False, TINY, {"non_finite"}),
    "overflow in float16": (lambda m: network(m, gain=1e5), True, TINY, {"half"}),
}


@pytest.mark.parametrize("case", MATRIX)
def test_each_finding_is_where_it_should_be_and_nowhere_else(exact, samples, case):
    make, data, size, expected = MATRIX[case]
    passport = examine(make(exact), samples if data else None, **size)
    assert troubles(passport) == expected, [f.text for f in passport.findings]
    assert passport.source == ("data" if data else "noise" if "nan" in case else "model")
    if "off by" in case and data:
        scan = passport.labels
        assert scan is not None
        c = 0.9 if "-10" in case else 1.1
        assert abs(math.log(scan.factor / c)) < 4 * scan.stderr + 0.01
        assert scan.way == ("label" if "network" in case else "model")
        assert passport.finding("labels").value == scan.factor
    if "too short" in case:
        assert len(passport.troubles) == (2 if "both" in case else 1)


def test_an_exact_model_has_no_trouble_and_is_usable_everywhere(exact, good):
    assert troubles(good) == set()
    assert good.sampling_range == good.declared_range == exact.sampling_range
    assert abs(math.log(good.labels.factor)) < 4 * good.labels.stderr
    assert good.start.kl < 1e-3


def test_a_mixture_of_digits_on_held_out_digits():
    model, held_out = digits()
    passport = examine(model, held_out, **SMALL)
    assert troubles(passport) == set(), [f.text for f in passport.findings]


@pytest.mark.heavy
def test_a_random_pipeline_denoises_nothing():
    digits_ = ls.Pixels(17).encode(load_data(DataConfig()).test_images)
    passport = examine(pipeline(), digits_, **TINY)
    assert troubles(passport) == {"undertrained"}
    assert passport.finding("undertrained").severity == "error"
    assert passport.pictures is not None
    assert passport.pictures.denoised.shape == (2 * 8 * 8, 1, 8, 8)


def test_the_usable_range_stops_where_the_model_does(exact, samples):
    passport = examine(Half(exact), samples, images=64, trajectories=2, levels=13)
    found = passport.finding("undertrained")
    low, high = passport.sampling_range
    assert low == exact.sampling_range[0]
    assert high < 2 < found.sigmas[1]
    inside = [level.sigma for level in passport.levels if level.trained and level.sigma < 2]
    assert high == max(inside)
    assert found.severity == "warning"


def test_the_page_and_the_findings_agree(exact, samples):
    """No level of the usable range has its whole bar above the line, and who is undertrained is told no number.

    The curve is that of the levels judged: with the labels put right, where they are wrong.
    """
    wrong = examine(Mistaken(exact, 1.1), samples, **TINY)
    assert [level.sigma for level in wrong.corrected] == [level.sigma for level in wrong.levels]
    assert wrong.judged == wrong.corrected
    half = examine(Half(exact), samples, images=64, trajectories=2, levels=13)
    assert half.judged == half.levels
    for passport in (wrong, half):
        low, high = passport.sampling_range
        above = [e for e in passport.judged if e.trained and e.ratio - 3 * e.ratio_stderr > 1.05]
        assert all(not low <= level.sigma <= high for level in above)
    found = half.finding("nfe")
    assert math.isnan(found.value)
    assert "No number is recommended" in found.text
    assert "Choose" not in found.text
    assert wrong.finding("nfe").value > 0


def test_the_probe_is_part_of_it(exact, samples, good):
    """The same answer as `ls.probe` on the declared range; an exact model is of use everywhere."""
    own = ls.probe(exact, sigma_range=good.declared_range)
    assert (good.probe.low, good.probe.high) == own.sigma_range == good.declared_range
    assert good.probe.evaluations == good.evaluations["probe"] == own.evaluations
    broken = examine(Broken(exact), samples, **TINY)
    assert broken.probe is None or broken.probe.high < 5


def test_an_end_of_our_own_choice_is_no_finding(exact):
    """Without data too: a model trained to sigma inf is not called too short where we begin and end."""
    d, mean = 36, 8.0
    model = Gaussian(mean * torch.ones(d), torch.eye(d))
    assert model.trained_range == (0, math.inf)
    passport = examine(model, **TINY)
    assert passport.source == "model"
    assert passport.finding("short") is None
    assert passport.declared_range[1] > model.sampling_range[1]
    x = mean + torch.randn(96, d, generator=torch.Generator().manual_seed(0))
    cut = examine(model, x, sigma_range=(0.2, 1e3), **TINY).finding("short")
    assert "Sample to a smaller sigma, it was trained on less" in cut.text
    trained = examine(narrow(Wrapped(model), 0.2, 1e3), x, **TINY).finding("short")
    assert "Train to a smaller sigma" in trained.text


def test_broken_levels_are_cut_off_and_counted(exact, samples):
    passport = examine(Broken(exact), samples, images=32, trajectories=2, levels=13)
    found = passport.finding("non_finite")
    bad = [level for level in passport.levels if level.non_finite]
    assert found.value == sum(level.non_finite for level in bad) == 32 * len(bad)
    assert all(level.sigma >= 5 for level in bad)
    assert passport.sampling_range[1] < 5
    assert passport.end_points == ()
    assert passport.bends == ()


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": torch.zeros(100, 32)}, r"\(100, 32\): give at least 32 samples, \[N, 64\]"),
        ({"data": torch.zeros(0, 64)}, r"\(0, 64\): give at least 32"),
        ({"data": torch.zeros(31, 64)}, r"\(31, 64\): give at least 32"),
        ({"data": torch.zeros(40, 64, dtype=torch.uint8)}, "uint8: give finite floats"),
        ({"data": torch.full((40, 64), math.nan)}, "give finite floats"),
        ({"cond": {"class_labels": torch.zeros(3)}, "data": torch.zeros(40, 64)}, "3 entries for 40 samples"),
        ({"sigma_range": (0.0, 1.0)}, r"sigma_range = \(0.0, 1.0\): needs 0 < smallest"),
        ({"sigma_range": (2.0, 1.0)}, "needs 0 < smallest < largest"),
        ({"sigma_range": (0.1, 200.0)}, r"within the range \[0.01, 80\]"),
        ({"images": 8}, "images = 8: must be at least 32"),
        ({"trajectories": 1}, "trajectories = 1: must be at least 2"),
        ({"levels": 2}, "levels = 2: must be at least 5"),
        ({"chunk": 0}, "chunk = 0: must be at least 1"),
    ],
)
def test_bad_input_is_named(exact, change, message):
    model = narrow(Wrapped(exact), 0.01, 80.0)
    with pytest.raises(LogsnrError, match=message) as caught:
        examine(model, **change)
    assert "\n" not in str(caught.value)


def test_relabelling_needs_a_network(exact):
    with pytest.raises(ValueError, match="'label' needs a network"):
        Relabelled(exact, 1.1, "label")


def test_labels_are_wrong_only_if_most_levels_say_the_same():
    scan = LabelScan(
        sigmas=(0.1, 0.2, 0.4, 0.8), factors=(0.75, 0.87, 1.0, 1.15, 1.33), way="model", curve=(1.0,) * 5,
        factor=1.1, stderr=0.01, per_level=(1.12, 1.11, 1.1, 0.9), per_level_stderr=(0.02,) * 4, at_edge=False,
    )  # fmt: skip
    assert label_trouble(scan)  # one level may be anything
    split = dataclasses.replace(scan, factor=1.15, per_level=(1.3, 1.25, 1.0, 0.99))
    assert not label_trouble(split)
    assert label_trouble(dataclasses.replace(split, per_level_stderr=(0.06,) * 4))  # nothing is known of the levels
    assert not label_trouble(dataclasses.replace(scan, factor=1.05, per_level=(1.05,) * 4))
    assert not label_trouble(dataclasses.replace(scan, stderr=0.04))


def test_a_run_begins_where_the_data_say_not_where_our_own_cut_would_be():
    """A mean of 36 times the variance leaves .025 nats at 160 sigma_data: the range goes on to where .02 are left."""
    d, mean = 36, 6.0
    model = Gaussian(mean * torch.ones(d), torch.eye(d))
    x = mean + torch.randn(96, d, generator=torch.Generator().manual_seed(0))
    assert model.sampling_range[1] == 160
    passport = examine(model, x, **TINY)
    needed = mean * math.sqrt(d / 0.04)
    assert passport.declared_range == pytest.approx((1 / 250, needed), rel=0.01)
    assert passport.finding("short") is None
    cut = examine(model, x, sigma_range=(1 / 250, 160.0), **TINY).finding("short")
    assert cut.value == pytest.approx(d * mean**2 / (2 * 160**2), rel=0.02)
    assert "Sample from a larger sigma" in cut.text
