"""Command line: `logsnr demo | train | sample | evaluate`.

Bad input ends with one clear line on stderr and exit code 2; `--json` puts one JSON object on stdout for machines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from logsnr.denoiser import NetworkDenoiser
    from logsnr.sampling import Plan
    from logsnr.sampling.plan import Grid

app = typer.Typer(
    help="Train, measure and sample diffusion and flow models in one coordinate: the log-SNR.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[str, typer.Argument(help="Folder of a run, e.g. runs/digits.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path("runs/demo"),
    seed: Seed = 0,
    max_seconds: Annotated[float, typer.Option(help="Longest training time.")] = 90.0,
    json_: Json = False,
) -> None:
    """Train a model of real digits, measure it, sample it in few steps, and write a report.

    Example: logsnr demo --out runs/demo
    """
    from logsnr.demo import run_demo

    summary = run_demo(out, seed=seed, max_seconds=max_seconds, quiet=json_)
    if json_:
        _print_json(summary)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a bundled one: digits, fashion_mnist.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run [default: runs/NAME].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue exactly where the last checkpoint ends.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: --set batch=64 --set ema.decay=.99")
    ] = None,
    json_: Json = False,
) -> None:
    """Train a denoiser by a recipe.

    Example: logsnr train recipes/digits.yaml --out runs/digits --set steps=500
    """
    from logsnr.training import load_recipe
    from logsnr.training import train as run

    config = load_recipe(recipe, set_ or [])
    folder = out or Path("runs") / Path(recipe).stem
    summary = run(config, folder, resume=resume, progress=not json_)
    if json_:
        _print_json({"folder": str(folder), **summary.to_dict()})
    else:
        print(f"{folder}: {summary}")


@app.command()
def sample(
    model: Model,
    nfe: Annotated[int, typer.Option(help="Network evaluations per image.", min=1)] = 10,
    solver: Annotated[str, typer.Option(help="ge, ddim, ddpm, adams-bashforth, ipndm, deis, dpmpp or unipc.")] = "ge",
    gamma: Annotated[float, typer.Option(help="Gradient estimation's gamma; 1 is DDIM.")] = 2.0,
    order: Annotated[int | None, typer.Option(help="Order of a multistep solver [default: its own].")] = None,
    spacing: Annotated[
        str, typer.Option("--grid", help="Spacing of the noise levels: log-linear or karras.")
    ] = "log-linear",
    sigma_max: Annotated[float | None, typer.Option(help="First noise level [default: the model's range].")] = None,
    sigma_min: Annotated[
        float | None, typer.Option(help="Last noise level before 0 [default: the model's range].")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file (JSON) instead of solver, nfe and gamma.")] = None,
    n: Annotated[int, typer.Option("--number", "-n", help="How many images.", min=1)] = 64,
    label: Annotated[int | None, typer.Option("--class", help="Class of a class-conditional model.")] = None,
    batch: Annotated[int, typer.Option(help="Images per network call.", min=1)] = 256,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="A .png picture, or .npy grey levels.")] = Path("samples.png"),
    json_: Json = False,
) -> None:
    """Sample images from a trained model.

    Example: logsnr sample runs/digits --nfe 5 --solver ge -n 64 --out samples.png
    """
    import torch

    from logsnr.errors import LogsnrError
    from logsnr.load import load
    from logsnr.sampling import Plan
    from logsnr.sampling import sample as run

    if out.suffix not in (".png", ".npy"):
        raise LogsnrError(f"--out {out}: the suffix must be .png (a picture) or .npy (uint8 grey levels)")
    denoiser = load(model)
    chosen = Plan.load(plan) if plan else _plan(denoiser, nfe, spacing, sigma_max, sigma_min, solver, gamma, order)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *denoiser.shape, generator=generator)
    cond = _condition(denoiser, label, n)
    start = time.perf_counter()
    parts = [
        run(
            denoiser,
            chosen,
            noise=noise[i : i + batch],
            generator=generator,
            cond={k: v[i : i + batch] for k, v in cond.items()},
        )
        for i in range(0, n, batch)
    ]
    seconds = time.perf_counter() - start
    _write_images(torch.cat(parts), denoiser, out)
    facts = {
        "out": str(out),
        "images": n,
        "nfe": chosen.nfe,
        "plan": chosen.meta,
        "sigmas": [chosen.sigmas[0], chosen.sigmas[-2]],
        "seed": seed,
        "seconds_per_image": seconds / n,
    }
    if json_:
        _print_json(facts)
    else:
        print(f"{out}: {n} images, {chosen.nfe} evaluations each, {seconds / n * 1e3:.1f} ms per image")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="digits, or a .npz/.npy file or folder [default: the recipe's].")
    ] = None,
    evaluations: Annotated[int, typer.Option(help="Network evaluations per image, a multiple of 8.")] = 32,
    limit: Annotated[int | None, typer.Option(help="Use only the first images of the held-out set.", min=1)] = None,
    logsnr_min: Annotated[float | None, typer.Option(help="Noisy end of the bound's range.")] = None,
    logsnr_max: Annotated[float | None, typer.Option(help="Clean end of the bound's range.")] = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Measure the variational bound of held-out images, in bits per dimension with its standard error.

    Example: logsnr evaluate runs/digits --evaluations 32
    """
    import torch

    from logsnr.likelihood import bits_per_dim, default_logsnr_range
    from logsnr.load import load

    denoiser = load(model)
    images, levels, cond = _held_out(denoiser, data, limit)
    lo, hi = default_logsnr_range(levels)
    result = bits_per_dim(
        denoiser,
        images,
        levels=levels,
        logsnr_range=(lo if logsnr_min is None else logsnr_min, hi if logsnr_max is None else logsnr_max),
        cond=cond,
        generator=torch.Generator().manual_seed(seed),
        evaluations_per_image=evaluations,
    )
    facts = {
        "model": model,
        "images": len(images),
        "levels": levels,
        "bits_per_dim": result.bits_per_dim,
        "stderr": result.stderr,
        "data_stderr": result.data_stderr,
        "diffusion": result.diffusion,
        "reconstruction": result.reconstruction,
        "prior": result.prior,
        "logsnr_range": list(result.logsnr_range),
        "evaluations": result.evaluations,
        "seed": seed,
    }
    if json_:
        _print_json(facts)
        return
    table = Table(title=f"{model} on {len(images)} held-out images ({levels} grey levels)", title_justify="left")
    table.add_column("log-SNR")
    table.add_column("error of eps per dimension", justify="right")
    for centre, error in zip(*(t.tolist() for t in result.loss_curve), strict=True):
        table.add_row(f"{centre:.2f}", f"{error:.4f}")
    Console().print(table)
    print(f"{result}; {result.evaluations} evaluations, seed {seed}")


def main() -> None:
    """Entry point of the `logsnr` command: bad input is one line and exit code 2."""
    from logsnr.errors import one_line

    try:
        app()
    except (ValueError, OSError) as error:
        print(f"logsnr: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _plan(
    denoiser: NetworkDenoiser,
    nfe: int,
    spacing: str,
    sigma_max: float | None,
    sigma_min: float | None,
    solver: str,
    gamma: float,
    order: int | None,
) -> Plan:
    from logsnr.errors import LogsnrError
    from logsnr.sampling import grids, solvers

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


def _condition(denoiser: NetworkDenoiser, label: int | None, n: int) -> dict[str, Any]:
    """The class of every image; without one, a conditional model draws its classes in turn."""
    import torch

    from logsnr.errors import LogsnrError

    classes = denoiser.card.get("classes", 0)
    if not classes:
        if label is not None:
            raise LogsnrError(f"--class {label}: this model is unconditional; leave --class out")
        return {}
    if label is None:
        return {"class_labels": torch.arange(n) % classes}
    if not 0 <= label <= classes:
        raise LogsnrError(f"--class {label}: give 0 ... {classes - 1}, or {classes} for the null condition")
    return {"class_labels": torch.full((n,), label)}


def _write_images(x: Tensor, denoiser: NetworkDenoiser, out: Path) -> None:
    import io

    import numpy as np

    from logsnr.files import replace_file
    from logsnr.images import png, tile

    images = denoiser.decode(x)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, images.numpy())
        replace_file(out, buffer.getvalue())
        return
    assert denoiser.pixels is not None
    columns = max(1, round(len(images) ** 0.5))
    scale = max(1, 64 // denoiser.shape[-1])
    replace_file(out, png(tile(denoiser.pixels.display(images), columns=columns, scale=scale)))


def _held_out(
    denoiser: NetworkDenoiser, source: str | None, limit: int | None
) -> tuple[Tensor, int, dict[str, Tensor] | None]:
    """Held-out images, their grey levels, and their labels where the model is conditional."""
    from logsnr.errors import LogsnrError
    from logsnr.training import load_data
    from logsnr.training.config import DataConfig

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


def _print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
