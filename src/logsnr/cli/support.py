"""What the commands share: plans, conditions, pictures and held-out images, from the options given."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor

from logsnr.calibration import Progress, calibrate
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.files import replace_file
from logsnr.images import png, tile
from logsnr.load import Loaded, is_pipeline, load
from logsnr.pixels import Pixels
from logsnr.sampling import Plan, grids, solvers
from logsnr.sampling.plan import Grid
from logsnr.training import load_data
from logsnr.training.config import DataConfig


def run_denoiser(model: str) -> NetworkDenoiser:
    """The denoiser of a run's folder; of a pipeline's there is nothing to train, measure or export."""

    denoiser = None if is_pipeline(model) else load(model)
    if not isinstance(denoiser, NetworkDenoiser):
        raise LogsnrError(f"{model} is a diffusers pipeline: this command takes the folder of a run, e.g. runs/digits")
    return denoiser


def solver_plan(
    denoiser: Loaded,
    nfe: int,
    spacing: str,
    sigma_max: float | None,
    sigma_min: float | None,
    solver: str,
    gamma: float,
    order: int | None,
) -> Plan:
    """The plan of a solver by name on a grid by name; the model's sampling range where no end is given."""

    spacings: dict[str, Callable[..., Grid]] = {"log-linear": grids.log_linear, "karras": grids.karras}
    plain: dict[str, Callable[..., Plan]] = {"ddim": solvers.ddim, "ddpm": solvers.ddpm}
    multistep: dict[str, Callable[..., Plan]] = {
        "adams-bashforth": solvers.adams_bashforth,
        "ipndm": solvers.ipndm,
        "deis": solvers.deis,
        "dpmpp": solvers.dpmpp,
        "unipc": solvers.unipc,
    }
    if spacing not in spacings:
        raise LogsnrError(f"--grid {spacing!r} is not one of {', '.join(spacings)}")
    if solver not in {"ge", *plain, *multistep}:
        raise LogsnrError(f"--solver {solver!r} is not one of ge, {', '.join([*plain, *multistep])}")
    if order is not None and solver not in multistep:
        raise LogsnrError(f"--order {order}: {solver} has no order; it belongs to {', '.join(multistep)}")
    lo, hi = denoiser.sampling_range
    grid = spacings[spacing](nfe, hi if sigma_max is None else sigma_max, lo if sigma_min is None else sigma_min)
    if solver == "ge":
        return solvers.ge(grid, gamma=gamma)
    if solver in plain:
        return plain[solver](grid)
    return multistep[solver](grid) if order is None else multistep[solver](grid, order)


def calibrated(model: str, nfe: int, batch: int, rollouts: int, resume: Path | None, seed: int, *, quiet: bool) -> Plan:
    """The calibrated plan of a run's model, with a bar on a terminal; classes are taken in turn."""
    denoiser = run_denoiser(model)
    console = Console(stderr=True)
    shown = console.is_terminal and not quiet
    with Bar(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, disable=not shown
    ) as bar:
        task = bar.add_task("teacher", total=1.0)

        def tell(progress: Progress) -> None:
            bar.update(task, completed=progress.spent, description=f"{progress.stage}, RMSE {progress.error:.4f}")

        return calibrate(
            denoiser,
            nfe,
            batch=batch,
            rollouts=rollouts,
            cond=condition(denoiser, None, batch),
            seed=seed,
            progress=tell,
            resume=resume,
        )


def condition(denoiser: Loaded, label: int | None, n: int) -> dict[str, Any]:
    """The class of every image; without one, a conditional model draws its classes in turn."""
    classes = denoiser.card.get("classes", 0)
    if not classes:
        if label is not None:
            raise LogsnrError(f"--class {label}: this model is unconditional; leave --class out")
        return {}
    if label is None:
        return {"class_labels": torch.arange(n) % classes}
    null = denoiser.card.get("null_class")
    if not 0 <= label < classes and label != null:
        none = "" if null is None else f", or {null} for the null condition"
        raise LogsnrError(f"--class {label}: give 0 ... {classes - 1}{none}")
    return {"class_labels": torch.full((n,), label)}


def write_images(x: Tensor, denoiser: Loaded, out: Path) -> None:
    """Decode samples and write them as one picture (.png) or as grey levels (.npy)."""

    images, pixels = denoiser.decode(x), denoiser.pixels or Pixels(256)
    if images.is_floating_point():  # a pipeline's images are in [-1, 1]
        images = pixels.decode(images)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, images.numpy())
        replace_file(out, buffer.getvalue())
        return
    columns = max(1, round(len(images) ** 0.5))
    scale = max(1, 64 // images.shape[-1])
    replace_file(out, png(tile(pixels.display(images), columns=columns, scale=scale)))


def held_out_images(
    denoiser: NetworkDenoiser, source: str | None, limit: int | None
) -> tuple[Tensor, int, dict[str, Tensor] | None]:
    """Held-out images, their grey levels, and their labels where the model is conditional."""

    trained_on = (denoiser.card.get("training") or {}).get("data")
    if source is None and trained_on is None:
        raise LogsnrError("this model does not say what it was trained on: give --data")
    config = DataConfig(**trained_on) if trained_on else DataConfig()
    if source is not None:
        config = config.model_copy(update={"source": source})
    data = load_data(config)
    if denoiser.pixels is not None and denoiser.pixels.levels != data.levels:
        raise LogsnrError(f"{config.source} has {data.levels} grey levels, the model {denoiser.pixels.levels}")
    images, labels = data.test_images[:limit], data.test_labels
    cond = None
    if denoiser.card.get("classes"):
        if labels is None:
            raise LogsnrError(f"{config.source} has no labels, which this class-conditional model needs")
        cond = {"class_labels": labels[:limit]}
    return images, data.levels, cond


def print_json(facts: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(facts, indent=2))
