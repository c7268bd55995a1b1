"""What the batch posterior leaves of the chance in a regression target, on the training digits:

    python benchmarks/batch_posterior.py

E||target - E[x|z]||^2 of the target "batch" over that of "sample", by level and batch; E[x|z] is exact, of all images.
"""

from __future__ import annotations

import torch

import logsnr as ls
from logsnr.denoiser import noisy
from logsnr.posterior import batch_posterior
from logsnr.training import load_data
from logsnr.training.config import DataConfig

LEVELS, BATCHES, REPEATS = (-6, -4, -2, -1, 0, 1, 2, 4), (32, 128, 512), 40


def main() -> None:
    data = load_data(DataConfig())
    images = ls.Pixels(data.grey_levels).encode(data.train_images[:])
    exact, generator = ls.exact.PointCloud(images), torch.Generator().manual_seed(0)
    print("| log-SNR | posterior variance, per dimension | " + " | ".join(f"batch {n}" for n in BATCHES) + " |")
    print("|---:" * (2 + len(BATCHES)) + "|")
    for level in LEVELS:
        cells, spread = [], 0.0
        for n in BATCHES:
            one = many = 0.0
            for _ in range(REPEATS * BATCHES[0] // min(n, 128)):
                x = images[torch.randint(len(images), (n,), generator=generator)]
                eps, sigma = torch.randn(x.shape, generator=generator), torch.full((n,), torch.tensor(-level / 2).exp())
                mean = exact(noisy(x, eps, sigma), sigma).x0
                one += float((x - mean).square().mean())
                many += float((batch_posterior(x, eps, sigma)[0] - mean).square().mean())
            cells.append(f"{many / one:.3f}")
            spread = one / (REPEATS * BATCHES[0] // min(n, 128))
        print(f"| {level} | {spread:.4f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
