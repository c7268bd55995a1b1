"""Cheaper likelihoods: evaluations for a standard error of .01 bits/dim, against VDM's antithetic lattice.

    python benchmarks/likelihood.py zoo:digits --limit 48 --strata 4 --passes 1536

Same model, images, batch and log-SNR range for every design; only noise and noise levels count, the images are fixed.
A pass is one evaluation of every image.  VDM's design is one lattice u_i = (u0 + i/n) mod 1, uniform in log-SNR, over
the images in a fresh order in every pass (2107.00630, app. I.1).  The variance of a pass comes from `--passes`
passes of each design, all of them summed for the standard error of that variance, and scales as 1/passes.  Ours come
8 x `--strata` at a time, each time with a pilot of its own that learns from replicate to replicate, as `bits_per_dim`
goes about it.  A call should end near .01, which decides on --limit and --strata:

    evaluations = n * variance of a pass / .01^2,      ratio = design / lattice

The last column counts the pilot's own evaluations too.  A class-conditional model is given the null class: the bound is
unconditional.  About three minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from torch import Tensor

import logsnr as ls
from logsnr.denoiser import NetworkDenoiser
from logsnr.likelihood import GaussianControl, Pilot, default_logsnr_range
from logsnr.likelihood.control import draw_errors
from logsnr.likelihood.integral import REPLICATES, integrate
from logsnr.training import load_data
from logsnr.training.config import DataConfig

GOAL = 0.01


def lattice_pass(
    denoiser: NetworkDenoiser, x: Tensor, lo: float, hi: float, cond: dict[str, Tensor], generator: torch.Generator
) -> float:
    """VDM's estimate of the diffusion term from one evaluation per image, nats."""
    n = len(x)
    order = torch.randperm(n, generator=generator)
    u = (torch.rand(1, generator=generator, dtype=torch.float64) + order / n) % 1.0
    error, _ = draw_errors(denoiser, x, lo + (hi - lo) * u, cond=cond, generator=generator, chunk=n)
    return float(0.5 * (hi - lo) * error.mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, or zoo:NAME")
    parser.add_argument("--passes", type=int, default=96, help="passes per design, a multiple of 8 x --strata")
    parser.add_argument("--strata", type=int, default=1, help="passes per replicate: levels of an image in each")
    parser.add_argument("--pilot", type=int, default=256, help="evaluations of a pilot")
    parser.add_argument("--limit", type=int, help="use only the first held-out images")
    parser.add_argument("--logsnr", type=float, nargs=2, help="range of the bound")
    parser.add_argument("--data", help="images, where the model's card does not lead to them")
    parser.add_argument("--designs", nargs="*", help="words of the designs to measure beside VDM's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.passes < 1 or args.passes % (REPLICATES * args.strata):
        parser.error(f"--passes {args.passes}: give a multiple of {REPLICATES} x --strata = {REPLICATES * args.strata}")

    denoiser = ls.load(args.run)
    config = DataConfig(**denoiser.card["training"]["data"])
    data = load_data(config if args.data is None else config.model_copy(update={"source": args.data}))
    images = data.test_images[: args.limit]
    lo, hi = args.logsnr or default_logsnr_range(data.grey_levels)
    x, train = denoiser.encode(images), denoiser.encode(data.train_images)
    n, unit = len(x), 1 / (denoiser.dim * math.log(2))
    classes = denoiser.card.get("classes", 0)
    cond = {"class_labels": torch.full((n,), classes)} if classes else {}
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()

    passes = torch.tensor([lattice_pass(denoiser, x, lo, hi, cond, generator) for _ in range(args.passes)])
    rows = {"VDM: uniform, lattice": (float(passes.mean()) * unit, float(passes.double().var()) * unit**2, 0)}
    designs: dict[str, tuple[bool, GaussianControl | None]] = {
        "pilot levels, free controls": (True, None),
        "pilot levels, spectrum of these images as well": (True, GaussianControl(x, kind="cosine")),
        "pilot levels, spectrum of training images as well": (True, GaussianControl(train, kind="cosine")),
        "pilot levels, covariance of training images as well": (True, GaussianControl(train[:10_000], kind="full")),
        "uniform levels, strata, no control": (False, None),
    }
    if args.designs:
        designs = {name: design for name, design in designs.items() if any(word in name for word in args.designs)}
    for name, (measured, control) in designs.items():
        means, variances, cost = [], [], 0
        for _ in range(args.passes // (REPLICATES * args.strata)):
            pilot = Pilot.uniform(lo, hi)
            if measured:
                pilot = Pilot.measure(
                    denoiser,
                    x,
                    logsnr_range=(lo, hi),
                    cond=cond,
                    generator=generator,
                    gaussian=control,
                    evaluations=args.pilot,
                )
            result = integrate(
                denoiser,
                x,
                pilot,
                torch.ones_like,
                cond=cond,
                generator=generator,
                chunk=n,
                evaluations_per_image=REPLICATES * args.strata,
            )
            means.append(float(result.per_image.mean()) * unit)
            variances.append((result.stderr * unit) ** 2 * REPLICATES * args.strata)
            cost = pilot.evaluations
        rows[name] = (sum(means) / len(means), sum(variances) / len(variances), cost)

    base = n * rows["VDM: uniform, lattice"][1] / GOAL**2
    freedom = {name: (args.passes - 1 if "VDM" in name else args.passes * 7 / 8 / args.strata) for name in rows}
    table = [
        {
            "design": name,
            "diffusion_bits_per_dim": mean,
            "evaluations": n * variance / GOAL**2,
            "ratio": n * variance / GOAL**2 / base,
            "ratio_with_pilot": (n * variance / GOAL**2 + cost) / base,
            "relative_error": math.sqrt(2 / freedom[name] + (0 if "VDM" in name else 2 / (args.passes - 1))),
        }
        for name, (mean, variance, cost) in rows.items()
    ]
    facts = {"run": args.run, "images": n, "logsnr_range": [lo, hi], "seconds": time.perf_counter() - start}
    if args.json:
        print(json.dumps({**facts, "designs": table}, indent=2))
        return
    print(f"{args.run}: {n} images, log-SNR [{lo:.2f}, {hi:.2f}], {args.passes} passes, {facts['seconds']:.0f} s\n")
    print(f"| design | diffusion, bits/dim | evaluations for SE {GOAL} | ratio | with pilot |")
    print("| --- | --- | --- | --- | --- |")
    for row in table:
        print(
            f"| {row['design']} | {row['diffusion_bits_per_dim']:.4f} | {row['evaluations']:.0f} | "
            f"{row['ratio']:.3f} +- {row['ratio'] * row['relative_error']:.3f} | {row['ratio_with_pilot']:.3f} |"
        )


if __name__ == "__main__":
    main()
