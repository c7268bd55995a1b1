"""Streams: the draws of image i come from (seed, i) alone, whoever draws it, where, and beside which others.

    words(seed, i) = Philox-4x64 with the key (seed, i),  counter 0, 1, 2, ...        (Salmon et al., SC 2011)

The first 624 words of 32 bits are the state of image i's own Mersenne Twister, a `torch.Generator` of the CPU; the next
64 bits are its class, where that is drawn.  `torch.Generator().manual_seed(...)` would not do: it reads 32 bits of its
seed, so among 50,000 images two would be the same with probability 1/4, among a million some hundred.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORDS = slice(24, 24 + 8 * 624)
"""Where a generator's state holds its words, 64 bits each; before them stand seed and position, after them a normal."""


def _words(seed: int, index: int) -> np.ndarray[Any, Any]:
    if index < 0:
        raise ValueError(f"image {index}: images are numbered from 0")
    key = index << 64 | seed % 2**64
    words: np.ndarray[Any, Any] = np.random.Philox(key=key).random_raw(313)
    return words


def generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """The generator of every image, at its beginning.

        x = sample(denoiser, 5, n=2, generator=generators(0, [7, 8]))         # images 7 and 8 of seed 0

    Args:
        seed: of all of them; its last 64 bits count.
        indices: the images' numbers, from 0 on.
    """
    out = []
    for index in indices:
        generator = torch.Generator().manual_seed(0)
        state = generator.get_state()
        words = _words(seed, index)[:312].view(np.uint32).astype(np.int64)
        state[_WORDS] = torch.from_numpy(words).view(torch.uint8)
        generator.set_state(state)
        out.append(generator)
    return out


def drawn_classes(seed: int, indices: Sequence[int], classes: int) -> Tensor:
    """A class in 0 ... classes - 1 for every image, drawn from its own stream: int64 `[N]`."""
    return torch.tensor([int(_words(seed, index)[312] % np.uint64(classes)) for index in indices], dtype=torch.int64)
