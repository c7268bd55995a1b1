"""Quality: what a few network evaluations buy, sampler by sampler, from one set of noises.

Each row holds three readings of the same samples: the end-point RMSE against a many-step teacher from the same noise
(discretisation error only), the Frechet distance to real images in a classifier's features, and the share of samples
that the calibrated classifier recognises with confidence >= .9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.evaluation.features import Classifier
from logsnr.evaluation.metrics import Estimated, Reference
from logsnr.pixels import Pixels
from logsnr.sampling import Plan, sample
from logsnr.sampling.counted import Counted, rmse


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """Features with a reference in them: FD and KID are said to be "(features: name)".

    Attributes:
        name: what the features are of.
        of: samples x `[N, *shape]` -> features `[N, F]`.
        reference: features of the data `[M, F]`.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    reference: Tensor

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self.reference)

    @torch.no_grad()
    def distances(self, x: Tensor, counts: Tensor | None = None, *, batch: int = 256) -> tuple[Estimated, Estimated]:
        """(FD, KID) of samples x, with errors from bootstrap weights `[R, N]` (`metrics.bootstrap_counts`)."""
        features = torch.cat([self.of(part) for part in torch.split(x, batch)])
        return self._reference.frechet(features, counts), self._reference.kernel(features, counts)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A feature space with real images in it: what samples are compared with.

    Attributes:
        classifier: calibrated classifier whose features are the space.
        reference: stored real images uint8 `[N, C, H, W]`.
    """

    classifier: Classifier
    reference: Tensor

    @torch.no_grad()
    def frechet(self, images: Tensor) -> float:
        """FD (features: the classifier's) between stored images uint8 and the reference."""
        return self._reference.frechet(self.classifier.features(images)).value

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self.classifier.features(self.reference))

    @torch.no_grad()
    def confident_share(self, images: Tensor, threshold: float = 0.9) -> float:
        """Share of stored images uint8 that the calibrated classifier assigns with at least that probability."""
        confidence: Tensor = self.classifier(images).max(1).values
        return float((confidence >= threshold).double().mean())


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One row of the comparison.

    Attributes:
        sampler: its name.
        nfe: counted network evaluations per image.
        rmse: end-point RMSE against the teacher, None for a sampler that draws noise on the way.
        frechet: FD in the judge's features.
        confident: share recognised with confidence >= .9.
        images: the samples, stored grey levels uint8 `[N, C, H, W]`.
    """

    sampler: str
    nfe: int
    rmse: float | None
    frechet: float
    confident: float
    images: Tensor


def compare_samplers(
    denoiser: Denoiser,
    samplers: Mapping[str, Callable[[int], Plan | None]],
    evaluations: Sequence[int],
    *,
    noise: Tensor,
    teacher: Tensor,
    judge: Judge,
    pixels: Pixels,
    seed: int,
    cond: dict[str, Any] | None = None,
) -> list[Quality]:
    """Run every sampler at every number of evaluations from the same noise.

    Args:
        denoiser: the model.
        samplers: name -> function from the number of evaluations to a plan; None where there is none of that number.
        evaluations: numbers of network evaluations per image.
        noise: unit-normal states `[N, *shape]`.
        teacher: end points of the exact trajectories from `noise`.
        judge: feature space and reference.
        pixels: codec of the stored images.
        seed: of the draws of samplers that add noise; the same for each.
        cond: conditions, one entry per sample.
    """
    rows = []
    for name, plan_of in samplers.items():
        for n in evaluations:
            plan = plan_of(n)
            if plan is None:
                continue
            counted = Counted(denoiser)
            generator = torch.Generator().manual_seed(seed)
            x = sample(counted, plan, noise=noise, generator=generator, cond=cond)
            images = pixels.decode(x)
            rows.append(
                Quality(
                    sampler=name,
                    nfe=counted.evaluations,
                    rmse=None if plan.noisy else rmse(x, teacher),
                    frechet=judge.frechet(images),
                    confident=judge.confident_share(images),
                    images=images,
                )
            )
    return rows
