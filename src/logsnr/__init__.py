"""logsnr: train, measure and sample diffusion and flow models in one coordinate, the log-SNR.

    import logsnr as ls

    denoiser = ls.load("runs/digits")
    plan = ls.solvers.ge(ls.grids.log_linear(6, *denoiser.sampling_range[::-1]), gamma=2.0)
    x = ls.sample(denoiser, plan, batch=16, generator=torch.Generator().manual_seed(0))

The model of the world stands in `noise` (the coordinate), `prediction` (what networks mean), `denoiser` (the one kind
of model), `objective` (what training minimises) and `sampling` (plans and the one loop).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from logsnr import exact, guidance, schedules
from logsnr import prediction as predictions
from logsnr import weighting as weightings
from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.load import load, load_plans
from logsnr.objective import ObjectiveOutput, WeightedELBO, objectives
from logsnr.pixels import Pixels
from logsnr.sampling import (
    Churn,
    NonFiniteError,
    Plan,
    Step,
    evaluations,
    grids,
    heun,
    interpolate,
    invert,
    reconstruct,
    sample,
    solve,
    solvers,
    universal_plan,
)
from logsnr.timesteps import TimestepTable

if TYPE_CHECKING:
    from logsnr.adapters.loops import LoopObjective
    from logsnr.calibration import calibrate
    from logsnr.likelihood import Likelihood, augmented_elbo, bits_per_dim, ode_bits_per_dim, ode_log_likelihood
    from logsnr.uncertainty import Uncertainty

__version__ = "0.1.0.dev0"

__all__ = [
    "Churn",
    "Denoiser",
    "Estimate",
    "Likelihood",
    "LogsnrError",
    "LoopObjective",
    "NetworkDenoiser",
    "NonFiniteError",
    "ObjectiveOutput",
    "Pixels",
    "Plan",
    "Step",
    "TimestepTable",
    "Uncertainty",
    "WeightedELBO",
    "augmented_elbo",
    "bits_per_dim",
    "calibrate",
    "evaluations",
    "exact",
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
    "predictions",
    "reconstruct",
    "sample",
    "schedules",
    "solve",
    "solvers",
    "universal_plan",
    "weightings",
]

# Rooms that most programs do not need come in when first named: importing logsnr stays a fraction of importing torch.
_LATER = {
    "calibrate": "logsnr.calibration",
    "Likelihood": "logsnr.likelihood",
    "LoopObjective": "logsnr.adapters.loops",
    "Uncertainty": "logsnr.uncertainty",
    "augmented_elbo": "logsnr.likelihood",
    "bits_per_dim": "logsnr.likelihood",
    "ode_bits_per_dim": "logsnr.likelihood",
    "ode_log_likelihood": "logsnr.likelihood",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'logsnr' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
