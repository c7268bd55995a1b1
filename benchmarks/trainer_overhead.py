"""What the trainer costs over a bare PyTorch loop: images per second of both, in alternating segments of one process.

    python benchmarks/trainer_overhead.py --segments 11 --steps 10
    python benchmarks/trainer_overhead.py --accumulate 2
    python benchmarks/trainer_overhead.py --processes 2          # a DistributedDataParallel loop beside ours

Both sides train the same network (1M parameters) on the same digits with AdamW, gradient clipping and an average of
the weights; the bare loop minimises plain EDM with no library between it and PyTorch.  Segments alternate, so that a
busy machine slows both; read the median of the ratios of neighbouring segments.  Target: .97 or more.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from logsnr.models import UNetConfig, build_network
from logsnr.pixels import Pixels
from logsnr.training import load_data, recipe_from
from logsnr.training.run import Run

CHANNELS = (32, 64)


def bare_loop(
    images: torch.Tensor, labels: torch.Tensor, batch: int, grey_levels: int, parts: int
) -> Callable[[], None]:
    """One step of what one would write by hand: EDM's loss, AdamW, clipping, and an average of the weights.

    Args:
        images: to train on,
        labels: with their classes.
        batch: images of this process,
        parts: taken in so many parts.
        grey_levels: of the images.
    """
    torch.manual_seed(0)
    network = build_network(UNetConfig(channels=CHANNELS, norm_groups=8, classes=10), tuple(images.shape[1:]))
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    data = Pixels(grey_levels).encode(images)
    sd = float(data.std())
    called = DistributedDataParallel(network) if dist.is_initialized() else network

    def backward(batch: int) -> None:
        index = torch.randint(len(data), (batch,))
        x, y = data[index], labels[index].masked_fill(torch.rand(batch) < 0.1, 10)
        sigma = (torch.randn(batch) * 1.2 - 1.2).exp()[:, None, None, None]
        noisy = x + sigma * torch.randn_like(x)
        variance = sigma**2 + sd**2
        label = 1000 * (sigma / (1 + sigma)).flatten()
        out = called(noisy / variance.sqrt(), label, class_labels=y)
        target = (x - sd**2 / variance * noisy) * variance.sqrt() / (sigma * sd)
        loss = (out - target).square().mean()
        (loss / parts).backward()

    def step() -> None:
        for part in range(parts):
            waits = dist.is_initialized() and part < parts - 1
            with called.no_sync() if waits else contextlib.nullcontext():
                backward(batch // parts)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-3)

    return step


def our_loop(batch: int, adaptive: bool, parts: int) -> tuple[Callable[[], None], int]:
    """One step of the trainer, and the number of its parameters."""
    recipe = recipe_from(
        {
            "network": {"channels": CHANNELS, "norm_groups": 8},
            "objective": {"preset": "edm", "adaptive": adaptive},
            "conditional": True,
            "batch": batch,
            "accumulate": parts,
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
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch on each process")
    parser.add_argument("--processes", type=int, default=1, help="started here, one thread each")
    options = parser.parse_args()
    if options.processes == 1:
        measure(options)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=of_several, args=(rank, port, options)) for rank in range(options.processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()


def of_several(rank: int, port: int, options: argparse.Namespace) -> None:
    """One process of several."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.processes))
    os.environ["LOCAL_WORLD_SIZE"] = str(options.processes)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measure(options, rank)
    dist.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace, rank: int = 0) -> None:
    """Alternate segments of both, and print what they took."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    data = load_data(recipe_from({"steps": 1}).data)
    assert data.train_labels is not None
    share, parts = options.batch // options.processes, options.accumulate
    bare = bare_loop(data.train_images, data.train_labels, share, data.grey_levels, parts)
    ours, parameters = our_loop(options.batch, options.adaptive, parts)
    for step in (bare, ours):
        seconds(step, 3)
    say: Callable[..., None] = print if rank == 0 else lambda *told: None
    say(
        f"{parameters:,} parameters, batch {options.batch} over {options.processes} processes in {parts} parts, "
        f"{torch.get_num_threads()} threads each"
    )

    images = options.steps * options.batch
    ratios, rates = [], []
    for segment in range(options.segments):
        # Whichever goes first alternates as well: a drift of the machine's speed then cancels.
        order = (bare, ours) if segment % 2 == 0 else (ours, bare)
        times = {id(step): seconds(step, options.steps, clock) for step in order}
        a, b = times[id(bare)], times[id(ours)]
        ratios.append(a / b)
        rates.append((images / a, images / b))
        say(f"segment {segment:2d}   bare {images / a:8.1f}   ours {images / b:8.1f} images/s   ratio {a / b:.3f}")
    bare_rate, our_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    say(f"median       bare {bare_rate:8.1f}   ours {our_rate:8.1f} images/s   ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
