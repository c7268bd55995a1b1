"""The scheduler, by the path that every pipeline saved with it names in its model_index.json."""

# diffusers looks up how to load a component among the base classes that its module holds.
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from logsnr.adapters.diffusers.scheduler.scheduler import GradientEstimationScheduler

__all__ = ["GradientEstimationScheduler", "SchedulerMixin"]
