"""Everything that stock schedulers are given, at construction, later and in calls: followed as they do, or refused."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import pathlib
import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pipelining import unet
from scheduling import SD, SHAPE, Scheduler, loop, made, network, relative, state

import logsnr as ls
from logsnr.adapters.diffusers.classes import HARMLESS, MODEL, REFUSED, SUPPORTED
from logsnr.adapters.diffusers.scheduler.arguments import FOREIGN
from logsnr.adapters.diffusers.stock import class_of

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:.*this one draws none")
NOISY = pytest.mark.filterwarnings("default:.*this one draws none")


def parameters(function: Any) -> dict[str, Any]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = list(inspect.signature(function).parameters.values())
    return {one.name: one.default for one in found if one.kind not in kinds and one.name != "self"}


def installed() -> dict[str, Any]:
    """Every scheduler class of diffusers."""
    everything = {name: getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers)}
    mixin = diffusers.schedulers.scheduling_utils.SchedulerMixin
    return {
        name: one
        for name, one in everything.items()
        if inspect.isclass(one) and name.endswith("Scheduler") and (issubclass(one, mixin) or "dummy" in one.__module__)
    }


STOCK = {name: one for name, one in installed().items() if name in SUPPORTED and "dummy" not in one.__module__}
QUICK = [name for name in STOCK if "KDPM2" not in name]  # these take a second each to make; their options are LMS's


# Every class, every key, every argument


def test_every_scheduler_class_is_supported_or_refused_with_its_reason() -> None:
    assert SUPPORTED.keys().isdisjoint(REFUSED)
    assert installed().keys() <= SUPPORTED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", QUICK)
def test_every_option_of_a_supported_class_is_one_of_ours_or_harmless(name: str) -> None:
    ours, theirs = parameters(Scheduler), parameters(STOCK[name])
    assert theirs.keys() <= ours.keys() | HARMLESS
    assert HARMLESS.isdisjoint(ours)
    stock = STOCK[name]()
    ours = Scheduler.from_config(stock.config)
    for key, value in theirs.items():
        if key not in HARMLESS and value is not None:
            assert ours.config[key] == SUPPORTED[name].implied.get(key, value), key
    assert class_of(stock.config) == name or parameters(STOCK[class_of(stock.config)]).keys() == theirs.keys()


PASSED = {
    "step": "step",
    "prepare_extra_step_kwargs": "step",
    "set_timesteps": "set_timesteps",
    "retrieve_timesteps": "set_timesteps",
    "add_noise": "add_noise",
    "scale_noise": "scale_noise",
    "scale_model_input": "scale_model_input",
}
RETRIEVED = {"scheduler", "num_inference_steps", "device", "timesteps", "sigmas"}  # of retrieve_timesteps itself


CALL = re.compile(rf"(?<!def )(?<!\w)({'|'.join(PASSED)})\(")
PARENTHESIS = re.compile(r"[()]")
FILLED = re.compile(r"(extra_step_kwargs|extra_set_kwargs)\[\"(\w+)\"\] =")


@functools.cache
def keywords(arguments: str) -> tuple[str, ...]:
    call = ast.parse(f"f({arguments})", mode="eval").body
    assert isinstance(call, ast.Call)
    return tuple(word.arg for word in call.keywords if word.arg is not None)


def calls(folder: pathlib.Path) -> dict[tuple[str, str], set[str]]:
    """(method, keyword) of every call of a scheduler's method in a folder, with the files that hold it."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in folder.rglob("*.py"):
        text = file.read_text()
        for match in CALL.finditer(text):
            method, start = match[1], match.end()
            if method == "step" and "scheduler" not in text[match.start() - 40 : match.start()].split()[-1]:
                continue
            depth, end = 1, start
            while depth:
                end = PARENTHESIS.search(text, end).end()
                depth += 1 if text[end - 1] == "(" else -1
            for keyword in keywords(text[start : end - 1]):
                if method != "retrieve_timesteps" or keyword not in RETRIEVED:
                    found.setdefault((PASSED[method], keyword), set()).add(file.name)
        for where, keyword in FILLED.findall(text):
            found.setdefault(("step" if "step" in where else "set_timesteps", keyword), set()).add(file.name)
    return found


def test_every_argument_that_a_pipeline_passes_is_handled_or_refused_in_words() -> None:
    """Read from the source of the installed pipelines: a new argument fails this until it is in one of the two."""
    root = pathlib.Path(diffusers.__file__).parent
    found = calls(root / "modular_pipelines") | calls(root / "pipelines")
    assert {("step", "eta"), ("step", "per_token_timesteps"), ("set_timesteps", "mu")} <= found.keys()
    for (method, keyword), files in found.items():
        handled = parameters(getattr(Scheduler, method))
        foreign = FOREIGN.get(method, {})
        assert keyword in handled or keyword in foreign, f"{method}({keyword}=...) of {sorted(files)[:3]}"


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in FOREIGN for name in FOREIGN[method]])
def test_arguments_of_other_schedulers_are_refused_by_name(method: str, name: str) -> None:
    scheduler, x = made(), state()
    scheduler.set_timesteps(3)
    call = {
        "step": lambda **more: scheduler.step(x, scheduler.timesteps[0], x, **more),
        "set_timesteps": lambda **more: scheduler.set_timesteps(3, **more),
        "add_noise": lambda **more: scheduler.add_noise(x, x, torch.tensor([5, 5]), **more),
    }[method]
    call(**{name: None})
    what = FOREIGN[method][name]
    fix = "" if ";" in what else "; drop it, or keep the pipeline's own scheduler"
    with pytest.raises(ValueError, match="^" + re.escape(f"{method} got {name}: {what}{fix}") + "$"):
        call(**{name: torch.ones(1)} if name != "num_train_timesteps" else {name: [7]})


def test_an_argument_that_no_scheduler_has_is_called_misspelt() -> None:
    scheduler, x = made(), state()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="step got verbosity, which no scheduler here takes: check its spelling, or"):
        scheduler.step(x, scheduler.timesteps[0], x, verbosity=2)
    with pytest.raises(ValueError, match=r"step got s_churn = 2\.0: noise beside the plan's; give the scheduler mu"):
        scheduler.step(x, scheduler.timesteps[0], x, s_churn=2.0)


# Levels


@pytest.mark.parametrize("name", [name for name, one in SUPPORTED.items() if one.skip_last and name in STOCK])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_spacings_of_dpm_solvers_kin_are_theirs(name: str, spacing: str, n: int) -> None:
    """n + 1 points without the last: no evaluation is spent at t = 0 (PixArt's config)."""
    options = {"timestep_spacing": spacing} if "timestep_spacing" in parameters(STOCK[name]) else {}
    stock = STOCK[name](**SD, **options)
    stock.set_timesteps(n)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    ours.set_timesteps(n)
    if n == 1 and options and spacing == "leading":
        assert ours.timesteps.tolist() == [999]  # theirs starts at t = 500
        return
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    assert torch.allclose(ours.sigmas, stock.sigmas.float(), rtol=1e-5)
    if options:  # a spacing that such a config states is a wish
        ours = Scheduler.from_config(stock.config)
        ours.set_timesteps(n)
        assert ours.timesteps.tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_levels_above_a_clipped_lambda_are_left_off(spacing: str) -> None:
    config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": spacing}
    stock = diffusers.DPMSolverMultistepScheduler(**config)
    stock.set_timesteps(8)
    ours = Scheduler.from_config(stock.config)
    ours.set_timesteps(8)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    assert ours.plan.sigmas[0] < math.exp(5.1) < ours.model.sigma_range[1]


@pytest.mark.parametrize("ends", [{"sigma_max": 200.0, "sigma_min": 0.01}, {}], ids=["cosmos", "table"])
def test_karras_levels_of_flows_by_unipc_are_noise_to_signal_ratios(ends: dict[str, float]) -> None:
    config = {"use_karras_sigmas": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    stock = diffusers.UniPCMultistepScheduler(**config, **ends)
    ours = Scheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    assert torch.allclose(ours.sigmas, stock.sigmas.float(), atol=1e-6)
    assert torch.allclose(ours.timesteps, stock.timesteps.float(), atol=1)  # theirs are cut to integers


def test_a_shift_given_last_wins() -> None:
    """The idiom of Wan's model cards, FlowMatchEuler's own, and what DPM-Solver's kin keep of another scheduler."""
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    by_call = Scheduler.from_config(config)
    by_call.set_shift(7.0)
    later = Scheduler.from_config(config)
    later.register_to_config(flow_shift=7.0)
    direct = Scheduler.from_config(config, flow_shift=3.0)
    direct.config.shift = 7.0
    unipc = diffusers.UniPCMultistepScheduler.from_config(
        config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0
    )
    assert unipc.config.shift == 3.0
    for ours in (
        Scheduler.from_config(config, flow_shift=7.0),
        Scheduler.from_config(config, shift=7.0),
        Scheduler.from_config(unipc.config, gamma=2.0),
        *(by_call, later, direct),
    ):
        ours.set_timesteps(4)
        assert ours.plan.sigmas == pytest.approx(ls.grids.flow(4, 7.0))
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(by_call.config)
    assert back.shift == 7.0
    with pytest.raises(ValueError, match=r"shift = 3.0 and flow_shift = 7.0: give one of the two"):
        made("flow_prediction", shift=3.0, flow_shift=7.0)
    with pytest.raises(ValueError, match="only the levels of flows have a shift"):
        made().set_shift(3.0)
    with pytest.raises(ValueError, match=r"use_dynamic_shifting=False"):
        made("flow_prediction", use_dynamic_shifting=True).set_shift(3.0)


@pytest.mark.parametrize("shifting", [{"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"shift": 3.0}])
def test_a_pair_of_timesteps_and_sigmas_is_labels_and_levels(shifting: dict[str, Any]) -> None:
    """CogView4: labels are not shifted, levels are, once."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**shifting)
    t = np.linspace(1000, 1.0, 5).astype(np.int64).astype(np.float32)
    states = []
    for scheduler in (Scheduler.from_config(stock.config, gamma=1.0), stock):
        scheduler.set_timesteps(timesteps=t, sigmas=t / 1000, mu=1.75)
        assert scheduler.timesteps.tolist() == t.tolist()
        states.append(loop(scheduler, state()))
        noisy = scheduler.scale_noise(state(1), scheduler.timesteps[2:3].expand(2), state(2))
        states.append(noisy)
        assert torch.allclose(scheduler.sigmas, stock.sigmas if scheduler is stock else scheduler.sigmas)
    assert relative(states[0], states[2]) < 1e-6
    assert relative(states[1], states[3]) < 1e-6
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    with pytest.raises(ValueError, match="5 timesteps for 4 sigmas: give one label for each level"):
        ours.set_timesteps(timesteps=t, sigmas=t[:4] / 1000, mu=1.75)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"sigmas": torch.ones(2, 3)}, "sigmas = .*: give a list of numbers"),
        ({}, {"sigmas": [9.0, 9.0, 0.0]}, "strictly decrease"),
        ({}, {"timesteps": [900, 900]}, "strictly decrease"),
        ({"prediction_type": "flow_prediction"}, {"sigmas": [1.0, 0.5, 0.5]}, "strictly decrease"),
        ({"prediction_type": "flow_prediction"}, {"sigmas": [0.0, 0.5, 1.0]}, r"times in \(0, 1\]"),
    ],
)
def test_levels_that_are_none_are_refused(options: dict[str, Any], call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(**{**SD, **options}).set_timesteps(**call)


def test_a_doubled_sigma_max_is_refused_at_once() -> None:
    """Beyond its table SDXL was never trained; stock schedulers go there with the last label."""
    stock = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True, sigma_max=29.2)
    with pytest.raises(ValueError, match=r"sigma_max = 29.2: must be in the model's range of sigma"):
        Scheduler.from_config(stock.config)
    with pytest.raises(ValueError, match=r"its levels are not those of its timesteps"):
        Scheduler.from_config(diffusers.EulerDiscreteScheduler(interpolation_type="log_linear").config)


# Configs that change, come back and are saved


@pytest.mark.parametrize("name", QUICK)
def test_a_stock_scheduler_made_from_ours_is_as_made_from_the_first(name: str) -> None:
    """Whatever the first left at its default, the next one has its own default for."""
    sd15 = {**SD, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
    accepted = {key: value for key, value in sd15.items() if key in parameters(STOCK[name])}
    first = STOCK[name].from_config({} if name == "UnCLIPScheduler" else accepted)
    ours = Scheduler.from_config(first.config)
    again = Scheduler.from_config(ours.config)
    assert {key: value for key, value in again.config.items() if key[0] != "_"} == {
        key: value for key, value in ours.config.items() if key[0] != "_"
    }
    for other in ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", name):
        direct, through, twice = (STOCK[other].from_config(one.config).config for one in (first, ours, again))
        for key in parameters(STOCK[other]):
            implied = key in ("prediction_type", "use_flow_sigmas") and "Flow" in name
            assert implied or through[key] == twice[key] == direct[key], (other, key)


@pytest.mark.parametrize("name", [*QUICK, "ours", "chosen"])
def test_a_saved_and_loaded_config_is_the_first(name: str, tmp_path) -> None:
    """As diffusers tests of its own schedulers; a file that a stock class reads as well has no None."""
    first = {"ours": Scheduler, "chosen": lambda: made(gamma=[1.5, 2.0], solver_options={"final": "ge"})}.get(
        name, lambda: Scheduler.from_config(STOCK[name]().config)
    )()
    first.save_pretrained(tmp_path)
    loaded = Scheduler.from_pretrained(tmp_path)
    expected = dict(first.config)
    expected.pop("_use_default_values", None)
    assert expected == loaded.config
    assert "null" not in (tmp_path / "scheduler_config.json").read_text()
    if name in STOCK:
        for config in (loaded.config, STOCK[name].load_config(tmp_path)):
            back = STOCK[name].from_config(config)
            stock = STOCK[name]()
            same = parameters(STOCK[name]).keys() - HARMLESS - SUPPORTED[name].implied.keys()
            assert all(back.config[key] == stock.config[key] for key in same)


def test_options_changed_later_are_followed_or_refused() -> None:
    scheduler = made(timestep_spacing="trailing")
    scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert math.isinf(scheduler.model.sigma_range[1])
    assert float(scheduler.alphas_cumprod[-1]) == 0
    scheduler.config.timestep_spacing = "linspace"
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[-1] == 0
    with pytest.raises(ValueError, match="zero terminal SNR"):
        scheduler.register_to_config(prediction_type="epsilon")
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.config.clip_sample_range, scheduler.config.clip_sample = -1.0, True
    with pytest.raises(ValueError, match=r"clip_sample_range = -1\.0"):
        scheduler.set_timesteps(5)
    auto = Scheduler.from_config(diffusers.DDIMScheduler().config)
    auto.register_to_config(timestep_spacing="trailing")  # a wish, as in from_config
    assert auto.config.gamma is None
    # what a class does not read does not act, whoever left it there
    heun = diffusers.HeunDiscreteScheduler.from_config({**SD, "set_alpha_to_one": False, "thresholding": True})
    ours = Scheduler.from_config(heun.config, gamma=1.0)
    ours.set_timesteps(5)
    assert (ours.plan.sigmas[-1], ours.config.thresholding) == (0.0, False)


def test_options_set_later_are_kept_as_at_construction() -> None:
    """Tensors, tuples and plans become JSON values by either way of setting them."""
    plan, betas = ls.solvers.ddim((9.0, 5.0, 1.0, 0.0)), torch.linspace(1e-4, 2e-2, 1000)
    for option in (
        {"gamma": torch.tensor([1.5, 2.0])},
        {"gamma": (1.5, 2.0)},
        {"trained_betas": betas},
        {"plan": plan},
    ):
        ((key, value),) = option.items()
        registered, assigned = made(), made()
        registered.register_to_config(**option)
        setattr(assigned.config, key, value)
        want = made(**option).config
        assert registered.config[key] == assigned.config[key] == getattr(assigned.config, key) == want[key]
        assert registered.to_json_string() == assigned.to_json_string()


def test_an_option_that_warns_as_an_error_changes_nothing() -> None:
    plan = replace(ls.solvers.ddim((9.0, 5.0, 1.0, 0.0)), meta={"about": {"scheduler": {"prediction_type": "sample"}}})
    scheduler = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="prediction_type 'sample'"):
            scheduler.register_to_config(plan=plan)
    assert scheduler.config.plan is None
    scheduler.set_timesteps(5)


@pytest.mark.parametrize("about", ["a note", None, 3, {"scheduler": "DDIM"}, {"scheduler": None}, {"scheduler": ["x"]}])
def test_a_plan_may_say_anything_of_its_model(about: Any, recwarn) -> None:
    made(plan=replace(ls.solvers.ddim((9.0, 5.0, 1.0, 0.0)), meta={"about": about}))
    assert not recwarn


def test_cosmos_state_is_refused() -> None:
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    stock.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0)
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler with sigma_data = 1.0: .*Cosmos"):
        Scheduler.from_config(stock.config)


# Noise


@NOISY
@pytest.mark.parametrize("name", [name for name, one in SUPPORTED.items() if one.noise and name in QUICK])
def test_who_replaces_noise_is_told(name: str, recwarn) -> None:
    key = SUPPORTED[name].noise.key
    stock = STOCK[name](**({key: "sde-dpmsolver++"} if key else {}))
    stock.to_json_string()  # which writes the name into the config: some share their options
    with pytest.warns(UserWarning, match=r"this one draws none: for DDPM's noise pass gamma=1, mu=0\.5"):
        Scheduler.from_config(stock.config)
    recwarn.clear()
    for asked in ({"gamma": 1.0, "mu": 0.5}, {"gamma": 1.0}, {"solver": "dpmpp"}):
        Scheduler.from_config(stock.config, **asked)
    Scheduler.from_config(STOCK["DPMSolverMultistepScheduler"]().config)
    assert not recwarn.list


def test_ancestral_euler_is_gamma_1_with_ddpms_noise() -> None:
    """In y, whose step at noise level sigma is z's over alpha; the start is rescaled."""
    stock = diffusers.EulerAncestralDiscreteScheduler(**SD)
    ours = Scheduler.from_config(stock.config, gamma=1.0, mu=0.5)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    assert torch.equal(ours.timesteps.float(), stock.timesteps)
    x, generator = state() * stock.init_noise_sigma, torch.Generator().manual_seed(3)
    z = state() * stock.init_noise_sigma / (stock.sigmas[0] ** 2 + 1) ** 0.5
    for t in stock.timesteps:
        out = network(stock.scale_model_input(x, t), t)
        x = stock.step(out, t, x, generator=generator, return_dict=False)[0]
    found = loop(ours, z, generator=torch.Generator().manual_seed(3))
    assert relative(found, x) < 1e-4


@pytest.mark.parametrize("auto", [{}, {"gamma": 1.0}])
def test_stochastic_sampling_of_flows_is_flow_match_eulers(auto: dict[str, float]) -> None:
    """Stable Audio 3, distilled: every state is the image and new noise.  Asked for by the config, so never dropped."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    ours = Scheduler.from_config(stock.config, **auto)
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.1])
        results.append(loop(scheduler, state(), generator=torch.Generator().manual_seed(2)))
    assert relative(*results) < 1e-6
    assert ours.config.stochastic_sampling
    with pytest.raises(ValueError, match="it draws every state anew"):
        Scheduler.from_config(stock.config, gamma=2.0)


def test_noise_that_a_step_is_given() -> None:
    stock = diffusers.DDIMScheduler(**SD, clip_sample=False)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
        t, x = scheduler.timesteps[3], state()
        results.append(scheduler.step(network(x, t), t, x, eta=0.7, variance_noise=state(9), return_dict=False)[0])
    assert relative(*results) < 1e-6


@pytest.mark.parametrize("whole", [None, False, True])
def test_ddims_pipeline_at_gamma_1(whole: bool | None) -> None:
    """It always passes use_clipped_model_output, and clips."""
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def image() -> Any:
        call = {"num_inference_steps": 5, "output_type": "np", "use_clipped_model_output": whole}
        return pipe(generator=torch.Generator().manual_seed(0), **call).images

    wanted = image()
    pipe.scheduler = Scheduler.from_config(pipe.scheduler.config, gamma=1.0)
    assert np.abs(image() - wanted).max() < 1e-5


def test_an_option_that_its_class_never_reads_does_not_act() -> None:
    """CogVideoX's DDIM clips by its config, and not in its steps."""
    stock = diffusers.CogVideoXDDIMScheduler(**SD)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
        results.append(loop(scheduler, state()))
    assert stock.config.clip_sample
    assert relative(*results) < 1e-5


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_limits_of_x0_are_those_of_each_class(name: str) -> None:
    """All but DDIM keep the state and not the noise: the first order step goes to the limited x0 by what is left."""
    limit = {"clip_sample": True, "clip_sample_range": 0.8} if "Heun" in name else {"thresholding": True}
    order = {} if "Heun" in name else {"solver_order": 1}
    order |= {"disable_corrector": list(range(10))} if "UniPC" in name else {}
    stock = STOCK[name](**SD, **limit, **order)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    if "Heun" in name:  # its first evaluation, in y
        t, sigma = ours.timesteps[0], float(stock.sigmas[0])
        y = state() * (1 + sigma**2) ** 0.5
        out = network(state(), t)
        found = ours.step(out, t, state(), return_dict=False)[0]
        wanted = stock.step(out, stock.timesteps[0], y, return_dict=False)[0]
        assert relative(found, wanted / (1 + float(stock.sigmas[1]) ** 2) ** 0.5) < 1e-5
        return
    assert relative(loop(ours, state()), loop(stock, state())) < 1e-5


def test_a_next_timestep_that_unclips_pipelines_pass() -> None:
    stock = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    stock.set_timesteps(5)
    ours = Scheduler.from_config(stock.config, gamma=1.0)
    ours.set_timesteps(5)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    x = state()
    for i, t in enumerate(ours.timesteps):
        following = None if i + 1 == len(ours.timesteps) else ours.timesteps[i + 1]
        plain = ours.step(network(x, t), t, x).prev_sample
        x = ours.step(network(x, t), timestep=t, sample=x, prev_timestep=following).prev_sample
        assert torch.equal(x, plain)
    with pytest.raises(ValueError, match="got prev_timestep = 3, and this run goes to 749"):
        ours.step(x, ours.timesteps[0], x, prev_timestep=3)


# States of several levels


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_tokens_at_times_of_their_own(gamma: float) -> None:
    """LTX with conditions: clean tokens stay, those between go to the next level below; the others are as ever."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    ours = Scheduler.from_config(stock.config, gamma=gamma)
    plain = Scheduler.from_config(stock.config, gamma=gamma)
    times = [1.0, 0.75, 0.5, 0.25]
    for scheduler in (stock, ours, plain):
        scheduler.set_timesteps(sigmas=times)
    x = y = z = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([[1000.0, 1000, 1000, 600, 250, 0]])
    for i, t in enumerate(ours.timesteps):
        at = torch.minimum(own, t)
        x, y, z = (
            ours.step(-network(x, t), t, x, per_token_timesteps=at, return_dict=False)[0],
            stock.step(-network(y, t), stock.timesteps[i], y, per_token_timesteps=at, return_dict=False)[0],
            plain.step(network(z, plain.timesteps[i]), plain.timesteps[i], z, return_dict=False)[0],
        )
        if gamma == 1:
            assert relative(x, y) < 1e-6
    assert torch.allclose(x[:, :3], z[:, :3], atol=1e-6)
    assert torch.equal(x[:, 5], torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))[:, 5])
    table = made()
    table.set_timesteps(3)
    with pytest.raises(ValueError, match="only flows"):
        table.step(x, table.timesteps[0], x, per_token_timesteps=own)


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_noise_of_frames_and_tokens_is_theirs_one_by_one(kind: str) -> None:
    """Diffusion forcing: one level per frame of [B, C, F, H, W] or [B, F, C, H, W], or per token of [B, N, C]."""
    scheduler = made(kind)
    times = torch.tensor([[100, 200, 300, 400], [1, 2, 3, 4]])
    for shape, axis in (((2, 3, 4, 5, 5), 2), ((2, 4, 3, 5, 5), 1), ((2, 4, 3), 1)):
        x, noise = state(0, shape), state(1, shape)
        out = scheduler.add_noise(x, noise, times)
        for frame in range(4):
            parts = (part.select(axis, frame) for part in (x, noise, out))
            a, b, found = parts
            assert torch.equal(found, scheduler.add_noise(a, b, times[:, frame]))
    x = state()
    assert torch.equal(scheduler.add_noise(x, x, times[:, :1]), scheduler.add_noise(x, x, times[:, 0]))
    for wrong in (times, times[:1], torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match=r"for samples \[2, 3, 8, 8\]: give one of each sample \[B\]"):
            scheduler.add_noise(state(0, SHAPE), state(1, SHAPE), wrong)
    assert MODEL.isdisjoint(HARMLESS)
