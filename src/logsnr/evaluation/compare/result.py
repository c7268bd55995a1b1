"""Results: what a comparison measured, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from logsnr.errors import LogsnrError, one_line
from logsnr.evaluation.metrics import Estimated

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entry, measured.

    Attributes:
        name: solver and grid, e.g. "diffusers DPM++(2M), karras".
        solver: the solver alone.
        grid: its levels.
        family: what it is a kind of.
        origin: "logsnr", "diffusers" or "plan".
        budget: network evaluations per image that it was allowed.
        evaluations: those it spent, counted.
        rmse: end-point error against the teacher, with its standard error over samples; None for a sampler that draws
            noise on the way, or whose samples are not finite.
        frechet: FD in the comparison's features; None without features.
        kernel: KID there.
        seconds_per_image: wall time.
        finite: whether every sample is.
        plan_hash: identity of its plan, where it has one.
    """

    name: str
    solver: str
    grid: str
    family: str
    origin: str
    budget: int
    evaluations: int
    rmse: Estimated | None
    frechet: Estimated | None
    kernel: Estimated | None
    seconds_per_image: float
    finite: bool = True
    plan_hash: str | None = None

    @property
    def error(self) -> float:
        """The RMSE, inf where there is none: what rows are sorted by."""
        return math.inf if self.rmse is None else self.rmse.value


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What samples are compared with: the same noise, followed in many steps.

    Attributes:
        name: solver and grid.
        evaluations: network evaluations per image, counted.
        uncertainty: RMSE to it of the same method at half the steps: its own error is below that.
        frechet: FD of its end points; None without features.
        kernel: KID of its end points.
        seconds_per_image: wall time.
    """

    name: str
    evaluations: int
    uncertainty: float
    frechet: Estimated | None
    kernel: Estimated | None
    seconds_per_image: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Samplers from one set of noises.

    Attributes:
        rows: in the order in which they were measured.
        teacher: what they are compared with.
        samples: images per row.
        seed: of the noise, and of the bootstrap.
        sigma_range: (smallest, largest) level of grids.
        features: name of the feature space of FD and KID; None without one.
        reference: images of the data in it.
        machine: kind of machine that the times belong to.
        about: further facts: model, condition, guidance.
    """

    rows: tuple[Row, ...]
    teacher: Teacher
    samples: int
    seed: int
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

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self)
        return {"version": VERSION, **values, "rows": list(values["rows"]), "sigma_range": list(self.sigma_range)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The comparison of `to_dict`'s values, to be rendered again.

        Raises:
            LogsnrError: if the version is another, or the values are no comparison's.
        """
        if values.get("version") != VERSION:
            raise LogsnrError(f"comparison version {values.get('version')!r}: this logsnr reads version {VERSION}")
        try:
            rest = {key: value for key, value in values.items() if key not in ("version", "rows", "teacher")}
            return cls(
                **{**rest, "sigma_range": tuple(values["sigma_range"])},
                rows=tuple(Row(**_measured(row)) for row in values["rows"]),
                teacher=Teacher(**_measured(values["teacher"])),
            )
        except (KeyError, TypeError) as error:
            raise LogsnrError(
                f"these values are no comparison ({one_line(error)}): give a comparison.json of logsnr compare"
            ) from error


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with their estimates rebuilt."""
    return {key: Estimated(**value) if isinstance(value, dict) else value for key, value in values.items()}
