"""Adaptation: what a training does so that its noise levels follow the network.

Before the backward pass the last layer's gradient norms are read off; after the step the schedule learns from them and
from the errors; now and then a few extra draws get true norms over all parameters, which mend the last layer's.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from logsnr.denoiser import Denoiser
from logsnr.gradients import OutputLayer, gradient_norms
from logsnr.noise import sigma_from_logsnr
from logsnr.objectives import ObjectiveOutput, WeightedELBO
from logsnr.sampling.batches import take
from logsnr.schedules import Adaptive
from logsnr.schedules.variance import SpreadMeter
from logsnr.training.config import AdaptiveConfig
from logsnr.training.parallel import whole


class Adaptation:
    """The schedule of an objective, following its network.

        with adaptation:
            output = objective(denoiser, x, generator=generator)
        adaptation.watch(output)
        ...                                   # backward; of each part of a batch, then the step
        adaptation.learn(step, x, cond)

    Args:
        objective: with an `Adaptive` schedule.
        denoiser: the model around the bare network; around what trains it where `parameters` are given.
        config: the recipe's section.
        generator: source of the extra draws, in the same state on every process.
        rank: number of this process,
        world: of so many, each with a share of a batch.
        parameters: of a network that is no pure function in one place (sharded, compiled, recomputed): all processes
            then take the true norms of one sample after the other, by the backward pass of its training.

    Attributes:
        meter: what the draws since the last line of metrics say of the density.
    """

    def __init__(
        self,
        objective: WeightedELBO,
        denoiser: Denoiser,
        config: AdaptiveConfig,
        generator: torch.Generator,
        *,
        rank: int = 0,
        world: int = 1,
        parameters: list[nn.Parameter] | None = None,
    ) -> None:
        assert isinstance(objective.schedule, Adaptive)
        self.objective, self.schedule, self.denoiser = objective, objective.schedule, denoiser
        self.config, self.generator = config, generator
        self.rank, self.world, self.parameters = rank, world, parameters
        self.layer = OutputLayer(denoiser)
        self.meter = SpreadMeter(self.schedule.range, self.schedule.bins, device=generator.device)
        self._seen: list[tuple[ObjectiveOutput, Tensor]] = []

    def __enter__(self) -> Adaptation:
        self.layer.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.layer.__exit__(*raised)

    def watch(self, output: ObjectiveOutput) -> None:
        """Read the gradient norms of a part of a batch, before its backward pass."""
        norms = self.layer.squared_norms(output.loss)
        self._seen.append((replace(output, loss=output.loss.detach()), norms))

    def learn(self, step: int, x: Tensor, cond: dict[str, Tensor] | None) -> None:
        """Let the schedule learn from the batch that was watched; on every process.

        Args:
            step: steps taken before this one.
            x: data of the batch, for true gradient norms.
            cond: its conditions.
        """
        outputs, norms = zip(*self._seen, strict=True)
        self._seen = []
        output, norm = _joined(outputs), torch.cat(norms)
        self.meter.add(output.logsnr, output.loss, norm)
        self.objective.update(output, norm)
        every = self.config.true_every if self.schedule.importance == "gradient" else 0
        if every and step % every == 0:
            self._measure(x, cond)

    def _measure(self, x: Tensor, cond: dict[str, Tensor] | None) -> None:
        """True gradient norms of fresh draws, beside the last layer's of the same draws."""
        n = min(self.config.true_samples, len(x) * self.world)
        logsnr = self.schedule.sample(n, generator=self.generator)
        shape = (n, *x.shape[1:])
        eps = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=x.dtype).to(x.device)
        x, cond = self._first(x, n), {key: self._first(value, n) for key, value in (cond or {}).items()}
        if self.parameters is None:
            # Each process takes some of them; `correct` adds up.
            mine = slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)
            x, eps, logsnr, cond = x[mine], eps[mine], logsnr[mine], take(cond, mine)
        true = proxy = logsnr[:0]
        if len(logsnr):
            with self.layer:
                output = self.objective.loss_at(self.denoiser, x, eps, logsnr, cond)
            proxy = self.layer.squared_norms(output.loss).to(output.ratio) / output.ratio**2
            sigma = sigma_from_logsnr(logsnr).to(x)
            true = (
                gradient_norms(self.denoiser, x, eps, sigma, cond)
                if self.parameters is None
                else _one_by_one(self.denoiser, self.parameters, x, eps, sigma, cond)
            )
        if self.parameters is not None and self.rank:
            logsnr, true, proxy = logsnr[:0], true[:0], proxy[:0]  # the first process speaks for all
        self.schedule.correct(logsnr, true, proxy)

    def _first(self, values: Tensor, n: int) -> Tensor:
        """The first n rows of the global batch, on every process."""
        if self.world == 1:
            return values[:n]
        rows = values.new_zeros(n, *values.shape[1:])
        at = self.rank * len(values)
        mine = values[: max(n - at, 0)]
        rows[at : at + len(mine)] = mine
        torch.distributed.all_reduce(rows)
        return rows


def _joined(outputs: tuple[ObjectiveOutput, ...]) -> ObjectiveOutput:
    """The parts of a batch as one."""
    columns = {
        field.name: torch.cat([getattr(output, field.name) for output in outputs]) for field in fields(ObjectiveOutput)
    }
    return ObjectiveOutput(**columns)


def _one_by_one(
    denoiser: Denoiser, parameters: list[nn.Parameter], x: Tensor, eps: Tensor, sigma: Tensor, cond: dict[str, Tensor]
) -> Tensor:
    """`gradient_norms` by one backward pass after the other; processes that all do so agree."""
    norms = []
    for i in range(len(x)):
        one = slice(i, i + 1)
        error = denoiser.eps_error(x[one], eps[one], sigma[one], **take(cond, one))
        torch.autograd.backward(0.5 * error.sum())
        grads = [p.grad for p in parameters if p.grad is not None]
        norms.append(whole(torch.nn.utils.get_total_norm(grads)).square())
        for p in parameters:
            p.grad = None
    return torch.stack(norms)
