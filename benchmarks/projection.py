"""The ideal denoiser per query: `projection.Points` beside torch.cdist + softmax in float64, in one process.

    python benchmarks/projection.py --cifar10 cifar10/ --threads 2
    python benchmarks/projection.py --fashion-mnist fashion_mnist.npz --threads 2

Both get the same float32 states x + sigma eps and answer with eps = (y - x0) / sigma; the reference holds its data in
float64 beforehand.  Printed per batch size and noise level: milliseconds per query of both, their ratio, and the
largest relative difference of eps.  The last line weighs the levels as 50 DDIM steps of the DDPM table visit them.
Without either the set is 50,000 random points of 3,072 numbers near a 100-dimensional sheet.
Rounds alternate, so that a busy machine slows both; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import bisect
import resource
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from ideal_denoiser import cifar10, fashion_mnist
from torch import Tensor

from logsnr.projection import Points
from logsnr.sampling import grids
from logsnr.timesteps import TimestepTable

LEVELS = (0.05, 0.5, 1.5, 3.0, 6.0, 15.0, 60.0)


def random_set() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(50_000, 100, generator=generator) / torch.arange(1, 101).sqrt()
    return torch.tanh(latent @ torch.randn(100, 3072, generator=generator) / 2)


def reference(points: Tensor, y: Tensor, sigma: float) -> Tensor:
    """x0 in float64, as one would write it."""
    weight = torch.softmax(-torch.cdist(y.double(), points).square() / (2 * sigma * sigma), 1)
    return weight @ points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="folder of train-*.webp sheets")
    parser.add_argument("--fashion-mnist", type=Path, help="npz with train_images, instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time: what a busy machine does not distort")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="noise levels, ascending")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.fashion_mnist is not None:
        data = fashion_mnist(args.fashion_mnist)
    else:
        data = random_set() if args.cifar10 is None else cifar10(args.cifar10)
    points, start = Points(data), clock()
    points.nearest(data[:1])  # the screening copy is made once
    seconds = clock() - start
    threads = torch.get_num_threads()
    print(
        f"{tuple(data.shape)}, {threads} threads; first search {seconds:.1f} s, peak so far {_peak():.2f} GB",
        flush=True,
    )
    wide = data.double()
    ddim = grids.timesteps(50, TimestepTable.ddpm(), "trailing", last="min")[:-1]
    edges = [(a * b) ** 0.5 for a, b in pairwise(args.levels)]
    visits = [0] * len(args.levels)
    for sigma in ddim:
        visits[bisect.bisect(edges, sigma)] += 1
    for batch in args.batches:
        ours, theirs = [], []
        for sigma in args.levels:
            generator = torch.Generator().manual_seed(1)
            chosen = torch.randint(len(data), (batch,), generator=generator)
            y = data[chosen] + sigma * torch.randn(batch, data.shape[1], generator=generator)
            times: list[tuple[float, float]] = []
            for _ in range(args.rounds):
                start = clock()
                mean = points.softmin(y, sigma).mean
                middle = clock()
                exact = reference(wide, y, sigma)
                times.append((middle - start, clock() - middle))
            scale = (y.double() - exact).norm(dim=1)
            # float32 answers resolve x0 to an ulp: that part of the difference is theirs, not the search's.
            error = float((((mean.double() - exact).norm(dim=1)) / scale).max())
            ours.append(statistics.median(a for a, _ in times) / batch)
            theirs.append(statistics.median(b for _, b in times) / batch)
            ratio = statistics.median(b / a for a, b in times)
            print(
                f"batch {batch:4d}  sigma {sigma:6g}  {1e3 * ours[-1]:9.2f} ms  cdist {1e3 * theirs[-1]:9.2f} ms  "
                f"ratio {ratio:6.1f}  eps {error:.1e}",
                flush=True,
            )
        mine, other = (sum(v * t for v, t in zip(visits, side, strict=True)) for side in (ours, theirs))
        print(f"batch {batch:4d}  along 50 DDIM steps: {other / mine:.1f} times faster per query", flush=True)
    print(f"peak memory with the float64 reference {_peak():.2f} GB")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
