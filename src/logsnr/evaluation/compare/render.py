"""Rendering: a comparison as a terminal table, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.table import Table

from logsnr.errors import LogsnrError, one_line
from logsnr.evaluation.compare.plot import plot
from logsnr.evaluation.compare.result import Comparison, Row
from logsnr.evaluation.metrics import Estimated
from logsnr.reading import read_json
from logsnr.terminal import note
from logsnr.writing import replace_file


def table(comparison: Comparison, *, everything: bool = False) -> Table:
    """Rows for a terminal, best first; of each solver the best grid alone, unless everything is asked for."""
    out = Table(title=title(comparison), title_justify="left", caption=_caption(comparison), caption_justify="left")
    for i, name in enumerate(_columns(comparison)):
        out.add_column(name, justify="right" if i else "left", no_wrap=not i, min_width=None if i else 24)
    for budget in comparison.budgets:
        rows = comparison.at(budget)
        for row in rows if everything else _one_grid(rows):
            style = "bold" if row.origin == "plan" else None
            out.add_row(row.name, *_numbers(comparison, row), style=style)
        out.add_section()
    out.add_row("teacher", *_teacher_numbers(comparison), style="dim")
    return out


def markdown(comparison: Comparison) -> str:
    """The whole comparison as a Markdown page."""
    parts = [f"# {title(comparison)}", _facts(comparison)]
    for budget in comparison.budgets:
        best = comparison.best(budget)
        parts.append(f"## {budget} evaluations")
        parts.append("Best of each family:")
        parts.append(_pipe(comparison, best.values()))
    parts.append("## All of them")
    for budget in comparison.budgets:
        rows = comparison.at(budget)
        parts.append(f"### {budget} evaluations: {len(rows)} samplers")
        parts.append(_pipe(comparison, rows))
    return "\n\n".join(parts) + "\n"


def write_rows(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json alone, as it is known so far."""
    replace_file(folder / "comparison.json", _json(comparison))


def read(folder: Path) -> Comparison:
    """The comparison of a folder.

    Raises:
        LogsnrError: if there is none that can be read.
    """
    file = folder / "comparison.json"
    if not file.is_file():
        raise LogsnrError(f"{folder} holds no comparison to go on with (no {file.name}): leave --resume out")
    return Comparison.from_dict(read_json(file, "start it anew without --resume"))


def _json(comparison: Comparison) -> bytes:
    return (json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n").encode()


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.json, .md, .svg and .png into a folder; a picture that fails is said and left out.

    Returns:
        The files.

    Raises:
        OSError: from the file system.
    """
    contents: dict[str, Callable[[], bytes]] = {
        "json": lambda: _json(comparison),
        "md": lambda: (markdown(comparison).rstrip() + "\n\n![error against evaluations](comparison.png)\n").encode(),
        "svg": lambda: plot(comparison, "svg"),
        "png": lambda: plot(comparison, "png"),
    }
    out = []
    for suffix, made in contents.items():
        file = folder / f"comparison.{suffix}"
        try:
            replace_file(file, made())
        except Exception as error:
            if suffix in ("json", "md"):
                raise
            note(f"no picture {file.name}: {one_line(error)}")
        else:
            out.append(file)
    return out


def title(comparison: Comparison) -> str:
    """One line that says what was compared."""
    model = comparison.about.get("model", "samplers")
    return f"{model}: {comparison.samples} images per sampler, from the same noise"


def _caption(comparison: Comparison) -> str:
    """What the columns are of."""
    features = "" if comparison.features is None else f"FD and KID (features: {comparison.features}); "
    return f"teacher: {comparison.teacher.name}; {features}seed {comparison.seed}; times on {comparison.machine}"


def _facts(comparison: Comparison) -> str:
    teacher, (low, high) = comparison.teacher, comparison.sigma_range
    features = "no feature space, hence no FD and no KID"
    if comparison.features is not None:
        features = f"FD and KID (features: {comparison.features}) to {comparison.reference} images of the data"
    lines = [
        f"- Teacher: {teacher.name}, {teacher.evaluations} evaluations; with half the steps it ends "
        f"{teacher.uncertainty:.2g} (RMSE) from there.",
        f"- RMSE is per dimension, in the units of x, with its standard error over samples. {_capital(features)}; "
        "standard errors from a bootstrap over the images, the reference fixed.",
        f"- sigma from {high:.4g} to {low:.4g}, then 0. Evaluations are counted on the network: each method takes as "
        "many steps as fit.",
        f"- Seed {comparison.seed}; times on {comparison.machine}.",
    ]
    lines += [f"- {_capital(key)}: {value}." for key, value in comparison.about.items() if key != "model"]
    return "\n".join(lines)


def _columns(comparison: Comparison) -> list[str]:
    distances = [] if comparison.features is None else ["FD", "KID x 1000"]
    return ["sampler", "evaluations", "RMSE to teacher", *distances, "ms per image"]


def _numbers(comparison: Comparison, row: Row) -> list[str]:
    spent = str(row.evaluations) if row.evaluations == row.budget else f"{row.evaluations} of {row.budget}"
    error = _value(row.rmse, ".4f") if row.finite else "not finite"
    distances = [] if comparison.features is None else [_value(row.frechet, ".2f"), _value(row.kernel, ".2f", 1e3)]
    return [spent, error, *distances, f"{row.seconds_per_image * 1e3:.2f}"]


def _teacher_numbers(comparison: Comparison) -> list[str]:
    t = comparison.teacher
    distances = [] if comparison.features is None else [_value(t.frechet, ".2f"), _value(t.kernel, ".2f", 1e3)]
    return [str(t.evaluations), "0", *distances, f"{t.seconds_per_image * 1e3:.2f}"]


def _value(measured: Estimated | None, digits: str, unit: float = 1.0) -> str:
    if measured is None:
        return "-"
    return f"{unit * measured.value:{digits}} ± {unit * measured.stderr:{digits}}"


def _pipe(comparison: Comparison, rows: Iterable[Row]) -> str:
    columns = _columns(comparison)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[row.name, *_numbers(comparison, row)] for row in rows]
    lines.append([f"teacher: {comparison.teacher.name}", *_teacher_numbers(comparison)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _one_grid(rows: Iterable[Row]) -> list[Row]:
    """The first, i.e. best, row of every solver of every origin."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        found.setdefault((row.origin, row.solver), row)
    return list(found.values())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
