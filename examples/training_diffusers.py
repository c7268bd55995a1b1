"""A diffusers training script (the shape of train_unconditional.py) with a VDM++ objective whose noise levels adapt.

Two lines of the loop change; each stands above the one it replaces.

python examples/training_diffusers.py [--tiny] [--data pictures.npy] [--steps 10000]
"""

import tiny
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

from logsnr.adapters import LoopObjective

options = tiny.training_options(__doc__, steps=10000)
data = tiny.pictures(options.data)
channels = (16, 16) if options.tiny else (128, 256, 256, 512)
model = UNet2DModel(
    sample_size=data.shape[-1],
    block_out_channels=channels,
    down_block_types=("DownBlock2D",) * len(channels),
    up_block_types=("UpBlock2D",) * len(channels),
    layers_per_block=1 if options.tiny else 2,
    norm_num_groups=8,
    add_attention=False,
)
noise_scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type="v_prediction")
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 if options.tiny else 1e-4)
batches = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, drop_last=True)

accelerator = Accelerator()
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
rank, world = accelerator.process_index, accelerator.num_processes
loop = LoopObjective("vdm++/sigmoid", noise_scheduler, adaptive=True, scaled=True, rank=rank, world=world)
accelerator.register_for_checkpointing(loop)  # what the noise levels have learned
generator = torch.Generator().manual_seed(rank)

losses: list[float] = []
while len(losses) < options.steps:
    for clean in batches:
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        draw = loop.draw(len(clean), generator=generator, device=clean.device)
        # timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),))
        noisy = noise_scheduler.add_noise(clean, noise, draw.timesteps)
        target = noise_scheduler.get_velocity(clean, noise, draw.timesteps)

        prediction = model(noisy, draw.timesteps, return_dict=False)[0]
        loss = loop.loss(draw, prediction, target)
        # loss = F.mse_loss(prediction.float(), target.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print(f"{loop}\nloss {losses[0]:.3f} -> {losses[-1]:.3f}")
