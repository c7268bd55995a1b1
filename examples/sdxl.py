"""SDXL in 10 steps by a plan: gradient estimation on Align Your Steps' levels.

The plan is numbers (logsnr.Plan): it is stored in the scheduler's config and travels with the pipeline.

python examples/sdxl.py [--tiny] [--out sdxl.png]
"""

import tiny
import torch
from diffusers import StableDiffusionXLPipeline

import logsnr as ls
from logsnr.adapters import GradientEstimationScheduler

options = tiny.options(__doc__, "sdxl.png")
if options.tiny:
    pipe = tiny.sdxl()
else:
    pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")

plan = ls.solvers.ge(ls.grids.ays(10, "sdxl"), gamma=2.0)
pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, plan=plan)
image = pipe("a red fox in the snow", num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out)
