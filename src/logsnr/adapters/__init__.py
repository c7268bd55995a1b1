"""Adapters: logsnr inside other libraries, and their models inside logsnr.

    from logsnr.adapters import GradientEstimationScheduler

Nothing heavy is imported before a name is asked for; a library that is missing or too old is one clear line.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

from logsnr.errors import LogsnrError, require

if TYPE_CHECKING:
    from logsnr.adapters.scheduler import GradientEstimationScheduler as GradientEstimationScheduler

OLDEST_DIFFUSERS = (0, 31)

_DIFFUSERS = {"GradientEstimationScheduler": "logsnr.adapters.scheduler"}
"""Names that need diffusers, and the module each lives in."""

__all__ = ["GradientEstimationScheduler", "require_diffusers"]


def require_diffusers(purpose: str) -> Any:
    """The diffusers module, recent enough.

    Raises:
        LogsnrError: if it is missing or too old, naming the fix.
    """
    diffusers = require("diffusers", extra="diffusers", purpose=purpose)
    version = tuple(int(part) for part in re.findall(r"\d+", diffusers.__version__)[:2])
    if version < OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, OLDEST_DIFFUSERS))
        raise LogsnrError(
            f"{purpose} needs diffusers {oldest} or later, found {diffusers.__version__}: "
            f"pip install -U 'diffusers>={oldest}'"
        )
    return diffusers


def __getattr__(name: str) -> Any:
    if name not in _DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_diffusers(name)
    return getattr(importlib.import_module(_DIFFUSERS[name]), name)
