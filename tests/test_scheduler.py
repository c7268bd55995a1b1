"""The scheduler by itself: the config it is made from, the steps it takes, how it finds them, and what it refuses.

The first part is the behaviour that diffusers tests of its own schedulers; the rest is what they do not have.
"""

from __future__ import annotations

import contextvars
import copy
import json
import math
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import logsnr as ls
from logsnr.denoiser import Estimate
from logsnr.noise import alpha_s

diffusers = pytest.importorskip("diffusers")

import logsnr.adapters  # noqa: E402
from logsnr.adapters import GradientEstimationScheduler as Scheduler  # noqa: E402
from logsnr.adapters import registry  # noqa: E402

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")
SHAPE = (2, 3, 8, 8)


def state(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(0.8 * x + 0.1 * torch.sin(torch.as_tensor(t, dtype=torch.float32) / 100)).to(x.dtype)


def loop(scheduler: Any, x: Tensor, timesteps: Tensor | None = None, **options: Any) -> Tensor:
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False, **options)[0]
    return x


def made(kind: str = "epsilon", **options: Any) -> Any:
    return Scheduler(**({} if kind == "flow_prediction" else SD), prediction_type=kind, **options)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


class ByFormula(ls.Denoiser):
    """The test network as a denoiser, with x0 changed as the scheduler's options say."""

    shape = SHAPE[1:]
    sigma_data = 1.0
    trained_range = (0.0, math.inf)

    def __init__(self, scheduler: Any, limit: Any = None) -> None:
        super().__init__()
        self.model, self.limit = scheduler.model, limit

    def forward(self, z: Tensor, sigma: Any, **cond: Any) -> Estimate:
        alpha, s = alpha_s(sigma)
        out = network(z * self.model.scale(sigma), torch.tensor(self.model.timestep(sigma), dtype=torch.float32))
        (a, b), (c, d) = self.model.prediction.x0_row(alpha, s), self.model.prediction.eps_row(alpha, s)
        x0, eps = a * z + b * out, c * z + d * out
        if self.limit is None:
            return Estimate(x0, eps)
        x0 = self.limit(x0)
        return Estimate(x0, eps, state=alpha * x0 + s * eps)


# What diffusers tests of its own schedulers


@pytest.mark.parametrize("kind", KINDS)
def test_config_and_pretrained_round_trip(kind: str, tmp_path) -> None:
    scheduler = made(kind, gamma=[1.5, 2.0, 1.1], mu=0.2)
    scheduler.save_pretrained(tmp_path)
    for other in (Scheduler.from_pretrained(tmp_path), Scheduler.from_config(scheduler.config)):
        assert {k: v for k, v in other.config.items() if k[0] != "_"} == {
            k: v for k, v in scheduler.config.items() if k[0] != "_"
        }
        for one in (scheduler, other):
            one.set_timesteps(5)
        a, b = (loop(one, state(), generator=torch.Generator().manual_seed(1)) for one in (scheduler, other))
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_step_keeps_shape_and_dtype_and_answers_as_tuple_or_object(kind: str) -> None:
    scheduler = made(kind)
    scheduler.set_timesteps(6)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scheduler.set_timesteps(6)
        x = state().to(dtype)
        t = scheduler.timesteps[0]
        (a,) = scheduler.step(network(x, t), t, x, return_dict=False)
        out = scheduler.step(network(x, t), t, x)
        assert a.shape == x.shape
        assert a.dtype == dtype
        assert torch.equal(a, out.prev_sample)
        assert out.to_tuple() == (out.prev_sample,)
        assert out.pred_original_sample.shape == x.shape


def test_the_denoised_image_of_a_step() -> None:
    ours, stock = made("v_prediction"), diffusers.DDIMScheduler(**SD, prediction_type="v_prediction", clip_sample=False)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    t, x = ours.timesteps[3], state()
    a, b = (one.step(network(x, t), t, x).pred_original_sample for one in (ours, stock))
    assert relative(a, b) < 1e-6


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_velocity_are_ddims(kind: str) -> None:
    ours, stock = made(kind), diffusers.DDIMScheduler(**SD, prediction_type=kind)
    x, noise, t = state(0), state(1), torch.tensor([7, 999])
    assert relative(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t)) < 1e-6
    assert relative(ours.add_noise(x, noise, t.float()), stock.add_noise(x, noise, t)) < 1e-6
    assert relative(ours.get_velocity(x, noise, t), stock.get_velocity(x, noise, t)) < 1e-6
    assert ours.add_noise(x.half(), noise.half(), t).dtype == torch.float16
    half = ours.add_noise(x.half(), noise.half(), t[0])
    assert torch.equal(half, ours.add_noise(x.half().float(), noise.half().float(), t[:1]).half())
    assert ours.add_noise(x.to("meta"), noise.to("meta"), t.to("meta")).device.type == "meta"


def test_flow_noise_is_flow_match_eulers() -> None:
    ours, stock = made("flow_prediction", shift=3.0), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.allclose(ours.timesteps, stock.timesteps)
    x, noise, t = state(0), state(1), stock.timesteps[[10, 900]]
    assert relative(ours.scale_noise(x, t, noise), stock.scale_noise(x, t, noise)) < 1e-6
    assert torch.equal(ours.get_velocity(x, noise, t), noise - x)


def test_trained_betas_and_beta_schedules() -> None:
    betas = [0.1, 0.2, 0.3]
    scheduler = Scheduler(num_train_timesteps=3, trained_betas=betas)
    stock = diffusers.DDIMScheduler(num_train_timesteps=3, trained_betas=betas)
    assert torch.allclose(scheduler.alphas_cumprod, stock.alphas_cumprod)
    assert json.loads(scheduler.to_json_string())["trained_betas"] == pytest.approx(betas)
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        stock = diffusers.DDPMScheduler(beta_schedule=schedule)
        ours = Scheduler.from_config(stock.config)
        assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod), schedule
    for rescaled in (
        diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.CogVideoXDDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.CogVideoXDDIMScheduler(**SD, prediction_type="v_prediction"),
    ):
        ours = Scheduler.from_config(rescaled.config)
        assert torch.allclose(ours.alphas_cumprod, rescaled.alphas_cumprod.float(), rtol=1e-5, atol=1e-7)
        assert ours.alphas_cumprod[-1] == rescaled.alphas_cumprod[-1] or not rescaled.config.rescale_betas_zero_snr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 27, 100, 200, 500, 1000])
def test_every_number_of_steps_makes_as_many_and_corrupts_none(n: int, kind: str) -> None:
    """On the exact denoiser of one image every run ends at it, however many steps (2306.04848: exact projection)."""
    for options in ({}, {"timestep_spacing": "trailing"}, {"grid": "karras"}, {"steps_offset": 1}):
        scheduler = made(kind, gamma=2.0, **options)
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n == scheduler.num_inference_steps
        assert len(scheduler.timesteps.unique()) == n
        image, x, prediction = 0.3 * state(5, (1, 1, 2, 2)).double(), state(0, (1, 1, 2, 2)).double(), scheduler.model
        for t, sigma in zip(scheduler.timesteps, scheduler.plan.sigmas, strict=False):
            alpha, s = alpha_s(sigma)
            eps = (x / prediction.scale(sigma) - alpha * image) / s
            t_x, t_e = prediction.prediction.target_row(alpha, s)
            x = scheduler.step(t_x * image + t_e * eps, t, x, return_dict=False)[0]
        assert relative(x, image) < 1e-9


def test_all_stock_schedulers_convert() -> None:
    """Every table or flow scheduler's default config makes one of ours, with the same levels and prediction."""
    names = [e.name for e in diffusers.schedulers.KarrasDiffusionSchedulers if "SDE" not in e.name]
    for name in [*names, "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]:
        stock = getattr(diffusers, name)()
        ours = Scheduler.from_config(stock.config)
        ours.set_timesteps(10)
        assert len(ours.timesteps) == 10
        if hasattr(stock, "alphas_cumprod"):
            assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod), name
        assert ours.config.prediction_type == stock.config.get("prediction_type", "flow_prediction")
        for key in ("clip_sample", "timestep_spacing", "steps_offset"):  # the stock defaults, not ours
            assert ours.config[key] == stock.config.get(key, ours.config[key]), (name, key)
        for back in (stock.from_config(ours.config), stock.from_config(json.loads(ours.to_json_string()))):
            back.set_timesteps(5)
            for key in ("clip_sample", "timestep_spacing", "steps_offset", "shift"):
                assert key not in stock.config or back.config[key] == stock.config[key], (name, key)


def test_flows_of_other_schedulers() -> None:
    """UniPC and DPM-Solver say flow by `use_flow_sigmas` and `flow_shift` (Wan, Sana)."""
    stock = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    ours = Scheduler.from_config(stock.config)
    ours.set_timesteps(4)
    assert ours.plan.sigmas == ls.grids.flow(4, 3.0)


def test_reversed_flows() -> None:
    """Mochi's labels run from 0 and its network says x - eps: the same images as the plain flow of -F."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    ours.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.allclose(ours.timesteps, stock.timesteps)
    assert relative(loop(ours, state()), loop(stock, state())) < 1e-6


def test_video_diffusion_with_continuous_labels() -> None:
    """Stable Video Diffusion: 5-D states, v prediction, labels ln(sigma)/4, Karras levels from 700."""
    config = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
    stock = diffusers.EulerDiscreteScheduler(**SD, **config, sigma_min=0.002, sigma_max=700.0)
    stock.set_timesteps(8)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    ours.set_timesteps(8)
    assert torch.allclose(ours.timesteps, stock.timesteps, atol=1e-5)
    x = y = state(0, (1, 4, 3, 4, 4))
    y = y * stock.sigmas[0].square().add(1).sqrt()
    for t in ours.timesteps:
        x = ours.step(network(x, t), t, x, return_dict=False)[0]
    for t in stock.timesteps:
        y = stock.step(network(stock.scale_model_input(y, t), t), t, y, return_dict=False)[0]
    assert relative(x, y) < 1e-4


# The arithmetic


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 2.0},
        {"gamma": 2.0, "basis": "x0"},
        {"gamma": 2.0, "basis": "eps"},
        {"gamma": 1.5, "basis": "velocity", "solver_options": {"final": "ge"}, "grid": "karras"},
        {"gamma": 1.6, "mu": 0.4},
        {"solver": "dpmpp", "solver_options": {"order": 3}},
        {"solver": "ipndm"},
        {"solver": "ddpm"},
        {"clip_sample": True, "clip_sample_range": 0.5, "gamma": 2.0},
        {"clip_sample": True, "clip_sample_range": 0.5, "gamma": 2.0, "basis": "x0"},
        {"clip_sample": True, "clip_sample_range": 0.5, "gamma": 2.0, "basis": "velocity"},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_steps_are_those_of_sample(kind: str, options: dict[str, Any]) -> None:
    if kind == "flow_prediction" and options.get("basis") == "eps":
        options = {**options, "final_sigmas_type": "zero"}
    scheduler = made(kind, **options)
    scheduler.set_timesteps(7)
    limit = (lambda x: x.clamp(-0.5, 0.5)) if "clip_sample" in options else None
    found = loop(scheduler, state(), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    wanted = ls.sample(ByFormula(scheduler, limit), scheduler.plan, noise=state(), generator=generator)
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    "limits",
    [{}, {"clip_sample": True, "clip_sample_range": 0.8}, {"thresholding": True, "sample_max_value": 1.3}],
    ids=["free", "clip", "threshold"],
)
def test_gamma_one_is_ddim_with_its_limits_and_its_noise(kind: str, eta: float, limits: dict[str, Any]) -> None:
    stock = diffusers.DDIMScheduler(**SD, prediction_type=kind, **{"clip_sample": False, **limits})
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
        results.append(loop(scheduler, state(), eta=eta, generator=torch.Generator().manual_seed(2)))
    assert relative(*results) < 1e-5


@pytest.mark.parametrize("options", [{}, {"thresholding": True}, {"mu": 0.3}], ids=["plain", "threshold", "noise"])
def test_a_step_reads_nothing_back(options: dict[str, Any]) -> None:
    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
            return func(*args, **(kwargs or {}))

    scheduler = made(**options)
    scheduler.set_timesteps(5)
    outputs, x = state(4), state()
    timesteps = list(scheduler.timesteps)
    with NoReading():
        for t in timesteps:
            x = scheduler.step(outputs, t, x, return_dict=False)[0]
            scheduler.add_noise(x, outputs, t.expand(2))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_leave_their_arguments_alone_and_have_gradients(kind: str) -> None:
    scheduler = made(kind, gamma=2.0)
    scheduler.set_timesteps(4)
    x = start = state().requires_grad_()
    kept = start.detach().clone()
    buffer = torch.empty(SHAPE)  # a network that answers in one buffer, as a captured graph does
    plain = state()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    x.sum().backward()
    assert start.grad is not None
    assert torch.equal(start.detach(), kept)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        buffer.copy_(network(plain, t))
        plain = scheduler.step(buffer, t, plain, return_dict=False)[0]
    assert torch.allclose(plain, x.detach())


def test_a_network_that_also_predicts_its_variance() -> None:
    scheduler = made(variance_type="learned_range")
    scheduler.set_timesteps(3)
    t, x = scheduler.timesteps[0], state()
    out = network(x, t)
    both = torch.cat([out, out * 7], 1)
    expected = scheduler.step(out, t, x, return_dict=False)[0]
    assert torch.equal(scheduler.step(both, t, x, return_dict=False)[0], expected)
    plain = made()
    plain.set_timesteps(3)
    with pytest.raises(ValueError, match="variance_type='learned_range'"):
        plain.step(both, plain.timesteps[0], x)


# Explicit levels, shifts, plans


def test_explicit_timesteps_and_sigmas_are_used_unchanged() -> None:
    """diffusers#14461: [1000, 750, 500, 250] came out as [1000, 900, 750, 500]."""
    flow = made("flow_prediction", shift=3.0)
    flow.set_timesteps(timesteps=[1000.0, 750.0, 500.0, 250.0])
    assert flow.timesteps.tolist() == [1000, 750, 500, 250]
    flow.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    assert flow.sigmas.tolist() == pytest.approx([0.9, 0.5, 0.2, 0])
    flow.set_timesteps(sigmas=[0.9, 0.5, 0.2, 0.0])
    assert len(flow.timesteps) == 3
    table = made()
    table.set_timesteps(timesteps=[999, 850, 736, 24])
    assert table.timesteps.tolist() == [999, 850, 736, 24]
    assert table.timesteps.dtype == torch.int64
    sigmas = diffusers.schedulers.AysSchedules["StableDiffusionSigmas"]
    table.set_timesteps(sigmas=sigmas)
    assert table.sigmas.tolist() == pytest.approx(sigmas)
    table.set_timesteps(10)
    assert table.plan.nfe == 10


def test_a_flow_pipelines_default_means_our_grid_and_shifts_happen_once() -> None:
    """diffusers#13243: FlowMatchEuler shifts its default grid twice."""
    scheduler = made("flow_prediction", shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / 6, 6).numpy(), mu=0.9)  # Flux passes mu always
    assert scheduler.plan.sigmas == ls.grids.flow(6, 3.0)
    dynamic = made("flow_prediction", use_dynamic_shifting=True)
    dynamic.set_timesteps(6, mu=math.log(3.0))
    assert dynamic.plan.sigmas == pytest.approx(ls.grids.flow(6, 3.0))
    dynamic.set_timesteps(sigmas=[0.5, 0.25], mu=math.log(3.0))
    assert dynamic.sigmas.tolist() == pytest.approx([0.75, 0.5, 0.0])
    linear = made("flow_prediction", use_dynamic_shifting=True, time_shift_type="linear", shift_terminal=0.1)
    linear.set_timesteps(6, mu=3.0)
    assert float(linear.sigmas[-2]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="pass mu"):
        dynamic.set_timesteps(6)


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_named_flow_grids_are_flow_match_eulers(flag: str) -> None:
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**{flag: True})
    stock.set_timesteps(sigmas=[1 - i / 5 for i in range(5)])
    ours = Scheduler.from_config(stock.config)
    ours.set_timesteps(5)
    assert torch.allclose(ours.sigmas, stock.sigmas, atol=1e-6)


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_named_table_grids_are_dpm_solvers(flag: str) -> None:
    stock = diffusers.DPMSolverMultistepScheduler(**SD, **{flag: True})
    stock.set_timesteps(8)
    ours = Scheduler.from_config(stock.config)
    ours.set_timesteps(8)
    assert torch.allclose(ours.sigmas, stock.sigmas, rtol=1e-5)


def test_the_papers_grid() -> None:
    """2306.04848's levels from start 40 on DDPM's table; more steps than the table resolves are refused."""
    scheduler = Scheduler(grid="ge-paper")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [853, 765, 665, 549, 415, 271, 149, 73, 33, 14]
    assert scheduler.plan.sigmas[-1] == pytest.approx(0.0100008, rel=1e-4)
    with pytest.raises(ValueError, match="use fewer steps"):
        made(grid="ge-paper", start=8.35).set_timesteps(500)


@pytest.mark.parametrize("form", ["plan", "dict", "json", "path", "list", "keyed"])
def test_plans_in_every_form_are_kept_in_the_config(form: str, tmp_path) -> None:
    plan = ls.solvers.ge(ls.grids.log_linear(6, 14.0, 0.05), 1.8)
    other = ls.solvers.dpmpp(ls.grids.log_linear(4, 14.0, 0.05))
    plan.save(tmp_path / "plan.json")
    given: Any = {
        "plan": plan,
        "dict": plan.to_dict(),
        "json": json.dumps(plan.to_dict()),
        "path": str(tmp_path / "plan.json"),
        "list": [plan, other],
        "keyed": {"6": plan, "4": other},
    }[form]
    scheduler = made(plan=given)
    scheduler.save_pretrained(tmp_path / "saved")
    (tmp_path / "plan.json").unlink()
    loaded = Scheduler.from_pretrained(tmp_path / "saved")
    loaded.set_timesteps(6)
    assert loaded.plan == plan
    if form in ("list", "keyed"):
        loaded.set_timesteps(4)
        assert loaded.plan == other


def test_the_pipeline_may_change_the_config_it_was_given() -> None:
    """Stable Diffusion pipelines set steps_offset to 1 on the scheduler they get."""
    scheduler = made()
    scheduler._internal_dict = diffusers.configuration_utils.FrozenDict({**scheduler.config, "steps_offset": 1})
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[-1] == 1


# Which trajectory, which run


def test_views_slices_and_numbers_find_their_step() -> None:
    scheduler = made()
    scheduler.set_timesteps(10)
    whole = loop(scheduler, state())
    for timesteps in (
        scheduler.timesteps,
        [t.expand(1) for t in scheduler.timesteps],
        [t.clone() for t in scheduler.timesteps],
        scheduler.timesteps.tolist(),
    ):
        assert torch.equal(loop(scheduler, state(), timesteps), whole)
    assert scheduler.step_index == 10
    assert scheduler.index_for_timestep(scheduler.timesteps[3]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_starting_late_is_the_tail_of_the_plan(kind: str) -> None:
    scheduler = made(kind, solver="ipndm")
    scheduler.set_timesteps(8)
    for begin in (None, 3):
        if begin is not None:
            scheduler.set_begin_index(begin)
        found = loop(scheduler, state(), scheduler.timesteps[3:])
        scale = scheduler.model.scale(scheduler.plan.sigmas[3])
        wanted = ls.sample(ByFormula(scheduler), scheduler.plan.tail(3), noise=state() / scale)
        assert relative(found, wanted) < 1e-5


def test_interleaved_runs_in_one_thread() -> None:
    """Two trajectories by their timesteps, two runs along one trajectory by their states."""
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(6)
    first = scheduler.timesteps
    alone = loop(scheduler, state(0), first), loop(scheduler, state(1), first)
    scheduler.set_timesteps(6)
    second = scheduler.timesteps
    x, y, u, v = (state(seed) for seed in (0, 1, 0, 1))
    for t, other in zip(first, second, strict=True):
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        u = scheduler.step(network(u, other), other, u, return_dict=False)[0]
        y = scheduler.step(network(y, t), t, y, return_dict=False)[0]
        v = scheduler.step(network(v, other), other, v, return_dict=False)[0]
    for found, wanted in zip((x, y, u, v), alone * 2, strict=True):
        assert torch.equal(found, wanted)


def test_a_second_pass_needs_no_set_timesteps() -> None:
    """diffusers' schedulers raise IndexError there."""
    scheduler = made()
    scheduler.set_timesteps(5)
    assert torch.equal(loop(scheduler, state()), loop(scheduler, state()))
    loop(scheduler, state(), scheduler.timesteps[:3])  # given up half way
    assert torch.equal(loop(scheduler, state()), loop(scheduler, state()))


def test_a_pipeline_may_replace_the_state_between_steps() -> None:
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(5)
    wanted = loop(scheduler, state())
    x = state()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0].clone()
    assert torch.equal(x, wanted)


def test_broken_orders_are_errors() -> None:
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(6)
    t, x = scheduler.timesteps, state()
    x1 = scheduler.step(x, t[0], x, return_dict=False)[0]
    with pytest.raises(
        ValueError, match=r"step 2 .* was given the state that step 1 .* needs: take the timesteps in order"
    ):
        scheduler.step(x, t[2], x1)
    with pytest.raises(ValueError, match="set_begin_index"):
        scheduler.step(x, t[2], x1.clone())
    x2 = scheduler.step(x, t[1], x1, return_dict=False)[0]
    with pytest.raises(ValueError, match="already taken from this state"):
        scheduler.step(x, t[1], x1)
    other = scheduler.step(x, t[0], x, return_dict=False)[0]
    scheduler.step(x, t[1], other, return_dict=False)
    with pytest.raises(ValueError, match="2 interleaved runs wait for step 2"):
        scheduler.step(x, t[2], x2.clone())
    with pytest.raises(ValueError, match="before set_timesteps"):
        made().step(x, 5, x)
    with pytest.raises(ValueError, match="is not one of this run's"):
        scheduler.step(x, 5, x)
    with pytest.raises(ValueError, match="6 timesteps"):
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match=r"timestep = None: pass an element of scheduler.timesteps"):
        scheduler.step(x, None, x)


def test_a_plan_without_memory_takes_its_steps_in_any_order() -> None:
    """Windows of a long video, each a new tensor at the same timestep: DDIM needs no history, so nothing is refused."""
    scheduler = made(gamma=1.0)
    scheduler.set_timesteps(6)
    x, y = state(0), state(1)
    both = loop(scheduler, torch.cat([x, y]))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x.clone(), return_dict=False)[0]
        y = scheduler.step(network(y, t), t, y.clone(), return_dict=False)[0]
    assert torch.equal(both, torch.cat([x, y]))
    t = scheduler.timesteps
    assert torch.equal(scheduler.step(x, t[4], x)[0], scheduler.step(x, t[4], x)[0])


def test_a_number_that_only_other_runs_have() -> None:
    scheduler = made()
    scheduler.set_timesteps(timesteps=[900, 500])
    scheduler.set_timesteps(timesteps=[900, 400])
    scheduler.set_timesteps(timesteps=[800, 300])
    x = state()
    scheduler.step(x, 400, x)
    with pytest.raises(ValueError, match="ambiguous: 2 runs have it"):
        scheduler.step(x, 900, x)


def test_a_bounded_number_of_trajectories(monkeypatch) -> None:
    monkeypatch.setattr(registry, "TRAJECTORIES", 3)
    scheduler = made()
    kept = []
    for _ in range(5):
        scheduler.set_timesteps(4)
        kept.append(scheduler.timesteps)
    x = state()
    with pytest.raises(ValueError, match="keeps the last"):
        scheduler.step(x, kept[0][1], x)
    assert loop(scheduler, x, kept[2]).isfinite().all()
    inside = contextvars.copy_context()
    inside.run(scheduler.set_timesteps, 4)
    for _ in range(4):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="this thread's run was dropped"):
        inside.run(lambda: scheduler.timesteps)


def test_threads_see_their_own_timesteps() -> None:
    scheduler = made(gamma=2.0)
    wanted = {}
    for n in range(3, 11):
        scheduler.set_timesteps(n)
        wanted[n] = loop(scheduler, state(n))
    found: dict[int, list[Tensor]] = {n: [] for n in wanted}
    gate = threading.Barrier(8)

    def work(n: int) -> None:
        for _ in range(20):
            gate.wait()
            scheduler.set_timesteps(n)
            gate.wait()
            found[n].append(loop(scheduler, state(n)) if scheduler.num_inference_steps == n else torch.empty(0))

    threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, wanted[n]) for n in wanted for x in found[n])
    assert all(len(images) == 20 for images in found.values())


def test_threads_along_one_trajectory() -> None:
    """One `set_timesteps`, eight loops over its timesteps at once: runs are told apart by their states."""
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps
    wanted = [loop(scheduler, state(seed), timesteps) for seed in range(8)]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: loop(scheduler, state(seed), timesteps)}))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(8))


def test_a_step_that_failed_may_be_taken_again() -> None:
    scheduler = made(gamma=2.0, mu=0.2)
    scheduler.set_timesteps(4)
    wanted = loop(scheduler, state(), generator=torch.Generator().manual_seed(0))
    x, generator = state(), torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        if i < 3:  # the last step draws nothing
            with pytest.raises((TypeError, AttributeError)):
                scheduler.step(network(x, t), t, x, generator="none")
        x = scheduler.step(network(x, t), t, x.clone(), generator=generator, return_dict=False)[0]
    assert torch.equal(x, wanted)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_from_where_they_were_made(kind: str, copied) -> None:
    scheduler = made(kind, gamma=2.0, thresholding=True)
    scheduler.set_timesteps(5)
    wanted = loop(scheduler, state())
    x = loop(scheduler, state(), scheduler.timesteps[:3])
    twin = copied(scheduler)
    assert torch.equal(loop(twin, x, twin.timesteps[3:]), wanted)
    assert torch.equal(loop(scheduler, x, scheduler.timesteps[3:]), wanted)
    assert copied(made(kind)).config.prediction_type == kind


# Refusals, each with its fix

THREE = ls.solvers.ddim((9.0, 5.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR.*rescale_betas_zero_snr=False"),
        ({"prediction_type": "v-prediction"}, "did you mean 'v_prediction'"),
        ({"beta_schedule": "quadratic"}, "trained_betas"),
        ({"gamma": "best"}, "give a number, a list with one number for each step that uses it, or 'auto'"),
        ({"gamma": [2.0, "x"]}, r"gamma = \[2.0, 'x'\]: give a number, a list"),
        ({"gamma": math.nan}, "gamma = nan: must be finite"),
        ({"basis": "epsilon"}, "basis 'epsilon' is not one of eps, x0, velocity"),
        ({"solver_options": "order"}, r"solver_options = 'order': give a dict, e.g. \{'order': 3\}"),
        ({"solver": "dpmpp", "solver_options": {"order": 9}}, r"integer in \[1, 3\]"),
        ({"solver": "dpmpp", "solver_options": {"oder": 2}}, "do not fit solver 'dpmpp'"),
        ({"solver": "dpmpp", "basis": "eps"}, "do not fit solver 'dpmpp'"),
        ({"gamma": "auto", "grid": "karras", "mu": 0.5}, "gamma 'auto' with mu, grid: its plans fix that; drop it"),
        ({"gamma": "auto", "solver": "dpmpp"}, "gamma 'auto' with solver: its plans fix that"),
        ({"sigma_data": 0.5, "prediction_type": "v_prediction"}, "an EDM network is 'epsilon'"),
        ({"solver": "dpmp"}, "did you mean 'dpmpp'"),
        ({"solver": "dpmpp", "gamma": 2.0}, "only 'ge' and 'unified'"),
        ({"mu": 1.0}, r"must be in \[0, 1\)"),
        ({"mu": "much"}, r"mu = much: must be in \[0, 1\)"),
        ({"grid": "karras", "start": "high"}, "start = 'high': give a number"),
        ({"prediction_type": "flow_prediction", "shift": 0.0}, r"shift = 0.0: must be in \(0, inf\)"),
        ({"time_shift_type": "quadratic"}, "'quadratic' is not one of exponential, linear"),
        ({"clip_sample": True, "clip_sample_range": -1.0}, "clip_sample_range = -1.0: must be above 0"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, r"ratio = 1.5 must be in \(0, 1\]"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value = 0.5 at least 1"),
        ({"sigma_data": 0.5, "sigma_min": 3.0, "sigma_max": 1.0}, "give 0 < sigma_min < sigma_max"),
        ({"grid": "karas"}, "did you mean 'karras'"),
        (
            {"grid": "karras", "start": 20.0},
            r"start = 20.0: must be in the model's range of sigma, \[0.0291675, 14.6146\]",
        ),
        ({"grid": "log-linear", "end": 1e-3}, "end = 0.001: must be in the model's range"),
        ({"start": 10.0}, "use grid='log-linear'"),
        ({"prediction_type": "flow_prediction", "start": 1.5}, r"times in \(0, 1\]"),
        ({"prediction_type": "flow_prediction", "grid": "trailing"}, "not one of flow, karras"),
        ({"final_sigmas_type": "none"}, "zero, sigma_min"),
        ({"plan": ls.solvers.ddim((80.0, 1.0, 0.0))}, "sigma = 80 is outside the model's range"),
        ({"plan": ls.solvers.ddim((10.0, 0.001, 0.0))}, "sigma = 0.001 is outside the model's range"),
        ({"plan": THREE, "gamma": 1.7}, r"plan with gamma: .* \(plan=None, or gamma=None\)"),
        ({"plan": THREE, "solver": "dpmpp"}, r"plan with solver: .* or solver='ge'\)"),
        ({"plan": THREE, "mu": 0.5, "grid": "karras"}, r"plan with mu, grid: .* or mu=0.0, grid=None\)"),
        ({"plan": "nowhere.json"}, "is no file"),
        ({"plan": "{"}, "not JSON"),
        ({"plan": {"5": ls.solvers.ddim((10.0, 1.0, 0.0))}}, "key each plan"),
        ({"plan": [ls.solvers.ddim((10.0, 1.0, 0.0))] * 2}, "two plans have 2"),
        ({"plan": 3}, "is a int"),
        ({"trained_betas": [0.1]}, "make them equal"),
    ],
)
def test_configs_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(**{**SD, **options})


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"gamma": [2.0, 2.0]}, {"num_inference_steps": 6}, "gamma has 2 values: 4 of the 6 steps use one"),
        (
            {"plan": THREE},
            {"num_inference_steps": 50},
            "call with num_inference_steps=3",
        ),
        ({"plan": ls.solvers.ddim((9.0, 1.0, 0.0))}, {"timesteps": [900, 10]}, "plan=None"),
        ({}, {}, "needs num_inference_steps, timesteps or sigmas"),
        ({}, {"num_inference_steps": 0}, "at least 1"),
        ({}, {"num_inference_steps": 5.0}, "num_inference_steps = 5.0: must be an integer, at least 1"),
        ({}, {"num_inference_steps": "5"}, "num_inference_steps = '5': must be an integer, at least 1"),
        ({}, {"timesteps": 5}, "timesteps = 5: give a list of numbers"),
        ({}, {"num_inference_steps": 1001}, "1000 timesteps; use fewer"),
        ({}, {"timesteps": [1000, 5]}, r"outside \[0, 999\]"),
        ({}, {"timesteps": [5, 900]}, "strictly decrease"),
        ({}, {"timesteps": [900, 5], "sigmas": [9.0, 0.0]}, "give one of them"),
        ({}, {"num_inference_steps": 3, "timesteps": [900, 5]}, "makes 2 steps"),
        ({}, {"sigmas": [80.0, 1.0, 0.0]}, "sigma = 80 is outside"),
        ({}, {"sigmas": [8.0]}, "has no step"),
        ({"prediction_type": "flow_prediction"}, {"sigmas": [1.2, 0.5]}, r"times in \(0, 1\]"),
        ({"prediction_type": "flow_prediction"}, {"timesteps": [1200, 500]}, r"outside \[0, 1000\]"),
    ],
)
def test_calls_that_are_refused(options: dict[str, Any], call: dict[str, Any], message: str) -> None:
    scheduler = Scheduler(**{**SD, **options})
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**call)


OTHERS = [
    name
    for name in (
        *("CMStochasticIterativeScheduler", "LCMScheduler", "TCDScheduler", "SCMScheduler", "FlowMatchLCMScheduler"),
        *("PiflowScheduler", "HeliosScheduler", "HeliosDMDScheduler", "MiniMaxH3Scheduler", "IPNDMScheduler"),
        *("KarrasVeScheduler", "ScoreSdeVeScheduler", "DDPMWuerstchenScheduler", "LTXEulerAncestralRFScheduler"),
        *("BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"),
    )
    if hasattr(diffusers, name)
]


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_another_kind_are_refused(name: str) -> None:
    """MiniMax-H3's velocity has the other sign, IPNDM's betas are a sine, ...: taken for DDPM they would make noise.

    A scheduler that was never saved has no name in its config, so both forms are asked.
    """
    stock = getattr(diffusers, name)()
    assert "_class_name" not in stock.config
    with pytest.raises(ValueError, match=r"this config says neither betas .* keep its own scheduler"):
        Scheduler.from_config(stock.config)
    stock.to_json_string()  # which writes the name into the config
    with pytest.raises(ValueError, match=rf"{name} says neither betas .* keep its own scheduler"):
        Scheduler.from_config(stock.config)


def test_a_scheduler_of_nobody_says_its_prediction() -> None:
    theirs = {"_class_name": "OurLabsScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    with pytest.raises(ValueError, match=r"OurLabsScheduler says neither .* add prediction_type"):
        Scheduler.from_config(theirs)
    scheduler = Scheduler.from_config(theirs, prediction_type="flow_prediction")
    scheduler.set_timesteps(4)
    assert scheduler.plan.sigmas == ls.grids.flow(4, 3.0)


def test_noise_twice_and_late_begins_are_refused() -> None:
    scheduler = made(mu=0.5)
    scheduler.set_timesteps(5)
    x = state()
    with pytest.raises(ValueError, match="mu=0"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5)
    with pytest.raises(ValueError, match=r"begin_index = 5: must be in \[0, 4\]"):
        scheduler.set_begin_index(5)


def test_a_missing_or_old_diffusers_is_one_clear_line(monkeypatch) -> None:
    code = """
import sys
sys.modules["diffusers"] = None
try:
    from logsnr.adapters import GradientEstimationScheduler
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "pip install 'logsnr[diffusers]'" in done.stdout
    monkeypatch.setattr(diffusers, "__version__", "0.20.0")
    with pytest.raises(ls.LogsnrError, match=r"needs diffusers 0.31 or later, found 0.20.0"):
        logsnr.adapters.GradientEstimationScheduler  # noqa: B018
