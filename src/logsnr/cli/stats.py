"""`logsnr stats`: statistics of data in a feature space, made once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logsnr.cli.application import Device, Json, Named, Seed, app, hushed


@app.command(cls=Named)
def stats(
    data: Annotated[
        str, typer.Argument(help="{data}; or a folder of .npz shards. Of what has a held-out part, the rest.")
    ],
    features: Annotated[str, typer.Option(help="{spaces}, or module:function.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The .npz file [default: one in the cache, see LOGSNR_CACHE].")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first images.", min=8)] = None,
    size: Annotated[
        int | None, typer.Option(help="Crop pictures to the central square of this side.", min=2, max=4096)
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="Of pictures: 1 for grey, 3 for colour [default: 3].", min=1, max=3)
    ] = None,
    grey_levels: Annotated[
        int | None, typer.Option(help="Of arrays that do not say [default: 256].", min=2, max=256)
    ] = None,
    chunk: Annotated[int, typer.Option(help="Images per network call.", min=1)] = 256,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Keep the statistics of data in a feature space, for logsnr evaluate --stats.

    Example: logsnr stats digits --features classifier --out digits.npz
    """
    import torch

    from logsnr.cli import support
    from logsnr.devices import find_process
    from logsnr.errors import LogsnrError
    from logsnr.evaluation.features import Material, find_space
    from logsnr.evaluation.statistics import Statistics, cached, gather, told_features
    from logsnr.evaluation.stored import stored
    from logsnr.terminal import progress_bar
    from logsnr.training import load_data
    from logsnr.training.config import DataConfig
    from logsnr.writing import check_output

    if (world := find_process()[1]) > 1:
        raise LogsnrError(f"{world} processes (WORLD_SIZE) would all do the same: make statistics with one")
    if channels == 2:
        raise LogsnrError("--channels 2: give 1 for grey or 3 for colour")
    out = None if out is None else check_output(out)
    where = support.place(device, "fp32", False)["device"]
    images = stored(data, grey_levels=grey_levels, size=size, channels=channels, limit=limit)
    labelled = None
    if features == "classifier":
        config = {"source": data, "grey_levels": images.pixels.grey_levels, "size": size, "channels": channels}
        labelled = load_data(DataConfig.model_validate(config))
    generator = torch.Generator().manual_seed(seed)
    name = Path(data).stem
    space = find_space(features, Material(pixels=images.pixels, data=labelled, source=name, generator=generator))
    path = out or cached(images, space)
    found = Statistics.find(path, (images.digest, space.hash))
    made = found is None
    if found is None:
        with progress_bar(not hushed(json_), "features") as show:
            tell = None if show is None else lambda done: show(done / images.n, f"{done:,} of {images.n:,}")
            gathered = gather(images, space, chunk=chunk, device=where, tell=tell)
        found = Statistics.of(gathered, space, images, told_features(features))
        found.save(path)
    facts = {
        "out": str(path), "images": found.n, "features": space.name, "numbers": len(found.mean), "space": space.hash,
        "sees": space.sees, "digest": images.digest, "made": made,
    }  # fmt: skip
    if json_:
        support.print_json(facts)
    else:
        there = "" if made else ", made before"
        print(f"{path}: {found.n:,} images, {len(found.mean):,} features of {space.name} ({space.hash}){there}")
