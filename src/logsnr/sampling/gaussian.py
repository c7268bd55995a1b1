"""The Gaussian start: the probability flow at high noise in closed form, down to where a plan begins.

At high noise the flow of any data is that of a Gaussian with the data's mean m and covariance C, in canonical z

    z(s1) = a1 m + ((a1^2 C + s1^2) / (a0^2 C + s0^2))^(1/2) (z(s0) - a0 m),        a, s = alpha, s of a noise level,

exact for Gaussian data, from every level (pure noise too: a0 = 0, s0 = 1) to every lower one.  Others leave it where
their finer structure begins to tell, which `held_out_error` measures.  A run that starts below spends no evaluation
near pure noise, where networks answer worst (Wang & Vastola, 2311.10892: analytical teleportation).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from logsnr import gaussian
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError, one_line, unknown
from logsnr.files import fingerprint
from logsnr.gaussian import Covariance, Kind, Residuals
from logsnr.noise import Path as StatePath
from logsnr.noise import alpha_s, path_scale
from logsnr.reading import check_format, mapping, open_tensors, parse_json, reading
from logsnr.sampling.batches import in_turn
from logsnr.sampling.loop import Step, sample
from logsnr.sampling.plan import Plan
from logsnr.sampling.start import Generators
from logsnr.sampling.start import start as first_noise
from logsnr.sampling.teacher import teacher_plan
from logsnr.writing import replace_file

FORMAT = 1
LABELS = "class_labels"
"""The condition that holds classes, unless told."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GaussianStart:
    """A Gaussian per class (or one for all) with the mean and covariance of some data.

        start = GaussianStart.fit(denoiser.encode(images))
        x = sample(denoiser, ge(flow_range(6, 30, .01, "min"), 1.5), n=8, generator=g, start=start)

    Attributes:
        shape: of one sample.
        means: one per class `[K, *shape]`, float64.
        covariances: one for all classes, or several.
        which: the covariance of each class.
        labels: the class that each mean is of; None of one for all.
        condition: the condition that names the class.
        made: what it was made from: "samples", "rank", and of a model's samples its fingerprint, "model".
    """

    shape: tuple[int, ...]
    means: Tensor
    covariances: tuple[Covariance, ...]
    which: tuple[int, ...] = (0,)
    labels: tuple[int, ...] | None = None
    condition: str = LABELS
    made: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        kinds = {f"{c.kind} ({len(c.values)})" if c.kind == "low-rank" else c.kind for c in self.covariances}
        of = "" if self.labels is None else f", {len(self.labels)} classes"
        shared = "" if len(self.covariances) == 1 else f" x {len(self.covariances)}"
        return f"GaussianStart({self.shape}, {', '.join(sorted(kinds))}{shared}{of})"

    @classmethod
    def fit(
        cls,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        null: int | None = None,
        rank: int | None = None,
        kind: Kind | Literal["auto"] = "auto",
        shared: bool | None = None,
        condition: str = LABELS,
    ) -> GaussianStart:
        """From samples in the units of x (`denoiser.encode(images)`, or latents).

        Args:
            x: samples `[N, *shape]`.
            labels: the class of each `[N]`: a mean per class; None for one Gaussian for all.
            null: a class that stands for none: the mean and covariance of all samples.
            rank: of a low-rank covariance; None for 64, a quarter of the samples where they are few.
            kind: "full", "low-rank" (isotropic beyond its rank), "cosine" (a variance per cosine of the DCT-II), or
                "auto" (`gaussian.fit`).
            shared: whether classes share one covariance; None: where samples are too few for one each.
            condition: the condition that names the class.

        Raises:
            LogsnrError: if the samples are not finite, do not fit their labels, or are too few.
        """
        if x.ndim < 2 or len(x) < 2 or not x.is_floating_point() or not bool(x.isfinite().all()):
            raise LogsnrError(
                f"samples are {x.dtype} of shape {tuple(x.shape)}: give at least two, [N, *shape], finite and in the "
                "units of x (stored images go through denoiser.encode)"
            )
        shape, made = tuple(x.shape[1:]), {"samples": len(x), "rank": rank}
        if labels is None:
            if null is not None:
                raise LogsnrError(f"null = {null} without labels: leave it out, or give labels")
            everything = Residuals.of(x)
            return cls(
                shape=shape,
                means=everything.means.reshape(1, *shape),
                covariances=(gaussian.fit(everything, kind, rank),),
                condition=condition,
                made=made,
            )
        if labels.shape != (len(x),) or labels.is_floating_point():
            raise LogsnrError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}: give one integer per sample, ({len(x)},)"
            )
        names, at = torch.unique(labels.to(x.device), return_inverse=True)
        told = [int(name) for name in names]
        if null in told:
            raise LogsnrError(
                f"null = {null} is the label of {int((labels == null).sum())} samples: give another class"
            )
        within = Residuals.of(x, at)
        if shared is None:
            shared = int(torch.bincount(at).min()) < gaussian.enough(within.means.shape[1], kind, rank)
        if shared:
            covariances, which = [gaussian.fit(within, kind, rank)], [0] * len(told)
        else:
            covariances = [gaussian.fit(Residuals.of(x[at == k]), kind, rank) for k in range(len(told))]
            which = list(range(len(told)))
        means = within.means
        if null is not None:
            everything = Residuals.of(x)
            covariances.append(gaussian.fit(everything, kind, rank))
            told, which, means = [*told, null], [*which, len(covariances) - 1], torch.cat([means, everything.means])
        return cls(
            shape=shape,
            means=means.reshape(-1, *shape),
            covariances=tuple(covariances),
            which=tuple(which),
            labels=tuple(told),
            condition=condition,
            made=made,
        )

    @classmethod
    def of(cls, mean: Tensor, covariance: Covariance | Tensor) -> GaussianStart:
        """From a mean `[*shape]` and a `gaussian.Covariance`, or the variances of its cosines `[C, *space]`."""
        if isinstance(covariance, Tensor):
            covariance = gaussian.of_spectrum(covariance)
        if covariance.dim != mean.numel():
            raise LogsnrError(
                f"a covariance of {covariance.dim} dimensions with a mean of shape {tuple(mean.shape)}: they must agree"
            )
        return cls(shape=tuple(mean.shape), means=mean.double()[None], covariances=(covariance,))

    @classmethod
    def of_model(
        cls,
        denoiser: Denoiser,
        n: int,
        *,
        plan: Plan | int = 20,
        generator: Generators,
        cond: Mapping[str, Any] | None = None,
        chunk: int = 256,
        **options: Any,
    ) -> GaussianStart:
        """From n samples that the model itself draws: for whoever has no data.

        Args:
            denoiser: the model.
            n: how many samples.
            plan: how they are drawn, as `sample` takes it.
            generator: source of their noise.
            cond: conditions by keyword; rows of tensors are used in turn.  Classes among them get a mean each.
            chunk: samples per call of the denoiser.
            **options: of `fit`.

        Raises:
            LogsnrError: as `fit`.
            ValueError: as `sample`.
        """
        condition = options.get("condition", LABELS)
        given = in_turn(cond, torch.arange(n))
        x = sample(denoiser, plan, n=n, generator=generator, cond=given, chunk=chunk)
        found = cls.fit(x, labels=given.get(condition), **options)
        return replace(found, made={**found.made, "model": fingerprint(denoiser.state_dict())})

    @property
    def fingerprint(self) -> str:
        """sha256 of its numbers."""
        return fingerprint(self._tensors())

    def to(self, device: torch.device | str) -> GaussianStart:
        """The same on another device, where it would be copied to by every call."""
        moved = tuple(c.to(device) for c in self.covariances)
        return replace(self, means=self.means.to(device), covariances=moved)

    @torch.no_grad()
    def __call__(
        self,
        noise: Tensor,
        sigma: float,
        cond: Mapping[str, Any] | None = None,
        *,
        sigma_from: float = math.inf,
        path: StatePath = "vp",
    ) -> Tensor:
        """The state at `sigma` that the flow brings a state at `sigma_from` to `[B, *shape]`, in the noise's dtype.

        Args:
            noise: the state z at `sigma_from` `[B, *shape]`: pure noise, where that is the model's largest level.
            sigma: noise level to go to, in [0, sigma_from].
            cond: conditions, with the classes where there are means per class.
            sigma_from: where `noise` is a state of the model; inf is the limit.
            path: "vp" for z itself, "flow" for z / (alpha + s), what a flow pipeline's latents are; "ve" for z / alpha.

        Raises:
            LogsnrError: if shapes, levels or classes do not fit.
        """
        if tuple(noise.shape[1:]) != self.shape:
            raise LogsnrError(f"noise of shape {tuple(noise.shape)}: this start is of samples of shape {self.shape}")
        if not 0 <= sigma <= sigma_from:
            raise LogsnrError(f"sigma = {sigma}: the start leads from {sigma_from:.6g} down; give a level in between")
        at = self.classes(cond, len(noise))
        if sigma == sigma_from and path == "vp":
            return noise
        (a0, s0), (a1, s1) = alpha_s(sigma_from), alpha_s(sigma)
        scale = path_scale(path, a1, s1)

        def gain(values: Tensor) -> Tensor:
            return scale * ((a1 * a1 * values + s1 * s1) / (a0 * a0 * values + s0 * s0)).sqrt()

        out = torch.empty_like(noise, dtype=torch.promote_types(noise.dtype, torch.float32))
        size = max(2**24 // max(noise[0].numel(), 1), 1)
        for index, covariance in enumerate(self.covariances):
            mine = [i for i, k in enumerate(at) if self.which[k] == index]
            for first in range(0, len(mine), size):
                part = torch.tensor(mine[first : first + size], device=noise.device)
                z = gaussian.wide(noise[part])
                mean = self.means.flatten(1)[[at[i] for i in mine[first : first + size]]].to(z)
                moved = covariance.mapped(gain, z - a0 * mean).add_(mean, alpha=scale * a1)
                out[part] = moved.reshape(-1, *self.shape).to(out)
        return out

    def classes(self, cond: Mapping[str, Any] | None, n: int) -> list[int]:
        """The mean of each of n samples, by its place.

        Raises:
            LogsnrError: if a class has no mean, or is not told.
        """
        given = (cond or {}).get(self.condition)
        if given is None:
            if self.labels is not None:
                raise LogsnrError(
                    f"this start has a mean per class: give cond={{{self.condition!r}: ...}}, or fit one for all, "
                    "without labels"
                )
            return [0] * n
        if self.labels is None:
            raise LogsnrError(
                f"cond has {self.condition}, and this start one mean for all: fit it with labels= (and null= for the "
                "class that stands for none)"
            )
        told = torch.as_tensor(given).reshape(-1).tolist()
        places = {label: i for i, label in enumerate(self.labels)}
        for label in told:
            if label not in places:
                raise unknown("class", label, self.labels, ", of which this start has a mean")
        return [places[label] for label in told] * (1 if len(told) == n else n)

    def check(self, denoiser: Denoiser) -> None:
        """Whether a model may start from it.

        Raises:
            LogsnrError: if it is of another shape, or of another model's samples.
        """
        if self.shape != tuple(denoiser.shape):
            raise LogsnrError(
                f"the start is of samples of shape {self.shape}, the model's have {tuple(denoiser.shape)}: fit it to "
                "samples of this model"
            )
        own = self.made.get("model")
        if own is not None and own != (found := fingerprint(denoiser.state_dict())):
            raise LogsnrError(
                f"the start is of samples of another model ({own[:12]}..., this one is {found[:12]}...; other weights, "
                "precision or guidance): make it of this one, or of data"
            )

    @torch.no_grad()
    def held_out_error(
        self,
        denoiser: Denoiser,
        *,
        noise: Tensor | None = None,
        n: int | None = None,
        generator: Generators | None = None,
        cond: Mapping[str, Any] | None = None,
        steps: int = 64,
        chunk: int | None = None,
    ) -> dict[float, float]:
        """How far from the teacher's state the start leads, by noise level: RMSE of y = z/alpha, over sigma_data.

        Args:
            denoiser: the model.
            noise: states at the largest level of its sampling range, that nothing was fitted to; or
            n: how many to draw.
            generator: source of the draws.
            cond: conditions by keyword; rows of tensors are used in turn.
            steps: evaluations of the teacher, whose levels are the lattice.
            chunk: samples per call of the denoiser.

        Raises:
            LogsnrError: as `check` and a call.
        """
        self.check(denoiser)
        low, high = denoiser.sampling_range
        z = first_noise(denoiser, noise, n, generator)
        given, found = in_turn(cond, torch.arange(len(z))), {}

        def compare(step: Step) -> None:
            if step.sigma > 0:
                apart = self(z, step.sigma, given, sigma_from=high).double() - step.z.double()
                found[step.sigma] = float(apart.square().mean().sqrt()) / alpha_s(step.sigma)[0] / denoiser.sigma_data

        sample(denoiser, teacher_plan(steps, low, high), noise=z, cond=given, chunk=chunk, callback=compare)
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it whole, as safetensors with its facts in the header.

        Raises:
            LogsnrError: if the disk refuses.
        """
        facts = {
            "format": FORMAT,
            "shape": self.shape,
            "which": self.which,
            "labels": self.labels,
            "condition": self.condition,
            "kinds": [c.kind for c in self.covariances],
            "made": dict(self.made),
            "fingerprint": self.fingerprint,
        }
        target = Path(path)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._tensors().items()}
        try:
            replace_file(target, to_bytes(tensors, {"logsnr_start": json.dumps(facts)}))
        except OSError as error:
            raise LogsnrError(
                f"cannot write {target}: {error.strerror or one_line(error)}; free some space or choose another folder"
            ) from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GaussianStart:
        """What `save` wrote.

        Raises:
            LogsnrError: if it is missing, damaged, or another file.
        """
        fix = "give the file that GaussianStart.save or logsnr calibrate --start wrote"
        with reading(path, fix, "a Gaussian start"):
            header, tensors = open_tensors(path)
            facts = mapping(parse_json(header.get("logsnr_start", "{}")), "its header", fix)
            check_format(facts.get("format"), FORMAT, "the start", fix)
            shape, own = tuple(facts["shape"]), gaussian.from_tensors
            covariances = tuple(own(kind, shape, tensors, f"{i}.") for i, kind in enumerate(facts["kinds"]))
            found = cls(
                shape=shape,
                means=tensors["means"],
                covariances=covariances,
                which=tuple(facts["which"]),
                labels=None if facts["labels"] is None else tuple(facts["labels"]),
                condition=facts["condition"],
                made=facts["made"],
            )
            if found.fingerprint != facts["fingerprint"]:
                raise LogsnrError("it was altered (its numbers are not those that its header names): copy it again")
        return found

    def _tensors(self) -> dict[str, Tensor]:
        out = {"means": self.means}
        for i, covariance in enumerate(self.covariances):
            out |= {f"{i}.{name}": value for name, value in covariance.tensors().items()}
        return out
