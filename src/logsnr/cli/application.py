"""The application: what every command shares, and the entry point.

Bad input ends with one clear line on stderr and exit code 2 (guard.py); `--json` puts one JSON object on stdout for
machines; `--quiet` leaves out what nobody asked for.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import logsnr
from logsnr.cli.guard import Stopped, guarded
from logsnr.interrupts import raised
from logsnr.paths import recipe_names
from logsnr.permission import allow_code
from logsnr.terminal import console
from logsnr.zoo import PREFIX, names

ROAD = ("demo", "train", "sample", "generate", "calibrate", "compare", "evaluate", "passport", "export")


class Commands(TyperGroup):
    """The commands; an interruption leaves them as `Stopped`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names: those of the main road in its order, then the others."""
        names = super().list_commands(ctx)
        return [*(name for name in ROAD if name in names), *(name for name in names if name not in ROAD)]

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with raised():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(stop) from stop


app = typer.Typer(
    cls=Commands,
    help="Train, measure and sample diffusion and flow models in one coordinate: the log-SNR.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"logsnr {logsnr.__version__}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars and no notes: the result alone.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    code: Annotated[
        bool,
        typer.Option("--allow-code", help="Run the network (module:Class) that a recipe or a run names."),
    ] = False,
) -> None:
    """What stands before any command, or anywhere in its line (`main` moves it here)."""
    _QUIET.set(quiet)
    if code:
        ctx.with_resource(allow_code())


ANYWHERE = ("--quiet", "--debug", "--allow-code")
"""Options of every command."""
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


def hushed(json_: bool) -> bool:
    """Whether bars and notes are left out: with `--quiet`, and with `--json`."""
    return json_ or _QUIET.get()


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    console(stderr=True, quiet=_QUIET.get()).print(text)


def models(incomplete: str) -> list[str]:
    """Models of the zoo that begin so, for the shell; folders it completes by itself."""
    return [name for name in (f"{PREFIX}{known}" for known in names()) if name.startswith(incomplete)]


def recipe_stems(incomplete: str) -> list[str]:
    """Bundled recipes that begin so, for the shell."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[str, typer.Argument(help="Folder of a run, e.g. runs/digits, or zoo:digits.", autocompletion=models)]
Range = Annotated[
    str | None,
    typer.Option(
        "--range",
        help="First and last noise level: LOW,HIGH, or probe to find where the model is of use [default: all].",
    ),
]
Device = Annotated[
    str, typer.Option(help="Where the network runs: auto (this machine's accelerator, if any), cpu, cuda, cuda:1, mps.")
]
Dtype = Annotated[str, typer.Option(help="Precision of the network alone: fp32, bf16 or fp16; states stay in fp32.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Let torch.compile make the network faster; its first call takes a minute.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.", min=-(2**63), max=2**63 - 1)]


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
    """Entry point of the `logsnr` command."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, rest = sys.argv[1:end], sys.argv[end:]
    first = [word for word in ANYWHERE if word in own]
    args = [*first, *(word for word in own if word not in ANYWHERE), *rest]
    command = partial(app, args, prog_name="logsnr", standalone_mode=False)
    sys.exit(guarded(command, debug="--debug" in first, quiet="--quiet" in first))
