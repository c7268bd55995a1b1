"""Objectives: one loss whatever the schedule and prediction, and each preset against its paper's own code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import logsnr as ls
from logsnr.denoiser import NetworkDenoiser
from logsnr.exact import Gaussian, GaussianMixture
from logsnr.noise import alpha_s, sigma_from_logsnr
from logsnr.objectives import WeightedELBO, objectives
from logsnr.predictions import EDM, X0, Eps, Flow, Prediction, Score, V
from logsnr.schedules import (
    Adaptive,
    Cosine,
    EDMTraining,
    FlowUniform,
    InterpolatedCosine,
    Linear,
    LogitNormal,
    Schedule,
    VPLinear,
)
from logsnr.timesteps import TimestepTable
from logsnr.weightings import ELBO, Custom, EDMMonotonic, EpsCosine, MinSNR, Sigmoid, Weighting
from logsnr.weightings import V as VWeighting

LO, HI = -10.0, 10.0
SCHEDULES: dict[str, Schedule] = {
    "cosine": Cosine().truncate(LO, HI),
    "cosine-shifted": Cosine(2 * math.log(64 / 256)).truncate(LO, HI),
    "flow": FlowUniform().truncate(LO, HI),
    "flow-shift-3": FlowUniform(3.0).truncate(LO, HI),
    "linear": Linear(LO, HI),
    "edm": EDMTraining().truncate(LO, HI),
    "vp-linear": VPLinear().truncate(LO, HI),
    "interpolated": InterpolatedCosine(32, 128, 64).truncate(LO, HI),
    "adaptive": Adaptive((LO, HI), Sigmoid(2.0), sigma_data=0.7),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def gaussian(s: float, dim: int) -> Gaussian:
    return Gaussian(torch.zeros(dim).double(), s**2 * torch.eye(dim).double())


# ---------------------------------------------------------------------------------------------- invariance (A6, A16)


def quadrature(nodes: int = 16) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre on [0, 1]."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    b = k / (4 * k * k - 1).sqrt()
    at, vectors = torch.linalg.eigh(torch.diag(b, 1) + torch.diag(b, -1))
    return 0.5 * (1 + at), vectors[0] ** 2


@pytest.mark.parametrize("weighting", [Sigmoid(2.0), ELBO(), EpsCosine(), VWeighting(), EDMMonotonic(), MinSNR()])
def test_expected_loss_is_the_same_integral_under_every_schedule(weighting: Weighting) -> None:
    """1/2 E_{t ~ U}[w/p m] for N(0, .7^2), by quadrature in each schedule's own time."""
    kinks = torch.tensor([-3.30777747, math.log(5)], dtype=torch.float64)
    edges = torch.cat([torch.linspace(LO, HI, 101, dtype=torch.float64), kinks]).sort(descending=True).values
    at, weights = quadrature()
    values = {}
    for name, schedule in SCHEDULES.items():
        if name == "adaptive":
            continue  # jumps at every bin; its integral is checked in test_adaptive.py
        t, c = (tail[:, None] for tail in schedule._tails(edges))
        t, c = t[:-1] + t.diff(dim=0) * at, c[:-1] + c.diff(dim=0) * at
        dt = torch.where(t < c, schedule._tails(edges)[0].diff()[:, None], -schedule._tails(edges)[1].diff()[:, None])
        x = schedule._quantile(t, c)
        loss = 0.5 * (weighting.log(x) - schedule.log_density(x)).exp() * torch.sigmoid(x + 2 * math.log(0.7))
        values[name] = float((dt * weights * loss).sum())
    assert list(values.values()) == pytest.approx([values["linear"]] * len(values), rel=1e-9)
    assert WeightedELBO(weighting, Linear(LO, HI)).scale(1, 0.7) == pytest.approx(values["linear"], rel=1e-7)
    if isinstance(weighting, Sigmoid):
        assert values["linear"] == pytest.approx(0.88863042, abs=5e-9)


def replicate(
    objective: WeightedELBO, denoiser: object, sample: Callable[[int], Tensor], seed: int
) -> tuple[float, float]:
    """Mean loss and its standard error from independent stratified batches."""
    generator = rng(seed)
    means = []
    for i in range(60):
        x = sample(1000 * seed + i)
        means.append(objective(denoiser, x, generator=generator).loss.mean())  # type: ignore[arg-type]
    out = torch.stack(means)
    return float(out.mean()), float(out.std() / math.sqrt(len(out)))


@every_schedule
def test_monte_carlo_loss_of_a_gaussian(schedule: Schedule) -> None:
    s, dim = 0.7, 4
    mean, stderr = replicate(
        WeightedELBO(Sigmoid(2.0), schedule), gaussian(s, dim), lambda i: s * normal(512, dim, seed=i), seed=1
    )
    assert mean == pytest.approx(dim * 0.88863042, abs=4 * stderr)
    assert stderr < 0.02 * dim


MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]).double(),
    torch.tensor([[-1.1], [0.6]]).double(),
    torch.tensor([[[0.04]], [[0.3]]]).double(),
)


@pytest.fixture(scope="module")
def mixture_loss() -> float:
    """1/2 int sigmoid(2 - lambda) mmse for MIXTURE, by quadrature in z and lambda."""
    z = torch.linspace(-9, 9, 1501, dtype=torch.float64)[:, None]
    x = torch.linspace(LO, HI, 801, dtype=torch.float64)
    mmse = []
    for level in x.tolist():
        sigma = math.exp(-level / 2)
        p = MIXTURE.log_density(z, sigma).exp() * (z[1] - z[0])
        mmse.append(1 - float((p * MIXTURE(z, sigma).eps[:, 0] ** 2).sum()))
    curve = 0.5 * torch.sigmoid(2 - x) * torch.tensor(mmse, dtype=torch.float64)
    return float(torch.trapezoid(curve, x))


@every_schedule
def test_monte_carlo_loss_of_a_mixture(schedule: Schedule, mixture_loss: float) -> None:
    mean, stderr = replicate(
        WeightedELBO(Sigmoid(2.0), schedule), MIXTURE, lambda i: MIXTURE.sample(512, generator=rng(i)), seed=2
    )
    assert mean == pytest.approx(mixture_loss, abs=4 * stderr)


class Perfect(nn.Module):
    """The network that makes an exact Gaussian denoiser N(0, s^2) of a given prediction, from log-SNR labels."""

    def __init__(self, prediction: Prediction, s: float) -> None:
        super().__init__()
        self.prediction, self.s = prediction, s

    def forward(self, state: Tensor, label: Tensor) -> Tensor:
        alpha, s = (v[:, None] for v in alpha_s(sigma_from_logsnr(label)))
        z = state / self.prediction.c_in(alpha, s)
        var = alpha**2 * self.s**2 + s**2
        t_x, t_e = self.prediction.target_row(alpha, s)
        return t_x * alpha * self.s**2 / var * z + t_e * s / var * z


@pytest.mark.parametrize(
    "prediction",
    [
        Eps(),
        Eps(path="ve"),
        X0(),
        X0(path="flow"),
        V(),
        V(path="flow"),
        Flow(label="logsnr"),
        Score(path="ve"),
        Flow(label="logsnr", reverse=True),
        EDM(label="logsnr"),
        EDM(label="logsnr", sigma_data=2.0),
    ],
)
def test_loss_is_the_same_whatever_the_network_predicts(prediction: Prediction) -> None:
    s = 0.7
    objective = WeightedELBO(Sigmoid(2.0), SCHEDULES["cosine"])
    x, eps = s * normal(64, 3), normal(64, 3, seed=1)
    logsnr = objective.schedule.sample(64, generator=rng())
    expected = objective.loss_at(gaussian(s, 3), x, eps, logsnr)
    model = NetworkDenoiser(Perfect(prediction, s), prediction, shape=(3,))
    out = objective.loss_at(model, x, eps, logsnr)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-9, atol=0)


@every_schedule
def test_expected_gradient_is_the_same_under_every_schedule(schedule: Schedule) -> None:
    """v_hat = theta z on N(0, s^2): d/dtheta = int w alpha^2 (theta var(z) - alpha s (1 - s^2)) dlambda."""
    s, theta, n = 0.7, -0.5, 40000

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # One copy per sample, so that one backward pass gives every sample's gradient.
            self.theta = nn.Parameter(torch.full((n, 1), theta, dtype=torch.float64))

        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            return self.theta * z

    network = Line()
    objective = WeightedELBO(Sigmoid(2.0), schedule)
    out = objective(NetworkDenoiser(network, V(), shape=(1,)), s * normal(n, 1, seed=5), generator=rng(6))
    out.loss.sum().backward()
    gradient = network.theta.grad
    assert gradient is not None
    x = torch.linspace(LO, HI, 20001, dtype=torch.float64)
    alpha, noise = alpha_s(sigma_from_logsnr(x))
    exact = torch.trapezoid(
        torch.sigmoid(2 - x) * alpha**2 * (theta * (alpha**2 * s**2 + noise**2) - alpha * noise * (1 - s**2)), x
    )
    assert float(gradient.mean()) == pytest.approx(float(exact), abs=4 * float(gradient.std()) / math.sqrt(n))
    assert float(gradient.std()) / math.sqrt(n) < 0.1 * abs(float(exact))


# ------------------------------------------------------------------------------- the ELBO is the likelihood (A7)


@pytest.mark.parametrize("s", [0.3, 0.7, 1.0, 2.0])
def test_elbo_of_a_gaussian_is_its_entropy(s: float) -> None:
    """1/2 int r dlambda plus the exact prior and decoder is 1/2 ln(2 pi e s^2)."""
    lo, hi = -5.0, 13.3
    diffusion = WeightedELBO(ELBO(), Linear(lo, hi)).scale(1, s)
    c = 2 * math.log(s)
    assert diffusion == pytest.approx(0.5 * (math.log1p(math.exp(hi + c)) - math.log1p(math.exp(lo + c))), rel=1e-12)
    prior = 0.5 * math.log1p(s**2 * math.exp(lo))
    decoder = 0.5 * math.log(2 * math.pi * math.e * s**2 / (1 + s**2 * math.exp(hi)))
    assert diffusion + prior + decoder == pytest.approx(0.5 * math.log(2 * math.pi * math.e * s**2), abs=1e-11)


def test_standard_normal_prior_costs_its_divergence() -> None:
    alpha, s = alpha_s(sigma_from_logsnr(-5.0))
    var = alpha**2 * 0.7**2 + s**2
    assert 0.5 * (var - 1 - math.log(var)) == pytest.approx(2.9194e-6, rel=2e-5)


@pytest.mark.parametrize(
    ("steps", "excess"), [(10, 10.39716), (100, 0.5624296), (1000, 0.05331969), (10000, 0.005303988)]
)
def test_discrete_time_costs_more(steps: int, excess: float) -> None:
    """VDM's T-step loss 1/2 sum expm1(lambda_s - lambda_t) m(lambda_t) minus the continuous one, s = .7."""
    schedule = Linear(-5, 13.3)
    levels = schedule.logsnr(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    r = torch.sigmoid(levels + 2 * math.log(0.7))
    discrete = 0.5 * float((torch.expm1(levels[:-1] - levels[1:]) * r[1:]).sum())
    assert discrete - WeightedELBO(ELBO(), schedule).scale(1, 0.7) == pytest.approx(excess, rel=2e-6)


# --------------------------------------------------------------------------------------------------- the class itself


def test_call_is_loss_at_its_own_draws() -> None:
    objective = objectives["vdm++/sigmoid"]
    model = gaussian(0.7, 3)
    x = 0.7 * normal(32, 3)
    out = objective(model, x, generator=rng(4))
    generator = rng(4)
    logsnr = objective.schedule.sample(32, generator=generator)
    eps = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    assert torch.equal(out.logsnr, logsnr)
    assert torch.equal(out.loss, objective.loss_at(model, x, eps, logsnr).loss)
    expected = 0.5 * (Sigmoid(2.0).log(logsnr) - objective.schedule.log_density(logsnr)).exp() * out.eps_error
    torch.testing.assert_close(out.loss, expected, rtol=1e-14, atol=0)


def test_half_precision_data_gives_the_float32_loss() -> None:
    class Net(nn.Module):
        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            return torch.tanh(z * label[:, None])

    model = NetworkDenoiser(Net(), V(), shape=(16,))
    x = (0.5 * normal(32, 16, dtype=torch.float32)).bfloat16()
    half = objectives["v-cosine"](model, x, generator=rng(1))
    full = objectives["v-cosine"](model, x.float(), generator=rng(1))
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, full.loss)


def test_conditions_reach_the_network() -> None:
    class Shifted(nn.Module):
        def forward(self, z: Tensor, label: Tensor, offset: Tensor) -> Tensor:
            return offset[:, None].expand_as(z)

    model = NetworkDenoiser(Shifted(), Eps(), shape=(2,))
    x, eps, offset = normal(4, 2), normal(4, 2, seed=1), torch.arange(4.0).double()
    out = objectives["vdm"].loss_at(model, x, eps, torch.zeros(4).double(), {"offset": offset})
    torch.testing.assert_close(out.eps_error, ((eps - offset[:, None]) ** 2).sum(1))
    torch.testing.assert_close(out.loss, 0.5 * 18.3 * out.eps_error, rtol=1e-12, atol=0)


def test_scale_is_the_loss_of_a_gaussian_fit() -> None:
    """Closed forms: pi/2 for sech and e^(-l/2), a/(1 - e^-a)/2 for sigmoid; it depends on w and the ends only."""
    for schedule in (Cosine(), FlowUniform(), EDMTraining()):
        assert WeightedELBO(EpsCosine(), schedule).scale(3) == pytest.approx(3 * math.pi / 2, rel=1e-9)
    a = 2 + 2 * math.log(0.7)
    assert WeightedELBO(Sigmoid(2.0), Cosine()).scale(1, 0.7) == pytest.approx(0.5 * a / (1 - math.exp(-a)), rel=1e-9)
    assert WeightedELBO(EDMMonotonic(), LogitNormal().truncate(-10, 10)).scale(1) == pytest.approx(0.2040233, rel=3e-7)
    with pytest.raises(ValueError, match="truncate"):
        WeightedELBO(ELBO(), Cosine()).scale(1)
    with pytest.raises(ValueError, match="truncate"):
        WeightedELBO(Custom(lambda x: torch.exp(-x)), Cosine()).scale(1)


def test_state_belongs_to_adaptive_schedules() -> None:
    fixed = objectives["edm"]
    x = 0.7 * normal(16, 2)
    fixed.update(fixed(gaussian(0.7, 2), x, generator=rng()))
    assert fixed.state_dict() == {}
    adaptive, copy = (WeightedELBO(Sigmoid(2.0), Adaptive((LO, HI), Sigmoid(2.0), dim=2)) for _ in range(2))
    adaptive.update(adaptive(gaussian(0.7, 2), x, generator=rng()))
    copy.load_state_dict(adaptive.state_dict())
    first, second = (o(gaussian(0.7, 2), x, generator=rng(9)) for o in (adaptive, copy))
    assert torch.equal(first.loss, second.loss)


def test_ranges_are_those_of_the_table() -> None:
    """Every preset has end points: +-20 where the paper has none."""
    own = {
        "ddpm": tuple(-2 * math.log(s) for s in reversed(TimestepTable.ddpm().sigma_range)),
        "vdm": (-5, 13.3),
        "ncsn": (-2 * math.log(50), -2 * math.log(0.01)),
        "vp-sde": (-10, 20),
    }
    for name, objective in objectives.items():
        assert objective.schedule.range == pytest.approx(own.get(name, (-20, 20)), rel=1e-12), name


def test_the_shelf_is_the_mapping_of_published_objectives() -> None:
    """`ls.objectives` is a module and the mapping that it holds."""
    assert list(ls.objectives) == list(objectives)
    assert len(ls.objectives) == len(objectives) == 15
    assert "edm" in ls.objectives
    assert [name for name, _ in ls.objectives.items()] == list(objectives)


def test_an_objective_says_what_it_is_in_one_line_of_code() -> None:
    """Weighting, schedule and range, as they are written; what is written makes it again."""
    assert repr(objectives["edm"]) == (
        "WeightedELBO(EDM(p_mean=-1.2, p_std=1.2, sigma_data=0.5), "
        "EDMTraining(p_mean=-1.2, p_std=1.2).truncate(-20, 20), name='edm')"
    )
    # EDM, Flow and V are names of weightings here, not of predictions.
    names = {**vars(ls.predictions), **vars(ls.schedules), **vars(ls.weightings), "WeightedELBO": WeightedELBO}
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    for name in objectives:
        text = repr(objectives[name])
        assert "\n" not in text
        if "TimestepTable" not in text:
            again = eval(text, names)
            assert torch.equal(again.weighting(x), objectives[name].weighting(x))
            assert torch.equal(again.schedule.log_density(x), objectives[name].schedule.log_density(x))
    sigmoid = Sigmoid(2.0)
    adaptive = repr(WeightedELBO(sigmoid, Adaptive((-10, 10), sigmoid, importance="gradient")))
    assert "Adaptive((-10.0, 10.0), Sigmoid(bias=2.0), importance='gradient', bins=100" in adaptive
    assert repr(ls.weightings.EDM().envelope().shift(1.0)) == f"{ls.weightings.EDM()!r}.envelope().shift(1)"


def test_unknown_objectives_name_the_nearest() -> None:
    with pytest.raises(
        KeyError, match=r"objective 'minsnr5' is not one of ddpm, iddpm, .*: did you mean 'min-snr-5'\?"
    ):
        objectives["minsnr5"]
    assert "edm" in objectives
    assert objectives["edm"].name == "edm"
