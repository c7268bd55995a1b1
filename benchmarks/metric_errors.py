"""Do the errors of metrics cover?  And what does measuring 50,000 samples of 2,048 features take?

    python benchmarks/metric_errors.py            # coverage: about ten minutes on one core
    python benchmarks/metric_errors.py --memory   # a minute on two cores

Samples are Gaussians whose standard deviations fall as i^{-1/2}, shifted and widened against a reference of other
draws, which stays what it is.  Of 200 repetitions, how many values lie within two of their own errors from the mean of
all 200; for FD of infinitely many samples, from the truth (a closed form).
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from logsnr.evaluation.metrics import Estimated, Moments, Normal
from logsnr.evaluation.metrics.measures import METRICS, Gathered, Measuring, Reference

CASES = ((16, 500, 0.3, 1.0), (16, 500, 0.0, 1.3), (64, 1000, 0.1, 1.1))
"""Features, samples, shift and widening, in standard deviations."""
REPETITIONS, NEEDED = 200, [name for name in METRICS if name != "is"]


def spread(features: int) -> Tensor:
    return torch.arange(1, features + 1, dtype=torch.float64) ** -0.5


def truth(reference: Normal, shift: float, wide: float) -> float:
    s = spread(len(reference.mean))
    own = Moments(len(s))
    own.n, own.mean, own.scatter = 2, shift * s, torch.diag((wide * s) ** 2)
    return reference.frechet(own).value


def coverage(features: int, n: int, shift: float, wide: float) -> str:
    generator = torch.Generator().manual_seed(0)
    s = spread(features)

    def drawn(count: int) -> Tensor:
        return torch.randn(count, features, generator=generator, dtype=torch.float64) * s

    rows = drawn(n)
    moments = Moments.of(rows)
    found: dict[str, list[Estimated]] = {name: [] for name in NEEDED}
    for _ in range(REPETITIONS):
        gathered = Gathered(n)
        gathered.add(drawn(n) * wide + shift * s)
        measuring = Measuring(gathered, Reference(mean=moments.mean, covariance=moments.covariance, rows=rows.float()))
        for name in NEEDED:
            found[name].append(METRICS[name].of(measuring))
    shares = []
    for name, each in found.items():
        values, errors = (torch.tensor([getattr(one, part) for one in each]) for part in ("value", "stderr"))
        exact = truth(Normal(moments.mean, moments.covariance), shift, wide)
        centre = exact if name == "fd-inf" else float(values.mean())
        shares.append(f"{float(((values - centre).abs() < 2 * errors).double().mean()):.1%}")
    return f"| {features} | {n:,} | {shift:g} | {wide:g} | {' | '.join(shares)} |"


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def memory(features: int = 2048, n: int = 50_000) -> None:
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))
    idle, peak, ended = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], resident())

    threading.Thread(target=watch, daemon=True).start()
    s, generator = spread(features), torch.Generator().manual_seed(0)
    mean, covariance = torch.zeros(features, dtype=torch.float64), torch.diag(s**2)
    began, gathered = time.perf_counter(), Gathered(n)
    for first in range(0, n, 256):
        x = torch.randn(min(256, n - first), features, generator=generator)
        gathered.add(x * s.float() * 1.1 + 0.1 * s.float())
    print(f"gathered in {time.perf_counter() - began:.0f} s")
    measuring = Measuring(gathered, Reference(mean=mean, covariance=covariance))
    for name in ("fd", "fd-inf"):
        began = time.perf_counter()
        one = METRICS[name].of(measuring)
        print(f"{name}: {one.value:.4f} +- {one.stderr:.4f}, {time.perf_counter() - began:.0f} s")
    ended.set()
    print(f"truth {truth(measuring.normal, 0.1, 1.1):.4f}; peak {peak[0] - idle:.0f} MB above the idle process")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    if parser.parse_args().memory:
        memory()
    else:
        print(f"| features | samples | shift | widening | {' | '.join(NEEDED)} |")
        print("| ---: " * (4 + len(NEEDED)) + "|")
        for case in CASES:
            print(coverage(*case), flush=True)
