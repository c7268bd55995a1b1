"""The scheduler by itself: what diffusers tests of its own schedulers, and the arithmetic of its steps."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from scheduling import KINDS, SD, SHAPE, ByFormula, Scheduler, loop, made, network, relative, state
from torch.utils._python_dispatch import TorchDispatchMode

import logsnr as ls
from logsnr.noise import alpha_s

diffusers = pytest.importorskip("diffusers")


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
        a, *estimate = scheduler.step(network(x, t), t, x, return_dict=False)
        assert len(estimate) == (kind != "flow_prediction")
        out = scheduler.step(network(x, t), t, x)
        assert a.shape == x.shape
        assert a.dtype == dtype
        assert torch.equal(a, out.prev_sample)
        assert out.to_tuple() == (out.prev_sample,)
        assert out.pred_original_sample.shape == x.shape


@pytest.mark.parametrize(
    "limits",
    [{}, {"clip_sample": True, "clip_sample_range": 0.8}, {"thresholding": True}],
    ids=["free", "clip", "threshold"],
)
def test_the_denoised_image_of_a_step_is_ddims(limits: dict[str, Any]) -> None:
    stock = diffusers.DDIMScheduler(**SD, **{"clip_sample": False, **limits})
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    t, x = ours.timesteps[3], state()
    a, b = (one.step(network(x, t), t, x).pred_original_sample for one in (ours, stock))
    assert relative(a, b) < 1e-6
    most = limits.get("clip_sample_range", 1.0)
    assert float(b.abs().max()) == pytest.approx(most) if limits else float(b.abs().max()) > 1  # the limit acts


def test_a_tuple_has_the_estimate_second() -> None:
    """As DDIM's and Euler's do (PixArt's single step takes it); it is formed when somebody looks."""
    scheduler = made("v_prediction")
    scheduler.set_timesteps(5)
    x, t = state(), scheduler.timesteps[2]
    whole, pair = (scheduler.step(network(x, t), t, x, return_dict=answer) for answer in (True, False))
    assert isinstance(pair, tuple)
    assert len(pair) == 2
    moved, estimate = pair
    assert torch.equal(moved, whole.prev_sample)
    assert torch.equal(estimate, whole.pred_original_sample)
    assert torch.equal(pair[-1], estimate)
    assert torch.equal(pair[:2][1], estimate)
    assert torch.equal(pair[0], moved)


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
        ours = Scheduler.from_config(stock.config, gamma=1.0)
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
@pytest.mark.parametrize("n", [1, 2, 3, 27, 100, *(pytest.param(n, marks=pytest.mark.heavy) for n in (200, 500, 1000))])
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


@pytest.mark.parametrize("total", [10, 100, 500, 2000])
@pytest.mark.parametrize(("spacing", "to_one"), [("leading", True), ("trailing", True), ("trailing", False)])
def test_other_numbers_of_training_timesteps(total: int, spacing: str, to_one: bool) -> None:
    config = {**SD, "num_train_timesteps": total, "timestep_spacing": spacing, "clip_sample": False}
    stock = diffusers.DDIMScheduler(**config, set_alpha_to_one=to_one)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    assert len(ours) == total
    for scheduler in (ours, stock):
        scheduler.set_timesteps(5)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert relative(loop(ours, state()), loop(stock, state())) < 1e-5


def test_our_defaults_go_back_with_the_config() -> None:
    """DDIM clips by default and we do not: what ran without clipping here runs without it there."""
    back = diffusers.DDIMScheduler.from_config(made(timestep_spacing="trailing").config)
    assert (back.config.clip_sample, back.config.timestep_spacing) == (False, "trailing")
    assert diffusers.EulerDiscreteScheduler.from_config(made().config).config.timestep_spacing == "leading"


@pytest.mark.filterwarnings("ignore:.*this one draws none")
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
    ours = Scheduler.from_config(stock.config, gamma=2.0)
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
    x, noise, t = state(0), state(1), torch.tensor([250.0, 900.0])
    noisy = torch.stack([0.25 * x[0] + 0.75 * noise[0], 0.9 * x[1] + 0.1 * noise[1]])
    assert relative(ours.scale_noise(x, t, noise), noisy) < 1e-6
    assert torch.equal(ours.get_velocity(x, noise, t), x - noise)


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


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_zero_terminal_snr_starts_from_pure_noise_as_ddim_does(kind: str, eta: float) -> None:
    config = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    stock = diffusers.DDIMScheduler(**config, prediction_type=kind)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
        results.append(loop(scheduler, state(), eta=eta, generator=torch.Generator().manual_seed(2)))
    assert ours.plan.sigmas[0] == math.inf
    assert relative(*results) < 1e-5
    both = Scheduler.from_config(stock.config, gamma=2.0)
    both.set_timesteps(10)
    assert relative(loop(both, state()), ls.sample(ByFormula(both), both.plan, noise=state())) < 1e-5


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
