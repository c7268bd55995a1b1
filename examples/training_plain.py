"""A plain PyTorch loop, flow matching in two dimensions: no diffusers, a config of one line, any time in (0, 1000).

The loop computes its per-sample losses itself; the weights come in, and the losses go back.

python examples/training_plain.py [--tiny] [--steps 5000]
"""

import tiny
import torch

from logsnr.adapters import LoopObjective

options = tiny.training_options(__doc__, steps=5000)
width = 32 if options.tiny else 256
network = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.SiLU(), torch.nn.Linear(width, 2))
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(0)

loop = LoopObjective("flow", {"prediction_type": "flow_prediction"}, continuous=True, adaptive=True)

losses: list[float] = []
for _ in range(options.steps):
    angle = 6.2832 * torch.rand(128, generator=generator)
    x = torch.stack([angle.cos(), angle.sin()], 1)  # a circle
    eps = torch.randn(x.shape, generator=generator)
    draw = loop.draw(len(x), generator=generator)
    # t = torch.rand(128, generator=generator)
    t = draw.timesteps[:, None] / 1000
    velocity = network(torch.cat([(1 - t) * x + t * eps, t], 1))
    mse = (velocity - (eps - x)).square().sum(1)
    loss = (draw.weight * mse).mean()
    # loss = mse.mean()
    loop.update(draw, mse)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"{loop}\nloss {losses[0]:.3f} -> {losses[-1]:.3f} nats")
