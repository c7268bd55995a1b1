"""Gradient importance: the last layer's norms are the true ones, and draws by them are the best for the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from logsnr.denoiser import NetworkDenoiser
from logsnr.gradients import OutputLayer, gradient_norms
from logsnr.models import UNetConfig, build_network
from logsnr.noise import alpha_s, sigma_from_logsnr
from logsnr.objectives import WeightedELBO
from logsnr.predictions import EDM, Eps
from logsnr.schedules import Adaptive, Cosine, EDMTraining, FlowUniform, Linear, Schedule
from logsnr.schedules.variance import Spread, SpreadMeter
from logsnr.weightings import ELBO, EpsCosine, Sigmoid, Weighting

LO, HI = -10.0, 10.0


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Body(nn.Module):
    """A small nonlinear network around an output layer, with a head that moves values about behind it."""

    def __init__(self, layer: nn.Module, features: tuple[int, ...], head: str = "") -> None:
        super().__init__()
        self.features, self.head = features, head
        self.enter = nn.Linear(16, math.prod(features))
        self.layer = layer

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x.flatten(1)) + 0.1 * label[:, None]).view(-1, *self.features)
        out = self.layer(h)
        if self.head == "patches":
            out = nn.functional.pixel_shuffle(out, 2).tanh()
        return out.reshape(len(x), 1, 4, 4)


LAYERS = {
    "linear": (lambda: nn.Linear(9, 16), (9,), ""),
    "linear without bias": (lambda: nn.Linear(9, 16, bias=False), (9,), ""),
    "tokens": (lambda: nn.Linear(5, 4), (4, 5), ""),
    "conv": (lambda: nn.Conv2d(3, 1, 3, padding=1), (3, 4, 4), ""),
    "conv, one way wider": (lambda: nn.Conv2d(2, 1, (3, 1), padding=(1, 0), bias=False), (2, 4, 4), ""),
    "dilated": (lambda: nn.Conv2d(2, 1, 3, padding=2, dilation=2), (2, 4, 4), ""),
    "same": (lambda: nn.Conv2d(2, 1, (3, 1), padding="same", dilation=(1, 2)), (2, 4, 4), ""),
    "valid": (lambda: nn.Conv2d(2, 1, 2, padding="valid"), (2, 5, 5), ""),
    "conv1d": (lambda: nn.Conv1d(3, 2, 3, padding=1), (3, 8), ""),
    "patches": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 2, 2), "patches"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_last_layer_norms_are_those_of_autograd(kind: str) -> None:
    """Of the weighted loss, per sample, against `torch.func`'s gradients with respect to the layer's parameters."""
    make, features, head = LAYERS[kind]
    torch.manual_seed(0)
    network = Body(make(), features, head).double()
    denoiser = NetworkDenoiser(network, EDM(sigma_data=0.6), shape=(1, 4, 4))
    objective = WeightedELBO(Sigmoid(2.0), Cosine().truncate(LO, HI))
    x = torch.randn(6, 1, 4, 4, generator=rng(1), dtype=torch.float64)
    eps = torch.randn(6, 1, 4, 4, generator=rng(2), dtype=torch.float64)
    logsnr = objective.schedule.sample(6, generator=rng(3))
    layer = OutputLayer(network)
    with layer:
        output = objective.loss_at(denoiser, x, eps, logsnr)
    norms = layer.squared_norms(output.loss)

    names = [name for name, _ in network.named_parameters() if name.startswith("layer.")]
    inner = {f"network.{name}": p.detach() for name, p in network.named_parameters() if name in names}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
            return objective.loss_at(denoiser, x[None], eps[None], logsnr[None]).loss[0]

    per_sample = vmap(grad(lambda p, *sample: functional_call(Loss(), p, sample)), in_dims=(None, 0, 0, 0))
    grads = per_sample(inner, x, eps, logsnr)
    expected = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0)
    torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)
    # The graph is left for the step itself.
    output.loss.mean().backward()
    assert network.enter.weight.grad is not None


def test_a_linear_layers_norm_has_its_closed_form() -> None:
    """||d(m/2)/d(W, b)||^2 = b_F^2 m (||h||^2 + 1)."""
    torch.manual_seed(0)
    network, prediction = Body(nn.Linear(9, 16), (9,)).double(), EDM(sigma_data=0.6)
    denoiser = NetworkDenoiser(network, prediction, shape=(1, 4, 4))
    x, eps = torch.randn(2, 8, 1, 4, 4, generator=rng(1), dtype=torch.float64)
    objective, seen = WeightedELBO(ELBO(), Linear(LO, HI)), []
    network.layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    layer = OutputLayer(network)
    with layer:
        output = objective.loss_at(denoiser, x, eps, Linear(LO, HI).sample(8, generator=rng()))
    norms = layer.squared_norms(output.loss) / output.ratio**2
    b_F = prediction.eps_row(*alpha_s(sigma_from_logsnr(output.logsnr)))[1]
    torch.testing.assert_close(norms, b_F**2 * output.eps_error * (seen[0].square().sum(1) + 1), rtol=1e-10, atol=0)


def test_the_state_holds_unweighted_gradients() -> None:
    """Equal draws under two weightings leave equal states: w/p is taken out of the losses' gradients."""
    torch.manual_seed(0)
    network = Body(nn.Linear(9, 16), (9,)).double()
    denoiser = NetworkDenoiser(network, EDM(sigma_data=0.6), shape=(1, 4, 4))
    x, eps = torch.randn(2, 32, 1, 4, 4, generator=rng(1), dtype=torch.float64)
    logsnr, layer, states = Linear(LO, HI).sample(32, generator=rng()), OutputLayer(network), []
    for weighting in (ELBO(), Sigmoid(2.0)):
        objective = WeightedELBO(weighting, Adaptive((LO, HI), weighting, importance="gradient"))
        with layer:
            output = objective.loss_at(denoiser, x, eps, logsnr)
        objective.update(output, layer.squared_norms(output.loss))
        states.append(objective.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-9, atol=0)


def test_norms_over_all_parameters_are_those_of_one_backward_pass_each() -> None:
    """On a U-Net with attention, conditions and dropout off; the parameters keep their gradients."""
    torch.manual_seed(0)
    config = UNetConfig(channels=(8,), layers_per_block=1, norm_groups=4, head_dim=8, classes=3)
    network = build_network(config, (1, 4, 4))
    nn.init.normal_(network.unet.conv_out.weight, std=0.3)
    denoiser = NetworkDenoiser(network, EDM(sigma_data=0.5, label="flow"), shape=(1, 4, 4))
    x, eps = torch.randn(2, 3, 1, 4, 4, generator=rng(1))
    sigma, labels = torch.tensor([0.1, 1.0, 5.0]), torch.tensor([0, 3, 1])
    norms = gradient_norms(denoiser, x, eps, sigma, {"class_labels": labels})
    for i in range(3):
        one = slice(i, i + 1)
        half = 0.5 * denoiser.eps_error(x[one], eps[one], sigma[one], class_labels=labels[one]).sum()
        expected = sum(g.square().sum() for g in torch.autograd.grad(half, list(network.parameters())))
        assert float(norms[i]) == pytest.approx(float(expected), rel=1e-4)
    assert all(p.grad is None for p in network.parameters())


def test_the_output_layer_is_the_one_registered_last() -> None:
    network = Body(nn.Conv2d(3, 1, 3, padding=1), (3, 4, 4))
    assert OutputLayer(network).layer is network.layer
    assert OutputLayer(nn.DataParallel(network)).layer is network.layer
    with pytest.raises(ValueError, match=r"name its output layer with layer="):
        OutputLayer(nn.SiLU())
    with pytest.raises(ValueError, match="stride 1 and one group"):
        OutputLayer(network, nn.Conv2d(2, 2, 1, groups=2))
    with pytest.raises(RuntimeError, match="inside `with layer:`"):
        OutputLayer(network).squared_norms(torch.ones(3))


class OneWeight(nn.Module):
    """F = theta z."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.theta * z


def adapted(importance: str, weighting: Weighting) -> Adaptive:
    """A schedule that learned from an arbitrary curve."""
    schedule = Adaptive((LO, HI), weighting, importance=importance)  # type: ignore[arg-type]
    x = Linear(LO, HI).sample(3000, generator=rng(7))
    curve = 3 + torch.sin(2 * x) + torch.exp(-(x**2))
    schedule.update(x, curve, curve**3)
    return schedule


@pytest.mark.parametrize("weighting", [ELBO(), Sigmoid(2.0)], ids=["elbo", "sigmoid"])
@pytest.mark.parametrize("density", ["cosine", "linear", "error", "gradient"])
def test_the_expected_gradient_is_that_of_the_objective(weighting: Weighting, density: str) -> None:
    """F = theta z (eps prediction) on x ~ N(0, s^2 I): dL/dtheta by quadrature within 4 standard errors.

    E = ||theta z - eps||^2, so dE/dtheta = 2 D (theta (alpha^2 s^2 + sigma^2) - sigma) on average.
    """
    s, D, theta, n = 0.7, 4, 0.3, 30000
    fixed: dict[str, Schedule] = {"cosine": Cosine().truncate(LO, HI), "linear": Linear(LO, HI)}
    schedule = fixed[density] if density in fixed else adapted(density, weighting)
    network = OneWeight(theta)
    denoiser = NetworkDenoiser(network, Eps(), shape=(D,))
    x = s * torch.randn(n, D, generator=rng(1), dtype=torch.float64)
    output = WeightedELBO(weighting, schedule)(denoiser, x, generator=rng(2))
    (gradient,) = torch.autograd.grad(output.loss.mean(), network.theta, retain_graph=True)

    grid = torch.linspace(LO, HI, 20001, dtype=torch.float64)
    alpha, sigma = alpha_s(sigma_from_logsnr(grid))
    exact = torch.trapezoid(weighting(grid) * D * (theta * (alpha**2 * s**2 + sigma**2) - sigma), grid)
    # The gradient of each sample, for the standard error: dloss/dtheta = ratio (theta z - eps) z.
    sample = torch.autograd.functional.jvp(
        lambda t: output.ratio * _half_errors(x, output.logsnr, t), network.theta.detach(), torch.ones_like(gradient)
    )[1]
    torch.testing.assert_close(sample.mean(), gradient, rtol=1e-9, atol=0)
    assert float(gradient) == pytest.approx(float(exact), abs=4 * float(sample.std()) / math.sqrt(n))


def _half_errors(x: Tensor, logsnr: Tensor, theta: Tensor) -> Tensor:
    """m/2 of the draws above: the noise follows the levels in the generator's stream."""
    generator = rng(2)
    Linear(LO, HI).sample(len(x), generator=generator)
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    alpha, sigma = (v[:, None] for v in alpha_s(sigma_from_logsnr(logsnr)))
    return 0.5 * (theta * (alpha * x + sigma * eps) - eps).square().sum(1)


@pytest.mark.parametrize("importance", ["error", "gradient"])
def test_two_bins_have_the_best_density_of_all(importance: str) -> None:
    """Second moment sum_b (w_b q_b)^2 / p_b over all p on a grid: least at p ~ w q, where it is (sum w q)^2."""
    weighting = Sigmoid(0.0)
    schedule = Adaptive((-4.0, 4.0), weighting, importance=importance, bins=2, floor=1e-12)  # type: ignore[arg-type]
    values = {"error": [2.0, 7.0], "gradient": [0.5, 4.0]}
    q = {kind: torch.tensor(value, dtype=torch.float64) for kind, value in values.items()}
    schedule.load_state_dict(
        {
            **schedule.state_dict(),
            "error": q["error"],
            "gradient": q["gradient"] ** 2,
        }
    )
    wq = weighting(torch.tensor([-2.0, 2.0])) * q[importance]
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    moments = wq[0] ** 2 / p + wq[1] ** 2 / (1 - p)
    chosen = schedule.probabilities()
    own = (wq**2 / chosen).sum()
    assert float(own) == pytest.approx(float(wq.sum() ** 2), rel=1e-9)
    assert float(own) <= float(moments.min())
    assert float(chosen[0]) == pytest.approx(float(p[moments.argmin()]), abs=0.001)


def test_each_importance_is_the_best_by_its_own_measure() -> None:
    """Smooth curves, 100 bins: the quadrature of (w f)^2/p is within 1.5% of its least, and above it for the others."""
    weighting = EpsCosine()
    x = torch.linspace(LO, HI, 100001, dtype=torch.float64)
    x, dx = 0.5 * (x[1:] + x[:-1]), (HI - LO) / 100000

    def curves(at: Tensor) -> dict[str, Tensor]:
        m = torch.sigmoid(at)
        return {"error": m, "gradient": m * torch.sigmoid(at + 1)}

    schedules = {}
    for kind in ("error", "gradient"):
        schedules[kind] = Adaptive((LO, HI), weighting, importance=kind)  # type: ignore[arg-type]
        at = torch.linspace(LO + 0.1, HI - 0.1, 100, dtype=torch.float64)
        q = curves(at)
        state = {"error": q["error"], "gradient": q["gradient"] ** 2}
        schedules[kind].load_state_dict({**schedules[kind].state_dict(), **state})
    for measure in ("error", "gradient"):
        f = weighting(x) * curves(x)[measure]
        least = float(f.sum() * dx) ** 2
        excess = {k: float((f**2 / s.log_density(x).exp()).sum() * dx) / least for k, s in schedules.items()}
        assert min(excess, key=excess.__getitem__) == measure
        assert 1 <= excess[measure] < 1.015


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e12])
def test_the_unit_of_gradients_is_nobodys_business(unit: float) -> None:
    """Half the range is never visited: its start keeps its place beside the other half, whatever the unit."""
    at = torch.linspace(0.05, 9.95, 100, dtype=torch.float64)
    reference, scaled = (Adaptive((LO, HI), ELBO(), importance="gradient") for _ in range(2))
    g = 3 * torch.sigmoid(at) ** 2 * (1 + 0.2 * torch.cos(at))
    for each, factor in ((reference, 1.0), (scaled, unit)):
        for _ in range(3):
            each.update(at, torch.sigmoid(at), factor * g)
    torch.testing.assert_close(scaled.probabilities(), reference.probabilities(), rtol=1e-9, atol=0)
    # At the seam, 3 c^2 learned on one side meets c^2 in the batch's unit on the other.
    p = reference.probabilities()
    assert 0.8 < float(p[49] / p[50]) < 1.2


def test_true_norms_mend_the_proxy() -> None:
    """proxy = G/r(lambda): with true norms from a few draws, p returns to w sqrt(G); a constant r changes nothing."""
    at = torch.linspace(LO + 0.1, HI - 0.1, 100, dtype=torch.float64)

    def r(x: Tensor) -> Tensor:
        return torch.exp(0.3 * x)

    best, proxied, constant = (Adaptive((LO, HI), Sigmoid(2.0), importance="gradient") for _ in range(3))
    g = torch.sigmoid(at) ** 2
    for each, seen in ((best, g), (proxied, g / r(at)), (constant, g)):
        for _ in range(200):
            each.update(at, torch.sigmoid(at), seen)
    wrong = 0.5 * float((proxied.probabilities() - best.probabilities()).abs().sum())
    generator = rng(4)
    for _ in range(25):
        x = Linear(LO, HI).sample(8, generator=generator)
        scatter = torch.exp(0.4 * torch.randn(8, generator=generator, dtype=torch.float64))
        proxied.correct(x, torch.sigmoid(x) ** 2 * scatter, torch.sigmoid(x) ** 2 / r(x) * scatter)
        constant.correct(x, 5 * torch.sigmoid(x) ** 2, torch.sigmoid(x) ** 2)
    mended = 0.5 * float((proxied.probabilities() - best.probabilities()).abs().sum())
    assert wrong > 0.1
    assert mended < 0.03
    torch.testing.assert_close(constant.probabilities(), best.probabilities(), rtol=1e-9, atol=0)


# The spread of draws


def test_the_spread_of_a_gaussian_model_is_the_sheets() -> None:
    """E = r chi^2_D, r = sigmoid(lambda): between = V, within = (1 + V) 2/D, averaged over windows of 400 draws.

    V of Sigmoid(2) and of EpsCosine under fixed densities as in test_adaptive.py; iid draws, 4 standard errors.
    """
    D, windows = 8, 400
    cases: list[tuple[Weighting, Schedule, float]] = [
        (Sigmoid(2.0), Cosine(), 0.32893),
        (Sigmoid(2.0), EDMTraining(), 0.40489),
        (EpsCosine(), FlowUniform(), 0.4899),
    ]
    for weighting, base, V in cases:
        schedule, generator, read = base.truncate(LO, HI), rng(3), []
        for _ in range(windows):
            meter = SpreadMeter((LO, HI), 60)
            x = schedule.sample(400, generator=generator, method="iid")
            error = torch.sigmoid(x) * torch.randn(400, D, generator=generator).square().sum(1)
            meter.add(x, 0.5 * (weighting.log(x) - schedule.log_density(x)).exp() * error)
            spread = meter.read()
            assert spread is not None
            read.append((spread.between, spread.within))
        found = torch.tensor(read, dtype=torch.float64)
        # Division by the window's own squared mean costs a relative 1/400 times the variance, far below the error.
        error_bar = 4 * found.std(0) / math.sqrt(windows)
        expected = torch.tensor([V, (1 + V) * 2 / D], dtype=torch.float64)
        assert ((found.mean(0) - expected).abs() < error_bar + 0.01 * expected).all(), (found.mean(0), expected)


def test_the_spread_of_exact_numbers() -> None:
    """Two bins: losses 1, 3 | 5, 5, gradient norms 4, 4 | 16, 0."""
    meter = SpreadMeter((0.0, 2.0), 2)
    meter.add(torch.tensor([0.5, 1.5, 0.1]), torch.tensor([1.0, 5.0, 3.0]), torch.tensor([4.0, 16.0, 4.0]))
    meter.add(torch.tensor([1.2]), torch.tensor([5.0]), torch.tensor([0.0]))
    spread = meter.read()
    # Mean 3.5; bins' variances 2 and 0; sum n_b (mean_b - 3.5)^2 = 9, of which 2 (1 - 2/4) is scatter.
    assert isinstance(spread, Spread)
    assert spread.between == pytest.approx((9 - 1) / 4 / 3.5**2)
    assert spread.within == pytest.approx(1.0 / 3.5**2)
    assert spread.gradient_excess == pytest.approx((24 / 4) / ((2 * 2 + 2 * math.sqrt(8)) / 4) ** 2)
    halves = SpreadMeter((0.0, 2.0), 2)
    halves.sums.copy_(meter.sums / 2)
    again = halves.read(world=2)
    assert again is not None
    assert again.between == pytest.approx(spread.between)
    assert SpreadMeter((0.0, 2.0), 2).read() is None


def test_far_from_true_norms_the_ratio_overall_mends() -> None:
    """True norms at two levels alone, 2 and 8 times the proxy: each rules its surroundings, and their mean the rest."""
    schedule = Adaptive((LO, HI), ELBO(), importance="gradient")
    before, at = schedule.tracked(), torch.tensor([2, 20])
    proxy = schedule.state_dict()["gradient"][at]
    width = (HI - LO) / 100
    schedule.correct(LO + (at + 0.5) * width, torch.tensor([2.0, 8.0]) * proxy, proxy)
    squared = (schedule.tracked() / before).square()
    torch.testing.assert_close(squared[at], torch.tensor([2.0, 8.0], dtype=torch.float64), rtol=0.01, atol=0)
    torch.testing.assert_close(squared[60:], torch.full((40,), 5.0, dtype=torch.float64), rtol=0.01, atol=0)


def test_true_norms_of_long_ago_are_forgotten():
    """`correct` keeps decay^k of what was known before k new samples: the last ratio is the one that counts."""
    schedule = Adaptive((-4.0, 4.0), ELBO(), importance="gradient", bins=2, decay=0.5)
    before, levels = schedule.tracked(), torch.linspace(-3.9, 3.9, 30, dtype=torch.float64)
    ones = torch.ones_like(levels)
    schedule.correct(levels, 9 * ones, ones)
    assert torch.allclose(schedule.tracked() / before, torch.full_like(before, 3.0), rtol=1e-9)
    schedule.correct(levels, ones, ones)
    assert torch.allclose(schedule.tracked() / before, torch.ones_like(before), rtol=1e-6)
