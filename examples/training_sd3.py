"""A flow-matching script (the shape of train_dreambooth_sd3.py) with the EDM-monotonic weighting and adaptive levels.

The script's own density and weighting schemes give way to two lines; its preconditioned loss, MSE of x, stays.

python examples/training_sd3.py [--tiny] [--data pictures.npy] [--steps 1000]
"""

import tiny
import torch
from diffusers import StableDiffusion3Pipeline

from logsnr.adapters import LoopObjective

options = tiny.training_options(__doc__, steps=1000)
repository = "stabilityai/stable-diffusion-3-medium-diffusers"
pipe = tiny.sd3() if options.tiny else StableDiffusion3Pipeline.from_pretrained(repository)
data = tiny.pictures(options.data, count=64, size=16)
transformer, scheduler = pipe.transformer.train(), pipe.scheduler
with torch.no_grad():
    latents = pipe.vae.encode(data).latent_dist.mode()
    latents = (latents - latents.mean()) / latents.std() if options.tiny else (
        (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    )  # fmt: skip
    prompt, _, pooled, _ = pipe.encode_prompt("a disk", None, None, do_classifier_free_guidance=False)
optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3 if options.tiny else 1e-5)
generator = torch.Generator().manual_seed(0)

loop = LoopObjective("vdm++/edm-monotonic", scheduler, target="sample", adaptive=True, scaled=True)


def get_sigmas(timesteps: torch.Tensor) -> torch.Tensor:
    """The script's own: timesteps are looked up in the scheduler's table."""
    indices = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    return scheduler.sigmas[indices].reshape(-1, 1, 1, 1)


losses: list[float] = []
for _ in range(options.steps):
    clean = latents[torch.randint(len(latents), (8,), generator=generator)]
    noise = torch.randn(clean.shape, generator=generator)
    draw = loop.draw(len(clean), generator=generator)
    # u = compute_density_for_timestep_sampling(...); timesteps = scheduler.timesteps[(u * 1000).long()]
    sigmas = get_sigmas(draw.timesteps)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    output = transformer(
        hidden_states=noisy,
        timestep=draw.timesteps,
        encoder_hidden_states=prompt.expand(len(clean), -1, -1),
        pooled_projections=pooled.expand(len(clean), -1),
        return_dict=False,
    )[0]
    prediction = output * (-sigmas) + noisy  # --precondition_outputs 1
    loss = loop.loss(draw, prediction, clean)
    # weighting = compute_loss_weighting_for_sd3(...); loss = (weighting * (prediction - clean) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"{loop}\nloss {losses[0]:.3f} -> {losses[-1]:.3f}")
