"""Solvers, by their public path: `sampling/solvers.py` and `sampling/multistep.py`."""

from logsnr.sampling.solvers import (
    adams_bashforth,
    custom,
    ddim,
    ddpm,
    deis,
    dpmpp,
    ge,
    ipndm,
    unified,
    unipc,
)

__all__ = [
    "adams_bashforth",
    "custom",
    "ddim",
    "ddpm",
    "deis",
    "dpmpp",
    "ge",
    "ipndm",
    "unified",
    "unipc",
]
