"""Stable Diffusion in 10 steps with gradient estimation.

python examples/sd.py [--tiny] [--out sd.png]
"""

import tiny
import torch
from diffusers import StableDiffusionPipeline

from logsnr.adapters import GradientEstimationScheduler

options = tiny.options(__doc__, "sd.png")
if options.tiny:
    pipe = tiny.stable_diffusion()
else:
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")

pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, gamma=2.0)
image = pipe("a red fox in the snow", num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out)
