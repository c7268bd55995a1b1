"""Control: a pilot's knowledge of where an integral over noise levels is hard, and what of its noise is known.

The integrand at one level is m = ||eps_hat - eps||^2 of one image and one noise.  Parts of its noise are known:

    sum over all dimensions of eps_d^2 - 1     a blind network errs by eps itself
    the same over the cells that are black,    where a network knows the value, and errs less
    and over those that are white
    m_G - E[m_G],  m_G = ||a e - b||^2         the error of the Gaussian denoiser of the data's covariance, where
                                               e, x_k: eps and x - mean in the eigenbasis, a = L/(L + sigma^2),
                                               b = sigma x_k/(L + sigma^2), so E[m_G] = sum a^2 + b^2

All have mean 0 for every image and level, so m minus beta(lambda) times them has the mean of m whatever beta is.
What is left has a standard deviation r(lambda) over images and noise, and the integral of g m over lambda has least
variance with levels from p ~ g r.  A pilot regresses m on the controls in each bin of log-SNR for beta and r.  It
learns from draws before those that it serves: given beta and p, an estimate is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.gaussian import FULL, Kind, Residuals, fit, wide
from logsnr.noise import sigma_from_logsnr
from logsnr.sampling.batches import chunks, take

ENOUGH = 2**15
"""Draws after which a pilot learns no more."""
FLOOR = 0.05
"""Share of the levels that are uniform: no level is lost to a pilot that saw nothing there."""


class GaussianControl:
    """m_G - E[m_G] of the Gaussian denoiser with the mean and covariance of other samples.

    Args:
        x: samples `[M, *shape]`, M >= 2, as a rule of the training set; the control has mean 0 whatever they are.
        kind: of the covariance, as `gaussian.fit` takes it.
        rank: of a low-rank one.
        shrink: what is added to every eigenvalue, as a share of their mean: raw small ones make the control wild.

    Raises:
        ValueError: if there are fewer than two samples.
    """

    def __init__(
        self, x: Tensor, *, kind: Kind | Literal["auto"] = "full", rank: int | None = None, shrink: float = 0.005
    ) -> None:
        if len(x) < 2:
            raise ValueError(f"the Gaussian control has {len(x)} sample: give at least two, better D or more")
        residuals = Residuals.of(x)
        (self.mean,) = residuals.means
        self.cov = fit(residuals, kind, rank)
        values = self.cov.values
        mean = float(values @ self.cov.counts) / self.cov.dim
        self.cov = replace(self.cov, values=values + shrink * mean + 1e-12)

    def __call__(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """Values `[B]`, float64, of mean 0 over eps at every x and sigma `[B]`."""
        e = wide(eps)
        s = sigma.to(e).unsqueeze(1)
        values, counts = self.cov.values.to(e), self.cov.counts.to(e)
        own, cross = self.cov.products(e, e, wide(x) - self.mean.to(e))
        a, b = values / (values + s * s), s / (values + s * s)
        value: Tensor = (a * a * (own - counts) - 2 * a * b * cross).sum(1)
        return value


def gaussian_control(x: Tensor, train: Tensor | None = None) -> GaussianControl | None:
    """The best control at hand for samples x `[N, *shape]`: of the covariance of others, or of a spectrum.

    Of others it takes the full covariance, up to `FULL` dimensions, of which D^2 products per sample have to be formed;
    beyond, and of x itself, variances per frequency, which few samples tell (`gaussian.Cosines`).  Its mean is 0 over
    eps for every x, so x may be what its spectrum is of.  None for a single sample, and for points that are no images.
    """
    if train is not None:
        return GaussianControl(train, kind="full" if train[0].numel() <= FULL else "cosine")
    return GaussianControl(x, kind="cosine") if len(x) > 1 and x.ndim > 2 else None


@dataclass(frozen=True, kw_only=True)
class Controls:
    """The controls of one estimate.

    Attributes:
        extremes: values of x (black and white, where pixels pile up) whose noise is counted apart.
        gaussian: the Gaussian control, where there is one.
    """

    extremes: tuple[float, ...] = ()
    gaussian: GaussianControl | None = field(default=None, repr=False)

    @classmethod
    def of(cls, x: Tensor, gaussian: GaussianControl | None = None) -> Controls:
        """For samples like x `[N, *shape]`: the smallest and largest value, where 2 % of all values are there."""
        ends = {float(x.min()), float(x.max())}
        common = tuple(sorted(end for end in ends if float((x == end).double().mean()) >= 0.02))
        return cls(extremes=common, gaussian=gaussian)

    def __call__(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """Values `[B, controls]`, float64, of mean 0 over eps at every x and sigma `[B]`."""
        known = eps.flatten(1).double().square() - 1
        flat = x.flatten(1)
        columns = [known.sum(1), *((known * (flat == end)).sum(1) for end in self.extremes)]
        if self.gaussian is not None:
            columns.append(self.gaussian(x, eps, sigma))
        return torch.stack(columns, 1)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Draws of the error: levels `[n]`, errors `[n]` and controls `[n, controls]`, float64, on the CPU."""

    logsnr: Tensor
    error: Tensor
    known: Tensor

    def __len__(self) -> int:
        return len(self.logsnr)

    def __add__(self, other: Draws) -> Draws:
        return Draws(
            logsnr=torch.cat([self.logsnr, other.logsnr]),
            error=torch.cat([self.error, other.error]),
            known=torch.cat([self.known, other.known]),
        )


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """Noise levels and control coefficients for one range, in equal bins of log-SNR.

    Attributes:
        range: (lo, hi) log-SNR.
        spread: residual standard deviation r of the error in each bin `[bins]`.
        betas: coefficient of each control in each bin `[bins, controls]`; linear between bin centres.
        means: mean error in each bin `[bins]`; empty where nothing was measured.
        controls: what the coefficients are for; None for none.
        evaluations: what the pilot cost.
        draws: what it learned from; None where nothing was measured.
    """

    range: tuple[float, float]
    spread: Tensor
    betas: Tensor
    means: Tensor
    controls: Controls | None = None
    evaluations: int = 0
    draws: Draws | None = field(default=None, repr=False)

    @classmethod
    def uniform(cls, lo: float, hi: float) -> Pilot:
        """No knowledge: uniform levels, no controls, no cost."""
        return cls(
            range=(lo, hi), spread=torch.ones(1).double(), betas=torch.zeros(1, 0).double(), means=torch.empty(0)
        )

    @classmethod
    def measure(
        cls,
        denoiser: Denoiser,
        x: Tensor,
        *,
        logsnr_range: tuple[float, float],
        generator: torch.Generator,
        cond: dict[str, Tensor] | None = None,
        gaussian: GaussianControl | None = None,
        evaluations: int = 512,
        bins: int = 24,
        chunk: int = 512,
    ) -> Pilot:
        """Learn levels and coefficients from draws of its own.

        Args:
            denoiser: the model.
            x: samples `[N, *shape]`; the estimate stays unbiased whatever they are, and is best if they resemble its
                own.
            logsnr_range: (lo, hi) of the integral.
            generator: source of every draw.
            cond: conditions with one entry per sample.
            gaussian: the Gaussian control, where there is one.
            evaluations: network evaluations to spend.
            bins: equal bins of log-SNR; each borrows the draws of its neighbours.
            chunk: samples per network call.

        Raises:
            ValueError: if there are fewer than 4 evaluations per bin.
        """
        lo, hi = logsnr_range
        each = evaluations // bins
        if bins < 3 or each < 4:
            raise ValueError(f"evaluations = {evaluations}, bins = {bins}: give at least 3 bins and 4 draws for each")
        n = each * bins
        jitter = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        at = torch.arange(n, device=generator.device)
        logsnr = (lo + (hi - lo) * (at + jitter) / n).to(x.device)
        # A fresh order of the images whenever all had their turn: no bin sees only a few of them.
        orders = [torch.randperm(len(x), generator=generator, device=generator.device) for _ in range(0, n, len(x))]
        chosen = torch.cat(orders)[:n].to(x.device)
        controls = Controls.of(x, gaussian)
        error, known = draw_errors(
            denoiser,
            x[chosen],
            logsnr,
            cond=take(cond, chosen),
            generator=generator,
            chunk=chunk,
            controls=controls,
        )
        draws = Draws(logsnr=logsnr.cpu(), error=error.cpu(), known=known.cpu())
        return cls._learned(draws, (lo, hi), bins, controls, n)

    @classmethod
    def _learned(
        cls, draws: Draws, span: tuple[float, float], bins: int, controls: Controls | None, evaluations: int
    ) -> Pilot:
        """What draws say: in each bin a regression of the error on level and controls, with the bins beside it."""
        lo, hi = span
        width = (hi - lo) / bins
        at = ((draws.logsnr - lo) / width).long().clamp(0, bins - 1)
        order, count = at.argsort(stable=True), torch.bincount(at, minlength=bins)
        logsnr, error, known = draws.logsnr[order], draws.error[order], draws.known[order]
        edges = [0, *count.cumsum(0).tolist()]
        spread, betas = torch.empty(bins).double(), torch.empty(bins, known.shape[1]).double()
        for b in range(bins):
            window = slice(edges[max(b - 1, 0)], edges[min(b + 2, bins)])
            centred = (logsnr[window] - (lo + (b + 0.5) * width)) / width
            regressors = torch.cat([torch.ones(len(centred), 1), centred[:, None], known[window]], 1)
            scale = regressors.square().mean(0).sqrt().clamp(min=1e-30)
            A, y = regressors / scale, error[window, None]
            # A ridge of 1e-6 of a draw: where controls are constant or add up, the least coefficients.
            gram = A.T @ A + 1e-6 * torch.eye(A.shape[1]).double()
            coefficients = torch.linalg.solve(gram, A.T @ y)
            residual = (y - A @ coefficients).square().sum() / max(len(y) - A.shape[1], 1)
            spread[b] = residual.sqrt()
            betas[b] = (coefficients[:, 0] / scale)[2:]
        means = torch.zeros(bins).double().index_add_(0, at, draws.error) / count
        # An error that is (almost) noise-free still varies over a bin.
        spread = torch.maximum(spread, 1e-3 * means).clamp(min=1e-12)
        return cls(
            range=span,
            spread=spread,
            betas=betas,
            means=means,
            controls=controls,
            evaluations=evaluations,
            draws=draws,
        )

    def after(self, *seen: Draws) -> Pilot:
        """The pilot that has seen these draws too; itself where it knows nothing or enough.

        An estimate whose parts each use the pilot of the parts before is unbiased part by part.
        """
        known = self.draws
        for draws in seen:
            if known is None or len(known) >= ENOUGH:
                break
            known = known + draws
        if known is None or known is self.draws:
            return self
        return self._learned(known, self.range, len(self.spread), self.controls, self.evaluations)

    def probabilities(self, weight: Callable[[Tensor], Tensor]) -> Tensor:
        """Share of the levels in each bin `[bins]`, ~ g r, for the integral of g m."""
        share = weight(self._centres()) * self.spread
        total = share.sum()
        if not bool(total > 0):
            share, total = torch.ones_like(share), torch.tensor(float(len(share)))
        return (1 - FLOOR) * share / total + FLOOR / len(share)

    def levels(self, u: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """(log-SNR, density p) at quantiles u of the piecewise-constant law of `probabilities`, float64."""
        lo, hi = self.range
        width = (hi - lo) / len(share)
        share = share.to(u.device)
        cumulative = torch.cat([share.new_zeros(1), share.cumsum(0)])
        b = torch.searchsorted(cumulative, u, right=True).sub(1).clamp(0, len(share) - 1)
        inside = ((u - cumulative[b]) / share[b]).clamp(0, 1)
        return lo + width * (b + inside), share[b] / width

    def coefficients(self, logsnr: Tensor) -> Tensor:
        """beta at each level `[n, controls]`: linear between bin centres, constant beyond the outer ones."""
        lo, hi = self.range
        last = len(self.betas) - 1
        at = ((logsnr - lo) / (hi - lo) * (last + 1) - 0.5).clamp(0, last)
        i = at.floor().long().clamp(max=max(last - 1, 0))
        part = (at - i).unsqueeze(1)
        betas = self.betas.to(logsnr.device)
        return (1 - part) * betas[i] + part * betas[(i + 1).clamp(max=last)]

    def _centres(self) -> Tensor:
        lo, hi = self.range
        bins = len(self.spread)
        return lo + (hi - lo) * (torch.arange(bins, dtype=torch.float64) + 0.5) / bins


def draw_errors(
    denoiser: Denoiser,
    x: Tensor,
    logsnr: Tensor,
    *,
    cond: dict[str, Tensor] | None,
    generator: torch.Generator,
    chunk: int,
    controls: Controls | None = None,
) -> tuple[Tensor, Tensor]:
    """One draw of ||eps_hat - eps||^2 `[N]` and of the controls `[N, controls]` at levels `logsnr [N]`, float64.

    Raises:
        ValueError: if the denoiser answers with something that is not finite.
    """
    errors, known = [], []
    for part, conditions in chunks(len(x), chunk, cond):
        eps = torch.randn(x[part].shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
        sigma = sigma_from_logsnr(logsnr[part])
        error = denoiser.eps_error(x[part], eps, sigma.to(x.dtype), **conditions).double()
        if not bool(error.isfinite().all()):
            bad = float(logsnr[part][~error.isfinite()][0])
            raise ValueError(
                f"the denoiser's error at log-SNR {bad:.2f} is not finite: check it there, or cut the range"
            )
        errors.append(error)
        known.append(error.new_zeros(len(error), 0) if controls is None else controls(x[part], eps, sigma))
    return torch.cat(errors), torch.cat(known)
