"""Training: a run, its step, and the loop around the steps, with metrics, pictures and checkpoints.

    batch -> noise levels, noise -> loss / scale -> gradient, clipped -> weights -> average of the weights

A step never reads a value back from the device.  Loss over scale: clipping then sees no unit of the objective's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.models import build_network
from logsnr.noise import sigma_from_logsnr
from logsnr.objectives import WeightedELBO
from logsnr.pixels import Pixels
from logsnr.terminal import console
from logsnr.training.adaptation import Adaptation
from logsnr.training.checkpoint import clear, has_state, load_state, save_state
from logsnr.training.config import Recipe
from logsnr.training.data import Dataset, load_data
from logsnr.training.draws import Draws, derived_seed
from logsnr.training.ema import EMA
from logsnr.training.metrics import METRICS, Metrics, truncate_metrics
from logsnr.training.objectives import build_objective, build_prediction, central_logsnr
from logsnr.training.pictures import save_picture
from logsnr.training.processes import accelerator_for, first_process, own_accelerator, own_random_state, progress_bar
from logsnr.uncertainty import Uncertainty


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a training did.

    Args:
        out: folder of the run.
        steps: steps taken, those before a resume included.
        resumed_from: step at which this call began, 0 for a fresh run.
        seconds: training time, that before a resume included.
        images_per_second: throughput of this call over its steps alone (no checkpoints, no pictures).
        loss: weighted loss in nats per dimension, averaged over the last line of metrics.
        denoiser: the model with averaged weights.
        objective: what was minimised, with what an adaptive schedule has learned.
    """

    out: Path
    steps: int
    resumed_from: int
    seconds: float
    images_per_second: float
    loss: float
    denoiser: NetworkDenoiser
    objective: WeightedELBO

    def __str__(self) -> str:
        return (
            f"{self.steps} steps in {self.seconds:.0f} s, {self.images_per_second:,.0f} images/s, "
            f"loss {self.loss:.4f} nats per dimension"
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "steps": self.steps,
            "resumed_from": self.resumed_from,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "loss": self.loss if math.isfinite(self.loss) else None,
        }


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What a callback sees after each step.

    Args:
        step: steps taken so far.
        seconds: training time so far.
        loss: loss of this batch in nats per dimension, a tensor on the device: reading it waits for the device.
        denoiser: the model with averaged weights, live.
    """

    step: int
    seconds: float
    loss: Tensor
    denoiser: NetworkDenoiser


Callback = Callable[[StepInfo], object]
"""Called after each step, on every process; answering `True` ends the training there, checkpoint included."""


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    progress: bool = True,
    *,
    callback: Callback | None = None,
    data: Dataset | None = None,
    overwrite: bool = False,
) -> Summary:
    """Train a denoiser and leave it in `out`, where `logsnr.loading` finds it.

    The same recipe gives the same weights bit for bit on the same machine, also through a kill and a resume (on a
    GPU: as far as its kernels are deterministic).  torch's global random state is left as it was.

    Args:
        recipe: what to do (`load_recipe`).
        out: folder of the run; created, or with `resume` continued from its last checkpoint.
        resume: continue exactly where the last checkpoint stands.
        progress: show a bar while training, on a terminal.
        callback: see `Callback`.
        data: images already loaded, in place of `recipe.data`'s source.
        overwrite: replace an earlier run in `out` instead of refusing.

    Raises:
        LogsnrError: if the data, recipe or checkpoint is at fault, `out` already holds a run and `resume` is off, the
            disk refuses a checkpoint, or the loss stops being a number.
    """
    out = Path(out)
    if resume and overwrite:
        raise LogsnrError("resume and overwrite exclude each other: continue the run, or replace it")
    if not resume and not overwrite and has_state(out):
        raise LogsnrError(f"{out} already holds a run: resume it (resume=True, --resume) or choose another folder")
    if resume and not has_state(out):
        raise LogsnrError(f"{out} holds no run to resume: start it without resume, or give the folder of a run")
    data = load_data(recipe.data, progress=progress) if data is None else data
    if progress and first_process():
        console(stderr=True).print(data.describe(), soft_wrap=True)
    with own_random_state(), own_accelerator():
        run = Run(recipe, data)
        run.metrics.begin(load_state(run, out) if resume else 0.0)
        if run.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            if overwrite:
                clear(out)
            truncate_metrics(out / METRICS, run.step)
        run.accelerator.wait_for_everyone()
        return _to_the_end(run, out, progress, callback)


class Run:
    """The state of a training, and its step.

    Attributes:
        step: steps taken.
        denoiser: the model in training, around the raw weights.
        average: the model with averaged weights, in eval mode: what is saved and sampled from.
        metrics: the clock, and what is summed on the device since the last line of metrics.
        adaptation: what makes an adaptive schedule follow the network; None for a fixed one.
        uncertainty: EDM2's u of the noise level, in training beside the network; None without.

    Raises:
        LogsnrError: if the recipe does not fit the data or the machine.
    """

    def __init__(self, recipe: Recipe, data: Dataset) -> None:
        self.recipe = recipe
        self.step = 0
        self.accelerator = accelerator_for(recipe)
        self.scaler = self.accelerator.scaler
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if recipe.batch % self.world:
            raise LogsnrError(f"batch = {recipe.batch} over {self.world} processes: give a multiple of {self.world}")
        # Noise levels are drawn in float64, which Apple's GPUs do not have: there the CPU draws.
        self.generator = torch.Generator("cpu" if self.device.type == "mps" else self.device)
        batch = recipe.batch // self.world
        self.draw = Draws(recipe, data, batch=batch, generator=self.generator, device=self.device)

        sigma_data = recipe.sigma_data or data.sigma_data
        dim = math.prod(data.shape)
        self.objective = build_objective(recipe.objective, dim=dim, sigma_data=sigma_data)
        self.scale = self.objective.scale(dim, sigma_data)
        lo, hi = central_logsnr(recipe.objective, self.objective)
        prediction = build_prediction(recipe.prediction, sigma_data=sigma_data)

        def around(network: nn.Module) -> NetworkDenoiser:
            return NetworkDenoiser(
                network,
                prediction,
                shape=data.shape,
                pixels=Pixels(data.grey_levels),
                sigma_data=sigma_data,
                trained_range=(sigma_from_logsnr(hi), sigma_from_logsnr(lo)),
            )

        torch.manual_seed(derived_seed(recipe.seed, "weights"))
        classes = data.classes if recipe.conditional else 0
        network = build_network(recipe.network.model_copy(update={"classes": classes}), data.shape).to(self.device)
        self.parameters = list(network.parameters())
        self.denoiser = around(network)
        self.average = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        self.average.card = {"data": data.describe(), "class_names": list(data.class_names) if classes else []}
        self.ema = EMA(self.average.network.parameters(), decay=recipe.ema.decay, ramp=recipe.ema.ramp)
        self.parts: dict[str, Any] = {
            "network": network,
            "average": self.average.network,
            "objective": self.objective,
        }
        options = recipe.optimizer
        groups: list[dict[str, Any]] = [{"params": self.parameters}]
        self.uncertainty: Uncertainty | None = None
        if recipe.objective.uncertainty:
            generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "uncertainty"))
            self.uncertainty = self.parts["uncertainty"] = Uncertainty(generator=generator).to(self.device)
            groups.append({"params": list(self.uncertainty.parameters()), "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            groups,
            lr=options.lr,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        # The prepared network is the raw one behind autocast and, over several processes, gradient averaging.
        # `bare` shares its parts but not that wrapping: gradients of single samples want float32 and one process.
        bare = around(copy.copy(network))
        self.denoiser.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        adaptive = recipe.objective.adaptive
        self.adaptation = Adaptation(self.objective, bare, adaptive, self.generator) if adaptive else None
        self.metrics = Metrics(recipe, self.accelerator, self.adaptation.meter if self.adaptation else None)

    def advance(self) -> Tensor:
        """One step of the optimizer; returns the batch's loss in nats per dimension, on the device."""
        recipe = self.recipe
        self.generator.manual_seed(derived_seed(recipe.seed, "step", self.step, self.rank))
        # Dropout layers draw from the global generator, whose state `train` puts back at the end.
        torch.manual_seed(derived_seed(recipe.seed, "dropout", self.step, self.rank))
        x, cond = self.draw()
        with self.adaptation or nullcontext():
            output = self.objective(
                self.denoiser, x, cond=cond, generator=self.generator, rank=self.rank, world=self.world
            )
        if self.adaptation:
            self.adaptation.watch(output)
        loss = output.loss.mean()
        if self.uncertainty:
            self._backward_over(self.uncertainty, output.loss / self.scale, output.logsnr)
        else:
            self.accelerator.backward(loss / self.scale)
        clip = recipe.optimizer.clip
        norm = self.accelerator.clip_grad_norm_(self.parameters, float("inf") if clip is None else clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.parameters, self.step)
        if self.adaptation:
            self.adaptation.learn(self.step, x, cond)
        self.step += 1
        per_dim = loss.detach() / self.denoiser.dim
        self.metrics.add(per_dim, norm.detach())
        return per_dim

    def _backward_over(self, uncertainty: Uncertainty, loss: Tensor, logsnr: Tensor) -> None:
        self.accelerator.backward(uncertainty.weigh(loss, logsnr).mean())
        # Over several processes the mean, as of the network's; a wrapper that does so would round u under autocast.
        for p in uncertainty.parameters():
            p.grad = self.accelerator.reduce(p.grad, "mean")

    def learning_rate(self, step: int) -> float:
        """The learning rate of step n: lr min(1, (n + 1) / warmup), times 1 - n / steps under linear decay."""
        options, steps = self.recipe.optimizer, self.recipe.steps
        rate = options.lr * min(1.0, (step + 1) / max(options.warmup, 1))
        return rate * (1 - step / steps) if options.decay == "linear" and steps else rate


def _to_the_end(run: Run, out: Path, progress: bool, callback: Callback | None) -> Summary:
    """The loop: steps, with what comes every so many of them."""
    recipe, metrics, first = run.recipe, run.metrics, run.step
    saved_at = first or None

    def due(every: int) -> bool:
        return every > 0 and run.step % every == 0

    def checkpoint() -> None:
        nonlocal saved_at
        with metrics.aside():
            metrics.means(run.step, saved_at)  # no checkpoint of weights that have gone bad
            if run.rank == 0:
                save_state(run, out)
            run.accelerator.wait_for_everyone()
        saved_at = run.step

    with progress_bar(progress and run.rank == 0) as show:
        while not _finished(run, first):
            loss = run.advance()
            if due(recipe.log_every):
                metrics.write(out, run.step, run.learning_rate(run.step - 1), saved_at)
            if due(recipe.checkpoint_every):
                checkpoint()
            if due(recipe.samples.every):
                with metrics.aside():
                    if run.rank == 0:
                        save_picture(run.average, recipe, out / "samples" / f"step-{run.step:08d}.png")
                    run.accelerator.wait_for_everyone()
            if show is not None:
                done = max(run.step / (recipe.steps or math.inf), metrics.seconds / (recipe.max_seconds or math.inf))
                show(done, f"step {run.step}  {metrics.rate:,.0f} images/s  loss {metrics.loss:.4f}")
            info = StepInfo(step=run.step, seconds=metrics.seconds, loss=loss, denoiser=run.average)
            if callback is not None and callback(info) is True:
                break
    rate = metrics.rate
    if saved_at != run.step:
        checkpoint()
    return Summary(
        out=out,
        steps=run.step,
        resumed_from=first,
        seconds=metrics.seconds,
        images_per_second=rate,
        loss=metrics.loss,
        denoiser=run.average,
        objective=run.objective,
    )


def _finished(run: Run, first: int) -> bool:
    """Whether to stop; every run takes at least one step, and all processes stop together."""
    recipe = run.recipe
    if recipe.steps is not None and run.step >= recipe.steps:
        return True
    if recipe.max_seconds is None or run.step == first:
        return False
    late = run.metrics.seconds >= recipe.max_seconds
    if run.world == 1:
        return late
    # Clocks differ between processes: the first one's decides, asked now and then because asking waits.
    if run.step % 16:
        return False
    flag = torch.tensor([float(late and run.rank == 0)], device=run.device)
    return bool(run.accelerator.reduce(flag, "sum").item() > 0)
