"""The sections of a recipe: data, prediction, objective, optimizer, average and pictures.

Each refuses unknown keys, and values that no training could do with.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from logsnr.errors import unknown
from logsnr.predictions import LABELS, PREDICTIONS
from logsnr.sampling.names import SOLVERS, find_solver, named_plan
from logsnr.sampling.plan import Plan
from logsnr.training.images import REFUSE, colour

Count = Annotated[int, Field(ge=1, le=10**9)]
Few = Annotated[int, Field(ge=1, le=10_000)]
Side = Annotated[int, Field(ge=1, le=4096)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Part = str | dict[str, Any]
"""A name, or a mapping of `name` and the parameters of that class."""


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Images to train on (data.py lists the formats).

    Args:
        source: "digits", an .npz or .npy file, a folder of images or of `logsnr generate`; paths are relative to the
            working directory.
        grey_levels: per channel (digits have 17, whatever is said here); 2, 4, ... 128 make low-bit data of 8-bit
            images; recipes of before say `levels`.
        size: for folders: crop to the central square and resize to this side.
        crop: for folders, how size is reached: "square", the central square resized (Lanczos), or "adm", halved by
            boxes, bicubic to the shorter side, then cropped, as ImageNet is in ADM and EDM.
        channels: for folders: 1 for grey, 3 for colour (the default).
        background: for folders: colour under transparent parts, by name or as "#rrggbb"; "refuse" for an error instead.
        broken: for folders: "stop" at a file that cannot be read, or "skip" and report it.
        shape: [channels, height, width] that every image is expected to have: other data are refused, and dry runs and
            smoke tests go by it without data.
        classes: number of classes that the labels are expected to have, likewise.
        layout: for arrays: "NHWC" or "NCHW", where the shape leaves it open.
        holdout: fraction of the images held out, where the source has no held-out part of its own.
        split_seed: seed of that split; the held-out part stays the same for every training seed.
        flip: mirror each image left to right with probability 1/2.
        in_memory: whether images are taken into memory, or read as they are needed; by default up to 1 GiB
            of them, of a folder up to 10,000.
        workers: processes that read ahead what is not in memory; 0 for none.
        vae: for latents: the folder of the VAE that decodes the pictures of a training; none are drawn without.
    """

    source: str = "digits"
    grey_levels: Annotated[int, Field(ge=2, le=256, validation_alias=AliasChoices("grey_levels", "levels"))] = 256
    size: Annotated[int, Field(ge=2, le=4096)] | None = None
    crop: Literal["square", "adm"] = "square"
    channels: Literal[1, 3] | None = None
    background: str = "white"
    broken: Literal["stop", "skip"] = "stop"
    shape: tuple[Side, Side, Side] | None = None
    classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    layout: Literal["NHWC", "NCHW"] | None = None
    holdout: Probability = 0.1
    split_seed: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    in_memory: bool | None = None
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    vae: str | None = None

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        if value != REFUSE:
            colour(value)
        return value


class PredictionConfig(Section):
    """What the network's output means (predictions.py).

    Args:
        name: a name of `PREDICTIONS`.
        label: how the network is told the noise level; "flow" (1000 t) suits the U-Net.
        path: "vp", "ve" or "flow", the scaling of the network's input; the prediction's own by default.
    """

    name: str = "edm"
    label: str = "flow"
    path: Literal["vp", "ve", "flow"] | None = None

    @model_validator(mode="after")
    def _known(self) -> PredictionConfig:
        for key, value, known in (("name", self.name, PREDICTIONS), ("label", self.label, LABELS)):
            if value not in known:
                raise unknown(key, value, known)
        if self.name == "edm" and self.path is not None:
            raise ValueError(f"path = {self.path!r}: EDM prediction scales its own input; leave path out")
        return self


class AdaptiveConfig(Section):
    """How the density of noise levels is learned (schedules/adaptive.py).

    Args:
        importance: p ~ w times "error" or "gradient"; "auto" takes the gradient for the ELBO, where the error
            stays large at levels that teach little, and the error otherwise.
        bins: bins of log-SNR.
        decay: memory per draw.
        floor: share of uniform draws.
        true_every: for the gradient, steps between measurements of true gradient norms over all parameters, which
            mend the last layer's (0 = never).
        true_samples: draws in each, over all processes.
    """

    importance: Literal["auto", "error", "gradient"] = "auto"
    bins: Few = 100
    decay: Probability = 0.999
    floor: Annotated[float, Field(gt=0, le=1)] = 0.01
    true_every: Annotated[int, Field(ge=0)] = 50
    true_samples: Count = 8

    @field_validator("importance", mode="before")
    @classmethod
    def _gone(cls, value: Any) -> Any:
        if value == "rms":
            raise ValueError("'rms' never did better than 'error' and is no more: give error or gradient")
        return value


class ObjectiveConfig(Section):
    """What is minimised (objectives.py): a preset by name, or a weighting and a schedule.

    Args:
        preset: a name of `objectives`, e.g. "vdm++/sigmoid".
        weighting: name, or {name: sigmoid, bias: 2.0}; with `schedule`, in place of a preset.  Besides its parameters
            `shift: s` moves it along log-SNR, `envelope: true` holds it at its peak for noisier levels, and `base` is
            the weighting that min-snr and its kind multiply: {name: edm-monotonic, shift: -1.386} is for 128 pixels.
        schedule: name, or {name: cosine, shift: 0}: the density of noise levels in training; with a preset it is cut
            to the preset's end points.
        logsnr: (lo, hi) to which noise levels are truncated.
        adaptive: true, or {importance: gradient, ...}: learn the density during training.  It starts from `schedule`
            where one is named, else from what an untrained network is good for.
        target: "sample" regresses on the image that a state was made of; "batch" on the mean of all images of the
            batch that it could have been made of (posterior.py), which varies less and is biased by O(1/batch).
        uncertainty: divide by a learned e^u, as EDM2 does (uncertainty.py): trains w e^-u = 2 p/E[error] instead of w.
    """

    preset: str | None = None
    weighting: Part | None = None
    schedule: Part | None = None
    logsnr: tuple[Finite, Finite] | None = None
    adaptive: AdaptiveConfig | None = None
    target: Literal["sample", "batch"] = "sample"
    uncertainty: bool = False

    @field_validator("adaptive", mode="before")
    @classmethod
    def _switched(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {} if value else None
        if value is not None and not isinstance(value, (dict, AdaptiveConfig)):
            raise ValueError(f"{value!r}: give true, false or a mapping, e.g. {{importance: gradient}}")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> ObjectiveConfig:
        if self.preset is None and self.weighting is not None and self.schedule is None and self.adaptive:
            if self.logsnr is None:
                raise ValueError("an adaptive density without a schedule needs its range: set logsnr: [lo, hi]")
        elif self.preset is None and (self.weighting is None or self.schedule is None):
            raise ValueError("give a preset, or both a weighting and a schedule")
        if self.preset is not None and self.weighting is not None:
            raise ValueError(f"preset = {self.preset!r} brings its own weighting: give a preset or a weighting")
        if self.uncertainty and self.adaptive:
            raise ValueError(
                "uncertainty weights by p over the error, and an adaptive p is w times the error: together w again; "
                "leave one of them out"
            )
        if self.logsnr is not None and not self.logsnr[0] < self.logsnr[1]:
            raise ValueError(f"logsnr = {list(self.logsnr)}: give [lo, hi] with lo < hi")
        return self

    def describe(self) -> str:
        """The objective in a few words, e.g. "sigmoid(bias=2) on [-10, 10], adaptive from cosine"."""
        name = self.preset or _words(self.weighting)
        name += ", batch posterior" if self.target == "batch" else ""
        where = "" if self.logsnr is None else f" on [{self.logsnr[0]:g}, {self.logsnr[1]:g}]"
        drawn = _words(self.schedule) if self.schedule is not None else "the preset's schedule"
        if self.adaptive:
            by = "" if self.adaptive.importance == "auto" else f" by {self.adaptive.importance}"
            start = "" if self.schedule is None else f" from {drawn}"
            return f"{name}{where}, adaptive{by}{start}"
        over = " over its learned uncertainty" if self.uncertainty else ""
        return f"{name}{over}{where}" if self.schedule is None else f"{name}{over}{where}, drawn by {drawn}"


def _words(part: Part | None) -> str:
    if part is None or isinstance(part, str):
        return part or ""
    parameters = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={_words(value) if key == 'base' else value}"
        for key, value in part.items()
        if key != "name"
    )
    return f"{part.get('name')}({parameters})" if parameters else str(part.get("name"))


class OptimizerConfig(Section):
    """AdamW, or another optimizer of torch (optimizers.py).

    Args:
        name: "adamw", or a class of torch.optim, e.g. "torch.optim:SGD".
        settings: its arguments beside lr, e.g. {momentum: 0.9}; of AdamW betas and weight_decay alone.
        lr: learning rate after warm-up.
        betas: decay of AdamW's two moments.
        weight_decay: AdamW's decoupled weight decay.
        warmup: steps over which the learning rate rises linearly.
        decay: "constant" afterwards, "linear" or "cosine" to zero at the recipe's last step, or "inverse-sqrt", as
            sqrt(after/n).
        after: step at which inverse-sqrt begins to fall; the end of the warm-up if null.
        clip: largest gradient norm of the loss *divided by the objective's scale*; null for no clipping.
    """

    name: str = "adamw"
    settings: dict[str, bool | int | float | str | list[float] | None] = {}
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-3
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 100
    decay: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "constant"
    after: Count | None = None
    clip: PositiveFloat | None = 1.0

    @model_validator(mode="after")
    def _its_own(self) -> OptimizerConfig:
        if self.after is not None and self.decay != "inverse-sqrt":
            raise ValueError(f"after = {self.after} is of decay: inverse-sqrt: leave it out")
        fields = OptimizerConfig.model_fields
        for key in ("betas", "weight_decay"):
            if self.name != "adamw" and getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} is of adamw: of {self.name} give it under settings")
        if self.name == "adamw" and self.settings:
            raise ValueError("settings are of other optimizers: adamw takes betas and weight_decay")
        return self


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class EMAConfig(Section):
    """Exponential moving averages of the weights; `ramp` starts them short: min(decay, (1 + n) / (10 + n)) at update n.

    Args:
        decay: of the average that becomes the model.
        half_life: images after which an old weight counts half, in place of decay: 2^(-batch/half_life).
        ramp: as above.
        others: names and half-lives of further averages, kept beside the model in averages/NAME.
    """

    decay: Probability = 0.999
    half_life: PositiveFloat | None = None
    ramp: bool = True
    others: dict[Name, PositiveFloat] = {}

    def decays(self, batch: int) -> dict[str, float]:
        """The decay of each average by name; "" is the model's."""
        lives = self.others if self.half_life is None else {"": self.half_life, **self.others}
        return {"": self.decay, **{name: 2 ** (-batch / life) for name, life in lives.items()}}

    @model_validator(mode="after")
    def _one(self) -> EMAConfig:
        if self.half_life is not None and self.decay != EMAConfig.model_fields["decay"].default:
            raise ValueError(f"half_life = {self.half_life:g} stands in place of decay: leave one of them out")
        return self


class SamplesConfig(Section):
    """Pictures of samples: every `every` steps (0 = never), `count` images from fixed noise.

    Args:
        every: steps between pictures.
        count: images in one.
        solver: a name of `sampling.names`, e.g. "ge" or "DPM++(3M)".
        steps: network evaluations per image.
        gamma: gradient estimation's extrapolation; 2 where nothing is said.
    """

    every: Annotated[int, Field(ge=0)] = 1000
    count: Few = 64
    solver: str = "ge"
    steps: Few = 20
    gamma: PositiveFloat | None = None

    @model_validator(mode="after")
    def _a_plan(self) -> SamplesConfig:
        if self.gamma not in (None, 1.5, 2.0) and self._gamma is None:  # 0.1 wrote these whatever the solver
            raise ValueError(f"gamma = {self.gamma} is of gradient estimation: leave it out with solver {self.solver}")
        self.plan(0.01, 100.0, 1.0)
        return self

    @property
    def _gamma(self) -> float | None:
        takes = SOLVERS[find_solver(self.solver, "rows", "plan")[0]].takes
        return self.gamma if "gamma" in takes else None

    def plan(self, low: float, high: float, sigma_data: float) -> Plan:
        """The sampler of a model with this range of noise levels."""
        return named_plan(self.solver, self.steps, low, high, sigma_data=sigma_data, gamma=self._gamma)
