"""The passport itself: what was measured of a denoiser, and what follows, as frozen values that go to JSON and back.

Every curve is over noise levels sigma; errors are per dimension (`loss` = E||eps_hat - eps||^2 / D) unless said
otherwise.  nan stands for what could not be measured.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.reading import check_format, read_json, reading
from logsnr.writing import replace_file

VERSION = 1
Kind = Literal["usable", "nfe", "labels", "misfit", "undertrained", "short", "half", "non_finite"]
Severity = Literal["info", "warning", "error"]
Way = Literal["model", "label"]
"""How a model is told another noise level: as a whole, or a network by its label alone."""
Source = Literal["data", "model", "noise"]
"""Where the clean samples come from: the data given; the model's own draws; noise, as its draws are not finite."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence about the model, with the number it rests on.

    Attributes:
        kind: what it is about.
        severity: "info" for what is so of every model, "warning" and "error" for trouble.
        text: the sentence.
        value: its number.
        threshold: what the number was held against, None for information.
        sigmas: the noise levels it is about, (smallest, largest); None where it is about no level.
    """

    kind: Kind
    severity: Severity
    text: str
    value: float
    threshold: float | None = None
    sigmas: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Level:
    """The model at one noise level, on forward-noised samples.

    Attributes:
        sigma: the noise level.
        trained: whether it lies in the range that the model says it was trained on.
        loss: E||eps_hat - eps||^2 / D.
        stderr: its standard error over samples.
        linear: the same loss of the linear denoiser fitted to other samples.
        ratio: loss / linear.
        ratio_stderr: its standard error, of paired samples.
        eps_norm: E||eps_hat||^2 / D.
        eps_norm_ideal: what it is for a denoiser whose error is orthogonal to its answer, E||eps||^2 / D - loss.
        bias: ||E x0_hat - E x|| / (sqrt(D) sigma_data), with the noise of the means taken off.
        non_finite: samples whose answer had nan or inf; the numbers are over the others.
    """

    sigma: float
    trained: bool
    loss: float
    stderr: float
    linear: float
    ratio: float
    ratio_stderr: float
    eps_norm: float
    eps_norm_ideal: float
    bias: float
    non_finite: int


@dataclass(frozen=True, kw_only=True)
class LabelScan:
    """Errors of the model when it is told k sigma where the noise is sigma.

    Attributes:
        sigmas: the noise levels that could be judged.
        factors: the k's.
        way: how the model was told, of the two the one with the least error.
        curve: mean over levels of error(k) / error(1), one entry per factor.
        factor: c, as if sigma were c sigma: 1/k at the least error; nan if fewer than three levels could be judged.
        stderr: standard error of ln c.
        per_level: c of every level alone.
        per_level_stderr: standard error of its ln.
        at_edge: whether the least error lies at the end of the scan, which bounds c only.
    """

    sigmas: tuple[float, ...]
    factors: tuple[float, ...]
    way: Way
    curve: tuple[float, ...]
    factor: float
    stderr: float
    per_level: tuple[float, ...]
    per_level_stderr: tuple[float, ...]
    at_edge: bool


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Between which noise levels the network's answers are of use, without data (`logsnr.probe`).

    Attributes:
        low: the smallest.
        high: the largest.
        evaluations: what it took.
    """

    low: float
    high: float
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """How far a start from pure noise is from a start from the noisiest state of the data.

    Attributes:
        sigma: the largest noise level of the sampling range.
        mean_leak: ||E x|| / sigma, the shift of the true starting states in units of the noise.
        variance_leak: largest eigenvalue of the covariance / sigma^2: their extra variance in its direction.
        kl: of Gaussians with these moments, KL(true starting states || pure noise) in nats per sample.
        mean_shift: of samples drawn from pure noise: (their mean - that of the data) along the data's mean, in
            standard deviations of the data in that direction.
        mean_shift_stderr: its standard error.
    """

    sigma: float
    mean_leak: float
    variance_leak: float
    kl: float
    mean_shift: float
    mean_shift_stderr: float


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The model as a projection, at one noise level: medians and 90 % quantiles over samples.

    Attributes:
        sigma: the noise level.
        eta: relative error as a projection on the reference set; nan without data.
        eta_high: its 90 % quantile.
        nu: max(ratio, 1/ratio) of sqrt(D) sigma and the distance to the reference set; nan without data.
        change: how far x0 moves when it is denoised again half way, over the distance to it.
        change_high: its 90 % quantile.
    """

    sigma: float
    eta: float
    eta_high: float
    nu: float
    change: float
    change_high: float


@dataclass(frozen=True, kw_only=True)
class Bend:
    """The trajectory at one noise level.

    Attributes:
        sigma: the noise level.
        curvature: RMS of d eps / d ln sigma along exact trajectories.
    """

    sigma: float
    curvature: float


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """gamma* of one step of DDIM (see `evaluation.gamma`).

    Attributes:
        sigma: noise level of the step.
        gamma: the weight with the least error of the combined direction.
    """

    sigma: float
    gamma: float


@dataclass(frozen=True, kw_only=True)
class EndPoint:
    """What a few evaluations buy.

    Attributes:
        solver: its name.
        nfe: steps; a guided model asks its network more often.
        rmse: end-point RMSE against the many-step teacher from the same noise, over sigma_data.
    """

    solver: str
    nfe: int
    rmse: float


@dataclass(frozen=True, kw_only=True)
class HalfPrecision:
    """The model under autocast at one noise level, beside float32.

    Attributes:
        dtype: "bfloat16" or "float16".
        sigma: the noise level.
        excess: E||eps_half - eps_32||^2 over the model's own squared error.
        non_finite: samples that are finite in float32 and not in this precision.
    """

    dtype: str
    sigma: float
    excess: float
    non_finite: int


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a person looks at: uint8 `[., C, H, W]`, 0 ... 255, row by row.

    Attributes:
        sigmas: the noise levels of `denoised`.
        denoised: rows of (noisy, denoised) samples, one pair of rows per noise level.
        columns: samples per row.
        trajectory: x0 along sampling trajectories, one row each.
        steps: noise levels of its columns; the last column is the end.
    """

    sigmas: tuple[float, ...]
    denoised: Tensor
    columns: int
    trajectory: Tensor
    steps: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Passport:
    """Everything measured of one denoiser.

    Attributes:
        model: its name.
        network: what its card says of it.
        shape: of one sample.
        sigma_data: its standard deviation of the data.
        parameters: number of weights.
        trained_range: (smallest, largest) sigma it says it was trained on.
        declared_range: the part of it that sampling needs, `denoiser.sampling_range`.
        sampling_range: the part of that in which the model is usable: what to sample and calibrate on.
        source: where the clean samples come from.
        samples: how many were noised at every level.
        references: how many others the linear denoiser and the distances were taken from.
        trajectories: how many sampling trajectories.
        seed: of every draw.
        findings: what follows.
        levels: curves over noise levels, from noisy to clean.
        labels: the scan of noise labels, None where it was not made (no data, nothing finite).
        start: of pure noise, None where nothing could be measured.
        projection: the model as a projection.
        bends: curvature of exact trajectories.
        gammas: gamma* per step.
        end_points: errors of few-step sampling.
        teacher_error: RMSE between the teacher and one of half its steps, over sigma_data.
        half: half precision, empty for a model without weights.
        evaluations: network evaluations of single samples, part by part.
        corrected: the levels again with labels put right, where they are wrong: what usable and undertrained rest on.
        probe: where the network is of use without data; None where it was not asked, or found no such level.
        pictures: None for data that are no images, and after loading.
    """

    model: str
    network: str
    shape: tuple[int, ...]
    sigma_data: float
    parameters: int
    trained_range: tuple[float, float]
    declared_range: tuple[float, float]
    sampling_range: tuple[float, float]
    source: Source
    samples: int
    references: int
    trajectories: int
    seed: int
    findings: tuple[Finding, ...]
    levels: tuple[Level, ...]
    labels: LabelScan | None
    start: Start | None
    projection: tuple[Projection, ...]
    bends: tuple[Bend, ...]
    gammas: tuple[Gamma, ...]
    end_points: tuple[EndPoint, ...]
    teacher_error: float
    half: tuple[HalfPrecision, ...]
    evaluations: dict[str, int]
    corrected: tuple[Level, ...] = ()
    probe: Probed | None = None
    pictures: Pictures | None = field(default=None, compare=False, repr=False)
    interrupted: bool = False

    @property
    def troubles(self) -> tuple[Finding, ...]:
        """The findings that are not mere information."""
        return tuple(f for f in self.findings if f.severity != "info")

    @property
    def judged(self) -> tuple[Level, ...]:
        """The levels that usable and undertrained rest on."""
        return self.corrected or self.levels

    @property
    def cost(self) -> int:
        """All network evaluations of single samples."""
        return sum(self.evaluations.values())

    @property
    def eta_curve(self) -> tuple[tuple[float, float], ...]:
        """(sigma, 90 % quantile of eta), as `grids.admissible` and `theory` take it; empty without data."""
        return tuple((e.sigma, e.eta_high) for e in self.projection if math.isfinite(e.eta_high))

    def finding(self, kind: Kind) -> Finding | None:
        """The finding of a kind, None where there is none."""
        return next((f for f in self.findings if f.kind == kind), None)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, without the pictures; infinities and nan as strings; `interrupted` where it was."""
        values = {"version": VERSION, "kind": "passport", **_plain(self)}
        return values if self.interrupted else {k: v for k, v in values.items() if k != "interrupted"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file whole."""
        replace_file(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Passport:
        """Read what `save` wrote; the pictures are not in it.

        Raises:
            LogsnrError: if the file is missing, damaged, or no passport of this version.
        """
        found = read_json(path, "give the .json file of `logsnr passport`", "a passport")
        fix = "make it again with `logsnr passport MODEL`"
        if found.get("kind") != "passport":
            raise LogsnrError(f"{path} is no passport: {fix}")
        check_format(found.get("version"), VERSION, str(path), fix)
        with reading(path, fix, "a passport"):
            passport = _value(cls, {k: v for k, v in found.items() if k not in ("version", "kind")})
            assert isinstance(passport, cls)
            return passport


def _plain(value: Any) -> Any:
    """JSON values of a dataclass, pictures left out."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name != "pictures"}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _value(kind: Any, value: Any) -> Any:
    """The value of an annotated type that `_plain` made JSON of."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        inner = next(k for k in get_args(kind) if k is not type(None))
        return None if value is None else _value(inner, value)
    if origin is tuple:
        return tuple(_value(get_args(kind)[0], v) for v in value)
    if origin is dict:
        return dict(value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _value(hints[name], v) for name, v in value.items()})  # type: ignore[operator]
    return float(value) if kind is float else value
