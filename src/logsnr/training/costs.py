"""What a training takes, before anything is allocated: its network is built and run without numbers.

On torch's meta device tensors have shapes and nothing else, so two billion weights cost no memory, and the products of
a forward pass are counted, not computed.  A backward pass takes twice as many as the forward one.

bytes of the state = 4 weights (1 + gradient + 2 moments + averages)        what a batch takes comes on top of it
bytes of a batch   = batch x what one image leaves for the backward pass
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from logsnr.errors import LogsnrError
from logsnr.models import Network, build_network
from logsnr.training.config import Recipe
from logsnr.training.data import load_data
from logsnr.training.synthetic import expected

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training takes.

    Args:
        shape: of one sample.
        classes: that the network knows, 0 for none.
        parameters: of the network.
        state_bytes: of weights, gradients, AdamW's moments and averages, float32, whatever the batch.
        image_bytes: that one image leaves for the backward pass, float32; about half in bf16 or fp16.
        flops: of one forward pass of one image, products and sums counted apart.
        batch: images per step.
        steps: of the training; None where it ends by time.
    """

    shape: tuple[int, ...]
    classes: int
    parameters: int
    state_bytes: int
    image_bytes: int
    flops: int
    batch: int
    steps: int | None

    @property
    def training_flops(self) -> int | None:
        """Of the whole training: forward, and twice that backward, of every image."""
        return None if self.steps is None else 3 * self.flops * self.batch * self.steps

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {**asdict(self), "training_flops": self.training_flops}

    def __str__(self) -> str:
        classes = f", {self.classes:,} classes" if self.classes else ""
        lines = [
            f"images           {' x '.join(map(str, self.shape))}{classes}",
            f"parameters       {self.parameters:,}",
            f"state            {self.state_bytes / GIB:.3g} GiB: weights, gradients, moments, averages",
            f"activations      {self.image_bytes / GIB:.3g} GiB an image in float32, about half of it in bf16; "
            f"{self.batch} images a step, over all processes",
            f"FLOPs an image   {self.flops / 1e9:,.4g} G forward, {3 * self.flops / 1e9:,.4g} G forward and backward",
        ]
        if self.training_flops is not None and self.steps is not None:
            lines.append(
                f"training         {self.steps:,} steps, {self.steps * self.batch / 1e6:,.4g} M images, "
                f"{self.training_flops:.3g} FLOPs"
            )
        return "\n".join(lines)


def cost_of(recipe: Recipe) -> Cost:
    """Count what a recipe takes; data are read only where it does not say what they are (data.shape, data.classes).

    Raises:
        LogsnrError: if they have to be read and cannot, or the network does not fit them.
    """
    shape, classes = samples_of(recipe)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = build_network(recipe.network.model_copy(update={"classes": classes}), shape)
        flops, image_bytes = _run(network)
    parameters = sum(p.numel() for p in network.parameters())
    moments = 2 if recipe.optimizer.name == "adamw" else 1
    copies = 2 + moments + len(recipe.ema.decays(recipe.batch))
    return Cost(
        shape=shape,
        classes=classes,
        parameters=parameters,
        state_bytes=4 * parameters * copies,
        image_bytes=image_bytes,
        flops=flops,
        batch=recipe.batch,
        steps=recipe.steps,
    )


def samples_of(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    """Shape and classes of what a recipe's network is trained on: as the recipe says, else from the data.

    Raises:
        LogsnrError: if it does not say, and the data cannot be read.
    """
    shape, classes = expected(recipe.data)
    if shape is None or (classes is None and recipe.conditional):
        try:
            data = load_data(recipe.data, latents=True)
        except LogsnrError as error:
            raise LogsnrError(f"{error}; or say what they are: data.shape: [3, 32, 32], data.classes: 10") from error
        shape, classes = data.shape, data.classes
    return shape, (classes or 0) if recipe.conditional else 0


def _run(network: Network) -> tuple[int, int]:
    """FLOPs of one image, and the bytes that it leaves for the backward pass."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if not isinstance(whole, nn.Parameter):
            kept[id(whole)] = whole
        return tensor

    x, label = torch.empty(1, *network.shape), torch.empty(1)
    given = [torch.empty(1, dtype=torch.long)] if network.classes else []
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        network(x, label, *given)
    return counter.get_total_flops(), sum(t.numel() * t.element_size() for t in kept.values())
