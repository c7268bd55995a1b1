"""Loops: a weighted ELBO, adaptive ones included, in a training script that is not ours.

    loop = LoopObjective("vdm++/sigmoid", noise_scheduler, adaptive=True)
    ...
    draw = loop.draw(len(latents), generator=generator, device=latents.device)     # was: torch.randint
    noisy = noise_scheduler.add_noise(latents, noise, draw.timesteps)
    ...
    loss = loop.loss(draw, model_pred, target)                                     # was: F.mse_loss

The script's loss M = ||F_hat - F*||^2 is that of whatever its network predicts, and the error of eps is b_F times it
(predictions.py).  So the weight that makes its expectation the weighted ELBO is, at a level drawn with density p,

    weight = 1/2 w b_F^2/p            E[weight M] = 1/2 int w E dlambda = L_w

and on a table the same with cells in place of points (timesteps.py): L_w is a sum over the scheduler's timesteps.
A script that sums M over dimensions gets L_w in nats, one that averages gets nats per dimension.  p may adapt: the
losses given back are turned into errors of eps, as `Schedule.update` wants them.  By default p ~ w E; `importance` has
the other two currencies of an adaptive density.  The gradient's needs a network to watch: its last layer's norms are
read off between `draw` and `loss`, before the script's backward pass, and turned into those of E/2 likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from logsnr.adapters.diffusers.loops.timesteps import Cells, Model, b2_of, finite_range, model_of
from logsnr.errors import LogsnrError, one_line, unknown
from logsnr.gradients import OutputLayer
from logsnr.noise import sigma_from_logsnr
from logsnr.objectives import WeightedELBO, objectives
from logsnr.predictions import Prediction
from logsnr.schedules.adaptive import IMPORTANCES, Adaptive, Importance
from logsnr.schedules.base import uniforms

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Noise levels for one batch.

    Attributes:
        timesteps: `[B]` what the scheduler and the network are told: int64 for tables of betas, float32 for flows.
        weight: `[B]` float32, what each sample's loss counts.
        logsnr: `[B]` float64, the levels; for pure noise the finite end of its cell.  On the generator's device.
        eps_factor: `[B]` float64, the error of eps at `logsnr` per unit of loss, b_F^2.  On the generator's device.
    """

    timesteps: Tensor
    weight: Tensor
    logsnr: Tensor
    eps_factor: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, part: slice) -> Draw:
        """The levels of a part of the batch: `draw[:n]` of the images, `draw[n:]` of those that preserve a prior."""
        return Draw(
            timesteps=self.timesteps[part],
            weight=self.weight[part],
            logsnr=self.logsnr[part],
            eps_factor=self.eps_factor[part],
        )


class LoopObjective:
    """A `WeightedELBO` as timesteps and weights for the loss that a training script computes.

    Args:
        objective: a `WeightedELBO`, or the name of a preset.  Its range and the scheduler's levels are intersected.
        scheduler: the script's diffusers scheduler, or its config as a mapping (which needs no diffusers).
        target: what the loss compares, where that is not what the config says the network predicts: a prediction type
            of diffusers ("sample" for the SD3 scripts' default, `--precondition_outputs 1`), or any `Prediction`.
        adaptive: let p adapt: the objective's weighting with an `Adaptive` schedule on the range that is trained.
        importance: what it adapts to: "error" (the default) or "gradient".
        network: for the gradient: the network that the script trains, bare or wrapped, or an `OutputLayer` of it.  It
            must run once between `draw` and `loss`; without one, give `update` the norms.
        timesteps: (first, last) of a model that is asked on a part of them: (875, 1000) for Wan 2.2's expert of high
            noise, (0, 875) for the other.  The last is not drawn, but for the table's own end; what both train adds up.
        continuous: for flows, draw any time instead of one of the scheduler's timesteps.
        scaled: divide by what the loss of a denoiser is that knows only the data's standard deviation, so that it
            starts near 1 and the script's gradient clipping keeps its meaning.
        sigma_data: that standard deviation; also the start of an adaptive p.
        rank: this process.
        world: number of processes (times accumulation steps); levels are stratified over the batches of all.

    Raises:
        LogsnrError: if the scheduler or target is for another kind of training, the ranges do not meet, the weighting
            is negative, infinite or zero everywhere on them, or importance and network do not fit each other.
    """

    def __init__(
        self,
        objective: WeightedELBO | str,
        scheduler: Any,
        *,
        target: str | Prediction | None = None,
        adaptive: bool = False,
        importance: Importance | None = None,
        network: nn.Module | OutputLayer | None = None,
        timesteps: tuple[float, float] | None = None,
        continuous: bool = False,
        scaled: bool = False,
        sigma_data: float = 1.0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.objective = objectives[objective] if isinstance(objective, str) else objective
        self.model = model_of(scheduler, target)
        self.rank, self.world = rank, world
        if continuous and self.model.noising.table is not None:
            raise LogsnrError("continuous=True: a network on a table of betas knows its T timesteps only; leave it out")
        self.continuous = continuous or self.model.continuous
        _check_importance(importance, adaptive)
        if timesteps is not None:
            ends = self.model.logsnr_range(timesteps, self.continuous)
            self.objective = _cut(self.objective, ends)
        if adaptive:
            lo, hi = finite_range(self.model, self.continuous, self.objective.schedule.range)
            w = self.objective.weighting
            # Losses come summed or averaged over dimensions: the first batch says which.
            adapting = Adaptive((lo, hi), w, importance=importance or "error", sigma_data=sigma_data, dim=None)
            self.objective = WeightedELBO(w, adapting, name=self.objective.name)
        schedule = self.objective.schedule
        self._by_gradient = isinstance(schedule, Adaptive) and schedule.importance == "gradient"
        self._layer = self._watched(network)
        self._cells: dict[torch.device, tuple[Cells, Tensor, Tensor]] = {}
        self._fixed: Tensor | None = None
        self._unit, self._drawn = 1.0, 0
        if self.continuous:
            self.objective = _within(self.model, self.objective)
        else:
            self._table(torch.device("cpu"))
        if scaled:
            self._unit = 1 / self._scale(sigma_data)

    def __repr__(self) -> str:
        where = "continuous times" if self.continuous else f"{len(self.model.levels.labels)} timesteps"
        return f"LoopObjective({self.objective!r}, {where}, loss of {self.model.target.name})"

    def draw(self, n: int, *, generator: torch.Generator, device: torch.device | str | None = None) -> Draw:
        """Draw the levels of a batch, stratified over it (and over all ranks); each alone follows p.

        Args:
            n: samples on this rank.
            generator: source of randomness; seed it differently on each rank.
            device: where timesteps and weights go; None for the generator's.
        """
        self._drawn = n
        if self._layer is not None:
            self._layer.watch()
        if self.continuous:
            logsnr = self.objective.schedule.sample(n, generator=generator, rank=self.rank, world=self.world)
            ratio = self.objective.weighting.log(logsnr) - self.objective.schedule.log_density(logsnr)
            factor = b2_of(self.model.target, logsnr)
            weight = 0.5 * ratio.exp() * factor
            timesteps: Tensor = self.model.noising.prediction.timestep(sigma_from_logsnr(logsnr)).float()
        else:
            cells, labels, _ = self._table(generator.device)
            p = self.probabilities(generator.device)
            u = uniforms(n, generator=generator, rank=self.rank, world=self.world)
            cdf = p.cumsum(0)
            # The first level whose cdf exceeds u: never one of probability 0.
            i = torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=len(p) - 1)
            weight, logsnr, factor = self.weights(generator.device)[i], cells.logsnr[i], cells.per_eps[i]
            timesteps = labels[i]
        weight = (weight * self._unit).to(device, torch.float32) if device else (weight * self._unit).float()
        return Draw(
            timesteps=timesteps.to(device) if device else timesteps, weight=weight, logsnr=logsnr, eps_factor=factor
        )

    def loss(
        self,
        draw: Draw,
        prediction: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The loss to call `backward` on: mean over the batch of weight x squared error, formed in float32.

        An adaptive p learns from it, unless gradients are off (validation).

        Args:
            draw: the levels at which `prediction` was made.
            prediction: the network's output `[B, ...]`.
            target: what it should have been `[B, ...]`.
            mask: what each squared error counts, as masked losses multiply it: of the errors' dimensions, each of their
                size or 1, as `[B, 1, H, W]`.
            reduction: over the dimensions of a sample: "mean" for nats per dimension, "sum" for nats.

        Raises:
            ValueError: if the shapes differ, are not those of the draw, or the mask's does not fit.
        """
        if prediction.shape != target.shape or len(prediction) != len(draw.weight):
            raise ValueError(
                f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)}, {len(draw.weight)} levels drawn: "
                "the two must have one shape, and one sample per level"
            )
        size = tuple(prediction.shape)
        if mask is not None and (
            mask.ndim != len(size) or any(m not in (1, n) for m, n in zip(mask.shape, size, strict=True))
        ):
            raise LogsnrError(
                f"mask of shape {tuple(mask.shape)} for errors of {size}: give each dimension its size or 1, "
                "e.g. [B, 1, H, W], resized to the latents"
            )
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        squared = (prediction.to(dtype) - target.to(dtype)).square()
        error = (squared if mask is None else squared * mask).flatten(1)
        losses = error.mean(1) if reduction == "mean" else error.sum(1)
        if torch.is_grad_enabled():
            self.update(draw, losses * self._dim_per(reduction, error.shape[1]))
        elif self._layer is not None:
            self._layer.release()
        return (draw.weight * losses).mean()

    def update(self, draw: Draw, losses: Tensor, gradient: Tensor | None = None) -> None:
        """Let an adaptive p learn from the unweighted losses `[B]` of a draw; call it on every rank.

        Summed or averaged over dimensions alike, always the same way; an `Adaptive` of one's own has `dim=1` for
        averages, the number of dimensions for sums, or `dim=None` for either.

        Args:
            draw: the levels at which the losses were made.
            losses: `[B]`, without the weight; for gradients of a `network` not yet detached or backpropagated.
            gradient: `[B]`, ||d(weight_i loss_i)/dtheta||^2, for a schedule whose importance is the gradient: in place
                of what is read off the `network`.

        Raises:
            LogsnrError: if the importance is the gradient, and none is given nor can be read off.
        """
        if gradient is None and self._by_gradient:
            gradient = self._norms(draw, losses)
        elif self._layer is not None:
            self._layer.release()
        factor = draw.eps_factor
        errors = losses.detach().to(factor.device, torch.float64) * factor
        if gradient is None:
            self.objective.schedule.update(draw.logsnr, errors)
            return
        # Of half the error of eps, as the schedule keeps it.
        unit = 0.5 * factor / draw.weight.to(factor.device, torch.float64)
        own = gradient.detach().to(factor.device, torch.float64) * unit.square()
        self.objective.schedule.update(draw.logsnr, errors, own)

    def probabilities(self, device: torch.device | str = "cpu") -> Tensor:
        """p_i of the table's levels `[n]`, float64: the schedule's density over each cell, normalised."""
        cells, _, _ = self._table(torch.device(device))
        adapts = bool(self.objective.schedule.state_dict())
        if not adapts and self._fixed is not None:
            return self._fixed.to(device)
        p = cells.shares(self.objective.schedule)
        self._fixed = None if adapts else p
        return p

    def weights(self, device: torch.device | str = "cpu") -> Tensor:
        """weight_i of the table's levels `[n]`, float64; 0 for levels that do not count."""
        p, (_, _, counts) = self.probabilities(device), self._table(torch.device(device))
        return torch.where(p > 0, 0.5 * counts / p, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """What an adaptive p has learned; empty for a fixed one.  The form that accelerate and Lightning save."""
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.objective.load_state_dict(state)

    def _dim_per(self, reduction: Reduction, dim: int) -> float:
        """What makes losses of these into errors in the unit of an adaptive schedule that has one."""
        unit = self.objective.schedule.dim if isinstance(self.objective.schedule, Adaptive) else None
        return 1.0 if unit is None else unit / (dim if reduction == "sum" else 1)

    def _watched(self, network: nn.Module | OutputLayer | None) -> OutputLayer | None:
        if network is None:
            return None
        if not self._by_gradient:
            raise LogsnrError(
                "network= is watched for its gradients: give importance='gradient' as well, or leave it out"
            )
        try:
            return network if isinstance(network, OutputLayer) else OutputLayer(network)
        except ValueError as error:
            raise LogsnrError(f"network: {one_line(error)}; pass network=OutputLayer(network, layer)") from error

    def _norms(self, draw: Draw, losses: Tensor) -> Tensor:
        """||d(weight_i loss_i)/d(last layer)||^2, read off the watched network."""
        if self._layer is not None and len(draw) != self._drawn:
            self._layer.release()
            raise LogsnrError(
                f"importance='gradient' reads the norms of all {self._drawn} samples of a draw, these are "
                f"{len(draw)}: form the losses [B] of all parts, (draw.weight * losses).mean() is the loss, and "
                "call loop.update(draw, losses) once, before backward()"
            )
        if self._layer is None:
            raise LogsnrError(
                "importance='gradient' has no gradients: pass network= to LoopObjective, or give update() the norms of "
                "weight x loss as gradient="
            )
        try:
            return self._layer.squared_norms(draw.weight.to(losses) * losses)
        except RuntimeError as error:
            raise LogsnrError(
                "importance='gradient' cannot read the last layer's gradients: between draw() and loss() the network "
                "must run, once and with gradients, and losses must come undetached and before backward() "
                f"({one_line(error)})"
            ) from error
        finally:
            self._layer.release()

    def _table(self, device: torch.device) -> tuple[Cells, Tensor, Tensor]:
        """Cells, timesteps and what each counts, on a device, remembered."""
        if device not in self._cells:
            if self.continuous:
                raise LogsnrError("times are continuous: there is no table of levels with probabilities")
            levels, lo_hi = self.model.levels, self.objective.schedule.range
            cells = levels.cells(*lo_hi, device)
            counts = cells.counts(self.objective.weighting)
            if not bool(counts.isfinite().all()) or not float(counts.sum()) > 0:
                raise LogsnrError(
                    f"{self.objective.weighting!r} is negative, not finite or zero everywhere on the scheduler's "
                    f"levels within log-SNR [{lo_hi[0]:g}, {lo_hi[1]:g}]: give another range or weighting"
                )
            self._cells[device] = cells, levels.labels.to(device), counts
        return self._cells[device]

    def _scale(self, sigma_data: float) -> float:
        """1/2 int w sigmoid(lambda + 2 ln sigma_data), over the levels."""
        if self.continuous:
            return self.objective.scale(1, sigma_data)
        cells, _, counts = self._table(torch.device("cpu"))
        error = torch.sigmoid(cells.logsnr + 2 * math.log(sigma_data)) / cells.per_eps
        return 0.5 * float((counts * error).sum())


def _check_importance(importance: str | None, adaptive: bool) -> None:
    if importance is None:
        return
    if importance not in IMPORTANCES:
        raise unknown("importance", importance, IMPORTANCES)
    if not adaptive:
        raise LogsnrError(
            f"importance = {importance!r} is of an adaptive p: give adaptive=True as well (an Adaptive schedule of "
            "your own has its importance already)"
        )


def _cut(objective: WeightedELBO, ends: tuple[float, float]) -> WeightedELBO:
    """The objective on a part of its levels."""
    if isinstance(objective.schedule, Adaptive):
        raise LogsnrError(
            f"timesteps = ... with an Adaptive schedule of your own: give that the range [{ends[0]:.4g}, {ends[1]:.4g}]"
            ", or adaptive=True"
        )
    lo, hi = max(objective.schedule.range[0], ends[0]), min(objective.schedule.range[1], ends[1])
    if not lo < hi:
        own = objective.schedule.range
        raise LogsnrError(
            f"timesteps of log-SNR [{ends[0]:.3g}, {ends[1]:.3g}] and the objective's [{own[0]:g}, {own[1]:g}] do not "
            "meet: give the objective a range that does"
        )
    return WeightedELBO(objective.weighting, objective.schedule.truncate(lo, hi), name=objective.name)


def _within(model: Model, objective: WeightedELBO) -> WeightedELBO:
    """The objective on the levels of a model with continuous times, where its own range leaves them."""
    ends = objective.schedule.range
    lo, hi = finite_range(model, True, ends)
    if model.continuous and (lo, hi) != ends:
        if isinstance(objective.schedule, Adaptive):
            raise LogsnrError(
                f"the objective's log-SNR [{ends[0]:g}, {ends[1]:g}] leaves the model's [{lo:.4g}, {hi:.4g}], where "
                "its Adaptive schedule has bins: give that schedule the model's range"
            )
        truncated = objective.schedule.truncate(lo, hi)
        objective = WeightedELBO(objective.weighting, truncated, name=objective.name)
    ends = objective.schedule.range
    if not all(map(math.isfinite, ends)):
        raise LogsnrError(f"the objective's log-SNR [{ends[0]:g}, {ends[1]:g}] is infinite: truncate its schedule")
    return objective
