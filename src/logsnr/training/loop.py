"""Training: the loop around a run's steps, with metrics, sample grids, checkpoints and a progress bar."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.objectives import WeightedELBO
from logsnr.training.checkpoint import METRICS, clear, has_state, load_state, save_state, truncate_metrics
from logsnr.training.config import Recipe
from logsnr.training.data import Dataset, load_data
from logsnr.training.pictures import save_grid
from logsnr.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a training did.

    Args:
        out: folder of the run.
        steps: steps taken, those before a resume included.
        resumed_from: step at which this call began, 0 for a fresh run.
        seconds: training time, that before a resume included.
        images_per_second: throughput of this call over its steps alone (no checkpoints, no grids).
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
    data = load_data(recipe.data) if data is None else data
    with _own_random_state(), _own_accelerator():
        run = Run(recipe, data)
        seconds = load_state(run, out) if resume else 0.0
        if run.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            if overwrite:
                clear(out)
            truncate_metrics(out / METRICS, run.step)
        run.accelerator.wait_for_everyone()
        return _Loop(run, out, seconds).run_to_end(progress, callback)


class _Loop:
    """The clock, the log and the calendar of one call of `train`."""

    def __init__(self, run: Run, out: Path, seconds: float) -> None:
        self.run, self.recipe, self.out = run, run.recipe, out
        self.before = seconds
        self.first = run.step
        self.start = time.perf_counter()
        self.aside = 0.0
        self.line_at, self.line_aside = self.start, 0.0
        self.loss = math.nan
        self.saved_at = run.step if run.step else None

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def run_to_end(self, progress: bool, callback: Callback | None) -> Summary:
        run, recipe = self.run, self.recipe
        with _bar(progress and run.rank == 0) as show:
            while not self.finished():
                loss = run.advance()
                if run.step % recipe.log_every == 0:
                    self.log()
                if recipe.checkpoint_every and run.step % recipe.checkpoint_every == 0:
                    self.checkpoint()
                if recipe.samples.every and run.step % recipe.samples.every == 0:
                    self.draw_grid()
                if show is not None:
                    show(self.fraction(), f"step {run.step}  {self.rate():,.0f} images/s  loss {self.loss:.4f}")
                info = StepInfo(step=run.step, seconds=self.seconds, loss=loss, denoiser=run.average)
                if callback is not None and callback(info) is True:
                    break
        rate = self.rate()
        if run.window_steps and run.step % recipe.log_every:
            self.loss = self.window_means()[0]
        if self.saved_at != run.step:
            self.checkpoint()
        return Summary(
            out=self.out,
            steps=run.step,
            resumed_from=self.first,
            seconds=self.seconds,
            images_per_second=rate,
            loss=self.loss,
            denoiser=run.average,
            objective=run.objective,
        )

    def fraction(self) -> float:
        """How much of the training is done, by steps or by time."""
        by_steps = self.run.step / self.recipe.steps if self.recipe.steps else 0.0
        by_time = self.seconds / self.recipe.max_seconds if self.recipe.max_seconds else 0.0
        return max(by_steps, by_time)

    def finished(self) -> bool:
        """Whether to stop; every run takes at least one step, and all processes stop together."""
        run = self.run
        if self.recipe.steps is not None and run.step >= self.recipe.steps:
            return True
        if self.recipe.max_seconds is None or run.step == self.first:
            return False
        late = self.seconds >= self.recipe.max_seconds
        if run.world == 1:
            return late
        # Clocks differ between processes: the first one's decides, asked now and then because asking waits.
        if run.step % 16:
            return False
        flag = torch.tensor([float(late and run.rank == 0)], device=run.device)
        return bool(run.accelerator.reduce(flag, "sum").item() > 0)

    def rate(self) -> float:
        """Images per second of this call's steps."""
        busy = time.perf_counter() - self.start - self.aside
        return (self.run.step - self.first) * self.recipe.batch / max(busy, 1e-9)

    def window_means(self) -> tuple[float, float]:
        """Loss in nats per dimension and gradient norm, averaged since the last line; one read from the device.

        Raises:
            LogsnrError: if either is not a finite number.
        """
        run = self.run
        if run.world > 1:
            # From here on every process holds the mean, so the state that the first one saves is everybody's.
            run.window = run.accelerator.reduce(run.window, "mean")
            if run.adaptation:
                run.adaptation.meter.sums = run.accelerator.reduce(run.adaptation.meter.sums, "mean")
        loss, norm = (float(v) / max(run.window_steps, 1) for v in run.window.tolist())
        # Under fp16 an overflowing gradient is part of the game: the scaler skips that step.
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.recipe.precision != "fp16"):
            saved = f"the checkpoint of step {self.saved_at} is intact" if self.saved_at else "nothing was saved"
            raise LogsnrError(
                f"the loss is {loss:.3g} and the gradient norm {norm:.3g} within steps "
                f"{run.step - run.window_steps + 1} ... {run.step}; {saved}: lower optimizer.lr "
                f"(now {self.recipe.optimizer.lr:g}), lengthen optimizer.warmup or set optimizer.clip"
            )
        return loss, norm

    def log(self) -> None:
        """Write a line of metrics and start the next window."""
        run = self.run
        self.loss, norm = self.window_means()
        now = time.perf_counter()
        busy = now - self.line_at - (self.aside - self.line_aside)
        line = {
            "step": run.step,
            "loss": self.loss,
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": run.learning_rate(run.step - 1),
            "images_per_second": round(run.window_steps * self.recipe.batch / max(busy, 1e-9), 1),
            "seconds": round(self.seconds, 3),
            **self.spread(),
        }
        run.window.zero_()
        run.window_steps = 0
        if run.adaptation:
            run.adaptation.meter.sums.zero_()
        self.line_at, self.line_aside = now, self.aside
        if run.rank == 0:
            with (self.out / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def spread(self) -> dict[str, float | None]:
        """What an adaptive density leaves of the variance (adaptive/variance.py), from this line's draws."""
        adaptation = self.run.adaptation
        spread = adaptation.meter.read(self.run.world) if adaptation else None
        if spread is None:
            return {}
        return {
            "variance_between": spread.between,
            "variance_within": spread.within,
            "gradient_excess": spread.gradient_excess,
        }

    def checkpoint(self) -> None:
        """Save, unless the weights have gone bad."""
        began = time.perf_counter()
        self.window_means()
        if self.run.rank == 0:
            save_state(self.run, self.out, self.seconds)
        self.run.accelerator.wait_for_everyone()
        self.saved_at = self.run.step
        self.aside += time.perf_counter() - began

    def draw_grid(self) -> None:
        """Save a grid of samples."""
        began = time.perf_counter()
        if self.run.rank == 0:
            save_grid(self.run.average, self.recipe, self.out / "samples" / f"step-{self.run.step:08d}.png")
        self.run.accelerator.wait_for_everyone()
        self.aside += time.perf_counter() - began


@contextmanager
def _bar(wanted: bool) -> Iterator[Callable[[float, str], None] | None]:
    """A progress bar that is gone when training ends; None where no terminal shows it."""
    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Drawn from the loop five times a second: a drawing thread would compete with the steps for the interpreter.
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=1.0)
        drawn = 0.0

        def show(fraction: float, text: str) -> None:
            nonlocal drawn
            now = time.perf_counter()
            if now - drawn > 0.2:
                bar.update(task, completed=min(fraction, 1.0), description=text, refresh=True)
                drawn = now

        yield show


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Put torch's global random state back at the end: initialisation and dropout draw from it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _own_accelerator() -> Iterator[None]:
    """Leave no accelerate singleton and no process group behind that the caller did not have.

    The singleton would pin precision and device.  A group that is left to the end of the interpreter is torn down
    while its threads still run, which now and then aborts a process after all its work is done.  To destroy it is
    not enough: DistributedDataParallel imports torch.distributed.nn.functional, whose defaults (group=group.WORLD)
    hold whatever group exists at that moment for ever.  Imported before there is one, they hold None: the current one.
    """
    if torch.distributed.is_available():
        importlib.import_module("torch.distributed.nn.functional")
    try:
        from accelerate.state import AcceleratorState, PartialState
    except ModuleNotFoundError:
        yield  # `Run` says what is missing.
        return
    fresh: Any = not PartialState._shared_state
    grouped = _grouped()
    try:
        yield
        if _grouped() and not grouped:
            torch.distributed.barrier()  # who leaves first takes the connections with it
            # Gloo's thread needs the interpreter's lock to drop the barrier's tensor; the group's destructor waits for
            # that thread and holds the lock.  So the thread gets the lock first.
            time.sleep(0.2)
    finally:
        if _grouped() and not grouped:
            torch.distributed.destroy_process_group()
        if fresh:
            AcceleratorState._reset_state(reset_partial_state=not _grouped())


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
