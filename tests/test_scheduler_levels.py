"""Where the scheduler steps: explicit levels, shifts, named grids, stored plans."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from scheduling import SD, Scheduler, made

import logsnr as ls

diffusers = pytest.importorskip("diffusers")


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


@pytest.mark.parametrize("flag", [{}, {"use_karras_sigmas": True}], ids=["flow", "karras"])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifts_and_their_terminal_are_flow_match_eulers(kind: str, flag: dict[str, bool]) -> None:
    """LTX: shifted by the pipeline's mu, stretched to end at shift_terminal, then respaced."""
    options = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": 0.1}
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**options, **flag)
    stock.set_timesteps(sigmas=[1 - i / 5 for i in range(5)], mu=0.9)
    ours = Scheduler.from_config(stock.config)
    for call in ({"num_inference_steps": 5}, {"sigmas": [1 - i / 5 for i in range(5)]}):
        ours.set_timesteps(**call, mu=0.9)
        assert torch.allclose(ours.sigmas, stock.sigmas, atol=1e-6)
        assert torch.allclose(ours.timesteps, stock.timesteps, atol=1e-3)


def test_a_flow_grid_that_starts_below_noise_is_spaced_before_its_shift() -> None:
    ours = made("flow_prediction", shift=3.0, start=0.75)
    ours.set_timesteps(4)
    # sigma 3 over the shift is 1, time 1/2; a quarter of it at a time
    times = [0.5, 0.375, 0.25, 0.125]
    assert ours.plan.sigmas == pytest.approx([*(3 * t / (1 - t) for t in times), 0.0])


def test_ends_of_a_config_and_of_its_rho() -> None:
    """sigma_min, sigma_max and rho of a stock config are the ends and the bend of its Karras levels."""
    stock = diffusers.HeunDiscreteScheduler(**SD, use_karras_sigmas=True)
    ours = Scheduler.from_config(stock.config, sigma_min=0.1, sigma_max=9.0, rho=4.0)
    ours.set_timesteps(6)
    assert ours.plan.sigmas == pytest.approx(ls.grids.karras(6, 9.0, 0.1, rho=4.0))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_one_step_starts_from_noise(spacing: str) -> None:
    """Stock schedulers with leading spacing start at timestep 0, where there is nothing to do."""
    ours = made(timestep_spacing=spacing, steps_offset=1)
    ours.set_timesteps(1)
    assert ours.timesteps.tolist() == [999]
    assert ours.plan.sigmas[-1] == 0


def test_karras_levels_of_a_model_that_starts_from_pure_noise() -> None:
    ours = made("v_prediction", rescale_betas_zero_snr=True, grid="karras")
    low, high = float(ours.model.table.sigmas[0]), float(ours.model.table.sigmas[-2])
    ours.set_timesteps(5)
    assert ours.timesteps[0] == 999
    assert ours.plan.sigmas == pytest.approx((math.inf, *ls.grids.karras(4, high, low)))
    ours.set_timesteps(1)
    assert ours.plan.sigmas == (math.inf, 0.0)


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
