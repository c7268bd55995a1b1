"""The families of diffusers pipelines: which network, which latents, and how a prompt becomes conditions.

    network                   conditions                                                       without the condition
    UNet2DModel               (class_labels)                                                   null_class, if it has one
    UNet2DConditionModel      encoder_hidden_states (SDXL: text_embeds, time_ids)              the negative prompt
    DiTTransformer2DModel     class_labels                                                     class num_embeds_ada_norm
    SD3Transformer2DModel     encoder_hidden_states, pooled_projections                        the negative prompt
    FluxTransformer2DModel    encoder_hidden_states, pooled_projections, (guidance)            the negative prompt

Prompts go through the pipeline's own `encode_prompt`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from logsnr.adapters.diffusers.pipelines import networks
from logsnr.errors import LogsnrError

Prompt = str | int | Sequence[str] | Sequence[int] | Tensor
Conditions = dict[str, Tensor]
Size = int | tuple[int, int]


class Family(ABC):
    """One kind of pipeline.

    Args:
        pipeline: a diffusers pipeline.
        size: height and width of the images in pixels; None for those the model was trained on.

    Raises:
        LogsnrError: if the pipeline's network needs an input that prompts do not give, or the size does not fit.
    """

    network_class: ClassVar[type[networks._Network]]
    needs: tuple[str, ...] = ()
    """Conditions without which the network cannot run."""
    null_class: int | None = None
    """The class that stands for none."""
    embedded: bool = False
    """Whether the guidance scale is an input of the network (distilled models) rather than two evaluations."""

    def __init__(self, pipeline: Any, size: Size | None = None) -> None:
        self.pipeline = pipeline
        self.model = component(pipeline)
        self.config = self.model.config
        self.vae = getattr(pipeline, "vae", None)
        self.channels = self._channels()
        self._check()
        self.shape = (self.channels, *self._spatial(size))

    @property
    def network(self) -> nn.Module:
        """The network, called with flat conditions."""
        return self.network_class(self.model, self.channels)

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.channels if self.vae is None else int(self.vae.config.in_channels)

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a model without."""
        return 0

    def scale(self, asked: float | None) -> float:
        """The guidance scale: None is 1, or the pipeline's own default where the network is told it (Flux dev: 3.5)."""
        if asked is not None:
            return float(asked)
        told = inspect.signature(self.pipeline.__call__).parameters.get("guidance_scale") if self.embedded else None
        return 1.0 if told is None else float(told.default)

    @abstractmethod
    def conditions(self, prompt: Prompt, guidance: float = 1.0) -> Conditions:
        """The conditions of one prompt or class, or of several: one row each."""

    def null(self, negative: Prompt | None, guidance: float = 1.0) -> Conditions:
        """The conditions that stand for "no condition".

        Raises:
            LogsnrError: if the model has none.
        """
        raise LogsnrError(f"guidance: a {type(self.model).__name__} without conditions has nothing to guide; leave out")

    def _channels(self) -> int:
        return int(self.config.in_channels)

    def _check(self) -> None:
        for extra in ("controlnet", "adapter", "image_unet", "vqvae"):
            if getattr(self.pipeline, extra, None) is not None:
                raise LogsnrError(
                    f"{type(self.pipeline).__name__} has a {extra}, whose part load does not know: wrap the whole "
                    "network call with logsnr.adapters.from_callable"
                )
        latents = self.vae.config.latent_channels if self.vae is not None else self.channels
        answer = getattr(self.config, "out_channels", None) or self.config.in_channels
        if self._channels() != latents or answer not in (self.config.in_channels, 2 * self.config.in_channels):
            raise LogsnrError(
                f"the network of {type(self.pipeline).__name__} takes {self.config.in_channels} channels and answers "
                f"{answer}, for latents of {latents}: it also takes a mask, an image or a depth map; bind that input "
                "in a function and use logsnr.adapters.from_callable"
            )

    def _spatial(self, size: Size | None) -> tuple[int, int]:
        """Height and width of the latents."""
        if size is None:
            side = self.config.sample_size
            if side is None:
                raise LogsnrError("this model's config names no sample_size: give size=(height, width) in pixels")
            height, width = (side, side) if isinstance(side, int) else side
            return int(height), int(width)
        height, width = (size, size) if isinstance(size, int) else size
        factor = self.factor * self._patch()
        if height < 1 or width < 1 or height % factor or width % factor:
            raise LogsnrError(f"size = {(height, width)}: both sides must be positive multiples of {factor} pixels")
        return height // self.factor, width // self.factor

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 1 if self.vae is None else int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def _patch(self) -> int:
        return 1

    def _on(self, values: dict[str, Any]) -> Conditions:
        return {key: value.to(self.model.device) for key, value in values.items() if value is not None}


class _Classes(Family):
    """Models told a class by its number."""

    def class_ids(self, prompt: Prompt, count: int) -> Tensor:
        """Class numbers `[P]` of numbers, or of names where the pipeline has them."""
        if isinstance(prompt, Tensor):
            ids = prompt.reshape(-1).tolist()
        else:
            ids = [prompt] if isinstance(prompt, str | int) else [*prompt]
        names = getattr(self.pipeline, "labels", None) or {}
        unknown = [name for name in ids if isinstance(name, str) and name not in names]
        if unknown:
            known = f"one of its {len(names)} names (pipeline.labels)" if names else "a number"
            raise LogsnrError(f"prompt {unknown[0]!r}: this model is told a class: give {known}, 0 ... {count - 1}")
        numbers = [names[name] if isinstance(name, str) else int(name) for name in ids]
        for number in numbers:
            if not 0 <= number < count:
                raise LogsnrError(f"class {number}: this model has classes 0 ... {count - 1}")
        return torch.tensor(numbers, device=self.model.device)


class Pixel(_Classes):
    """`UNet2DModel`, with or without classes."""

    network_class = networks.UNet

    def __init__(self, pipeline: Any, size: Size | None = None, null_class: int | None = None) -> None:
        super().__init__(pipeline, size)
        if self.config.class_embed_type is not None:
            raise LogsnrError(f"class_embed_type {self.config.class_embed_type!r}: use logsnr.adapters.from_callable")
        if null_class is not None and not 0 <= null_class < self.classes:
            raise LogsnrError(f"null_class = {null_class}: this model has classes 0 ... {self.classes - 1}")
        self.null_class = null_class
        if self.classes:
            self.needs = ("class_labels",)

    @property
    def classes(self) -> int:
        return int(self.config.num_class_embeds or 0)

    def conditions(self, prompt: Prompt, guidance: float = 1.0) -> Conditions:
        if not self.classes:
            raise LogsnrError(f"prompt {prompt!r}: this model is unconditional; leave prompt out")
        return {"class_labels": self.class_ids(prompt, self.classes)}

    def null(self, negative: Prompt | None, guidance: float = 1.0) -> Conditions:
        if not self.classes:
            return super().null(negative, guidance)
        if negative is not None:
            return self.conditions(negative)
        if self.null_class is None:
            raise LogsnrError(
                f"guidance of a model with classes 0 ... {self.classes - 1} needs the class that stands for none: "
                f"give null_class (often the last, {self.classes - 1}), or leave guidance at 1"
            )
        return {"class_labels": torch.tensor([self.null_class], device=self.model.device)}


class Transformer(_Classes):
    """`DiTTransformer2DModel`."""

    network_class = networks.DiT
    needs = ("class_labels",)

    def __init__(self, pipeline: Any, size: Size | None = None) -> None:
        super().__init__(pipeline, size)
        self.null_class = self.classes

    @property
    def classes(self) -> int:
        return int(self.config.num_embeds_ada_norm)

    def conditions(self, prompt: Prompt, guidance: float = 1.0) -> Conditions:
        return {"class_labels": self.class_ids(prompt, self.classes)}

    def null(self, negative: Prompt | None, guidance: float = 1.0) -> Conditions:
        if negative is not None:
            return self.conditions(negative)
        return {"class_labels": torch.tensor([self.classes], device=self.model.device)}

    def _patch(self) -> int:
        return int(self.config.patch_size)


class _Text(Family):
    """Models told a text."""

    needs: tuple[str, ...] = ("encoder_hidden_states",)

    def conditions(self, prompt: Prompt, guidance: float = 1.0) -> Conditions:
        return self._conditions(self.texts(prompt), None, guidance)[0]

    def null(self, negative: Prompt | None, guidance: float = 1.0) -> Conditions:
        given = None if negative is None else self.texts(negative)
        return self._conditions([""] * len(given or [""]), given, guidance, both=True)[1]

    def texts(self, prompt: Prompt) -> list[str]:
        """The prompts as a list."""
        given = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, Sequence) else []
        texts = [text for text in given if isinstance(text, str)]
        if not texts or len(texts) != len(given):
            raise LogsnrError(f"prompt {prompt!r}: this model is told a text: give a string, or a list of them")
        return texts

    @abstractmethod
    def _conditions(
        self, prompts: list[str], negative: list[str] | None, guidance: float, both: bool = False
    ) -> tuple[Conditions, Conditions]:
        """(with, without) the prompts; the second only if `both`."""

    @torch.no_grad()
    def _encoded(self, **arguments: Any) -> Any:
        if not hasattr(self.pipeline, "encode_prompt"):
            raise LogsnrError(
                f"{type(self.pipeline).__name__} has no encode_prompt: pass the conditions by keyword "
                f"({', '.join(self.needs)}) instead of a prompt"
            )
        return self.pipeline.encode_prompt(device=self.model.device, num_images_per_prompt=1, **arguments)


class StableDiffusion(_Text):
    """`UNet2DConditionModel` with text, and SDXL's added conditions."""

    network_class = networks.TextUNet

    def _check(self) -> None:
        super()._check()
        kind, class_kind = self.config.addition_embed_type, self.config.class_embed_type
        score = getattr(self.pipeline.config, "requires_aesthetics_score", False)
        if self.vae is None or kind not in (None, "text_time") or class_kind is not None or score:
            raise LogsnrError(
                f"{type(self.pipeline).__name__} (addition_embed_type {kind!r}, class_embed_type {class_kind!r}"
                f"{', aesthetics score' if score else ''}) is neither Stable Diffusion nor SDXL: bind its inputs in a "
                "function and use logsnr.adapters.from_callable"
            )
        self.xl = kind == "text_time"
        self.embedded = self.config.time_cond_proj_dim is not None
        if self.xl:
            self.needs = ("encoder_hidden_states", "text_embeds", "time_ids")

    def _conditions(
        self, prompts: list[str], negative: list[str] | None, guidance: float, both: bool = False
    ) -> tuple[Conditions, Conditions]:
        encoded = self._encoded(prompt=prompts, negative_prompt=negative, do_classifier_free_guidance=both)
        rows = len(prompts)
        shared: dict[str, Any] = {}
        if self.embedded:
            scales = torch.full((rows,), guidance - 1)
            embedding = self.pipeline.get_guidance_scale_embedding(scales, self.config.time_cond_proj_dim)
            shared["timestep_cond"] = embedding.to(self.model.dtype)
        if not self.xl:
            texts = encoded[:2]
            return (
                self._on({"encoder_hidden_states": texts[0], **shared}),
                self._on({"encoder_hidden_states": texts[1], **shared}),
            )
        height, width = (n * self.factor for n in self.shape[1:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=encoded[0].dtype)
        shared["time_ids"] = ids.expand(rows, -1)
        return (
            self._on({"encoder_hidden_states": encoded[0], "text_embeds": encoded[2], **shared}),
            self._on({"encoder_hidden_states": encoded[1], "text_embeds": encoded[3], **shared}),
        )


class StableDiffusion3(_Text):
    """`SD3Transformer2DModel`."""

    network_class = networks.SD3
    needs = ("encoder_hidden_states", "pooled_projections")

    def _conditions(
        self, prompts: list[str], negative: list[str] | None, guidance: float, both: bool = False
    ) -> tuple[Conditions, Conditions]:
        texts, no_texts, pooled, no_pooled = self._encoded(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            negative_prompt=negative,
            do_classifier_free_guidance=both,
        )
        return (
            self._on({"encoder_hidden_states": texts, "pooled_projections": pooled}),
            self._on({"encoder_hidden_states": no_texts, "pooled_projections": no_pooled}),
        )

    def _patch(self) -> int:
        return int(self.config.patch_size)


class FluxFamily(_Text):
    """`FluxTransformer2DModel`."""

    network_class = networks.Flux
    needs = ("encoder_hidden_states", "pooled_projections")

    def _channels(self) -> int:
        return int(self.config.in_channels) // 4

    def _check(self) -> None:
        super()._check()
        self.embedded = bool(self.config.guidance_embeds)

    def _conditions(
        self, prompts: list[str], negative: list[str] | None, guidance: float, both: bool = False
    ) -> tuple[Conditions, Conditions]:
        def one(texts: list[str]) -> Conditions:
            states, pooled, _ = self._encoded(prompt=texts, prompt_2=None)
            scale = torch.full((len(texts),), guidance, dtype=torch.float32) if self.embedded else None
            return self._on({"encoder_hidden_states": states, "pooled_projections": pooled, "guidance": scale})

        return (one(prompts), {}) if not both else ({}, one(negative or prompts))

    def _spatial(self, size: Size | None) -> tuple[int, int]:
        if size is None:
            side = int(self.pipeline.default_sample_size)
            return side, side
        return super()._spatial(size)

    def _patch(self) -> int:
        return 2


FAMILIES: dict[str, type[Family]] = {
    "UNet2DModel": Pixel,
    "UNet2DConditionModel": StableDiffusion,
    "DiTTransformer2DModel": Transformer,
    "SD3Transformer2DModel": StableDiffusion3,
    "FluxTransformer2DModel": FluxFamily,
}
"""Families by the class of their network."""


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


def family_of(pipeline: Any, size: Size | None = None, null_class: int | None = None) -> Family:
    """The family of a pipeline.

    Raises:
        LogsnrError: if its network is of none; the message names those there are.
    """
    name = type(component(pipeline)).__name__
    if name not in FAMILIES:
        raise LogsnrError(
            f"{type(pipeline).__name__} has a network of class {name}, which load does not know ("
            f"{', '.join(FAMILIES)}): use logsnr.adapters.from_callable"
        )
    if FAMILIES[name] is Pixel:
        return Pixel(pipeline, size, null_class)
    if null_class is not None:
        raise LogsnrError(f"null_class = {null_class}: only class-conditional UNet2DModels need one; leave it out")
    return FAMILIES[name](pipeline, size)
