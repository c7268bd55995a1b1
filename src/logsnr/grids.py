"""Grids, by their public path: `sampling/grids.py`."""

from logsnr.sampling.grids import (
    admissible,
    angles,
    beta,
    flow,
    flow_range,
    from_schedule,
    from_sigmas,
    ge_paper,
    karras,
    log_linear,
    paper_timesteps,
    timesteps,
)
from logsnr.sampling.literature import ays, oss

__all__ = [
    "admissible",
    "angles",
    "ays",
    "beta",
    "flow",
    "flow_range",
    "from_schedule",
    "from_sigmas",
    "ge_paper",
    "karras",
    "log_linear",
    "oss",
    "paper_timesteps",
    "timesteps",
]
