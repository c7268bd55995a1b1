"""`logsnr objective`: what an objective weights, from a name, a recipe or a script's own flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from logsnr.cli.application import Json, app
from logsnr.terminal import console

if TYPE_CHECKING:
    from logsnr.describe import ObjectiveReport


@app.command(context_settings={"ignore_unknown_options": True})
def objective(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="A preset or weighting, a recipe, EDM's or k-diffusion's .json, or a script's own flags."),
    ] = None,
    sigma_data: Annotated[
        float | None, typer.Option("--sigma-data", help="Standard deviation of the data [default: the source's].")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw w, p and the emphasis to a .png file.")] = None,
    json_: Json = False,
) -> None:
    """Say what an objective weights, whether it is an ELBO, and which published one it resembles.

    Example: logsnr objective --snr_gamma 5 --prediction_type v_prediction --plot w.png
    """
    from logsnr.cli import support
    from logsnr.describe import describe, resolve
    from logsnr.describe import plot as draw
    from logsnr.writing import check_output

    plot = None if plot is None else check_output(plot, "--plot")
    report = describe(resolve(words or []), sigma_data=sigma_data)
    if json_:
        support.print_json(report.to_dict())
    else:
        _print_objective(report)
    if plot is not None:
        draw(report, plot)


def _print_objective(report: ObjectiveReport) -> None:
    lo, hi = report.range
    print(f"{report.name}, on log-SNR [{lo:.2f}, {hi:.2f}]")
    table = Table()
    for name in ("log-SNR", "w", "p", "loss below"):
        table.add_column(name, justify="right")
    for level, w, p, below in report.rows():
        table.add_row(f"{level:g}", f"{w:.4g}", "-" if p != p else f"{p:.4g}", f"{below:.1%}")
    console().print(table)
    print(f"drawn: {report.drawn}\n{report.verdict()}")
    print("nearest presets: " + ", ".join(f"{name} {distance:.3f}" for name, distance in report.presets[:4]))
    for note in report.notes:
        print(f"note: {note}")
