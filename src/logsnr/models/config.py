"""Network configs: the few numbers from which a network is rebuilt, in recipes and in checkpoint cards alike."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]


class NetworkConfig(BaseModel):
    """A U-Net over images.

    Args:
        kind: the builder; "unet" is diffusers' `UNet2DModel`.
        channels: width of each level, finest first; each further level halves the resolution.
        layers_per_block: residual blocks per level on the way down (one more on the way up).
        attention: self-attention at each level: one flag for all, or one per level.
        mid_attention: self-attention in the middle block.
        head_dim: channels per attention head; divides every width that attends.
        dropout: dropout probability inside residual blocks.
        norm_groups: groups of GroupNorm; divides every width.
        scale_shift: the noise level scales and shifts features (ADM's adaptive group norm) instead of only shifting.
        patch: side of the square of pixels that the network sees as one, folded into channels (space to depth, as in
            vision transformers): 2 makes every layer four times cheaper per channel.
        fourier: exponents n of VDM's input features sin(2^n pi x), cos(2^n pi x) (2107.00630, sec. 5.1), which let
            the network see fine detail at high log-SNR; 2^n around the number of grey levels / 4 and half of that.
        label_frequency: highest frequency of the sinusoids that embed the label, from 1 up; None for those from 1 down
            to 1e-4 that labels of the size 0 ... 1000 ("flow", "ddpm") want.  EDM's labels ln(sigma)/4 differ by 1 or 2
            over a whole model: with None they all but look alike, 4 tells them apart.
        classes: number of classes, 0 for an unconditional network; index `classes` is the null condition.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["unet"] = "unet"
    channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (64, 128)
    layers_per_block: Positive = 2
    attention: bool | tuple[bool, ...] = False
    mid_attention: bool = True
    head_dim: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm_groups: Positive = 16
    scale_shift: bool = True
    patch: Positive = 1
    fourier: tuple[Annotated[int, Field(ge=0, le=12)], ...] = ()
    label_frequency: Annotated[float, Field(gt=1)] | None = None
    classes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _widths_divide(self) -> NetworkConfig:
        if isinstance(self.attention, tuple) and len(self.attention) != len(self.channels):
            raise ValueError(
                f"attention has {len(self.attention)} flags for {len(self.channels)} levels of channels: "
                "give true, false, or one flag per level"
            )
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"channels {width} with norm_groups {self.norm_groups}: "
                    f"every width must be a multiple of {self.norm_groups}"
                )
        attending = {c for c, on in zip(self.channels, self.attention_levels, strict=True) if on}
        attending |= {self.channels[-1]} if self.mid_attention else set()
        for width in sorted(attending):
            if width % self.head_dim:
                raise ValueError(
                    f"channels {width} with head_dim {self.head_dim}: widths that attend must be a multiple of "
                    f"{self.head_dim}; change head_dim or switch attention off"
                )
        return self

    @property
    def attention_levels(self) -> tuple[bool, ...]:
        """One attention flag per level."""
        return (self.attention,) * len(self.channels) if isinstance(self.attention, bool) else self.attention

    @property
    def null_class(self) -> int | None:
        """The index that stands for "no class", None for an unconditional network."""
        return self.classes or None
