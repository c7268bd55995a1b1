"""The application: what every command shares, and the entry point.

Bad input ends with one clear line on stderr and exit code 2; `--json` puts one JSON object on stdout for machines.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import logsnr
from logsnr.errors import one_line

app = typer.Typer(
    help="Train, measure and sample diffusion and flow models in one coordinate: the log-SNR.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"logsnr {logsnr.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    """What stands before any command."""


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[str, typer.Argument(help="Folder of a run, e.g. runs/digits, or zoo:digits.")]
Range = Annotated[
    str | None,
    typer.Option(
        "--range",
        help="First and last noise level: LOW,HIGH, or probe to find where the model is of use [default: all].",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]


class Named(TyperCommand):
    """A command whose help names members of registries: they are looked up when help is asked for, as they import
    torch."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, names filled in."""
        from logsnr.cli.support import known_names

        names = known_names()
        for option in self.params:
            if "{" in (getattr(option, "help", None) or ""):
                vars(option)["help"] = vars(option)["help"].format(**names)
        super().format_help(ctx, formatter)


def main() -> None:
    """Entry point of the `logsnr` command: bad input is one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"logsnr: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
