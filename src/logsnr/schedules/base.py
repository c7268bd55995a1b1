"""Densities of noise levels: what every schedule can do (the kinds are in schedule.py).

A schedule is a decreasing map lambda = f(t) from time t in [0, 1] (0 clean, 1 noisiest) to log-SNR.  With t uniform,
log-SNR has the density

    p(lambda) = -dt/dlambda,        t(lambda) = P(log-SNR > lambda),        c(lambda) = 1 - t(lambda)

In training p is only an importance sampler: it moves the variance of the loss, never its mean (2303.00848, sec. 3.2).
Truncation to [lo, hi] keeps the shape, p / (t1 - t0) with t0 = t(hi), t1 = t(lo).

A schedule is written once, as both tails (t, c) of its law and the inverse that takes both: whichever is smaller
carries the digits, so log-SNR +-15 comes back from its time where 1 - t has long rounded to 0.
Every method takes a float or a tensor of any shape and answers with a float64 tensor of that shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from logsnr.errors import unknown
from logsnr.noise import sigma_from_logsnr

Method = Literal["stratified", "lattice", "iid"]


class Schedule(ABC):
    """A density p(lambda) of noise levels, with its quantiles."""

    @property
    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Support (lo, hi) of the density in log-SNR; an end may be infinite."""

    @abstractmethod
    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """(t, c), each with full relative accuracy where it is small; `logsnr` lies in the support."""

    @abstractmethod
    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        """Log-SNR of a time given as both t and c = 1 - t."""

    @abstractmethod
    def _log_density(self, logsnr: Tensor) -> Tensor:
        """ln p; `logsnr` lies in the support."""

    def logsnr(self, t: float | Tensor) -> Tensor:
        """f(t): log-SNR at time t in [0, 1]."""
        t = float64(t)
        return self._quantile(t, 1 - t).clamp(*self.range)

    def time(self, logsnr: float | Tensor) -> Tensor:
        """The inverse of `logsnr`: time in [0, 1], clamped to the support."""
        return self._tails(float64(logsnr).clamp(*self.range))[0]

    def log_density(self, logsnr: float | Tensor) -> Tensor:
        """ln p(lambda); -inf outside the support."""
        logsnr = float64(logsnr)
        lo, hi = self.range
        inside = (logsnr >= lo) & (logsnr <= hi)
        return torch.where(inside, self._log_density(logsnr.clamp(lo, hi)), -math.inf)

    def truncate(self, lo: float, hi: float) -> Schedule:
        """This schedule conditioned on lo <= lambda <= hi: its slice of time [t(hi), t(lo)], stretched to [0, 1].

        Raises:
            ValueError: if [lo, hi] is empty or leaves the support.
        """
        support = self.range
        if not support[0] <= lo < hi <= support[1]:
            raise ValueError(f"truncate({lo}, {hi}): ends must increase and lie in the support {support}")
        return Truncated(self, float(lo), float(hi))

    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator,
        rank: int = 0,
        world: int = 1,
        method: Method = "stratified",
        offset: float | None = None,
    ) -> Tensor:
        """Draw n log-SNRs `[n]`, float64 on the generator's device, this rank's share of a batch of n * world.

        Each draw alone follows p, so every method is unbiased; together they cover the quantiles evenly:

            stratified   u_i = (i + U_i) / (n world), one draw in each stratum of the global batch
            lattice      u_i = (u0 + i / (n world)) mod 1, VDM's: one draw U for all (2107.00630, app. I.1)
            iid          u_i = U_i

        Rank r takes strata r, r + world, ... and shuffles them, so that strata do not align with the order of data.

        Args:
            n: draws on this rank, the same on every rank.
            generator: source of randomness; seed it differently on each rank.
            rank: this rank, in 0 ... world - 1.
            world: number of ranks (times accumulation steps, to stratify across those as well).
            method: as above.
            offset: u0 of a lattice.  It must be equal on all ranks and fresh in every step, which one rank's generator
                cannot provide: with world > 1 give it, e.g. drawn from a generator that all ranks seed alike.

        Raises:
            ValueError: for a rank outside the world, an unknown method, or a lattice over ranks without `offset`.
        """
        u = uniforms(n, generator=generator, rank=rank, world=world, method=method, offset=offset)
        return self._quantile(u, 1 - u).clamp(*self.range)

    def grid(self, n: int) -> Tensor:
        """n + 1 decreasing sigmas at equal quantiles, noisiest to cleanest, float64.

        Raises:
            ValueError: if the support is infinite, or n < 1.
        """
        if n < 1:
            raise ValueError(f"n = {n}: a grid needs at least one step")
        if not all(map(math.isfinite, self.range)):
            raise ValueError(f"{self!r} has infinite range {self.range}: truncate first, e.g. .truncate(-10, 10)")
        return sigma_from_logsnr(self.logsnr(torch.linspace(1, 0, n + 1, dtype=torch.float64)))

    def mass(self, edges: Tensor) -> Tensor:
        """P(edges[i] <= lambda <= edges[i + 1]) `[n]` for increasing `edges [n + 1]`; beyond the support there is none.

        Summed over the cells around a discrete table's levels, this is what the density gives each of its timesteps.
        """
        t, c = self._tails(float64(edges).clamp(*self.range))
        return torch.where(t[:-1] < c[:-1], t[:-1] - t[1:], c[1:] - c[:-1])

    def update(self, logsnr: Tensor, eps_error: Tensor, gradient: Tensor | None = None) -> None:
        """Learn from the errors `[B]` of a batch drawn at `logsnr [B]`; fixed schedules do nothing."""
        return

    def state_dict(self) -> dict[str, Tensor]:
        """What `update` has learned; empty for fixed schedules."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`.

        Raises:
            ValueError: if a fixed schedule is given the state of one that adapts.
        """
        if state:
            raise ValueError(
                f"the state holds {', '.join(state)}, of an adaptive schedule: {self!r} is fixed; make it adaptive, on "
                "the range of that state"
            )


class Unbounded(Schedule):
    """A schedule over all noise levels."""

    @property
    def range(self) -> tuple[float, float]:
        return -math.inf, math.inf


def uniforms(
    n: int,
    *,
    generator: torch.Generator,
    rank: int = 0,
    world: int = 1,
    method: Method = "stratified",
    offset: float | None = None,
) -> Tensor:
    """Draw n quantiles in (0, 1) `[n]`, spread as `Schedule.sample` says: its arguments, its errors."""
    if n < 1 or not 0 <= rank < world:
        raise ValueError(f"n = {n}, rank = {rank}, world = {world}: need n >= 1 and 0 <= rank < world")
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    device, total = generator.device, n * world

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64, device=device)

    if method == "iid":
        u = uniform(n)
    else:
        strata = rank + world * torch.randperm(n, generator=generator, device=device).to(torch.float64)
        if method == "stratified":
            u = (strata + uniform(n)) / total
        elif offset is None and world > 1:
            raise ValueError("a lattice over several ranks needs offset= in [0, 1), the same on every rank")
        else:
            u = (strata / total + (uniform(1) if offset is None else offset)) % 1.0
    # Half an ulp away from the ends, where an untruncated schedule has infinite log-SNR.
    return u.clamp(2**-54, 1 - 2**-53)


def float64(value: float | Tensor) -> Tensor:
    """The float64 tensor of a number or tensor."""
    return torch.as_tensor(value, dtype=torch.float64)


def log_sech(x: Tensor) -> Tensor:
    """ln sech x = ln 2 - |x| - ln(1 + e^(-2|x|)), without overflow."""
    x = x.abs()
    return math.log(2) - x - torch.log1p(torch.exp(-2 * x))


def log_normal(x: Tensor, mean: float, std: float) -> Tensor:
    """Log density of N(mean, std^2)."""
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


def require_positive(owner: object, **values: float) -> None:
    """Refuse parameters that are not positive and finite, by name."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{type(owner).__name__}: {name} = {value} must be positive and finite")


@dataclass(frozen=True)
class Truncated(Schedule):
    """`base` conditioned on lo <= lambda <= hi (made by `Schedule.truncate`)."""

    base: Schedule
    lo: float
    hi: float

    def __repr__(self) -> str:
        return f"{self.base!r}.truncate({self.lo:g}, {self.hi:g})"

    @property
    def range(self) -> tuple[float, float]:
        return self.lo, self.hi

    def truncate(self, lo: float, hi: float) -> Schedule:
        if not self.lo <= lo < hi <= self.hi:
            raise ValueError(f"truncate({lo}, {hi}): ends must increase and lie in the support {self.range}")
        return self.base.truncate(lo, hi)

    def _mass(self, logsnr: Tensor, above: float) -> Tensor:
        """Base mass of [logsnr, above], as the difference of whichever tail is smaller."""
        t, c = self.base._tails(logsnr)
        t_end, c_end = self.base._tails(torch.full_like(logsnr, above))
        return torch.where(t < c, t - t_end, c_end - c)

    def _total(self, like: Tensor) -> Tensor:
        return self._mass(torch.full((), self.lo, dtype=torch.float64, device=like.device), self.hi)

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        total = self._total(logsnr)
        t = (self._mass(logsnr, self.hi) / total).clamp(0, 1)
        return t, (-self._mass(logsnr, self.lo) / total).clamp(0, 1)

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        total = self._total(t)
        t_hi = self.base._tails(torch.full_like(t, self.hi))[0]
        c_lo = self.base._tails(torch.full_like(t, self.lo))[1]
        out = self.base._quantile(t_hi + total * t, c_lo + total * c)
        out = torch.where(t == 0, self.hi, out)
        return torch.where(c == 0, self.lo, out)

    def _log_density(self, logsnr: Tensor) -> Tensor:
        return self.base._log_density(logsnr) - self._total(logsnr).log()
