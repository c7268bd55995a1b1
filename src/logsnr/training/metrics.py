"""Metrics: the clock of a training, and a line of means over each window of steps.

Sums stay on the device between lines: one read per line.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.schedules.variance import SpreadMeter
from logsnr.training.config import Recipe
from logsnr.writing import replace_file

METRICS = "metrics.jsonl"


class Metrics:
    """What is measured of a training.

    Args:
        recipe: what is trained.
        accelerator: over whose processes the means are taken.
        meter: of an adaptive schedule, what its draws say of the density.

    Attributes:
        window: (loss in nats per dimension, gradient norm), summed since the last line.
        window_steps: the number of steps in that sum.
        loss: mean loss of the last line.
    """

    def __init__(self, recipe: Recipe, accelerator: Any, meter: SpreadMeter | None) -> None:
        self.recipe, self.accelerator, self.meter = recipe, accelerator, meter
        self.window = torch.zeros(2, device=accelerator.device)
        self.window_steps = 0
        self.loss = math.nan
        self.begin(0.0)

    def begin(self, seconds: float) -> None:
        """Start the clock, with so many seconds of training behind it."""
        self._stepping = self._line = time.perf_counter()
        self._start = self._stepping - seconds
        self._steps = 0

    @property
    def seconds(self) -> float:
        """Training time, that before a resume included."""
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """Images per second since the clock was started, in steps alone."""
        return self._steps * self.recipe.batch / max(time.perf_counter() - self._stepping, 1e-9)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that does not count as steps: checkpoints and pictures."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._stepping += spent
        self._line += spent

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count a step; nothing is read from the device."""
        self.window += torch.stack([loss, norm.to(loss.dtype)])
        self.window_steps += 1
        self._steps += 1

    def means(self, step: int, saved_at: int | None) -> tuple[float, float]:
        """Loss and gradient norm averaged over the window that ends at `step`; one read from the device.

        Raises:
            LogsnrError: if either is not a finite number.
        """
        if self.accelerator.num_processes > 1:
            # From here on every process holds the mean, so the state that the first one saves is everybody's.
            self.window = self.accelerator.reduce(self.window, "mean")
            if self.meter:
                self.meter.sums = self.accelerator.reduce(self.meter.sums, "mean")
        loss, norm = (float(v) / max(self.window_steps, 1) for v in self.window.tolist())
        # Under fp16 an overflowing gradient is part of the game: the scaler skips that step.
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.recipe.precision != "fp16"):
            raise LogsnrError(
                f"the loss is {loss:.3g} and the gradient norm {norm:.3g} within steps "
                f"{step - self.window_steps + 1} ... {step}; {self.remedy(saved_at)}"
            )
        if self.window_steps:
            self.loss = loss
        return loss, norm

    def remedy(self, saved_at: int | None) -> str:
        """What is left of a training that has gone bad, and what to change."""
        saved = f"the checkpoint of step {saved_at} is intact" if saved_at else "nothing was saved"
        return (
            f"{saved}: lower optimizer.lr (now {self.recipe.optimizer.lr:g}), lengthen optimizer.warmup or set "
            "optimizer.clip"
        )

    def write(self, out: Path, step: int, rate: float, saved_at: int | None) -> dict[str, Any]:
        """Append a line at learning rate `rate`, and start the next window.

        Returns:
            The line.

        Raises:
            LogsnrError: as of `means`, or if the disk refuses.
        """
        loss, norm = self.means(step, saved_at)
        now = time.perf_counter()
        line = {
            "step": step,
            "loss": loss,
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": rate,
            "images_per_second": round(self.window_steps * self.recipe.batch / max(now - self._line, 1e-9), 1),
            "seconds": round(self.seconds, 3),
        }
        spread = self.meter.read(self.accelerator.num_processes) if self.meter else None
        if spread:
            # What an adaptive density leaves of the variance (schedules/variance.py), from this line's draws.
            line |= {
                "variance_between": spread.between,
                "variance_within": spread.within,
                "gradient_excess": spread.gradient_excess,
            }
        self.window.zero_()
        self.window_steps, self._line = 0, now
        if self.meter:
            self.meter.sums.zero_()
        if self.accelerator.is_main_process:
            try:
                with (out / METRICS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                saved = f"the checkpoint of step {saved_at} is intact" if saved_at else "nothing was saved so far"
                raise LogsnrError(
                    f"cannot write {out / METRICS}: {error.strerror}; {saved}: free some space, then resume"
                ) from error
        return line


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line that a crash cut short: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # a line of another's making is dropped too
            entry: Any = json.loads(line)
            if isinstance(entry, dict) and entry["step"] <= step:
                kept.append(line + "\n")
    replace_file(path, "".join(kept).encode())
