"""What the demo measured: everything its report shows, and the summary for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from logsnr.likelihood import Likelihood
from logsnr.objectives import WeightedELBO

FEATURES = "the demo's digit classifier"
"""The space of every Frechet distance of the demo."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training: its objective, its length, and the loss (nats per dimension) at logged steps.

    Attributes:
        of_steps: steps that the recipe asks for; fewer were made where the clock ended the training.
    """

    objective: WeightedELBO
    objective_name: str
    parameters: int
    steps: int
    of_steps: int
    seconds: float
    images_per_second: float
    logged_steps: Sequence[float]
    losses: Sequence[float]

    @property
    def warning(self) -> str | None:
        """What to expect of a training that the clock ended early; None where it made nine steps of ten."""
        if self.steps >= 0.9 * self.of_steps:
            return None
        return (
            f"The clock ended the training after {self.steps} of {self.of_steps} steps ({self.seconds:.0f} s): its "
            "samples will be poor and its bound high. On a machine that does nothing else it takes about a minute."
        )


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """Samples beside held-out real digits, through the calibrated classifier and the nearest training image.

    Attributes:
        accuracy: of the classifier on held-out digits.
        samples, held_out: share recognised with confidence >= .9.
        samples_nearest, held_out_nearest: quartiles of the RMS distance to the nearest training image.
        real_frechet: FD of as many real images, classes balanced as in the samples, to the other real images.
        nearest_pairs: (samples, their nearest training images), stored uint8.
    """

    accuracy: float
    samples: float
    held_out: float
    samples_nearest: tuple[float, float, float]
    held_out_nearest: tuple[float, float, float]
    real_frechet: float
    nearest_pairs: tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A row of the comparison of samplers, with its samples.

    Attributes:
        sampler: its name.
        nfe: counted network evaluations per image.
        rmse: end-point RMSE against the teacher, None for a sampler that draws noise on the way.
        frechet: FD (features: `FEATURES`).
        confident: share recognised with confidence >= .9.
        images: the samples, stored uint8 `[N, C, H, W]`.
    """

    sampler: str
    nfe: int
    rmse: float | None
    frechet: float
    confident: float
    images: Tensor


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The demo's measurements; images are shown grey levels uint8 0 ... 255 `[N, 1, 8, 8]` unless said otherwise."""

    seed: int
    grey_levels: int
    sigma_data: float
    sampling_range: tuple[float, float]
    training: Training
    likelihood: Likelihood
    """Without the label (the null condition): comparable with unconditional models."""
    likelihood_given_label: Likelihood
    samplers: Sequence[Sampled]
    teacher: Sampled
    recognised: Recognised
    held_out: Tensor
    strip: Sequence[tuple[float, Tensor, Tensor]]
    """(sigma, noisy, denoised) of the same eight held-out digits, from little noise to much."""

    def summary(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        bound, seen = self.likelihood, self.recognised
        return {
            "seed": self.seed,
            "training": {
                "objective": self.training.objective_name,
                "parameters": self.training.parameters,
                "steps": self.training.steps,
                "of_steps": self.training.of_steps,
                "seconds": round(self.training.seconds, 1),
                "images_per_second": round(self.training.images_per_second),
            },
            "likelihood": {
                "bits_per_dim": bound.bits_per_dim,
                "stderr": bound.stderr,
                "bits_per_dim_given_label": self.likelihood_given_label.bits_per_dim,
                "stderr_given_label": self.likelihood_given_label.stderr,
                "data_stderr": bound.data_stderr,
                "logsnr_range": list(bound.logsnr_range),
                "grey_levels": self.grey_levels,
                "held_out_images": len(bound.per_image),
                "evaluations": bound.evaluations,
                "pilot_evaluations": bound.pilot_evaluations,
            },
            "features": FEATURES,
            "samplers": [
                {"sampler": q.sampler, "nfe": q.nfe, "rmse": q.rmse, "fd": q.frechet, "confident": q.confident}
                for q in (*self.samplers, self.teacher)
            ],
            "samples_per_row": len(self.teacher.images),
            "real_fd": seen.real_frechet,
            "confident": {"samples": seen.samples, "held_out": seen.held_out},
            "classifier_accuracy": seen.accuracy,
            "nearest_training_image": {"samples": seen.samples_nearest, "held_out": seen.held_out_nearest},
        }
