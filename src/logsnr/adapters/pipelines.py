"""The path that scripts know since before 0.2 of `logsnr.adapters.diffusers.pipelines`."""

from logsnr.adapters.diffusers.pipelines import PipelineDenoiser, denoiser_from, from_callable, load_pipeline

__all__ = ["PipelineDenoiser", "denoiser_from", "from_callable", "load_pipeline"]
