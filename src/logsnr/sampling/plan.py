"""Plans: a sampler written down as numbers.

    sigma_0 > sigma_1 > ... > sigma_n,    step i uses  e_bar = sum_j c_ij e_{i-j}    (row i, most recent first)
                                          on the state k_i z, k_i = 1 unless `keep` says otherwise

with e the estimates of one basis: the noise eps, the sample x0, or the velocity eps - x0 of the flow path.  Every
multistep sampler is such a table (DDIM is rows of [1], gradient estimation rows of [gamma, 1 - gamma]), n rows are n
evaluations, and what `sample` does is decided by the plan alone.  A plan holds Python floats: it needs no device,
compares with ==, and is stored as JSON to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from logsnr.errors import LogsnrError, one_line, shown, unknown
from logsnr.paths import expanded
from logsnr.reading import check_format, mapping, parse_json, read_text, reading
from logsnr.writing import replace_file

Basis = Literal["eps", "x0", "velocity"]
BASES: tuple[str, ...] = get_args(Basis)
Grid = tuple[float, ...]
"""n + 1 strictly decreasing noise levels for n evaluations."""

MOST_SIGMA = 1e150
"""Squares of finite levels stay finite."""
VERSION = 1
_KEYS = ("version", "sigmas", "rows", "basis", "sigma_down", "keep", "meta")
_FIX = "give a file written by Plan.save or logsnr calibrate"


@dataclass(frozen=True)
class Plan:
    """Noise levels and multistep coefficients of a sampling run.

    Args:
        sigmas: n + 1 strictly decreasing noise levels; the first may be inf, the last may be 0.
        rows: n rows of coefficients, most recent estimate first; row i has 1 to i + 1 entries.
        basis: what the coefficients combine: `"eps"`, `"x0"` or `"velocity"` (eps - x0, in flow time).
        sigma_down: None for a deterministic plan; else one noise level per step, at most the next sigma, to which
            the step goes before noise brings it back up to the next sigma.
        meta: where the plan comes from (solver, parameters), JSON values; no part of equality or `hash`.
        keep: a factor per step on the state's own weight; None for 1, as every solver has it (files leave it out).

    Raises:
        ValueError: if a field does not fit, naming index and value.
    """

    sigmas: Grid
    rows: tuple[tuple[float, ...], ...]
    basis: Basis = "eps"
    sigma_down: tuple[float, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    keep: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        sigmas = check_sigmas(self.sigmas)
        rows = tuple(tuple(float(c) for c in row) for row in self.rows)
        if self.basis not in BASES:
            raise unknown("basis", self.basis, BASES)
        if len(rows) != len(sigmas) - 1:
            raise ValueError(f"{len(rows)} rows for {len(sigmas)} sigmas: give one row per step, {len(sigmas) - 1}")
        for i, row in enumerate(rows):
            if not 1 <= len(row) <= i + 1:
                raise ValueError(f"rows[{i}] has {len(row)} entries: step {i} can use 1 to {i + 1} estimates")
            if not all(math.isfinite(c) for c in row):
                raise ValueError(f"rows[{i}] = {row}: coefficients must be finite")
        if math.isinf(sigmas[0]) and self.basis == "eps" and rows[0] != (1.0,):
            raise ValueError(
                f"rows[0] = {rows[0]} at sigma = inf: with basis 'eps' the first row must be (1,) there, "
                "since y = z/alpha has no finite step; use basis 'x0' or 'velocity'"
            )
        down = None if self.sigma_down is None else tuple(float(s) for s in self.sigma_down)
        if down is not None:
            if len(down) != len(rows):
                raise ValueError(f"sigma_down has {len(down)} entries: give one per step, {len(rows)}")
            for i, (low, target) in enumerate(zip(down, sigmas[1:], strict=True)):
                if not 0 <= low <= target:
                    raise ValueError(f"sigma_down[{i}] = {low}: must be in [0, sigmas[{i + 1}]] = [0, {target}]")
        keep = None if self.keep is None else tuple(float(k) for k in self.keep)
        if keep is not None:
            if len(keep) != len(rows):
                raise ValueError(f"keep has {len(keep)} entries: give one per step, {len(rows)}")
            if not all(math.isfinite(k) for k in keep):
                raise ValueError(f"keep = {keep}: factors must be finite")
            if math.isinf(sigmas[0]) and keep[0] != 1:
                raise ValueError(f"keep[0] = {keep[0]} at sigma = inf: must be 1 there, where the state is noise alone")
            keep = None if all(k == 1 for k in keep) else keep
        for name, value in (
            ("keep", keep),
            ("sigmas", sigmas),
            ("rows", rows),
            ("sigma_down", down),
            ("meta", dict(self.meta)),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        name = self.meta.get("solver", "custom")
        noise = ", noisy" if self.noisy else ""
        first, last = self.sigmas[0], self.sigmas[-1]
        return f"Plan({self.nfe} evaluations, {name}, sigma {first:.4g} ... {last:.4g}, basis {self.basis}{noise})"

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return len(self.rows)

    @property
    def noisy(self) -> bool:
        """Whether any step draws noise."""
        return self.sigma_down is not None and any(
            low < target for low, target in zip(self.sigma_down, self.sigmas[1:], strict=True)
        )

    def tail(self, k: int) -> Plan:
        """The plan that starts at `sigmas[k]`, as image-to-image does: the history before step k does not exist.

        The first rows keep their leading coefficients, and the weight of each missing estimate goes to the oldest one
        that exists, i.e. the missing estimate is taken equal to its nearest neighbour in time.  Row sums are kept, so
        where the estimate is constant (exact projection) the tail is exact; [gamma, 1 - gamma] becomes [1].

        Raises:
            ValueError: if k is not in [0, nfe - 1].
        """
        if not 0 <= k < self.nfe:
            raise ValueError(f"tail({k}): k must be in [0, {self.nfe - 1}] for a plan of {self.nfe} steps")
        rows = []
        for i, row in enumerate(self.rows[k:]):
            rows.append(row if len(row) <= i + 1 else (*row[:i], math.fsum(row[i:])))
        down = None if self.sigma_down is None else self.sigma_down[k:]
        keep = None if self.keep is None else self.keep[k:]
        meta = self.meta if k == 0 else {**self.meta, "tail": k + int(self.meta.get("tail", 0))}
        return replace(self, sigmas=self.sigmas[k:], rows=tuple(rows), sigma_down=down, keep=keep, meta=meta)

    @property
    def hash(self) -> str:
        """sha256 of the numbers (not of `meta`): the identity of the sampler, in 64 hexadecimal digits."""
        numbers = {key: value for key, value in self.to_dict().items() if key != "meta"}
        return hashlib.sha256(json.dumps(numbers, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON values; floats round-trip to the last bit, inf is the string "inf"."""
        return {
            "version": VERSION,
            "sigmas": ["inf" if math.isinf(s) else s for s in self.sigmas],
            "rows": [list(row) for row in self.rows],
            "basis": self.basis,
            "sigma_down": None if self.sigma_down is None else list(self.sigma_down),
            **({} if self.keep is None else {"keep": list(self.keep)}),
            "meta": dict(self.meta),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan of `to_dict`'s values.

        Raises:
            ValueError: if the version is another, a key is missing or unknown, or a field does not fit.
        """
        check_format(values.get("version"), VERSION, "the plan", _FIX)
        unknown, missing = sorted(map(str, set(values) - set(_KEYS))), sorted({"sigmas", "rows", "basis"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"plan has unknown keys {shown(unknown)} and lacks {missing}: the keys are {', '.join(_KEYS)}"
            )
        down, keep, meta = values.get("sigma_down"), values.get("keep"), values.get("meta") or {}
        if not isinstance(meta, Mapping):
            raise ValueError(f"meta = {shown(meta)}: give a mapping")
        return cls(
            sigmas=_numbers(values["sigmas"], "sigmas"),
            rows=tuple(_numbers(row, f"rows[{i}]") for i, row in enumerate(_list(values["rows"], "rows"))),
            basis=values["basis"],
            sigma_down=None if down is None else _numbers(down, "sigma_down"),
            keep=None if keep is None else _numbers(keep, "keep"),
            meta=meta,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, through a temporary file in the same folder: a reader sees the old plan or the new one."""
        replace_file(path, (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
            LogsnrError: if the file is missing, or no plan of this version.
        """
        with reading(path, _FIX, "a plan"):
            return cls.from_dict(mapping(parse_json(read_text(path)), "the file", _FIX))


def save_plans(plans: Mapping[int, Plan], path: str | os.PathLike[str]) -> None:
    """Write plans of several lengths into one JSON file, which `plans_from` and the diffusers scheduler read."""
    values = {str(nfe): plan.to_dict() for nfe, plan in sorted(plans.items())}
    replace_file(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def plans_from(source: Any, *, paths: bool = True) -> dict[int, Plan]:
    """Plans by their number of evaluations.

    Args:
        source: None; a `Plan`; its JSON text, values or path; a list of these, or a mapping from evaluations to them.
        paths: whether a string may name a file.  Within a file it never does, and in a config that came with a
            pipeline: whoever wrote it would choose what is read here.

    Raises:
        LogsnrError: if a file is missing or damaged.
        ValueError: if it is none of these, a key is not its plan's number of evaluations, or two plans have the same.
    """
    if source is None:
        return {}
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        try:
            source, paths = parse_json(source), False
        except (ValueError, RecursionError) as error:
            raise ValueError(f"plan is not JSON ({one_line(error)}): give Plan.to_dict() as JSON, or a path") from error
    if isinstance(source, str | os.PathLike):
        if not paths:
            raise LogsnrError(
                "the plan holds a text where its numbers should be: a path is opened only where plan= gives it alone"
            )
        path = expanded(source)
        if not path.is_file():
            raise LogsnrError(f"plan {shown(str(source))} is no file: give the path of a saved plan, or its JSON text")
        with reading(path, _FIX, "a plan"):
            return plans_from(parse_json(read_text(path)), paths=False)
    if isinstance(source, Plan):
        return {source.nfe: source}
    if isinstance(source, Mapping):
        if "sigmas" in source or "rows" in source:
            plan = Plan.from_dict(source)
            return {plan.nfe: plan}
        out: dict[int, Plan] = {}
        for key, value in source.items():
            for nfe, plan in plans_from(value, paths=paths).items():
                if str(nfe) != str(key):
                    raise ValueError(f"plan {key!r} has {nfe} evaluations: key each plan by its number of evaluations")
                out[nfe] = plan
        return out
    if isinstance(source, Sequence):
        merged: dict[int, Plan] = {}
        for value in source:
            for nfe, plan in plans_from(value, paths=paths).items():
                if nfe in merged:
                    raise ValueError(f"two plans have {nfe} evaluations: keep one of them")
                merged[nfe] = plan
        return merged
    raise ValueError(f"plan is a {type(source).__name__}: give a Plan, its JSON, a path, or several of them")


def check_sigmas(sigmas: Sequence[float]) -> Grid:
    """The noise levels as a tuple of floats.

    Raises:
        ValueError: unless there are at least two, strictly decreasing, none nan, the last >= 0.
    """
    if isinstance(sigmas, int | float):
        raise ValueError(
            f"{sigmas} is no grid: give noise levels, e.g. grids.log_linear({sigmas:.0f}, sigma_max, sigma_min); for a "
            f"plan of {sigmas:.0f} evaluations nothing else is needed, sample(denoiser, {sigmas:.0f}, ...) knows one"
        )
    grid = tuple(float(s) + 0.0 for s in sigmas)  # + 0.0 turns -0.0 into 0.0
    if len(grid) < 2:
        raise ValueError(f"{len(grid)} sigmas: give at least 2, n + 1 noise levels for n evaluations")
    for i, sigma in enumerate(grid):
        if not (sigma in (0.0, math.inf) or 1 / MOST_SIGMA <= sigma <= MOST_SIGMA):
            raise ValueError(
                f"sigmas[{i}] = {sigma}: noise levels must be in [0, inf], and finite ones in {1 / MOST_SIGMA:g} ... "
                f"{MOST_SIGMA:g}"
            )
        if i and not sigma < grid[i - 1]:
            raise ValueError(
                f"sigmas[{i}] = {sigma} is not below sigmas[{i - 1}] = {grid[i - 1]}: noise levels must strictly "
                "decrease; sort them from noisy to clean and drop repeats"
            )
    return grid


def _list(values: Any, name: str) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} = {shown(values)}: give a list")
    return list(values)


def _numbers(values: Any, name: str) -> tuple[float, ...]:
    out = []
    for value in _list(values, name):
        if value != "inf" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} holds {shown(value)}: give numbers, or the string 'inf'")
        try:
            out.append(float(value))
        except OverflowError:
            raise ValueError(f"{name} holds a number of {len(str(value))} digits: give floats") from None
    return tuple(out)
