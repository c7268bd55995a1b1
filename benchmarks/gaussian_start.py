"""What a Gaussian start brings to networks of other people's conventions (tests/models/foreign).

    python benchmarks/gaussian_start.py --data fashion_mnist.npz

One Gaussian of the first 9,000 training images, nothing else of the data.  Two tables for each model, on 64 noises that
nothing was fitted to, teacher: UniPC-3, 100 evaluations from 160 sigma_data:

    how far from the teacher's state the start is, level by level (RMSE of y = z/alpha), by kind of covariance
    RMSE (median over samples) of GE(1.5) on flow_range(n, s1, low, "min") from the noise itself and from the start
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import logsnr as ls
from logsnr.grids import flow_range
from logsnr.sampling.teacher import teacher_plan
from logsnr.solvers import ge
from logsnr.training.config import DataConfig
from logsnr.training.data import load_data

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.foreign import MODELS, foreign

FIRSTS = (30.0, 14.0, 7.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz of Fashion-MNIST")
    parser.add_argument("--models", nargs="+", default=["ddpm-eps", "flow-uniform"], choices=sorted(MODELS))
    parser.add_argument("--seed", type=int, default=123)
    options = parser.parse_args()
    images = load_data(DataConfig(source=options.data)).train_images[:9000]
    for name in options.models:
        low, high = MODELS[name]["range"]
        judge(name, low + (high - low) * images.float() / 255, options.seed)


def judge(name: str, x: torch.Tensor, seed: int) -> None:
    """Both tables of a model, for samples x of its data."""
    denoiser = foreign(name)
    denoiser.trained_range = (denoiser.trained_range[0], min(denoiser.trained_range[1], 160 * denoiser.sigma_data))
    (bottom, top), low = denoiser.sampling_range, max(0.01, denoiser.sampling_range[0])
    noise = torch.randn(64, *denoiser.shape, generator=torch.Generator().manual_seed(seed))
    starts = {
        "full": ls.GaussianStart.fit(x, kind="full"),
        "rank 20": ls.GaussianStart.fit(x, rank=20),
        "cosine": ls.GaussianStart.fit(x, kind="cosine"),
        "100 images": ls.GaussianStart.fit(x[:100]),
    }
    print(f"\n{name}: sigma {bottom:.4g} ... {top:.4g}, sigma_data {denoiser.sigma_data:.3f}")
    errors = {kind: start.held_out_error(denoiser, noise=noise, steps=100) for kind, start in starts.items()}
    for level in list(errors["full"])[6:66:6]:
        found = "  ".join(f"{kind} {error[level] * denoiser.sigma_data:.3f}" for kind, error in errors.items())
        print(f"  sigma {level:7.3f}  {found}")
    ends = ls.sample(denoiser, teacher_plan(100, bottom, top), noise=noise)
    for n in (5, 8):
        for first in (top, *FIRSTS):
            plan = ge(flow_range(n, first, low, "min"), 1.5)
            for kind, start in (("noise", None), ("start", starts["full"])):
                apart = ls.sample(denoiser, plan, noise=noise, start=start) - ends
                q = apart.double().square().flatten(1).mean(1)
                rmse, median = float(q.mean().sqrt()), float(q.median().sqrt())
                print(f"  {n} evaluations from {kind} at {first:6.1f}: {rmse:.3f} ({median:.3f})", flush=True)


if __name__ == "__main__":
    main()
