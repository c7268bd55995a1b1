"""What a sampling step costs outside the network: `sample` against diffusers' multistep scheduler, in one process.

    python benchmarks/sampling_overhead.py --rounds 21 --steps 20

The network is one that answers at once with a stored tensor; its call is timed apart and subtracted.  What is left on
our side is labels, input scaling, the estimate, the update, the check for non-finite values and the preparation of the
run; on the other `DPMSolverMultistepScheduler.step` (order 2, as configured by default) on the same tensors, without
its preparation; and the bare update `a z + b e` below both.
Rounds alternate, so that a busy machine slows all; read the median of the ratios of neighbouring runs.
Target: at most .25.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser
from logsnr.predictions import Eps, Prediction, V
from logsnr.sampling import Plan, grids, sample, solvers
from logsnr.timesteps import TimestepTable

SHAPES = ((1, 4, 64, 64), (4, 16, 128, 128))


class Stored(nn.Module):
    """A network without work: answers with one stored tensor."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer, requires_grad=False)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.answer


def plans(steps: int) -> dict[str, Plan]:
    grid = grids.timesteps(steps, TimestepTable.stable_diffusion())
    third = (1.9, -1.3, 0.4)
    rows = [(1.0,), (1.5, -0.5), *[third] * (steps - 3), (1.0,)]
    return {"ge": solvers.ge(grid, 2.0), "3 estimates": Plan(grid, tuple(rows))}


def ours(plan: Plan, prediction: Prediction, noise: Tensor, answer: Tensor) -> Callable[[], object]:
    model = NetworkDenoiser(Stored(answer), prediction, shape=tuple(noise.shape[1:]), trained_range=(0.029, 14.7))
    return lambda: sample(model, plan, noise=noise)


def network_alone(steps: int, noise: Tensor, answer: Tensor) -> Callable[[], object]:
    network, label = Stored(answer), torch.zeros(len(noise))

    def run() -> None:
        for _ in range(steps):
            network(noise, label)

    return run


def diffusers_multistep(steps: int, noise: Tensor, answer: Tensor, prediction: str) -> Callable[[], object]:
    from diffusers import DPMSolverMultistepScheduler

    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind
    )

    def prepare() -> None:
        scheduler.set_timesteps(steps)

    def run() -> None:
        z = noise
        for t in scheduler.timesteps:
            z = scheduler.step(answer, t, z, return_dict=False)[0]

    run.prepare = prepare  # type: ignore[attr-defined]
    return run


def bare(steps: int, noise: Tensor, answer: Tensor) -> Callable[[], object]:
    def run() -> None:
        z = noise
        for _ in range(steps):
            z = 0.9 * z + 0.1 * answer

    return run


def microseconds(run: Callable[[], object], steps: int, repeats: int, clock: Callable[[], float]) -> float:
    """Per step; what must be reset between runs (the scheduler's counters) is not timed."""
    total = 0.0
    for _ in range(repeats):
        getattr(run, "prepare", lambda: None)()
        began = clock()
        run()
        total += clock() - began
    return total / (repeats * steps) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, where others share the machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    n = options.steps

    print(
        f"microseconds per step, medians of {options.rounds} rounds of {n} steps, {options.threads} thread(s), float32"
    )
    print(f"{'batch':>14} {'network':>8} {'plan':>12} {'ours':>8} {'diffusers':>10} {'bare':>8} {'ours/diffusers':>15}")
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        noise, answer = (torch.randn(shape, generator=generator) for _ in range(2))
        repeats = 10 if noise.numel() < 1e5 else 1
        for prediction in (Eps(label="stable-diffusion"), V(label="stable-diffusion")):
            for name, plan in plans(n).items():
                runs = {
                    "ours": ours(plan, prediction, noise, answer),
                    "network": network_alone(n, noise, answer),
                    "diffusers": diffusers_multistep(n, noise, answer, prediction.name),
                    "bare": bare(n, noise, answer),
                }
                times: dict[str, list[float]] = {key: [] for key in runs}
                for round_ in range(options.rounds + 2):
                    order = list(runs) if round_ % 2 == 0 else list(runs)[::-1]
                    for key in order:
                        value = microseconds(runs[key], n, repeats, clock)
                        if round_ >= 2:
                            times[key].append(value)
                times["ours"] = [a - b for a, b in zip(times["ours"], times["network"], strict=True)]
                middle = {key: statistics.median(values) for key, values in times.items()}
                ratio = statistics.median(a / b for a, b in zip(times["ours"], times["diffusers"], strict=True))
                print(
                    f"{'x'.join(map(str, shape)):>14} {prediction.name:>8} {name:>12} {middle['ours']:8.1f} "
                    f"{middle['diffusers']:10.1f} {middle['bare']:8.1f} {ratio:15.3f}"
                )


if __name__ == "__main__":
    main()
