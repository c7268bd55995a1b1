"""The Inception score: how sure a classifier is of each sample, and how many classes they spread over (1606.03498).

    IS = exp E KL(p(c | x) || p(c)),      p(c) = E p(c | x)

as published the mean over ten parts of the samples; its error is their spread over the root of ten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logsnr.evaluation.metrics.moments import Estimated

SPLITS = 10


class Scores:
    """Sums over the probabilities of samples, per part of them: no matrix of all is kept."""

    def __init__(self) -> None:
        self.n = torch.zeros(SPLITS, dtype=torch.float64)
        self.inner = torch.zeros(SPLITS, dtype=torch.float64)
        self.classes = torch.zeros(SPLITS, 0, dtype=torch.float64)

    def add(self, probabilities: Tensor, part: Tensor) -> None:
        """Take in `[N, C]`, and which part each sample belongs to, int64 `[N]` in 0 ... SPLITS - 1."""
        p = probabilities.to("cpu", torch.float64)
        if self.classes.shape[1] == 0:
            self.classes = torch.zeros(SPLITS, p.shape[1], dtype=torch.float64)
        self.n += torch.bincount(part, minlength=SPLITS)
        self.inner.index_add_(0, part, torch.special.entr(p).sum(1).neg())
        self.classes.index_add_(0, part, p)

    @property
    def score(self) -> Estimated:
        """The mean of the parts' scores, and its error.

        Raises:
            ValueError: if a part has no samples.
        """
        if bool((self.n < 1).any()):
            raise ValueError(f"the Inception score needs at least {SPLITS} samples")
        marginal = self.classes / self.n[:, None]
        each = (self.inner / self.n + torch.special.entr(marginal).sum(1)).exp()
        return Estimated(value=float(each.mean()), stderr=float(each.std()) / SPLITS**0.5)
