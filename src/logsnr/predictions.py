"""Predictions: what a network's output F means, one row of scalars per noise level.

    network input = c_in z      x0 = a_z z + a_F F      eps = b_z z + b_F F      target F* = t_x x + t_e eps

| prediction | c_in          | x0                        | eps                       | F*                      |
|------------|---------------|---------------------------|---------------------------|-------------------------|
| Eps        | 1             | (z - s F)/alpha           | F                         | eps                     |
| X0         | 1             | F                         | (z - alpha F)/s           | x                       |
| V          | 1             | alpha z - s F             | s z + alpha F             | alpha eps - s x         |
| Flow       | 1/(alpha + s) | (z - s F)/(alpha + s)     | (z + alpha F)/(alpha + s) | eps - x                 |
| EDM        | 1/n           | d^2 alpha z/n^2 + s d F/n | s z/n^2 - alpha d F/n     | (s x/d - alpha d eps)/n |
| Score      | 1             | z/alpha + k s^2 F/alpha   | -k s F                    | -eps/(k s)              |

(EDM's d is sigma_data and n^2 = s^2 + (alpha d)^2; its eps and F* come from `z - alpha x0 = s eps` with the cancelling
terms removed by hand.)
Eps, X0, V and Score networks on another path see c_in = `path_scale`; k above is that scale, since a score is the
gradient of the log density of *its* state.  The error of eps at fixed z is b_F times the error of F, so every loss
follows from the row.  V, Flow and EDM rows are finite at sigma 0 and inf.  Eps and Score networks know nothing of x
at sigma inf, an X0 network nothing of eps at sigma 0: asking them is an error, which is all there is to the
"zero terminal SNR" trap.  Sources: 2206.00364 (EDM, sec. 5), 2202.00512 (v), 2303.00848 (app. D).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from logsnr.errors import unknown
from logsnr.noise import PATHS, Level, Path, flow_time, logsnr_from_sigma, path_scale
from logsnr.timesteps import TimestepTable


class Label(Protocol):
    """How a network is told the noise level: any function of sigma, for floats and tensors alike."""

    def __call__(self, sigma: Level, /) -> Level:
        """The value passed to the network as its timestep."""
        ...


def label_logsnr(sigma: Level) -> Level:
    """The log-SNR itself (VDM, VDM++)."""
    return logsnr_from_sigma(sigma)


def label_edm(sigma: Level) -> Level:
    """EDM's c_noise, ln(sigma)/4."""
    return logsnr_from_sigma(sigma) * -0.125


def label_flow(sigma: Level) -> Level:
    """1000 t with t = sigma/(1 + sigma), the timesteps of SD3 and Flux; finite at both ends."""
    return flow_time(sigma) * 1000


LABELS: dict[str, Label] = {
    "logsnr": label_logsnr,
    "edm": label_edm,
    "flow": label_flow,
    "ddpm": TimestepTable.ddpm(),
    "stable-diffusion": TimestepTable.stable_diffusion(),
    "cosine": TimestepTable.cosine(),
}
"""Labels by name: what a checkpoint's JSON stores."""


@dataclass(frozen=True, kw_only=True)
class Prediction(ABC):
    """One row of the table: the meaning of a network's output at every noise level.

    Rows are functions of the amplitudes (alpha, s) of `noise.alpha_s`: pairs of host floats for a float level
    (which raise ValueError where the row is undefined), pairs of tensors for a tensor level (inf or nan there:
    a value on a device is never read back).

    Args:
        label: a name of `LABELS`, a `TimestepTable`, or any function of sigma.

    Raises:
        LogsnrError: if `label` or `path` is not a known name.
    """

    name: ClassVar[str]
    finite_at_inf: ClassVar[bool] = True
    """Whether the row is defined at sigma inf (pure noise, zero terminal SNR)."""
    label: str | Label = "logsnr"

    def __post_init__(self) -> None:
        if isinstance(self.label, str) and self.label not in LABELS:
            raise unknown("label", self.label, LABELS, "; or pass a function of sigma")

    def timestep(self, sigma: Level) -> Level:
        """The label of a noise level: the value the network is told."""
        label = LABELS[self.label] if isinstance(self.label, str) else self.label
        return label(sigma)

    @abstractmethod
    def c_in(self, alpha: Level, s: Level) -> Level:
        """Input scale: the network sees `c_in z`."""

    @abstractmethod
    def x0_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        """(a_z, a_F) with x0 = a_z z + a_F F."""

    @abstractmethod
    def eps_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        """(b_z, b_F) with eps = b_z z + b_F F."""

    @abstractmethod
    def target_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        """(t_x, t_e) with the regression target F* = t_x x + t_e eps."""

    def _ratio(self, a: Level, b: Level, what: str, end: str) -> Level:
        if not isinstance(b, Tensor) and b == 0:
            raise ValueError(
                f"{what} of {self.name!r} prediction is undefined at sigma = {end}: "
                "use a finite, positive sigma, or a v, flow or EDM network"
            )
        return a / b


@dataclass(frozen=True, kw_only=True)
class _OnPath(Prediction):
    """A prediction whose network sees the state of a chosen path (`"vp"`, `"ve"` or `"flow"`)."""

    path: Path = "vp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path not in PATHS:
            raise unknown("path", self.path, PATHS)

    def c_in(self, alpha: Level, s: Level) -> Level:
        return path_scale(self.path, alpha, s)


@dataclass(frozen=True, kw_only=True)
class Eps(_OnPath):
    """F = eps, the noise (DDPM, Stable Diffusion 1 and SDXL)."""

    name: ClassVar[str] = "eps"
    finite_at_inf: ClassVar[bool] = False

    def x0_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        inverse = self._ratio(alpha * 0 + 1, alpha, "x0", "inf")
        return inverse, -s * inverse

    def eps_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return alpha * 0, alpha * 0 + 1

    def target_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return alpha * 0, alpha * 0 + 1


@dataclass(frozen=True, kw_only=True)
class X0(_OnPath):
    """F = x, the clean sample ("sample" prediction in diffusers)."""

    name: ClassVar[str] = "x0"

    def x0_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return alpha * 0, alpha * 0 + 1

    def eps_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        inverse = self._ratio(alpha * 0 + 1, s, "eps", "0")
        return inverse, -alpha * inverse

    def target_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return alpha * 0 + 1, alpha * 0


@dataclass(frozen=True, kw_only=True)
class V(_OnPath):
    """F = alpha eps - s x, the angular velocity of the VP circle (2202.00512)."""

    name: ClassVar[str] = "v"

    def x0_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return alpha, -s

    def eps_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return s, alpha

    def target_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return -s, alpha


@dataclass(frozen=True, kw_only=True)
class Flow(_OnPath):
    """F = eps - x, the velocity of the flow path (2209.03003; SD3, Flux); `reverse=True` for x - eps."""

    name: ClassVar[str] = "flow"
    path: Path = "flow"
    label: str | Label = "flow"
    reverse: bool = False

    def x0_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        n = alpha + s
        return 1 / n, self._sign * -s / n

    def eps_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        n = alpha + s
        return 1 / n, self._sign * alpha / n

    def target_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        one = alpha * 0 + self._sign
        return -one, one

    @property
    def _sign(self) -> int:
        return -1 if self.reverse else 1


@dataclass(frozen=True, kw_only=True)
class EDM(Prediction):
    """F of EDM's preconditioning: unit-variance input, target and effective error at every noise level.

    Args:
        sigma_data: standard deviation d of the data, in the units of x.

    Raises:
        ValueError: if `sigma_data` is not positive and finite.
    """

    name: ClassVar[str] = "edm"
    label: str | Label = "edm"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data = {self.sigma_data}: the data's standard deviation must be in (0, inf)")

    def c_in(self, alpha: Level, s: Level) -> Level:
        return 1 / _sqrt(self._n2(alpha, s))

    def x0_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        n2, d = self._n2(alpha, s), self.sigma_data
        return d * d * alpha / n2, s * d / _sqrt(n2)

    def eps_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        n2 = self._n2(alpha, s)
        return s / n2, -alpha * self.sigma_data / _sqrt(n2)

    def target_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        n, d = _sqrt(self._n2(alpha, s)), self.sigma_data
        return s / (d * n), -alpha * d / n

    def _n2(self, alpha: Level, s: Level) -> Level:
        d2 = self.sigma_data**2
        return s * s + alpha * alpha * d2


@dataclass(frozen=True, kw_only=True)
class Score(_OnPath):
    """F = -eps/(k s), the gradient of the log density of the path's noisy state (2011.13456)."""

    name: ClassVar[str] = "score"
    finite_at_inf: ClassVar[bool] = False

    def x0_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        inverse = self._ratio(alpha * 0 + 1, alpha, "x0", "inf")
        return inverse, self.c_in(alpha, s) * s * s * inverse

    def eps_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return alpha * 0, -self.c_in(alpha, s) * s

    def target_row(self, alpha: Level, s: Level) -> tuple[Level, Level]:
        return alpha * 0, self._ratio(alpha * 0 - 1, self.c_in(alpha, s) * s, "the target", "0")


def _sqrt(value: Level) -> Level:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


PREDICTIONS: dict[str, type[Prediction]] = {kind.name: kind for kind in (Eps, X0, V, Flow, EDM, Score)}
"""Predictions by name: what recipes and checkpoints say."""
