"""The gamma sweep of 2306.04848 (sec. 5): gamma from 1 to 3 on the paper's schedule.

    python benchmarks/papers/ge_gammas.py --data fashion_mnist.npz

The paper sweeps 21 values at 5, 10 and 20 evaluations and takes gamma = 2 for CIFAR-10 at all of them (for CelebA 2, 2
and 2.4); its figure's numbers are not known. Levels and end as in ge_schedules.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from runner import Claim, compared, judged, model_of, number, parsed, parser, row_of, table, told, verdicts, write

from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.compare import Comparison, Entry
from logsnr.evaluation.compare.entries import plan_entry
from logsnr.sampling.grids import paper_timesteps
from logsnr.sampling.plan import check_sigmas
from logsnr.sampling.table import table_of
from logsnr.solvers import ge

NAME, TITLE = "ge-gammas", "The gamma of gradient estimation"
GAMMAS = tuple(round(1 + 0.1 * i, 1) for i in range(21))
THEIRS = 2.0


def name_of(gamma: float) -> str:
    """The row of a gamma."""
    return f"GE({gamma:g}), log-linear"


def entries(model: NetworkDenoiser, nfe: Sequence[int], gammas: Sequence[float]) -> list[Entry]:
    """Every gamma at every number of evaluations."""
    known, found = table_of(model), []
    for n in nfe:
        steps = paper_timesteps(n, known, min(40.0, known.sigma_range[1]))
        levels = check_sigmas([known.sigma(float(t)) for t in dict.fromkeys(steps)])
        for gamma in gammas:
            plan = ge(levels, gamma, final="ge")
            found.append(plan_entry(model, plan, f"GE({gamma:g})", "log-linear", "GE", "logsnr", n))
    return found


def best(found: Comparison, n: int, by: str) -> float:
    """The gamma of least mean."""
    return min(GAMMAS, key=lambda gamma: _mean(found, gamma, n, by))


def _mean(found: Comparison, gamma: float, n: int, by: str) -> float:
    known = next((row for row in found.rows if row.name == name_of(gamma) and row.budget == n), None)
    one = None if known is None else getattr(known, by)
    return float("inf") if one is None else float(one.value)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(parser(__doc__, (5, 10, 20), 1000, 5), arguments)
    model = model_of(options)
    gammas = GAMMAS[:: 10 if options.smoke else 1]
    found = compared(f"{NAME}-{options.model.replace(':', '-')}", options, model, entries(model, options.nfe, gammas))
    parts, verdict = [told(found)], []
    for by in ("frechet", "rmse") if found.features else ("rmse",):
        what = {"rmse": "RMSE", "frechet": "FD"}[by]
        rows = [[f"{g:g}", *(number(row_of(found, name_of(g), n), by) for n in options.nfe)] for g in gammas]
        least = {n: best(found, n, by) for n in options.nfe}
        rows.append(["**best**", *(f"**{least[n]:g}**" for n in options.nfe)])
        parts.append(table((f"gamma: {what}", *map(str, options.nfe)), rows))
        for n in options.nfe:
            others = {1.0: "DDIM's 1", least[n]: f"the best of all here, {least[n]:g}"}
            for gamma, words in others.items():
                if gamma != THEIRS:
                    says = f"gamma 2 is better than {words}"
                    claim = Claim(says=says, less=name_of(THEIRS), more=name_of(gamma), by=by, nfe=n)
                    verdict.append(judged(claim, found))
    parts.append(verdicts(verdict))
    write(NAME, TITLE, "\n\n".join(parts), {"comparison": found.to_dict(), "claims": verdict}, options)


if __name__ == "__main__":
    main()
