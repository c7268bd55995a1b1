"""Denoisers: one kind of model, D(z, sigma) -> estimates of x and eps from a noisy state.

    z = alpha x + s eps  (noise.py),      E = ||eps_hat - eps||^2 = b_F^2 ||F_hat - F*||^2  (predictions.py)

Everything downstream (objectives, samplers, likelihoods) sees a `Denoiser` and nothing else; a network becomes one
through a `Prediction`, a closed-form model is one (exact.py), guidance maps one to another.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from logsnr.errors import unknown
from logsnr.estimate import Estimate as Estimate
from logsnr.estimate import Lazy as Lazy
from logsnr.noise import alpha_s, covers, per_sample
from logsnr.pixels import Pixels
from logsnr.predictions import EDM, Prediction

_F = TypeVar("_F", bound=Callable[..., Any])


def _constant_when_compiled(function: _F) -> _F:
    """`torch.compiler.assume_constant_result`, without loading the whole compiler when this module is imported."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Denoiser(nn.Module, ABC):
    """A map (z, sigma, **cond) -> Estimate, with what others need to know of it.

    Attributes:
        shape: shape of one sample, without the batch axis.
        sigma_data: standard deviation of the data, in the units of x.
        trained_range: (smallest, largest) sigma at which the denoiser means anything.
        pixels: codec between x and stored images; None for latents, points and whatever is no image.
        card: what is on record of it (network, training, step, ...): empty unless it was loaded from a file.
        plans: sampling plans that were calibrated for it, by number of evaluations.
        start: the Gaussian start (`sampling.GaussianStart`) of those of them that need one.
    """

    shape: tuple[int, ...]
    sigma_data: float
    trained_range: tuple[float, float]
    pixels: Pixels | None = None
    card: Mapping[str, Any] = MappingProxyType({})
    plans: Mapping[int, Any] = MappingProxyType({})
    start: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._facts())})"

    def _facts(self) -> list[str]:
        """What one line says of it."""
        return [str(tuple(self.shape)), "sigma {:.4g} ... {:.4g}".format(*self.trained_range)]

    @abstractmethod
    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        """Estimate x and eps.

        Args:
            z: canonical noisy states `[B, *shape]`, float32 or float64.
            sigma: noise-to-signal ratio, one float for the batch or a tensor `[B]`.
            cond: conditions, each with one entry per sample.
        """

    def eps_error(self, x: Tensor, eps: Tensor, sigma: float | Tensor, **cond: Any) -> Tensor:
        """E = ||eps_hat - eps||^2 at z = alpha x + s eps: `[B]`, summed over dimensions."""
        estimate: Estimate = self(noisy(x, eps, sigma), sigma, **cond)
        return (estimate.eps - eps).flatten(1).square().sum(1)

    def encode(self, images: Tensor) -> Tensor:
        """Samples x `[B, *shape]` of stored images (uint8), through the codec.

        Raises:
            ValueError: if the denoiser has no codec, or the images do not fit it.
        """
        return self._own_pixels.encode(images)

    def decode(self, x: Tensor) -> Tensor:
        """Stored images (uint8) nearest to samples x.

        Raises:
            ValueError: if the denoiser has no codec.
        """
        return self._own_pixels.decode(x)

    @property
    def _own_pixels(self) -> Pixels:
        if self.pixels is None:
            raise ValueError(
                "this denoiser has no pixel codec: give it one, pixels=Pixels(grey_levels), or work with x"
            )
        return self.pixels

    @property
    def device(self) -> torch.device:
        """Where its numbers lie, and where states are brought: that of its first parameter or buffer, else the CPU."""
        numbers = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if numbers is None else numbers.device

    @property
    def dim(self) -> int:
        """Number of dimensions of one sample."""
        return math.prod(self.shape)

    @property
    def finite_at_inf(self) -> bool:
        """Whether the denoiser answers at sigma inf, from pure noise."""
        return True

    def covers(self, low: float, high: float) -> bool:
        """Whether it was trained on noise levels from low to high; one percent either way is rounding.

        Sigma inf counts as 100, where the signal left in z is below one percent.
        """
        return covers(self.trained_range, min(low, 100.0), 100.0 if high == math.inf else high)

    def cost(self, sigma: float) -> int:
        """Network evaluations that one answer at `sigma` takes, per sample (a guided denoiser: 2)."""
        return 1

    def check_cond(self, cond: Mapping[str, Any]) -> None:
        """Refuse conditions that it does not take, before it is asked; `sample` calls this once.

        Raises:
            ValueError: in words.
        """

    @property
    def sampling_range(self) -> tuple[float, float]:
        """The part of `trained_range` that sampling needs: from sigma_data/250 to sigma_data max(160, 26 sqrt(D)).

        A run begins from pure noise, which the data's true states at sigma are not; they are

            1/2 sum [(lam_i + m_i^2)/sigma^2 - ln(1 + lam_i/sigma^2)]  <=  u - ln(1 + u)/2,   u = D (sigma_data/sigma)^2

        nats away from it, whatever the spectrum lam, if the mean m has no more energy than the data vary: .0007 nats at
        u = .0015, at any size D.  The .009 nats of a start at 160 sigma_data, of 28 x 28 numbers, can still be seen in
        few-step samples.  With data at hand the passport measures the sum itself.
        """
        lo, hi = self.trained_range
        return max(lo, self.sigma_data / 250), min(hi, self.sigma_data * max(160.0, 26 * math.sqrt(self.dim)))


class Around(Denoiser):
    """A denoiser around another, which answers for all that is not overridden.

    Attributes:
        denoiser: the one inside.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape = tuple(denoiser.shape)
        self.sigma_data, self.trained_range = denoiser.sigma_data, denoiser.trained_range
        self.pixels, self.card, self.plans = denoiser.pixels, dict(denoiser.card), dict(denoiser.plans)
        self.start = denoiser.start

    def _facts(self) -> list[str]:
        return [repr(self.denoiser)]

    def check_cond(self, cond: Mapping[str, Any]) -> None:
        self.denoiser.check_cond(cond)

    @property
    def finite_at_inf(self) -> bool:
        return self.denoiser.finite_at_inf

    def cost(self, sigma: float) -> int:
        return self.denoiser.cost(sigma)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        estimate: Estimate = self.denoiser(z, sigma, **cond)
        return estimate

    def encode(self, images: Tensor) -> Tensor:
        return self.denoiser.encode(images)

    def decode(self, x: Tensor) -> Tensor:
        return self.denoiser.decode(x)


class NetworkDenoiser(Denoiser):
    """A network seen through its `Prediction`.

    The network is called as `network(c_in z, label [B], **cond)` and answers with a tensor or with an object whose
    `.sample` is one (diffusers models).  It may run in half precision; states, targets and losses stay in at least
    float32.

    Args:
        network: the module to call.
        prediction: the meaning of its output.
        shape: shape of one sample, e.g. (3, 32, 32).
        pixels: codec of the stored images, None for latents or non-image data.
        sigma_data: standard deviation of the data; EDM predictions bring their own.
        trained_range: (smallest, largest) sigma it was trained on.

    Raises:
        ValueError: if `trained_range` is not an increasing pair of non-negative numbers.
    """

    def __init__(
        self,
        network: nn.Module,
        prediction: Prediction,
        *,
        shape: tuple[int, ...],
        pixels: Pixels | None = None,
        sigma_data: float | None = None,
        trained_range: tuple[float, float] = (0.002, 157.0),
    ) -> None:
        super().__init__()
        lo, hi = trained_range
        if not 0 <= lo < hi:
            raise ValueError(
                f"trained_range = {trained_range}: give (smallest, largest) sigma with 0 <= smallest < largest"
            )
        self.network = network
        self.prediction = prediction
        self.shape = tuple(shape)
        self.pixels = pixels
        own = prediction.sigma_data if isinstance(prediction, EDM) else 0.5
        self.sigma_data = own if sigma_data is None else float(sigma_data)
        self.trained_range = (float(lo), float(hi))
        self.card = {}
        self._rows: dict[float, tuple[Prediction, tuple[float, float, float, float]]] = {}

    @property
    def finite_at_inf(self) -> bool:
        return self.prediction.finite_at_inf

    @property
    def classes(self) -> int:
        """Number of classes of a class-conditional network; 0 for another."""
        config = getattr(self.network, "config", None)
        return self.card.get("classes") or getattr(config, "classes", 0) or getattr(config, "num_class_embeds", 0) or 0

    def _facts(self) -> list[str]:
        told = [type(self.network).__name__, f"{self.prediction.name} prediction", str(self.shape)]
        told += [f"{self.classes} classes"] if self.classes else []
        return told + super()._facts()[1:]

    def check_cond(self, cond: Mapping[str, Any]) -> None:
        takes = _conditions(self.network)
        if takes is not None:
            for name in cond:
                if name not in takes:
                    raise unknown("condition", name, takes, " (this network takes none)" * (not takes))
            missing = [name for name, needed in takes.items() if needed and name not in cond]
            if missing:
                raise ValueError(f"this network needs {', '.join(missing)}: give cond={{{missing[0]!r}: ...}}")
        labels, config = cond.get("class_labels"), getattr(self.network, "config", None)
        if not self.classes or not isinstance(labels, Tensor) or labels.is_meta or labels.is_floating_point():
            return
        null = self.card.get("null_class", getattr(config, "null_class", None))
        wrong = labels[(labels < 0) | (labels >= self.classes)].tolist()  # read once, before the first step
        wrong = [label for label in wrong if label != null]
        if wrong:
            none = "" if null is None else f", and {null} for none"
            raise ValueError(f"class_labels hold {wrong[0]}: this network has classes 0 ... {self.classes - 1}{none}")

    def raw(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Tensor:
        """The network's own output F `[B, *shape]`, in the dtype of z."""
        if isinstance(sigma, Tensor):
            c_in: float | Tensor = per_sample(self.prediction.c_in(*alpha_s(sigma)), z)
            labels = torch.as_tensor(self.prediction.timestep(sigma), dtype=z.dtype, device=z.device).expand(len(z))
        else:
            _, _, c_in, label = self._host_row(sigma)
            labels = z.new_full((z.shape[0],), label)
        network = self.network
        parameter = _first_parameter(network)
        dtype = z.dtype if parameter is None else parameter.dtype
        scaled = z if not isinstance(c_in, Tensor) and c_in == 1 else c_in * z
        # Labels keep the state's precision: in bfloat16 timestep 999 would be 1000.
        out = network(scaled if dtype == z.dtype else scaled.to(dtype), labels, **cond)
        out = out if isinstance(out, Tensor) else out.sample
        return out if out.dtype == z.dtype else out.to(z.dtype)

    @_constant_when_compiled
    def _host_row(self, sigma: float) -> tuple[float, float, float, float]:
        """(alpha, s, c_in, label) of a host noise level, remembered: a table's label costs more than a step."""
        known = self._rows.get(sigma)
        if known is not None and known[0] is self.prediction:
            return known[1]
        alpha, s = alpha_s(sigma)
        row = (alpha, s, self.prediction.c_in(alpha, s), self.prediction.timestep(sigma))
        if len(self._rows) >= 4096:
            self._rows.clear()
        self._rows[sigma] = (self.prediction, row)
        return row

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s = alpha_s(sigma) if isinstance(sigma, Tensor) else self._host_row(sigma)[:2]
        raw = self.raw(z, sigma, **cond)
        row = self.prediction

        def velocity() -> Tensor:
            (a_z, a_F), (b_z, b_F) = row.x0_row(alpha, s), row.eps_row(alpha, s)
            return _combine((b_z - a_z, b_F - a_F), z, raw)

        return Estimate(
            lambda: _combine(row.x0_row(alpha, s), z, raw),
            lambda: _combine(row.eps_row(alpha, s), z, raw),
            velocity,
        )

    def eps_error(self, x: Tensor, eps: Tensor, sigma: float | Tensor, **cond: Any) -> Tensor:
        """E through F-targets: b_F^2 ||F_hat - F*||^2 keeps float32 accuracy at every noise level."""
        alpha, s = alpha_s(sigma)
        target = _combine(self.prediction.target_row(alpha, s), x, eps)
        error = (self.raw(noisy(x, eps, sigma), sigma, **cond) - target).flatten(1).square().sum(1)
        return self.prediction.eps_row(alpha, s)[1] ** 2 * error


def _conditions(network: nn.Module) -> dict[str, bool] | None:
    """Names of the conditions that a network takes, and whether it needs them; None where nothing says so."""
    own = network.__dict__.get("forward")
    return _parameters(type(network).forward, 3) if own is None else _parameters(own, 2)


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any], positions: int) -> dict[str, bool] | None:
    """The parameters behind the first few, and whether each must be given."""
    try:
        found = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in found):
        return None
    return {p.name: p.default is p.empty for p in found[positions:]}


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    """`next(module.parameters(), None)`, without the walk that makes it cost more than a kernel."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None


def noisy(x: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
    """The canonical noisy state z = alpha x + s eps `[B, *shape]`, in at least float32."""
    return _combine(alpha_s(sigma), x, eps)


def _combine(row: tuple[float | Tensor, float | Tensor], first: Tensor, second: Tensor) -> Tensor:
    """c_1 first + c_2 second; host coefficients that are 0 or 1 cost nothing."""
    c1, c2 = row
    if isinstance(c1, Tensor) or isinstance(c2, Tensor):
        return per_sample(c1, first) * first + per_sample(c2, first) * second
    if c1 == 0:
        return second if c2 == 1 else second * c2
    if c2 == 0:
        return first if c1 == 1 else first * c1
    return (first * c1).add_(second, alpha=c2)
