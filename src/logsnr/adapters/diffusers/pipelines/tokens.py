"""Tokens: latents as Flux and its kin hold them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as tokens `[B, H W/4, 4 C]`, one for each 2 x 2 patch: what Flux pipelines hold."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents `[B, C, height, width]` of tokens: the inverse of `pack`."""
    batch, _, size = tokens.shape
    x = tokens.reshape(batch, height // 2, width // 2, size // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, size // 4, height, width)


def places(rows: int, columns: int, like: Tensor) -> Tensor:
    """(0, row, column) of every token `[rows columns, 3]`."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).to(like.dtype)
