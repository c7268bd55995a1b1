"""Checks on a real accelerator: `make test-device` (LOGSNR_DEVICE=cuda:1 for another one, cpu to try the checks).

Equality with the CPU, half precision, compilation, a scheduler that never waits for the device; and what it does per
second.  `make test` has the same on a pretended device (test_devices.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import logsnr as ls
from logsnr.adapters import GradientEstimationScheduler
from logsnr.cli import main
from logsnr.denoiser import NetworkDenoiser
from logsnr.devices import find_device, told
from logsnr.models.networks import build_network
from logsnr.predictions import V
from logsnr.training import load_recipe

DEVICE = find_device(os.environ.get("LOGSNR_DEVICE", "auto"))
SOLVERS = ("ddim", "ge", "adams_bashforth", "ipndm", "dpmpp", "deis", "unipc", "ddpm")
CLASSES = {"class_labels": torch.arange(64) % 10}
TOLERANCE = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 0.1}
"""RMS differences from float32 on the CPU, of samples whose RMS is about 1."""
HALF_STEPS = 6


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch) -> None:
    """Convolutions of CUDA may round to 10 bits unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", autouse=True)
def where() -> None:
    print(f"\n{told(DEVICE)}, PyTorch {torch.__version__}")
    if DEVICE.type == "cpu" and "LOGSNR_DEVICE" not in os.environ:
        pytest.exit("no accelerator here: LOGSNR_DEVICE=cpu tries the checks on the CPU", returncode=1)


def noise(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def rms(a: Tensor, b: Tensor) -> float:
    return float((a.float().cpu() - b.float().cpu()).square().mean().sqrt())


def report(name: str, value: str) -> None:
    print(f"    {name}: {value}")


def finish() -> None:
    if DEVICE.type != "cpu":
        getattr(torch, DEVICE.type).synchronize()


def seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """Median duration, after one call to warm up."""
    call()
    finish()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        finish()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@pytest.mark.parametrize("name", ls.zoo.names())
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_is_the_cpus(name: str, solver: str) -> None:
    here, there = ls.load(f"zoo:{name}"), ls.load(f"zoo:{name}", device=DEVICE)
    low, high = here.sampling_range
    plan = getattr(ls.solvers, solver)(ls.grids.log_linear(6, high, low))
    z, cond = noise(8, *here.shape), {"class_labels": torch.arange(8)} if here.classes else {}
    ends = [ls.sample(d, plan, noise=z, cond=cond, generator=torch.Generator().manual_seed(1)) for d in (here, there)]
    assert ends[1].device == DEVICE
    assert rms(*ends) < TOLERANCE["fp32"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(dtype: str) -> None:
    here, there = ls.load("zoo:fashion-mnist"), ls.load("zoo:fashion-mnist", device=DEVICE, dtype=dtype)
    ends = [ls.sample(d, HALF_STEPS, noise=noise(32, *here.shape)) for d in (here, there)]
    assert ends[1].dtype == torch.float32
    apart = [rms(a, b) for a, b in zip(*ends, strict=True)]
    report(f"{dtype} against the CPU's float32, RMS of the median sample", f"{statistics.median(apart):.4f}")
    assert statistics.median(apart) < TOLERANCE[dtype]


def test_compiled() -> None:
    plain, fast = (ls.load("zoo:digits", device=DEVICE, compile=c) for c in (False, True))
    z = noise(64, *plain.shape)
    assert rms(*(ls.sample(d, 6, noise=z, cond=CLASSES) for d in (plain, fast))) < TOLERANCE["fp32"]
    times = [seconds(lambda d=d: ls.sample(d, 6, noise=z, cond=CLASSES)) for d in (plain, fast)]
    report("compiled over plain, 64 digits at 6 evaluations", f"{times[1] / times[0]:.2f} of the time")


def test_likelihood_calibration_and_guidance() -> None:
    here, there = ls.load("zoo:digits"), ls.load("zoo:digits", device=DEVICE)
    images = here.decode(ls.sample(here, 12, noise=noise(64, *here.shape), cond=CLASSES))
    bits = [
        ls.bits_per_dim(d, images, cond=CLASSES, generator=torch.Generator().manual_seed(0), evaluations_per_image=16)
        for d in (here, there)
    ]
    assert bits[1].bits_per_dim == pytest.approx(bits[0].bits_per_dim, abs=2e-3)
    guided = [ls.guidance.cfg(d, 2.0, {"class_labels": torch.tensor([10])}) for d in (here, there)]
    assert rms(*(ls.sample(d, 6, noise=noise(64, *here.shape), cond=CLASSES) for d in guided)) < 5e-3
    ten = {"class_labels": torch.arange(10)}
    errors = [ls.calibrate(d, 4, n=16, rollouts=40, cond=ten).meta["report"]["rmse"] for d in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.25)  # rounding may lead the search elsewhere


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait for the device is an error (CUDA tells; others do not)."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_the_scheduler_never_waits(kind: str) -> None:
    scheduler = GradientEstimationScheduler(prediction_type=kind)
    z = noise(2, 4, 64, 64).to(DEVICE)
    scheduler.set_timesteps(8, device=DEVICE)
    timesteps = list(scheduler.timesteps)
    with no_waiting():
        for t in timesteps:
            z = scheduler.step(0.3 * z, t, scheduler.scale_model_input(z, t), return_dict=False)[0]
    assert bool(z.isfinite().all())


class Free(torch.nn.Module):
    """A network that costs nothing: what is left is the loop."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(answer, requires_grad=False)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (4, 16, 128, 128)])
def test_the_loop_costs_less_than_theirs(shape: tuple[int, ...]) -> None:
    """Microseconds a step with a network of no cost: ours, and DPM-Solver++(2M) of diffusers."""
    from diffusers import DPMSolverMultistepScheduler

    z, answer, steps = noise(*shape).to(DEVICE), noise(*shape).flip(0).to(DEVICE), 20
    denoiser = NetworkDenoiser(Free(answer), V(), shape=shape[1:], trained_range=(0.01, 100.0))
    plan = ls.solvers.ge(ls.grids.log_linear(steps, 80.0, 0.02))
    theirs, ours = (
        DPMSolverMultistepScheduler(prediction_type="v_prediction"),
        GradientEstimationScheduler(prediction_type="v_prediction"),
    )

    def run(scheduler: Any) -> None:
        scheduler.set_timesteps(steps, device=DEVICE)
        x = z
        for t in scheduler.timesteps:
            x = scheduler.step(answer, t, x, return_dict=False)[0]

    times = [
        seconds(call, 9) / steps * 1e6
        for call in (lambda: ls.sample(denoiser, plan, noise=z), lambda: run(ours), lambda: run(theirs))
    ]
    report(f"a step of {shape}", "sample {:.0f} us, our scheduler {:.0f} us, theirs {:.0f} us".format(*times))
    assert max(times[:2]) < times[2]


def told_speed(what: str, denoiser: ls.Denoiser, n: int, cond: dict[str, Tensor]) -> None:
    z = noise(n, *denoiser.shape)
    speed = n / seconds(lambda: ls.sample(denoiser, 5, noise=z, cond=cond))
    report(f"{what} at 5 evaluations", f"{speed:,.0f} images/s")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ls.zoo.names())
def test_images_per_second(name: str, dtype: str) -> None:
    n = 1024 if DEVICE.type != "cpu" else 8
    denoiser = ls.load(f"zoo:{name}", device=DEVICE, dtype=dtype)
    cond = {"class_labels": torch.arange(n) % 10} if denoiser.classes else {}
    told_speed(f"zoo:{name}, {dtype}", denoiser, n, cond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_per_second_of_a_recipe(dtype: torch.dtype) -> None:
    """The network of cifar10_small, untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(load_recipe("cifar10_small").network, (3, 32, 32))
    denoiser = (
        NetworkDenoiser(network, V(), shape=(3, 32, 32), trained_range=(0.002, 80.0)).eval().requires_grad_(False)
    )
    told_speed(f"cifar10_small, {dtype}", denoiser.to(DEVICE, dtype), 512 if DEVICE.type != "cpu" else 4, {})


@pytest.mark.parametrize(
    "line",
    [
        "sample zoo:digits --nfe 4 -n 8 --out a.png",
        "evaluate zoo:digits --evaluations 8 --limit 32",
        "compare zoo:digits --nfe 3 -n 8 --solvers ge,DDIM --features pixels --teacher-steps 16",
        "calibrate zoo:digits --nfe 2 -n 8 --rollouts 40",
        "passport zoo:digits --images 32 --trajectories 4 --out p.html",
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_command(line: str, dtype: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*line.split(), "--device", str(DEVICE), "--dtype", dtype, "--json"]
    monkeypatch.setattr(sys, "argv", ["logsnr", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    json.loads(out)
