"""SD3 and Flux in 12 steps: the same scheduler, on flows.

There gradient estimation combines velocities, and the pipeline's resolution-dependent shift is applied once.

python examples/sd3_flux.py [--tiny] [--out flow.png]     writes flow-sd3.png and flow-flux.png
"""

from pathlib import Path

import tiny
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from logsnr.adapters import GradientEstimationScheduler

options = tiny.options(__doc__, "flow.png")
if options.tiny:
    pipes, size = {"sd3": tiny.sd3(), "flux": tiny.flux()}, 16
else:
    sd3 = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3-medium-diffusers")
    pipes, size = {"sd3": sd3, "flux": FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")}, 1024

for name, pipe in pipes.items():
    pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, gamma=1.5)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a red fox", height=size, width=size, num_inference_steps=12, generator=generator).images[0]
    image.save(Path(options.out).with_stem(f"{Path(options.out).stem}-{name}"))
