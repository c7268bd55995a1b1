"""What the trainer costs over a bare PyTorch loop: images per second of both, in alternating segments of one process.

    python benchmarks/trainer_overhead.py --segments 11 --steps 10

Both sides train the same network (1M parameters) on the same digits with AdamW, gradient clipping and an average of
the weights; the bare loop minimises plain EDM with no library between it and PyTorch.  Segments alternate, so that a
busy machine slows both; read the median of the ratios of neighbouring segments.  Target: .97 or more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from logsnr.models import UNetConfig, build_network
from logsnr.pixels import Pixels
from logsnr.training import load_data, recipe_from
from logsnr.training.run import Run

CHANNELS = (32, 64)


def bare_loop(images: torch.Tensor, labels: torch.Tensor, batch: int, grey_levels: int) -> Callable[[], None]:
    """One step of what one would write by hand: EDM's loss, AdamW, clipping, and an average of the weights."""
    torch.manual_seed(0)
    network = build_network(UNetConfig(channels=CHANNELS, norm_groups=8, classes=10), tuple(images.shape[1:]))
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    data = Pixels(grey_levels).encode(images)
    sd = float(data.std())

    def step() -> None:
        index = torch.randint(len(data), (batch,))
        x, y = data[index], labels[index].masked_fill(torch.rand(batch) < 0.1, 10)
        sigma = (torch.randn(batch) * 1.2 - 1.2).exp()[:, None, None, None]
        noisy = x + sigma * torch.randn_like(x)
        variance = sigma**2 + sd**2
        label = 1000 * (sigma / (1 + sigma)).flatten()
        out = network(noisy / variance.sqrt(), label, class_labels=y)
        target = (x - sd**2 / variance * noisy) * variance.sqrt() / (sigma * sd)
        loss = (out - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-3)

    return step


def our_loop(batch: int, adaptive: bool) -> tuple[Callable[[], None], int]:
    """One step of the trainer, and the number of its parameters."""
    recipe = recipe_from(
        {
            "network": {"channels": CHANNELS, "norm_groups": 8},
            "objective": {"preset": "edm", "adaptive": adaptive},
            "conditional": True,
            "batch": batch,
            "steps": 1,
            "device": "cpu",
        }
    )
    run = Run(recipe, load_data(recipe.data))
    return lambda: (run.advance(), None)[1], sum(p.numel() for p in run.parameters)


def seconds(step: Callable[[], None], steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    for _ in range(steps):
        step()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=11)
    parser.add_argument("--steps", type=int, default=10, help="steps in a segment")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--adaptive", action="store_true", help="with an adaptive schedule on our side")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, where others share the machine")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter

    data = load_data(recipe_from({"steps": 1}).data)
    assert data.train_labels is not None
    bare = bare_loop(data.train_images, data.train_labels, options.batch, data.grey_levels)
    ours, parameters = our_loop(options.batch, options.adaptive)
    for step in (bare, ours):
        seconds(step, 3)
    print(f"{parameters:,} parameters, batch {options.batch}, {torch.get_num_threads()} threads")

    images = options.steps * options.batch
    ratios, rates = [], []
    for segment in range(options.segments):
        # Whichever goes first alternates as well: a drift of the machine's speed then cancels.
        order = (bare, ours) if segment % 2 == 0 else (ours, bare)
        times = {id(step): seconds(step, options.steps, clock) for step in order}
        a, b = times[id(bare)], times[id(ours)]
        ratios.append(a / b)
        rates.append((images / a, images / b))
        print(f"segment {segment:2d}   bare {images / a:8.1f}   ours {images / b:8.1f} images/s   ratio {a / b:.3f}")
    bare_rate, our_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"median       bare {bare_rate:8.1f}   ours {our_rate:8.1f} images/s   ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
