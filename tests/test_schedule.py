"""Schedules: densities, quantiles, truncation, draws."""

from __future__ import annotations

import math

import pytest
import torch

from logsnr.schedules import (
    SCHEDULES,
    Cosine,
    CosMap,
    Discrete,
    EDMSampling,
    EDMTraining,
    FlowBeta,
    FlowMode,
    FlowUniform,
    InterpolatedCosine,
    Laplace,
    Linear,
    LogitNormal,
    Schedule,
    VPLinear,
)
from logsnr.timesteps import TimestepTable

ZERO_TERMINAL = TimestepTable(torch.linspace(0.999, 0, 50, dtype=torch.float64))
ALL: dict[str, Schedule] = {
    "cosine": Cosine(),
    "cosine-shifted": Cosine(2 * math.log(64 / 256)),
    "cosmap": CosMap(),
    "flow": FlowUniform(),
    "flow-shift-3": FlowUniform(3.0),
    "edm-training": EDMTraining(),
    "edm2-training": EDMTraining(-0.4, 1.0),
    "edm-sampling": EDMSampling(),
    "logit-normal": LogitNormal(0.5, 0.8),
    "laplace": Laplace(0.9, 0.7),
    "flow-mode": FlowMode(),
    "flow-mode-ends": FlowMode(-0.8),
    "flow-beta": FlowBeta(2.5, 1.5),
    "linear": Linear(),
    "vp-linear": VPLinear(),
    "vp-fit": VPLinear(0.0, 20.0, offset=1e-4),
    "interpolated": InterpolatedCosine(32, 256, 64),
    "interpolated-steep": InterpolatedCosine(256, 32, 64),
    "discrete-ddpm": Discrete(TimestepTable.ddpm()),
    "discrete-zero-terminal": Discrete(ZERO_TERMINAL),
}
every_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())


def linspace(lo: float, hi: float, n: int) -> torch.Tensor:
    return torch.linspace(lo, hi, n, dtype=torch.float64)


def inner(schedule: Schedule, bound: float = 15.0) -> tuple[float, float]:
    lo, hi = schedule.range
    return max(lo, -bound), min(hi, bound)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_schedule
def test_density_is_minus_dt_by_dlogsnr(schedule: Schedule) -> None:
    t = torch.tensor([0.05, 0.2, 0.5, 0.77, 0.95], dtype=torch.float64, requires_grad=True)
    logsnr = schedule.logsnr(t)
    (slope,) = torch.autograd.grad(logsnr.sum(), t)
    torch.testing.assert_close(schedule.log_density(logsnr).exp().detach(), -1 / slope, rtol=1e-12, atol=0)


@every_schedule
def test_time_inverts_logsnr(schedule: Schedule) -> None:
    t = linspace(0.001, 0.999, 301)
    torch.testing.assert_close(schedule.time(schedule.logsnr(t)), t, rtol=1e-12, atol=1e-13)
    # The other way, one float64 t near 1 is worth an ulp/p of log-SNR: nothing but that is lost.
    x = linspace(*inner(schedule), 301)
    error, ulp = (schedule.logsnr(schedule.time(x)) - x).abs(), 4.5e-16 / schedule.log_density(x).exp()
    assert (error <= 1e-12 + ulp)[ulp < 1e-3].all()


@every_schedule
def test_both_tails_carry_full_digits(schedule: Schedule) -> None:
    x = linspace(*inner(schedule, 20), 401)
    t, c = schedule._tails(x)
    torch.testing.assert_close(t + c, torch.ones_like(t), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule._quantile(t, c), x, rtol=0, atol=2e-12)


@every_schedule
def test_truncated_density_has_mass_one_and_the_same_shape(schedule: Schedule) -> None:
    lo, hi = inner(schedule, 9.0)
    truncated = schedule.truncate(lo, hi)
    kinks = [lo, hi]
    if isinstance(schedule, Discrete):
        kinks = sorted({lo, hi, *[float(v) for v in -2 * schedule.table.sigmas.log() if lo < v < hi]})
    elif not kinks[1] - kinks[0] < 1:
        kinks = linspace(lo, hi, 41).tolist()
    total = 0.0
    nodes, weights = gauss(20)
    edges = torch.tensor(kinks, dtype=torch.float64)
    half = 0.5 * (edges[1:] - edges[:-1])
    x = (edges[:-1] + half)[:, None] + half[:, None] * nodes
    total = float((truncated.log_density(x).exp() * weights * half[:, None]).sum())
    assert total == pytest.approx(1, abs=1e-12)
    ratio = truncated.log_density(x) - schedule.log_density(x)
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=0, atol=1e-12)
    outside = torch.tensor([lo - 1e-6, hi + 1e-6], dtype=torch.float64)
    assert truncated.log_density(outside).tolist() == [-math.inf, -math.inf]


def gauss(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre nodes and weights on [-1, 1], by the eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, n, dtype=torch.float64)
    b = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(b, 1) + torch.diag(b, -1))
    return nodes, 2 * vectors[0] ** 2


@every_schedule
def test_truncation_is_the_slice_of_time(schedule: Schedule) -> None:
    lo, hi = inner(schedule, 8.0)
    t0, t1 = schedule.time(hi), schedule.time(lo)
    t = linspace(0, 1, 101)
    truncated = schedule.truncate(lo, hi)
    torch.testing.assert_close(truncated.logsnr(t), schedule.logsnr(t0 + (t1 - t0) * t), rtol=0, atol=1e-10)
    assert truncated.logsnr(0.0).item() == hi
    assert truncated.logsnr(1.0).item() == lo
    again = truncated.truncate(lo + 1, hi - 1)
    x = linspace(lo + 1, hi - 1, 11)
    torch.testing.assert_close(again.log_density(x), schedule.truncate(lo + 1, hi - 1).log_density(x))


@every_schedule
def test_truncation_keeps_both_tails(schedule: Schedule) -> None:
    """At log-SNR -19 EDM's 1 - t is 2e-19: below the ulp of t, but not of c."""
    lo, hi = inner(schedule, 20)
    truncated = schedule.truncate(lo, hi)
    x = linspace(lo, hi, 401)
    torch.testing.assert_close(truncated._quantile(*truncated._tails(x)), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("bound", "kept"), [(20, 0.999942), (15, 0.999296), (10, 0.991421)])
def test_cosine_mass_kept_by_truncation(bound: int, kept: float) -> None:
    mass = float(Cosine().time(-float(bound)) - Cosine().time(float(bound)))
    assert mass == pytest.approx(kept, abs=5e-7)


def test_landmarks_of_the_literature() -> None:
    assert EDMSampling().range == pytest.approx((-8.764, 12.429), abs=5e-4)
    assert VPLinear().logsnr(1.0).item() == pytest.approx(-10.05, abs=5e-3)
    x = linspace(-3, 1, 400001)
    p = VPLinear().log_density(x)
    assert x[p.argmax()].item() == pytest.approx(-0.922, abs=5e-4)
    assert p.max().exp().item() == pytest.approx(0.10115, abs=5e-6)
    t = linspace(0, 1, 101)
    fit = VPLinear(0, 20, offset=1e-4)  # VDM's: -log(expm1(1e-4 + 10 t^2)), DDPM's betas but for the first steps
    torch.testing.assert_close(fit.logsnr(t), -torch.expm1(1e-4 + 10 * t**2).log(), rtol=0, atol=1e-11)
    ddpm = -2 * TimestepTable.ddpm().sigmas.log()
    assert fit.range == pytest.approx((-10.0, 9.2103), abs=1e-3)
    assert float((fit.logsnr(linspace(0.1, 1, 10)) - ddpm[[*range(99, 1000, 100)]]).abs().max()) < 0.3
    assert Discrete(TimestepTable.ddpm()).range == pytest.approx((-10.118, 9.210), abs=5e-4)
    assert Discrete(TimestepTable.stable_diffusion()).range == pytest.approx((-5.364, 7.069), abs=5e-4)
    cosine = -2 * TimestepTable.cosine().sigmas.log()
    assert cosine[[0, 998, 999]].tolist() == pytest.approx([10.095, -12.93, -19.84], abs=5e-3)


def test_shifts_move_the_law() -> None:
    x, s = linspace(-12, 12, 97), 2 * math.log(64 / 256)
    torch.testing.assert_close(Cosine(s).log_density(x), Cosine().log_density(x - s), rtol=1e-14, atol=1e-14)
    # SD3: flow time a t / (1 + (a - 1) t).
    t, a = linspace(0.01, 0.99, 99), 3.0
    moved = a * t / (1 + (a - 1) * t)
    torch.testing.assert_close(FlowUniform(a).logsnr(t), 2 * ((1 - moved) / moved).log(), rtol=1e-12, atol=1e-13)
    # Truncating a shifted schedule is truncating the plain one to the moved interval.
    left, right = Cosine(s).truncate(-15, 15), Cosine().truncate(-15 - s, 15 - s)
    u = linspace(0, 1, 33)
    torch.testing.assert_close(left.logsnr(u), right.logsnr(u) + s, rtol=0, atol=1e-11)


def test_cosmap_is_the_cosine_law_in_flow_time() -> None:
    t = linspace(0.01, 0.99, 99)
    flow_time = 1 - 1 / (torch.tan(math.pi * t / 2) + 1)
    torch.testing.assert_close(CosMap().logsnr(t), 2 * ((1 - flow_time) / flow_time).log(), rtol=0, atol=1e-12)


def test_interpolated_cosine_has_the_two_ends() -> None:
    t = torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
    clean, noisy = InterpolatedCosine(32, 256, 64).logsnr(t).tolist()
    assert clean == pytest.approx(Cosine(2 * math.log(256 / 64)).logsnr(t[0]).item(), abs=1e-6)
    assert noisy == pytest.approx(Cosine(2 * math.log(32 / 64)).logsnr(t[1]).item(), abs=1e-6)


def test_discrete_agrees_with_its_table() -> None:
    for table in (TimestepTable.ddpm(), ZERO_TERMINAL):
        t = linspace(0, 1, 777)[:-1]
        sigma = table.sigma(t * (len(table) - 1))
        torch.testing.assert_close((-0.5 * Discrete(table).logsnr(t)).exp(), sigma, rtol=1e-11, atol=0)
    assert Discrete(ZERO_TERMINAL).range[0] == -math.inf


@every_schedule
def test_stratified_draws_put_one_in_each_stratum_over_all_ranks(schedule: Schedule) -> None:
    n, world = 40, 3
    ranks = [schedule.sample(n, generator=draws(r), rank=r, world=world) for r in range(world)]
    strata = (torch.stack([schedule.time(v) for v in ranks]) * (n * world)).floor().long()
    assert sorted(strata.flatten().tolist()) == list(range(n * world))
    for r in range(world):
        assert set((strata[r] % world).tolist()) == {r}  # interleaved: each rank covers the whole range
        assert strata[r].tolist() != sorted(strata[r].tolist())  # shuffled


def test_position_in_the_batch_says_nothing_of_the_level() -> None:
    generator = draws(3)
    first = torch.stack([Linear(0, 1).sample(16, generator=generator)[0] for _ in range(4000)])
    assert first.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 4000))
    assert first.var().item() == pytest.approx(1 / 12, rel=0.05)


def test_lattice_is_one_draw_for_all_ranks() -> None:
    schedule, n, world = Linear(0, 1), 8, 2
    parts = [
        schedule.sample(n, generator=draws(r), rank=r, world=world, method="lattice", offset=0.3) for r in range(world)
    ]
    points = torch.cat(parts).sort().values
    torch.testing.assert_close(points.diff(), torch.full((15,), 1 / 16, dtype=torch.float64), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="offset"):
        schedule.sample(n, generator=draws(), rank=0, world=2, method="lattice")


def test_even_draws_reduce_the_variance_of_a_batch_mean() -> None:
    cosine = Cosine()
    schedule = cosine.truncate(float(cosine.logsnr(1 - 1e-3)), float(cosine.logsnr(1e-3)))

    def spread(method: str) -> float:
        generator = draws(11)
        means = []
        for _ in range(400):
            x = schedule.sample(128, generator=generator, method=method)
            loss = 0.5 * torch.sigmoid(2 - x) * torch.sigmoid(x) / schedule.log_density(x).exp()
            means.append(loss.mean())
        return float(torch.stack(means).std())

    iid, stratified, lattice = spread("iid"), spread("stratified"), spread("lattice")
    assert iid == pytest.approx(5.95e-2, rel=0.2)
    assert stratified / iid < 5e-2
    assert lattice / iid < 5e-3


def test_grid_reproduces_edm() -> None:
    n, rho = 18, 7
    i = torch.arange(n + 1, dtype=torch.float64)
    karras = (80 ** (1 / rho) + i / n * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    torch.testing.assert_close(EDMSampling().grid(n), karras, rtol=1e-13, atol=0)


@every_schedule
def test_grid_is_decreasing_with_equal_shares(schedule: Schedule) -> None:
    truncated = schedule.truncate(*inner(schedule, 8.0))
    sigmas = truncated.grid(10)
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close(truncated.time(-2 * sigmas.log()), linspace(1, 0, 11), rtol=0, atol=1e-10)


def test_every_name_makes_a_schedule() -> None:
    for name, kind in SCHEDULES.items():
        schedule = kind(32, 256, 64) if name == "interpolated-cosine" else kind()
        assert schedule.logsnr(0.25) > schedule.logsnr(0.75)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine().grid(4), "truncate first"),
        (lambda: Linear().grid(0), "at least one step"),
        (lambda: Linear(-5, 5).truncate(-6, 5), "support"),
        (lambda: Cosine().truncate(3, 3), "increase"),
        (lambda: Cosine().truncate(-3, 3).truncate(-4, 3), "support"),
        (lambda: Linear(5, -5), "increase"),
        (lambda: EDMSampling(sigma_min=90), "sigma_max"),
        (lambda: EDMTraining(p_std=0), "p_std = 0"),
        (lambda: FlowUniform(-1), "shift = -1"),
        (lambda: CosMap(1.0), "Cosine"),
        (lambda: VPLinear(5, 1), "b0 <= b1"),
        (lambda: VPLinear(offset=-1), "0 <= offset"),
        (lambda: InterpolatedCosine(2560, 32, 64), "rises with time"),
        (lambda: Cosine().sample(0, generator=draws()), "n = 0"),
        (lambda: Cosine().sample(4, generator=draws(), rank=2, world=2), "rank = 2"),
        (lambda: Cosine().sample(4, generator=draws(), method="sobol"), "sobol"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
