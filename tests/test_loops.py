"""Weighted ELBOs in other people's loops: whatever the script's loss, its expectation is the integral."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from logsnr import predictions
from logsnr.adapters.diffusers.loops import LoopObjective
from logsnr.errors import LogsnrError
from logsnr.exact import GaussianMixture
from logsnr.objectives import WeightedELBO, objectives
from logsnr.schedules import Adaptive, Cosine, Discrete, EDMTraining, FlowUniform, Linear, LogitNormal
from logsnr.timesteps import TimestepTable
from logsnr.weightings import ELBO, Custom, EDMMonotonic, EpsCosine, Flow, Sigmoid, V

DDPM = {"_class_name": "DDPMScheduler"}
SD = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
ZERO = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]).double(),
    torch.tensor([[-1.1], [0.6]]).double(),
    torch.tensor([[[0.04]], [[0.3]]]).double(),
)


ADAPTIVE_WIDE = WeightedELBO(ELBO(), Adaptive((-20, 20), ELBO()))
EDM_EULER = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mmse(logsnr: Tensor) -> Tensor:
    """E||eps_hat - eps||^2 of the exact mixture at each level, by quadrature in z; 0 at pure noise."""
    z = torch.linspace(-9, 9, 801, dtype=torch.float64)[:, None]
    out = []
    for level in logsnr.tolist():
        sigma = math.exp(-level / 2) if level > -math.inf else math.inf
        if sigma > 1e7:
            out.append(torch.zeros((), dtype=torch.float64))
            continue
        p = MIXTURE.log_density(z, sigma).exp() * (z[1] - z[0])
        out.append(1 - (p * MIXTURE(z, sigma).eps[:, 0] ** 2).sum())
    return torch.stack(out)


def script_loss(kind: str, logsnr: Tensor, error: Tensor) -> Tensor:
    """What the script measures where the error of eps is E: sheet, section 2."""
    factor = {
        "epsilon": torch.ones_like(logsnr),
        "sample": (-logsnr).exp(),
        "v_prediction": 1 + (-logsnr).exp(),
        "flow_prediction": (1 + (-0.5 * logsnr).exp()) ** 2,
        "edm": (-logsnr).exp() / 0.5**2 + 1,
    }[kind]
    return factor * error


@pytest.fixture(scope="module")
def curve() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-16, 14, 1501, dtype=torch.float64)
    return x, mmse(x)


def integral(curve: tuple[Tensor, Tensor], objective: WeightedELBO, lo: float, hi: float) -> float:
    """1/2 int_lo^hi w mmse, by Simpson's rule on interpolated curves."""
    x = torch.linspace(lo, hi, 40001, dtype=torch.float64)
    place = (x - curve[0][0]) / (curve[0][1] - curve[0][0])
    i = place.floor().long().clamp(0, len(curve[0]) - 2)
    error = curve[1][i].lerp(curve[1][i + 1], place - i)
    y = 0.5 * objective.weighting(x) * error
    simpson = torch.ones_like(x)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    return float((simpson * y).sum() * (x[1] - x[0]) / 3)


CASES = [
    (config, kind, WeightedELBO(w, schedule))
    for config, kinds in (
        (DDPM, ["epsilon", "v_prediction", "sample", "edm"]),
        (SD, ["epsilon", "v_prediction"]),
        (SD3, ["flow_prediction", "sample"]),
        (FLUX, ["flow_prediction"]),
    )
    for kind in kinds
    for w, schedule in (
        (Sigmoid(2.0), Cosine().truncate(-20, 20)),
        (ELBO(), Linear(-5, 6)),
        (EpsCosine(), Adaptive((-5, 6), EpsCosine())),
    )
]


@pytest.mark.parametrize(("config", "kind", "objective"), CASES)
def test_expected_loss_of_the_script_is_the_weighted_elbo(
    config: dict[str, object], kind: str, objective: WeightedELBO, curve: tuple[Tensor, Tensor]
) -> None:
    """sum_i p_i weight_i M_i = 1/2 int w E over the levels that both know, to the trapezoidal error of the table."""
    loop = LoopObjective(objective, config, target=kind)
    x = loop.model.levels.logsnr
    finite = x > -16
    error = torch.zeros_like(x)
    error[finite] = torch.from_numpy(np.interp(x[finite].numpy(), *(c.numpy() for c in curve)))
    p, weights = loop.probabilities(), loop.weights()
    terms = torch.where(finite, p * weights * script_loss(kind, x.clamp(min=-16), error), 0.0)
    lo, hi = objective.schedule.range
    exact = integral(curve, objective, max(lo, float(x[finite][-1]), -15.9), min(hi, float(x[0])))
    assert float(terms.sum()) == pytest.approx(exact, rel=5e-5)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("config", [DDPM, SD])
def test_the_sum_over_levels_does_not_depend_on_the_target(config: dict[str, object]) -> None:
    """W_i E_i is the same number whatever the network predicts, level by level."""
    kinds = ("epsilon", "v_prediction", "sample", "edm")
    loops = [LoopObjective("vdm++/sigmoid", config, target=kind) for kind in kinds]
    x = loops[0].model.levels.logsnr
    error = torch.sigmoid(x) * (2 + torch.sin(x))
    per_eps = [loop.weights() * script_loss(kind, x, error) for loop, kind in zip(loops, kinds, strict=True)]
    for other in per_eps[1:]:
        torch.testing.assert_close(other, per_eps[0], rtol=1e-11, atol=0)


def test_published_objectives_give_back_their_own_plain_loss() -> None:
    """Each preset in the script it comes from weights every timestep alike: nothing to change."""
    plain = LoopObjective("ddpm", DDPM)
    assert plain.weights()[:-1].tolist() == pytest.approx([0.5] * 999, rel=3e-5)
    assert float(plain.weights()[-1]) == pytest.approx(0.5, rel=1e-2)  # half a cell: its level is at one end
    assert plain.probabilities()[1:-1].tolist() == pytest.approx([1 / 999] * 998, rel=1e-6)
    flow = LoopObjective("flow", FLUX).weights()
    assert flow.tolist() == pytest.approx([float(flow[500])] * 1000, rel=1e-3)
    assert float(flow[500]) == pytest.approx(math.tanh(5), rel=2e-3)
    sd3 = LoopObjective("sd3", SD3).weights()
    assert sd3.tolist() == pytest.approx([0.5] * 1000, rel=2e-3)
    v = LoopObjective(WeightedELBO(V(), Cosine()), ZERO)
    kept = 1 - float(Cosine().time(v.model.levels.logsnr[0]))
    assert v.weights().tolist() == pytest.approx([0.5 * math.pi * kept] * 1000, rel=1e-12)


def test_min_snr_of_diffusers_scripts() -> None:
    """w = p min(1, 5/SNR) under the table's p is `min(snr, 5)/snr` (eps) and `/(snr + 1)` (v), as scripts have it."""
    table = Discrete(TimestepTable.ddpm())
    w = Custom(lambda x: table.log_density(x) + (math.log(5) - x).clamp(max=0), in_log=True)
    snr = TimestepTable.ddpm().alphas_cumprod / (1 - TimestepTable.ddpm().alphas_cumprod)
    for kind, script in (("epsilon", snr.clamp(max=5) / snr), ("v_prediction", snr.clamp(max=5) / (snr + 1))):
        weights = 2 * LoopObjective(WeightedELBO(w, table), DDPM, target=kind).weights()
        # Within 1 % where a cell is narrow; the first cells are .5 wide.
        assert (weights / script)[20:].tolist() == pytest.approx([1.0] * 980, rel=1e-2)


@pytest.mark.parametrize("config", [DDPM, SD, SD3, FLUX, ZERO])
def test_draws_follow_the_probabilities(config: dict[str, object]) -> None:
    loop = LoopObjective("v-cosine", config)
    draw = loop.draw(50000, generator=rng())
    labels = loop.model.levels.labels
    index = torch.searchsorted(labels, draw.timesteps)
    assert torch.equal(labels[index], draw.timesteps)
    shares = torch.bincount(index, minlength=len(labels)) / 50000
    assert float((shares - loop.probabilities()).abs().max()) <= 2 / 50000  # stratified
    torch.testing.assert_close(draw.weight, loop.weights()[index].float(), rtol=1e-6, atol=0)


def test_timesteps_are_those_of_the_scheduler() -> None:
    diffusers = pytest.importorskip("diffusers")
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=100),
    ):
        levels = LoopObjective("flow", scheduler).model.levels
        assert torch.equal(levels.labels.flip(0), scheduler.timesteps)
        sigma = (-0.5 * levels.logsnr).exp()
        assert (sigma / (1 + sigma))[:-1].tolist() == pytest.approx(scheduler.sigmas.flip(0)[:-1].tolist(), rel=1e-5)
        assert levels.logsnr[-1] == -math.inf
    for scheduler in (
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ):
        levels = LoopObjective("v-cosine", scheduler, target="v_prediction").model.levels
        assert levels.labels.dtype == torch.int64
        torch.testing.assert_close(torch.sigmoid(levels.logsnr).float(), scheduler.alphas_cumprod, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_monte_carlo_of_a_ddpm_script(kind: str, curve: tuple[Tensor, Tensor]) -> None:
    """The script as it stands, diffusers' own noising and targets, on the exact denoiser: within 4 standard errors."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    loop = LoopObjective("vdm++/sigmoid", scheduler, adaptive=True)
    generator, means = rng(3), []
    for _ in range(60):
        x = MIXTURE.sample(500, generator=generator)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        draw = loop.draw(len(x), generator=generator)
        noisy = scheduler.add_noise(x, noise, draw.timesteps)
        estimate = MIXTURE(noisy, (-0.5 * draw.logsnr).exp())
        if kind == "v_prediction":
            target = scheduler.get_velocity(x, noise, draw.timesteps)
            output = scheduler.get_velocity(estimate.x0, estimate.eps, draw.timesteps)
        else:
            target, output = (noise, estimate.eps) if kind == "epsilon" else (x, estimate.x0)
        means.append(loop.loss(draw, output, target))
    mean, stderr = float(torch.stack(means).mean()), float(torch.stack(means).std() / math.sqrt(len(means)))
    exact = integral(curve, objectives["vdm++/sigmoid"], *loop.objective.schedule.range)
    assert mean == pytest.approx(exact, abs=4 * stderr)
    assert stderr < 0.02 * exact


@pytest.mark.parametrize("continuous", [False, True])
def test_monte_carlo_of_a_flow_script(continuous: bool, curve: tuple[Tensor, Tensor]) -> None:
    loop = LoopObjective(WeightedELBO(EDMMonotonic(), LogitNormal(0, 1.2).truncate(-9, 9)), SD3, continuous=continuous)
    generator, means = rng(4), []
    for _ in range(60):
        x = MIXTURE.sample(500, generator=generator)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        draw = loop.draw(len(x), generator=generator)
        t = (draw.timesteps.double() / 1000)[:, None]
        state = (1 - t) * x + t * noise
        sigma = (t / (1 - t))[:, 0]
        estimate = MIXTURE(state * ((1 + t / (1 - t)) / (1 + (t / (1 - t)) ** 2).sqrt()), sigma)
        means.append(loop.loss(draw, estimate.eps - estimate.x0, noise - x))
    mean, stderr = float(torch.stack(means).mean()), float(torch.stack(means).std() / math.sqrt(len(means)))
    assert mean == pytest.approx(integral(curve, loop.objective, -9, 9), abs=4 * stderr + 1e-4)
    assert stderr < 0.03 * mean


def test_edm_and_continuous_times() -> None:
    """EDM's own script, timesteps ln(sigma)/4: plain MSE of F under its draws is the EDM weighting, constant 1/4."""
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    loop = LoopObjective(WeightedELBO(objectives["edm"].weighting, EDMTraining().truncate(-8, 12)), config)
    draw = loop.draw(64, generator=rng())
    torch.testing.assert_close(draw.timesteps, (-draw.logsnr / 8).float())
    kept = float(EDMTraining().time(-8.0) - EDMTraining().time(12.0))
    assert draw.weight.tolist() == pytest.approx([kept / 8] * 64, rel=1e-5)
    assert isinstance(loop.model.target, predictions.EDM)


def test_losses_given_back_are_errors_of_eps() -> None:
    """`loss` teaches an adaptive schedule what `Schedule.update` would have been told; nothing under no_grad."""
    loop = LoopObjective("vdm++/sigmoid", SD, target="v_prediction", adaptive=True)
    other = LoopObjective("vdm++/sigmoid", SD, target="v_prediction", adaptive=True)
    draw = loop.draw(256, generator=rng())
    alpha = torch.sigmoid(draw.logsnr).sqrt()
    output, target = torch.randn(2, 256, 3, 4, generator=rng(1))
    start = loop.state_dict()
    with torch.no_grad():
        first = loop.loss(draw, output, target)
    for name, value in start.items():
        assert torch.equal(torch.as_tensor(loop.state_dict()[name]), torch.as_tensor(value))
    assert torch.equal(loop.loss(draw, output, target), first)
    mse = (output - target).square().mean(dim=(1, 2))
    other.objective.schedule.update(draw.logsnr, alpha**2 * mse)
    torch.testing.assert_close(loop.probabilities(), other.probabilities(), rtol=1e-9, atol=0)
    assert not torch.allclose(loop.probabilities(), LoopObjective("vdm++/sigmoid", SD, adaptive=True).probabilities())
    torch.testing.assert_close(first, (draw.weight * mse).mean())
    total = loop.loss(draw, output, target, reduction="sum")
    torch.testing.assert_close(total, 12 * first)
    half = loop.loss(draw, output.bfloat16(), target.bfloat16())
    assert half.dtype == torch.float32


def test_gradients_given_back_are_those_of_half_the_error_of_eps() -> None:
    """What the schedule keeps does not know of the weights or of the target: ||d(E/2)/dtheta||^2."""
    kept = []
    for kind in ("epsilon", "v_prediction"):
        schedule = Adaptive((-5, 6), ELBO(), importance="gradient")
        loop = LoopObjective(WeightedELBO(ELBO(), schedule), SD, target=kind, scaled=True)
        draw = loop.draw(64, generator=rng())
        theta = torch.full((64,), 0.3, dtype=torch.float64, requires_grad=True)
        error = (theta - torch.sigmoid(draw.logsnr)).square()  # of eps
        losses = script_loss(kind, draw.logsnr, error)
        (gradient,) = torch.autograd.grad((draw.weight.double() * losses).sum(), theta)
        loop.update(draw, losses, gradient.square())
        direct = Adaptive((-5, 6), ELBO(), importance="gradient")
        direct.update(draw.logsnr, error.detach(), (theta - torch.sigmoid(draw.logsnr)).square().detach())
        torch.testing.assert_close(schedule.probabilities(), direct.probabilities(), rtol=1e-5, atol=0)
        kept.append(schedule.probabilities())
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-5, atol=0)


def test_adapting_moves_the_draws_and_not_the_objective() -> None:
    loop = LoopObjective("v-cosine", SD, adaptive=True)
    x = loop.model.levels.logsnr
    error = torch.sigmoid(x) * (2 + torch.sin(2 * x))
    before, p = float((loop.probabilities() * loop.weights() * error).sum()), loop.probabilities()
    generator = rng()
    for _ in range(200):
        draw = loop.draw(64, generator=generator)
        loop.update(draw, torch.sigmoid(draw.logsnr) * (2 + torch.sin(2 * draw.logsnr)))
    assert float((loop.probabilities() * loop.weights() * error).sum()) == pytest.approx(before, rel=1e-12)
    assert 0.5 * float((loop.probabilities() - p).abs().sum()) > 0.1
    # p ~ w E: every draw is worth the same.
    worth = loop.weights() * error
    assert float(((worth - worth.mean()) / worth.mean()).abs().median()) < 0.1


def test_state_is_that_of_the_schedule() -> None:
    one, two = (LoopObjective("vdm++/sigmoid", SD, adaptive=True) for _ in range(2))
    draw = one.draw(128, generator=rng())
    one.update(draw, torch.rand(128, generator=rng(1)))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.probabilities(), two.probabilities())
    again = [loop.draw(32, generator=rng(5)) for loop in (one, two)]
    assert torch.equal(again[0].timesteps, again[1].timesteps)
    assert torch.equal(again[0].weight, again[1].weight)
    assert LoopObjective("vdm++/sigmoid", SD).state_dict() == {}


@pytest.mark.parametrize("continuous", [False, True])
def test_ranks_share_one_stratified_batch(continuous: bool) -> None:
    n, world = 25, 4
    loops = [LoopObjective("flow", FLUX, rank=r, world=world, continuous=continuous) for r in range(world)]
    levels = torch.cat([loop.draw(n, generator=rng(r)).logsnr for r, loop in enumerate(loops)])
    if continuous:
        strata = (FlowUniform().truncate(-20, 20).time(levels) * n * world).floor().long()
        assert sorted(strata.tolist()) == list(range(n * world))
        return
    p, x = loops[0].probabilities(), loops[0].model.levels.cells(-20, 20, torch.device("cpu")).logsnr
    index = torch.searchsorted(-x, -levels)
    mine = torch.bincount(index, minlength=len(p)).cumsum(0)
    assert float((mine - n * world * p.cumsum(0)).abs().max()) <= 1 + 1e-9  # one draw in each stratum of the batch


def test_scaled_losses_start_near_one() -> None:
    """A network that knows the data's standard deviation and nothing else has a scaled loss of 1, in any target."""
    for kind in ("epsilon", "v_prediction", "sample"):
        loop = LoopObjective("vdm++/sigmoid", DDPM, target=kind, scaled=True, sigma_data=0.5)
        draw = loop.draw(20000, generator=rng())
        error = torch.sigmoid(draw.logsnr + 2 * math.log(0.5))
        losses = script_loss(kind, draw.logsnr, error)
        assert float((draw.weight * losses).mean()) == pytest.approx(1, abs=2e-3)
    flow = LoopObjective("flow", FLUX, continuous=True, scaled=True)
    draw = flow.draw(20000, generator=rng())
    losses = script_loss("flow_prediction", draw.logsnr, torch.sigmoid(draw.logsnr))
    assert float((draw.weight * losses).mean()) == pytest.approx(1, abs=2e-3)


def test_pure_noise_counts_by_its_outputs_error() -> None:
    """The last timestep of a zero-terminal table: int w b_F^2 over its cell, in closed form for e^(-l/2) and for 1."""
    x = LoopObjective(WeightedELBO(V(), Cosine()), ZERO).model.levels.logsnr
    r = 0.5 * math.exp(0.5 * float(x[-2]))  # alpha/s halfway to pure noise
    for w, exact in ((V(), 2 * math.atan(r)), (Sigmoid(60.0), math.log1p(r * r)), (Flow(), 2 * math.atan(r))):
        loop = LoopObjective(WeightedELBO(w, Cosine()), ZERO)
        mass = loop.probabilities()[-1] * loop.weights()[-1]
        assert float(mass) == pytest.approx(0.5 * exact, rel=1e-10)
    cut = LoopObjective(WeightedELBO(V(), Cosine().truncate(-3, 3)), ZERO)
    assert float(cut.probabilities()[-1]) == 0
    assert float(cut.weights()[-1]) == 0
    # What is given back there is the error of eps at the finite end of the cell, that of v being constant on it.
    loop = LoopObjective(WeightedELBO(V(), Cosine()), ZERO)
    cells = loop.model.levels.cells(-math.inf, math.inf, torch.device("cpu"))
    assert float(cells.per_eps[-1]) == pytest.approx(r * r / (1 + r * r), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoopObjective("edm", {"_class_name": "LCMScheduler"}), ["LCMScheduler", "teacher"]),
        (lambda: LoopObjective("edm", {"_class_name": "IPNDMScheduler"}), ["IPNDMScheduler", "base model"]),
        (lambda: LoopObjective("edm", {"beta_start": 1e-4, "timestep_scaling": 10.0}), ["this config", "teacher"]),
        (lambda: LoopObjective("edm", object()), ["object", "config"]),
        (lambda: LoopObjective("edm", {**DDPM, "prediction_type": "velocity"}), ["velocity", "DDPMScheduler"]),
        (lambda: LoopObjective("edm", DDPM, target="v"), ["'v'", "v_prediction"]),
        (lambda: LoopObjective("edm", DDPM, continuous=True), ["continuous", "T timesteps"]),
        (lambda: LoopObjective("edm", {**ZERO, "prediction_type": "epsilon"}), ["zero terminal SNR"]),
        (lambda: LoopObjective("v-cosine", SD3, target="epsilon"), ["pure noise", "-20"]),
        (lambda: LoopObjective(WeightedELBO(ELBO(), Linear(12, 14)), SD), ["[12, 14]", "7.07", "do not meet"]),
        (lambda: LoopObjective(WeightedELBO(ELBO(), Cosine()), SD3, continuous=True), ["infinite", "truncate"]),
        (lambda: LoopObjective(WeightedELBO(Custom(lambda x: x), Linear(-5, 5)), SD), ["negative or not a number"]),
        (lambda: LoopObjective(WeightedELBO(Custom(lambda x: 0 * x), Linear(-5, 5)), SD), ["zero everywhere"]),
        (lambda: LoopObjective("flow", {**SD3, "invert_sigmas": True}), ["continuous=True"]),
        (lambda: LoopObjective("flow", SD3, continuous=True).probabilities(), ["continuous", "no table"]),
        (lambda: LoopObjective(ADAPTIVE_WIDE, {"sigma_data": 0.5, "prediction_type": "epsilon"}), ["-20", "-8.764"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(make: object, words: list[str]) -> None:
    with pytest.raises(LogsnrError) as error:
        make()  # type: ignore[operator]
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_are_refused() -> None:
    loop = LoopObjective("ddpm", DDPM)
    draw = loop.draw(4, generator=rng())
    with pytest.raises(ValueError, match="one shape"):
        loop.loss(draw, torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one sample per level"):
        loop.loss(draw, torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("objective", ["edm", "edm2", "v-cosine"])
def test_continuous_models_are_trained_on_what_they_and_the_objective_have(objective: str) -> None:
    """EDM's sigma in [.002, 80] is log-SNR [-8.764, 12.429]; the draws are the preset's, conditioned on it."""
    loop = LoopObjective(objective, EDM_EULER)
    lo, hi = loop.objective.schedule.range
    assert (lo, hi) == (pytest.approx(-2 * math.log(80)), pytest.approx(-2 * math.log(0.002)))
    assert loop.objective.name == objective
    draw = loop.draw(256, generator=rng())
    assert lo <= float(draw.logsnr.min())
    assert float(draw.logsnr.max()) <= hi
    preset = objectives[objective]
    x = torch.linspace(lo, hi, 9, dtype=torch.float64)
    mass = preset.schedule.time(lo) - preset.schedule.time(hi)
    torch.testing.assert_close(loop.objective.schedule.log_density(x), preset.schedule.log_density(x) - mass.log())


@pytest.mark.parametrize("own", [False, True])
def test_an_adaptive_density_does_not_depend_on_the_reduction(own: bool) -> None:
    """Summed over 3,072 dimensions as averaged: with a wrong unit the visited bins take all of the mass."""
    shares = []
    for reduction in ("mean", "sum"):
        objective = WeightedELBO(ELBO(), Adaptive((-5, 6), ELBO())) if own else "vdm++/sigmoid"
        loop = LoopObjective(objective, SD, adaptive=not own)
        for step in range(2):
            draw = loop.draw(4, generator=rng(step))
            prediction = draw.logsnr.sigmoid().sqrt().float()[:, None].expand(4, 3072)
            loop.loss(draw, prediction, torch.zeros(4, 3072), reduction=reduction)  # type: ignore[arg-type]
        assert isinstance(loop.objective.schedule, Adaptive)
        shares.append(loop.objective.schedule.probabilities())
    torch.testing.assert_close(shares[1], shares[0], rtol=1e-5, atol=0)
    assert float(shares[0].max()) < 0.1


def test_states_of_another_range_or_kind_are_refused() -> None:
    narrow, wide = (LoopObjective("vdm++/sigmoid", config, adaptive=True) for config in (SD, DDPM))
    with pytest.raises(ValueError, match="its bins lie elsewhere"):
        wide.load_state_dict(narrow.state_dict())
    with pytest.raises(ValueError, match="is fixed; make it adaptive"):
        LoopObjective("vdm++/sigmoid", SD).load_state_dict(narrow.state_dict())
    with pytest.raises(ValueError, match="it is of a fixed schedule"):
        narrow.load_state_dict(LoopObjective("vdm++/sigmoid", SD).state_dict())


# parts of the levels, of a batch, of an image


@pytest.mark.parametrize(("config", "split"), [(SD, 500), (SD3, 875), (FLUX, 875), (DDPM, 1)])
def test_two_experts_add_up_to_the_whole(config: dict[str, object], split: float) -> None:
    """Level by level p_i weight_i of the two is that of one model on all timesteps, and each draws its own alone."""
    whole = LoopObjective("vdm++/sigmoid", config)
    low, high = (LoopObjective("vdm++/sigmoid", config, timesteps=part) for part in ((0, split), (split, 1000)))
    counts = [loop.probabilities() * loop.weights() for loop in (whole, low, high)]
    torch.testing.assert_close(counts[1] + counts[2], counts[0], rtol=1e-9, atol=1e-15)
    for loop, inside in ((low, lambda t: t < split), (high, lambda t: t >= split)):
        labels = loop.model.levels.labels
        assert bool(inside(labels[loop.probabilities() > 0]).all())
        draw = loop.draw(64, generator=torch.Generator().manual_seed(0))
        assert bool(inside(draw.timesteps).all())
        assert float(loop.probabilities().sum()) == pytest.approx(1)


def test_an_expert_of_continuous_times_draws_them_alone() -> None:
    for adaptive in (False, True):
        loop = LoopObjective("sd3", FLUX, continuous=True, timesteps=(875, 1000), adaptive=adaptive)
        t = loop.draw(256, generator=torch.Generator().manual_seed(0)).timesteps
        assert 875 <= float(t.min()) < 880
        assert float(t.max()) <= 1000


def test_parts_of_a_draw_are_its_levels() -> None:
    """Images and those that preserve a prior: the mean of both losses is that of the batch.

    An adaptive p learns from each part in turn, not as from the whole; from losses given back once it does.
    """
    loops = [LoopObjective("vdm++/sigmoid", SD, adaptive=True) for _ in range(2)]
    draws = [loop.draw(8, generator=torch.Generator().manual_seed(0)) for loop in loops]
    prediction, target = (torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    whole = loops[0].loss(draws[0], prediction, target)
    own, prior = draws[1][:5], draws[1][5:]
    assert (len(own), len(prior)) == (5, 3)
    assert torch.equal(torch.cat([own.timesteps, prior.timesteps]), draws[0].timesteps)
    parts = (loops[1].loss(own, prediction[:5], target[:5]), loops[1].loss(prior, prediction[5:], target[5:]))
    torch.testing.assert_close((5 * parts[0] + 3 * parts[1]) / 8, whole)
    assert not torch.allclose(loops[1].probabilities(), loops[0].probabilities(), rtol=1e-4)
    once = LoopObjective("vdm++/sigmoid", SD, adaptive=True)
    losses = torch.cat([(prediction[part] - target[part]).square().mean(1) for part in (slice(5), slice(5, 8))])
    once.update(draws[1], losses)
    torch.testing.assert_close(once.probabilities(), loops[0].probabilities(), rtol=1e-12, atol=0)
    torch.testing.assert_close((draws[1].weight * losses).mean(), whole)


def test_a_mask_counts_what_it_covers() -> None:
    """A mask of ones changes nothing; one over channels, `[B, 1, H, W]`, weights each place's squared error."""
    loop = LoopObjective("vdm++/sigmoid", SD)
    draw = loop.draw(3, generator=torch.Generator().manual_seed(0))
    prediction, target = (torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    mask = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    by_hand = (draw.weight[:, None, None, None] * mask * (prediction - target) ** 2).mean()
    torch.testing.assert_close(loop.loss(draw, prediction, target, mask=mask), by_hand)
    plain = loop.loss(draw, prediction, target)
    torch.testing.assert_close(loop.loss(draw, prediction, target, mask=torch.ones(1, 1, 1, 1)), plain)
    for shape in ((3, 2, 2), (4, 2, 2), (3, 1, 4, 2, 2), (3, 1, 16, 16), (1,)):
        with pytest.raises(LogsnrError, match=r"for errors of \(3, 4, 2, 2\): give each dimension its size or 1"):
            loop.loss(draw, prediction, target, mask=torch.ones(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": (875, 800)}, r"timesteps = \(875, 800\): give 0 <= first < last <= 1000"),
        ({"timesteps": (0, 1001)}, "give 0 <= first < last <= 1000"),
        ({"timesteps": (3.2, 3.4)}, "has none there"),
    ],
)
def test_timesteps_that_are_none_are_refused(options: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(LogsnrError, match=message):
        LoopObjective("vdm++/sigmoid", SD, **options)
    own = WeightedELBO(ELBO(), Adaptive((-5, 6), ELBO()))
    with pytest.raises(LogsnrError, match=r"or adaptive=True"):
        LoopObjective(own, SD, timesteps=(0, 500))
