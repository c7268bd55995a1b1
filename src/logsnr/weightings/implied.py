"""What plain MSE really weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, float64

from logsnr.noise import alpha_s_from_logsnr
from logsnr.predictions import Prediction
from logsnr.schedules import Schedule
from logsnr.weightings.base import Weighting


@dataclass(frozen=True)
class Implied(Weighting):
    """p(lambda)/b_F^2 (made by `implied_by`)."""

    schedule: Schedule
    prediction: Prediction

    def __repr__(self) -> str:
        return f"implied_by({self.schedule!r}, {self.prediction!r})"

    def _log(self, logsnr: Tensor) -> Tensor:
        alpha, s = alpha_s_from_logsnr(logsnr.to(float64))
        b_F = self.prediction.eps_row(alpha, s)[1]
        return (self.schedule.log_density(logsnr) - 2 * b_F.abs().log()).to(logsnr.dtype)


def implied_by(schedule: Schedule, prediction: Prediction) -> Weighting:
    """What plain MSE on a prediction's target, under t ~ U of a schedule, really weights.

    The error of eps is b_F times that of F, so  E_t ||F_hat - F*||^2 = int p/b_F^2 E||eps_hat - eps||^2 dlambda:
    the weighting is p/b_F^2, zero outside the schedule's range.
    """
    return Implied(schedule, prediction)
