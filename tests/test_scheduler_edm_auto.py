"""The scheduler on EDM models, and gamma="auto": the best plans known inside any pipeline."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import logsnr as ls
import logsnr.adapters
from logsnr.adapters.diffusers.scheduler.plan_for import on_table
from logsnr.noise import alpha_s
from logsnr.predictions import EDM
from logsnr.sampling import default
from logsnr.sampling.default import auto_plan, default_plan
from logsnr.sampling.universal import LARGE, scaled, universal_plan

diffusers = pytest.importorskip("diffusers")
Scheduler = logsnr.adapters.GradientEstimationScheduler

SHAPE = (2, 3, 4, 4)


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.8 * x + 0.3 * torch.sin(3 * t))


def state(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def loop(scheduler, x: Tensor) -> Tensor:
    """What ConsistencyModelPipeline and SDXL's do."""
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def denoiser(sigma_data: float) -> ls.NetworkDenoiser:
    class Network(torch.nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return network(x, label.reshape(-1, 1, 1, 1))

    return ls.NetworkDenoiser(Network(), EDM(sigma_data=sigma_data), shape=SHAPE[1:])


# EDM


@pytest.mark.parametrize(("schedule", "n"), [("karras", 1), ("karras", 2), ("karras", 40), ("exponential", 7)])
def test_edm_at_gamma_1_is_edm_euler(schedule, n):
    options = {"sigma_min": 0.01, "sigma_max": 60.0, "sigma_data": 0.7, "sigma_schedule": schedule, "rho": 5.0}
    stock = diffusers.EDMEulerScheduler(**options)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(n)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-5, atol=0)
    assert relative(loop(ours, state()), loop(stock, state())) <= 1e-5


def test_gradient_estimation_of_edm_is_sample():
    stock = diffusers.EDMDPMSolverMultistepScheduler(sigma_max=40.0, sigma_data=0.7)
    ours = Scheduler.from_config(stock.config, gamma=[1.5, 2.0, 1.8, 1.2])
    ours.set_timesteps(6)
    expected = ls.sample(denoiser(0.7), ours.plan, noise=state())
    assert relative(loop(ours, state()), expected) <= 1e-5
    assert ours.plan.sigmas == pytest.approx(ls.grids.karras(6, 40.0, 0.002))
    # the state of any timestep is z: img2img starts from add_noise
    t, x, eps = ours.timesteps[2], state(1), state(2)
    alpha, s = alpha_s(ours.plan.sigmas[2])
    torch.testing.assert_close(ours.add_noise(x, eps, t.reshape(1)), alpha * x + s * eps, rtol=1e-5, atol=1e-6)


def test_edm_configs_round_trip(tmp_path):
    stock = diffusers.EDMEulerScheduler(sigma_data=0.3, sigma_max=50.0)
    ours = Scheduler.from_config(stock.config)
    ours.save_pretrained(tmp_path)
    for other in (Scheduler.from_pretrained(tmp_path), Scheduler.from_config(ours.config), copy.deepcopy(ours)):
        assert other.model.prediction == EDM(sigma_data=0.3)
        assert other.model.sigma_range == (0.002, 50.0)
    back = diffusers.EDMEulerScheduler.from_config(json.loads(ours.to_json_string()))
    assert all(back.config[key] == value for key, value in stock.config.items() if key[0] != "_")
    with pytest.raises(ValueError, match="keep its own scheduler"):
        Scheduler.from_config({"sigma_data": 0.5})  # a consistency model's config has one too


@pytest.mark.parametrize("stock", [diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()])
def test_a_spread_makes_no_model_of_another_kind(stock, tmp_path):
    """sigma_data given to the scheduler of an eps or flow network is the unit of universal plans and nothing else."""
    plain = Scheduler.from_config(stock.config)
    ours = Scheduler.from_config(stock.config, sigma_data=0.3, gamma="auto")
    ours.save_pretrained(tmp_path)
    for other in (ours, Scheduler.from_pretrained(tmp_path), Scheduler.from_config(ours.config)):
        assert not other.model.edm
        assert type(other.model.prediction) is type(plain.model.prediction)
        assert other.model.sigma_range == plain.model.sigma_range
        other.set_timesteps(5)
        low, high = other.model.sigma_range
        known = {"sigma_data": 0.3, "finite_at_inf": other.model.prediction.finite_at_inf}
        expected = auto_plan(5, max(low, 0.3 / 250), min(high, 1000 * 0.3), **known)
        table = other.model.table
        if high == math.inf:
            expected = replace(expected, sigmas=(high, *expected.sigmas[1:]), rows=((1.0,), *expected.rows[1:]))
        assert other.plan == (expected if table is None else on_table(expected, table))
    edm = Scheduler.from_config(diffusers.EDMEulerScheduler(sigma_data=0.5).config, sigma_data=0.7)
    assert edm.model.prediction == EDM(sigma_data=0.7)
    assert Scheduler(sigma_data=0.3, prediction_type="v_prediction", edm=False).model.sigma_data == 0.3


def test_an_edm_network_is_not_fed_by_a_timestep_of_nobody():
    ours = Scheduler.from_config(diffusers.EDMEulerScheduler().config)
    with pytest.raises(ValueError, match="before set_timesteps"):
        ours.scale_model_input(state(), torch.tensor(0.1))
    ours.set_timesteps(3)
    with pytest.raises(ValueError, match="is not one of this run's"):
        ours.scale_model_input(state(), torch.tensor(0.1234))


# gamma = "auto"

RELATIVE = replace(ls.solvers.ge((60.0, 9.0, 2.0, 0.3, 0.0), gamma=1.7), meta={"made": "for this test"})


@pytest.fixture
def stored(monkeypatch):
    """One universal plan, of four evaluations."""

    def universal_plan(nfe, low, high, *, sigma_data=1.0, dim=None):
        return scaled(RELATIVE, sigma_data, low, high)

    monkeypatch.setattr(default, "universal_sizes", lambda: (RELATIVE.nfe,))
    monkeypatch.setattr(default, "universal_plan", universal_plan)
    monkeypatch.setattr(default, "UNIVERSAL_FROM", 1)


SD = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


@pytest.mark.parametrize(
    ("stock", "unit", "high"),
    [
        (SD, 1.0, 14.6146),
        (diffusers.EDMEulerScheduler(sigma_data=0.5), 0.5, math.inf),
        (diffusers.FlowMatchEulerDiscreteScheduler(), 1.0, math.inf),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 1.0, math.inf),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0), 1.5, math.inf),
    ],
    ids=["sd", "edm", "flow", "flow, shift 3", "flow, shift 6"],
)
def test_auto_is_the_universal_plan_in_the_models_units(stored, stock, unit, high):
    ours = Scheduler.from_config(stock.config, gamma="auto")
    ours.set_timesteps(4)
    low = ours.model.sigma_range[0] if high < math.inf else 0.0
    largest = ours.model.sigma_range[1]
    expected = scaled(RELATIVE, unit, low, min(largest, 1000 * unit))
    assert ours.plan.rows == expected.rows
    near = 0.01 if stock is SD else 1e-5  # of a table's levels the nearest
    assert ours.plan.sigmas[0] == pytest.approx(largest)
    assert ours.plan.sigmas[1:] == pytest.approx([unit * u for u in RELATIVE.sigmas[1:]], rel=near)
    # a number that has none: gradient estimation over the same range, in the same units
    ours.set_timesteps(6)
    known = ours.model.prediction.finite_at_inf
    low, high = max(ours.model.sigma_range[0], unit / 250), min(largest, 1000 * unit)
    expected = default_plan(6, low, high, sigma_data=unit, finite_at_inf=known)
    assert ours.plan.rows == expected.rows
    assert ours.plan.sigmas[1:] == pytest.approx(expected.sigmas[1:], rel=near)


def test_auto_takes_the_plans_that_come_with_the_library():
    """The universal ones from four evaluations to twelve; those for large samples where a flow's shift says so."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    for stock, dim in ((SD, None), (flow(), None), (flow(shift=3.0), LARGE)):
        ours = Scheduler.from_config(stock.config, gamma="auto")
        low, high = ours.model.sigma_range
        for n in (4, 8, 12):
            ours.set_timesteps(n)
            expected = universal_plan(n, max(low, 1 / 250), min(high, 1000), dim=dim)
            if ours.model.table is not None:
                expected = on_table(expected, ours.model.table)
            assert ours.plan.rows[1:] == expected.rows[1:]
            assert ours.plan.rows[0] == pytest.approx((1.0,), abs=3e-3)
            assert ours.plan.sigmas[0] == high  # a flow's t = 1
            assert ours.plan.sigmas[1:] == pytest.approx(expected.sigmas[1:], rel=1e-6)
        for n in (3, 13, 50):
            ours.set_timesteps(n)
            assert ours.plan.meta["solver"] == "default"
            assert ours.plan.sigmas[0] == high


@pytest.mark.parametrize("stock", [SD, diffusers.FlowMatchEulerDiscreteScheduler()], ids=["sd", "flow"])
def test_auto_on_levels_that_it_is_told_is_what_the_default_is_on_its_own(stock):
    ours, basis = Scheduler.from_config(stock.config), "eps" if stock is SD else "velocity"
    for n in (12, 13):
        given = (
            {"timesteps": [990 - 50 * i for i in range(n)]} if stock is SD else {"sigmas": [0.95**i for i in range(n)]}
        )
        ours.set_timesteps(**given)
        grid = ours.plan.sigmas
        expected = ls.solvers.ge(grid, 1.7, basis=basis) if n == 12 else ls.solvers.ipndm(grid, 4, basis)
        assert (ours.plan.rows, ours.plan.basis) == (expected.rows, basis)


def test_auto_visits_levels_that_the_table_has():
    """Pipelines index alphas_cumprod by the timestep: all are whole, and differ, to the last that fit."""
    for stock in (SD, diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")):
        ours = Scheduler.from_config(stock.config)
        for n in (1, 4, 8, 50, 300):
            ours.set_timesteps(n)
            assert ours.timesteps.dtype == torch.int64
            steps = ours.timesteps.tolist()
            assert len(set(steps)) == n
            assert steps == sorted(steps, reverse=True)
            abar = ours.alphas_cumprod.double()[steps]
            assert ours.plan.sigmas[:-1] == pytest.approx(((1 - abar) / abar).sqrt().tolist(), rel=1e-3)
        assert ours.timesteps[0] == 999
    ours.set_timesteps(1000)
    assert len(ours.timesteps) == 1000  # one more than fit between the table's ends: between its levels


def test_who_asks_for_nothing_gets_auto(tmp_path):
    """A pipeline's own timestep spacing is no wish; its Karras levels, or any option of ours, are."""
    ours = Scheduler.from_config(SD.config)
    assert ours.config.gamma == "auto"
    ours.save_pretrained(tmp_path)
    assert Scheduler.from_pretrained(tmp_path).config.gamma == "auto"
    karras = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    for asked in (
        Scheduler.from_config(karras.config),
        Scheduler.from_config(SD.config, timestep_spacing="trailing"),
        Scheduler.from_config(SD.config, solver="unipc"),
        Scheduler.from_config(SD.config, grid="karras"),
        Scheduler.from_config(Scheduler(timestep_spacing="trailing").config),
        Scheduler(),
    ):
        assert asked.config.gamma is None
    # what was not asked for gives way to a wish
    plan = ls.solvers.ge((9.0, 1.0, 0.0))
    for wish in ({"plan": plan}, {"grid": "karras"}, {"solver": "unipc"}, {"timestep_spacing": "trailing"}):
        assert Scheduler.from_config(ours.config, **wish).config.gamma is None


def test_auto_starts_and_ends_where_it_is_told():
    sd = Scheduler.from_config(SD.config, start=9.0, end=0.1)
    flow = Scheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config, start=0.9, end=0.1)
    for ours, high, low in ((sd, 9.0, 0.1), (flow, 9.0, 1 / 9)):
        assert ours.config.gamma == "auto"
        for n in (5, 8):
            ours.set_timesteps(n)
            near = 0.01 if ours is sd else 1e-6  # of a table's levels the nearest
            assert ours.plan.sigmas == pytest.approx(auto_plan(n, low, high).sigmas, rel=near)
            assert min(ours.plan.sigmas[:-1]) >= low * 0.99
    for wrong in ({"start": 1e6}, {"end": 1e-6}, {"start": 0.1, "end": 9.0}):
        with pytest.raises(ValueError, match=r"must be in the model's range|a run goes down"):
            Scheduler.from_config(SD.config, **wrong)
    with pytest.raises(ValueError, match=r"times in \(0, 1\]"):
        Scheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config, start=9.0)


def test_auto_runs_as_sample_does(stored):
    ours = Scheduler.from_config(diffusers.EDMEulerScheduler(sigma_data=0.7).config, gamma="auto")
    ours.set_timesteps(4)
    assert ours.plan.meta["made"] == "for this test"
    assert relative(loop(ours, state()), ls.sample(denoiser(0.7), ours.plan, noise=state())) <= 1e-5


def test_auto_is_kept_and_takes_levels_of_others(stored, tmp_path):
    ours = Scheduler.from_config(SD.config, gamma="auto")
    ours.set_timesteps(4)
    ours.save_pretrained(tmp_path)
    others = (Scheduler.from_pretrained(tmp_path), Scheduler.from_config(ours.config), pickle.loads(pickle.dumps(ours)))
    for other in others:
        assert other.config.gamma == "auto"
        other.set_timesteps(4)
        assert other.plan == ours.plan
    for levels in ({"timesteps": [900, 500, 100, 5]}, {"sigmas": [9.0, 3.0, 1.0, 0.3, 0.0]}):
        ours.set_timesteps(**levels)
        plain = Scheduler.from_config(SD.config, gamma=default.GAMMA)
        plain.set_timesteps(**levels)
        assert ours.plan == plain.plan
    flow = Scheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config, gamma="auto")
    flow.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # a pipeline's default: "your grid"
    assert flow.plan.rows == RELATIVE.rows


# names


def test_adapters_names_load_when_asked_for():
    """Importing logsnr and its adapters imports no diffusers; k-diffusion and from_callable never do."""
    code = """
import sys
sys.modules["diffusers"] = None
import torch, logsnr, logsnr.adapters as adapters
from logsnr.adapters import as_kdiffusion, export_diffusers, from_callable, load_pipeline, sample_gradient_estimation
for name in adapters.__all__:
    if name != "GradientEstimationScheduler":
        assert getattr(adapters, name).__name__ == name
denoiser = from_callable(lambda x, label: 0 * x, logsnr.predictions.V(label="flow"), shape=(2,))
model = as_kdiffusion(denoiser)
x = sample_gradient_estimation(model, 5 * torch.ones(1, 2), [5.0, 1.0, 0.0])
assert x.shape == (1, 2)
for call in (lambda: load_pipeline("x"), lambda: export_diffusers(denoiser, "x"), lambda: adapters.nothing):
    try:
        call()
    except (logsnr.LogsnrError, AttributeError) as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("pip install 'logsnr[diffusers]'" in line for line in lines[:2])
    assert lines[2] == "module 'logsnr.adapters' has no attribute 'nothing'"
