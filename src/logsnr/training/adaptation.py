"""Adaptation: what a training does so that its noise levels follow the network.

Before the backward pass the last layer's gradient norms are read off; after the step the schedule learns from them and
from the errors; now and then a few extra draws get true norms over all parameters, which mend the last layer's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.gradients import OutputLayer, gradient_norms
from logsnr.noise import sigma_from_logsnr
from logsnr.objectives import ObjectiveOutput, WeightedELBO
from logsnr.sampling.batches import take
from logsnr.schedules import Adaptive
from logsnr.schedules.variance import SpreadMeter
from logsnr.training.config import AdaptiveConfig


class Adaptation:
    """The schedule of an objective, following its network.

        with adaptation:
            output = objective(denoiser, x, generator=generator)
        adaptation.watch(output)
        ...                                   # backward, step
        adaptation.learn(step, x, cond)

    Args:
        objective: with an `Adaptive` schedule.
        denoiser: the model around the bare network, without distributed wrappers.
        config: the recipe's section.
        generator: source of the extra draws.

    Attributes:
        meter: what the draws since the last line of metrics say of the density.
    """

    def __init__(
        self, objective: WeightedELBO, denoiser: Denoiser, config: AdaptiveConfig, generator: torch.Generator
    ) -> None:
        assert isinstance(objective.schedule, Adaptive)
        self.objective, self.schedule, self.denoiser = objective, objective.schedule, denoiser
        self.config, self.generator = config, generator
        self.layer = OutputLayer(denoiser)
        self.meter = SpreadMeter(self.schedule.range, self.schedule.bins, device=generator.device)
        self._batch: tuple[ObjectiveOutput, Tensor] | None = None

    def __enter__(self) -> Adaptation:
        self.layer.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.layer.__exit__(*raised)

    def watch(self, output: ObjectiveOutput) -> None:
        """Read the gradient norms of a batch, before its backward pass."""
        self._batch = output, self.layer.squared_norms(output.loss)

    def learn(self, step: int, x: Tensor, cond: dict[str, Tensor] | None) -> None:
        """Let the schedule learn from the batch that was watched; on every process.

        Args:
            step: steps taken before this one.
            x: data of the batch, for true gradient norms.
            cond: its conditions.
        """
        assert self._batch is not None
        (output, norms), self._batch = self._batch, None
        self.meter.add(output.logsnr, output.loss, norms)
        self.objective.update(output, norms)
        every = self.config.true_every if self.schedule.importance == "gradient" else 0
        if every and step % every == 0:
            few = slice(self.config.true_samples)
            self._measure(x[few], take(cond, few))

    def _measure(self, x: Tensor, cond: dict[str, Tensor]) -> None:
        """True gradient norms of fresh draws, beside the last layer's of the same draws."""
        logsnr = self.schedule.sample(len(x), generator=self.generator)
        eps = torch.randn(x.shape, generator=self.generator, device=self.generator.device, dtype=x.dtype).to(x.device)
        with self.layer:
            output = self.objective.loss_at(self.denoiser, x, eps, logsnr, cond)
        proxy = self.layer.squared_norms(output.loss).to(output.ratio) / output.ratio**2
        true = gradient_norms(self.denoiser, x, eps, sigma_from_logsnr(logsnr).to(x), cond)
        self.schedule.correct(logsnr, true, proxy)
