"""What our transformers are made of: the condition that all blocks hear, and the block that hears it (2212.09748).

c = MLP(cos(f label), sin(f label)) + class        f from 1 down to 1e-4, or from 1 up to `frequency`
x = x + g1 attention((1 + s1) norm(x) + b1)        (b1, s1, g1, b2, s2, g2) = W silu(c), zero at the start: a block
x = x + g2 MLP((1 + s2) norm(x) + b2)              begins as the identity ("adaLN-Zero")
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

SINUSOIDS = 256
LabelFrequency = Annotated[float, Field(gt=1, le=1e6, allow_inf_nan=False)]
"""Highest frequency of the sinusoids that embed a label, where they rise from 1."""


class Condition(nn.Module):
    """What a network is told: the label of the noise level and, with classes, a class.

    Args:
        width: of the answer.
        classes: 0 for none; index `classes` is the null condition.
        frequency: highest of the sinusoids; None for 1 down to 1e-4, for labels of the size 0 ... 1000.
    """

    def __init__(self, width: int, classes: int, frequency: float | None) -> None:
        super().__init__()
        self.exponent = math.log(frequency or 1e-4) / (SINUSOIDS // 2 - 1)
        self.level = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(classes + 1, width) if classes else None
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, label: Tensor, class_labels: Tensor | None) -> Tensor:
        frequencies = (torch.arange(SINUSOIDS // 2, device=label.device, dtype=torch.float32) * self.exponent).exp()
        phase = label.float()[:, None] * frequencies
        waves = torch.cat([phase.cos(), phase.sin()], 1)
        told: Tensor = self.level(waves.to(next(self.level.parameters()).dtype))
        return told if self.classes is None else told + self.classes(class_labels)


class Block(nn.Module):
    """Attention and MLP over tokens `[B, N, width]`, both modulated by a condition `[B, told]`.

    Args:
        width: divisible by
        heads: of attention.
        told: width of the condition.
        ratio: hidden width of the MLP over `width`.
        dropout: inside the MLP, after its nonlinearity.
    """

    def __init__(self, width: int, heads: int, *, told: int, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, hidden = heads, int(ratio * width)
        self.modulation = nn.Linear(told, 6 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        for layer in (self.qkv, self.project, self.mlp[0], self.mlp[3]):
            xavier(layer)
        silent(self.modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        b1, s1, g1, b2, s2, g2 = self.modulation(silu(c))[:, None].chunk(6, -1)
        x = x + g1 * self._attend(self.norm(x) * (1 + s1) + b1)
        out: Tensor = x + g2 * self.mlp(self.norm(x) * (1 + s2) + b2)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.project(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def positions(width: int, height: int, across: int) -> Tensor:
    """Sinusoids of the place of each of `height` x `across` tokens, `[N, width]`: those of its column, of its row."""
    quarter = width // 4
    frequencies = torch.exp(torch.arange(quarter, dtype=torch.float64) * (-math.log(1e4) / quarter))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(across), indexing="ij")
    phases = [place.flatten().to(torch.float64)[:, None] * frequencies for place in (column, row)]
    return torch.cat([wave for phase in phases for wave in (phase.sin(), phase.cos())], 1).float()


def xavier(layer: nn.Module) -> None:
    """Weights by fan-in and fan-out, biases zero."""
    assert isinstance(layer.weight, Tensor)
    assert isinstance(layer.bias, Tensor)
    nn.init.xavier_uniform_(layer.weight.view(len(layer.weight), -1))
    nn.init.zeros_(layer.bias)


def silent(layer: nn.Module) -> None:
    """A layer that answers 0 at the start."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
