"""`logsnr sample`, and what it shares with whatever samples: the options that say model, plan and condition."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logsnr.cli.application import Compile, Device, Dtype, Json, Model, Named, Range, Seed, app, hushed

if TYPE_CHECKING:
    from logsnr.denoiser import Denoiser
    from logsnr.loading import Loaded
    from logsnr.sampling import GaussianStart, Plan

Nfe = Annotated[int | None, typer.Option(help="Network evaluations per image [default: 10].", min=1, max=10_000)]
Solver = Annotated[
    str,
    typer.Option(
        help="{solvers}, or one with its options as `logsnr compare` names it, e.g. DPM++(3M) "
        "[default: the model's own plan of that many evaluations, else the best known; ge where a grid is named]."
    ),
]
Gamma = Annotated[float | None, typer.Option(help="Gradient estimation's gamma; 1 is DDIM [default: 2].")]
Order = Annotated[int | None, typer.Option(help="Order of a multistep solver [default: its own].")]
Grid = Annotated[str, typer.Option(help="Spacing of the noise levels: {grids}.")]
SigmaMax = Annotated[float | None, typer.Option(help="First noise level [default: the model's range].")]
SigmaMin = Annotated[float | None, typer.Option(help="Last noise level before 0 [default: the model's range].")]
PlanFile = Annotated[Path | None, typer.Option(help="A plan file (JSON) instead of solver, nfe and gamma.")]
StartFile = Annotated[
    Path | None,
    typer.Option(help="The Gaussian start of a plan that needs one [default: start.safetensors beside the plan]."),
]
Class = Annotated[str | None, typer.Option("--class", help="Class of a class-conditional model: its name or number.")]
Prompt = Annotated[str | None, typer.Option(help="Of a diffusers pipeline: a text, or a class's name.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What guidance leads away from.")]
Guidance = Annotated[
    float,
    typer.Option(help="Classifier-free guidance in diffusers' scale; 1 is none, else two evaluations a step."),
]
NullClass = Annotated[
    int | None, typer.Option(help="Of a class-conditional pixel pipeline: the class that stands for none.")
]
UNASKED = ("auto", None, None, "log-linear")
"""solver, gamma, order and grid where nothing was asked for."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, ready to be sampled.

    Args:
        denoiser: the model.
        guided: the same, or its guided one.
        plan: of how to sample it.
        start: the Gaussian start that the plan needs.
        label: the class that was named.
    """

    denoiser: Loaded
    guided: Denoiser
    plan: Plan
    start: GaussianStart | None
    label: int | None


def asked(
    model: str,
    *,
    nfe: int | None,
    solver: str,
    gamma: float | None,
    order: int | None,
    grid: str,
    sigma_max: float | None,
    sigma_min: float | None,
    range_: str | None,
    plan: Path | None,
    start: Path | None,
    class_: str | None,
    prompt: str | None,
    negative_prompt: str | None,
    guidance: float,
    null_class: int | None,
    where: Mapping[str, Any],
    seed: int,
    prompts: Sequence[str] | None = None,
) -> Asked:
    """Model and plan by the options of a command.

    Raises:
        LogsnrError: if two options exclude each other, or one does not fit the model.
    """
    from logsnr.adapters.diffusers.pipelines import PipelineDenoiser
    from logsnr.cli import starts, support
    from logsnr.errors import LogsnrError
    from logsnr.sampling import Plan, plan_for
    from logsnr.sampling.default import auto_plan

    if plan is not None:
        wishes = {"solver": None if solver == "auto" else solver, "grid": None if grid == "log-linear" else grid}
        support.alone(plan, nfe=nfe, sigma_max=sigma_max, sigma_min=sigma_min, gamma=gamma, order=order, **wishes)
    nfe = 10 if nfe is None else nfe
    denoiser, guided = support.sampled_model(model, prompt, negative_prompt, guidance, null_class, where)
    label = support.class_of(denoiser, class_)
    if range_ is not None:
        if plan is not None or sigma_min is not None or sigma_max is not None:
            raise LogsnrError(f"--range {range_} with --plan, --sigma-min or --sigma-max: give one of them")
        if prompts and isinstance(denoiser, PipelineDenoiser):
            few = denoiser.conditions([prompts[i % len(prompts)] for i in range(12)])
        else:
            few = support.sampled_condition(denoiser, label, prompt, 12)
        sigma_min, sigma_max = support.asked_range(guided, range_, few, seed) or (None, None)
    if plan:
        chosen = Plan.load(plan)
    elif (solver, gamma, order, grid) != UNASKED:
        chosen = support.solver_plan(denoiser, nfe, grid, sigma_max, sigma_min, solver, gamma, order)
    elif sigma_min is None and sigma_max is None:
        chosen = plan_for(denoiser, nfe)
    else:
        low, high = denoiser.sampling_range
        chosen = auto_plan(
            nfe,
            low if sigma_min is None else sigma_min,
            high if sigma_max is None else sigma_max,
            sigma_data=denoiser.sigma_data,
            finite_at_inf=sigma_max is not None or denoiser.finite_at_inf,
            dim=denoiser.dim,
        )
    gaussian = starts.start_of(start, plan, chosen)
    return Asked(denoiser=denoiser, guided=guided, plan=chosen, start=gaussian, label=label)


@app.command(cls=Named)
def sample(
    model: Model,
    nfe: Nfe = None,
    solver: Solver = "auto",
    gamma: Gamma = None,
    order: Order = None,
    grid: Grid = "log-linear",
    sigma_max: SigmaMax = None,
    sigma_min: SigmaMin = None,
    range_: Range = None,
    plan: PlanFile = None,
    start: StartFile = None,
    n: Annotated[int, typer.Option("--number", "-n", help="How many images.", min=1)] = 64,
    class_: Class = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    guidance: Guidance = 1.0,
    null_class: NullClass = None,
    chunk: Annotated[int, typer.Option(help="Images per network call.", min=1)] = 256,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="A .png picture, or .npy grey levels.")] = Path("samples.png"),
    json_: Json = False,
) -> None:
    """Sample images from a trained model: a run, or a diffusers pipeline.

    Example: logsnr sample zoo:digits --nfe 5 -n 64 --out samples.png

    Example: logsnr sample pipelines/sd --prompt "a red fox" --guidance 5 -n 4 --out fox.png
    """
    import torch

    from logsnr.cli import support
    from logsnr.errors import LogsnrError
    from logsnr.sampling import evaluations
    from logsnr.sampling import sample as run
    from logsnr.writing import check_output

    if out.suffix not in (".png", ".npy"):
        raise LogsnrError(f"--out {out}: the suffix must be .png (a picture) or .npy (uint8 grey levels)")
    out = check_output(out)
    what = asked(
        model, nfe=nfe, solver=solver, gamma=gamma, order=order, grid=grid, sigma_max=sigma_max, sigma_min=sigma_min,
        range_=range_, plan=plan, start=start, class_=class_, prompt=prompt, negative_prompt=negative_prompt,
        guidance=guidance, null_class=null_class, where=support.place(device, dtype, compile_, measures=False),
        seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    cond = support.sampled_condition(what.denoiser, what.label, prompt, n)
    noise = torch.randn(n, *what.denoiser.shape, generator=generator)
    began = time.perf_counter()
    x = run(
        what.guided,
        what.plan,
        noise=noise,
        generator=generator,
        cond=cond,
        start=what.start,
        chunk=chunk,
        progress=not hushed(json_),
    ).cpu()
    seconds = time.perf_counter() - began
    spent = evaluations(what.guided, what.plan)
    support.write_images(x, what.denoiser, out)
    facts = {
        "out": str(out),
        "images": n,
        "nfe": what.plan.nfe,
        "evaluations": spent,
        "guidance": guidance,
        "plan": what.plan.meta,
        "sigmas": [what.plan.sigmas[0], what.plan.sigmas[-2]],
        "seed": seed,
        "seconds_per_image": seconds / n,
    }
    if json_:
        support.print_json(facts)
    else:
        by = what.plan.meta.get("solver", "custom")
        print(f"{out}: {n} images, {spent} evaluations each (plan: {by}), {seconds / n * 1e3:.1f} ms per image")
