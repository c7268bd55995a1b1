"""Networks by name: the one list that recipes, cards, training and messages read.  A new network is one entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny
from torch import nn

from logsnr.errors import LogsnrError, unknown
from logsnr.models.base import Network, NetworkConfig
from logsnr.models.dit import DiT, DiTConfig
from logsnr.models.own import Own, OwnConfig
from logsnr.models.unet import UNet, UNetConfig
from logsnr.models.uvit import UViT, UViTConfig


@dataclass(frozen=True, kw_only=True)
class NetworkEntry:
    """A kind of network.

    Attributes:
        config: its config, a subclass of `NetworkConfig`.
        build: (config, shape) -> Network, initialised from torch's global generator.
        takes: what the axes of a sample are.
    """

    config: type[NetworkConfig]
    build: Callable[[Any, tuple[int, ...]], Network]
    takes: tuple[str, ...]


NETWORKS: dict[str, NetworkEntry] = {
    "unet": NetworkEntry(config=UNetConfig, build=UNet, takes=("channels", "height", "width")),
    "dit": NetworkEntry(config=DiTConfig, build=DiT, takes=("channels", "height", "width")),
    "uvit": NetworkEntry(config=UViTConfig, build=UViT, takes=("channels", "height", "width")),
}
OWN = NetworkEntry(config=OwnConfig, build=Own, takes=("channels", "height", "width"))
"""What `kind: "module:Class"` is."""

MOST_WEIGHTS = 4e9
"""Weights of the largest network that is built: 16 GB in float32."""


def network_config(values: Any) -> NetworkConfig:
    """The config of the kind that `values` name; a U-Net's where they name none, as old recipes and cards do not.

    Raises:
        ValueError: if the kind is unknown, naming the nearest, or a field does not fit.
    """
    if isinstance(values, NetworkConfig):
        return values
    if not isinstance(values, dict):
        raise ValueError(f"{values!r}: give a mapping, e.g. {{kind: unet}}")
    kind = values.get("kind", "unet")
    return network_entry(kind).config.model_validate({**values, "kind": kind})


def network_entry(kind: Any) -> NetworkEntry:
    """The entry of a kind; `OWN` for "module:Class".

    Raises:
        LogsnrError: if it is unknown, naming the nearest.
    """
    if isinstance(kind, str) and ":" in kind:
        return OWN
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise unknown("kind", kind, NETWORKS, '; or "module:Class" for your own')
    return NETWORKS[kind]


AnyNetworkConfig = Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(network_config)]
"""A field that holds the config of any kind in `NETWORKS`."""


def build_network(config: NetworkConfig, shape: tuple[int, ...], *, network: type[nn.Module] | None = None) -> Network:
    """The network of `config` for samples of `shape`, initialised from torch's global generator.

    Args:
        config: of any kind.
        shape: of one sample.
        network: for a config that names code, the class that it means.

    Raises:
        LogsnrError: if the shape is none that this kind takes, a library is missing, or the config names code that may
            not run.
    """
    entry = network_entry(config.kind)
    takes = entry.takes
    if len(shape) != len(takes):
        raise LogsnrError(f"shape {tuple(shape)} for a network of kind {config.kind!r}: give ({', '.join(takes)})")
    if (weights := config.least_weights(shape)) > MOST_WEIGHTS:
        raise LogsnrError(
            f"a network of kind {config.kind!r} with at least {weights:.3g} weights: at most {MOST_WEIGHTS:.3g} are "
            "built; lower its channels, layers or classes"
        )
    if network is not None:
        if not isinstance(config, OwnConfig):
            raise LogsnrError(f"network = {network!r}: a network of kind {config.kind!r} is built in; leave it out")
        return Own(config, shape, network)
    return entry.build(config, shape)
