"""The loop: the same trajectory from every network, counted, reproducible, in agreement with other libraries."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import logsnr as ls
from logsnr import guidance
from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
from logsnr.exact import GaussianMixture, PointCloud, Subspace
from logsnr.noise import alpha_s, sigma_from_logsnr
from logsnr.predictions import EDM, X0, Eps, Flow, Prediction, Score, V
from logsnr.sampling import (
    NonFiniteError,
    Plan,
    Step,
    ddim_invert,
    evaluations,
    grids,
    heun,
    plan_for,
    sample,
    solve,
    solvers,
    trajectory,
    universal_plan,
)
from logsnr.sampling.counted import Counted
from logsnr.sampling.default import auto_plan, default_plan
from logsnr.sampling.teacher import teacher_plan
from logsnr.sampling.universal import LARGE
from logsnr.timesteps import TimestepTable

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def mixture() -> GaussianMixture:
    covs = torch.stack([0.05 * torch.eye(2), 0.2 * torch.eye(2), torch.tensor([[0.3, 0.1], [0.1, 0.1]])]).double()
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), 1.5 * randn(3, 2, seed=9), covs)


class Oracle(nn.Module):
    """The raw output F that a network of a given prediction would have, if it were exact."""

    def __init__(self, exact: Denoiser, prediction: Prediction) -> None:
        super().__init__()
        self.exact, self.prediction, self.calls = exact, prediction, 0

    def forward(self, scaled: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        sigma = float(sigma_from_logsnr(float(label[0])))
        alpha, s = alpha_s(sigma)
        estimate = self.exact(scaled / self.prediction.c_in(alpha, s), sigma)
        t_x, t_e = self.prediction.target_row(alpha, s)
        return (t_x * estimate.x0 if t_x else 0) + (t_e * estimate.eps if t_e else 0)


def network(exact: Denoiser, prediction: Prediction) -> NetworkDenoiser:
    return NetworkDenoiser(Oracle(exact, prediction), prediction, shape=exact.shape)


PREDICTIONS = [Eps(), Eps(path="ve"), X0(), X0(path="flow"), V(), Flow(label="logsnr"), EDM(label="logsnr"), Score()]
GRID = grids.log_linear(9, 30.0, 0.02)


def plans(grid: tuple[float, ...]) -> dict[str, Plan]:
    return {
        "ddim": solvers.ddim(grid),
        "ge": solvers.ge(grid, 2.2),
        "ge to the end": solvers.ge(grid, 1.6, final="ge"),
        "ge in x0": solvers.ge(grid, 1.4, basis="x0"),
        "ge in velocity": solvers.ge(grid, 1.4, basis="velocity"),
        "four estimates": Plan(
            grid, ((1.0,), (1.5, -0.5), (1.9, -1.3, 0.4), *[(2.3, -2.4, 1.5, -0.4)] * (len(grid) - 4))
        ),
        "ddpm": solvers.ddpm(grid),
        "unified": solvers.unified(grid, 1.5, 0.3),
    }


PLANS = plans(GRID)
SHORT = plans(grids.log_linear(5, 30.0, 0.02))
"""What a compiler takes a second for."""


@pytest.mark.parametrize("name", PLANS)
def test_every_prediction_gives_the_same_trajectory(name: str) -> None:
    plan, noise = PLANS[name], randn(8, 2)
    expected = sample(mixture(), plan, noise=noise, generator=generator(3))
    for prediction in PREDICTIONS:
        actual = sample(network(mixture(), prediction), plan, noise=noise, generator=generator(3))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, p=prediction: f"{p}: {m}")


@pytest.mark.parametrize("name", ["ddim", "ge", "ge in x0", "ge in velocity", "unified"])
def test_from_pure_noise_every_finite_prediction_agrees(name: str) -> None:
    grid = (math.inf, *GRID[1:])
    basis = PLANS[name].basis
    plan = solvers.unified(grid, 1.5 if name != "ddim" else 1.0, 0.3 if name == "unified" else 0.0, basis=basis)
    noise = randn(8, 2)
    expected = sample(mixture(), plan, noise=noise, generator=generator(3))
    # the first step from sigma inf is z' = alpha' mean + s' noise, unless noise is redrawn
    states: list[Step] = []
    sample(mixture(), plan, noise=noise, generator=generator(3), callback=states.append)
    if not plan.noisy:
        alpha, s = alpha_s(grid[1])
        torch.testing.assert_close(states[1].z, alpha * (mixture().weights @ mixture().means) + s * noise)
    for prediction in (X0(), V(), Flow(label="logsnr"), EDM(label="logsnr")):
        actual = sample(network(mixture(), prediction), plan, noise=noise, generator=generator(3))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_ends_at_x0_itself() -> None:
    points, noise = randn(6, 2), randn(20, 2, seed=1)
    last: list[Step] = []
    out = sample(PointCloud(points), solvers.ge(GRID), noise=noise, callback=last.append)
    assert last[-2].estimate is not None
    assert torch.equal(out, last[-2].estimate.x0)


def test_a_last_row_may_extrapolate_x0_to_the_end() -> None:
    """To sigma 0 nothing of z is kept: the sample is the combination of the estimates itself."""
    plan, steps = Plan((8.0, 4.0, 2.0, 0.0), ((1.0,), (1.0,), (1.75, -1.0, 0.25)), "x0"), []
    out = sample(mixture(), plan, noise=randn(6, 2), callback=steps.append)
    third, second, first = (step.estimate.x0 for step in steps[2::-1])
    torch.testing.assert_close(out, 1.75 * third - second + 0.25 * first, rtol=1e-15, atol=1e-15)
    ones = Plan((8.0, 4.0, 2.0, 0.0), ((1.0,), (1.0,), (0.0, 1.0)), "x0")
    assert torch.equal(sample(mixture(), ones, noise=randn(6, 2)), second)


@pytest.mark.parametrize("name", PLANS)
def test_evaluations_are_counted_and_every_state_is_seen(name: str) -> None:
    plan, model, steps = PLANS[name], network(mixture(), V()), []
    out = sample(model, plan, n=3, generator=generator(), callback=steps.append)
    assert model.network.calls == plan.nfe == 9
    assert [step.index for step in steps] == list(range(10))
    assert tuple(step.sigma for step in steps) == plan.sigmas
    assert [step.estimate is None for step in steps] == [False] * 9 + [True]
    assert torch.equal(steps[-1].z, out)
    # every state handed out is still what it was: the run from it, with no history, is reproducible
    again: list[Step] = []
    sample(model, plan, n=3, generator=generator(), callback=lambda step: again.append(step))
    for a, b in zip(steps, again, strict=True):
        assert torch.equal(a.z, b.z)


def test_states_handed_out_are_never_written_to() -> None:
    copies: list[tuple[Tensor, Tensor]] = []
    noise = randn(4, 2)
    kept = noise.clone()
    sample(
        mixture(),
        PLANS["unified"],
        noise=noise,
        generator=generator(),
        callback=lambda step: copies.append((step.z, step.z.clone())),
    )
    assert torch.equal(noise, kept)
    assert all(torch.equal(z, copy) for z, copy in copies)


def test_only_needed_estimates_are_formed() -> None:
    class Lazy(Denoiser):
        shape, sigma_data, trained_range = (2,), 1.0, (0.0, math.inf)

        def __init__(self) -> None:
            super().__init__()
            self.asked: list[str] = []

        def forward(self, z: Tensor, sigma: float | Tensor, **cond: object) -> Estimate:
            assert isinstance(sigma, float)  # host noise levels: nothing to synchronise
            assert cond == {"label": 3}

            def ask(name: str) -> Tensor:
                self.asked.append(name)
                return z

            return Estimate(lambda: ask("x0"), lambda: ask("eps"))

    def asked(plan: Plan) -> list[str]:
        model = Lazy()
        sample(model, plan, noise=randn(1, 2), cond={"label": 3})
        return model.asked

    grid = (8.0, 4.0, 2.0, 0.0)
    assert asked(solvers.ddim(grid)) == ["x0"] * 3
    assert asked(solvers.ge(grid, basis="x0")) == ["x0"] * 3
    assert sorted(asked(solvers.ge(grid))) == sorted(["x0", "eps", "eps", "x0"])


def test_reproducible_and_silent_where_deterministic() -> None:
    for name, plan in PLANS.items():
        a, b = (sample(mixture(), plan, n=5, generator=generator(7)) for _ in range(2))
        assert torch.equal(a, b), name
        source = generator(7)
        noise = torch.randn(5, 2, generator=source, dtype=F64)
        before = source.get_state()
        c = sample(mixture(), plan, noise=noise, generator=source)
        assert torch.equal(a, c), name  # batch is one draw of noise, then the plan's draws in order
        assert torch.equal(before, source.get_state()) is not plan.noisy, name
    state = torch.get_rng_state()
    sample(mixture(), PLANS["unified"], n=5, generator=generator())
    assert torch.equal(state, torch.get_rng_state())  # no global draw


def test_tail_continues_a_run() -> None:
    noise = randn(6, 2)
    for name in ("ddim", "ge"):
        steps: list[Step] = []
        sample(mixture(), PLANS[name], noise=noise, callback=steps.append)
        for k in (1, 4, 8):
            out = sample(mixture(), PLANS[name].tail(k), noise=steps[k].z)
            if name == "ddim":
                assert torch.equal(out, steps[-1].z)  # a one-step method has no history to lose
            else:
                fresh = sample(mixture(), solvers.ge(GRID[k:], 2.2), noise=steps[k].z)
                assert torch.equal(out, fresh)


# in agreement with other libraries


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("n", [10, 20])
def test_ddim_of_diffusers(spacing: str, n: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True, timestep_spacing=spacing
    )
    scheduler.set_timesteps(n)
    table, model = TimestepTable.ddpm(), mixture()
    z = noise = randn(16, 2)
    for t in scheduler.timesteps:
        z = scheduler.step(model(z, table.sigma(float(t))).eps, t, z).prev_sample
    actual = sample(model, solvers.ddim(grids.timesteps(n, table, spacing)), noise=noise)
    torch.testing.assert_close(actual, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [10, 50])
def test_ddpm_of_diffusers_given_the_same_noise(n: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, variance_type="fixed_small", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(n)
    table, model = TimestepTable.ddpm(), mixture()
    z = noise = randn(16, 2)
    draws = generator(5)
    for t in scheduler.timesteps:
        z = scheduler.step(model(z, table.sigma(float(t))).eps, t, z, generator=draws).prev_sample
    actual = sample(model, solvers.ddpm(grids.timesteps(n, table)), noise=noise, generator=generator(5))
    torch.testing.assert_close(actual, z, rtol=1e-4, atol=2e-5)


def test_vp_ddim_and_k_diffusion_euler() -> None:
    model, noise = mixture(), randn(32, 2)
    z, x = noise, noise * math.hypot(1, GRID[0])
    for sigma, target in pairwise(GRID):
        a, a_ = 1 / (1 + sigma**2), 1 / (1 + target**2)
        eps = model(z, sigma).eps
        z = math.sqrt(a_) * (z - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - a_) * eps
        denoised = model(x / math.hypot(1, sigma), sigma).x0
        x = x + (x - denoised) / sigma * (target - sigma)
    actual = sample(model, solvers.ddim(GRID), noise=noise)
    torch.testing.assert_close(actual, z, rtol=0, atol=2e-14)
    torch.testing.assert_close(actual, x, rtol=0, atol=2e-14)


def test_velocity_basis_is_euler_in_flow_time() -> None:
    model, grid, noise = mixture(), grids.flow(8, shift=3.0), randn(16, 2)
    w, previous = noise, None
    times = [1.0, *(s / (1 + s) for s in grid[1:])]
    for i, (t, t_) in enumerate(pairwise(times)):
        estimate = model(w / math.hypot(t, 1 - t), grid[i])
        u = estimate.eps - estimate.x0
        combined = u if previous is None or t_ == 0 else 1.5 * u - 0.5 * previous
        w, previous = w + (t_ - t) * combined, u
    actual = sample(model, solvers.ge(grid, 1.5, basis="velocity"), noise=noise)
    torch.testing.assert_close(actual, w, rtol=1e-12, atol=1e-12)


# precision and devices


def test_half_precision_networks_keep_a_float32_state() -> None:
    class Constant(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor([0.5, -1.25], dtype=dtype))

        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            assert (z.dtype, label.dtype) == (self.value.dtype, state)
            return self.value.expand_as(z)

    noise = torch.randn(8, 2, generator=generator())
    exact = sample(PointCloud([[0.5, -1.25]]), solvers.ddim(GRID[:-1]), noise=noise.double())
    state = torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        # x0 is the same in any precision, so the state's rounding is all that remains
        model = NetworkDenoiser(Constant(dtype), X0(), shape=(2,))
        states: list[Step] = []
        out = sample(model, solvers.ddim(GRID[:-1]), noise=noise, callback=states.append)
        assert {step.z.dtype for step in states} == {torch.float32}
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=5e-7)
        assert sample(model, solvers.ddim(GRID), noise=noise.to(dtype)).dtype == torch.float32
        assert sample(model, solvers.ddim(GRID), n=2, generator=generator()).dtype == torch.float32
        state = F64
        assert sample(model, solvers.ddim(GRID), noise=noise.double()).dtype == F64
        state = torch.float32


def test_float32_follows_float64() -> None:
    noise = torch.randn(64, 2, generator=generator())
    for name in ("ddim", "ge", "ge in velocity", "four estimates"):
        for prediction in (Eps(), V(), EDM(label="logsnr")):
            low = sample(network(mixture(), prediction), PLANS[name], noise=noise)
            high = sample(mixture(), PLANS[name], noise=noise.double())
            assert float((low - high).abs().median()) < 5e-6, (name, prediction)


READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Reads(TorchDispatchMode):
    """Counts how often the host reads a value back from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PLANS)
def test_nothing_is_read_back_but_the_check_at_the_end(name: str) -> None:
    model, plan, noise, source = mixture(), PLANS[name], randn(4, 2), generator()
    for check, expected in ((False, 0), (True, 1), ("each", plan.nfe)):
        before_last: list[int] = []
        with Reads() as reads:
            sample(
                model,
                plan,
                noise=noise,
                generator=source,
                check=check,
                callback=lambda step, reads=reads, seen=before_last: seen.append(reads.count),
            )
        assert reads.count == expected
        assert before_last == (list(range(plan.nfe + 1)) if check == "each" else [0] * (plan.nfe + 1))
    assert not sample(mixture(), plan, noise=noise.requires_grad_(), generator=source).requires_grad


# memory

SIZE = 3 * 64


class Live(TorchDispatchMode):
    """The largest number of tensors of the state's size that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, StorageWeakRef] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= SIZE * out.element_size():
            storage = out.untyped_storage()
            self.seen = {key: ref for key, ref in self.seen.items() if not ref.expired()}
            self.seen.setdefault(storage._cdata, StorageWeakRef(storage))
            self.most = max(self.most, len(self.seen))
        return out


class Sine(nn.Module):
    """A network that answers with a tensor of its own."""

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return torch.sin(z)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: f"{p.name}-{getattr(p, 'path', '')}")
@pytest.mark.parametrize("name", PLANS)
def test_at_most_three_tensors_besides_the_history(name: str, prediction: Prediction) -> None:
    plan, noise = PLANS[name], randn(3, 64)
    model = NetworkDenoiser(Sine(), prediction, shape=(64,))
    with Live() as live:
        out = sample(model, plan, noise=noise, generator=generator())
    assert out.isfinite().all()
    assert 2 <= live.most <= max(map(len, plan.rows)) + 3


@pytest.mark.parametrize("form", ["itself", "a view", "its memory", "through numpy"])
@pytest.mark.parametrize("name", ["ddim", "ge", "four estimates", "ddpm"])
def test_a_state_that_somebody_holds_is_not(name: str, form: str) -> None:
    """A model (or a cache around it) may keep what it was given."""
    hold = {
        "itself": lambda z: z,
        "a view": lambda z: z[1:],
        "its memory": lambda z: z.detach().untyped_storage(),
        "through numpy": lambda z: z.numpy(),
    }[form]

    class Keeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[tuple[object, Tensor]] = []

        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            self.kept.append((hold(z), z.clone()))
            return torch.sin(z)

    keeper = Keeper()
    sample(NetworkDenoiser(keeper, Eps(), shape=(2,)), PLANS[name], noise=randn(3, 2), generator=generator())
    for held, copy in keeper.kept:
        if form == "its memory":
            held = torch.empty(0, dtype=F64).set_(held).view(3, 2)
        assert torch.equal(torch.as_tensor(held), copy[1:] if form == "a view" else copy)


@pytest.mark.parametrize("name", ["ddim", "ge", "ge in x0", "ge in velocity", "four estimates"])
def test_estimates_may_be_the_state_itself(name: str) -> None:
    """A network that answers with its input: the history and the state are one tensor."""
    model, other = (NetworkDenoiser(n, Eps(), shape=(2,)) for n in (Same(), Copy()))
    states: list[Step] = []
    a = sample(model, PLANS[name], noise=randn(3, 2))
    b = sample(other, PLANS[name], noise=randn(3, 2), callback=states.append)
    assert torch.equal(a, b)


class Same(nn.Module):
    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return z


class Copy(nn.Module):
    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return z.clone()


# values that are not finite


class Breaks(nn.Module):
    """Answers with nan (or inf) from its k-th call on."""

    def __init__(self, k: int, value: float = math.nan) -> None:
        super().__init__()
        self.k, self.value, self.calls = k, value, 0

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        out = torch.sin(z)
        if self.calls > self.k:
            out[1, 0] = self.value
        return out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [0, 3, 8])
def test_a_broken_network_is_named_by_step_and_sigma(k: int, value: float) -> None:
    for name in ("ge", "ddim", "ddpm", "four estimates"):
        for check, calls in ((True, 9), ("each", k + 1)):
            model = NetworkDenoiser(Breaks(k, value), Eps(), shape=(2,))
            with pytest.raises(NonFiniteError, match=rf"step {k} \(sigma = {GRID[k]:.6g}\) left a state") as caught:
                sample(model, PLANS[name], noise=randn(3, 2), generator=generator(), check=check)
            assert (caught.value.step, caught.value.sigma) == (k, GRID[k])
            assert model.network.calls == calls
        model = NetworkDenoiser(Breaks(k, value), Eps(), shape=(2,))
        out = sample(model, PLANS[name], noise=randn(3, 2), generator=generator(), check=False)
        assert not out[1, 0].isfinite()
        assert out[[0, 2]].isfinite().all()


# what is refused

DDIM = solvers.ddim((2.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either noise"),
        ({"noise": torch.zeros(1, 2), "n": 1}, "not both"),
        ({"noise": torch.zeros(1, 2, dtype=torch.int64)}, "noise has dtype torch.int64"),
        ({"noise": torch.zeros(1, 3)}, r"noise has shape \(1, 3\): give \[B, 2\]"),
        ({"noise": torch.zeros(2)}, r"noise has shape \(2,\): give \[B, 2\]"),
        ({"n": 0, "generator": torch.Generator()}, "n = 0"),
        ({"n": 2}, "n = 2 draws noise: give generator="),
        ({"noise": torch.zeros(1, 2), "check": "always"}, "check 'always' is not one of True"),
    ],
)
def test_bad_starts_are_named(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(mixture(), DDIM, **arguments)


def test_a_noisy_plan_needs_a_generator() -> None:
    with pytest.raises(ValueError, match="the plan draws noise: give generator="):
        sample(mixture(), solvers.ddpm((2.0, 1.0, 0.0)), noise=torch.zeros(1, 2))


def test_zero_terminal_snr_is_refused_by_name() -> None:
    plan, noise = solvers.ddim((math.inf, 1.0, 0.0)), torch.zeros(1, 2)
    for model in (network(mixture(), Eps()), network(mixture(), Score()), Subspace(torch.eye(2)[:, :1])):
        with pytest.raises(ValueError, match=r"sigma = inf \(zero terminal SNR\).*finite sigma_max"):
            sample(model, plan, noise=noise)


def trained_on(low: float, high: float, prediction: Prediction = V()) -> NetworkDenoiser:  # noqa: B008
    return NetworkDenoiser(Sine(), prediction, shape=(2,), trained_range=(low, high))


@pytest.mark.parametrize(
    ("grid", "outside"),
    [
        ((20.0, 1.0, 0.0), "20"),
        ((10.0, 1.0, 0.01, 0.0), "0.01"),
        ((10.2, 1.0, 0.0), "10.2"),
        ((math.inf, 1.0, 0.0), "inf"),
    ],
)
def test_a_grid_beyond_the_trained_range_warns(grid: tuple[float, ...], outside: str) -> None:
    with pytest.warns(UserWarning, match=rf"sigma = {outside} is outside the range \[0.05, 10\]"):
        sample(trained_on(0.05, 10.0), solvers.ddim(grid), noise=randn(1, 2))


def test_rounding_and_the_last_level_do_not_warn() -> None:
    sample(trained_on(0.05, 157.0), solvers.ddim((157.407, 1.0, 0.0496, 0.0)), noise=randn(1, 2))
    sample(trained_on(0.05, 157.0), solvers.ddim((1.0, 0.001)), noise=randn(1, 2))  # never asked at .001
    sample(trained_on(0.05, 157.0, Flow()), solvers.ddim(grids.flow(4)), noise=randn(1, 2))


@pytest.mark.parametrize(
    ("name", "check"),
    [
        *(("ge", check) for check in (False, True, "each")),
        ("four estimates", "each"),
        *(
            pytest.param(name, check, marks=pytest.mark.heavy)
            for name in ("ddim", "ge in velocity", "four estimates")
            for check in (False, True, "each")
            if (name, check) != ("four estimates", "each")
        ),
    ],
)
def test_compiles_as_one_graph(name: str, check: object) -> None:
    class Network(nn.Module):
        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            return torch.tanh(z + label[:, None] / 10)

    torch._dynamo.reset()
    model, noise = NetworkDenoiser(Network(), V(), shape=(2,)), randn(4, 2)
    eager = sample(model, SHORT[name], noise=noise, check=check)
    compiled = torch.compile(
        lambda z: sample(model, SHORT[name], noise=z, check=check), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(noise), eager)


@pytest.mark.parametrize("label", ["stable-diffusion", "flow", "edm"])
def test_labels_are_constants_of_the_compiled_graph(label: str) -> None:
    class Network(nn.Module):
        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            return torch.tanh(z + label[:, None] / 1000)

    torch._dynamo.reset()
    model, noise = NetworkDenoiser(Network(), Eps(label=label), shape=(2,)), randn(4, 2)
    compiled = torch.compile(lambda z: sample(model, SHORT["ge"], noise=z), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(noise), sample(model, SHORT["ge"], noise=noise))


def test_a_compiled_run_names_the_step_too() -> None:
    class Overflows(nn.Module):
        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            return z / (label[:, None] < 0)  # positive log-SNR: sigma < 1

    torch._dynamo.reset()
    model, plan, noise = NetworkDenoiser(Overflows(), V(), shape=(2,)), SHORT["ge"], randn(4, 2)
    first = next(i for i, sigma in enumerate(plan.sigmas) if sigma < 1)
    with pytest.raises(NonFiniteError) as eager:
        sample(model, plan, noise=noise)
    assert (eager.value.step, eager.value.sigma) == (first, plan.sigmas[first])
    compiled = torch.compile(lambda z: sample(model, plan, noise=z), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=rf"step {first} \(sigma = {plan.sigmas[first]:.6g}\)"):
        compiled(noise)


def test_labels_are_remembered_but_never_stale() -> None:
    model, noise = network(mixture(), Flow(label="logsnr")), randn(3, 2)
    for prediction in (Flow(label="logsnr"), V(), Eps(path="ve")):
        model.prediction = model.network.prediction = prediction
        expected = sample(mixture(), PLANS["ge"], noise=noise)
        torch.testing.assert_close(sample(model, PLANS["ge"], noise=noise), expected, rtol=1e-9, atol=1e-9)


# what `sample` makes of a number, of progress and of conditions


def test_a_number_is_the_own_plan_or_the_universal_one_or_the_default() -> None:
    model, noise = network(mixture(), V()), randn(3, 2)
    low, high = model.sampling_range
    own = solvers.dpmpp(grids.log_linear(5, high, low))
    expected = {
        5: own,
        6: universal_plan(6, low, high, sigma_data=model.sigma_data),
        77: default_plan(77, low, high, sigma_data=model.sigma_data),
    }
    model.plans = {5: own}
    for nfe, plan in expected.items():
        assert plan_for(model, nfe) == plan
        assert torch.equal(sample(model, nfe, noise=noise), sample(model, plan, noise=noise))
    assert [plan_for(model, nfe).meta["solver"] for nfe in expected] == ["dpmpp", "universal", "default"]
    assert plan_for(Counted(model), 5) is own
    assert plan_for(guidance.cfg(model, 2.0, {}), 5) is own
    for wrong in (0, -1, 2.0, True, "ge"):
        with pytest.raises(ValueError, match=r"give a Plan .*, or a number of evaluations"):
            sample(model, wrong, noise=noise)


def test_the_default_is_gradient_estimation_on_even_times_about_four_sigma_data() -> None:
    plan = default_plan(6, 0.01, 80.0, sigma_data=0.5)
    assert plan == replace(solvers.ge(plan.sigmas, 1.7), meta=plan.meta)
    times = [sigma / (sigma + 2.0) for sigma in plan.sigmas]
    assert [b - a for a, b in pairwise(times)] == pytest.approx([(times[-1] - times[0]) / 6] * 6)
    assert (plan.sigmas[0], plan.sigmas[-1]) == (80.0, 0.01)
    # in units of sigma_data it is the same plan
    twice = default_plan(6, 0.02, 160.0, sigma_data=1.0)
    assert twice.sigmas == pytest.approx([2 * sigma for sigma in plan.sigmas])
    # what knows nothing at inf begins lower, the more steps the higher
    firsts = [default_plan(n, 0.01, 80.0, sigma_data=0.5, finite_at_inf=False).sigmas[0] for n in (1, 6, 20)]
    assert firsts == [7.5, 45.0, 80.0]
    assert default_plan(1, 4.0, 90.0, sigma_data=0.1, finite_at_inf=False).sigmas == (8.0, 4.0)
    for n, first in ((1, 15), (4, 60), (8, 120), (12, 120), (16, 128), (40, 320)):
        assert auto_plan(n, 0.01, 500.0, finite_at_inf=False).sigmas[0] == first
    for wrong, message in (
        ((0, 0.01, 80.0), "nfe = 0"),
        ((5, 1.0, 0.1), "range of levels"),
        ((5, 0.1, math.inf), "range of levels"),
    ):
        with pytest.raises(ls.LogsnrError, match=message):
            default_plan(*wrong)
    with pytest.raises(ls.LogsnrError, match="sigma_data = 0"):
        default_plan(5, 0.1, 1.0, sigma_data=0.0)


@pytest.mark.parametrize("knows", [True, False])
def test_from_four_evaluations_to_twelve_the_universal_plan_is_taken(knows: bool) -> None:
    for nfe in (1, 2, 3, 13, 30):
        plan = auto_plan(nfe, 0.01, 500.0, finite_at_inf=knows)
        assert plan == default_plan(nfe, 0.01, 500.0, finite_at_inf=knows)
        assert plan.meta["solver"] == "default"
    for nfe in range(4, 13):
        first = 500.0 if knows else min(15.0 * nfe, 120.0)
        assert auto_plan(nfe, 0.01, 500.0, finite_at_inf=knows) == universal_plan(nfe, 0.01, first)
    large = auto_plan(6, 0.01, 500.0, dim=LARGE)
    assert large == universal_plan(6, 0.01, 500.0, dim=LARGE)
    assert large != auto_plan(6, 0.01, 500.0)
    eps = network(mixture(), Eps())
    low, high = eps.sampling_range
    assert plan_for(eps, 6) == universal_plan(6, low, min(high, 90 * eps.sigma_data), sigma_data=eps.sigma_data)


def test_the_default_of_many_evaluations_converges() -> None:
    """Gradient estimation's error stays; of iPNDM a doubling leaves a third and less."""
    model, noise = mixture(), randn(64, 2)
    low, high = model.sampling_range
    ends = sample(model, teacher_plan(600, low, high), noise=noise)

    def error(plan: Plan) -> float:
        return float((sample(model, plan, noise=noise) - ends).square().mean().sqrt())

    errors = [error(default_plan(n, low, high, sigma_data=model.sigma_data)) for n in (16, 32, 64)]
    assert all(b < 0.36 * a for a, b in pairwise(errors))
    many = default_plan(64, low, high, sigma_data=model.sigma_data)
    assert many.sigmas == grids.angles(64, high, low, shift=3 * model.sigma_data)
    assert errors[-1] < 0.15 * error(solvers.ge(many.sigmas, 1.7))


@pytest.mark.parametrize("name", [name for name in solvers.__all__ if name != "custom"])
def test_a_solver_given_a_number_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=r"10 is no grid: .*grids\.log_linear\(10, .*sample\(denoiser, 10, \.\.\.\)"):
        getattr(solvers, name)(10)


def test_progress_shows_and_changes_nothing(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    model, noise, seen = network(mixture(), V()), randn(3, 2), []
    plain = sample(model, PLANS["ge"], noise=noise)
    assert torch.equal(sample(model, PLANS["ge"], noise=noise, progress=True, callback=seen.append), plain)
    assert len(seen) == 10
    assert capsys.readouterr().err == ""  # no terminal, nobody looks on
    monkeypatch.setenv("FORCE_COLOR", "1")
    sample(model, PLANS["ge"], noise=noise, progress=True)
    assert "sampling" in capsys.readouterr().err


def test_a_trajectory_is_every_state_and_estimate() -> None:
    model, noise, steps = network(mixture(), V()), randn(3, 2), []
    seen = trajectory(model, PLANS["ge"], noise=noise, callback=steps.append)
    assert seen.z.shape == (10, 3, 2)
    assert seen.x0.shape == (9, 3, 2)
    assert seen.sigmas == GRID
    assert torch.equal(seen.z[0], noise)
    assert torch.equal(seen.x, sample(model, PLANS["ge"], noise=noise))
    for i, sigma in enumerate(GRID[:-1]):
        torch.testing.assert_close(seen.x0[i], model(seen.z[i], sigma).x0)
    assert len(steps) == 10
    assert repr(seen) == f"Trajectory(3 samples (2,), 10 states, {PLANS['ge']!r})"
    assert trajectory(model, 6, noise=noise).plan == plan_for(model, 6)


class Told(nn.Module):
    """A network that must be told a class, and may be told a size; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor, label: Tensor, class_labels: Tensor, size: Tensor | None = None) -> Tensor:
        self.calls += 1
        return torch.tanh(z + class_labels[:, None])


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (
            {"class_label": torch.zeros(3).long()},
            "condition 'class_label' is not one of class_labels, size.*mean 'class",
        ),
        ({}, "this network needs class_labels: give cond="),
        ({"class_labels": torch.zeros(2).long()}, "class_labels has 2 entries for 3 samples"),
        ({"class_labels": torch.zeros(1).long()}, r"class_labels has 1 entries for 3 samples.*class_labels.expand\(3"),
        ({"class_labels": torch.zeros(3).long(), "size": torch.ones(4)}, "size has 4 entries for 3 samples"),
        ({"class_labels": torch.tensor([0, 11, 1])}, r"hold 11: this network has classes 0 \.\.\. 9, and 10 for none"),
        ({"class_labels": torch.tensor([0, -1, 1])}, r"hold -1: this network has classes"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_before_the_network_is_asked(cond, message: str) -> None:
    model, noise = NetworkDenoiser(Told(), V(), shape=(2,)), randn(3, 2)
    model.card = {"classes": 10, "null_class": 10}
    for run in (
        lambda: sample(model, DDIM, noise=noise, cond=cond),
        lambda: sample(Counted(model), DDIM, noise=noise, cond=cond),
        lambda: heun(model, GRID, noise=noise, cond=cond),
        lambda: solve(model, 2.0, 1.0, noise, cond=cond),
        lambda: ddim_invert(model, noise, GRID, cond=cond),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    assert model.network.calls == 0


def test_conditions_that_fit_pass() -> None:
    model, noise = NetworkDenoiser(Told(), V(), shape=(2,)), randn(3, 2)
    model.card = {"classes": 10, "null_class": 10}
    labels = torch.tensor([0, 9, 10])
    sample(model, DDIM, noise=noise, cond={"class_labels": labels})
    null = {"class_labels": 10}
    sample(guidance.cfg(model, 2.0, null), DDIM, noise=noise, cond={"class_labels": labels})
    sample(guidance.cfg(model, 0.0, {"class_labels": labels}), DDIM, noise=noise)  # the null condition alone
    with pytest.raises(ValueError, match="condition 'clas' is not one of"):
        sample(guidance.cfg(model, 2.0, null), DDIM, noise=noise, cond={"clas": labels})


def test_evaluations_of_a_plain_denoiser_are_those_of_the_plan() -> None:
    assert all(evaluations(mixture(), plan) == plan.nfe for plan in PLANS.values())
