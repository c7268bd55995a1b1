"""gamma from the errors against gamma from the end points, for gradient estimation on the log-linear grid.

    python benchmarks/gammas.py                                              an exact mixture
    python benchmarks/gammas.py mixture runs/digits --nfe 6,10               and the model of a run
    python benchmarks/gammas.py runs/fashion --fit 48 --report 96            fewer noises, for a slow one

Every step but the first (DDIM) and the last (plain denoise) uses e_bar = gamma eps_i + (1 - gamma) eps_{i-1}, and

    gamma*        minimises E||e_bar - (y_i - x)/sigma_i||^2, x the teacher's end point: the W-norm with W the inverse
                  covariance of the two errors (2306.04848, sec. 5), step after step on the states that it visits itself
    along DDIM    the same on the states that DDIM visits
    tracking      minimises E||y_{i+1} - teacher's y_{i+1}||^2, step after step on its own states
    constant      one gamma for all steps, of least end-point error
    calibrated    one gamma per step, of least end-point error: calibration's Gauss-Newton on fixed levels

gammas are fitted to --fit noises; RMSE is the end points' on --report other ones, against a teacher of the same noise.
Results are kept in gammas.json of --out by model and number of evaluations, and put between the marks of gammas.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from few_step import model, noises
from torch import Tensor

from logsnr.calibration.descent import Space, descend, normal_equations
from logsnr.calibration.rollout import Noises, Rollout, squares
from logsnr.calibration.teacher import remember, taught
from logsnr.denoiser import Denoiser
from logsnr.evaluation.gamma import StepCovariance, error_covariance
from logsnr.files import replace_file
from logsnr.noise import alpha_s
from logsnr.sampling import Plan, grids, solvers
from logsnr.sampling.loop import updates
from logsnr.sampling.plan import Grid
from logsnr.sampling.teacher import teacher_plan

LONGEST = 10
"""Evaluations up to which the page shows every gamma; the rest is in the JSON."""

MARKS = ("<!-- tables -->", "<!-- end of tables -->")
METHODS = {
    "ddim": "DDIM",
    "ge2": "GE(2)",
    "constant": "best constant",
    "star": "gamma*",
    "star_ddim": "gamma* along DDIM",
    "tracking": "tracking",
    "calibrated": "calibrated",
}


@dataclass(frozen=True, kw_only=True)
class Gammas(Space):
    """Gradient estimation on the template's levels: the parameters are the gammas of steps 1 ... n - 2."""

    @property
    def n(self) -> int:
        """No level is searched."""
        return 0

    def vector(self, plan: Plan) -> Tensor:
        return torch.tensor([row[0] for row in plan.rows[1:-1]], dtype=torch.float64)

    def plan(self, p: Tensor) -> Plan:
        return solvers.ge(self.template.sigmas, p.tolist())

    def owners(self) -> list[int]:
        return list(range(1, self.template.nfe - 1))


Wanted = Callable[[int, slice, Tensor], Tensor]
"""(step, samples, y) -> the eps that e_bar should be."""


def greedy(
    denoiser: Denoiser, sigmas: Grid, noises: Noises, chunk: int, wanted: Wanted
) -> tuple[list[float], list[float]]:
    """gamma of least E||e_bar - wanted||^2 step after step, on the states the earlier ones lead to; standard errors."""
    n, gammas, errors = len(sigmas) - 1, [], []
    parts = [slice(i, i + chunk) for i in range(0, len(noises), chunk)]
    runs = [Rollout(denoiser, "eps", part) for part in noises.chunks(chunk)]
    for i, sigma in enumerate(sigmas[:-1]):
        for run in runs:
            run.evaluate(sigma)
        if 0 < i < n - 1:
            found = []
            for part, run in zip(parts, runs, strict=True):
                target = wanted(i, part, run.states[i].double() / alpha_s(sigma)[0])
                now, then = ((value.double() - target).flatten(1) for value in (run.values[i], run.values[i - 1]))
                found.append(torch.stack([now * now, then * then, now * then]).mean(2))
            moments = torch.cat(found, 1).cpu()
            present, previous, cross = moments
            gamma = StepCovariance(
                sigma=sigma, present=float(present.mean()), previous=float(previous.mean()), cross=float(cross.mean())
            ).gamma
            # a ratio of means: the delta method
            above, below = previous - cross, present - 2 * cross + previous
            errors.append(float((above - gamma * below).std() / math.sqrt(len(above)) / below.mean()))
            gammas.append(gamma)
        step = updates(solvers.ge(sigmas, [*gammas, *[1.0] * (n - 2 - len(gammas))]))[i]
        for run in runs:
            run.advance(step)
    return gammas, errors


def best_constant(loss: Callable[[float], float]) -> float:
    """The minimiser on [1, 4] by scan and golden section, to .01."""
    scan = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
    values = [loss(g) for g in scan]
    k = min(range(len(scan)), key=values.__getitem__)
    low, high = scan[max(k - 1, 0)], scan[min(k + 1, len(scan) - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 0.02:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return round((low + high) / 2, 3)


def root(q: Tensor) -> list[float]:
    """sqrt(mean q) and its standard error."""
    value = math.sqrt(float(q.mean()))
    return [value, float(q.std()) / math.sqrt(len(q)) / (2 * value)]


def ratio(q: Tensor, base: Tensor) -> list[float]:
    """sqrt(mean q / mean base) and its standard error, of samples in pairs."""
    value = math.sqrt(float(q.mean() / base.mean()))
    spread = float((q / q.mean() - base / base.mean()).std())
    return [value, value * spread / math.sqrt(len(q)) / 2]


class Bench:
    """One model, its fitting noise and its report noise."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.options, self.chunk = options, options.chunk
        self.denoiser, self.cond, _ = model(name, "cpu")
        card = getattr(self.denoiser, "card", {})
        self.name = f"{Path(name).name}, step {card['step']}" if "step" in card else name
        self.low, self.high = self.denoiser.sampling_range
        report = noises(self.denoiser, self.cond, 10**6 + options.seed, options.report)
        plan = teacher_plan(3 * options.teacher // 2, self.low, self.high)
        self.report = taught(self.denoiser, plan, *report, chunk=self.chunk)
        coarse = teacher_plan(options.teacher, self.low, self.high)
        self.teacher_error = root(self.squares(coarse, self.report))

    def squares(self, plan: Plan, noises: Noises) -> Tensor:
        return squares(self.denoiser, plan, noises, self.chunk, None)

    def run(self, n: int) -> dict[str, Any]:
        options, denoiser, chunk = self.options, self.denoiser, self.chunk
        began = time.perf_counter()
        sigmas = grids.log_linear(n, self.high, self.low)
        # a teacher's grid that has the plan's levels among its own
        every = math.ceil(options.teacher / (n - 1))
        noise = noises(denoiser, self.cond, options.seed, options.fit)
        plan = teacher_plan(every * (n - 1) + 1, self.low, self.high)
        fit, cache = remember(denoiser, plan, *noise, chunk=chunk)
        if cache.states.shape[1] < len(fit):
            raise SystemExit(f"--fit {len(fit)}: the teacher remembers only {cache.states.shape[1]}; give fewer")

        def to_the_end(i: int, part: slice, y: Tensor) -> Tensor:
            return (y - fit.end[part]) / sigmas[i]

        def to_the_next(i: int, part: slice, y: Tensor) -> Tensor:
            return (y - cache.states[(i + 1) * every, part]) / (sigmas[i] - sigmas[i + 1])

        star, star_error = greedy(denoiser, sigmas, fit, chunk, to_the_end)
        tracking, tracking_error = greedy(denoiser, sigmas, fit, chunk, to_the_next)

        def covariances(plan: Plan) -> tuple[StepCovariance, ...]:
            # the last is that of the plain denoise
            return error_covariance(denoiser, fit.end, plan, noise=fit.noise, chunk=chunk, cond=fit.cond)[:-1]

        again = [c.gamma for c in covariances(solvers.ge(sigmas, star))]
        constant = best_constant(lambda g: float(self.squares(solvers.ge(sigmas, g), fit).mean()))
        plans = {
            "ddim": solvers.ddim(sigmas),
            "ge2": solvers.ge(sigmas, 2.0),
            "constant": solvers.ge(sigmas, constant),
            "star": solvers.ge(sigmas, star),
            "star_ddim": solvers.ge(sigmas, [c.gamma for c in covariances(solvers.ddim(sigmas))]),
            "tracking": solvers.ge(sigmas, tracking),
        }
        plans["calibrated"] = self.calibrated(plans["constant"], fit)
        gammas = {key: [row[0] for row in plan.rows[1:-1]] for key, plan in plans.items()}
        # what the calibrated gammas give away of each e_bar's own error, on the states that they lead to
        given = [
            math.sqrt(c.error(g) / c.error(c.gamma))
            for c, g in zip(covariances(plans["calibrated"]), gammas["calibrated"], strict=True)
        ]
        q = {key: self.squares(plan, self.report) for key, plan in plans.items()}
        return {
            "model": self.name,
            "nfe": n,
            "sigmas": list(sigmas),
            "gammas": gammas,
            "stderr": {"star": star_error, "tracking": tracking_error},
            "error_covariance_differs_by": max(abs(a - b) for a, b in zip(again, star, strict=True)),
            "calibrated_step_error_over_least": given,
            "fit_rmse": {key: root(self.squares(plan, fit))[0] for key, plan in plans.items()},
            "rmse": {key: root(value) for key, value in q.items()},
            "over_constant": {key: ratio(value, q["constant"]) for key, value in q.items()},
            "teacher_rmse": self.teacher_error,
            "seed": options.seed,
            "sizes": {"fit": options.fit, "report": options.report, "teacher": options.teacher},
            "seconds": time.perf_counter() - began,
            "machine": options.machine,
        }

    def calibrated(self, start: Plan, fit: Noises) -> Plan:
        """Plain least squares of the end points (no prior, no tempering), from the best constant gamma."""
        space = Gammas(template=start, low=self.low, high=self.high)
        best = [start]

        def accept(plan: Plan) -> bool:
            best.append(plan)
            return len(best) <= self.options.iterations

        descend(
            space,
            start,
            len(fit),
            0.0,
            lambda p, scale: normal_equations(self.denoiser, space, p, fit, self.chunk, None, scale),
            lambda plan: self.squares(plan, fit),
            accept,
            tail=math.inf,
        )
        return best[-1]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: end-point errors of all, then the gammas of each."""
    lines = [
        "End-point RMSE on fresh noise, ± one standard error; in brackets the ratio to the best constant gamma, of the "
        "same noises in pairs.",
        "",
        f"| model | NFE | {' | '.join(METHODS.values())} |",
        "|---" * (len(METHODS) + 2) + "|",
    ]
    for row in rows:
        cells = []
        for key in METHODS:
            (value, error), (over, spread) = row["rmse"][key], row["over_constant"][key]
            more = f" (at {row['gammas'][key][0]:.2f})" if key == "constant" else f" ({over:.2f} ± {spread:.2f})"
            cells.append(f"{value:.4f} ± {error:.4f}{more}" if value < 10 else f"{value:.1e}")
        lines.append(f"| {row['model']} | {row['nfe']} | {' | '.join(cells)} |")
    for row in (row for row in rows if row["nfe"] <= LONGEST):
        sizes = row["sizes"]
        lines += [
            "",
            f"**{row['model']}, {row['nfe']} evaluations** (seed {row['seed']}, {sizes['fit']} noises to fit, "
            f'{sizes["report"]} to report, teacher\'s own RMSE about {row["teacher_rmse"][0]:.1g}). "given away": '
            "root mean square error of e_bar at the calibrated gamma over the least possible, on the calibrated "
            "plan's own states.",
            "",
            "| sigma | gamma* | gamma* along DDIM | tracking | calibrated | given away |",
            "|---|---|---|---|---|---|",
        ]
        g, errors = row["gammas"], row["stderr"]
        for i, sigma in enumerate(row["sigmas"][1:-2]):
            lines.append(
                f"| {sigma:.3g} | {g['star'][i]:.2f} ± {errors['star'][i]:.2f} | {g['star_ddim'][i]:.2f} "
                f"| {g['tracking'][i]:.2f} ± {errors['tracking'][i]:.2f} | {g['calibrated'][i]:.2f} "
                f"| {row['calibrated_step_error_over_least'][i]:.2f} |"
            )
    return "\n".join(lines)


def keep(folder: Path, new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put results into gammas.json and the tables of all into gammas.md."""
    data, page = folder / "gammas.json", folder / "gammas.md"
    rows = {(r["model"], r["nfe"]): r for r in [*(json.loads(data.read_text()) if data.exists() else []), *new]}
    ordered = [rows[key] for key in sorted(rows, key=lambda key: (key[0] != "mixture", key))]
    replace_file(data, (json.dumps(ordered, indent=1) + "\n").encode())
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARKS)
    head, rest = text.split(MARKS[0])
    body = "\n\n".join([MARKS[0], tables(ordered), MARKS[1]])
    replace_file(page, (head + body + rest.split(MARKS[1])[1].rstrip("\n") + "\n").encode())
    return ordered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mixture"], metavar="RUN", help="mixture, or folder of a run")
    parser.add_argument("--nfe", default="6,10")
    parser.add_argument("--fit", type=int, default=256, help="noises to fit gammas to")
    parser.add_argument("--report", type=int, default=1024, help="fresh noises to report on")
    parser.add_argument("--teacher", type=int, default=64, help="levels of the teacher; the report's has half more")
    parser.add_argument("--iterations", type=int, default=8, help="Gauss-Newton steps at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=128, help="samples per call")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", default="2 CPU cores, one used", help="what the results say of the machine")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        bench = Bench(name, options)
        for n in map(int, options.nfe.split(",")):
            with torch.no_grad():
                row = bench.run(n)
            keep(options.out, [row])
            print(tables([row]), f"\n{row['seconds']:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
