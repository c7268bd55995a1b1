"""diffusers pipelines as denoisers: the network, what its config says of it, a prompt, and the codec of its images.

    denoiser = logsnr.load("folder or hub id", prompt="a cat", guidance=7.5)
    x = logsnr.sample(denoiser, plan, n=4, generator=generator)        # latents; no conditions to pass
    images = denoiser.decode(x)                                            # uint8; decode_float: in [-1, 1]

    D(z, sigma) = Prediction(network(c_in z, label(sigma), conditions)),   guided: null + guidance (conditional - null)

Prediction, label and levels come from the pipeline's scheduler config (noising.py); guidance is `logsnr.guidance.cfg`,
in diffusers' convention (1 or less is none), except where the network itself is told the scale (Flux dev, LCM): there
it is an input.  The denoiser is over z, whatever the pipeline's own state is; any plan, bound or measurement takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logsnr.adapters import require_diffusers, version_of
from logsnr.adapters.diffusers.classes import MODEL
from logsnr.adapters.diffusers.config import Noising, stated_prediction
from logsnr.adapters.diffusers.pipelines.families import Conditions, Family, Prompt, Size, family_of
from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
from logsnr.errors import LogsnrError, one_line
from logsnr.guidance import Guided, cfg
from logsnr.pixels import Pixels
from logsnr.predictions import EDM, LABELS, Prediction
from logsnr.reading import reading
from logsnr.timesteps import TimestepTable

MODEL_KEYS = (MODEL - {"variance_type"}) | {"sigma_data"}
"""Keys of a scheduler's config that say what the network was trained on."""
PIXEL_SIGMA_DATA, LATENT_SIGMA_DATA = 0.5, 1.0


class PipelineDenoiser(Denoiser):
    """A pipeline's network as a denoiser, with a prompt and guidance built in.

    Conditions given by keyword replace those of the prompt; `conditions(prompt)` makes them.  Those of a single prompt
    serve a batch of any size.

    Attributes:
        plain: the network alone, a `NetworkDenoiser` that takes every condition by keyword.
        cond: the prompt's conditions, by keyword.
        null: the conditions that stand for "no prompt", where they were needed or a negative prompt was given.
        card: what is on record: the pipeline's and the network's class, the number of classes.
        pipeline: the pipeline itself, for its text encoders.
        pixels: 8-bit images' codec of a pixel model; None for latents, whose codec is the VAE.
    """

    def __init__(self, family: Family, plain: NetworkDenoiser, cond: Conditions, null: Conditions, guidance: float):
        super().__init__()
        self.plain = plain
        self.guidance = float(guidance)
        self.guided: Denoiser = family.guided(plain, guidance, null) if family.guides(guidance) else plain
        self.vae = family.vae
        self.cond, self.null = cond, null
        self.pipeline = family.pipeline
        self.shape, self.sigma_data, self.trained_range = plain.shape, plain.sigma_data, plain.trained_range
        self.pixels = plain.pixels
        self.card = {
            "pipeline": type(family.pipeline).__name__,
            "network": type(family.model).__name__,
            "prediction": plain.prediction.name,
            "classes": family.classes,
            "null_class": family.null_class,
        }
        plain.card = self.card
        self._family = family
        self._latents = family.latents

    @property
    def prediction(self) -> Prediction:
        """The meaning of the network's output."""
        return self.plain.prediction

    @property
    def told(self) -> str | None:
        """What the model must be told: "a text", "a class" or None."""
        if "class_labels" in self._family.needs:
            return "a class"
        return "a text" if self._family.needs else None

    @property
    def finite_at_inf(self) -> bool:
        return self.plain.finite_at_inf

    def cost(self, sigma: float) -> int:
        return self.guided.cost(sigma)

    def conditions(self, prompt: Prompt) -> Conditions:
        """The conditions of other prompts or classes, one row each, for `sample(..., cond=)`."""
        return self._family.conditions(prompt, self.guidance)

    @property
    def about(self) -> dict[str, Any]:
        """What a plan's file says of the model: its scheduler's config, without what diffusers keeps there for itself
        and what only samples; with the prediction that a flow's config leaves to its class."""
        config = self.pipeline.scheduler.config
        own = {key: value for key, value in config.items() if key in MODEL_KEYS and value is not None}
        kind = stated_prediction(str(config.get("_class_name") or ""), config)
        if kind is not None:
            own["prediction_type"] = kind
        return {"network": self.card["network"], "scheduler": own}

    def guided_each(self) -> Denoiser:
        """Guidance by each sample's own scale, the condition `guidance_scale` `[B]`.

        Raises:
            LogsnrError: if the family's guidance is not `logsnr.guidance.cfg`'s, or nothing guides.
        """
        if type(self.guided) is not Guided or self._family.row.added:
            raise LogsnrError(
                f"guidance drawn from a range: {self.card['pipeline']} "
                + ("has no guidance" if self.guided is self.plain else "guides in its own way")
                + "; give one scale"
            )
        return cfg(self.plain, None, self.null)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        estimate: Estimate = self.guided(z, sigma, **self._all(z, cond))
        return estimate

    def eps_error(self, x: Tensor, eps: Tensor, sigma: float | Tensor, **cond: Any) -> Tensor:
        if self.guided is self.plain:
            return self.plain.eps_error(x, eps, sigma, **self._all(x, cond))
        return super().eps_error(x, eps, sigma, **cond)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples x (latents, or the images of a pixel model) of images in [-1, 1], or of uint8 grey levels.

        Args:
            images: `[B, C, H, W]`; videos `[B, C, F, H, W]`.
            generator: draws from the VAE's posterior; None takes its mean.

        Raises:
            ValueError: if the images do not fit.
        """
        return self._latents.encode(images, generator)

    def decode(self, x: Tensor) -> Tensor:
        """8-bit images `[B, C, H, W]`, uint8, of samples x."""
        return Pixels(256).decode(self.decode_float(x))

    def decode_float(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` of samples x as the pipeline has them: float32, about [-1, 1], not clamped."""
        return self._latents.decode(x)

    def _facts(self) -> list[str]:
        told = [] if self.told is None else [f"told {self.told}"]
        guided = [f"guidance {self.guidance:g}"] if self.guided is not self.plain or self._family.embedded else []
        return [str(self.card["pipeline"]), repr(self.plain), *told, *guided]

    def check_cond(self, cond: Mapping[str, Any]) -> None:
        self._check_told(cond)
        self.guided.check_cond({**self.cond, **cond})

    def _all(self, z: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        self._check_told(cond)
        return {**{key: _rows(value, z) for key, value in self.cond.items() if key not in cond}, **cond}

    def _check_told(self, cond: Mapping[str, Any]) -> None:
        missing = [key for key in self._family.needs if key not in cond and key not in self.cond]
        if missing:
            what = "a class" if self.told == "a class" else "a prompt"
            raise LogsnrError(
                f"this model needs {what}: load it with prompt=..., or pass {', '.join(missing)} by keyword "
                "(denoiser.conditions(prompt) makes them)"
            )


def denoiser_from(
    pipeline: Any,
    *,
    prompt: Prompt | None = None,
    negative_prompt: Prompt | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    frames: int | None = None,
    null_class: int | None = None,
) -> PipelineDenoiser:
    """The denoiser inside a diffusers pipeline, which it shares; networks are put in eval mode.

    Args:
        pipeline: one whose network is in `families.FAMILIES`: DDPM, DDIM, Stable Diffusion, SDXL, DiT, SD3, Flux, ...
            (their image-to-image and inpaint forms too).
        prompt: a text or several, or a mapping of the pipeline's own embeddings, as its `encode_prompt` takes them
            ({"prompt_embeds": ...}); for class-conditional models a class number, or a name where the pipeline has
            names.
        negative_prompt: what guidance leads away from, in the same form; None for the model's own "no condition".
        guidance: the pipeline's guidance_scale (Qwen-Image: true_cfg_scale): 1 or less for none (Z-Image: 0).  None is
            none; where the network is told the scale, the pipeline's own default.
        size: height and width in pixels; None for the model's own.
        frames: of a video; None for the pipeline's own default.
        null_class: of a class-conditional UNet2DModel: the class that stands for none.

    Raises:
        LogsnrError: if the pipeline is of no known family, or an argument does not fit it.
        ValueError: if the scheduler's config describes no model; the message names the fix.
    """
    if guidance is not None and not math.isfinite(guidance):
        raise LogsnrError(f"guidance = {guidance}: must be finite; 1 is none")
    family = family_of(pipeline, size, null_class, frames)
    for module in (family.model, family.vae):
        if module is not None:
            module.eval()
    model = _model(pipeline.scheduler.config)
    low, high = model.sigma_range
    plain = NetworkDenoiser(
        family.network,
        model.prediction,
        shape=family.shape,
        pixels=Pixels(256) if family.vae is None else None,
        sigma_data=_sigma_data(model.prediction, latent=family.vae is not None),
        trained_range=(low, high),
    )
    scale = family.scale(guidance)
    cond = {} if prompt is None else family.conditions(prompt, scale)
    null = family.null(negative_prompt, scale) if family.guides(scale) or negative_prompt is not None else {}
    return PipelineDenoiser(family, plain, cond, null, scale)


def load_pipeline(
    source: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None, **options: Any
) -> PipelineDenoiser:
    """The denoiser of a pipeline's folder or hub id, frozen.

    Args:
        source: a folder with model_index.json, or "owner/name" on the Hugging Face hub.
        device: where it runs.
        dtype: of its weights, e.g. torch.float16; states stay in float32.
        **options: those of `denoiser_from`.

    Raises:
        LogsnrError: if it cannot be loaded, or as `denoiser_from`.
    """
    diffusers = require_diffusers("a diffusers pipeline")
    word = "dtype" if version_of(diffusers) >= (0, 42) else "torch_dtype"
    chosen = {} if dtype is None else {word: dtype}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(source), **chosen)
    except Exception as error:  # a damaged folder can raise anything there
        hint = "" if find_spec("transformers") else "pip install 'logsnr[diffusers]' (texts need transformers), "
        raise LogsnrError(
            f"{str(source)!r} cannot be loaded as a diffusers pipeline ({type(error).__name__}: {one_line(error)}): "
            f"{hint}give a folder that save_pretrained wrote, or a hub id that this machine can reach"
        ) from error
    if device is not None:
        pipeline.to(device)
    with reading(source, "repair the configs of its scheduler and networks", "a pipeline"):
        denoiser = denoiser_from(pipeline, **options)
    denoiser.requires_grad_(False)
    return denoiser.eval()


def from_callable(
    function: Callable[..., Tensor],
    prediction: Prediction | Mapping[str, Any],
    *,
    shape: tuple[int, ...],
    pixels: Pixels | None = None,
    trained_range: tuple[float, float] | None = None,
    sigma_data: float | None = None,
) -> NetworkDenoiser:
    """Anything as a denoiser: `function(c_in z, label [B], **conditions) -> F`.

    Args:
        function: the call, with whatever a network needs bound into it.
        prediction: what F means; or the config of a diffusers scheduler (or what a pipeline's `.scheduler.config` is),
            which says it.
        shape: shape of one sample.
        pixels: codec of the stored images, None for latents or non-image data.
        trained_range: (smallest, largest) sigma; None for the levels of the config or of the label's table.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: if the function cannot be called, or the config describes no model.
    """
    if not callable(function):
        raise ValueError(f"{type(function).__name__} is no function: give function(x, label, **conditions) -> output")
    if isinstance(prediction, Prediction):
        meaning = prediction
    else:
        require_diffusers("reading a scheduler's config")
        model = _model(prediction)
        meaning, trained_range = model.prediction, trained_range or model.sigma_range
    if trained_range is None:
        label = LABELS[meaning.label] if isinstance(meaning.label, str) else meaning.label
        trained_range = label.sigma_range if isinstance(label, TimestepTable) else (0.002, 157.0)
    network = function if isinstance(function, nn.Module) else _Function(function)
    return NetworkDenoiser(
        network, meaning, shape=shape, pixels=pixels, sigma_data=sigma_data, trained_range=trained_range
    )


def _model(config: Mapping[str, Any]) -> Noising:
    """What a scheduler's config says of its network."""
    from logsnr.adapters.diffusers.scheduler.scheduler import GradientEstimationScheduler

    own = config.get("_class_name") == GradientEstimationScheduler.__name__
    # Of a stock one no step is wanted: with a gamma it need not warn that the noise of its steps is not drawn.
    model: Noising = GradientEstimationScheduler.from_config(config, **({} if own else {"gamma": 1.0})).model
    return model


def _sigma_data(prediction: Prediction, *, latent: bool) -> float:
    if isinstance(prediction, EDM):
        return prediction.sigma_data
    return LATENT_SIGMA_DATA if latent else PIXEL_SIGMA_DATA


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        return self.function(x, label, **cond)


def _rows(value: Tensor, z: Tensor) -> Tensor:
    """A prompt's condition with one row per sample, on the device of z."""
    if len(value) not in (1, len(z)):
        raise LogsnrError(f"{len(value)} prompts for a batch of {len(z)}: give one prompt, or one per sample")
    return value.to(z.device).expand(len(z), *value.shape[1:])
