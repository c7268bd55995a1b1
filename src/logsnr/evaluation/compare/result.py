"""Results: what a comparison measured, as plain values.

A cell is one sampler at one seed; a row is a sampler with its cells, and its numbers are their means.  Cells are
measured one by one, by any number of processes: comparisons of one model, noise and data are merged cell by cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from logsnr.errors import LogsnrError, one_line
from logsnr.evaluation.metrics import Estimated, summarise

VERSION = 2
Key = tuple[str, int, str | None]
"""What tells a row from another: name, budget and the plan's hash."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One sampler at one seed; errors are over its samples.

    Attributes:
        seed: of the noise.
        evaluations: network evaluations per image, counted.
        rmse: end-point error against the teacher; None for a sampler that draws noise on the way, or whose samples are
            not finite.  Of the teacher itself: RMSE to it of the same method at half the steps.
        frechet: FD in the comparison's features; None without features.
        excess: FD less the teacher's, of the same noise, with the error of the difference.
        kernel: KID there; None where the reference has no rows.
        seconds_per_image: wall time.
        finite: whether every sample is.
    """

    seed: int
    evaluations: int
    rmse: Estimated | None
    frechet: Estimated | None = None
    excess: Estimated | None = None
    kernel: Estimated | None = None
    seconds_per_image: float
    finite: bool = True


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What has cells: its numbers are their means, and of several seeds the errors are those of the means over seeds.

    Attributes:
        name: of a row solver and grid, e.g. "diffusers DPM++(2M), karras"; of the teacher solver, grid and steps.
        cells: one for each seed, at least one.
    """

    name: str
    cells: tuple[Cell, ...]

    @property
    def evaluations(self) -> int:
        """Network evaluations per image, counted."""
        return self.cells[0].evaluations

    @property
    def rmse(self) -> Estimated | None:
        """End-point error against the teacher."""
        return self._over_seeds("rmse")

    @property
    def frechet(self) -> Estimated | None:
        """FD in the comparison's features."""
        return self._over_seeds("frechet")

    @property
    def excess(self) -> Estimated | None:
        """FD less the teacher's."""
        return self._over_seeds("excess")

    @property
    def kernel(self) -> Estimated | None:
        """KID in the comparison's features."""
        return self._over_seeds("kernel")

    @property
    def seconds_per_image(self) -> float:
        """Wall time."""
        return math.fsum(cell.seconds_per_image for cell in self.cells) / len(self.cells)

    @property
    def finite(self) -> bool:
        """Whether every sample of every seed is."""
        return all(cell.finite for cell in self.cells)

    def _over_seeds(self, name: str) -> Estimated | None:
        found: list[Estimated | None] = [getattr(cell, name) for cell in self.cells]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        return known[0] if len(known) == 1 else summarise([one.value for one in known]).estimated

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the means stand beside the cells for whoever reads the file."""
        numbers = ("rmse", "frechet", "excess", "kernel")
        means = {name: None if (one := getattr(self, name)) is None else asdict(one) for name in numbers}
        return {
            **{key: value for key, value in asdict(self).items() if key != "cells"},
            "evaluations": self.evaluations,
            **means,
            "seconds_per_image": self.seconds_per_image,
            "finite": self.finite,
            "cells": [asdict(cell) for cell in self.cells],
        }


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One entry, measured.

    Attributes:
        solver: the solver alone.
        grid: its levels.
        family: what it is a kind of.
        origin: "logsnr", "diffusers" or "plan".
        budget: network evaluations per image that it was allowed.
        plan_hash: identity of its plan, where it has one.
    """

    solver: str
    grid: str
    family: str
    origin: str
    budget: int
    plan_hash: str | None = None

    @property
    def key(self) -> Key:
        """What tells it from other rows."""
        return self.name, self.budget, self.plan_hash

    @property
    def error(self) -> float:
        """The RMSE, inf where there is none: what rows are sorted by."""
        return math.inf if self.rmse is None else self.rmse.value


@dataclass(frozen=True, kw_only=True)
class Teacher(Measured):
    """What samples are compared with: the same noise, followed in many steps."""

    @property
    def uncertainty(self) -> float:
        """RMSE to it of the same method at half the steps: its own error is below that."""
        return math.nan if self.rmse is None else self.rmse.value


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Samplers from one set of noises, or from one for each seed.

    Attributes:
        rows: in the order of the entries.
        teacher: what they are compared with.
        samples: images per row and seed.
        seeds: of the noise.
        sigma_range: (smallest, largest) level of grids.
        features: name of the feature space of FD and KID; None without one.
        reference: images of the data in it; 0 where nobody knows.
        machine: kind of machine that the times belong to.
        about: further facts: model, condition, guidance.
    """

    rows: tuple[Row, ...]
    teacher: Teacher
    samples: int
    seeds: tuple[int, ...]
    sigma_range: tuple[float, float]
    features: str | None
    reference: int
    machine: str
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Numbers of evaluations that were compared, in increasing order."""
        return tuple(sorted({row.budget for row in self.rows}))

    def at(self, budget: int) -> list[Row]:
        """The rows of one budget, best RMSE first."""
        return sorted((row for row in self.rows if row.budget == budget), key=lambda row: row.error)

    def best(self, budget: int, by: str = "rmse") -> dict[tuple[str, str], Row]:
        """The best row of each (family, origin) at a budget, best first.

        Args:
            budget: number of evaluations.
            by: "rmse" or "frechet".
        """
        found: dict[tuple[str, str], Row] = {}
        rows = [row for row in self.at(budget) if getattr(row, by) is not None]
        for row in sorted(rows, key=lambda row: float(getattr(row, by).value)):
            found.setdefault((row.family, row.origin), row)
        return found

    @property
    def known(self) -> dict[tuple[Key, int], Cell]:
        """Every cell of the rows, by what it is of."""
        return {(row.key, cell.seed): cell for row in self.rows for cell in row.cells}

    def check_like(self, before: Comparison) -> None:
        """Refuse to go on with another comparison.

        Raises:
            LogsnrError: if it is not of the same noise, teacher, features and facts.
        """
        mine, theirs = (
            {key: value for key, value in one.about.items() if key != "interrupted"} for one in (self, before)
        )
        pairs = {
            "images": (before.samples, self.samples),
            "seeds": (_told(before.seeds), _told(self.seeds[: len(before.seeds)])),
            "noise levels": (tuple(before.sigma_range), tuple(self.sigma_range)),
            "features": ((before.features, before.reference), (self.features, self.reference)),
            "teacher": (before.teacher.name, self.teacher.name),
            **{key: (theirs.get(key), mine.get(key)) for key in sorted({*theirs, *mine})},
        }
        for what, (then, this) in pairs.items():
            if then != this:
                raise LogsnrError(
                    f"this comparison has {what} {this}, that to go on with {then}: give the same options, or a new "
                    "folder"
                )
        ends = {cell.seed: cell for cell in before.teacher.cells}
        for cell in self.teacher.cells:
            if (there := ends.get(cell.seed)) is None:
                continue
            for then, this, what in (
                (there.rmse, cell.rmse, "ends elsewhere than in the comparison to go on with: the model is"),
                (there.frechet, cell.frechet, "has another FD than in the comparison to go on with: the data are"),
            ):
                if then is not None and this is not None and not math.isclose(then.value, this.value, rel_tol=0.01):
                    raise LogsnrError(f"the teacher {what} another; give the same options, or a new folder")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {**asdict(replace(self, rows=())), "teacher": self.teacher.to_dict()}
        rows = [row.to_dict() for row in self.rows]
        lists = {name: list(values[name]) for name in ("seeds", "sigma_range")}
        return {"version": VERSION, **values, **lists, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The comparison of `to_dict`'s values; those of version 1, of one seed and bootstrapped errors, are read too.

        Raises:
            LogsnrError: if the version is another, or the values are no comparison's.
        """
        if values.get("version") not in (1, VERSION):
            raise LogsnrError(
                f"comparison version {values.get('version')!r}: this logsnr reads versions 1 and {VERSION}"
            )
        try:
            values = _with_cells(values) if values["version"] == 1 else values
            rest = {key: value for key, value in values.items() if key not in ("version", "rows", "teacher")}
            return cls(
                **{**rest, "sigma_range": tuple(values["sigma_range"]), "seeds": tuple(values["seeds"])},
                rows=tuple(Row(**_fields(row)) for row in values["rows"]),
                teacher=Teacher(**_fields(values["teacher"])),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise LogsnrError(
                f"these values are no comparison ({one_line(error)}): give a comparison.json of logsnr compare"
            ) from error


def merged(parts: Sequence[Comparison]) -> Comparison:
    """The cells of several comparisons, of different samplers or seeds, in one; the first that has a cell says it.

    Raises:
        LogsnrError: as `Comparison.check_like`.
        ValueError: of none.
    """
    if not parts:
        raise ValueError("nothing to merge: give at least one comparison")
    if len(parts) == 1:
        return parts[0]
    longest = max(parts, key=lambda one: len(one.seeds))
    rows: dict[Key, Row] = {}
    teacher = longest.teacher
    for part in parts:
        longest.check_like(part)
        teacher = replace(teacher, cells=_joined(teacher.cells, part.teacher.cells))
        for row in part.rows:
            there = rows.setdefault(row.key, row)
            rows[row.key] = replace(there, cells=_joined(there.cells, row.cells))
    about = {key: value for key, value in longest.about.items() if key != "interrupted"}
    return replace(longest, rows=tuple(rows.values()), teacher=teacher, about=about)


def _joined(cells: Sequence[Cell], more: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells of both, one for each seed, in their order."""
    by = {cell.seed: cell for cell in (*more, *cells)}
    return tuple(by[seed] for seed in sorted(by))


def _told(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


_MEANS = ("evaluations", "rmse", "frechet", "excess", "kernel", "seconds_per_image", "finite")


def _with_cells(values: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1, of one seed, with rows and teacher as cells."""
    seed, found = values["seed"], {key: value for key, value in values.items() if key != "seed"}

    def one(row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, "cells": [{"seed": seed, **{key: row[key] for key in _MEANS if key in row}}]}

    teacher = {key: value for key, value in values["teacher"].items() if key != "uncertainty"}
    teacher |= {"rmse": {"value": values["teacher"]["uncertainty"], "stderr": 0.0}}
    return {**found, "seeds": [seed], "rows": [one(row) for row in values["rows"]], "teacher": one(teacher)}


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a row or the teacher, without what the cells say, and with these rebuilt."""

    def cell(found: Mapping[str, Any]) -> Cell:
        rebuilt: dict[str, Any] = {
            key: Estimated(**value) if isinstance(value, dict) else value for key, value in found.items()
        }
        return Cell(**rebuilt)

    cells = tuple(map(cell, values["cells"]))
    if not cells:
        raise KeyError("cells")
    return {**{key: value for key, value in values.items() if key not in _MEANS}, "cells": cells}
