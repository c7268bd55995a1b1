"""Gaussian starts by option: fitted to data or to a model's own samples, read from a file, kept beside a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from logsnr.cli.data import data_of
from logsnr.cli.support import condition
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError, unknown
from logsnr.loading import Loaded
from logsnr.sampling import GaussianStart, Plan
from logsnr.zoo import START

STARTS = ("data", "model", "none")
OWN_SAMPLES = 2000
"""Samples that a model draws for its own Gaussian start."""


def fitted_start(
    denoiser: NetworkDenoiser, kind: str, source: str | None, seed: int, *, quiet: bool = True
) -> GaussianStart | None:
    """The Gaussian of a model's training data, or of its own samples; with a mean per class where it has classes.

    Raises:
        LogsnrError: if the kind is unknown, or there is no data.
    """
    if kind not in STARTS:
        raise unknown("--start", kind, STARTS)
    if source is not None and kind != "data":
        raise LogsnrError(f"--data {source} is read with --start data only: leave it out")
    if kind == "none":
        return None
    null = denoiser.card.get("null_class")
    if kind == "model":
        cond = condition(denoiser, None, OWN_SAMPLES)
        null = null if cond else None
        generator = torch.Generator().manual_seed(seed)
        return GaussianStart.of_model(denoiser, OWN_SAMPLES, generator=generator, cond=cond, null=null)
    data = data_of(denoiser, source, quiet=quiet)
    images = data.train_images[:: -(-len(data.train_images) // 10_000) or 1]
    labels = None
    if denoiser.card.get("classes"):
        if data.train_labels is None:
            raise LogsnrError("the data has no labels, which the start of a class-conditional model needs")
        labels = data.train_labels[:: -(-len(data.train_images) // 10_000) or 1]
    return GaussianStart.fit(denoiser.encode(images), labels=labels, null=None if labels is None else null)


def found_start(
    denoiser: Loaded, what: str, source: str | None, seed: int, *, quiet: bool = True
) -> GaussianStart | None:
    """The start of --start data, model, none, or a file.

    Raises:
        LogsnrError: as `fitted_start`, or if a pipeline is asked for its data.
    """
    if what not in STARTS and Path(what).expanduser().is_file():
        return GaussianStart.load(what)
    if what not in STARTS:
        raise unknown("--start", what, STARTS, ", or a file of logsnr calibrate")
    if isinstance(denoiser, NetworkDenoiser):
        return fitted_start(denoiser, what, source if what == "data" else None, seed, quiet=quiet)
    if what == "none":
        return None
    raise LogsnrError(f"--start {what}: of a pipeline give the file of a start (GaussianStart.save), or none")


def starts_of(given: GaussianStart | None, plans: Sequence[Path]) -> list[GaussianStart]:
    """The start that was given, and those that lie beside plans' files."""
    beside = {plan.with_name(START) for plan in plans}
    found = [GaussianStart.load(file) for file in sorted(beside) if file.is_file()]
    return found if given is None else [given, *found]


def check_start(start: GaussianStart | None, out: Path) -> None:
    """Make sure, before the search, that a start can be kept beside its plan.

    Raises:
        LogsnrError: if another one lies there.
    """
    path = out.with_name(START)
    if start is not None and path.is_file() and GaussianStart.load(path).fingerprint != start.fingerprint:
        raise LogsnrError(f"{path} is another start, which other plans may need: give --out in another folder")


def keep_start(start: GaussianStart | None, plan: Plan, out: Path) -> Path | None:
    """Save the start beside a plan that needs it."""
    return start.save(out.with_name(START)) if start is not None and plan.meta.get("start") else None


def start_of(file: Path | None, plan_file: Path | None, plan: Plan) -> GaussianStart | None:
    """The start that was given, or the one beside the plan's file where the plan needs one."""
    if file is not None:
        return GaussianStart.load(file)
    beside = None if plan_file is None or not plan.meta.get("start") else plan_file.with_name(START)
    return None if beside is None or not beside.is_file() else GaussianStart.load(beside)
