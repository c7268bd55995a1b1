"""The schedule ablation of 2306.04848 (sec. 5): four schedules, gamma 1 (DDIM) and 2, at equal evaluations.

    python benchmarks/papers/ge_schedules.py --data fashion_mnist.npz

    DDIM         even timesteps of the table from its largest level
    DDIM offset  even timesteps from sigma 40
    EDM          rho 7 from 80 to .002, rounded up to the table (its tail repeats t = 0; those steps are left out)
    log-linear   the paper's rule: geometric from 40, the last step to t = 0

On CIFAR-10 at 10 evaluations the paper has FID 16.86, 14.18, 20.85, 13.25 (gamma 1), and 3.79 with gamma 2 on its rule.
The foreign eps network on DDPM's table stands for its model. Levels end at sigma(0) = .01, as theirs; gamma holds to
the last step.
"""

from __future__ import annotations

from collections.abc import Sequence

from runner import Claim, compared, judged, model_of, number, parsed, parser, row_of, table, told, verdicts, write

from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.compare import Entry
from logsnr.evaluation.compare.entries import plan_entry
from logsnr.sampling.grids import Style, paper_timesteps
from logsnr.sampling.plan import check_sigmas
from logsnr.sampling.table import table_of
from logsnr.solvers import ge

NAME, TITLE = "ge-schedules", "Schedules of the gradient-estimation paper"
STYLES: dict[str, tuple[Style, float]] = {
    "DDIM": ("ddim", 157.0),
    "DDIM offset": ("ddim", 40.0),
    "EDM": ("edm", 80.0),
    "log-linear": ("log-linear", 40.0),
}
GAMMAS = (1.0, 2.0)
OURS = "log-linear"


def entries(model: NetworkDenoiser, nfe: Sequence[int]) -> list[Entry]:
    """Every schedule with both gammas at every number of evaluations."""
    known = table_of(model)
    found = []
    for n in nfe:
        for name, (style, first) in STYLES.items():
            steps = paper_timesteps(n, known, min(first, known.sigma_range[1]), style=style)
            levels = check_sigmas([known.sigma(float(t)) for t in dict.fromkeys(steps)])
            for gamma in GAMMAS:
                plan = ge(levels, gamma, final="ge")
                found.append(plan_entry(model, plan, f"GE({gamma:g})", name, "GE", "logsnr", n))
    return found


def claims(nfe: Sequence[int], by: str) -> list[Claim]:
    """What the paper says of its rule."""
    found = []
    for n in nfe:
        for gamma in GAMMAS:
            says = f"with gamma {gamma:g} the paper's rule is better than {{}}"
            found += [
                Claim(
                    says=says.format(other), less=f"GE({gamma:g}), {OURS}", more=f"GE({gamma:g}), {other}", by=by, nfe=n
                )
                for other in STYLES
                if other != OURS
            ]
        one, two = (f"GE({gamma:g}), {OURS}" for gamma in GAMMAS)
        found.append(Claim(says="on the paper's rule gamma 2 is better than 1", less=two, more=one, by=by, nfe=n))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(parser(__doc__, (5, 10, 20, 50), 1000, 5), arguments)
    model = model_of(options)
    found = compared(f"{NAME}-{options.model.replace(':', '-')}", options, model, entries(model, options.nfe))
    columns = ("rmse", *(("frechet",) if found.features else ()))
    names = [f"GE({gamma:g}), {style}" for gamma in GAMMAS for style in STYLES]
    parts = [told(found)]
    for by in reversed(columns):
        what = {"rmse": "RMSE", "frechet": "FD"}[by]
        rows = [[name, *(number(row_of(found, name, n), by) for n in options.nfe)] for name in names]
        parts.append(table((what, *map(str, options.nfe)), rows))
    verdict = [judged(one, found) for by in reversed(columns) for one in claims(options.nfe, by)]
    parts.append(verdicts(verdict))
    write(NAME, TITLE, "\n\n".join(parts), {"comparison": found.to_dict(), "claims": verdict}, options)


if __name__ == "__main__":
    main()
