"""`logsnr passport`: a page and a JSON file about any denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logsnr.cli.application import Compile, Device, Dtype, Json, Named, Seed, app, hushed, models, note
from logsnr.paths import expanded
from logsnr.terminal import console, description

if TYPE_CHECKING:
    from torch import Tensor

    from logsnr.loading import Loaded


@app.command(cls=Named)
def passport(
    model: Annotated[
        str,
        typer.Argument(help="zoo:NAME, the folder of a run, or a diffusers folder or hub id.", autocompletion=models),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="{data}; or none [default: the recipe's, if it can be read]."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; the JSON file lies beside it [default: passport.html in the run].")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt or class of a pipeline.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Of a diffusers pipeline: a file with a prompt a line, used in turn.")
    ] = None,
    images: Annotated[int, typer.Option(help="Samples noised at every level.", min=1, max=100_000)] = 128,
    trajectories: Annotated[int, typer.Option(help="Sampling trajectories.", min=1, max=100_000)] = 32,
    sigma_max: Annotated[float | None, typer.Option(help="Largest noise level [default: the model's range].")] = None,
    sigma_min: Annotated[float | None, typer.Option(help="Smallest noise level [default: the model's range].")] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Examine a denoiser: what range is usable, what is wrong with it, and how many evaluations to use.

    Example: logsnr passport runs/digits --out passport.html
    """
    from rich.progress import BarColumn, Progress, TimeElapsedColumn

    from logsnr.cli import support
    from logsnr.errors import LogsnrError, require
    from logsnr.evaluation.passport import examine
    from logsnr.evaluation.passport.page import write_passport
    from logsnr.interrupts import Interrupted, last_signal
    from logsnr.writing import check_output

    page = out or (expanded(model) if Path(model).is_dir() else Path()) / "passport.html"
    if page.suffix not in (".html", ".json"):
        raise LogsnrError(f"--out {out}: give a page, .html; the JSON file lies beside it")
    page = check_output(page.with_suffix(".html"))
    require("matplotlib", extra="train", purpose="the page's pictures")  # said before the work, not after it
    if prompts is not None and prompt is not None:
        raise LogsnrError(f"--prompt {prompt} with --prompts {prompts}: give one of them")
    denoiser, _ = support.sampled_model(model, prompt, None, 1.0, None, support.place(device, dtype, compile_))
    cond: Mapping[str, Any] | None
    if prompts is None:
        x, cond, remark = _samples(denoiser, data, prompt, quiet=hushed(json_))
    else:
        if data not in (None, "none"):
            raise LogsnrError(f"--data {data} with --prompts {prompts}: nothing says which image each prompt is of")
        x, cond, remark = None, support.prompted(denoiser, model, prompts, None, 256)[0], ""
    low, high = denoiser.sampling_range
    own = sigma_min is None and sigma_max is None
    shown = console(stderr=True)
    if remark:
        note(remark)
    with Progress(
        description(),
        BarColumn(),
        TimeElapsedColumn(),
        console=shown,
        disable=hushed(json_) or not shown.is_terminal,
    ) as bar:
        task = bar.add_task("passport", total=1.0)
        found = examine(
            denoiser,
            x,
            cond=cond,
            name=support.model_name(model),
            images=images,
            trajectories=trajectories,
            sigma_range=None
            if own
            else (low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max),
            seed=seed,
            progress=lambda part, share: bar.update(task, completed=share, description=part),
        )
    values = page.with_suffix(".json")
    found.save(values)
    if json_:
        support.print_json({"out": str(page), **found.to_dict()})
    else:
        for f in found.findings:
            print(f"{ {'error': 'TROUBLE', 'warning': 'WARNING', 'info': 'note'}[f.severity]:8}{f.text}")
    write_passport(found, page)
    if not json_:
        uses = f"{values} for `calibrate --passport` and `compare --passport`"
        print(f"{page}: {found.cost:,} network evaluations; {uses}")
    if found.interrupted:
        raise Interrupted(f"interrupted: {page} and {values} hold what was measured so far", signum=last_signal())


def _samples(
    denoiser: Loaded, data: str | None, prompt: str | None, *, quiet: bool
) -> tuple[Tensor | None, dict[str, Tensor] | None, str]:
    """Clean samples in the model's units, their conditions, and what to tell if the model has to draw them."""
    import torch

    from logsnr.cli import support
    from logsnr.cli.data import data_config, held_out_images, image_shape, say
    from logsnr.denoiser import NetworkDenoiser
    from logsnr.errors import LogsnrError
    from logsnr.pixels import Pixels
    from logsnr.training import load_data

    drawn = support.sampled_condition(denoiser, None, prompt, 256) or None
    if isinstance(denoiser, NetworkDenoiser):
        if data == "none":
            return None, drawn, ""
        try:
            images, _, cond, _ = held_out_images(denoiser, data, None, quiet=quiet)
        except LogsnrError as error:
            if data is not None:
                raise
            return None, drawn, f"no data, so the model draws its own samples ({error}); give --data"
        return denoiser.encode(images), cond, ""
    if data is None or data == "none":
        return None, drawn, ""
    config = data_config(denoiser, data)
    assert config is not None
    loaded = load_data(config, progress=not quiet)
    if loaded.shape != image_shape(denoiser):
        raise LogsnrError(f"{data} holds images of {loaded.shape}, the model makes {image_shape(denoiser)}")
    say(loaded, data, quiet)
    images = torch.cat([loaded.test_images[:2048], loaded.train_images[:2048]])[:2048]
    if drawn is not None and loaded.train_labels is None:
        raise LogsnrError(f"{data} has no labels, which this class-conditional model needs: give --prompt CLASS")
    labels = None
    if drawn is not None and loaded.train_labels is not None and loaded.test_labels is not None:
        labels = {"class_labels": torch.cat([loaded.test_labels, loaded.train_labels])[:2048]}
    boxed = Pixels(loaded.grey_levels).encode(images)  # a pipeline takes stored images for 8-bit ones
    encoded = torch.cat([denoiser.encode(boxed[i : i + 64]) for i in range(0, len(boxed), 64)])
    return encoded, labels, ""
