"""What `step` costs: our scheduler against diffusers' DPM-Solver++(2M) and UniPC, same tensors, one process.

    python benchmarks/scheduler_overhead.py --rounds 21 --steps 20

The network's answer is a stored tensor, so what is timed is `step` alone, called as pipelines call it.  Rounds
alternate, so that a busy machine slows all; read the ratio, the median over rounds of neighbouring runs.
Target: at most .3 of either.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from logsnr.adapters import GradientEstimationScheduler

SHAPES = ((1, 4, 64, 64), (4, 16, 128, 128))
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OTHERS = ("dpm++(2m)", "unipc")


def schedulers(kind: str) -> dict[str, Any]:
    config = {**BETAS, "prediction_type": kind}
    return {
        "ge": GradientEstimationScheduler(**config, gamma=2.0),
        "our 2m": GradientEstimationScheduler(**config, solver="dpmpp"),
        "dpm++(2m)": DPMSolverMultistepScheduler(**config),
        "unipc": UniPCMultistepScheduler(**config),
    }


def microseconds(scheduler: Any, steps: int, noise: Tensor, answer: Tensor, clock: Callable[[], float]) -> float:
    scheduler.set_timesteps(steps)
    timesteps, z = scheduler.timesteps, noise
    began = clock()
    for t in timesteps:
        z = scheduler.step(answer, t, z, return_dict=False)[0]
    return (clock() - began) / steps * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, where others share the machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter

    print(f"microseconds per step, medians of {options.rounds} rounds of {options.steps} steps, float32")
    print(f"{'state':>14} {'network':>13} {'ours':>7}" + "".join(f"{name:>10}" for name in ("us", *OTHERS)), end="")
    print("".join(f"{'/ ' + name:>13}" for name in OTHERS))
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        noise, answer = (torch.randn(shape, generator=generator) for _ in range(2))
        for kind in ("epsilon", "v_prediction"):
            runs = schedulers(kind)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for round_ in range(options.rounds + 2):
                order = list(runs) if round_ % 2 == 0 else list(runs)[::-1]
                for name in order:
                    value = microseconds(runs[name], options.steps, noise, answer, clock)
                    if round_ >= 2:
                        times[name].append(value)
            for mine in ("ge", "our 2m"):
                row = [statistics.median(times[name]) for name in (mine, *OTHERS)]
                ratios = [
                    statistics.median(a / b for a, b in zip(times[mine], times[other], strict=True)) for other in OTHERS
                ]
                print(f"{'x'.join(map(str, shape)):>14} {kind:>13} {mine:>7}", end="")
                print("".join(f"{value:10.1f}" for value in row) + "".join(f"{ratio:13.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
