"""What commands that read a set of images once, to write another, can all be told."""

from __future__ import annotations

from typing import Annotated

import typer

Size = Annotated[int | None, typer.Option(help="Of image files: side of the square.", min=2, max=4096)]
Crop = Annotated[
    str, typer.Option(help="Of image files: square (central square, Lanczos) or adm (as ImageNet is in ADM, EDM).")
]
Channels = Annotated[int | None, typer.Option(help="Of image files: 1 for grey, 3 for colour [default: 3].")]
Background = Annotated[str, typer.Option(help="Of image files: colour under transparent parts.")]
Broken = Annotated[str, typer.Option(help="Of image files: stop at one that cannot be read, or skip it.")]
Layout = Annotated[str | None, typer.Option(help="Of arrays: NHWC or NCHW, where the shape leaves it open.")]
Holdout = Annotated[float, typer.Option(help="Share held out by the recipe, for the statistics.")]
SplitSeed = Annotated[int, typer.Option(help="Seed of that split.", min=0)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew where a finished or another set lies.")]
