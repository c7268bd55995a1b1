"""Predictions: the table of rows, its identities and its numerics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser, noisy
from logsnr.noise import PATHS, alpha_s, path_scale, sigma_from_logsnr
from logsnr.predictions import EDM, PREDICTIONS, X0, Eps, Flow, Prediction, Score, V

EVERY: dict[str, Prediction] = {
    **{f"{kind.name}-{path}": kind(path=path) for kind in (Eps, X0, V, Flow, Score) for path in PATHS},
    "flow-reversed": Flow(reverse=True),
    "edm": EDM(),
    "edm-2": EDM(sigma_data=2.0),
}
every_prediction = pytest.mark.parametrize("prediction", EVERY.values(), ids=EVERY.keys())
LOGSNR = torch.linspace(-9, 9, 37, dtype=torch.float64)


def data(n: int, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, dim, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


def levels() -> tuple[Tensor, Tensor, Tensor]:
    sigma = sigma_from_logsnr(LOGSNR)
    alpha, s = alpha_s(sigma)
    return sigma[:, None], alpha[:, None], s[:, None]


@every_prediction
def test_round_trip_through_the_target(prediction: Prediction) -> None:
    x, eps = data(len(LOGSNR))
    _, alpha, s = levels()
    z = alpha * x + s * eps
    t_x, t_e = prediction.target_row(alpha, s)
    F = t_x * x + t_e * eps
    (a_z, a_F), (b_z, b_F) = prediction.x0_row(alpha, s), prediction.eps_row(alpha, s)
    torch.testing.assert_close(a_z * z + a_F * F, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(b_z * z + b_F * F, eps, rtol=0, atol=1e-12)


@every_prediction
def test_host_floats_and_tensors_give_the_same_rows(prediction: Prediction) -> None:
    for logsnr in (-20.0, -3.0, 0.0, 7.0, 20.0):
        sigma = sigma_from_logsnr(logsnr)
        host, tensor = alpha_s(sigma), alpha_s(torch.tensor(sigma, dtype=torch.float64))
        for row in ("x0_row", "eps_row", "target_row"):
            expected = [float(v) for v in getattr(prediction, row)(*tensor)]
            assert list(getattr(prediction, row)(*host)) == pytest.approx(expected, rel=1e-13, abs=0)


@every_prediction
def test_rows_are_one_linear_map(prediction: Prediction) -> None:
    """x0 and eps recompose z for any F: alpha a + s b = (1, 0)."""
    _, alpha, s = levels()
    (a_z, a_F), (b_z, b_F) = prediction.x0_row(alpha, s), prediction.eps_row(alpha, s)
    torch.testing.assert_close(alpha * a_z + s * b_z, torch.ones_like(alpha), rtol=0, atol=1e-13)
    torch.testing.assert_close(alpha * a_F + s * b_F, torch.zeros_like(alpha), rtol=0, atol=1e-12)


def ratio(prediction: Prediction, logsnr: Tensor) -> Tensor:
    """Squared error of the output over E, written out as in the literature."""
    sigma2 = torch.exp(-logsnr)
    if isinstance(prediction, X0):
        return sigma2
    if isinstance(prediction, V):
        return 1 + sigma2
    if isinstance(prediction, Flow):
        return (1 + torch.exp(-logsnr / 2)) ** 2
    if isinstance(prediction, EDM):
        return sigma2 / prediction.sigma_data**2 + 1
    if isinstance(prediction, Score):
        noise = {
            "vp": torch.sigmoid(-logsnr),
            "ve": sigma2,
            "flow": torch.sigmoid(-logsnr / 2) ** 2,  # the noise amplitude is t itself
        }
        return 1 / noise[prediction.path]
    return torch.ones_like(logsnr)


@every_prediction
def test_error_ratios(prediction: Prediction) -> None:
    alpha, s = alpha_s(sigma_from_logsnr(LOGSNR))
    b_F = prediction.eps_row(alpha, s)[1]
    torch.testing.assert_close(b_F**-2, ratio(prediction, LOGSNR), rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_score_is_the_gradient_of_the_log_density_of_its_state(path: str) -> None:
    """For data N(0, d^2): score(k z) = -k z / var(k z)."""
    d2 = 1.7
    z = data(len(LOGSNR))[0]
    _, alpha, s = levels()
    k = path_scale(path, alpha, s)  # type: ignore[arg-type]
    var = alpha**2 * d2 + s**2
    score = -k * z / (k**2 * var)
    b_z, b_F = Score(path=path).eps_row(alpha, s)  # type: ignore[arg-type]
    torch.testing.assert_close(b_z * z + b_F * score, s * z / var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [0.5, 1.0, 3.0])
def test_edm_is_minus_v_of_scaled_data(d: float) -> None:
    """F = -v at lambda + 2 ln d on x/d: same input, same target, same error."""
    alpha, s = alpha_s(sigma_from_logsnr(LOGSNR))
    alpha_d, s_d = alpha_s(sigma_from_logsnr(LOGSNR + 2 * math.log(d)))
    edm, v = EDM(sigma_data=d), V()
    t_x, t_e = edm.target_row(alpha, s)
    v_x, v_e = v.target_row(alpha_d, s_d)
    torch.testing.assert_close(t_x, -v_x / d, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(t_e, -v_e, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(edm.c_in(alpha, s) * alpha, alpha_d / d, rtol=1e-13, atol=0)
    torch.testing.assert_close(edm.c_in(alpha, s) * s, s_d, rtol=1e-13, atol=0)
    torch.testing.assert_close(edm.eps_row(alpha, s)[1], -v.eps_row(alpha_d, s_d)[1], rtol=1e-13, atol=0)


def test_edm_rows_are_the_papers() -> None:
    """c_skip, c_out, c_in, c_noise of 2206.00364, table 1, for y = z / alpha."""
    sigma, alpha, s = levels()
    d, norm = 0.5, (sigma**2 + 0.25).sqrt()
    a_z, a_F = EDM().x0_row(alpha, s)
    torch.testing.assert_close(a_z, d**2 / norm**2 / alpha, rtol=1e-13, atol=0)
    torch.testing.assert_close(a_F, sigma * d / norm, rtol=1e-13, atol=0)
    torch.testing.assert_close(EDM().c_in(alpha, s), 1 / norm / alpha, rtol=1e-13, atol=0)
    torch.testing.assert_close(EDM().timestep(sigma), sigma.log() / 4, rtol=1e-13, atol=1e-16)


@every_prediction
def test_network_input_is_the_state_of_its_path(prediction: Prediction) -> None:
    sigma, alpha, s = levels()
    if isinstance(prediction, EDM):
        return
    expected = {"vp": torch.ones_like(s), "ve": 1 / alpha, "flow": (1 + sigma) ** -1 / alpha}
    torch.testing.assert_close(prediction.c_in(alpha, s), expected[prediction.path], rtol=1e-13, atol=0)  # type: ignore[attr-defined]


class Constant(nn.Module):
    """A network whose output does not depend on its input: all that is left is the arithmetic around it."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.out.to(z.dtype)


def relative_errors(prediction: Prediction, logsnr: float) -> tuple[float, float]:
    """Worst relative float32 error of E, through F-targets and through Estimate.eps."""
    x, eps = (v.float() for v in data(32, 64))
    out = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    model = NetworkDenoiser(Constant(out), prediction, shape=(64,), trained_range=(0, math.inf))
    level = torch.full((32,), sigma_from_logsnr(logsnr))
    exact = model.eps_error(x.double(), eps.double(), level.double())
    through_targets = model.eps_error(x, eps, level)
    through_eps = (model(noisy(x, eps, level), level).eps - eps).square().sum(1)
    return tuple(float(((v.double() - exact) / exact).abs().max()) for v in (through_targets, through_eps))  # type: ignore[return-value]


@pytest.mark.parametrize("logsnr", [-20.0, -15.0, -5.0, 0.0, 5.0, 15.0, 20.0])
@pytest.mark.parametrize("prediction", [V(), Flow(), EDM(), Eps(), X0()], ids=lambda p: p.name)
def test_loss_through_targets_keeps_float32_accuracy(prediction: Prediction, logsnr: float) -> None:
    through_targets, _ = relative_errors(prediction, logsnr)
    assert through_targets < 1e-6  # the sheet asks for 1e-5


@pytest.mark.parametrize("prediction", [V(), Flow(), EDM(), X0()], ids=lambda p: p.name)
def test_loss_through_eps_would_not(prediction: Prediction) -> None:
    """Why `eps_error` exists: eps_hat - eps cancels at high noise, 1e-4 at log-SNR -15 and 1e-3 at -20."""
    assert 1e-5 < relative_errors(prediction, -15.0)[1] < 1e-3
    assert 1e-4 < relative_errors(prediction, -20.0)[1] < 1e-2


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="label 'time'"):
        Eps(label="time")
    with pytest.raises(ValueError, match="path 'vpp'"):
        V(path="vpp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sigma_data = -1"):
        EDM(sigma_data=-1)
    assert set(PREDICTIONS) == {"eps", "x0", "v", "flow", "edm", "score"}
