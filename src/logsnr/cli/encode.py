"""`logsnr encode`: images made latents, once, before a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logsnr.cli.application import Device, Json, Named, Seed, app, hushed


@app.command(cls=Named)
def encode(
    source: Annotated[str, typer.Argument(help="{data}.")],
    vae: Annotated[str, typer.Option(help="Folder of an AutoencoderKL or AutoencoderTiny, or of a pipeline.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the latents: data.source of a recipe.")],
    draws: Annotated[
        bool, typer.Option("--draws", help="Draw each latent once, in place of its mean and standard deviation.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="Of image files: side of the square.", min=2, max=4096)] = None,
    crop: Annotated[
        str, typer.Option(help="Of image files: square (central square, Lanczos) or adm (as ImageNet is in ADM, EDM).")
    ] = "square",
    channels: Annotated[int | None, typer.Option(help="Of image files: 1 for grey, 3 for colour [default: 3].")] = None,
    background: Annotated[str, typer.Option(help="Of image files: colour under transparent parts.")] = "white",
    broken: Annotated[str, typer.Option(help="Of image files: stop at one that cannot be read, or skip it.")] = "stop",
    layout: Annotated[str | None, typer.Option(help="Of arrays: NHWC or NCHW, where the shape leaves it open.")] = None,
    holdout: Annotated[float, typer.Option(help="Share held out by the recipe, for the statistics.")] = 0.1,
    split_seed: Annotated[int, typer.Option(help="Seed of that split.", min=0)] = 0,
    chunk: Annotated[int, typer.Option(help="Images per call of the VAE.", min=1)] = 16,
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where a finished or another set lies.")
    ] = False,
    json_: Json = False,
) -> None:
    """Write the latents of images as shards that a training maps; cut off, the same command goes on.

    Example: logsnr encode photos --size 256 --vae sd-vae --out latents
    """
    from logsnr.cli import support
    from logsnr.devices import find_device
    from logsnr.training.config import recipe_from
    from logsnr.training.data import VAE, Encoder, prepare

    options = {
        "source": source, "size": size, "crop": crop, "channels": channels, "background": background, "broken": broken,
        "layout": layout, "holdout": holdout, "split_seed": split_seed,
    }  # fmt: skip
    config = recipe_from({"data": options, "steps": 1}, name="encode").data
    encoder = Encoder(vae=VAE(vae, find_device(device)), draws=draws, seed=seed, chunk=chunk)
    done = prepare(config, out, encoder=encoder, overwrite=overwrite, progress=not hushed(json_))
    if json_:
        support.print_json(done.to_dict())
    else:
        print(f"{out}: {done}")
