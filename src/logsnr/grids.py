"""Grids, by their public path: `sampling/grids.py`."""

from logsnr.sampling.grids import (
    AYS,
    admissible,
    angles,
    ays,
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

__all__ = [
    "AYS",
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
    "paper_timesteps",
    "timesteps",
]
