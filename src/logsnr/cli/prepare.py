"""`logsnr data`: data made ready for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logsnr.cli.application import Json, Named, app, hushed

data = typer.Typer(help="Make data ready for training.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")


@data.command(cls=Named)
def prepare(
    source: Annotated[str, typer.Argument(help="{data}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the prepared set: data.source of a recipe.")],
    size: Annotated[int | None, typer.Option(help="Of image files: side of the square.", min=2, max=4096)] = None,
    crop: Annotated[
        str, typer.Option(help="Of image files: square (central square, Lanczos) or adm (as ImageNet is in ADM, EDM).")
    ] = "square",
    channels: Annotated[int | None, typer.Option(help="Of image files: 1 for grey, 3 for colour [default: 3].")] = None,
    background: Annotated[str, typer.Option(help="Of image files: colour under transparent parts.")] = "white",
    broken: Annotated[str, typer.Option(help="Of image files: stop at one that cannot be read, or skip it.")] = "stop",
    layout: Annotated[str | None, typer.Option(help="Of arrays: NHWC or NCHW, where the shape leaves it open.")] = None,
    grey_levels: Annotated[int, typer.Option(help="Of arrays that do not say.", min=2, max=256)] = 256,
    holdout: Annotated[float, typer.Option(help="Share held out by the recipe, for the statistics.")] = 0.1,
    split_seed: Annotated[int, typer.Option(help="Seed of that split.", min=0)] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where a finished or another set lies.")
    ] = False,
    json_: Json = False,
) -> None:
    """Write images of any source, resized once, as shards that a training maps; cut off, the same command goes on.

    Example: logsnr data prepare digits --out prepared/digits
    """
    from logsnr.cli import support
    from logsnr.training.config import recipe_from
    from logsnr.training.data import prepare as run

    options = {
        "source": source, "size": size, "crop": crop, "channels": channels, "background": background, "broken": broken,
        "layout": layout, "grey_levels": grey_levels, "holdout": holdout, "split_seed": split_seed,
    }  # fmt: skip
    config = recipe_from({"data": options, "steps": 1}, name="data prepare").data
    done = run(config, out, overwrite=overwrite, progress=not hushed(json_))
    if json_:
        support.print_json(done.to_dict())
    else:
        print(f"{out}: {done}")
