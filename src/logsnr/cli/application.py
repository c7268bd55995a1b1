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

WANTED = {
    "To try it": {
        "demo": "train on real digits, measure, sample, report: a minute or two",
        "zoo": "models that come along",
        "recipes": "trainings that come along",
    },
    "Images in few steps": {
        "sample": "images of a run, of the zoo, or of a diffusers pipeline",
        "generate": "any number of images, by any number of processes",
        "calibrate": "find a model's own few-step plan",
        "export": "a run as a stock diffusers pipeline",
    },
    "A model of your own": {
        "data": "make images ready for training",
        "encode": "images into latents, to train on",
        "train": "train by a recipe, or go on",
        "objective": "what a loss, or a script's flags, weighs",
    },
    "Measured": {
        "evaluate": "bits per dimension; samples against data",
        "stats": "keep what samples are measured against",
        "compare": "every sampler, from the same noise",
        "passport": "one page about a model: its range, its faults, its steps",
        "probe": "between which noise levels it is of use",
        "information": "at which noise levels the bits of images lie",
    },
}
"""Commands by what one wants to do, each in a few words."""
BEGIN = """  logsnr sample zoo:digits --nfe 5 -n 64 --out samples.png
  logsnr calibrate owner/name --prompts prompts.txt --nfe 5,8 --out plans.json
  logsnr train digits --out runs/digits"""


class Commands(TyperGroup):
    """The commands; an interruption leaves them as `Stopped`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of `WANTED`."""
        names, road = super().list_commands(ctx), [name for group in WANTED.values() for name in group]
        return [*(name for name in road if name in names), *(name for name in names if name not in road)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands by what one wants to do, and where to begin."""
        known = dict.fromkeys(self.list_commands(ctx))
        grouped = {title: {name: text for name, text in of.items() if name in known} for title, of in WANTED.items()}
        told = {name for of in grouped.values() for name in of}
        grouped["More"] = {name: self.commands[name].get_short_help_str(60) for name in known if name not in told}
        for title, of in grouped.items():
            if of:
                with formatter.section(title):
                    formatter.write_dl(list(of.items()))
        with formatter.section("Begin with"):
            formatter.write(f"{BEGIN}\n")
        formatter.write("\nEach has examples in its --help, and --json for machines.\n")

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
Limit = Annotated[int | None, typer.Option(help="Use only the first images.", min=1)]
NoisyEnd = Annotated[float | None, typer.Option("--logsnr-min", help="Noisy end of the bound's range.")]
CleanEnd = Annotated[float | None, typer.Option("--logsnr-max", help="Clean end of the bound's range.")]
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
