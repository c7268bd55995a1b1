"""The families of diffusers pipelines: which network, which latents, and how a prompt becomes conditions.

class of the network        what is told besides a text (of which there is a mask)       latents
UNet2DModel                 (a class)                                                    the images
UNet2DConditionModel        SDXL: pooled text, sizes; LCM: the guidance scale            images'
DiT                         a class                                                      images'
SD3                         pooled text                                                  images'
PixArt, Sana, Lumina2       (PixArt alpha: the size)                                     images'
AuraFlow, CogView4          CogView4: the size, and the time before its shift            images'
ZImage                      means cond + scale (cond - null)                             images'
Flux, Chroma, QwenImage     Flux: pooled text, (the guidance scale)                      images', as tokens
Flux2                       (the guidance scale)                                         2 x 2 patches of images'
LTX, Wan, HunyuanVideo      HunyuanVideo: pooled text, (the guidance scale)              videos'
CogVideoX                                                                                videos', frames first
"""

from __future__ import annotations

from typing import Any

from logsnr.adapters.diffusers.pipelines import networks, videos
from logsnr.adapters.diffusers.pipelines.families.base import Conditions, Family, Prompt, Row, Size, component
from logsnr.adapters.diffusers.pipelines.families.classes import Pixel, Transformer
from logsnr.adapters.diffusers.pipelines.families.texts import StableDiffusion, Text
from logsnr.errors import LogsnrError

__all__ = ["FAMILIES", "Conditions", "Family", "Prompt", "Row", "Size", "component", "family_of"]

_STATES, _NO_STATES = "encoder_hidden_states", "-encoder_hidden_states"
_MASK, _NO_MASK = "encoder_attention_mask", "-encoder_attention_mask"
_MASKED = (_STATES, _MASK, _NO_STATES, _NO_MASK)
_POOLED = "pooled_projections"

FAMILIES: dict[str, Row] = {
    "UNet2DModel": Row(kind=Pixel, network=networks.UNet),
    "UNet2DConditionModel": Row(kind=StableDiffusion, network=networks.TextUNet, told="time_cond_proj_dim"),
    "DiTTransformer2DModel": Row(kind=Transformer, network=networks.DiT),
    "SD3Transformer2DModel": Row(
        kind=Text, network=networks.SD3, answers=(_STATES, _NO_STATES, _POOLED, f"-{_POOLED}")
    ),
    "PixArtTransformer2DModel": Row(kind=Text, network=networks.PixArt, answers=_MASKED),
    "SanaTransformer2DModel": Row(kind=Text, network=networks.Sana, answers=_MASKED),
    "AuraFlowTransformer2DModel": Row(kind=Text, network=networks.AuraFlow, answers=(_STATES, "", _NO_STATES, "")),
    "CogView4Transformer2DModel": Row(kind=Text, network=networks.CogView4),
    "Lumina2Transformer2DModel": Row(kind=Text, network=networks.Lumina2, answers=_MASKED, renormed="rows"),
    "ZImageTransformer2DModel": Row(kind=Text, network=networks.ZImage, added=1.0, pixels=1024),
    "FluxTransformer2DModel": Row(
        kind=Text, network=networks.Flux, answers=(_STATES, _POOLED), packed=4, told="guidance_embeds"
    ),
    "ChromaTransformer2DModel": Row(
        kind=Text,
        network=networks.Chroma,
        answers=(_STATES, "", "attention_mask", _NO_STATES, "", "-attention_mask"),
        packed=4,
    ),
    "QwenImageTransformer2DModel": Row(
        kind=Text,
        network=networks.QwenImage,
        answers=(_STATES, "encoder_hidden_states_mask"),
        codec="frame",
        packed=4,
        told="guidance_embeds",
        renormed="tokens",
    ),
    "Flux2Transformer2DModel": Row(
        kind=Text, network=networks.Flux2, answers=(_STATES,), codec="patched", told="guidance_embeds"
    ),
    "LTXVideoTransformer3DModel": Row(kind=Text, network=videos.LTX, answers=_MASKED, codec="video"),
    "WanTransformer3DModel": Row(kind=Text, network=videos.Wan, codec="video"),
    "HunyuanVideoTransformer3DModel": Row(
        kind=Text, network=videos.HunyuanVideo, answers=(_STATES, _POOLED, _MASK), codec="video", told="guidance_embeds"
    ),
    "CogVideoXTransformer3DModel": Row(kind=Text, network=videos.CogVideoX, codec="frames-first"),
}
"""Families by the class of their network."""


def family_of(
    pipeline: Any, size: Size | None = None, null_class: int | None = None, frames: int | None = None
) -> Family:
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
    row = FAMILIES[name]
    family = row.kind(pipeline, row, size, frames)
    if null_class is not None:
        if not isinstance(family, Pixel):
            raise LogsnrError(f"null_class = {null_class}: only class-conditional UNet2DModels need one; leave it out")
        family.take_null(null_class)
    return family
