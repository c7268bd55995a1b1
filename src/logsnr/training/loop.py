"""Training: the loop around the steps of a run (run.py), with metrics, pictures, checkpoints, and how it may end.

Ctrl-C and SIGTERM let the step finish and the checkpoint be written.  A picture or a tracker that fails is said, and
the training goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError, one_line
from logsnr.interrupts import Asked, Interrupted, put_off
from logsnr.models import load_denoiser
from logsnr.models.stock import told_stock
from logsnr.objectives import WeightedELBO
from logsnr.paths import expanded
from logsnr.terminal import clock, console, progress_bar
from logsnr.training.checkpoint import (
    check_free,
    clear,
    data_as_then,
    has_state,
    load_state,
    repair,
    save_state,
    saved_recipe,
)
from logsnr.training.config import Recipe
from logsnr.training.data import Dataset, load_data
from logsnr.training.initial import initial_model
from logsnr.training.lifeline import together
from logsnr.training.metrics import METRICS, truncate_metrics
from logsnr.training.pictures import save_picture
from logsnr.training.processes import first_process, note, own_accelerator, own_random_state
from logsnr.training.run import Run
from logsnr.training.trackers import Tracker
from logsnr.writing import check_folder, no_empty_folders, only_writer


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
        if self.steps == self.resumed_from:
            return f"nothing to do: all {self.steps} steps were taken before (--set steps=N takes more)"
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
            "data": self.denoiser.card.get("data"),
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
        progress: show a bar while training, on a terminal; elsewhere a line every `recipe.log_every` steps.
        callback: see `Callback`.
        data: images already loaded, in place of `recipe.data`'s source.
        overwrite: replace an earlier run in `out` instead of refusing.

    Raises:
        LogsnrError: if the data, recipe or checkpoint is at fault, `out` already holds a run or a model and `resume`
            is off, another process trains there, the disk refuses a checkpoint, or the loss or a weight stops being a
            number.
        Interrupted: after Ctrl-C or SIGTERM, with the step finished and saved.
    """
    out = expanded(out)
    if resume and overwrite:
        raise LogsnrError("resume and overwrite exclude each other: continue the run, or replace it")
    if resume and not has_state(out):
        raise LogsnrError(f"{out} holds no run to resume: start it without resume, or give the folder of a run")
    first = first_process()
    with no_empty_folders(out), only_writer(check_folder(out), "this run") if first else nullcontext():
        if not resume and not overwrite:
            check_free(out)
        if data is None:
            wanted = data_as_then(recipe.data, out) if resume else recipe.data
            data = load_data(wanted, progress=progress, latents=True)
        if progress and first:
            console(stderr=True).print(data.describe(), soft_wrap=True)
        recipe = saved_recipe(recipe, out) if resume else recipe
        initial = None if resume else initial_model(recipe, data.shape)
        with own_random_state(), own_accelerator():
            run = Run(recipe, data, out, initial)
            if progress and first:
                console(stderr=True).print(run.describe(), soft_wrap=True)
            with together(run.rank, run.world):
                run.metrics.begin(load_state(run, out) if resume else 0.0)
                if resume:
                    repair(run, out)
                if run.rank == 0:
                    if overwrite:
                        clear(out)
                    truncate_metrics(out / METRICS, run.step)
                run.accelerator.wait_for_everyone()
                if progress and first:
                    console(stderr=True).print(told_stock(run.average), soft_wrap=True)
                try:
                    return _to_the_end(run, out, progress, callback)
                finally:
                    run.close()


def _to_the_end(run: Run, out: Path, progress: bool, callback: Callback | None) -> Summary:
    """The loop: steps, with what comes every so many of them."""
    recipe, metrics, first = run.recipe, run.metrics, run.step
    saved_at = first or None

    def due(every: int) -> bool:
        return every > 0 and run.step % every == 0

    def checkpoint(*, last: bool = False) -> None:
        nonlocal saved_at
        with metrics.aside():
            if last or asked.signum is not None:
                run.draw.close()  # readers that a SIGTERM reached end soon: what is saved must not end with them
            metrics.means(run.step, saved_at)  # no checkpoint of weights that have gone bad
            run.check_finite(saved_at)
            save_state(run, out)
            if run.shards and (last or asked.signum is not None):
                run.shards.wait()
            run.accelerator.wait_for_everyone()
        saved_at = run.step

    def picture() -> None:
        path = out / "samples" / f"step-{run.step:08d}.png"
        try:
            if run.rank == 0 or run.shards:
                save_picture(run.average, recipe, None if run.rank else path)
        except Exception as error:  # whatever is wrong with a picture, the training is not
            note(f"no picture {path.name}: {one_line(error)}; the training goes on")

    done = False
    tracker = Tracker(run.accelerator, recipe, out)
    with put_off() as asked, progress_bar(progress and run.rank == 0) as show, tracker:
        while not done and not _finished(run, first, asked):
            loss = run.advance()
            if due(recipe.log_every):
                line = metrics.write(out, run.step, run.learning_rate(run.step - 1), saved_at)
                tracker.log(line)
                if progress and show is None and run.rank == 0:
                    console(stderr=True).print(_told(run, line["images_per_second"], times=True), soft_wrap=True)
            if due(recipe.checkpoint_every):
                checkpoint()
            if due(recipe.samples.every):
                with metrics.aside():
                    picture()
                    run.accelerator.wait_for_everyone()
            if show is not None:
                share = max(run.step / (recipe.steps or math.inf), metrics.seconds / (recipe.max_seconds or math.inf))
                show(share, _told(run, metrics.rate))
            info = StepInfo(step=run.step, seconds=metrics.seconds, loss=loss, denoiser=run.average)
            done = callback is not None and callback(info) is True
        rate = metrics.rate
        if saved_at != run.step:
            checkpoint(last=True)
        if asked.signum is not None and not done and run.step != recipe.steps:
            raise Interrupted(
                f"interrupted after step {run.step}, which is saved in {out}: resume (resume=True, --resume) to go on",
                signum=asked.signum,
            )
    return Summary(
        out=out,
        steps=run.step,
        resumed_from=first,
        seconds=metrics.seconds,
        images_per_second=rate,
        loss=metrics.loss,
        denoiser=load_denoiser(out) if run.shards else run.average,
        objective=run.objective,
    )


def _told(run: Run, rate: float, *, times: bool = False) -> str:
    """How far a training is, in one line: "step 157/300"."""
    recipe, metrics = run.recipe, run.metrics
    where = f"step {run.step}" if recipe.steps is None else f"step {run.step}/{recipe.steps}"
    text = f"{where}  {rate:,.0f} images/s  loss {metrics.loss:.4f}"
    if not times:
        return text
    ends = [] if recipe.steps is None else [(recipe.steps - run.step) * recipe.batch / max(rate, 1e-9)]
    ends += [] if recipe.max_seconds is None else [recipe.max_seconds - metrics.seconds]
    return f"{text}  {clock(metrics.seconds)} elapsed, {clock(max(min(ends), 0.0))} left"


def _finished(run: Run, first: int, asked: Asked) -> bool:
    """Whether to stop; every run takes at least one step, and all processes stop together."""
    recipe = run.recipe
    if recipe.steps is not None and run.step >= recipe.steps:
        return True
    if run.step == first:
        return False
    late = recipe.max_seconds is not None and run.metrics.seconds >= recipe.max_seconds
    if run.world == 1:
        return late or asked.signum is not None
    # Clocks differ between processes: the first one's decides; a signal ends all.  Asked now and then, as asking waits.
    if run.step % 16:
        return False
    flag = torch.tensor([float((late and run.rank == 0) or asked.signum is not None)], device=run.device)
    return bool(run.accelerator.reduce(flag, "sum").item() > 0)
