"""What the scheduler refuses, each with its fix in the message."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import pytest
from scheduling import SD, Scheduler, made, state

import logsnr as ls
import logsnr.adapters
from logsnr.adapters.diffusers.classes import REFUSED
from logsnr.adapters.diffusers.scheduler.arguments import PRIVATE

diffusers = pytest.importorskip("diffusers")

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
        ({"sigma_data": 0.5, "prediction_type": "v_prediction"}, "an EDM network is 'epsilon'.* edm=False if"),
        ({"sigma_data": -0.5}, r"sigma_data = -0.5: must be in \(0, inf\)"),
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
            {"lambda_min_clipped": 10.0},
            r"lambda_min_clipped = 10.0: .* up to 3\.\d+, where two are left; -5.1",
        ),
        ({"lambda_min_clipped": math.nan}, "lambda_min_clipped = nan: levels above"),
        (
            {"grid": "karras", "start": 20.0},
            r"start = 20.0: must be in the model's range of sigma, \[0.0291675, 14.6146\]",
        ),
        ({"grid": "log-linear", "end": 1e-3}, "end = 0.001: must be in the model's range"),
        ({"start": 10.0}, "use grid='log-linear'"),
        ({"prediction_type": "flow_prediction", "start": 1.5}, r"times in \(0, 1\]"),
        (
            {"prediction_type": "flow_prediction", "grid": "trailing"},
            "not one of log-linear, karras, flow, angles, beta, which this flow model has",
        ),
        ({"final_sigmas_type": "none"}, "zero, sigma_min"),
        ({"plan": ls.solvers.ddim((80.0, 1.0, 0.0))}, "sigma = 80 is outside the model's range"),
        ({"plan": ls.solvers.ddim((10.0, 0.001, 0.0))}, "sigma = 0.001 is outside the model's range"),
        (
            {"plan": ls.solvers.ddim((14.8, 1.0, 0.0))},
            r"sigma = 14.8 is outside the model's range \[0.0291675, 14.6146\]",
        ),
        ({"plan": ls.solvers.ddim((10.0, 0.0287, 0.0))}, "sigma = 0.0287 is outside the model's range"),
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


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(diffusers, name)])
def test_models_of_another_kind_are_refused(name: str) -> None:
    """MiniMax-H3's velocity has the other sign, IPNDM's betas are a sine, ...: taken for DDPM they would make noise.

    A scheduler that was never saved has no name in its config, so both forms are asked.
    """
    reason = re.escape(f": {REFUSED[name]}; keep it, or wrap its network in logsnr.NetworkDenoiser")
    with pytest.raises(ValueError, match=name + reason):
        Scheduler.from_config({"_class_name": name})
    try:
        stock = getattr(diffusers, name)()
    except (TypeError, ImportError):  # it needs arguments, or torchsde
        return
    assert "_class_name" not in stock.config
    if name == "FlowMapEulerDiscreteScheduler":  # its options are those of FlowMatchHeun's
        return
    with pytest.raises(ValueError, match=r"Scheduler" + reason):  # some share their options, and the reason
        Scheduler.from_config(stock.config)


def test_a_scheduler_of_nobody_says_its_prediction() -> None:
    theirs = {"_class_name": "OurLabsScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    with pytest.raises(ValueError, match=r"OurLabsScheduler says neither .* add prediction_type"):
        Scheduler.from_config(theirs)
    scheduler = Scheduler.from_config(theirs, prediction_type="flow_prediction", gamma=2.0)
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


@pytest.mark.parametrize("name", PRIVATE)
def test_parts_that_pipelines_reach_into_are_refused_in_words(name: str) -> None:
    """Those of diffusers' schedulers that ours has not: the loops that read them hold other states, or draw noise."""
    scheduler = made(sigma_data=0.5)
    with pytest.raises(AttributeError, match="keep the pipeline's own scheduler"):
        getattr(scheduler, name)
    assert not hasattr(scheduler, name)
    assert not hasattr(scheduler, "anything_else")


def test_the_latent_upscalers_loop_is_refused() -> None:
    """It asks for Euler's factor 1/sqrt(1 + sigma^2) by scaling sigma, and adds it to states x + sigma eps."""
    scheduler = made()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"got one number.* keep its own scheduler"):
        scheduler.scale_model_input(scheduler.sigmas[0], scheduler.timesteps[0])


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
    with pytest.raises(ls.LogsnrError, match=r"needs diffusers 0.37 or later, found 0.20.0"):
        logsnr.adapters.GradientEstimationScheduler  # noqa: B018
