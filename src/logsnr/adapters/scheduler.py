"""Where the scheduler was before 0.2: pipelines saved with it name this path in their model_index.json."""

from logsnr.adapters.diffusers.scheduler.scheduler import GradientEstimationScheduler

__all__ = ["GradientEstimationScheduler"]
