"""The scheduler inside diffusers' own pipelines, on tiny random components: it does what `sample` does.

    pipeline(scheduler)  ==  sample(the pipeline's network as a denoiser, scheduler.plan), every state, 1e-4 of its RMS

for every pipeline, every prediction its model can have, and gamma 1, gamma 2, a list, a stored plan, another solver.
With gamma 1 the same pipeline with diffusers' DDIM, Euler or FlowMatchEuler gives the same states.
"""

from __future__ import annotations

import copy
import functools
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipeline_cases import (
    CASES,
    LATE,
    MATRIX,
    STEPS,
    Case,
    assert_same,
    ddpm,
    expected,
    flux_case,
    run,
    sd_inpaint,
    sdxl,
)
from torch import Tensor

import logsnr as ls
from logsnr.noise import alpha_s

diffusers = pytest.importorskip("diffusers")

from logsnr.adapters import GradientEstimationScheduler  # noqa: E402


def ours(case: Case, kind: str, **options: Any) -> Any:
    extra = {} if kind == "flow_prediction" else {"prediction_type": kind}
    return GradientEstimationScheduler.from_config(case.pipe.scheduler.config, **extra, **options)


def stored_plan(case: Case, kind: str) -> ls.Plan:
    """A plan of one's own on the case's levels: three estimates, basis x0."""
    if kind == "flow_prediction":
        grid = ls.grids.flow(STEPS, 3.0)
    else:
        high, low = ours(case, kind, gamma=1.0).model.sigma_range[::-1]
        grid = ls.grids.log_linear(STEPS, high, low)
    return ls.Plan(grid, ((1.0,), (1.7, -0.7), (1.9, -1.3, 0.4), (1.2, -0.2), (1.0,)), "x0")


VARIANTS: dict[str, Callable[[Case, str], dict[str, Any]]] = {
    "gamma 1": lambda case, kind: {"gamma": 1.0},
    "gamma 2": lambda case, kind: {"gamma": 2.0},
    "list": lambda case, kind: {"gamma": [2.0, 1.5, 1.2], "final_sigmas_type": "zero"},
    "plan": lambda case, kind: {"plan": stored_plan(case, kind)},
    "unipc": lambda case, kind: {"solver": "unipc", "solver_options": {"order": 2}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "kind"), MATRIX)
def test_a_pipeline_does_what_sample_does(name: str, kind: str, variant: str) -> None:
    case = CASES[name]()
    case.pipe.scheduler = ours(case, kind, **VARIANTS[variant](case, kind))
    states = run(case)
    assert len(states) == (4 if name in LATE else 6)
    assert_same(states, expected(case, states))


@pytest.mark.parametrize(("name", "kind"), MATRIX)
def test_gamma_one_is_diffusers_own(name: str, kind: str) -> None:
    """Same timesteps; flows get them explicitly, where FlowMatchEuler's default grid is shifted twice."""
    case = CASES[name]()
    case.pipe.scheduler = scheduler = ours(case, kind, gamma=1.0)
    found = run(case)
    flow = kind == "flow_prediction"
    if flow:
        times = scheduler.sigmas[:-1].tolist()
        stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        original = stock.set_timesteps

        def given(num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None) -> None:
            original(sigmas=times, device=device)

        stock.set_timesteps = given
        case.pipe.scheduler = stock
    else:
        same = {key: scheduler.config[key] for key in ("clip_sample", "set_alpha_to_one")}  # else DDIM's own
        case.pipe.scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, **same)
    assert_same(found, run(case), 1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_gamma_one_is_euler(kind: str) -> None:
    """Euler's state is y = z/alpha, so the images are compared."""
    case = sdxl()
    case.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(case.pipe.scheduler.config, prediction_type=kind)
    wanted = run(case)[-1]
    case.pipe.scheduler = GradientEstimationScheduler.from_config(case.pipe.scheduler.config, gamma=1.0)
    assert_same([run(case)[-1]], [wanted], 1e-5)


@pytest.mark.parametrize("size", [8, 16])
def test_flux_at_its_defaults(size: int) -> None:
    """Neither scheduler is told anything: the pipeline's own times and its shift for the image's size, once."""
    case = flux_case()
    wanted = run(case, height=size, width=size)
    case.pipe.scheduler = GradientEstimationScheduler.from_config(case.pipe.scheduler.config, gamma=1.0)
    assert_same(run(case, height=size, width=size), wanted, 1e-5)
    case.pipe.scheduler.set_timesteps(STEPS, mu=0.0)
    assert case.pipe.scheduler.plan.sigmas == ls.grids.flow(STEPS, 1.0)


def test_inpainting_with_an_ordinary_model() -> None:
    """There the pipeline mixes the noised image into every state: gamma 1 is DDIM, and gamma 2 keeps its history."""
    case = sd_inpaint(4)
    config = case.pipe.scheduler.config
    case.pipe.scheduler = GradientEstimationScheduler.from_config(config, gamma=1.0)
    found = run(case, strength=0.8)
    stock = diffusers.DDIMScheduler.from_config(case.pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    case.pipe.scheduler = stock
    assert_same(found, run(case, strength=0.8), 1e-5)
    case.pipe.scheduler = scheduler = GradientEstimationScheduler.from_config(config, gamma=2.0)
    outputs: list[Tensor] = []
    samples: list[Tensor] = []
    advance = scheduler.step

    @functools.wraps(advance)
    def spy(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(model_output)
        samples.append(sample)
        return advance(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = spy
    states = run(case, strength=0.8)
    sigmas = scheduler.plan.sigmas[-len(states) :]
    for i in range(1, len(outputs)):
        alpha, _ = alpha_s(sigmas[i])
        alpha_, _ = alpha_s(sigmas[i + 1])
        wanted = alpha_ * (samples[i] / alpha + (sigmas[i + 1] - sigmas[i]) * (2 * outputs[i] - outputs[i - 1]))
        assert_same([states[i + 1]], [wanted], 1e-5)


@pytest.mark.parametrize(("name", "kind"), [("ddpm", "epsilon"), ("flux", "flow_prediction")])
@pytest.mark.parametrize("sampler", ["plan", "plans", "gammas"])
def test_a_saved_pipeline_comes_back_with_its_scheduler(name: str, kind: str, sampler: str, tmp_path) -> None:
    case = CASES[name]()
    plan = stored_plan(case, kind)
    options = {"plan": plan, "plans": [ls.solvers.ddim((9.0, 1.0, 0.0)), plan], "gammas": [2.0, 1.5, 1.2]}
    case.pipe.scheduler = ours(case, kind, **{"gamma" if sampler == "gammas" else "plan": options[sampler]})
    before = run(case)
    case.pipe.save_pretrained(tmp_path)
    # the module's name is written into every saved folder: it must stay importable
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["logsnr.adapters.scheduler", "GradientEstimationScheduler"]
    missing = {key: None for key, part in case.pipe.components.items() if part is None}
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True, **missing)
    assert isinstance(loaded.scheduler, GradientEstimationScheduler)
    after = run(Case(loaded, case.call, case.network))
    assert loaded.scheduler.plan == case.pipe.scheduler.plan
    assert (loaded.scheduler.plan == plan) == (sampler != "gammas")
    assert_same(after, before, 1e-6)  # loaded weights lie elsewhere in memory, which alters the order of float sums


@pytest.mark.parametrize("options", [{"gamma": 2.0}, {"gamma": 1.5, "mu": 0.5}], ids=["quiet", "noisy"])
def test_a_batch_with_a_list_of_generators_is_its_images_one_by_one(options: dict[str, Any]) -> None:
    """Start and noise come from each image's own generator; the batch only changes the order of float sums."""
    case = ddpm()
    case.pipe.scheduler = GradientEstimationScheduler.from_config(case.pipe.scheduler.config, **options)
    # DDPMPipeline draws the start itself, from a list as well
    together = run(case, generator=[torch.Generator().manual_seed(s) for s in (3, 4)])[-1]
    for i, seed in enumerate((3, 4)):
        alone = run(case, batch_size=1, generator=[torch.Generator().manual_seed(seed)])[-1]
        assert_same([together[i : i + 1]], [alone], 1e-5)
    again = run(case, generator=[torch.Generator().manual_seed(s) for s in (3, 4)])[-1]
    assert torch.equal(together, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_half_precision_pipelines_round_the_state_once_a_step(name: str, dtype: torch.dtype) -> None:
    """States stay in the pipeline's dtype; each step is the float32 step from the same inputs, rounded."""
    case = CASES[name]()
    pipe = copy.deepcopy(case.pipe).to(dtype)
    config = case.pipe.scheduler.config
    scheduler = pipe.scheduler = GradientEstimationScheduler.from_config(config, gamma=2.0)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = scheduler.step

    @functools.wraps(step)
    def recording(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = step(model_output, timestep, sample, *args, **kwargs)
        seen.append((model_output.clone(), sample.clone(), out[0].clone()))
        return out

    scheduler.step = recording
    call = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in case.call.items()}
    run(Case(pipe, call, case.network))
    exact = GradientEstimationScheduler.from_config(config, plan=scheduler.plan)
    exact.set_timesteps(STEPS)
    assert len(seen) == STEPS
    for t, (output, x, out) in zip(exact.timesteps, seen, strict=True):
        assert x.dtype == out.dtype == dtype
        wanted = exact.step(output.float(), t, x.float(), return_dict=False)[0]
        assert torch.equal(out, wanted.to(dtype))


def test_many_threads_share_one_pipeline_and_scheduler() -> None:
    """8 threads, 4 images each, every thread changing its number of steps: bit for bit the images of one thread."""
    case = ddpm()
    case.pipe.scheduler = GradientEstimationScheduler.from_config(case.pipe.scheduler.config, gamma=2.0, mu=0.3)
    case.pipe.set_progress_bar_config(disable=True)
    jobs = [(i, 2 + (i + i // 8) % 4) for i in range(32)]

    def image(seed: int, steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        out = case.pipe(batch_size=1, generator=generator, num_inference_steps=steps, output_type="np")
        return torch.from_numpy(out.images)

    serial = [image(*job) for job in jobs]
    parallel: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def work(mine: list[tuple[int, int]]) -> None:
        try:
            for job in mine:
                parallel[job[0]] = image(*job)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(jobs[k::8],)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert all(torch.equal(serial[i], parallel[i]) for i, _ in jobs)
    assert len({float(image.sum()) for image in serial}) == len(jobs)
