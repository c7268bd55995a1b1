"""Objectives: the weighted ELBO, one loss for every published diffusion objective.

    L_w(x) = 1/2 int w(lambda) E||eps_hat - eps||^2 dlambda
           = 1/2 E_{lambda ~ p, eps} [ w(lambda)/p(lambda) ||eps_hat - eps||^2 ]        (2303.00848, eq. 3.2 and 3.3)

The weighting w and the end points are the objective; the schedule p only decides how noisy its estimate is.  What the
network predicts does not matter either: E = ||eps_hat - eps||^2 follows from its prediction (denoiser.py).

| preset              | weighting        | schedule                     | usual prediction | paper              |
|---------------------|------------------|------------------------------|------------------|--------------------|
| ddpm                | implied: w = p   | Discrete(DDPM's table)       | Eps              | 2006.11239         |
| iddpm               | EpsCosine        | Cosine on [-20, 20]          | Eps              | 2102.09672         |
| v-cosine            | V                | Cosine on [-20, 20]          | V                | 2202.00512         |
| flow                | Flow             | FlowUniform on [-20, 20]     | Flow             | 2209.03003         |
| edm                 | EDM              | EDMTraining on [-20, 20]     | EDM              | 2206.00364         |
| vdm                 | ELBO             | Linear(-5, 13.3)             | Eps              | 2107.00630         |
| vdm++/sigmoid       | Sigmoid(2)       | Cosine on [-20, 20]          | V                | 2303.00848         |
| vdm++/edm-monotonic | EDMMonotonic     | Cosine on [-20, 20]          | V                | 2303.00848         |
| sd3                 | LogitNormalFlow  | LogitNormal(0, 1), [-20, 20] | Flow             | 2403.03206         |
| min-snr-5           | MinSNR(5)        | Cosine on [-20, 20]          | V                | 2303.09556         |
| ncsn                | ELBO             | Linear, sigma .01 ... 50     | Score, VE        | 2011.13456         |
| vp-sde              | implied: w = p   | VPLinear on [-10, 20]        | Eps              | 2011.13456         |
| p2                  | P2(1)            | Cosine on [-20, 20]          | Eps              | 2204.00227         |
| indi                | InDI             | FlowUniform on [-20, 20]     | X0               | 2303.11435         |
| edm2                | EDM(-0.4, 1)     | EDMTraining(-0.4, 1), +-20   | EDM              | 2312.02696         |

Unbounded schedules are cut at log-SNR +-20, so that every objective has end points (the cosine law keeps .99994 of its
mass, the normal ones all but 1e-12).  The vdm++ papers draw with `Adaptive`: WeightedELBO(w, Adaptive((lo, hi), w)).
EDM2 also divides by a learned exp(u): `uncertainty.Uncertainty`, in a recipe `uncertainty: true`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.errors import unknown
from logsnr.noise import sigma_from_logsnr
from logsnr.posterior import batch_posterior
from logsnr.predictions import Eps
from logsnr.schedules import Cosine, Discrete, EDMTraining, FlowUniform, Linear, LogitNormal, Schedule, VPLinear
from logsnr.timesteps import TimestepTable
from logsnr.weightings import (
    EDM,
    ELBO,
    P2,
    EDMMonotonic,
    EpsCosine,
    Flow,
    InDI,
    LogitNormalFlow,
    MinSNR,
    Sigmoid,
    V,
    Weighting,
    implied_by,
)

Target = Literal["sample", "batch"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveOutput:
    """One draw of an objective.

    Attributes:
        loss: `[B]`, 1/2 w/p ||eps_hat - eps||^2 in nats, summed over dimensions; carries the gradient.
        logsnr: `[B]`, float64, the noise levels.
        eps_error: `[B]`, ||eps_hat - eps||^2, detached.
        ratio: `[B]`, float64, w/p at those levels: the loss is ratio/2 times the error.
    """

    loss: Tensor
    logsnr: Tensor
    eps_error: Tensor
    ratio: Tensor


class WeightedELBO:
    """A weighting w, estimated with the draws of a schedule p.

    Args:
        weighting: what each noise level counts.
        schedule: how noise levels are drawn; its range is the objective's.
        name: what reports call it.
        target: "sample" regresses on the x that a state was made of, "batch" on the posterior mean among the batch
            (posterior.py): the same minimiser as the batch grows, less variance at every level.

    Raises:
        LogsnrError: if w is negative, not a number or infinite somewhere on that range, or zero everywhere.
    """

    def __init__(
        self, weighting: Weighting, schedule: Schedule, *, name: str = "custom", target: Target = "sample"
    ) -> None:
        weighting.check(*schedule.range)
        self.weighting = weighting
        self.schedule = schedule
        self.name = name
        self.target = target
        self._scales: dict[float, float] = {}

    def __repr__(self) -> str:
        return f"WeightedELBO({self.weighting!r}, {self.schedule!r}, name={self.name!r})"

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        *,
        cond: dict[str, Any] | None = None,
        generator: torch.Generator,
        rank: int = 0,
        world: int = 1,
    ) -> ObjectiveOutput:
        """Draw noise levels and noise, and form the loss.

        Args:
            denoiser: any `Denoiser`.
            x: data `[B, *shape]`.
            cond: conditions, each with one entry per sample.
            generator: source of levels and noise; on each rank its own.
            rank: this rank; levels are stratified over the batches of all ranks.
            world: number of ranks.
        """
        logsnr = self.schedule.sample(len(x), generator=generator, rank=rank, world=world)
        dtype = torch.promote_types(x.dtype, torch.float32)
        eps = torch.randn(x.shape, generator=generator, device=generator.device, dtype=dtype)
        return self.loss_at(denoiser, x, eps.to(x.device), logsnr, cond)

    def loss_at(
        self, denoiser: Denoiser, x: Tensor, eps: Tensor, logsnr: Tensor, cond: dict[str, Any] | None = None
    ) -> ObjectiveOutput:
        """The loss at given noise `eps [B, *shape]` and levels `logsnr [B]`: the part without chance.

        A level outside the schedule's range has p = 0 and an infinite loss.
        """
        # Data and network may be in half precision; states, targets and loss are not.
        dtype = torch.promote_types(x.dtype, torch.float32)
        level = logsnr.to(torch.float64)
        sigma = sigma_from_logsnr(level).to(dtype).to(x.device)
        ratio = (self.weighting.log(level) - self.schedule.log_density(level)).exp()
        x, eps = x.to(dtype), eps.to(dtype)
        if self.target == "batch":
            x, eps = batch_posterior(x, eps, sigma, cond)
        error = denoiser.eps_error(x, eps, sigma, **(cond or {}))
        loss = (0.5 * ratio).to(error.dtype).to(error.device) * error
        return ObjectiveOutput(loss=loss, logsnr=level, eps_error=error.detach(), ratio=ratio)

    def scale(self, dim: int, sigma_data: float = 1.0) -> float:
        """What the loss is worth: divide by it before clipping gradients or comparing objectives in a log.

        It is the loss of the best denoiser that knows only the data's standard deviation,

            1/2 dim int w(lambda) sigmoid(lambda + 2 ln sigma_data) dlambda        over the schedule's range,

        about where training starts, so loss/scale begins near 1 and falls.  It depends on w and the end points only, as
        the objective does.  (The plain dim int w is no such unit: e^(-lambda/2) weights levels at which nobody can err,
        and integrates to 4e4 over [-20, 20] for a loss of pi/2, so that no gradient divided by it would ever clip.)

        Args:
            dim: dimensions of a sample.
            sigma_data: standard deviation of the data.

        Raises:
            ValueError: if the integral diverges, as w = 1 does on an unbounded schedule.
        """
        if sigma_data not in self._scales:
            self._scales[sigma_data] = self._unit_scale(sigma_data)
        return dim * self._scales[sigma_data]

    def _unit_scale(self, sigma_data: float) -> float:
        lo, hi = self.schedule.range
        # Simpson's rule, fine enough for weightings with a corner; infinite ends are cut where weightings have decayed.
        x = torch.linspace(max(lo, -60.0), min(hi, 60.0), 40001, dtype=torch.float64)
        y = 0.5 * self.weighting(x) * torch.sigmoid(x + 2 * math.log(sigma_data))
        simpson = torch.ones_like(x)
        simpson[1:-1:2], simpson[2:-1:2] = 4, 2
        total = float((simpson * y).sum() * (x[1] - x[0]) / 3)
        ends = (float(y[0]) if math.isinf(lo) else 0.0) + (float(y[-1]) if math.isinf(hi) else 0.0)
        if not math.isfinite(total) or ends > 1e-9 * total:
            raise ValueError(f"{self!r} has no finite scale on {self.schedule.range}: truncate its schedule")
        return total

    def update(self, output: ObjectiveOutput, gradient: Tensor | None = None) -> None:
        """Let an adaptive schedule learn from a batch, after its loss was formed.

        Args:
            output: the batch.
            gradient: `[B]`, ||d loss_i/dtheta||^2 of its losses, e.g. of the last layer (`adaptive.OutputLayer`).
        """
        if gradient is not None:
            gradient = gradient.to(output.ratio) / output.ratio**2
        self.schedule.update(output.logsnr, output.eps_error, gradient)

    def state_dict(self) -> dict[str, Tensor]:
        """State of an adaptive schedule; empty for a fixed one."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.schedule.load_state_dict(state)


class Objectives(Mapping[str, WeightedELBO]):
    """Published objectives by name; each look-up makes a new one."""

    def __init__(self, makers: Mapping[str, Callable[[], tuple[Weighting, Schedule]]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> WeightedELBO:
        if name not in self._makers:
            raise unknown("objective", name, self._makers)
        weighting, schedule = self._makers[name]()
        return WeightedELBO(weighting, schedule, name=name)

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _ddpm() -> tuple[Weighting, Schedule]:
    schedule = Discrete(TimestepTable.ddpm())
    return implied_by(schedule, Eps()), schedule


def _cosine(weighting: Weighting) -> tuple[Weighting, Schedule]:
    return weighting, Cosine().truncate(-20, 20)


def _vp_sde() -> tuple[Weighting, Schedule]:
    schedule = VPLinear().truncate(-10, 20)
    return implied_by(schedule, Eps()), schedule


objectives = Objectives(
    {
        "ddpm": _ddpm,
        "iddpm": lambda: _cosine(EpsCosine()),
        "v-cosine": lambda: _cosine(V()),
        "flow": lambda: (Flow(), FlowUniform().truncate(-20, 20)),
        "edm": lambda: (EDM(), EDMTraining().truncate(-20, 20)),
        "vdm": lambda: (ELBO(), Linear(-5, 13.3)),
        "vdm++/sigmoid": lambda: _cosine(Sigmoid(2)),
        "vdm++/edm-monotonic": lambda: _cosine(EDMMonotonic()),
        "sd3": lambda: (LogitNormalFlow(), LogitNormal().truncate(-20, 20)),
        "min-snr-5": lambda: _cosine(MinSNR(5)),
        "ncsn": lambda: (ELBO(), Linear(-2 * math.log(50), -2 * math.log(0.01))),
        "vp-sde": _vp_sde,
        "p2": lambda: _cosine(P2()),
        "indi": lambda: (InDI(), FlowUniform().truncate(-20, 20)),
        "edm2": lambda: (EDM(-0.4, 1.0), EDMTraining(-0.4, 1.0).truncate(-20, 20)),
    }
)
"""Published objectives: `objectives["edm"]`."""


class _Shelf(ModuleType):
    """This module, as the mapping that it holds: `ls.objectives["edm"]` and `from logsnr.objectives import ...`."""

    def __getitem__(self, name: str) -> WeightedELBO:
        return objectives[name]

    def __contains__(self, name: object) -> bool:
        return name in objectives

    def __iter__(self) -> Iterator[str]:
        return iter(objectives)

    def __len__(self) -> int:
        return len(objectives)

    def __getattr__(self, name: str) -> Any:  # keys, values, items, get
        return getattr(objectives, name)


sys.modules[__name__].__class__ = _Shelf
