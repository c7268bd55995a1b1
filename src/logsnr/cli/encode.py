"""`logsnr encode`: images made latents, once, before a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logsnr.cli.application import Device, Json, Named, Seed, app, hushed
from logsnr.cli.reading import (
    Background,
    Broken,
    Channels,
    Crop,
    Holdout,
    Layout,
    Overwrite,
    Size,
    SplitSeed,
)


@app.command(cls=Named)
def encode(
    source: Annotated[str, typer.Argument(help="{data}.")],
    vae: Annotated[str, typer.Option(help="Folder of an AutoencoderKL or AutoencoderTiny, or of a pipeline.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the latents: data.source of a recipe.")],
    draws: Annotated[
        bool, typer.Option("--draws", help="Draw each latent once, in place of its mean and standard deviation.")
    ] = False,
    size: Size = None,
    crop: Crop = "square",
    channels: Channels = None,
    background: Background = "white",
    broken: Broken = "stop",
    layout: Layout = None,
    holdout: Holdout = 0.1,
    split_seed: SplitSeed = 0,
    chunk: Annotated[int, typer.Option(help="Images per call of the VAE.", min=1)] = 16,
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
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
