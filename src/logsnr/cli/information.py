"""`logsnr information`: at which noise levels the bits of held-out images are decided."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from logsnr.cli.application import CleanEnd, Compile, Device, Dtype, Json, Limit, Model, NoisyEnd, Seed, app, hushed
from logsnr.terminal import console

BAR = 30


@app.command()
def information(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Held-out images: {data} [default: the recipe's].")] = None,
    evaluations: Annotated[int, typer.Option(help="Per image, a multiple of 8.", min=8, max=100_000)] = 64,
    limit: Limit = None,
    logsnr_min: NoisyEnd = None,
    logsnr_max: CleanEnd = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Show where the bits of images are: what each range of noise levels costs, and the sum from pure noise on.

    Example: logsnr information zoo:digits --data digits
    """
    import math

    import torch

    from logsnr.cli import support
    from logsnr.cli.data import held_out_images
    from logsnr.likelihood import bits_per_dim, default_logsnr_range
    from logsnr.likelihood import information as of

    denoiser = support.run_denoiser(model, support.place(device, dtype, compile_))
    images, pixels, cond, train = held_out_images(denoiser, data, limit, quiet=hushed(json_))
    lo, hi = default_logsnr_range(pixels)
    bound = bits_per_dim(
        denoiser, images, pixels=pixels, cond=cond, train=train, evaluations_per_image=evaluations,
        logsnr_range=(lo if logsnr_min is None else logsnr_min, hi if logsnr_max is None else logsnr_max),
        generator=torch.Generator().manual_seed(seed), max_evaluations_per_image=max(1024, evaluations),
    )  # fmt: skip
    found = of(bound)
    halves = {f"{share:.0%}": found.level(share) for share in (0.1, 0.5, 0.9)}
    if json_:
        levels = {share: None if math.isnan(level) else level for share, level in halves.items()}
        support.print_json(
            {
                "model": model, "images": len(images), "bits_per_dim": bound.bits_per_dim, "stderr": bound.stderr,
                "prior": bound.prior, "reconstruction": bound.reconstruction, "logsnr": found.edges.tolist(),
                "bits_known": found.known.tolist(), "bits_per_logsnr": found.density.tolist(), "levels": levels,
                "evaluations": bound.evaluations, "seed": seed,
            }
        )  # fmt: skip
        return
    table = Table(title=f"{model} on {len(images)} held-out images", title_justify="left")
    for title in ("log-SNR", "sigma", "bits/dim here", "known so far", ""):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    most = float(found.density.max())
    for i, density in enumerate(found.density.tolist()):
        low, high = float(found.edges[i]), float(found.edges[i + 1])
        bar = "█" * round(BAR * density / most) if most > 0 else ""
        sigmas = f"{math.exp(-low / 2):.3g} ... {math.exp(-high / 2):.3g}"
        here = f"{density * (high - low):.4f}"
        table.add_row(f"{low:.2f} ... {high:.2f}", sigmas, here, f"{float(found.known[i + 1]):.4f}", bar)
    console().print(table)
    told = ", ".join(f"{share} at {level:.2f}" for share, level in halves.items() if not math.isnan(level))
    print(f"{bound}; log-SNR at which of all bits are known: {told}; {bound.evaluations} evaluations, seed {seed}")
