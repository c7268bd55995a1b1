"""What every network is made from and answers: the floor of the registry in networks.py.

config, shape      the few numbers that rebuild it, in recipes and in checkpoint cards alike
network(x [B, *shape], label [B], class_labels=None [B]) -> F [B, *shape]
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from logsnr.errors import LogsnrError

Positive = Annotated[int, Field(ge=1, le=4096)]
"""A width or a count of a network."""


class NetworkConfig(BaseModel):
    """What the configs of all networks hold; each kind adds its own fields.

    Args:
        kind: a name of `NETWORKS`.
        classes: number of classes, 0 for an unconditional network; index `classes` is the null condition.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    classes: Annotated[int, Field(ge=0, le=1_000_000)] = 0

    @property
    def null_class(self) -> int | None:
        """The index that stands for "no class", None for an unconditional network."""
        return self.classes or None

    def shrunk(self) -> Self:
        """The smallest config that runs the same code: what a smoke test trains."""
        return self

    def least_weights(self, shape: tuple[int, ...]) -> int:
        """How many weights the network has at least, for samples of `shape`: known before anything is allocated."""
        return 0


class Network(nn.Module):
    """A network of the registry: whoever trains, stores or exports one asks for nothing but this.

    Args:
        config: what rebuilds it.
        shape: of one sample.

    Attributes:
        class_table: name of the weights `[classes + 1, width]` of the classes, the null condition last; "" where
            classes are told in another way.
        class_bias: name of the bias to which a class's row is added.
    """

    class_table: ClassVar[str] = ""
    class_bias: ClassVar[str] = ""

    def __init__(self, config: NetworkConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    @property
    def classes(self) -> int:
        """Number of classes, 0 for an unconditional network."""
        return self.config.classes

    @property
    def null_class(self) -> int | None:
        """The index that stands for "no class"."""
        return self.config.null_class

    def begin_as(self, other: Network) -> None:
        """Take the weights of a network of the same config; of other classes, each begins as that one's null condition.

        Raises:
            LogsnrError: if this kind cannot change its classes.
        """
        weights = other.state_dict()
        if other.classes != self.classes:
            if not self.class_table:
                raise LogsnrError(
                    f"a network of kind {self.config.kind!r} with {other.classes} classes cannot go on with "
                    f"{self.classes}"
                )
            bias = weights[self.class_bias]
            null = weights.pop(self.class_table)[-1] if other.classes else torch.zeros_like(bias)
            if self.classes:
                weights[self.class_table] = null.expand(self.classes + 1, -1)
            else:
                weights[self.class_bias] = bias + null
        self.load_state_dict(weights)

    def classes_or_null(self, x: Tensor, class_labels: Tensor | None) -> Tensor | None:
        """The classes of a batch: the null class where none are given, None for a network without.

        Raises:
            LogsnrError: if they are given to a network without.
        """
        if class_labels is not None and not self.classes:
            raise LogsnrError("class_labels given to a network without classes: leave them out, or train with classes")
        if self.classes and class_labels is None:
            return torch.full((len(x),), self.classes, device=x.device)
        return class_labels

    @property
    def stock(self) -> nn.Module | None:
        """The `UNet2DModel` of diffusers that answers as it does, None where there is none."""
        return None

    @property
    def obstacles(self) -> list[tuple[str, str]]:
        """Why it has no `stock`, each with the change of a recipe that would."""
        return [(f"a network of kind {self.config.kind!r} is no UNet2DModel", "network: {kind: unet}")]
