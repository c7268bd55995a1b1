"""logsnr: train, measure and sample diffusion and flow models in one coordinate, the log-SNR.

    import logsnr as ls

    denoiser = ls.load("runs/digits")
    plan = ls.solvers.ge(ls.grids.log_linear(6, *denoiser.sampling_range[::-1]), gamma=2.0)
    x = ls.sample(denoiser, plan, n=16, generator=torch.Generator().manual_seed(0))

The model of the world stands in `noise` (the coordinate), `predictions` (what networks mean), `denoiser` (the one kind
of model), `objectives` (what training minimises) and `sampling` (plans and the one loop).  Nothing is imported before
it is named.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logsnr import exact as exact
    from logsnr import grids as grids
    from logsnr import guidance as guidance
    from logsnr import plot as plot
    from logsnr import predictions as predictions
    from logsnr import schedules as schedules
    from logsnr import solvers as solvers
    from logsnr import theory as theory
    from logsnr import weightings as weightings
    from logsnr.adapters.diffusers.loops import LoopObjective
    from logsnr.calibration import calibrate
    from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
    from logsnr.errors import LogsnrError
    from logsnr.generation import Generated, Shards, generate
    from logsnr.likelihood import Likelihood, augmented_elbo, bits_per_dim, ode_bits_per_dim, ode_log_likelihood
    from logsnr.loading import load, load_plans
    from logsnr.objectives import ObjectiveOutput, WeightedELBO, objectives
    from logsnr.permission import allow_code
    from logsnr.pixels import Pixels
    from logsnr.sampling import (
        Churn,
        GaussianStart,
        NonFiniteError,
        Plan,
        Probe,
        Step,
        Trajectory,
        evaluations,
        heun,
        interpolate,
        invert,
        plan_for,
        probe,
        reconstruct,
        sample,
        solve,
        trajectory,
        universal_plan,
    )
    from logsnr.sampling.literature import published
    from logsnr.timesteps import TimestepTable
    from logsnr.uncertainty import Uncertainty

__version__ = "0.2.0"

_ROOMS = (
    "exact",
    "grids",
    "guidance",
    "objectives",
    "plot",
    "predictions",
    "schedules",
    "solvers",
    "theory",
    "weightings",
)
"""Modules that are public as they are; `objectives` is also the mapping of published ones."""

_NAMES = {
    "adapters.diffusers.loops": ["LoopObjective"],
    "calibration": ["calibrate"],
    "denoiser": ["Denoiser", "Estimate", "NetworkDenoiser"],
    "errors": ["LogsnrError"],
    "generation": ["Generated", "Shards", "generate"],
    "likelihood": ["Likelihood", "augmented_elbo", "bits_per_dim", "ode_bits_per_dim", "ode_log_likelihood"],
    "loading": ["load", "load_plans"],
    "objectives": ["ObjectiveOutput", "WeightedELBO"],
    "permission": ["allow_code"],
    "pixels": ["Pixels"],
    "sampling.literature": ["published"],
    "sampling": [
        *[
            "Churn",
            "GaussianStart",
            "NonFiniteError",
            "Plan",
            "Step",
            "evaluations",
            "heun",
            "interpolate",
            "invert",
            "reconstruct",
        ],
        *["Probe", "Trajectory", "plan_for", "probe", "sample", "solve", "trajectory", "universal_plan"],
    ],
    "timesteps": ["TimestepTable"],
    "uncertainty": ["Uncertainty"],
}
"""Public names by the room that holds them."""

_WHERE = {name: room for room, names in _NAMES.items() for name in names}

__all__ = [
    "Churn",
    "Denoiser",
    "Estimate",
    "GaussianStart",
    "Generated",
    "Likelihood",
    "LogsnrError",
    "LoopObjective",
    "NetworkDenoiser",
    "NonFiniteError",
    "ObjectiveOutput",
    "Pixels",
    "Plan",
    "Probe",
    "Shards",
    "Step",
    "TimestepTable",
    "Trajectory",
    "Uncertainty",
    "WeightedELBO",
    "allow_code",
    "augmented_elbo",
    "bits_per_dim",
    "calibrate",
    "evaluations",
    "exact",
    "generate",
    "grids",
    "guidance",
    "heun",
    "interpolate",
    "invert",
    "load",
    "load_plans",
    "objectives",
    "ode_bits_per_dim",
    "ode_log_likelihood",
    "plan_for",
    "plot",
    "predictions",
    "probe",
    "published",
    "reconstruct",
    "sample",
    "schedules",
    "solve",
    "solvers",
    "theory",
    "trajectory",
    "universal_plan",
    "weightings",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"logsnr.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'logsnr' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"logsnr.{_WHERE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
