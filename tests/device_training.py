"""Training on a real accelerator: `make test-device-training` (LOGSNR_DEVICE=cpu tries the checks on the CPU).

Images per second, share of the device's peak and memory in float32, bf16, fp16, compiled, in parts and recomputed; and
that each of them descends, and resumes.  On one device, within ten minutes.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from logsnr.devices import find_device, told
from logsnr.files import read_pair
from logsnr.training import Dataset, recipe_from, train
from logsnr.training.processes import own_accelerator
from logsnr.training.run import Run

DEVICE = find_device(os.environ.get("LOGSNR_DEVICE", "auto"))
SMALL = DEVICE.type == "cpu"
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "L4": 121e12}
"""Operations per second in bf16 with float32 sums, dense, as their maker's data sheets say."""
NETWORK = (
    {"channels": [16, 32], "norm_groups": 8, "layers_per_block": 1}
    if SMALL
    else {"channels": [128, 256, 256], "attention": [False, True, True], "layers_per_block": 3}
)
BATCH = 8 if SMALL else 512
STEPS, WARM = (2, 1) if SMALL else (20, 8)
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "bf16, 4 parts": {"precision": "bf16", "accumulate": 4},
    "bf16, recomputed": {"precision": "bf16", "recompute": True},
}


@pytest.fixture(scope="module", autouse=True)
def where() -> None:
    print(f"\n{told(DEVICE)}, PyTorch {torch.__version__}")
    if SMALL and "LOGSNR_DEVICE" not in os.environ:
        pytest.exit("no accelerator here: LOGSNR_DEVICE=cpu tries the checks on the CPU", returncode=1)


@pytest.fixture(scope="module")
def images() -> Dataset:
    """Smooth colour pictures of 32 x 32, ten kinds."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2048, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    labels = torch.arange(2048) % 10
    stored = (255 * fine).round().to(torch.uint8)
    return Dataset(
        train_images=stored[:1920],
        train_labels=labels[:1920],
        test_images=stored[1920:],
        test_labels=labels[1920:],
        grey_levels=256,
        classes=10,
    )


def plan(**changes: Any) -> Any:
    base = {
        "network": NETWORK,
        "objective": {"preset": "edm", "adaptive": True},
        "optimizer": {"warmup": 2},
        "samples": {"every": 0},
        "conditional": True,
        "batch": BATCH,
        "steps": 8,
        "checkpoint_every": 4,
        "log_every": 2,
        "device": "cpu" if SMALL else "auto",
    }
    return recipe_from({**base, **changes})


def skip_fp16(changes: dict[str, Any]) -> None:
    if SMALL and changes.get("precision") == "fp16":
        pytest.skip("fp16 needs a GPU")


def finish() -> None:
    if not SMALL:
        torch.cuda.synchronize()


@pytest.mark.parametrize("mode", MODES)
def test_images_per_second(mode: str, images: Dataset) -> None:
    skip_fp16(MODES[mode])
    with own_accelerator():
        run = Run(plan(**MODES[mode]), images)
        counter = FlopCounterMode(display=False)
        if MODES[mode].get("compile"):
            run.advance()
        else:
            with counter:
                run.advance()
        for _ in range(WARM):
            run.advance()
        finish()
        if not SMALL:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(STEPS):
            loss = run.advance()
        finish()
        rate = STEPS * BATCH / (time.perf_counter() - began)
        assert math.isfinite(float(loss))
        memory = 0.0 if SMALL else torch.cuda.max_memory_allocated() / 2**30
    work = counter.get_total_flops() / BATCH
    if work:
        COUNTED.setdefault("of an image", work)  # recomputing adds to what is done, not to what is wanted
    wanted = COUNTED.get("of an image", work)
    name = "" if SMALL else torch.cuda.get_device_name()
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    share = f", {rate * wanted / peak:.1%} of the peak in bf16" if peak else ""
    print(
        f"    {mode}: {rate:,.0f} images/s, {rate * wanted / 1e12:.2f} TFLOP/s{share}, {memory:.2f} GiB, "
        f"{sum(p.numel() for p in run.parameters):,} weights, batch {BATCH}"
    )


COUNTED: dict[str, float] = {}


class Stop(Exception):  # noqa: N818
    """Stands for a kill."""


@pytest.mark.parametrize("mode", ["float32", "bf16", "fp16", "bf16, compiled", "bf16, recomputed"])
def test_it_descends_and_a_resume_goes_on(mode: str, images: Dataset, tmp_path: Path) -> None:
    """Kernels of a GPU may add up in any order: what goes on is near, not equal."""
    skip_fp16(MODES[mode])
    few = plan(**MODES[mode], steps=8)

    def stop(info: Any) -> None:
        if info.step == 6:
            raise Stop

    train(few, tmp_path / "whole", progress=False, data=images)
    with pytest.raises(Stop):
        train(few, tmp_path / "cut", progress=False, data=images, callback=stop)
    assert train(few, tmp_path / "cut", resume=True, progress=False, data=images).resumed_from == 4
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    losses = [[line["loss"] for line in of] for of in lines]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[0][-1] < losses[0][0]
    weights = [read_pair(tmp_path / name, "card")[1] for name in ("whole", "cut")]
    apart = math.sqrt(sum(float((weights[0][k] - weights[1][k]).square().sum()) for k in weights[0]))
    size = math.sqrt(sum(float(v.square().sum()) for v in weights[0].values()))
    print(f"    {mode}: resumed weights {apart / size:.1e} apart, relative")
    assert apart < 1e-2 * size
