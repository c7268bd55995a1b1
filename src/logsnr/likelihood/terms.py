"""The two ends of a bound: what the noisy end lacks to pure noise, and what the clean end says of grey levels.

    prior            KL(q(z_1|x) || N(0, I)) = 1/2 sum(alpha^2 x^2 + s^2 - ln s^2 - 1)
    reconstruction   E[-log P(v | z_0)],   P(v | z_0) ~ exp(-(z_0/alpha_0 - x_v)^2 / (2 sigma_0^2)), v the grey levels

Neither has parameters.  The reconstruction splits over dimensions and depends on nothing but the grey level of each, so
its mean is a table with one entry per grey level, by quadrature; `reconstruction_nats` is one draw of the same.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.noise import alpha_s, logsnr_from_sigma, sigma_from_logsnr
from logsnr.pixels import Pixels


def codec_of(denoiser: Denoiser, pixels: Pixels | None) -> Pixels:
    """The codec of the images that a denoiser is asked about: its own, `pixels` where it has none.

    Raises:
        ValueError: if there is neither, or the two differ.
    """
    own = denoiser.pixels
    if own is None and pixels is None:
        raise ValueError(
            "this denoiser has no pixel codec: give pixels=Pixels(grey_levels), Pixels(256) for 8-bit images"
        )
    if own is not None and pixels is not None and own != pixels:
        raise ValueError(
            f"pixels = {pixels}, but this denoiser's own is {own}, of {own.grey_levels} grey levels: leave pixels out"
        )
    return own or pixels or Pixels()


def default_logsnr_range(pixels: Pixels | int) -> tuple[float, float]:
    """VDM's [-5, 13.3] for 256 grey levels, its clean end at the same noise per cell for other numbers of them.

    In a box of another width both ends are at the same noise over that width.

    Args:
        pixels: the codec, or its number of grey levels.
    """
    codec = pixels if isinstance(pixels, Pixels) else Pixels(pixels)
    width = 2 * math.log(2 / (codec.box[1] - codec.box[0]))
    return -5.0 + width, 13.3 - 2 * math.log(256 / codec.grey_levels) + width


def prior_nats(x: Tensor, logsnr_min: float) -> Tensor:
    """KL(q(z_1|x) || N(0, I)) = 1/2 sum(alpha^2 x^2 + s^2 - ln s^2 - 1), in nats `[N]`, float64."""
    alpha, s = alpha_s(sigma_from_logsnr(logsnr_min))
    return 0.5 * ((alpha * x.double()).square() + s * s - 2 * math.log(s) - 1).flatten(1).sum(1)


def reconstruction_nats(x: Tensor, pixels: Pixels, logsnr_max: float, *, generator: torch.Generator) -> Tensor:
    """One draw of -log P(v | z_0) in nats `[N]`, float64, for cell centres x `[N, *shape]`.

    P(v | z_0) is a softmax over grey levels k of -(z_0/alpha_0 - x_k)^2 / (2 sigma_0^2), independently per dimension.
    """
    sigma = sigma_from_logsnr(logsnr_max)
    centres = pixels.centres.to(x.device, torch.float64)
    out = torch.empty(len(x), dtype=torch.float64, device=x.device)
    chunk = max(1, 2**22 // (x[0].numel() * len(centres)))  # at most 32 MiB of logits at a time
    for i in range(0, len(x), chunk):
        part = x[i : i + chunk].double()
        eps = torch.randn(part.shape, generator=generator, device=generator.device, dtype=torch.float64)
        out[i : i + chunk] = _cell_nats(part, eps.to(x.device), centres, sigma).flatten(1).sum(1)
    return out


def expected_reconstruction_nats(images: Tensor, pixels: Pixels, logsnr_max: float) -> Tensor:
    """E[-log P(v | z_0)] in nats `[N]`, float64, of grey levels uint8 `[N, *shape]`: the mean of `reconstruction_nats`.

    Trapezoidal rule over eps in [-9, 9] (for such integrands it converges faster than any power of the spacing).
    """
    sigma, centres = sigma_from_logsnr(logsnr_max), pixels.centres.double()
    eps = torch.linspace(-9, 9, 1441, dtype=torch.float64)
    density = (-0.5 * eps.square()).exp()
    density = density / density.sum()
    table = torch.zeros_like(centres)
    for v in torch.bincount(images.flatten().long().cpu()).nonzero()[:, 0].tolist():
        table[v] = _cell_nats(centres[v].expand_as(eps), eps, centres, sigma) @ density
    return table.to(images.device)[images.long()].flatten(1).sum(1)


def check_levels(denoiser: Denoiser, lo: float, hi: float, *, stacklevel: int = 3) -> None:
    """Refuse a range that is none; warn where it leaves the denoiser's training.

    Raises:
        ValueError: if lo and hi are not finite and increasing.
    """
    if not -math.inf < lo < hi < math.inf:
        raise ValueError(f"logsnr_range = ({lo}, {hi}): give finite log-SNRs with lo < hi")
    sigma_lo, sigma_hi = denoiser.trained_range
    if sigma_from_logsnr(hi) < 0.8 * sigma_lo or sigma_from_logsnr(lo) > 1.25 * sigma_hi:
        warnings.warn(
            f"the bound's log-SNR range [{lo:.2f}, {hi:.2f}] reaches beyond the denoiser's trained range "
            f"[{logsnr_from_sigma(sigma_hi):.2f}, {logsnr_from_sigma(sigma_lo):.2f}]; the bound holds, but is loose",
            stacklevel=stacklevel,
        )


def warn_if_short(lo: float, hi: float, prior: float, reconstruction: float, pixels: Pixels) -> None:
    """Warn of a range so short that its ends, which no model can improve, weigh on the bound (bits per dimension)."""
    good_lo, good_hi = default_logsnr_range(pixels)
    for name, bits, limit, end, good, value in (
        ("reconstruction", reconstruction, 0.3, "clean", good_hi, hi),
        ("prior", prior, 0.03, "noisy", good_lo, lo),
    ):
        if bits > limit:
            warnings.warn(
                f"log-SNR range [{lo:.2f}, {hi:.2f}] is short: the {name} term of its {end} end alone is {bits:.3f} "
                f"bits/dim, which no model can improve; move {value:.2f} to about {good:.2f}",
                stacklevel=3,
            )


def _cell_nats(x: Tensor, eps: Tensor, centres: Tensor, sigma: float) -> Tensor:
    """-log P(v | x + sigma eps) elementwise, for cell centres x of the true grey levels v."""
    logits = -0.5 * (((x + sigma * eps)[..., None] - centres) / sigma).square()
    # The true grey level's own logit is -eps^2/2: no rounding back to an index is needed.
    return logits.logsumexp(-1) + 0.5 * eps.square()
