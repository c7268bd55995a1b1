"""The certified table of solvers: order on three grids, end-point error, evaluations, noise.

    python benchmarks/solver_orders.py --write docs/solvers.md

prints the tables as Markdown and, with --write, puts them between that file's two markers.  About a minute on a core.

Order: log2 of the ratio of end-point errors at 160 and 320 steps from sigma 10 to .1, float64, on a mixture of two
Gaussians on the line.  Its flow keeps quantiles, so every state is known; the steps of lower order at the start of a
multistep run are replaced by exact states.
End-point error: root mean square distance to the exact flow's end point, over the data's standard deviation, of whole
runs (as a user makes them) with n evaluations from one noise at sigma 40, on a mixture of five Gaussians in the plane.
Spread: standard deviation of the end points over the exact one, minus 1, on a Gaussian of variance 2.89.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import logsnr
from logsnr.denoiser import Estimate
from logsnr.exact import GaussianMixture
from logsnr.noise import alpha_s, flow_time, sigma_from_flow_time
from logsnr.sampling import Plan, grids, heun, literature, sample, solvers
from logsnr.sampling.loop import updates
from logsnr.sampling.plan import Grid
from logsnr.timesteps import TimestepTable

F64 = torch.float64
NFE = (5, 10, 20, 50)
BEGIN, END = "<!-- solver_orders: begin -->", "<!-- solver_orders: end -->"
COMMAND = "python benchmarks/solver_orders.py --write docs/solvers.md"

Solver = Callable[[Sequence[float]], Plan]
SOLVERS: dict[str, Solver] = {
    "Euler = DDIM": solvers.ddim,
    "GE, gamma 2": partial(solvers.ge, gamma=2.0),
    "GE, gamma 1.5 = iPNDM-2": partial(solvers.ge, gamma=1.5),
    "GE, gamma 2, x0": partial(solvers.ge, gamma=2.0, basis="x0"),
    "GE, gamma 2, velocity": partial(solvers.ge, gamma=2.0, basis="velocity"),
    "iPNDM-3": partial(solvers.ipndm, order=3),
    "iPNDM-4": partial(solvers.ipndm, order=4),
    "iPNDM-4, velocity": partial(solvers.ipndm, order=4, basis="velocity"),
    "AB-2": partial(solvers.adams_bashforth, order=2),
    "AB-3": partial(solvers.adams_bashforth, order=3),
    "AB-4": partial(solvers.adams_bashforth, order=4),
    "AB-2, velocity": partial(solvers.adams_bashforth, order=2, basis="velocity"),
    "AB-4, velocity": partial(solvers.adams_bashforth, order=4, basis="velocity"),
    "AB-2, x0": partial(solvers.adams_bashforth, order=2, basis="x0"),
    "DEIS-2 (tAB1)": partial(solvers.deis, order=2),
    "DEIS-3 (tAB2)": partial(solvers.deis, order=3),
    "DEIS-4 (tAB3)": partial(solvers.deis, order=4),
    "DEIS-3, log sigma": partial(solvers.deis, order=3, time="log"),
    "DPM-Solver++(2M)": solvers.dpmpp,
    "DPM-Solver++(3M) as published": partial(solvers.dpmpp, order=3, form="published"),
    "DPM-Solver++(3M) exact": partial(solvers.dpmpp, order=3),
    "UniPC-1": partial(solvers.unipc, order=1),
    "UniPC-2": partial(solvers.unipc, order=2),
    "UniPC-3": partial(solvers.unipc, order=3),
    "UniPC-3, ramp": partial(solvers.unipc, order=3, final="ramp"),
}
NOISY: dict[str, Solver] = {
    "DDPM = DDIM(eta 1)": solvers.ddpm,
    "DDIM(eta .5)": partial(solvers.ddim, eta=0.5),
    "unified(gamma 2, mu .3)": partial(solvers.unified, gamma=2.0, mu=0.3),
}
GRIDS = ("log-linear", "karras", "flow-uniform")


def grid(name: str, n: int, high: float, low: float, last: grids.Last) -> Grid:
    """n evaluations from `high`; the flow grid ends at `low` or, uniform all the way, at 0."""
    if name == "log-linear":
        return grids.log_linear(n, high, low, last)
    if name == "karras":
        return grids.karras(n, high, low, last=last)
    first, end = flow_time(high), flow_time(low) if last == "min" else 0.0
    inner = [sigma_from_flow_time(first + (end - first) * i / n) for i in range(1, n)]
    return grids.from_sigmas([high, *inner, low if last == "min" else 0.0])


# Orders

WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=F64) for v in ([0.4, 0.6], [-1.0, 0.7], [0.5, 0.4]))
LINE = GaussianMixture(WEIGHTS, MEANS[:, None], STDS.square()[:, None, None])
QUANTILES = torch.tensor([0.07, 0.2, 0.35, 0.5, 0.8, 0.95], dtype=F64)


@cache
def exact(sigma: float) -> Tensor:
    """States y = z/alpha of the quantiles, by bisection."""
    low, high = torch.full_like(QUANTILES, -100.0), torch.full_like(QUANTILES, 100.0)
    for _ in range(64):
        y = (low + high) / 2
        below = (WEIGHTS * torch.special.ndtr((y[:, None] - MEANS) / (STDS**2 + sigma**2).sqrt())).sum(1) < QUANTILES
        low, high = torch.where(below, y, low), torch.where(below, high, y)
    return (low + high) / 2


def value(z: Tensor, sigma: float, basis: str) -> Tensor:
    estimate: Estimate = LINE(z, sigma)
    if basis == "velocity":
        return estimate.eps - estimate.x0
    return estimate.eps if basis == "eps" else estimate.x0


def error_from_exact_start(plan: Plan) -> float:
    first = max(len(row) for row in plan.rows) - 1
    history: list[Tensor] = []
    for sigma in plan.sigmas[:first]:
        history.insert(0, value(exact(sigma)[:, None] * alpha_s(sigma)[0], sigma, plan.basis))
    z = exact(plan.sigmas[first])[:, None] * alpha_s(plan.sigmas[first])[0]
    for step, sigma in list(zip(updates(plan), plan.sigmas, strict=False))[first:]:
        history = [value(z, sigma, plan.basis), *history][: first + 1]
        terms = history if step.basis == plan.basis else [value(z, sigma, step.basis)]
        z = z * step.keep + sum(w * e for w, e in zip(step.weights, terms, strict=False))
    return float((z[:, 0] / alpha_s(plan.sigmas[-1])[0] - exact(plan.sigmas[-1])).abs().mean())


def error_of(solver: Solver, levels: Grid) -> float:
    return error_from_exact_start(solver(levels))


def heun_error(levels: Grid) -> float:
    z = heun(LINE, levels, noise=exact(levels[0])[:, None] * alpha_s(levels[0])[0])
    return float((z[:, 0] / alpha_s(levels[-1])[0] - exact(levels[-1])).abs().mean())


def order(error: Callable[[Grid], float], name: str) -> float:
    coarse, fine = (error(grid(name, n, 10.0, 0.1, "min")) for n in (160, 320))
    return math.log2(coarse / fine)


# End points


def plane() -> GaussianMixture:
    """Five Gaussians of different shapes."""
    generator = torch.Generator().manual_seed(3)
    means = 1.2 * torch.randn(5, 2, generator=generator, dtype=F64)
    factors = 0.3 * torch.randn(5, 2, 2, generator=generator, dtype=F64)
    covs = factors @ factors.mT + 0.01 * torch.eye(2, dtype=F64)
    return GaussianMixture(torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=F64), means, covs)


def reference(model: GaussianMixture, noise: Tensor, high: float = 40.0) -> Tensor:
    """The flow's end points: two fine runs that agree to 1e-6."""
    ends = [sample(model, solvers.unipc(grids.log_linear(n, high, 1e-5), 3), noise=noise) for n in (1500, 3000)]
    difference = float((ends[0] - ends[1]).norm(dim=1).max())
    assert difference < 1e-6, f"reference runs differ by {difference:.1e}"
    return ends[1]


def sd_table(model: GaussianMixture) -> str:
    """The same error from sigma 14.615 down, where grids differ by how they end."""
    levels = TimestepTable.stable_diffusion()
    high, low = 14.615, 0.029

    def linspace(n: int) -> Grid:  # what diffusers' multistep schedulers do by default
        inner = [levels.sigma(float(round(999 * (1 - i / n)))) for i in range(1, n)]
        return grids.from_sigmas([high, *inner, 0.0])

    made: dict[str, Callable[[int], Grid]] = {
        "linspace timesteps": linspace,
        "log-linear": lambda n: grids.log_linear(n, high, low),
        "karras": lambda n: grids.karras(n, high, low),
        "AYS (SD 1.5)": literature.ays,
    }
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    truth = reference(model, noise, high)
    rows = []
    for name in ("Euler = DDIM", "GE, gamma 2", "iPNDM-4", "DPM-Solver++(2M)", "UniPC-2"):
        for g, make in made.items():
            ends = (sample(model, SOLVERS[name](make(n)), noise=noise) for n in NFE)
            errors = (float((x - truth).square().mean().sqrt()) / model.sigma_data for x in ends)
            rows.append([name, g, *map(shown, errors)])
    return table(["solver", "grid", *map(str, NFE)], rows)


def spread(plan: Plan, variance: float = 2.89) -> float:
    """Standard deviation of the end points over the exact one, minus 1: linear in independent unit normals."""
    z = torch.zeros(1 + plan.nfe, dtype=F64)
    z[0] = 1
    history: list[Tensor] = []
    for i, (step, sigma) in enumerate(zip(updates(plan), plan.sigmas, strict=False)):
        alpha, s = alpha_s(sigma)
        x0, eps = (c / (alpha * alpha * variance + s * s) * z for c in (alpha * variance, s))
        forms = {"x0": x0, "eps": eps, "velocity": eps - x0}
        history.insert(0, forms[plan.basis])
        terms = history if step.basis == plan.basis else [forms[step.basis]]
        z = (z * step.keep + sum(w * e for w, e in zip(step.weights, terms, strict=False))) * step.rescale
        z[1 + i] += step.noise
    return float(z.norm()) / math.sqrt(variance) - 1


def shown(error: float) -> str:
    """Three digits, without a leading zero."""
    digits = max(3, 2 - math.floor(math.log10(abs(error)))) if error else 3
    text = f"{error:.{min(digits, 6)}f}"
    return text.replace("0.", ".", 1)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables() -> str:
    versions = f"logsnr {logsnr.__version__}, torch {torch.__version__.split('+')[0]}, float64 on a CPU"
    out = [f"Made by `{COMMAND}` ({versions})."]

    rows = []
    for name, solver in SOLVERS.items():
        if name.endswith("ramp"):  # its last steps are of lower order by construction
            continue
        basis = solver(grid("karras", 4, 10.0, 0.1, "min")).basis
        orders = [order(partial(error_of, solver), g) for g in GRIDS]
        rows.append([name, basis if not name.startswith("Euler") else "any", "n", "no", *(f"{o:.2f}" for o in orders)])
    heun_orders = [order(heun_error, g) for g in GRIDS]
    rows.append(["Heun (EDM)", "eps", "2n, or 2n - 1 to 0", "no", *(f"{o:.2f}" for o in heun_orders)])
    rows += [[name, "eps", "n", "yes", "–", "–", "–"] for name in NOISY]
    out += ["### Order", table(["solver", "basis", "NFE of n steps", "noise", *GRIDS], rows)]

    model = plane()
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    truth = reference(model, noise)

    def error(x: Tensor) -> float:
        return float((x - truth).square().mean().sqrt()) / model.sigma_data

    columns: dict[str, list[str]] = {name: [] for name in (*SOLVERS, "Heun (EDM), NFE 5 9 19 49")}
    for g in GRIDS:
        for n in NFE:
            levels = grid(g, n, 40.0, 0.02, "zero")
            for name, solver in SOLVERS.items():
                columns[name].append(shown(error(sample(model, solver(levels), noise=noise))))
            half = heun(model, grid(g, (n + 1) // 2, 40.0, 0.02, "zero"), noise=noise)
            columns["Heun (EDM), NFE 5 9 19 49"].append(shown(error(half)))
    head = ["solver", *(f"{g} {n}" if n == NFE[0] else str(n) for g in GRIDS for n in NFE)]
    out += ["### End-point error", table(head, [[name, *values] for name, values in columns.items()])]

    out += ["### Grids for Stable Diffusion's range", sd_table(model)]

    some = ("Euler = DDIM", "GE, gamma 1.5 = iPNDM-2", "GE, gamma 2", "iPNDM-4", "DPM-Solver++(2M)", "UniPC-2")
    rows = [
        [name, *(f"{spread(solver(grids.log_linear(n, 40.0, 0.02))):+.4f}" for n in NFE)]
        for name, solver in {**{name: SOLVERS[name] for name in some}, **NOISY}.items()
    ]
    out += ["### Spread on a Gaussian, log-linear", table(["solver", *map(str, NFE)], rows)]
    return "\n\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file whose part between the markers is replaced")
    options = parser.parse_args()
    text = tables()
    print(text)
    if options.write is not None:
        page = options.write.read_text(encoding="utf-8")
        if BEGIN not in page or END not in page:
            parser.error(f"{options.write} lacks the markers {BEGIN} and {END}")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
