"""Ode: log-density under the probability flow, by the instantaneous change of variables (2011.13456, app. D.2).

In log-SNR l the flow of the canonical state and of its log-density are

    dz/dl = f(z, l) = 1/2 alpha s (s x0 - alpha eps),         d log p_l(z)/dl = -tr df/dz

For Gaussian data of variance L, f = 1/2 alpha^2 s^2 (L - 1)/(alpha^2 L + s^2) z: the rate is bounded at every level
(by 1/2 for L <= 1) and changes over O(1) of l whatever L is, so that the steps of an adaptive solver follow the model
and never the coordinate (in sigma, d log z/d sigma grows like 1/sigma).

The flow is followed from the clean end hi to the noisy end lo, where z ~ N(0, I).  It gives the density of the noisy
state at hi: of y = z/alpha = x + sigma eps in the units of x.  Grey levels v have no density, so they are dequantised,
and what comes out is a bound again:

    "gaussian"   -log P(v) <= E_q[ -log p(z) - log P(v | z) + log q(z | x) ],  the noise of level hi and the softmax
                 over grey levels of the variational bound, so that both are about the same model on the same range
    "uniform"    -log P(v) <= E_u[ -log p(y = x + u) ] - D ln spacing,  u uniform on the cell
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.devices import on
from logsnr.errors import require
from logsnr.likelihood.terms import (
    check_levels,
    codec_of,
    default_logsnr_range,
    expected_reconstruction_nats,
    prior_nats,
    warn_if_short,
)
from logsnr.noise import alpha_s, sigma_from_logsnr
from logsnr.pixels import Pixels
from logsnr.sampling.batches import chunks

Trace = Literal["hutchinson", "exact"]


@dataclass(frozen=True, kw_only=True)
class OdeLogLikelihood:
    """Log-densities under the probability flow.

    Attributes:
        log_density: `[N]` nats, of x at the noise level of the clean end, in the units of x.
        stderr: standard error of their mean over the probes of the trace; 0 for the exact trace, nan for one probe.
        logsnr_range: (lo, hi).
        evaluations: network evaluations per sample (each with its backward passes).
    """

    log_density: Tensor
    stderr: float
    logsnr_range: tuple[float, float]
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class OdeBitsPerDim:
    """Bits per dimension of dequantised images under the probability flow, a bound through dequantisation alone.

    Attributes:
        bits_per_dim: mean over the images.
        stderr: its standard error over dequantisation and probes, the images held fixed.
        data_stderr: the standard error that the choice of images adds.
        per_image: `[N]`.
        dequantise: "gaussian" or "uniform".
        logsnr_range: (lo, hi).
        evaluations: network evaluations spent, over all images.
    """

    bits_per_dim: float
    stderr: float
    data_stderr: float
    per_image: Tensor
    dequantise: str
    logsnr_range: tuple[float, float]
    evaluations: int

    def __str__(self) -> str:
        lo, hi = self.logsnr_range
        return (
            f"{self.bits_per_dim:.4f} +- {self.stderr:.4f} bits/dim by the probability flow on log-SNR "
            f"[{lo:.2f}, {hi:.2f}], {self.dequantise} dequantisation"
        )


def ode_log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    *,
    logsnr_range: tuple[float, float],
    cond: dict[str, Tensor] | None = None,
    trace: Trace = "hutchinson",
    probes: int = 1,
    generator: torch.Generator | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    chunk: int = 256,
) -> OdeLogLikelihood:
    """Log-density of real-valued samples, at the noise level of the clean end of the range.

    States are float64 whatever the network computes in.  The solver (Dormand-Prince 5) controls the error of a whole
    chunk at once, so results move by about the tolerance with `chunk`.

    Args:
        denoiser: the model.
        x: samples `[N, *shape]` in the denoiser's units; images are dequantised first (`ode_bits_per_dim`).
        logsnr_range: (lo, hi): density at hi, N(0, I) at lo.
        cond: conditions with one entry per sample.
        trace: "hutchinson" with random signs, unbiased for the log-density; or "exact", D backward passes.
        probes: sign vectors per sample, fixed along the path.
        generator: source of the probes; not needed for the exact trace.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        chunk: samples per solve.

    Raises:
        ValueError: if an argument does not fit.
        LogsnrError: if torchdiffeq is not installed.
    """
    if tuple(x.shape[1:]) != denoiser.shape or len(x) == 0 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: give at least one sample of shape {denoiser.shape}, as floats "
            "(grey levels go to ode_bits_per_dim)"
        )
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"trace = {trace!r}: give 'hutchinson' or 'exact'")
    if trace == "hutchinson" and (probes < 1 or generator is None):
        raise ValueError(f"probes = {probes}, generator = {generator}: Hutchinson's trace needs both, probes >= 1")
    lo, hi = logsnr_range
    check_levels(denoiser, lo, hi, stacklevel=4)
    x, cond = on(x, denoiser.device), on(cond or {}, denoiser.device)
    alpha = alpha_s(sigma_from_logsnr(hi))[0]
    parts, spent = [], 0
    for part, conditions in chunks(len(x), chunk, cond):
        z = alpha * x[part].double()
        signs = _signs(z, probes, generator) if trace == "hutchinson" and generator is not None else None
        densities, evaluations = _solve(denoiser, z, signs, conditions, lo, hi, rtol, atol)
        parts.append(densities + denoiser.dim * math.log(alpha))
        spent += evaluations * len(z)
    per_probe = torch.cat(parts)
    stderr = 0.0
    if trace == "hutchinson":
        stderr = float((per_probe.var(1) / per_probe.shape[1]).sum().sqrt() / len(x)) if probes > 1 else math.nan
    return OdeLogLikelihood(
        log_density=per_probe.mean(1), stderr=stderr, logsnr_range=(lo, hi), evaluations=round(spent / len(x))
    )


def ode_bits_per_dim(
    denoiser: Denoiser,
    images: Tensor,
    *,
    pixels: Pixels | None = None,
    logsnr_range: tuple[float, float] | None = None,
    cond: dict[str, Tensor] | None = None,
    dequantise: Literal["gaussian", "uniform"] = "gaussian",
    draws: int = 2,
    generator: torch.Generator,
    trace: Trace = "hutchinson",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    chunk: int = 256,
) -> OdeBitsPerDim:
    """Bits per dimension of stored images by the probability flow.

    Args:
        denoiser: the model; its codec says how many grey levels there are.
        images: grey levels uint8 `[N, *shape]`.
        pixels: the codec of a denoiser without one.
        logsnr_range: (lo, hi); `default_logsnr_range(codec)` if None.
        cond: conditions with one entry per image.
        dequantise: as in the module's docstring.
        draws: independent dequantisations (and probes) per image, at least 2: their spread is the standard error.
        generator: source of every draw.
        trace: as for `ode_log_likelihood`, one probe per draw.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        chunk: images per solve.

    Raises:
        ValueError: if an argument does not fit.
        LogsnrError: if torchdiffeq is not installed.
    """
    if dequantise not in ("gaussian", "uniform"):
        raise ValueError(f"dequantise = {dequantise!r}: give 'gaussian' or 'uniform'")
    if draws < 2:
        raise ValueError(f"draws = {draws}: give at least 2, their spread is the standard error")
    codec = codec_of(denoiser, pixels)
    lo, hi = logsnr_range or default_logsnr_range(codec)
    images = on(images, denoiser.device)
    x = codec.encode(images).double()
    n, dim = len(x), denoiser.dim
    if n and -math.inf < lo < hi < math.inf:
        # What the ends cost the variational bound; uniform noise on a cell has no softmax to lose by.
        unit = 1 / (dim * math.log(2))
        clean = expected_reconstruction_nats(images, codec, hi).mean() if dequantise == "gaussian" else 0.0
        warn_if_short(lo, hi, float(prior_nats(x, lo).mean()) * unit, float(clean) * unit, codec)
    nats, spent = [], 0
    for _ in range(draws):
        y, offset = _dequantised(x, codec, hi, dequantise, generator)
        result = ode_log_likelihood(
            denoiser,
            y,
            logsnr_range=(lo, hi),
            cond=cond,
            trace=trace,
            generator=generator,
            rtol=rtol,
            atol=atol,
            chunk=chunk,
        )
        nats.append(offset - result.log_density)
        spent += result.evaluations * n
    bits = torch.stack(nats) / (dim * math.log(2))
    per_image = bits.mean(0)
    return OdeBitsPerDim(
        bits_per_dim=float(per_image.mean()),
        stderr=float((bits.var(0) / draws).sum().sqrt() / n),
        data_stderr=float(per_image.std() / n**0.5) if n > 1 else math.inf,
        per_image=per_image,
        dequantise=dequantise,
        logsnr_range=(lo, hi),
        evaluations=spent,
    )


def _dequantised(x: Tensor, pixels: Pixels, hi: float, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(y, what -log p(y) lacks to -log P(v), in nats `[N]`) of cell centres x."""
    spacing = pixels.spacing
    if kind == "uniform":
        u = torch.rand(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
        return x + spacing * (u - 0.5), torch.full((len(x),), -x[0].numel() * math.log(spacing)).to(x)
    sigma = sigma_from_logsnr(hi)
    eps = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    y = x + sigma * eps
    own = -0.5 * eps.square()
    log_q = (own - 0.5 * math.log(2 * math.pi) - math.log(sigma)).flatten(1).sum(1)
    # One grey level at a time: logits of all at once need so many times the memory of the images.
    total = torch.full_like(y, -math.inf)
    for centre in pixels.centres.double().tolist():
        total = torch.logaddexp(total, -0.5 * ((y - centre) / sigma).square())
    return y, log_q + (total - own).flatten(1).sum(1)


def _signs(z: Tensor, probes: int, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (probes, *z.shape), generator=generator, device=generator.device)
    return (2 * bits - 1).to(z)


def _solve(
    denoiser: Denoiser,
    z: Tensor,
    signs: Tensor | None,
    cond: dict[str, Any],
    lo: float,
    hi: float,
    rtol: float,
    atol: float,
) -> tuple[Tensor, int]:
    """log p(z) of the canonical state at hi `[B, probes]`, and the evaluations that it took."""
    odeint = require("torchdiffeq", extra="train", purpose="ode_log_likelihood").odeint
    shape, evaluations = z.shape, 0
    columns = 1 if signs is None else len(signs)

    def rate(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            sigma = sigma_from_logsnr(float(t))
            alpha, s = alpha_s(sigma)
            estimate: Estimate = denoiser(z, sigma, **cond)
            f = 0.5 * alpha * s * (s * estimate.x0 - alpha * estimate.eps)
            traces = _exact_trace(f, z) if signs is None else _sketched_trace(f, z, signs)
        return f.detach(), traces

    times = torch.tensor([hi, lo], dtype=torch.float64, device=z.device)
    start = (z, z.new_zeros(len(z), columns))
    with torch.no_grad():
        states, gains = odeint(rate, start, times, rtol=rtol, atol=atol, method="dopri5")
    end = states[-1].reshape(shape).flatten(1)
    base = -0.5 * (end.square() + math.log(2 * math.pi)).sum(1, keepdim=True)
    return base + gains[-1], evaluations


def _exact_trace(f: Tensor, z: Tensor) -> Tensor:
    flat = f.flatten(1)
    rows = [
        torch.autograd.grad(flat[:, d].sum(), z, retain_graph=True)[0].flatten(1)[:, d] for d in range(flat.shape[1])
    ]
    return torch.stack(rows).sum(0).unsqueeze(1)


def _sketched_trace(f: Tensor, z: Tensor, signs: Tensor) -> Tensor:
    """sign^T (df/dz) sign for each vector of signs `[B, probes]`."""
    products = [torch.autograd.grad(f, z, e, retain_graph=True)[0] * e for e in signs]
    return torch.stack([product.flatten(1).sum(1) for product in products], 1)
