"""Image to image: half of a plan, started from a noisy photograph.

A multistep run has no history where it starts: the scheduler runs `plan.tail(k)`, not the middle of a longer run.

python examples/img2img.py [--tiny] [--out img2img.png]
"""

import tiny
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline
from PIL import Image

from logsnr.adapters import GradientEstimationScheduler

options = tiny.options(__doc__, "img2img.png")
if options.tiny:
    text_pipe, size = tiny.stable_diffusion(), 16
else:
    text_pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    size = 512
picture = Image.linear_gradient("L").convert("RGB").resize((size, size))  # your photograph

pipe = AutoPipelineForImage2Image.from_pipe(text_pipe)
pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, gamma=2.0)
generator = torch.Generator().manual_seed(0)
image = pipe("snow", image=picture, strength=0.5, num_inference_steps=12, generator=generator).images[0]
image.save(options.out)
