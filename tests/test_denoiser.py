"""Network denoisers: precision, batching and the two ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser, noisy
from logsnr.exact import Gaussian
from logsnr.guidance import cfg
from logsnr.noise import alpha_s, covers, sigma_from_logsnr
from logsnr.predictions import EDM, X0, Eps, Flow, Prediction, Score, V
from logsnr.sampling.counted import Counted
from logsnr.sampling.grids import log_linear
from logsnr.sampling.solvers import ddpm, ge
from logsnr.timesteps import TimestepTable

PREDICTIONS = [Eps(), Eps(path="ve"), X0(), V(), Flow(), Flow(reverse=True), EDM(), Score(path="ve")]
every_prediction = pytest.mark.parametrize(
    "prediction", PREDICTIONS, ids=["eps", "eps-ve", "x0", "v", "flow", "flow-reversed", "edm", "score-ve"]
)
SHAPE = (2, 3, 3)


class Net(nn.Module):
    """A small random convolution that listens to its label, and remembers what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float64, label_scale: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(3)).to(dtype) / 4)
        self.label_scale = label_scale

    def forward(self, state: Tensor, label: Tensor) -> Tensor:
        self.seen = state, label
        gate = 1 + torch.tanh(label.to(state.dtype) * self.label_scale).reshape(-1, 1, 1, 1)
        return torch.tanh(nn.functional.conv2d(state, self.weight, padding=1)) * gate


def states(n: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, *SHAPE, generator=generator, dtype=torch.float64).to(dtype))  # type: ignore[return-value]


@every_prediction
def test_batched_levels_equal_looped_scalars(prediction: Prediction) -> None:
    model = NetworkDenoiser(Net(), prediction, shape=SHAPE)
    x, eps = states()
    sigma = sigma_from_logsnr(torch.tensor([-12.0, -3.0, 0.0, 4.0, 11.0], dtype=torch.float64))
    z = noisy(x, eps, sigma)
    together, errors = model(z, sigma), model.eps_error(x, eps, sigma)
    for i, level in enumerate(sigma.tolist()):
        alone = model(z[i : i + 1], level)
        torch.testing.assert_close(noisy(x[i : i + 1], eps[i : i + 1], level), z[i : i + 1], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(together.eps[i : i + 1], alone.eps, rtol=1e-11, atol=1e-12)
        error = model.eps_error(x[i : i + 1], eps[i : i + 1], level)
        torch.testing.assert_close(errors[i : i + 1], error, rtol=1e-11, atol=0)


@every_prediction
def test_estimates_recompose_the_state_and_give_the_error(prediction: Prediction) -> None:
    model = NetworkDenoiser(Net(), prediction, shape=SHAPE)
    x, eps = states()
    sigma = sigma_from_logsnr(torch.tensor([-6.0, -3.0, 0.0, 4.0, 6.0], dtype=torch.float64))
    z = noisy(x, eps, sigma)
    estimate = model(z, sigma)
    torch.testing.assert_close(noisy(estimate.x0, estimate.eps, sigma), z, rtol=0, atol=1e-12)
    direct = (estimate.eps - eps).flatten(1).square().sum(1)
    torch.testing.assert_close(model.eps_error(x, eps, sigma), direct, rtol=1e-10, atol=0)


def test_half_precision_network_keeps_float32_states() -> None:
    """Only the network's input and output are rounded: its label, z, x0, eps and the loss are not."""
    network = Net(torch.bfloat16)
    model = NetworkDenoiser(network, V(), shape=SHAPE)
    x, eps = states(dtype=torch.float32)
    sigma = torch.tensor([0.01, 0.3, 1.0, 5.0, 80.0])
    z = noisy(x, eps, sigma)
    estimate = model(z, sigma)
    state, label = network.seen
    assert (state.dtype, label.dtype) == (torch.bfloat16, torch.float32)
    out = network(z.bfloat16(), -2 * sigma.log()).float()
    alpha, s = (v[:, None, None, None] for v in alpha_s(sigma))
    assert estimate.x0.dtype == estimate.eps.dtype == torch.float32
    torch.testing.assert_close(estimate.x0, alpha * z - s * out, rtol=1e-6, atol=1e-6)
    error = model.eps_error(x, eps, sigma)
    assert error.dtype == torch.float32
    expected = alpha.flatten() ** 2 * (out - (alpha * eps - s * x)).flatten(1).square().sum(1)
    torch.testing.assert_close(error, expected, rtol=1e-5, atol=0)


def test_network_hears_its_own_label_and_scaling() -> None:
    network, table = Net(), TimestepTable.ddpm()
    z, _ = states()
    NetworkDenoiser(network, Eps(label=table), shape=SHAPE)(z, float(table.sigmas[321])).eps  # noqa: B018
    assert network.seen[1].tolist() == [321.0] * 5
    assert torch.equal(network.seen[0], z)
    NetworkDenoiser(network, EDM(), shape=SHAPE)(z, 2.0).eps  # noqa: B018
    assert network.seen[1].tolist() == pytest.approx([math.log(2.0) / 4] * 5)
    torch.testing.assert_close(network.seen[0], z * math.sqrt(5) / math.sqrt(4.25), rtol=1e-13, atol=0)


def test_objects_with_a_sample_are_answers_too() -> None:
    class Output:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, state: Tensor, label: Tensor) -> Output:
            return Output(self.inner(state, label))

    z, _ = states()
    plain, wrapped = (NetworkDenoiser(n, V(), shape=SHAPE)(z, 1.5).x0 for n in (Net(), Wrapped()))
    assert torch.equal(plain, wrapped)


def test_pure_noise_asks_what_some_networks_cannot_know() -> None:
    z, _ = states()
    for prediction in (Eps(label=TimestepTable.ddpm()), Score(label=TimestepTable.ddpm())):
        model = NetworkDenoiser(Net(), prediction, shape=SHAPE)
        assert not model.finite_at_inf
        with pytest.raises(ValueError, match=r"x0 of '(eps|score)' prediction is undefined at sigma = inf"):
            model(z, math.inf).x0  # noqa: B018
    with pytest.raises(ValueError, match="eps of 'x0' prediction is undefined at sigma = 0"):
        NetworkDenoiser(Net(), X0(label="flow"), shape=SHAPE)(z, 0.0).eps  # noqa: B018


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("prediction", [V(label="flow"), Flow(), EDM(label="flow")], ids=lambda p: p.name)
def test_v_flow_and_edm_answer_at_both_ends(prediction: Prediction, as_tensor: bool) -> None:
    """At sigma 0 x0 is z itself and eps a multiple of F; at inf eps is z itself and x0 a multiple of F."""
    network = Net()
    model = NetworkDenoiser(network, prediction, shape=SHAPE)
    z, _ = states()
    for sigma, exact, other in ((0.0, "x0", "eps"), (math.inf, "eps", "x0")):
        level = torch.full((len(z),), sigma, dtype=torch.float64) if as_tensor else sigma
        estimate = model(z, level)
        out = network(*network.seen)
        torch.testing.assert_close(getattr(estimate, exact), z, rtol=1e-14, atol=0)
        k = {
            ("v", "eps"): (0.0, 1.0),
            ("v", "x0"): (0.0, -1.0),
            ("flow", "eps"): (1.0, 1.0),
            ("flow", "x0"): (1.0, -1.0),
            ("edm", "eps"): (0.0, -1.0),
            ("edm", "x0"): (0.0, 0.5),
        }[prediction.name, other]
        torch.testing.assert_close(getattr(estimate, other), k[0] * z + k[1] * out, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("trained_range", [(1.0, 0.5), (-0.1, 3.0), (2.0, 2.0), (math.nan, 1.0)])
def test_bad_trained_range(trained_range: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="trained_range = "):
        NetworkDenoiser(Net(), V(), shape=SHAPE, trained_range=trained_range)


def test_covers_its_trained_range_with_one_percent_of_rounding() -> None:
    """157.4 against a nominal 157 is rounding, 2% is not; inf counts as 100, where less than 1% of z is signal."""
    denoiser = NetworkDenoiser(nn.Identity(), V(), shape=(2,), trained_range=(0.01, 157.0))
    assert denoiser.covers(0.0099, 157.4)
    assert not denoiser.covers(0.0098, 157)
    assert not denoiser.covers(0.01, 160)
    assert denoiser.covers(0.01, math.inf)
    assert not NetworkDenoiser(nn.Identity(), V(), shape=(2,), trained_range=(0.01, 98.0)).covers(0.01, math.inf)
    assert covers((0.01, 157.0), 0.01, 157.4)
    assert not covers((0.01, 157.0), 0.01, math.inf)


def test_one_line_says_what_a_denoiser_is() -> None:
    model = NetworkDenoiser(Net(), V(), shape=SHAPE, trained_range=(0.01, 157.0))
    assert repr(model) == "NetworkDenoiser(Net, v prediction, (2, 3, 3), sigma 0.01 ... 157)"
    model.card, model.plans = {"classes": 10}, {5: "plan"}
    line = "NetworkDenoiser(Net, v prediction, (2, 3, 3), 10 classes, sigma 0.01 ... 157)"
    assert repr(model) == line
    guided = cfg(model, 2.5, {"class_labels": 10}, interval=(0.1, 5.0))
    assert repr(guided) == f"Guided({line}, scale 2.5 for sigma in (0.1, 5])"
    assert guided.card == model.card
    assert guided.plans == model.plans
    assert repr(Counted(guided)) == f"Counted({guided!r})"
    assert repr(Gaussian(torch.zeros(2), torch.eye(2))) == "Gaussian((2,), sigma 0 ... inf)"
    assert repr(nn.ModuleList([model])).count("\n") == 2
    grid = log_linear(5, 80.0, 0.01)
    assert repr(ge(grid)) == "Plan(5 evaluations, ge, sigma 80 ... 0, basis eps)"
    assert repr(ddpm(grid)) == "Plan(5 evaluations, ddpm, sigma 80 ... 0, basis eps, noisy)"


def test_sampling_range_is_the_useful_part_of_the_trained_one() -> None:
    model = NetworkDenoiser(Net(), EDM(sigma_data=0.5), shape=SHAPE, trained_range=(1e-4, 1000.0))
    assert model.sigma_data == 0.5
    assert model.sampling_range == pytest.approx((0.002, 80.0))
    narrow = NetworkDenoiser(Net(), V(), shape=SHAPE, sigma_data=1.0, trained_range=(0.03, 14.6))
    assert narrow.sampling_range == (0.03, 14.6)
    assert model.dim == 18


@pytest.mark.parametrize("dim", [18, 768, 3072, 12_288, 196_608])
def test_sampling_begins_where_data_of_any_spectrum_are_lost_in_the_noise(dim: int) -> None:
    """KL of the noisiest states to pure noise, the mean's energy that of the variance: .0007 nats at any size."""
    side = round((dim / 3) ** 0.5)
    model = NetworkDenoiser(Net(), V(), shape=(dim,), sigma_data=0.5, trained_range=(0.0, math.inf))
    high = model.sampling_range[1]
    assert high == pytest.approx(0.5 * max(160, 26 * math.sqrt(dim)))

    def kl(variances: Tensor) -> float:
        scaled = (variances * (dim * 0.25 / variances.sum()) / high**2).double()
        return 0.5 * float(dim * 0.25 / high**2 + (scaled - scaled.log1p()).sum())

    frequency = torch.fft.fftfreq(side, 1 / side)
    square = (frequency[:, None] ** 2 + frequency**2).flatten()
    image = (1 / square[square > 0]).repeat(3)
    bound = dim * 0.25 / high**2
    bound -= 0.5 * math.log1p(bound)
    assert kl(torch.ones(1)) == pytest.approx(bound, rel=1e-5)  # all variance in one direction: the worst spectrum
    assert kl(torch.ones(dim)) < bound + 1e-9
    assert kl(image) < bound + 1e-9
    assert bound < 0.00075
