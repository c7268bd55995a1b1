"""Levels: the noise levels that a training script can ask for, from its scheduler's config, and sums over them.

A script names a level by a timestep.  Betas (DDPM, SD, SDXL) have T integers; a flow (SD3, Flux) has T numbers between
0 and T, `shift` moving them, the last of them pure noise; or, continuous, any number in between.  EDM and SVD know no
table: their timestep is ln(sigma)/4.

On T levels an integral over log-SNR is a sum.  Level i answers for its cell, from halfway to the one neighbour to
halfway to the other, cut to [lo, hi]; the first and last cells end at their level, and halfway to pure noise is half
the neighbour's alpha/s.  Of all errors that of v, (1 + e^-lambda) E, is smooth and finite at both ends; taken as
constant on each cell, whatever the network predicts,

    1/2 int w E dlambda   ->   1/2 sum_i W_i (1 + e^-lambda_i) E_i,        W_i = int_cell w sigmoid(lambda) dlambda

    p_i = int_cell p dlambda / sum of all
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.adapters.diffusers.config import PREDICTIONS, Noising, noising, stated_prediction
from logsnr.errors import LogsnrError, unknown
from logsnr.noise import alpha_s_from_logsnr
from logsnr.predictions import EDM, Prediction
from logsnr.schedules import Schedule
from logsnr.weightings import Weighting


class _Config(dict[str, Any]):
    """A config in which what is not said is None."""

    def __missing__(self, key: str) -> None:
        return None


DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "snr_shift_scale": 1.0,
}
"""What a config that does not say so means: diffusers' DDPMScheduler."""

NODES = 6
"""Gauss-Legendre nodes per half cell."""

PURE_NOISE = -80.0
"""Log-SNR from which rows of predictions are proportional to their limit at -inf, to all digits."""


@dataclass(frozen=True)
class Levels:
    """The levels of a table.

    Attributes:
        labels: `[n]` timesteps as the script names them: int64, or float32 for flows.
        logsnr: `[n]` float64, decreasing; the last may be -inf.
        target: the meaning of what the script's loss compares.
    """

    labels: Tensor
    logsnr: Tensor
    target: Prediction

    @cached_property
    def edges(self) -> Tensor:
        """`[n + 1]` log-SNRs between the cells, decreasing; the first and last cells end at their level."""
        x = self.logsnr
        middle = 0.5 * (x[1:] + x[:-1])
        if bool(x[-1] == -math.inf):
            middle[-1] = x[-2] - 2 * math.log(2)
        return torch.cat([x[:1], middle, x[-1:]])

    def cells(self, lo: float, hi: float, device: torch.device) -> Cells:
        """The cells within log-SNR [lo, hi].

        Raises:
            LogsnrError: if no cell lies there, or pure noise is asked of a target that knows nothing of x there.
        """
        x = self.logsnr
        infinite = bool(x[-1] == -math.inf)
        upper, lower = self.edges[:-1], self.edges[1:]
        if not (float(x[0]) > lo and float(x[-1]) < hi):
            raise _no_overlap((lo, hi), (float(x[-1]), float(x[0])))
        if infinite and lo < float(upper[-1]) and not self.target.finite_at_inf:
            raise LogsnrError(
                f"a loss of {self.target.name} at pure noise is about nothing: give the objective a range that ends "
                f"above log-SNR {float(upper[-1]):.3g}, not at {lo:g}, or another target"
            )
        # The level itself, or the finite end of its cell.
        place = torch.where(x.isinf(), upper, x)
        at, share = _gauss(NODES)
        halves = []
        for one, two in ((place, upper), (lower, place)):
            one, two = one.clamp(lo, hi)[:, None], two.clamp(lo, hi)[:, None]
            halves.append((one + (two - one) * at, (two - one) * share))
        nodes, weights = (torch.cat(pair, 1) for pair in zip(*halves, strict=True))
        if infinite:
            # In r = alpha/s = exp(lambda/2), dlambda = 2 dr/r.
            top, least = math.exp(0.5 * min(max(float(upper[-1]), lo), hi)), math.exp(0.5 * lo)
            at, share = _gauss(2 * NODES)
            r = least + (top - least) * at
            nodes[-1], weights[-1] = 2 * r.log(), 2 * (top - least) * share / r
        noisy = x.clamp(min=PURE_NOISE)
        per_v = b2_of(self.target, noisy) / torch.sigmoid(noisy)
        return Cells(*(v.to(device) for v in (self.edges, nodes, weights, place, per_v)))


@dataclass(frozen=True)
class Cells:
    """Cells of levels, as quadrature.

    Attributes:
        edges: `[n + 1]` log-SNRs between the cells, decreasing; not cut to the range.
        nodes: `[n, k]` log-SNRs of a quadrature.
        weights: `[n, k]` of it; 0 outside the range.
        logsnr: `[n]` the levels; for pure noise the finite end of its cell.
        per_v: `[n]` squared error of v per unit of the target's, at the level.
    """

    edges: Tensor
    nodes: Tensor
    weights: Tensor
    logsnr: Tensor
    per_v: Tensor

    @property
    def per_eps(self) -> Tensor:
        """Squared error of eps at `logsnr` per unit of the target's `[n]`."""
        return self.per_v * torch.sigmoid(self.logsnr)

    def shares(self, schedule: Schedule) -> Tensor:
        """The density's share in each cell `[n]`, normalised."""
        p = schedule.mass(self.edges.flip(0)).flip(0)
        return p / p.sum()

    def counts(self, weighting: Weighting) -> Tensor:
        """int w E over each cell `[n]`, per unit of the target's error there."""
        log_value = weighting.log(self.nodes) + F.logsigmoid(self.nodes)
        return self.per_v * torch.where(self.weights > 0, self.weights * log_value.exp(), 0.0).sum(1)


@dataclass(frozen=True)
class Model:
    """The model that a training script trains.

    Attributes:
        noising: its prediction, its levels and how they are named.
        target: what the script's loss compares.
        shift: of a flow's timesteps.
    """

    noising: Noising
    target: Prediction
    shift: float

    @property
    def continuous(self) -> bool:
        """Whether there is no table at all (EDM, SVD)."""
        return self.noising.table is None and not self.noising.flow

    @cached_property
    def levels(self) -> Levels:
        """The table, timesteps and levels bit for bit the scheduler's.

        Raises:
            LogsnrError: if the model has none that a training script could look up.
        """
        table, T = self.noising.table, self.noising.steps
        if table is not None:
            return Levels(torch.arange(T), -2 * table.sigmas.log(), self.target)
        if not self.noising.flow or self.noising.inverted:
            raise LogsnrError("this scheduler has no table of training timesteps: pass continuous=True")
        t = torch.arange(1, T + 1, dtype=torch.float32) / T
        if self.shift != 1:
            t = self.shift * t / (1 + (self.shift - 1) * t)
        exact = t.double()
        return Levels(t * T, 2 * ((1 - exact) / exact).log(), self.target)

    def logsnr_range(self, timesteps: tuple[float, float], continuous: bool) -> tuple[float, float]:
        """(lo, hi) log-SNR of the timesteps from a first to a last one, which is left out unless it is the table's end.

        On a table these are the edges of cells, so that the parts of a range add up to the whole.

        Raises:
            LogsnrError: if there are none, or the model has no timesteps.
        """
        first, last = timesteps
        T = self.noising.steps
        if self.continuous or not 0 <= first < last <= T:
            known = "this scheduler has none" if self.continuous else f"give 0 <= first < last <= {T}"
            raise LogsnrError(f"timesteps = ({first:g}, {last:g}): {known}")
        if continuous:
            hi, lo = (math.inf if t == 0 else -math.inf if t == T else 2 * math.log((T - t) / t) for t in timesteps)
            return lo, hi
        labels, x = self.levels.labels, self.levels.logsnr
        inside = ((labels >= first) & ((labels < last) | (last == T))).nonzero().flatten()
        if not len(inside):
            raise LogsnrError(f"timesteps = ({first:g}, {last:g}): the scheduler has none there, give a wider range")
        edges = self.levels.edges
        a, b = int(inside[0]), int(inside[-1])
        return (-math.inf if b == len(x) - 1 else float(edges[b + 1])), (math.inf if a == 0 else float(edges[a]))


def model_of(scheduler: Any, target: str | Prediction | None = None) -> Model:
    """The model of a diffusers scheduler, or of its config.

    Args:
        scheduler: a scheduler, or its config as a mapping; diffusers itself is not needed.
        target: what the script's loss compares: a prediction type of diffusers ("epsilon", "v_prediction", "sample",
            "flow_prediction"), "edm", or any `Prediction`.  None: what the network predicts.

    Raises:
        LogsnrError: if the scheduler or the target is for another kind of training.
    """
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise LogsnrError(f"{type(scheduler).__name__} has no config: give a diffusers scheduler, or its config")
    name = str(config.get("_class_name", type(scheduler).__name__ if config is not scheduler else ""))
    stated = stated_prediction(name, config, complete=config is not scheduler)
    if stated is None:
        raise LogsnrError(
            f"{name or 'this config'} is not for an epsilon, v, sample, flow or EDM network (but for consistency "
            "models, codes, ...): such training is no weighted ELBO; give the scheduler of the teacher, or of the base "
            "model"
        )
    values = _Config({**DEFAULTS, **config, "prediction_type": stated})
    try:
        found = noising(values)
    except (ValueError, TypeError) as error:
        raise LogsnrError(f"{name or 'scheduler config'}: {error}") from error
    shift = values.get("shift") or values.get("flow_shift") or 1.0
    return Model(found, _target(target, found), 1.0 if values.get("use_dynamic_shifting") else float(shift))


def _target(target: str | Prediction | None, found: Noising) -> Prediction:
    if target is None:
        return found.prediction
    if isinstance(target, Prediction):
        return target
    known: dict[str, type[Prediction]] = {**PREDICTIONS, "edm": EDM}
    if target not in known:
        raise unknown("target", target, known, ", or a Prediction")
    return known[target]()


def b2_of(target: Prediction, logsnr: Tensor) -> Tensor:
    """b_F^2 at finite log-SNRs: the error of eps is b_F times that of the target."""
    return torch.as_tensor(target.eps_row(*alpha_s_from_logsnr(logsnr))[1], dtype=torch.float64).square()


def finite_range(model: Model, continuous: bool, within: tuple[float, float]) -> tuple[float, float]:
    """(lo, hi) log-SNRs that are trained: the model's levels within a range, pure noise left out.

    Raises:
        LogsnrError: if there are none.
    """
    if continuous:
        least, most = model.noising.sigma_range
        ends = -math.inf if most == math.inf else -2 * math.log(most), math.inf if not least else -2 * math.log(least)
    else:
        x = model.levels.logsnr
        ends = float(x[x.isfinite()][-1]), float(x[0])
    lo, hi = max(ends[0], within[0]), min(ends[1], within[1])
    if not lo < hi:
        raise _no_overlap(within, ends)
    return lo, hi


def _no_overlap(asked: tuple[float, float], there: tuple[float, float]) -> LogsnrError:
    return LogsnrError(
        f"the objective's noise levels, log-SNR [{asked[0]:g}, {asked[1]:g}], and the scheduler's, [{there[0]:.3g}, "
        f"{there[1]:.3g}], do not meet: give the objective a range that does"
    )


def _gauss(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    at, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy(0.5 * (1 + at)), torch.from_numpy(0.5 * weights)
