"""The table of adaptive_schedule.py: what its runs say, as numbers, as Markdown, and as verdicts.

ratio       step from which a curve stays at or below the fixed-cosine run's final loss, over that run's steps, seed by
            seed; "never" if it does not end there
best fixed  the fixed density of least mean final loss, chosen in hindsight; its spread is the standard deviation of its
            final loss over seeds.  An adaptive density is worse if its mean final loss exceeds the two together.
between     variance of the loss between noise levels, over the mean loss squared, on the run's final network under its
            final density; for a verdict over the least that a fixed density has on the same network
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logsnr.files import replace_file
from logsnr.schedules import Cosine, EDMTraining, Linear, Schedule

LO, HI, LEVELS = -10.0, 13.0, 46
FIXED: dict[str, Schedule] = {
    "cosine": Cosine().truncate(LO, HI),
    "edm": EDMTraining().truncate(LO, HI),
    "uniform": Linear(LO, HI),
}
ADAPTIVE = ("adaptive-error", "adaptive-gradient", "adaptive-gradient-true")
SCHEDULES = (*FIXED, *ADAPTIVE)
ORDER = ("elbo", "sech", "sigmoid", "edm-monotonic")
GOALS = {"elbo": 0.5, "sech": 0.8}
"""Largest median ratio that issue and spike promise; the other weightings are reported."""
BETWEEN = 0.1
"""Largest share of the best fixed density's variance between levels, for p ~ w E."""

Runs = Mapping[tuple[str, str, int], Mapping[str, Any]]
"""(weighting, schedule, seed) -> what the run wrote."""


def default_of(weighting: str) -> str:
    """What a recipe's `adaptive: true` takes for a weighting."""
    return "adaptive-gradient-true" if weighting == "elbo" else "adaptive-error"


def runs_in(folder: Path) -> Runs:
    """The runs of one data set."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(run["weighting"], run["schedule"], run["seed"]): run for run in found if "curve" in run}


def steps_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """The step from which the curve stays at or below `target`; inf if it does not end there."""
    if curve[-1][1] > target:
        return math.inf
    above = [i for i, (_, loss) in enumerate(curve) if loss > target]
    if not above:
        return float(curve[0][0])
    (s0, l0), (s1, l1) = curve[above[-1]], curve[above[-1] + 1]
    return s0 + (s1 - s0) * (l0 - target) / (l0 - l1)


def judged(run: Mapping[str, Any], mass: Sequence[float]) -> tuple[float, float, float]:
    """(between, within, gradient excess) of a density's cell masses on a run's final network."""
    dl = (HI - LO) / LEVELS
    p = np.maximum(np.array(mass) / dl, 1e-300)
    mean, square, gradient = (np.array(run[key]) for key in ("mean", "square", "gradient"))
    unit = (mean.sum() * dl) ** 2
    between = (mean**2 / p).sum() * dl / unit - 1
    within = ((square - mean**2) / p).sum() * dl / unit
    excess = (gradient / p).sum() * dl / (np.sqrt(gradient).sum() * dl) ** 2
    return float(between), float(within), float(excess)


def row_of(runs: Runs, weighting: str, name: str) -> dict[str, Any]:
    """One line of the table: a density's runs of a weighting."""
    mine = {seed: run for (w, s, seed), run in sorted(runs.items()) if (w, s) == (weighting, name)}
    ratios: dict[int, float] = {}
    for seed, run in mine.items():
        cosine = runs.get((weighting, "cosine", seed))
        if cosine:
            ratios[seed] = steps_to(run["curve"], cosine["curve"][-1][1]) / cosine["curve"][-1][0]
    last = {seed: run["curve"][-1][1] for seed, run in mine.items()}
    edges = torch.linspace(LO, HI, LEVELS + 1, dtype=torch.float64)
    fixed = [s.mass(edges).tolist() for s in FIXED.values()]
    split = [judged(run, run["mass"]) for run in mine.values()]
    over = [own[0] / min(judged(run, mass)[0] for mass in fixed) for run, own in zip(mine.values(), split, strict=True)]
    return {
        "ratios": ratios,
        "median_ratio": statistics.median(ratios.values()) if ratios else math.nan,
        "final": last,
        "mean_final": statistics.mean(last.values()),
        "spread": statistics.stdev(last.values()) if len(last) > 1 else math.nan,
        "steps": max(run["curve"][-1][0] for run in mine.values()),
        "between": statistics.mean(part[0] for part in split),
        "within": statistics.mean(part[1] for part in split),
        "gradient_excess": statistics.mean(part[2] for part in split),
        "between_over_best_fixed": max(over),
    }


def summary(runs: Runs) -> dict[str, dict[str, Any]]:
    """Rows and verdicts of every weighting."""
    out: dict[str, dict[str, Any]] = {}
    for weighting in sorted({w for w, _, _ in runs}, key=lambda w: (w not in ORDER, (*ORDER, w).index(w))):
        names = {s for w, s, _ in runs if w == weighting}
        rows = {name: row_of(runs, weighting, name) for name in SCHEDULES if name in names}
        out[weighting] = {"rows": rows, "verdicts": verdicts(weighting, rows)}
    return out


def verdicts(weighting: str, rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the issue asks of a weighting; `met` is None where nothing was promised or runs are missing."""
    out = []
    default = default_of(weighting)
    if default in rows and "cosine" in rows:
        median, goal = rows[default]["median_ratio"], GOALS.get(weighting)
        asked = "reported, no goal" if goal is None else f"goal {goal}"
        out.append(_verdict(f"{default} (the default): median ratio {_ratio(median)} ({asked})", None if goal is None
                            else median <= goal))  # fmt: skip
    fixed = {name: row for name, row in rows.items() if name in FIXED}
    complete = len(fixed) == len(FIXED)
    for name in ADAPTIVE if fixed else ():
        if name not in rows:
            continue
        best = min(fixed, key=lambda s: fixed[s]["mean_final"])
        gap, spread = rows[name]["mean_final"] - fixed[best]["mean_final"], fixed[best]["spread"]
        those = "" if complete else f" of {', '.join(fixed)} alone"
        text = f"{name}: mean final loss {gap:+.5f} from the best fixed density's ({best}{those}), whose spread is "
        known = complete and not math.isnan(spread)
        out.append(_verdict(text + (f"{spread:.5f}" if not math.isnan(spread) else "unknown from one seed"),
                            gap <= spread if known else None))  # fmt: skip
    for name in ADAPTIVE:
        if name in rows:
            over = rows[name]["between_over_best_fixed"]
            goal = f" (goal {BETWEEN})" if name == "adaptive-error" else ""
            text = f"{name}: variance between levels {over:.4f} of the best fixed density's, at worst{goal}"
            out.append(_verdict(text, over <= BETWEEN if goal else None))
    return out


def _verdict(text: str, met: bool | None) -> dict[str, Any]:
    return {"text": text, "met": met}


def markdown(name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables and verdicts of one data set."""
    lines = []
    for weighting, part in found.items():
        steps = max(row["steps"] for row in part["rows"].values())
        lines += [
            f"## {name}, {weighting}, {steps} steps",
            "",
            "| density | ratio, seed by seed | median | final loss | spread | between | within | gradient excess |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for schedule, row in part["rows"].items():
            ratios = " ".join(_ratio(r) for r in row["ratios"].values()) or "-"
            spread = "-" if math.isnan(row["spread"]) else f"{row['spread']:.5f}"
            lines.append(
                f"| {schedule} | {ratios} | {_ratio(row['median_ratio'])} | {row['mean_final']:.5f} | {spread} | "
                f"{row['between']:.3f} | {row['within']:.3f} | {row['gradient_excess']:.3f} |"
            )
        words = {None: "", True: ": met", False: ": NOT met"}
        lines += ["", *(f"- {v['text']}{words[v['met']]}" for v in part["verdicts"]), ""]
    return "\n".join(lines)


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.3f}"


def write(folder: Path, found: Mapping[str, Mapping[str, Any]], command: str) -> None:
    """adaptive-schedule.md and .json of all data sets."""
    head = [
        "# The adaptive schedule: steps to what a fixed cosine density reaches",
        "",
        "Paired seeds: equal initial weights, images, noise and quantiles, one learning rate and average; only the "
        "density of noise levels differs. Held-out loss on one fixed lattice, nats per dimension. A ratio is the step "
        "from which a run stays at or below the cosine run's final loss, over that run's steps. between, within: "
        "variance of the loss on the final network over the mean squared; gradient excess: second moment of the "
        "gradient over the least that a density can reach.",
        "",
        f"`{command}`",
        "",
    ]
    body = [markdown(name, part) for name, part in found.items()]
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "adaptive-schedule.md", ("\n".join([*head, *body]).rstrip() + "\n").encode())
    facts = json.dumps(_plain(found), indent=1, allow_nan=False)
    replace_file(folder / "adaptive-schedule.json", (facts + "\n").encode())


def _plain(value: Any) -> Any:
    """For JSON: null for what is not finite ("never", or not known)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
