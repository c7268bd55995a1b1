"""Noise labels: does the model take sigma for c sigma?

A posterior mean has the least error of all functions of y = x + sigma eps.  So an ideal model that is told k sigma
where the noise is sigma errs least at k = 1, whatever the data, and one that takes sigma for c sigma at k = 1/c.  The
model is told k sigma in two ways: as a whole, with y as it is and x0 kept of its answer; and, where there is a network
to tell, by the network's label alone, everything around it as it is.  The way with the least error is the one that
undoes the mistake.

Errors at all k share x and eps, and every level counts relative to its own error, so that a few hundred samples tell c
to a percent.  It is a statement only where the model denoises at all: levels where no k makes it as good as a linear
denoiser are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Around, Denoiser, Estimate, NetworkDenoiser, noisy
from logsnr.evaluation.passport.card import LabelScan, Way
from logsnr.evaluation.passport.levels import Linear
from logsnr.evaluation.passport.meter import Meter, Samples
from logsnr.noise import Level, alpha_s
from logsnr.predictions import LABELS, Label

FACTORS = (0.75, 0.87, 1.0, 1.15, 1.33)
BETWEEN = (0.05, 3.0)
"""Noise levels of the scan, over sigma_data: below and above, all answers are nearly right under every label."""
LEVELS = 6
"""Levels of the scan."""
GROUPS = 16
"""Parts left out in turn for the standard error."""


class Relabelled(Around):
    """A model told k sigma where the noise is sigma.

    Args:
        denoiser: the model.
        factor: k.
        way: "model" (y as it is, x0 kept) or "label" (a network's label alone).

    Raises:
        ValueError: if there is no network to tell.
    """

    def __init__(self, denoiser: Denoiser, factor: float, way: Way) -> None:
        inner = network_of(denoiser) if way == "label" else None
        if way == "label" and inner is None:
            raise ValueError("way = 'label' needs a network: give a NetworkDenoiser, or take way = 'model'")
        super().__init__(denoiser if inner is None else _labelled(inner, factor))
        self.factor, self.way = factor, way
        self.trained_range = denoiser.trained_range

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        level = float(torch.as_tensor(sigma).reshape(-1)[0])
        if self.way == "label":
            estimate: Estimate = self.denoiser(z, level, **cond)
            return estimate
        (alpha, s), (alpha_, _) = alpha_s(level), alpha_s(self.factor * level)
        x0 = self.denoiser(z * (alpha_ / alpha), self.factor * level, **cond).x0
        return Estimate(x0, lambda: (z - alpha * x0) / s)


def network_of(denoiser: Denoiser) -> NetworkDenoiser | None:
    """The network denoiser itself; or a pipeline's, if neither a prompt nor guidance lies around it."""
    inner = getattr(denoiser, "plain", denoiser)
    if getattr(denoiser, "cond", None) or getattr(denoiser, "guided", inner) is not inner:
        return None
    return inner if isinstance(inner, NetworkDenoiser) else None


def scan_levels(declared: tuple[float, float], sigma_data: float) -> tuple[float, ...]:
    """Geometric levels of the scan, such that every k stays in the declared range; none if it is too short."""
    low = max(declared[0] / FACTORS[0], BETWEEN[0] * sigma_data)
    high = min(declared[1] / FACTORS[-1], BETWEEN[1] * sigma_data)
    return () if low >= high else tuple(low * (high / low) ** (i / (LEVELS - 1)) for i in range(LEVELS))


@torch.no_grad()
def scan_labels(
    meter: Meter, samples: Samples, sigmas: Sequence[float], linear: Linear, tolerance: float, chunk: int
) -> LabelScan | None:
    """The scan, over levels where the model denoises.

    Args:
        meter: the model.
        samples: clean samples and noise.
        sigmas: levels.
        linear: the linear denoiser.
        tolerance: a level counts if at some k the model's error is at most so many times the linear one's.
        chunk: samples at a time.

    Returns:
        None if nothing was finite.
    """
    ways: tuple[Way, ...] = ("model",) if network_of(meter.denoiser) is None else ("model", "label")
    models = [[Relabelled(meter.denoiser, k, way) for k in FACTORS] for way in ways]
    kept, errors = [], []
    for sigma in sigmas:
        parts, others = [], []
        for part in samples.chunks(chunk):
            z, x = noisy(part.x, part.eps, sigma), part.x.flatten(1).double()
            rows: list[Tensor] = []
            for w, k in ((w, k) for w in range(len(ways)) for k in range(len(FACTORS))):
                if w > 0 and FACTORS[k] == 1:  # told the truth, both ways are the model as it is
                    rows.append(rows[k])
                    continue
                x0 = meter.ask(models[w][k], z, sigma, part.cond).x0.flatten(1).double()
                rows.append((x0 - x).square().sum(1).cpu())
            parts.append(torch.stack(rows).view(len(ways), len(FACTORS), -1))
            y = (part.x + sigma * part.eps).flatten(1).float().cpu()
            others.append((linear.x0(y, sigma).double() - x.cpu()).square().sum(1))
        table, other = torch.cat(parts, 2), torch.cat(others)
        finite = table.isfinite().flatten(0, 1).all(0)
        if int(finite.sum()) < GROUPS:
            continue
        table, other = table[:, :, finite], other[finite]
        if float(table.mean(2).min()) <= tolerance * float(other.mean()):
            kept.append(sigma)
            errors.append(table)
    return _judge(kept, errors, ways) if errors else None


def _judge(sigmas: Sequence[float], errors: Sequence[Tensor], ways: tuple[Way, ...]) -> LabelScan:
    n = min(table.shape[2] for table in errors)
    middle = FACTORS.index(1.0)
    relative = torch.stack([t[:, :, :n] / t[0, middle].mean() for t in errors]).mean(0)  # [ways, factors, N]
    curves = relative.mean(2)
    way = min(range(len(ways)), key=lambda w: _least(curves[w])[1])
    enough = len(sigmas) >= 3
    return LabelScan(
        sigmas=tuple(sigmas),
        factors=FACTORS,
        way=ways[way],
        curve=tuple(curves[way].tolist()),
        factor=math.exp(-_least(curves[way])[0]) if enough else math.nan,
        stderr=_stderr(relative[way]) if enough else math.nan,
        per_level=tuple(math.exp(-_least(t[way].mean(1))[0]) for t in errors),
        per_level_stderr=tuple(_stderr(t[way]) for t in errors),
        at_edge=int(curves[way].argmin()) in (0, len(FACTORS) - 1),
    )


def _stderr(errors: Tensor) -> float:
    """Jackknife standard error of the least ln k of errors `[factors, N]`."""
    groups = torch.arange(errors.shape[1]) % GROUPS
    leave_out = torch.tensor([_least(errors[:, groups != g].mean(1))[0] for g in range(GROUPS)])
    return math.sqrt((GROUPS - 1) / GROUPS * float((leave_out - leave_out.mean()).square().sum()))


def _labelled(denoiser: NetworkDenoiser, factor: float) -> NetworkDenoiser:
    """The same network, told factor sigma."""
    prediction = denoiser.prediction
    label: Label = LABELS[prediction.label] if isinstance(prediction.label, str) else prediction.label

    def told(sigma: Level) -> Level:
        return label(sigma * factor)

    return NetworkDenoiser(
        denoiser.network,
        replace(prediction, label=told),
        shape=denoiser.shape,
        sigma_data=denoiser.sigma_data,
        trained_range=denoiser.trained_range,
    )


def _least(curve: Tensor) -> tuple[float, float]:
    """(ln k, value) at the least of a curve over FACTORS: the vertex of a parabola through its least three points."""
    logs = [math.log(k) for k in FACTORS]
    i = min(max(int(curve.argmin()), 1), len(logs) - 2)
    x = torch.tensor(logs[i - 1 : i + 2], dtype=torch.float64)
    c, b, a = torch.linalg.solve(torch.stack([x**0, x, x * x], 1), curve[i - 1 : i + 2].double()).tolist()
    best = min(max(-0.5 * b / a, logs[0]), logs[-1]) if a > 0 else logs[int(curve.argmin())]
    return best, c + b * best + a * best * best
