"""Pipelines as denoisers: `load_pipeline`, `denoiser_from`, `from_callable`."""

from logsnr.adapters.diffusers.pipelines.denoiser import PipelineDenoiser, denoiser_from, from_callable, load_pipeline
from logsnr.adapters.diffusers.pipelines.families import Prompt, Size

__all__ = ["PipelineDenoiser", "Prompt", "Size", "denoiser_from", "from_callable", "load_pipeline"]
