"""Adapters: logsnr inside other libraries, and their models inside logsnr.

    from logsnr.adapters import GradientEstimationScheduler        # any diffusers pipeline, any plan
    from logsnr.adapters import load_pipeline, from_callable       # their models as denoisers
    from logsnr.adapters import sample_gradient_estimation, as_kdiffusion
    from logsnr.adapters import export_diffusers                   # our runs as stock pipelines
    from logsnr.adapters import LoopObjective                      # our objectives in their training scripts

Nothing heavy is imported before a name is asked for; a library that is missing or too old is one clear line.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

from logsnr.errors import LogsnrError, require

if TYPE_CHECKING:
    from logsnr.adapters.diffusers.export import export_diffusers as export_diffusers
    from logsnr.adapters.diffusers.loops import LoopObjective as LoopObjective
    from logsnr.adapters.diffusers.pipelines import PipelineDenoiser as PipelineDenoiser
    from logsnr.adapters.diffusers.pipelines import denoiser_from as denoiser_from
    from logsnr.adapters.diffusers.pipelines import from_callable as from_callable
    from logsnr.adapters.diffusers.pipelines import load_pipeline as load_pipeline
    from logsnr.adapters.diffusers.scheduler.scheduler import GradientEstimationScheduler as GradientEstimationScheduler
    from logsnr.adapters.kdiffusion import KDiffusionModel as KDiffusionModel
    from logsnr.adapters.kdiffusion import as_kdiffusion as as_kdiffusion
    from logsnr.adapters.kdiffusion import sample_gradient_estimation as sample_gradient_estimation

OLDEST_DIFFUSERS = (0, 37)

_LATER = {
    "GradientEstimationScheduler": "scheduler",  # the module that saved pipelines name: diffusers asks for it imported
    "KDiffusionModel": "kdiffusion",
    "LoopObjective": "diffusers.loops",
    "PipelineDenoiser": "diffusers.pipelines",
    "as_kdiffusion": "kdiffusion",
    "denoiser_from": "diffusers.pipelines",
    "export_diffusers": "diffusers.export",
    "from_callable": "diffusers.pipelines",
    "load_pipeline": "diffusers.pipelines",
    "sample_gradient_estimation": "kdiffusion",
}
"""Names, and the module each lives in.  The scheduler is a class of diffusers; others need that when called."""

__all__ = [
    "GradientEstimationScheduler",
    "KDiffusionModel",
    "LoopObjective",
    "PipelineDenoiser",
    "as_kdiffusion",
    "denoiser_from",
    "export_diffusers",
    "from_callable",
    "load_pipeline",
    "require_diffusers",
    "sample_gradient_estimation",
]


def require_diffusers(purpose: str) -> Any:
    """The diffusers module, recent enough.

    Raises:
        LogsnrError: if it is missing or too old, naming the fix.
    """
    diffusers = require("diffusers", extra="diffusers", purpose=purpose)
    if version_of(diffusers) < OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, OLDEST_DIFFUSERS))
        raise LogsnrError(
            f"{purpose} needs diffusers {oldest} or later, found {diffusers.__version__}: "
            f"pip install -U 'diffusers>={oldest}'"
        )
    return diffusers


def version_of(diffusers: Any) -> tuple[int, ...]:
    """(major, minor) of the diffusers module."""
    return tuple(int(part) for part in re.findall(r"\d+", diffusers.__version__)[:2])


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "GradientEstimationScheduler":
        require_diffusers(name)
    value = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    if name != "GradientEstimationScheduler":  # asked for again, it is checked again
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
