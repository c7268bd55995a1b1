"""`logsnr recipes` and `logsnr zoo`: what comes with the library."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logsnr.cli.application import Json, app
from logsnr.terminal import console

if TYPE_CHECKING:
    from rich.table import Table


def table(*columns: str) -> Table:
    """A table with these columns."""
    from rich.table import Table

    out = Table()
    for name in columns:
        out.add_column(name)
    return out


@app.command()
def recipes(
    reference: Annotated[
        bool, typer.Option("--reference", help="Print the reference of all keys instead, as docs/recipe-reference.md.")
    ] = False,
    json_: Json = False,
) -> None:
    """List the recipes that come with the library, for `logsnr train NAME`.

    Example: logsnr recipes
    """
    from logsnr.cli import support
    from logsnr.paths import recipe_names
    from logsnr.training import load_recipe

    if reference:
        from logsnr.training.reference import reference as page

        sys.stdout.write(page())
        return
    found = {name: load_recipe(name) for name in recipe_names()}
    facts: dict[str, dict[str, Any]] = {
        name: {
            "data": recipe.data.source,
            "objective": recipe.objective.describe(),
            "steps": recipe.steps,
            "max_seconds": recipe.max_seconds,
        }
        for name, recipe in found.items()
    }
    if json_:
        support.print_json(facts)
        return
    out = table("recipe", "data", "objective", "ends after")
    for name, fact in facts.items():
        ends = [f"{fact['steps']:,} steps"] if fact["steps"] else []
        ends += [f"{fact['max_seconds']:g} s"] if fact["max_seconds"] else []
        out.add_row(name, fact["data"], fact["objective"], " or ".join(ends))
    console().print(out)
    print("logsnr train NAME; give data of your own with --set data.source=PATH")


@app.command()
def zoo(json_: Json = False) -> None:
    """List the models that come with the library, for `logsnr sample zoo:NAME`.

    Example: logsnr zoo
    """
    from logsnr.cli import support
    from logsnr.files import CARD, read_card
    from logsnr.loading import load_plans, plans_file
    from logsnr.zoo import PREFIX, folder, names

    facts: dict[str, dict[str, Any]] = {}
    for name in names():
        card = read_card(folder(name), CARD)
        facts[PREFIX + name] = {
            "shape": card["shape"],
            "classes": card["classes"],
            "bytes": card["weights"]["bytes"],
            "plans": sorted(load_plans(PREFIX + name)) if plans_file(PREFIX + name).is_file() else [],
        }
    if json_:
        support.print_json(facts)
        return
    out = table("model", "images", "classes", "weights", "plans of so many evaluations")
    for name, fact in facts.items():
        shape = " x ".join(map(str, fact["shape"]))
        plans = ", ".join(map(str, fact["plans"])) or "none"
        out.add_row(name, shape, str(fact["classes"] or "none"), f"{fact['bytes'] / 1e6:.1f} MB", plans)
    console().print(out)
    print("logsnr sample NAME")
