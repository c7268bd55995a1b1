"""The same numbers as diffusers' schedulers: same network, same noise levels, same noise, float32, every prediction.

Agreement is measured on every state of the run, relative to the state's root mean square.  Where diffusers departs from
its own definition the test says so and compares around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser
from logsnr.noise import alpha_s, sigma_from_flow_time
from logsnr.predictions import X0, Eps, Flow, Prediction, V
from logsnr.sampling import Plan, grids, literature, sample, solvers
from logsnr.timesteps import TimestepTable

diffusers = pytest.importorskip("diffusers")

SD = TimestepTable.stable_diffusion()
SD_CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 4, 4)
TOLERANCE = 1e-5
PREDICTIONS: dict[str, Prediction] = {"epsilon": Eps(label=SD), "v_prediction": V(label=SD), "sample": X0(label=SD)}


class Network(nn.Module):
    """A small random network that knows its timestep; `pass_through` makes it a plausible noise prediction."""

    def __init__(self, pass_through: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        d = math.prod(SHAPE)
        self.pass_through = pass_through
        self.a = nn.Parameter(torch.randn(d, d + 2, generator=generator) / math.sqrt(d))
        self.b = nn.Parameter(torch.randn(d, d, generator=generator) / math.sqrt(d))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        t = (label / 300).reshape(-1, 1).expand(len(x), 1)
        hidden = torch.tanh(torch.cat([x.flatten(1), t.sin(), t.cos()], 1) @ self.a.T)
        return self.pass_through * x + 0.7 * (hidden @ self.b.T).view_as(x)


def model(prediction: Prediction) -> NetworkDenoiser:
    return NetworkDenoiser(Network(0.4), prediction, shape=SHAPE, trained_range=(0.0, math.inf)).eval()


def start() -> Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))


def ours(denoiser: NetworkDenoiser, plan: Plan, seed: int = 1) -> list[Tensor]:
    states: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed) if plan.noisy else None
    sample(denoiser, plan, noise=start(), generator=generator, callback=lambda step: states.append(step.z.clone()))
    return states


@torch.no_grad()
def theirs(
    denoiser: NetworkDenoiser,
    scheduler,
    labels: Tensor,
    scale: Callable[[int], float] = lambda i: 1.0,
    network_scale: Callable[[int], float] | None = None,
    **options,
) -> list[Tensor]:
    """Canonical states z of a scheduler's loop; its state is `scale(i) z`, its network sees `network_scale(i) z`."""
    x, states = start() * scale(0), [start()]
    network_scale = network_scale or scale
    for i, t in enumerate(scheduler.timesteps):
        seen = x * (network_scale(i) / scale(i))
        out = denoiser.network(seen, labels[i].expand(len(x)))
        x = scheduler.step(out, t, x, **options).prev_sample
        states.append(x / scale(i + 1))
    return states


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        error = float((x - y).square().mean().sqrt() / y.square().mean().sqrt())
        assert error <= TOLERANCE, f"state {i}: {error:.2e}"


def table_grid(scheduler, last: float = 0.0):
    return grids.from_sigmas([*(SD.sigma(float(t)) for t in scheduler.timesteps), last])


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddim(kind: str, eta: float, spacing: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        **SD_CONFIG, prediction_type=kind, clip_sample=False, timestep_spacing=spacing, set_alpha_to_one=True
    )
    scheduler.set_timesteps(10)
    denoiser, grid = model(PREDICTIONS[kind]), grids.timesteps(10, SD, spacing)
    generator = torch.Generator().manual_seed(1)
    expected = theirs(denoiser, scheduler, scheduler.timesteps.float(), eta=eta, generator=generator)
    assert_same(ours(denoiser, solvers.ddim(grid, eta)), expected)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddpm_with_the_same_noise(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(
        **SD_CONFIG, prediction_type=kind, clip_sample=False, timestep_spacing="trailing", variance_type="fixed_small"
    )
    scheduler.set_timesteps(20)
    denoiser = model(PREDICTIONS[kind])
    generator = torch.Generator().manual_seed(1)
    expected = theirs(denoiser, scheduler, scheduler.timesteps.float(), generator=generator)
    assert_same(ours(denoiser, solvers.ddpm(grids.timesteps(20, SD, "trailing"))), expected)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_euler(kind: str, spacing: str) -> None:
    """n = 10 puts both spacings on integer timesteps; between them diffusers interpolates sigma, we log sigma."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD_CONFIG, prediction_type=kind, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    denoiser, grid = model(PREDICTIONS[kind]), grids.timesteps(10, SD, spacing)
    assert grid == table_grid(scheduler)
    # the state is y = z/alpha; its network sees z
    expected = theirs(
        denoiser, scheduler, scheduler.timesteps.float(), lambda i: 1 / alpha_s(grid[i])[0], lambda i: 1.0
    )
    assert_same(ours(denoiser, solvers.ddim(grid)), expected)


def flow_scale(grid) -> Callable[[int], float]:
    return lambda i: 1 / sum(alpha_s(grid[i]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift: float) -> None:
    """diffusers applies its shift to sigmas that are given as well, so give shifted ones to a scheduler of shift 1."""
    times = [t / (1 + t) if math.isfinite(t) else 1.0 for t in grids.flow(10, shift)]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=times[:-1])
    denoiser, grid = model(Flow()), grids.flow(10, shift)
    assert_same(ours(denoiser, solvers.ddim(grid)), theirs(denoiser, scheduler, scheduler.timesteps, flow_scale(grid)))


def test_flow_euler_shift_is_applied_twice_there() -> None:
    """huggingface/diffusers#13243: the default grid's last sigma is shifted by 3 twice; `grids.flow` shifts once."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1000)
    once, twice = (3 * t / (1 + 2 * t) for t in (0.001, 3 * 0.001 / (1 + 2 * 0.001)))
    assert float(scheduler.sigmas[-2]) == pytest.approx(twice, rel=1e-4)
    last = grids.flow(1000, 3.0)[-2]
    assert last / (1 + last) == pytest.approx(once, rel=1e-12)


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_dpm_solver(kind: str, order: int, n: int) -> None:
    """Below 15 steps diffusers lowers the order towards the end; to sigma 0 its last step is always a denoise."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD_CONFIG, prediction_type=kind, solver_order=order)
    scheduler.set_timesteps(n)
    denoiser, grid = model(PREDICTIONS[kind]), table_grid(scheduler)
    plan = solvers.dpmpp(grid, order, form="published", final="ramp" if n < 15 else "denoise")
    assert_same(ours(denoiser, plan), theirs(denoiser, scheduler, scheduler.timesteps.float()))


def test_dpm_solver_of_order_three_is_not_the_exact_integral_there() -> None:
    """Half of the second difference's weight is missing in diffusers (and in the authors' code): order 2."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD_CONFIG, solver_order=3)
    scheduler.set_timesteps(20)
    denoiser, grid = model(PREDICTIONS["epsilon"]), table_grid(scheduler)
    with pytest.raises(AssertionError, match="state"):
        assert_same(ours(denoiser, solvers.dpmpp(grid, 3)), theirs(denoiser, scheduler, scheduler.timesteps.float()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_dpm_solver_heun_is_the_exact_integral(kind: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD_CONFIG, prediction_type=kind, solver_type="heun", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(20)
    denoiser, grid = model(PREDICTIONS[kind]), table_grid(scheduler, SD.sigma(0.0))
    assert_same(
        ours(denoiser, solvers.dpmpp(grid, 2, form="exact")),
        theirs(denoiser, scheduler, scheduler.timesteps.float()),
    )


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_on_flows(order: int) -> None:
    """There timesteps are cut to integers, so the network is told the exact time of each level instead."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=order
    )
    scheduler.set_timesteps(20)
    times = scheduler.sigmas.double()
    assert not torch.equal(scheduler.timesteps.double(), 1000 * times[:-1])
    grid = grids.from_sigmas([sigma_from_flow_time(t) for t in times.tolist()])
    denoiser = model(Flow())
    expected = theirs(denoiser, scheduler, (1000 * times[:-1]).float(), flow_scale(grid))
    assert_same(ours(denoiser, solvers.dpmpp(grid, order, form="published")), expected)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_unipc_with_its_corrector(kind: str, order: int, variant: str) -> None:
    """bh1 stops at the smallest level: to sigma 0 diffusers multiplies its infinite B(h) by 0."""
    final = {"bh1": "sigma_min", "bh2": "zero"}[variant]
    scheduler = diffusers.UniPCMultistepScheduler(
        **SD_CONFIG, prediction_type=kind, solver_order=order, solver_type=variant, final_sigmas_type=final
    )
    scheduler.set_timesteps(12)
    denoiser, grid = model(PREDICTIONS[kind]), table_grid(scheduler, SD.sigma(0.0) if variant == "bh1" else 0.0)
    plan = solvers.unipc(grid, order, variant, final="ramp")
    assert_same(ours(denoiser, plan), theirs(denoiser, scheduler, scheduler.timesteps.float()))


def test_unipc_bh1_is_nan_at_zero_there() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**SD_CONFIG, solver_type="bh1")
    scheduler.set_timesteps(12)
    denoiser = model(PREDICTIONS["epsilon"])
    assert theirs(denoiser, scheduler, scheduler.timesteps.float())[-1].isnan().all()
    assert ours(denoiser, solvers.unipc(table_grid(scheduler), 2, "bh1"))[-1].isfinite().all()


def test_unipc_without_its_corrector_and_to_the_smallest_level() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        **SD_CONFIG, disable_corrector=list(range(12)), lower_order_final=False, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(12)
    denoiser, grid = model(PREDICTIONS["epsilon"]), table_grid(scheduler, SD.sigma(0.0))
    plan = solvers.unipc(grid, 2, corrector=False)
    assert_same(ours(denoiser, plan), theirs(denoiser, scheduler, scheduler.timesteps.float()))


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_on_flows(order: int) -> None:
    """Sigmas are shifted there even if given (shift 1 here), and timesteps cut to integers (exact times told here)."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order
    )
    shifted = [3 * t / (1 + 2 * t) for t in torch.linspace(0.98, 0.02, 12, dtype=torch.float64).tolist()]
    scheduler.set_timesteps(sigmas=torch.tensor(shifted, dtype=torch.float64).numpy())
    times = scheduler.sigmas.double()
    grid = grids.from_sigmas([sigma_from_flow_time(t) for t in times.tolist()])
    denoiser = model(Flow())
    expected = theirs(denoiser, scheduler, (1000 * times[:-1]).float(), flow_scale(grid))
    assert_same(ours(denoiser, solvers.unipc(grid, order, final="ramp")), expected)


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_deis_in_log_sigma(kind: str, order: int, n: int) -> None:
    """diffusers' "logrho" DEIS, which stops at the table's smallest sigma.

    Its closed-form coefficients cancel: in float32 those of order 3 are off by up to 2e-5, so it gets its own sigmas in
    float64 here and computes them there.
    """
    scheduler = diffusers.DEISMultistepScheduler(**SD_CONFIG, prediction_type=kind, solver_order=order)
    scheduler.set_timesteps(n)
    scheduler.sigmas = scheduler.sigmas.double()
    denoiser, grid = model(PREDICTIONS[kind]), table_grid(scheduler, SD.sigma(0.0))
    plan = solvers.deis(grid, order, "log", final="ramp" if n < 15 else "full")
    assert_same(ours(denoiser, plan), theirs(denoiser, scheduler, scheduler.timesteps.float()))


def test_repeated_sigmas_are_refused() -> None:
    """DEIS still ends its Karras grid on one sigma twice, as DPM-Solver did (diffusers#6477): a step of nothing."""
    scheduler = diffusers.DEISMultistepScheduler(**SD_CONFIG, use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    with pytest.raises(ValueError, match="is not below"):
        grids.from_sigmas(scheduler.sigmas)


def test_align_your_steps_lists() -> None:
    from diffusers.schedulers import AysSchedules

    for name, model_name in (("", "sd15"), ("XL", "sdxl"), ("Video", "svd")):
        assert list(literature.ays(10, model_name)) == AysSchedules[f"StableDiffusion{name}Sigmas"]
