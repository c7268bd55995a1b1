"""A LightningModule with a weighted ELBO.  Without lightning installed, the same class runs in five lines of PyTorch.

python examples/training_lightning.py [--tiny] [--data pictures.npy] [--steps 10000]
"""

from typing import Any

import tiny
import torch
from diffusers import DDPMScheduler, UNet2DModel

from logsnr.adapters import LoopObjective

try:
    import lightning

    Module: Any = lightning.LightningModule
except ModuleNotFoundError:
    lightning, Module = None, torch.nn.Module


class Diffusion(Module):
    """An eps network trained with w = sigmoid(2 - log-SNR), its noise levels adapting."""

    def __init__(self, channels: tuple[int, ...], size: int, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.network = UNet2DModel(
            sample_size=size,
            block_out_channels=channels,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
        )
        self.scheduler = DDPMScheduler()
        self.loop = LoopObjective("vdm++/sigmoid", self.scheduler, adaptive=True, scaled=True, rank=rank, world=world)
        self.generator = torch.Generator().manual_seed(rank)

    def training_step(self, clean: torch.Tensor, batch_idx: int) -> torch.Tensor:
        noise = torch.randn(clean.shape, generator=self.generator).to(clean.device)
        draw = self.loop.draw(len(clean), generator=self.generator, device=clean.device)
        noisy = self.scheduler.add_noise(clean, noise, draw.timesteps)
        return self.loop.loss(draw, self.network(noisy, draw.timesteps).sample, noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["noise_levels"] = self.loop.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loop.load_state_dict(checkpoint["noise_levels"])


options = tiny.training_options(__doc__, steps=10000)
data = tiny.pictures(options.data)
module = Diffusion((16, 16) if options.tiny else (128, 256, 256), data.shape[-1])
batches = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, drop_last=True)
losses: list[float] = []
if lightning is not None:
    lightning.Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False).fit(module, batches)
else:
    optimizer = module.configure_optimizers()
    while len(losses) < options.steps:
        for step, clean in enumerate(batches):
            loss = module.training_step(clean, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
