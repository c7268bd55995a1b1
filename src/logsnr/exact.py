"""Exact denoisers: data whose posterior mean has a closed form at every noise level.

    x ~ p,    z = alpha x + s eps,    x0 = E[x | z],    eps = E[eps | z] = -s grad_z log p_sigma(z)

They answer as a perfectly trained network would, so what a sampler, a loss or a likelihood does wrong is its own
error.  p is a Gaussian (of any size, where its covariance
has a short form), a mixture of Gaussians, a finite set of points (whose `x0` is the ideal denoiser of
2306.04848, sec. 3: a softmax over the data) or an affine subspace (whose `x0` is the exact projection).

Buffers keep the dtype they are given; answers come in the dtype of z.  At sigma 0 a degenerate direction (no variance
in the data) has no `eps`: such entries are inf or nan, while `x0` stays finite.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate, noisy
from logsnr.gaussian import Covariance, eigen, of_spectrum, wide
from logsnr.noise import alpha_s, per_sample
from logsnr.projection import Points, Softmin

Numbers = Tensor | Sequence[Any]


class ExactDenoiser(Denoiser):
    """A closed-form denoiser: also knows the density of its noisy states, and draws them."""

    trained_range = (0.0, math.inf)

    @abstractmethod
    def log_density(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """log p_sigma(z) `[B]` in nats, of the canonical noisy state z `[B, *shape]`."""

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n clean samples."""

    def score(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """grad_z log p_sigma(z) = -eps / s `[B, *shape]`."""
        _, s = _amplitudes(sigma, z)
        estimate: Estimate = self(z, sigma)
        return -estimate.eps / s

    def sample(self, n: int, *, generator: torch.Generator, sigma: float | Tensor = 0.0) -> Tensor:
        """n draws of z at a noise level (x itself at sigma 0) `[n, *shape]`."""
        x = self._draw(n, generator)
        return x if not isinstance(sigma, Tensor) and sigma == 0 else noisy(x, _randn(x, generator), sigma)


class GaussianMixture(ExactDenoiser):
    """p = sum_k w_k N(m_k, C_k), each C_k diagonalised once.

    In the eigenbasis of C_k (eigenvalues L) the noisy state has variance v = alpha^2 L + s^2 and, per direction,
    x0 = m + alpha L/v (z - alpha m), eps = s/v (z - alpha m); the components are averaged by responsibility.

    Args:
        weights: K positive weights that sum to 1.
        means: `[K, D]`.
        covs: `[K, D, D]`, symmetric, positive semi-definite (zero eigenvalues are allowed).

    Raises:
        ValueError: if a shape does not fit, weights are no distribution, or a covariance is none.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor

    def __init__(self, weights: Numbers, means: Numbers, covs: Numbers) -> None:
        super().__init__()
        m = _floats(means, "means", "[K, D]", 2)
        w, c = _floats(weights, "weights", "[K]", 1).to(m), _floats(covs, "covs", "[K, D, D]", 3).to(m)
        k, d = m.shape
        if w.shape != (k,) or c.shape != (k, d, d):
            raise ValueError(
                f"weights {tuple(w.shape)}, means {tuple(m.shape)} and covs {tuple(c.shape)} do not fit: "
                f"with means [K, D] = [{k}, {d}] give weights [{k}] and covs [{k}, {d}, {d}]"
            )
        total = float(w.double().sum())
        if not bool((w > 0).all()) or abs(total - 1) > 1e-5:
            raise ValueError(
                f"weights have smallest value {float(w.min()):.4g} and sum {total:.6g}: they must be positive and sum "
                "to 1; drop empty components and divide by the sum"
            )
        variances, axes = eigen(c)
        self.register_buffer("weights", w)
        self.register_buffer("means", m)
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes)
        self.shape = (d,)
        centre = w @ m
        self.sigma_data = math.sqrt(float(w @ (variances.mean(1) + (m - centre).square().mean(1))))

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s, u, v = self._diagonal(z, sigma)
        share = self._responsibilities(u, v)
        # v = 0 only where a degenerate direction meets sigma 0; its gain is 0 at every other sigma, so 0 there too.
        gain = alpha * self.variances.to(z) / v.clamp(min=torch.finfo(v.dtype).tiny)
        return Estimate(
            lambda: torch.einsum("bk,bkd->bd", share, self.means.to(z) + self._rotate(gain * u)),
            lambda: torch.einsum("bk,bkd->bd", share, self._rotate(s / v * u)),
        )

    def score(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        _, _, u, v = self._diagonal(z, sigma)
        return -torch.einsum("bk,bkd->bd", self._responsibilities(u, v), self._rotate(u / v))

    def log_density(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        _, _, u, v = self._diagonal(z, sigma)
        return self._log_components(u, v).logsumexp(1)

    def _diagonal(self, z: Tensor, sigma: float | Tensor) -> tuple[float | Tensor, float | Tensor, Tensor, Tensor]:
        """alpha, s, and per component the residual u `[B, K, D]` and variance v in its eigenbasis."""
        alpha, s = _amplitudes(sigma, z.unsqueeze(1))
        u = torch.einsum("kde,bkd->bke", self.axes.to(z), z.unsqueeze(1) - alpha * self.means.to(z))
        return alpha, s, u, alpha * alpha * self.variances.to(z) + s * s

    def _rotate(self, u: Tensor) -> Tensor:
        return torch.einsum("kde,bke->bkd", self.axes.to(u), u)

    def _log_components(self, u: Tensor, v: Tensor) -> Tensor:
        log_normal = -0.5 * (u * u / v + (2 * math.pi * v).log()).sum(2)
        return self.weights.to(u).log() + log_normal

    def _responsibilities(self, u: Tensor, v: Tensor) -> Tensor:
        if len(self.weights) == 1:  # also where the density is infinite
            return torch.ones_like(u[:, :, 0])
        return self._log_components(u, v).softmax(1)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.weights.to(generator.device), n, replacement=True, generator=generator).to(
            self.means.device
        )
        coefficients = _randn(self.means[chosen], generator) * self.variances.sqrt()[chosen]
        # One component at a time: gathering axes[chosen] would hold n D x D matrices.
        x = self.means[chosen]
        for k in range(len(self.weights)):
            x = x + (chosen == k).unsqueeze(1) * (coefficients @ self.axes[k].T)
        return x


class Gaussian(GaussianMixture):
    """p = N(mean, cov): a mixture of one.

    Args:
        mean: `[D]`.
        cov: `[D, D]`, symmetric, positive semi-definite (zero eigenvalues are allowed).

    Raises:
        ValueError: if a shape does not fit or `cov` is no covariance.
    """

    def __init__(self, mean: Numbers, cov: Numbers) -> None:
        m, c = _floats(mean, "mean", "[D]", 1), _floats(cov, "cov", "[D, D]", 2)
        super().__init__(m.new_ones(1), m.unsqueeze(0), c.unsqueeze(0))


class GaussianField(ExactDenoiser):
    """p = N(mean, C) of any shape and size: C is a `gaussian.Covariance`, or the variances of its cosines.

    x0 = m + alpha C/v (z - alpha m), eps = s/v (z - alpha m) with v = alpha^2 C + s^2; formed in float64.

    Args:
        mean: `[*shape]`.
        cov: a `gaussian.Covariance`, or variances per cosine of the DCT-II `[C, *space]`.

    Raises:
        ValueError: if the two do not fit.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, cov: Covariance | Tensor) -> None:
        super().__init__()
        self.cov = of_spectrum(cov) if isinstance(cov, Tensor) else cov
        if self.cov.dim != mean.numel():
            raise ValueError(f"a covariance of {self.cov.dim} dimensions does not fit a mean of {tuple(mean.shape)}")
        self.register_buffer("mean", _floats(mean, "mean", "[*shape]", None))
        self.shape = tuple(mean.shape)
        self.sigma_data = math.sqrt(float(self.cov.values @ self.cov.counts) / self.dim)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s, u = self._residual(z, sigma)
        v = alpha * alpha
        # v = 0 only where a degenerate direction meets sigma 0; its gain is 0 at every other sigma, so 0 there too.
        tiny = torch.finfo(u.dtype).tiny

        def x0() -> Tensor:
            moved = self.cov.mapped(lambda c: alpha * c / (v * c + s * s).clamp(min=tiny), u)
            return (self.mean.to(u).flatten() + moved).reshape(z.shape).to(z.dtype)

        def eps() -> Tensor:
            return self.cov.mapped(lambda c: s / (v * c + s * s), u).reshape(z.shape).to(z.dtype)

        return Estimate(x0, eps)

    def log_density(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        alpha, s, u = self._residual(z, sigma)
        v = alpha * alpha * self.cov.values.to(u) + s * s
        counts = self.cov.counts.to(u) * (2 * math.pi * v).log()
        return (-0.5 * (self.cov.products(u)[0] / v + counts).sum(1)).to(z.dtype)

    def _residual(self, z: Tensor, sigma: float | Tensor) -> tuple[float | Tensor, float | Tensor, Tensor]:
        """alpha and s, which broadcast over `[B, D]`, and z - alpha m `[B, D]`, in float64."""
        flat = wide(z)
        alpha, s = _amplitudes(sigma, flat)
        return alpha, s, flat - alpha * self.mean.to(flat).flatten()

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        flat = wide(self.mean.expand(n, *self.shape))
        moved = self.cov.mapped(torch.sqrt, _randn(flat, generator))
        return (flat + moved).reshape(n, *self.shape).to(self.mean.dtype)


class PointCloud(ExactDenoiser):
    """p = the uniform distribution on M points: the ideal denoiser of a data set (2306.04848, sec. 3).

    x0 = sum_i softmax_i(-||y - x_i||^2 / (2 sigma^2)) x_i with y = z/alpha: the nearest point at sigma -> 0, the mean
    at sigma inf.  The search is `projection.Points`, exact for near-duplicates and made for sets of 60,000 images.

    Args:
        points: `[M, *shape]`.
        chunk: points per step where distances come from differences alone (small sets, states that require
            gradients); None for what keeps a step near 64 MB.

    Raises:
        ValueError: if there are no points or `chunk` is not positive.
    """

    points: Tensor

    def __init__(self, points: Numbers, chunk: int | None = None) -> None:
        super().__init__()
        p = _floats(points, "points", "[M, *shape]", None)
        self._set = Points(p, chunk)
        self.register_buffer("points", p)
        self.shape = tuple(p.shape[1:])
        self.sigma_data = _spread(p)

    @property
    def reference(self) -> Points:
        """The set itself, to measure distances to and to project on."""
        if self._set.points is not self.points:  # the module was moved or cast
            self._set = Points(self.points, self._set.chunk)
        return self._set

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        x0 = self._search(z, sigma)[0].mean.to(z.dtype)
        alpha, s = _amplitudes(sigma, z)
        return Estimate(x0, lambda: (z - alpha * x0) / s)

    def log_density(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        found, level = self._search(z, sigma)
        s = level / torch.hypot(level, torch.ones_like(level))
        log_sum = found.log_sum - 0.5 * found.squared / (level * level) - math.log(len(self.points))
        return (log_sum - self.dim * (s.log() + 0.5 * math.log(2 * math.pi))).to(z.dtype)

    def _search(self, z: Tensor, sigma: float | Tensor) -> tuple[Softmin, Tensor]:
        """The softmax at y = z/alpha, formed in float64, and the sigma it was taken at."""
        wide = z if z.device.type == "mps" else z.double()
        # At 1e15, alpha x is beneath the resolution of z in any dtype; y must not overflow when squared.
        level = torch.as_tensor(sigma, dtype=wide.dtype, device=wide.device).clamp(max=1e15)
        y = wide * per_sample(torch.hypot(level, torch.ones_like(level)), wide)
        return self.reference.softmin(y, level, precise=z.dtype == torch.float64), level

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(self.points), (n,), generator=generator, device=generator.device)
        return self.points[index.to(self.points.device)]


class Subspace(ExactDenoiser):
    """p on the affine subspace offset + span(basis): x = offset + Q c with orthonormal Q and c ~ N(0, scale^2 I).

    The default `scale = inf` is the flat subspace, whose x0 is the exact projection of y = z/alpha (undefined at
    sigma inf) and which has no normalised density: `log_density` is then that of the residual in the orthogonal
    complement, N(0, s^2 I) in D - d dimensions, and `sample` is an error; `sigma_data` is a nominal 1.

    Args:
        basis: `[D, d]`, linearly independent columns; orthonormalised here.
        offset: `[D]`, None for the origin.
        scale: standard deviation of the coefficients in (0, inf].

    Raises:
        ValueError: if a shape does not fit, columns are dependent, or `scale` is not positive.
    """

    basis: Tensor
    offset: Tensor

    def __init__(self, basis: Numbers, offset: Numbers | None = None, scale: float = math.inf) -> None:
        super().__init__()
        b = _floats(basis, "basis", "[D, d]", 2)
        o = b.new_zeros(len(b)) if offset is None else _floats(offset, "offset", "[D]", 1).to(b)
        if o.shape != b.shape[:1]:
            raise ValueError(f"offset {tuple(o.shape)} does not fit basis {tuple(b.shape)}: give [{len(b)}]")
        rank = int(torch.linalg.matrix_rank(b.double())) if b.numel() else 0
        if rank < b.shape[1]:
            raise ValueError(f"basis {tuple(b.shape)} has rank {rank}: its columns must be linearly independent")
        if not scale > 0:
            raise ValueError(f"scale = {scale}: must be in (0, inf]; inf is the flat subspace")
        self.register_buffer("basis", torch.linalg.qr(b.double())[0].to(b))
        self.register_buffer("offset", o)
        self.scale = float(scale)
        self.shape = (len(b),)
        self.sigma_data = 1.0 if math.isinf(scale) else self.scale * math.sqrt(b.shape[1] / len(b))

    @property
    def finite_at_inf(self) -> bool:
        return math.isfinite(self.scale)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        if not self.finite_at_inf and not isinstance(sigma, Tensor) and math.isinf(sigma):
            raise ValueError("a flat subspace has no x0 at sigma = inf: use a finite sigma or a finite scale")
        alpha, s, inside, outside = self._split(z, sigma)
        tau = self.scale**-2
        variance = alpha * alpha + tau * s * s  # of the noisy coefficients, over scale^2
        return Estimate(
            lambda: self.offset.to(z) + alpha / variance * inside,
            lambda: tau * s / variance * inside + outside / s,
        )

    def log_density(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        alpha, s, inside, outside = self._split(z, sigma)
        d = self.basis.shape[1]
        out = _log_normal(outside, s * s, self.dim - d)
        return out if not self.finite_at_inf else out + _log_normal(inside, (alpha * self.scale) ** 2 + s * s, d)

    def _split(self, z: Tensor, sigma: float | Tensor) -> tuple[float | Tensor, float | Tensor, Tensor, Tensor]:
        """alpha, s, and the parts of z - alpha offset in the subspace and orthogonal to it."""
        alpha, s = _amplitudes(sigma, z)
        residual, q = z - alpha * self.offset.to(z), self.basis.to(z)
        inside = residual @ q @ q.T
        return alpha, s, inside, residual - inside

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        if not self.finite_at_inf:
            raise ValueError("scale = inf: a flat subspace has no distribution to draw from; give a finite scale")
        c = _randn(self.basis.new_empty(n, self.basis.shape[1]), generator) * self.scale
        return self.offset + c @ self.basis.T


def _amplitudes(sigma: float | Tensor, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """(alpha, s) that broadcast over `like [B, ...]`, in its dtype."""
    alpha, s = alpha_s(sigma)
    if isinstance(alpha, Tensor) and isinstance(s, Tensor):
        alpha, s = alpha.to(like), s.to(like)
    return per_sample(alpha, like), per_sample(s, like)


def _spread(points: Tensor) -> float:
    """Standard deviation per dimension of points `[M, *shape]`, in float64 without a float64 copy of the set."""
    chunks = [chunk.flatten(1) for chunk in torch.split(points, max(1, 2**23 // math.prod(points.shape[1:])))]
    mean = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / len(points)
    total = sum(float((chunk.double() - mean).square().sum()) for chunk in chunks)
    return math.sqrt(total / points.numel())


def _log_normal(residual: Tensor, variance: float | Tensor, dim: int) -> Tensor:
    v = torch.as_tensor(variance, dtype=residual.dtype, device=residual.device)
    v = v.squeeze(1) if v.ndim else v
    return -0.5 * (residual.square().sum(1) / v + dim * (2 * math.pi * v).log())


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _floats(value: Numbers, name: str, axes: str, ndim: int | None) -> Tensor:
    out = torch.as_tensor(value).detach()
    out = out.clone() if out.is_floating_point() else out.to(torch.get_default_dtype())
    if ndim is not None and out.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(out.shape)}: give {axes}")
    if not bool(out.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite: remove or mask them first")
    return out
