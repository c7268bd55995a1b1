"""Each preset against its paper's own formulation, written out as the paper's code would do it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser
from logsnr.objectives import objectives
from logsnr.predictions import EDM, X0, Eps, Flow, Prediction, Score, V
from logsnr.timesteps import TimestepTable


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


D, B = 16, 256


class Net(nn.Module):
    """A small random network of (state, label)."""

    def __init__(self, label_scale: float, seed: int = 0) -> None:
        super().__init__()
        generator = rng(seed)
        self.label_scale = label_scale
        self.inner = nn.Parameter(torch.randn(D + 1, 32, generator=generator) / 4)
        self.outer = nn.Parameter(torch.randn(32, D, generator=generator) / 4)

    def forward(self, state: Tensor, label: Tensor) -> Tensor:
        label = label.reshape(-1, 1) * self.label_scale
        return torch.tanh(torch.cat([state, label], 1) @ self.inner) @ self.outer


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise, and the uniform draw that each paper turns into its own noise level, both ends included."""
    x, eps = 0.5 * normal(B, D, seed=1), normal(B, D, seed=2)
    u = torch.rand(B, generator=rng(3), dtype=torch.float64)
    u[:4] = torch.tensor([1e-7, 1e-4, 1 - 1e-4, 1 - 1e-7], dtype=torch.float64)
    return x, eps, u


def call(net: Net, state: Tensor, label: Tensor) -> Tensor:
    """The network runs in float32; the papers' formulas around it are formed in float64.

    EDM's (x - c_skip y)/c_out loses 3e-4 of its value at log-SNR 20 in float32, and eps_hat - eps through v at -20 as
    much: the rounding of the textbook, not of the preset, would be what is compared.
    """
    return net(state.float(), label.float()).double()


Original = tuple[Prediction, float, Tensor, Tensor]
"""Prediction and label scale of the preset's network, log-SNRs, and the paper's loss per sample."""


def ddpm() -> Original:
    """2006.11239, algorithm 1: integer timesteps, mean squared error of eps."""
    x, eps, u = batch()
    betas = torch.linspace(1e-4, 0.02, 1000)
    abar = torch.cumprod(1 - betas, 0).double()
    t = (u * 1000).long()
    a = abar[t][:, None]
    state = a.sqrt() * x + (1 - a).sqrt() * eps
    loss = ((eps - call(Net(1e-3), state, t)) ** 2).mean(1)
    return Eps(label=TimestepTable.ddpm()), 1e-3, (abar[t] / (1 - abar[t])).log(), loss


def cosine_time(u: Tensor) -> tuple[Tensor, Tensor, float]:
    """Cosine time cut to log-SNR [-20, 20], its log-SNR, and the time kept."""
    t0 = 2 / math.pi * math.atan(math.exp(-10))
    t = t0 + (1 - 2 * t0) * u
    return t, -2 * torch.tan(math.pi * t / 2).log(), 1 - 2 * t0


def iddpm() -> Original:
    """2102.09672: alpha = cos(pi t/2), mean squared error of eps."""
    x, eps, u = batch()
    t, logsnr, _ = cosine_time(u)
    state = torch.cos(math.pi * t / 2)[:, None] * x + torch.sin(math.pi * t / 2)[:, None] * eps
    return Eps(), 0.05, logsnr, ((eps - call(Net(0.05), state, logsnr)) ** 2).mean(1)


def v_cosine() -> Original:
    """2202.00512, app. D: ||v - v_hat||^2 with v = alpha eps - sigma x."""
    x, eps, u = batch()
    t, logsnr, _ = cosine_time(u)
    a, s = torch.cos(math.pi * t / 2)[:, None], torch.sin(math.pi * t / 2)[:, None]
    return V(), 0.05, logsnr, ((a * eps - s * x - call(Net(0.05), a * x + s * eps, logsnr)) ** 2).sum(1)


def flow() -> Original:
    """2209.03003: ||(eps - x) - u||^2 on the straight path, t uniform."""
    x, eps, u = batch()
    t = (1e-4 + (1 - 2e-4) * u)[:, None]
    out = call(Net(1e-3), (1 - t) * x + t * eps, 1000 * t)
    return Flow(), 1e-3, (2 * ((1 - t) / t).log())[:, 0], ((eps.double() - x - out) ** 2).sum(1)


def edm() -> Original:
    """2206.00364, table 1: weight (sigma^2 + sd^2)/(sigma sd)^2 on ||D(y; sigma) - x||^2, ln sigma ~ N(-1.2, 1.2^2)."""
    x, n, u = batch()
    sd = 0.5
    sigma = (-1.2 + 1.2 * torch.special.ndtri(u))[:, None].exp()
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    y = x + sigma * n
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
    c_in, c_noise = 1 / (sd**2 + sigma**2).sqrt(), sigma.log() / 4
    denoised = c_skip * y + c_out * call(Net(1.0), c_in * y, c_noise)
    return EDM(), 1.0, -2 * sigma[:, 0].log(), (weight * (denoised - x) ** 2).sum(1)


def vdm() -> Original:
    """2107.00630: 1/2 gamma'(t) ||eps - eps_hat||^2, gamma linear from -13.3 to 5."""
    x, eps, t = batch()
    gamma = -13.3 + (5 + 13.3) * t
    var = torch.sigmoid(gamma)[:, None]
    out = call(Net(0.05), (1 - var).sqrt() * x + var.sqrt() * eps, -gamma)
    return Eps(), 0.05, -gamma, 0.5 * (5 + 13.3) * ((eps - out) ** 2).sum(1)


def vdm_plus(w: Callable[[Tensor], Tensor]) -> Original:
    """2303.00848, eq. 3.1: 1/2 w(lambda_t) (-dlambda/dt) ||eps_hat - eps||^2, a v network, cosine time."""
    x, eps, u = batch()
    t, logsnr, kept = cosine_time(u)
    a, s = torch.cos(math.pi * t / 2)[:, None], torch.sin(math.pi * t / 2)[:, None]
    z = a * x + s * eps
    eps_hat = s * z + a * call(Net(0.05), z, logsnr)
    slope = kept * 2 * math.pi / torch.sin(math.pi * t)
    return V(), 0.05, logsnr, 0.5 * w(logsnr) * slope * ((eps_hat - eps) ** 2).sum(1)


def vdm_sigmoid() -> Original:
    return vdm_plus(lambda x: torch.sigmoid(2 - x))


def vdm_edm_monotonic() -> Original:
    def w(x: Tensor) -> Tensor:
        x = x.clamp(min=-3.30777747)  # the peak, found by Newton's method on w'
        return torch.exp(-0.5 * ((x - 2.4) / 2.4) ** 2) / (2.4 * math.sqrt(2 * math.pi)) * (torch.exp(-x) + 0.25)

    return vdm_plus(w)


def sd3() -> Original:
    """2403.03206: ||(eps - x) - u||^2 with logit t ~ N(0, 1)."""
    x, eps, u = batch()
    t = torch.sigmoid(torch.special.ndtri(u))[:, None]
    out = call(Net(1e-3), (1 - t) * x + t * eps, 1000 * t)
    return Flow(), 1e-3, (2 * ((1 - t) / t).log())[:, 0], ((eps.double() - x - out) ** 2).sum(1)


def min_snr_5() -> Original:
    """2303.09556: min(SNR, 5)/(SNR + 1) on the squared error of v."""
    x, eps, u = batch()
    t, logsnr, _ = cosine_time(u)
    a, s = torch.cos(math.pi * t / 2)[:, None], torch.sin(math.pi * t / 2)[:, None]
    snr = (a / s)[:, 0] ** 2
    error = (a * eps - s * x - call(Net(0.05), a * x + s * eps, logsnr)) ** 2
    return V(), 0.05, logsnr, snr.clamp(max=5) / (snr + 1) * error.sum(1)


def ncsn() -> Original:
    """2011.13456, table 1 and eq. 7: sigma geometric in t, sigma^2 ||score + noise/sigma||^2 at x + sigma noise."""
    x, noise, t = batch()
    sigma = (50 * (0.01 / 50) ** (1 - t))[:, None]
    score = call(Net(0.05), x + sigma * noise, -2 * sigma[:, 0].log())
    return Score(path="ve"), 0.05, -2 * sigma[:, 0].log(), (sigma**2 * (score + noise / sigma) ** 2).sum(1)


def vp_sde() -> Original:
    """2011.13456, eq. 33: beta from .1 to 20, eps-MSE; times from 1e-5, here to log-SNR -10."""
    x, eps, u = batch()
    t = 1e-5 + (0.99 - 1e-5) * u
    mean = (-0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1)[:, None]
    std = (1 - (2 * mean).exp()).sqrt()
    logsnr = 2 * (mean - std.log())[:, 0]
    return Eps(), 0.05, logsnr, ((eps - call(Net(0.05), mean.exp() * x + std * eps, logsnr)) ** 2).mean(1)


def p2() -> Original:
    """2204.00227, eq. 8 with gamma = k = 1: eps-MSE over 1 + SNR."""
    x, eps, u = batch()
    t, logsnr, _ = cosine_time(u)
    a, s = torch.cos(math.pi * t / 2)[:, None], torch.sin(math.pi * t / 2)[:, None]
    error = (eps - call(Net(0.05), a * x + s * eps, logsnr)) ** 2
    return Eps(), 0.05, logsnr, (error / (1 + (a / s) ** 2)).mean(1)


def indi() -> Original:
    """2303.11435, eq. 4: ||x - x_hat||^2 on the straight path from x to noise, t uniform."""
    x, eps, u = batch()
    t = (1e-4 + (1 - 2e-4) * u)[:, None]
    out = call(Net(1e-3), (1 - t) * x + t * eps, 1000 * t)
    return X0(path="flow", label="flow"), 1e-3, (2 * ((1 - t) / t).log())[:, 0], ((x.double() - out) ** 2).sum(1)


def edm2() -> Original:
    """2312.02696, loss of its code at the start (u = 0): EDM's with ln sigma ~ N(-.4, 1), sigma_data .5."""
    x, n, u = batch()
    sigma = (-0.4 + 1.0 * torch.special.ndtri(u))[:, None].exp()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    denoised = c_skip * (x + sigma * n) + c_out * call(
        Net(1.0), (x + sigma * n) / (0.25 + sigma**2).sqrt(), sigma.log() / 4
    )
    return EDM(), 1.0, -2 * sigma[:, 0].log(), (weight * (denoised - x) ** 2).sum(1)


COSINE_KEPT = 1 - 4 / math.pi * math.atan(math.exp(-10))
FLOW_KEPT = math.tanh(5)

ORIGINALS: dict[str, tuple[Callable[[], Original], float]] = {
    # ours / theirs: 1/2 for our half, times w/(p * their error ratio), times D where they take the mean.
    "ddpm": (ddpm, D / 2),
    "iddpm": (iddpm, D / 2 * 2 * math.pi * COSINE_KEPT),
    "v-cosine": (v_cosine, math.pi / 2 * COSINE_KEPT),
    "flow": (flow, FLOW_KEPT),
    "edm": (edm, 1 / 8),
    "vdm": (vdm, 1.0),
    "vdm++/sigmoid": (vdm_sigmoid, 1.0),
    "vdm++/edm-monotonic": (vdm_edm_monotonic, 1.0),
    "sd3": (sd3, 1 / 2),
    "min-snr-5": (min_snr_5, math.pi * COSINE_KEPT),
    "ncsn": (ncsn, math.log(50 / 0.01)),
    "vp-sde": (vp_sde, D / 2),
    "p2": (p2, D / 2 * 2 * math.pi * COSINE_KEPT),
    "indi": (indi, 4 * FLOW_KEPT),
    "edm2": (edm2, 1 / 8),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_preset_is_the_published_loss(name: str) -> None:
    """On the same network, data, noise and levels, preset / original is one constant."""
    original, constant = ORIGINALS[name]
    prediction, label_scale, logsnr, published = original()
    model = NetworkDenoiser(Net(label_scale), prediction, shape=(D,))
    x, eps, _ = batch()
    out = objectives[name].loss_at(model, x, eps, logsnr)
    assert out.loss.dtype == torch.float32
    ratio = (out.loss.double() / published).detach()
    assert float((ratio / constant - 1).abs().max()) < 1e-6


def test_every_preset_is_tested() -> None:
    assert set(ORIGINALS) == set(objectives)
