"""Half precision: the network under autocast, beside float32, at the same states.

The states stay in float32, as samplers keep them; only what runs inside the network is rounded.  What counts is the
squared difference against the model's own squared error: noise that is small beside it does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from logsnr.denoiser import Estimate, noisy
from logsnr.evaluation.passport.card import HalfPrecision
from logsnr.evaluation.passport.meter import Meter, Samples

DTYPES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def half_precision(denoiser: Meter, samples: Samples, sigmas: Sequence[float]) -> tuple[HalfPrecision, ...]:
    """bfloat16 and float16 at every level; nothing for a model without weights, or where autocast does not run."""
    if next(denoiser.denoiser.parameters(), None) is None:
        return ()
    out = []
    full = {sigma: _errors(denoiser, samples, sigma, None) for sigma in sigmas}
    for dtype in DTYPES:
        for sigma in sigmas:
            reference, finite, error = full[sigma]
            try:
                eps, also, _ = _errors(denoiser, samples, sigma, dtype)
            except RuntimeError:  # an operator without a half-precision form on this device
                break
            both = finite & also
            excess = float((eps - reference)[both].square().sum() / error[both].sum()) if bool(both.any()) else math.nan
            lost = int((finite & ~also).sum())
            out.append(HalfPrecision(dtype=str(dtype)[6:], sigma=sigma, excess=excess, non_finite=lost))
    return tuple(out)


def _errors(
    denoiser: Meter, samples: Samples, sigma: float, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """eps_hat `[N, D]`, whether it is finite `[N]`, and its squared error `[N]`."""
    z = noisy(samples.x, samples.eps, sigma)
    with torch.autocast(denoiser.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        estimate: Estimate = denoiser(z, sigma, **samples.cond)
        eps = estimate.eps.flatten(1).double()
    finite = eps.isfinite().all(1)
    return eps, finite, (eps - samples.eps.flatten(1).double()).square().sum(1)
