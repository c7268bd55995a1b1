"""Guidance that keeps a norm: what Qwen-Image's and Lumina 2's pipelines do.

    u = u_null + scale (u_cond - u_null)        ->        u ||u_cond||/||u||

of the velocity u, for each token (2 x 2 latents of all channels) or each row of latents.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from logsnr.adapters.diffusers.pipelines.tokens import pack, unpack
from logsnr.denoiser import Denoiser, Estimate
from logsnr.guidance import Guided, _Pair
from logsnr.noise import alpha_s, per_sample

Renormed = Literal["tokens", "rows"]


def renormed(denoiser: Denoiser, scale: float, null: dict[str, Tensor], over: Renormed) -> Denoiser:
    """Classifier-free guidance whose velocity has the conditional one's norm, over each token or row."""
    return _Renormed(denoiser, scale, null, over)


class _Renormed(Guided):
    """Guidance with the conditional velocity's norms."""

    def __init__(self, denoiser: Denoiser, scale: float, null: dict[str, Tensor], over: Renormed) -> None:
        super().__init__(_Pair(denoiser, null), scale, None, rescale=1.0)
        self.over = over

    def _rescaled(self, guided: Estimate, strong: Estimate, z: Tensor, sigma: float | Tensor) -> Estimate:
        alpha, s = (per_sample(v.to(z) if isinstance(v, Tensor) else v, z) for v in alpha_s(sigma))
        height, width = z.shape[-2:]
        u, u_cond = guided.velocity, strong.velocity
        if self.over == "tokens":
            u, u_cond = pack(u), pack(u_cond)
        u = u * (u_cond.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True))
        if self.over == "tokens":
            u = unpack(u, height, width)
        return Estimate((z - s * u) / (alpha + s), (z + alpha * u) / (alpha + s), u)
