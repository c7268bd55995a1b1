"""Information: at which noise levels the bits of an image are decided.

    L(lambda; x) = KL(q(z_1|x) || N(0, I)) + 1/2 int_{lo}^{lambda} E||eps_hat - eps||^2 dlambda'   (2303.00848, eq. 3.4)

is what an image costs as seen through noise of level lambda.  For an exact denoiser its mean over the data is the
mutual information I(x; z_lambda), by the I-MMSE relation dI/dlambda = mmse/2 (of eps); for any other it lies above.
Its slope says where the bits are: at high noise in few numbers (the coarse structure), at low noise in every one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.likelihood.bound import Likelihood


@dataclass(frozen=True, kw_only=True)
class Information:
    """L(lambda) and its slope in bits per dimension, over equal cells of log-SNR.

    Attributes:
        edges: log-SNR of the cells' ends, increasing `[K + 1]`.
        known: L at the edges, bits per dimension `[K + 1]`; the first is the prior's, the last lacks but the
            reconstruction of the bound.
        density: bits per dimension and unit of log-SNR in each cell `[K]`: half the error of eps per dimension.
        reconstruction: what the grey levels still cost at the clean end.
        stderr: of the last of `known`, over noise.
    """

    edges: Tensor
    known: Tensor
    density: Tensor
    reconstruction: float
    stderr: float

    def level(self, share: float) -> float:
        """The log-SNR at which a share of all bits of the bound is known, linear within cells; nan if none is.

        Raises:
            ValueError: if the share is not in [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share = {share}: must be in [0, 1]")
        known = self.known.cummax(0).values  # noise may let a cell fall below 0
        wanted = share * float(self.known[-1] + self.reconstruction)
        if not float(known[0]) <= wanted <= float(known[-1]):
            return math.nan
        i = min(int(torch.searchsorted(known, wanted, right=True)), len(known) - 1)
        low, high = float(known[i - 1]), float(known[i])
        part = 0.0 if high == low else (wanted - low) / (high - low)
        return float(self.edges[i - 1]) + part * float(self.edges[i] - self.edges[i - 1])


def information(bound: Likelihood) -> Information:
    """Where the bits of a variational bound lie; it asks the model nothing more.

    Args:
        bound: of `bits_per_dim`, whose curve of errors is integrated; its cells' sum is the diffusion term up to noise
            and is scaled to it.
    """
    lo, hi = bound.logsnr_range
    _, errors = bound.loss_curve
    edges = torch.linspace(lo, hi, len(errors) + 1, dtype=torch.float64)
    density = errors.double() / (2 * math.log(2))
    spent = density * (edges[1:] - edges[:-1])
    if float(spent.sum()) > 0:  # cells are means of few draws, the whole is the better estimate
        scale = bound.diffusion / float(spent.sum())
        density, spent = density * scale, spent * scale
    known = bound.prior + torch.cat([torch.zeros(1, dtype=torch.float64), spent.cumsum(0)])
    return Information(
        edges=edges, known=known, density=density, reconstruction=bound.reconstruction, stderr=bound.stderr
    )
