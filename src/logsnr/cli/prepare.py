"""`logsnr data`: data made ready for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logsnr.cli.application import Json, Named, app, hushed
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

data = typer.Typer(help="Make data ready for training.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")


@data.command(cls=Named)
def prepare(
    source: Annotated[str, typer.Argument(help="{data}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the prepared set: data.source of a recipe.")],
    size: Size = None,
    crop: Crop = "square",
    channels: Channels = None,
    background: Background = "white",
    broken: Broken = "stop",
    layout: Layout = None,
    grey_levels: Annotated[int, typer.Option(help="Of arrays that do not say.", min=2, max=256)] = 256,
    holdout: Holdout = 0.1,
    split_seed: SplitSeed = 0,
    overwrite: Overwrite = False,
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
