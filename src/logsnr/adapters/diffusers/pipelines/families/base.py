"""One kind of pipeline: its network, the shape of its latents, and how a prompt becomes conditions."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from logsnr.adapters.diffusers.pipelines.guided import Renormed, renormed
from logsnr.adapters.diffusers.pipelines.latents import Codec, Latents
from logsnr.adapters.diffusers.pipelines.networks import Network
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.guidance import cfg

Prompt = str | int | Sequence[str] | Sequence[int] | Tensor | Mapping[str, Any]
Conditions = dict[str, Tensor]
Size = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table of families.

    Attributes:
        kind: what makes conditions of a prompt.
        network: how the model is called.
        answers: the conditions that the pipeline's `encode_prompt` answers with, in its order; "-" before those of the
            negative prompt, "" for what is not one.
        codec: what the VAE makes latents of.
        packed: channels of the model's tokens per channel of the latents: 4 for 2 x 2 patches.
        told: what of the model's config says that it is told the guidance scale.
        added: to the guidance scale, where a pipeline means cond + scale (cond - null).
        renormed: what keeps the norm of the conditional answer under guidance.
        pixels: side of an image, where neither the model nor the pipeline says it.
    """

    kind: type[Family]
    network: type[Network]
    answers: tuple[str, ...] = ("encoder_hidden_states", "-encoder_hidden_states")
    codec: Codec = "image"
    packed: int = 1
    told: Literal["", "guidance_embeds", "time_cond_proj_dim"] = ""
    added: float = 0.0
    renormed: Renormed | None = None
    pixels: int | None = None


class Family(ABC):
    """A pipeline of one family.

    Args:
        pipeline: a diffusers pipeline.
        row: of the table.
        size: height and width of the images in pixels; None for those the model was trained on.
        frames: of the videos; None for the pipeline's own default.

    Raises:
        LogsnrError: if the pipeline's network needs an input that prompts do not give, or the size does not fit.
    """

    needs: tuple[str, ...] = ()
    """Conditions without which the network cannot run."""
    null_class: int | None = None
    """The class that stands for none."""

    def __init__(self, pipeline: Any, row: Row, size: Size | None = None, frames: int | None = None) -> None:
        self.pipeline, self.row = pipeline, row
        self.model = component(pipeline)
        self.config = self.model.config
        self.vae = getattr(pipeline, "vae", None)
        self.channels = int(self.config.in_channels) // row.packed
        self.embedded = bool(row.told and self.config.get(row.told))
        """Whether the guidance scale is an input of the network (distilled models) rather than two evaluations."""
        self._check()
        self.latents = Latents(self.vae, self.image_channels, row.codec)
        self.shape = self._shape(size, frames)

    @property
    def network(self) -> nn.Module:
        """The network, called with flat conditions."""
        return self.row.network(self.model, self.channels, self.pipeline)

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        if self.vae is None:
            return self.channels
        return int(self.vae.config.get("in_channels") or self.vae.config.get("input_channels") or 3)

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a model without."""
        return 0

    def scale(self, asked: float | None) -> float:
        """The guidance scale: None is none, or the pipeline's own default where the network is told it (Flux: 3.5)."""
        if asked is not None:
            return float(asked)
        own = defaults(self.pipeline.__call__).get("guidance_scale") if self.embedded else None
        return 1.0 - self.row.added if own is None else float(own)

    def guides(self, scale: float) -> bool:
        """Whether a scale takes two evaluations."""
        return scale + self.row.added > 1 and not self.embedded

    def guided(self, plain: Denoiser, scale: float, null: Conditions) -> Denoiser:
        """Guidance as the pipeline has it."""
        if self.row.renormed is not None:
            return renormed(plain, scale, null, self.row.renormed)
        return cfg(plain, scale + self.row.added, null)

    @abstractmethod
    def conditions(self, prompt: Prompt, guidance: float = 1.0) -> Conditions:
        """The conditions of one prompt or class, or of several: one row each."""

    def null(self, negative: Prompt | None, guidance: float = 1.0) -> Conditions:
        """The conditions that stand for "no condition".

        Raises:
            LogsnrError: if the model has none.
        """
        raise LogsnrError(f"guidance: a {type(self.model).__name__} without conditions has nothing to guide; leave out")

    def _check(self) -> None:
        name = type(self.pipeline).__name__
        for extra in ("controlnet", "adapter", "image_unet", "vqvae"):
            if getattr(self.pipeline, extra, None) is not None:
                raise LogsnrError(
                    f"{name} has a {extra}, whose part load does not know: wrap the whole network call with "
                    "logsnr.adapters.from_callable"
                )
        if "image" in defaults(getattr(self.pipeline, "encode_prompt", None)):
            raise LogsnrError(
                f"{name} makes its conditions of an image as well as a text: bind them in a function and use "
                "logsnr.adapters.from_callable"
            )
        latents, taken = self.channels, int(self.config.in_channels)
        if self.vae is not None:
            latents = int(self.vae.config.get("latent_channels") or self.vae.config.z_dim)
            latents *= 4 if self.row.codec == "patched" else 1
        answer = self.config.get("out_channels") or taken
        if self.channels != latents or answer not in {n * c for n in (1, 2) for c in (self.channels, taken)}:
            raise LogsnrError(
                f"the network of {name} takes {taken} channels and answers {answer}, for latents of {latents}: it also "
                "takes a mask, an image or a depth map; bind that input in a function and use "
                "logsnr.adapters.from_callable"
            )

    def _shape(self, size: Size | None, frames: int | None) -> tuple[int, ...]:
        """Shape of a sample."""
        height, width = self._spatial(size)
        if self.row.codec not in ("video", "frames-first"):
            if frames is not None:
                raise LogsnrError(f"frames = {frames}: {type(self.pipeline).__name__} makes images; leave it out")
            return self.channels, height, width
        if frames is None:
            frames = defaults(self.pipeline.__call__).get("num_frames") or self.config.sample_frames
        each = self._own("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        if frames < 1 or (frames - 1) % each:
            raise LogsnrError(f"frames = {frames}: give 1 more than a multiple of {each}")
        patch = self.config.get("patch_size_t") or 1
        length = (frames - 1) // each + 1
        self.latents.padding = -length % patch
        length += self.latents.padding
        if self.row.codec == "video":
            return self.channels, length, height, width
        return length, self.channels, height, width

    def _spatial(self, size: Size | None) -> tuple[int, int]:
        """Height and width of the latents."""
        own = None if size is not None else self._own_latents()
        if own is not None:
            return own
        if size is None:
            size = self._own_pixels()
        height, width = (size, size) if isinstance(size, int) else size
        factor = self.factor * self._patch()
        if height < 1 or width < 1 or height % factor or width % factor:
            raise LogsnrError(f"size = {(height, width)}: both sides must be positive multiples of {factor} pixels")
        return height // self.factor, width // self.factor

    def _own_latents(self) -> tuple[int, int] | None:
        """Height and width that the model or pipeline has by itself, in latents."""
        if self.config.get("sample_height") is not None:
            return int(self.config.sample_height), int(self.config.sample_width)
        side = self.config.get("sample_size")
        if side is None:
            side = getattr(self.pipeline, "default_sample_size", None)
            if side is None:
                return None
            side = side // 2 if self.row.codec == "patched" else side
        height, width = (side, side) if isinstance(side, int) else side
        return int(height), int(width)

    def _own_pixels(self) -> Size:
        own = defaults(self.pipeline.__call__)
        if own.get("height") and own.get("width"):
            return int(own["height"]), int(own["width"])
        if self.row.pixels is None:
            raise LogsnrError("this model's config names no sample_size: give size=(height, width) in pixels")
        return self.row.pixels

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        if self.vae is None:
            return 1
        blocks = self.vae.config.get("block_out_channels")
        if self.row.codec in ("video", "frames-first"):
            return self._own("vae_scale_factor_spatial", "vae_spatial_compression_ratio")
        if not blocks:
            return self._own("vae_scale_factor")
        return int(2 ** (len(blocks) - 1)) * (2 if self.row.codec == "patched" else 1)

    def _own(self, *names: str) -> int:
        """The first of some numbers that the pipeline has."""
        return int(next(getattr(self.pipeline, name) for name in names if hasattr(self.pipeline, name)))

    def _patch(self) -> int:
        """Latents per token, along a side."""
        patch = self.config.get("patch_size") or self.config.get("all_patch_size") or 1
        own = patch if isinstance(patch, int) else patch[-1]
        return max(int(own), 2) if self.row.packed == 4 else int(own)

    def _on(self, values: Mapping[str, Any]) -> Conditions:
        return {key: value.to(self.model.device) for key, value in values.items() if value is not None}


def component(pipeline: Any) -> Any:
    """The network of a pipeline.

    Raises:
        LogsnrError: if it has none.
    """
    for name in ("unet", "transformer"):
        found = getattr(pipeline, name, None)
        if found is not None:
            return found
    raise LogsnrError(f"{type(pipeline).__name__} has neither a unet nor a transformer: there is nothing to denoise")


def defaults(function: Any) -> dict[str, Any]:
    """A function's parameters and their defaults; None where there is none."""
    if function is None:
        return {}
    empty = inspect.Parameter.empty
    return {
        name: None if parameter.default is empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }
