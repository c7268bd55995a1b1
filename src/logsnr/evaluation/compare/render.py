"""Rendering: a comparison as a terminal table, a page, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.table import Table

from logsnr.errors import LogsnrError, one_line
from logsnr.evaluation.compare.plot import plot
from logsnr.evaluation.compare.result import Comparison, Measured, Row, merged
from logsnr.evaluation.metrics import Estimated, student
from logsnr.reading import read_json
from logsnr.report import page
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
            out.add_row(_name(comparison, row), *_numbers(comparison, row), style=style)
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


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the comparison as one HTML page: the picture, the best of each family, and every sampler."""
    columns = _columns(comparison)

    def rows(of: Iterable[Row], caption: str) -> page.Html:
        cells = [[_name(comparison, row), *_numbers(comparison, row)] for row in of]
        teacher = [f"teacher: {comparison.teacher.name}", *_teacher_numbers(comparison)]
        return page.table(columns, [*cells, teacher], caption)

    best = [rows(comparison.best(n).values(), f"{n} evaluations: best of each family.") for n in comparison.budgets]
    every = [
        rows(found, f"{n} evaluations: {len(found)} samplers.")
        for n in comparison.budgets
        for found in [comparison.at(n)]
    ]
    facts = [line.removeprefix("- ") for line in _facts(comparison).splitlines()]
    parts = [
        *(page.paragraph(text, kind="note") for text in (*facts[:3], " ".join(facts[3:]))),
        page.heading("Error against evaluations"),
        *_charts(comparison),
        page.heading("The best"),
        *best,
        page.heading("All of them"),
        *every,
    ]
    return page.write_page(path, title(comparison), parts)


def _charts(comparison: Comparison) -> list[page.Html]:
    """The picture, or nothing where it cannot be drawn, which is said."""
    try:
        drawn = plot(comparison, "svg").decode()
    except Exception as error:
        note(f"no picture in the page: {one_line(error)}")
        return []
    told = "Every sampler is a dot; the best families are lines, ours full and diffusers' dashed, named at their ends."
    return [page.chart(drawn[drawn.index("<svg") :], told)]


def write_rows(comparison: Comparison, folder: Path, cells: tuple[int, int] | None = None) -> Path:
    """Write what is known so far, as JSON alone: comparison.json, or of a part of the cells a file of its own."""
    file = folder / ("comparison.json" if cells is None else "cells-{}-of-{}.json".format(*cells))
    replace_file(file, _json(comparison))
    return file


def read(folder: Path) -> Comparison:
    """The comparison of a folder, merged of all that any process has measured; what is newer is taken.

    Raises:
        LogsnrError: if there is none that can be read, or they are of different comparisons.
    """
    there = (file for file in (folder / "comparison.json", *folder.glob("cells-*-of-*.json")) if file.is_file())
    files = sorted(there, key=lambda file: (-file.stat().st_mtime_ns, file.name))
    if not files:
        raise LogsnrError(f"{folder} holds no comparison to go on with (no comparison.json): leave --resume out")
    return merged([Comparison.from_dict(read_json(file, "start it anew without --resume")) for file in files])


def _json(comparison: Comparison) -> bytes:
    return (json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n").encode()


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.json, .md, .html, .svg and .png into a folder; a picture that fails is said and left out.

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
    return [*out, write_page(comparison, folder / "comparison.html")]


def title(comparison: Comparison) -> str:
    """One line that says what was compared."""
    model = comparison.about.get("model", "samplers")
    many = len(comparison.seeds)
    noise = "from the same noise" if many == 1 else f"from the same noise of each of {many} seeds"
    return f"{model}: {comparison.samples} images per sampler, {noise}"


def _caption(comparison: Comparison) -> str:
    """What the columns are of."""
    features = "" if comparison.features is None else f"FD and KID (features: {comparison.features}); "
    return f"teacher: {comparison.teacher.name}; {features}{_seeds(comparison)}; times on {comparison.machine}"


def _seeds(comparison: Comparison) -> str:
    """The seeds, and what the errors beside the numbers are."""
    told = ", ".join(map(str, comparison.seeds))
    if len(comparison.seeds) == 1:
        return f"seed {told}"
    return f"seeds {told}, ± half the 95 % interval of the mean over them (Student's t)"


def _facts(comparison: Comparison) -> str:
    teacher, (low, high) = comparison.teacher, comparison.sigma_range
    features = "no feature space, hence no FD and no KID"
    if comparison.features is not None:
        images = f"{comparison.reference} images of the data" if comparison.reference else "the data"
        features = (
            f"FD and KID (features: {comparison.features}) to {images}; FD less the teacher's with the error of the "
            "difference, from the same noise"
        )
    errors = "± is the standard error over the images, the reference being what it is."
    if len(comparison.seeds) > 1:
        errors = "± is half of the 95 % interval of the mean over seeds (Student's t)."
    lines = [
        f"- Teacher: {teacher.name}, {teacher.evaluations} evaluations; with half the steps it ends "
        f"{teacher.uncertainty:.2g} (RMSE) from there.",
        f"- RMSE is per dimension, in the units of x. {_capital(features)}. {errors}",
        f"- sigma from {high:.4g} to {low:.4g}, then 0. Evaluations are counted on the network: each method takes as "
        "many steps as fit.",
        f"- {_capital(_seeds(comparison).split(', ±')[0])}; times on {comparison.machine}.",
    ]
    lines += [f"- {_capital(key)}: {value}." for key, value in comparison.about.items() if key != "model"]
    return "\n".join(lines)


def _name(comparison: Comparison, row: Row) -> str:
    """A row's name, and of how many of the seeds it is where some are not measured."""
    known, seeds = len(row.cells), len(comparison.seeds)
    return row.name if known == seeds else f"{row.name} ({known} of {seeds} seeds)"


def _columns(comparison: Comparison) -> list[str]:
    distances = [] if comparison.features is None else ["FD", "FD - teacher's", "KID x 1000"]
    return ["sampler", "evaluations", "RMSE to teacher", *distances, "ms per image"]


def _numbers(comparison: Comparison, row: Row) -> list[str]:
    spent = str(row.evaluations) if row.evaluations == row.budget else f"{row.evaluations} of {row.budget}"
    error = _value(row, row.rmse, ".4f") if row.finite else "not finite"
    return [spent, error, *_distances(comparison, row), f"{row.seconds_per_image * 1e3:.2f}"]


def _teacher_numbers(comparison: Comparison) -> list[str]:
    t = comparison.teacher
    return [str(t.evaluations), "0", *_distances(comparison, t), f"{t.seconds_per_image * 1e3:.2f}"]


def _distances(comparison: Comparison, of: Measured) -> list[str]:
    if comparison.features is None:
        return []
    return [_value(of, of.frechet, ".2f"), _value(of, of.excess, "+.2f"), _value(of, of.kernel, ".2f", 1e3)]


def _value(of: Measured, measured: Estimated | None, digits: str, unit: float = 1.0) -> str:
    """A number and its error: over images, or of several seeds half of the interval over them."""
    if measured is None:
        return "-"
    wide = student(len(of.cells) - 1) if len(of.cells) > 1 else 1.0
    return f"{unit * measured.value:{digits}} ± {unit * wide * measured.stderr:{digits.lstrip('+')}}"


def _pipe(comparison: Comparison, rows: Iterable[Row]) -> str:
    columns = _columns(comparison)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[_name(comparison, row), *_numbers(comparison, row)] for row in rows]
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
