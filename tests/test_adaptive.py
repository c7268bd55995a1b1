"""The adaptive schedule: unbiased, convergent, exactly restorable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from logsnr.exact import Gaussian, GaussianMixture
from logsnr.objectives import WeightedELBO
from logsnr.schedules import Cosine, EDMTraining, FlowUniform, Linear, LogitNormal, Schedule
from logsnr.schedules.adaptive import IMPORTANCES, Adaptive, Importance
from logsnr.weightings import EDM, ELBO, EDMMonotonic, EpsCosine, Sigmoid, V, Weighting

LO, HI = -10.0, 10.0


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lumpy(weighting: Weighting, **options: float) -> Adaptive:
    """An adaptive schedule far from its start: errors from an arbitrary curve."""
    schedule = Adaptive((LO, HI), weighting, decay=0.5, **options)  # type: ignore[arg-type]
    x = Linear(LO, HI).sample(3000, generator=rng(7))
    schedule.update(x, 3 + torch.sin(2 * x) + torch.exp(-(x**2)))
    return schedule


def test_starts_from_the_gaussian_error() -> None:
    schedule = Adaptive((LO, HI), Sigmoid(2.0), sigma_data=0.5, dim=12, floor=1e-12)
    centers = torch.linspace(LO + 0.1, HI - 0.1, 100, dtype=torch.float64)
    expected = torch.sigmoid(2 - centers) * torch.sigmoid(centers + 2 * math.log(0.5))
    torch.testing.assert_close(schedule.probabilities(), expected / expected.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        schedule.state_dict()["error"], 12 * torch.sigmoid(centers + 2 * math.log(0.5)), rtol=1e-12, atol=0
    )


def test_starts_from_a_given_schedule() -> None:
    initial = Cosine().truncate(LO, HI)
    schedule = Adaptive(initial, Sigmoid(2.0), bins=400, floor=1e-9)
    x = torch.linspace(-9.975, 9.975, 400, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_density(x), initial.log_density(x), rtol=0, atol=1e-3)


def test_density_time_and_draws_agree() -> None:
    schedule = lumpy(Sigmoid(2.0))
    edges = torch.linspace(LO, HI, 101, dtype=torch.float64)
    centers = 0.5 * (edges[1:] + edges[:-1])
    mass = schedule.log_density(centers).exp() * 0.2
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(-schedule.time(edges).diff(), mass, rtol=1e-9, atol=1e-15)
    x = torch.linspace(LO, HI, 997, dtype=torch.float64)
    torch.testing.assert_close(schedule.logsnr(schedule.time(x)), x, rtol=0, atol=1e-10)
    n = 20000
    draws = torch.histc(schedule.sample(n, generator=rng()), 100, LO, HI)
    assert float((draws / n - mass).abs().max()) <= 2 / n  # stratified: at most one draw off at either edge


@pytest.mark.parametrize("weighting", [ELBO(), Sigmoid(2.0), V()])
def test_estimate_is_unbiased_whatever_the_state(weighting: Weighting) -> None:
    """MC mean = quadrature within 4 standard errors, in total and in every tenth of the range."""
    schedule, s, n = lumpy(weighting), 0.7, 40000
    model = Gaussian(torch.zeros(1).double(), s**2 * torch.eye(1).double())
    x = s * torch.randn(n, 1, generator=rng(1), dtype=torch.float64)
    out = WeightedELBO(weighting, schedule)(model, x, generator=rng(2))
    for lo, hi in [(LO, HI), *[(LO + 2 * k, LO + 2 * k + 2) for k in range(10)]]:
        grid = torch.linspace(lo, hi, 2001, dtype=torch.float64)
        exact = torch.trapezoid(0.5 * weighting(grid) * torch.sigmoid(grid + 2 * math.log(s)), grid)
        part = torch.where((out.logsnr >= lo) & (out.logsnr < hi), out.loss, 0.0)
        assert float(part.mean()) == pytest.approx(float(exact), abs=4 * float(part.std()) / math.sqrt(n))
    everywhere = torch.linspace(LO, HI, 5001, dtype=torch.float64)
    assert float(schedule.log_density(everywhere).exp().min()) >= 0.01 / (HI - LO) * (1 - 1e-12)


@pytest.mark.parametrize(
    "weighting",
    [
        pytest.param(Sigmoid(2.0), id="sigmoid"),
        pytest.param(EDMMonotonic(), id="edm-monotonic", marks=pytest.mark.heavy),
        pytest.param(V(), id="v", marks=pytest.mark.heavy),
    ],
)
def test_converges_to_the_best_density_and_stays_unbiased(weighting: Weighting) -> None:
    """Gaussian data, D = 64, batches of 128: TV(p, p*) < .02 and the mean loss of all steps within .1%.

    eps_hat - eps of the exact denoiser is N(0, r I): E = r chi^2_64, drawn as such.  Started from a uniform density.
    """
    dim, steps = 64, 3000
    schedule = Adaptive(Linear(LO, HI), weighting, decay=0.99, dim=dim)
    generator, losses = rng(5), []
    for _ in range(steps):
        x = schedule.sample(128, generator=generator)
        noise = torch.randn(128, dim, generator=generator)
        error = torch.sigmoid(x) * noise.square().sum(1)
        losses.append((0.5 * (weighting.log(x) - schedule.log_density(x)).exp() * error).mean())
        schedule.update(x, error)
    centers = torch.linspace(LO + 0.1, HI - 0.1, 100, dtype=torch.float64)
    best = weighting(centers) * torch.sigmoid(centers)
    best = 0.99 * best / best.sum() + 0.01 / 100
    assert 0.5 * float((schedule.probabilities() - best).abs().sum()) < 0.02
    expected = dim * WeightedELBO(weighting, Linear(LO, HI)).scale(1)
    assert float(torch.stack(losses).mean()) == pytest.approx(expected, rel=1e-3)


# Sheet, section 5: relative one-sample variance int (w r)^2/p / (int w r)^2 - 1 on [-10, 10], r = sigmoid(lambda).
FIXED: list[Schedule] = [
    Linear(LO, HI),
    *[
        k.truncate(LO, HI)
        for k in (Cosine(), FlowUniform(), EDMTraining(), Cosine(2 * math.log(64 / 256)), LogitNormal(0, 1))
    ],
]
VARIANCE: list[tuple[Weighting, str]] = [
    (ELBO(), ".80002 8.1476 5.1505 7.0396 35.054 5627.7"),
    (EpsCosine(), "1.7485 .49567 .4899 .14238 3.9881 19.851"),
    (Sigmoid(2.0), "2.1314 .32893 .45982 .40489 2.9368 .31471"),
    (EDM(), "1.2429 .26044 .2411 .23502 2.9295 3.1952"),
    (EDMMonotonic(), "1.2305 .25398 .23457 .25328 2.9074 3.1764"),
    (V(), "1.0615 0 .040306 19.045 1.1043 9.6421"),
]


def variance(weighting: Weighting, schedule: Schedule) -> float:
    x = torch.linspace(LO, HI, 400001, dtype=torch.float64)
    x = 0.5 * (x[1:] + x[:-1])
    loss, dx = weighting(x) * torch.sigmoid(x), x[1] - x[0]
    second = (loss**2 / schedule.log_density(x).exp()).sum() * dx
    return float(second / (loss.sum() * dx) ** 2 - 1)


@pytest.mark.parametrize(("weighting", "printed"), VARIANCE)
def test_variance_table(weighting: Weighting, printed: str) -> None:
    values = [variance(weighting, schedule) for schedule in FIXED]
    for value, digits in zip(values, printed.split(), strict=True):
        assert value == pytest.approx(float(digits), rel=6e-5, abs=1e-8)
    # Adapted: what bins of .2 and the uniform 1% leave, against 0 for the continuous optimum.
    adapted = Adaptive(Linear(LO, HI), weighting)
    x = 0.5 * (torch.linspace(LO, HI, 101)[1:] + torch.linspace(LO, HI, 101)[:-1]).double()
    adapted.load_state_dict({"error": torch.sigmoid(x), "visits": torch.ones(100)})
    assert variance(weighting, adapted) < 0.013


def test_bins_never_visited_keep_their_start() -> None:
    schedule = Adaptive((LO, HI), ELBO(), dim=3)
    before = schedule.state_dict()["error"]
    schedule.update(torch.full((50,), 5.1, dtype=torch.float64), torch.full((50,), 2.0))
    after = schedule.state_dict()["error"]
    assert (after != before).nonzero().flatten().tolist() == [75]
    assert (schedule.probabilities() > 0).all()


def test_average_forgets_by_count() -> None:
    """Early visits are averaged (the start counts as one); later k draws at once equal k draws of the same value."""
    schedule = Adaptive((0.0, 1.0), ELBO(), bins=1, decay=0.9)
    start = float(schedule.state_dict()["error"])
    at = torch.full((3,), 0.5, dtype=torch.float64)
    schedule.update(at, torch.tensor([1.0, 2.0, 6.0]))
    assert float(schedule.state_dict()["error"]) == pytest.approx((start + 9) / 4, rel=1e-14)
    many, one = (Adaptive((0.0, 1.0), ELBO(), bins=1, decay=0.9) for _ in range(2))
    for each in (many, one):
        each.load_state_dict({"error": torch.tensor([4.0]), "visits": torch.tensor([1e6])})
    many.update(at, torch.full((3,), 7.0))
    for _ in range(3):
        one.update(at[:1], torch.full((1,), 7.0))
    assert float(many.state_dict()["error"]) == pytest.approx(7 - 3 * 0.9**3, rel=1e-14)
    assert float(one.state_dict()["error"]) == pytest.approx(7 - 3 * 0.9**3, rel=1e-14)


def test_another_weighting_can_use_the_state() -> None:
    """What is stored is the unweighted error."""
    states = [lumpy(w).state_dict()["error"] for w in (ELBO(), Sigmoid(2.0), V())]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_non_finite_errors_are_left_out() -> None:
    schedule, other = Adaptive((LO, HI), ELBO()), Adaptive((LO, HI), ELBO())
    x = torch.tensor([0.1, 0.1, 3.0], dtype=torch.float64)
    schedule.update(x, torch.tensor([1.0, math.nan, math.inf]))
    other.update(x[:1], torch.tensor([1.0]))
    assert torch.equal(schedule.state_dict()["error"], other.state_dict()["error"])


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_state_is_restored_bit_for_bit(importance: Importance) -> None:
    schedule, copy = (Adaptive((LO, HI), Sigmoid(2.0), decay=0.5, importance=importance) for _ in range(2))

    def learn(each: Adaptive, x: Tensor, step: int) -> None:
        each.update(x, torch.sigmoid(x) * (1 + step), torch.sigmoid(x - step))
        each.correct(x[:5], torch.sigmoid(x[:5]), torch.sigmoid(x[:5] + 1))

    learn(schedule, Linear(LO, HI).sample(300, generator=rng(7)), 1)
    copy.sample(3, generator=rng())  # what it drew before is forgotten
    copy.load_state_dict(schedule.state_dict())
    for step in range(3):
        x, y = (each.sample(64, generator=rng(step)) for each in (schedule, copy))
        assert torch.equal(x, y)
        for each in (schedule, copy):
            learn(each, x, step)
    first, second = schedule.state_dict(), copy.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        fresh = Adaptive((LO, HI), Sigmoid(2.0)).state_dict()[name]
        assert torch.equal(value, fresh) == (name == "range"), name  # where the bins lie is not learned


def test_a_state_of_version_0_1_holds_an_average_more() -> None:
    """Its E m^2, "square", is left out; what remains draws on bit for bit."""
    schedule, copy = lumpy(Sigmoid(2.0)), Adaptive((LO, HI), Sigmoid(2.0), decay=0.5)
    copy.load_state_dict({**schedule.state_dict(), "square": torch.ones(100, dtype=torch.float64)})
    assert copy.state_dict().keys() == schedule.state_dict().keys()
    assert torch.equal(schedule.sample(64, generator=rng()), copy.sample(64, generator=rng()))


def test_a_state_of_error_and_visits_is_enough_for_the_error() -> None:
    """What an earlier version saved draws on as it did."""
    schedule, copy = lumpy(Sigmoid(2.0)), Adaptive((LO, HI), Sigmoid(2.0), decay=0.5)
    copy.load_state_dict({name: schedule.state_dict()[name] for name in ("error", "visits")})
    x = schedule.sample(64, generator=rng())
    assert torch.equal(x, copy.sample(64, generator=rng()))
    for each in (schedule, copy):
        each.update(x, torch.sigmoid(x))
    assert torch.equal(schedule.probabilities(), copy.probabilities())


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_two_ranks_cover_the_strata_of_the_whole_batch(importance: Importance) -> None:
    """In quantiles of p, each of the 2 n strata holds exactly one draw of the two ranks together."""
    schedule, n = Adaptive((LO, HI), Sigmoid(2.0), importance=importance), 50
    x = Linear(LO, HI).sample(500, generator=rng(1))
    schedule.update(x, 3 + torch.sin(x), 2 + torch.cos(3 * x))
    draws = torch.cat([schedule.sample(n, generator=rng(10 + rank), rank=rank, world=2) for rank in range(2)])
    strata = (2 * n * schedule.time(draws)).floor().long()
    assert sorted(strata.tolist()) == list(range(2 * n))
    assert (strata[:n] % 2 == 0).all()


@pytest.mark.parametrize("schedule", [lumpy(Sigmoid(2.0)), Cosine().truncate(LO, HI), Cosine()], ids=repr)
def test_mass_is_the_integral_of_the_density(schedule: Schedule) -> None:
    edges = torch.tensor([-12.0, -9.3, -1.0, -0.95, 4.0, 9.99, 10.0, 11.0, 30.0], dtype=torch.float64)
    for mass, lo, hi in zip(schedule.mass(edges), edges[:-1], edges[1:], strict=True):
        x = torch.linspace(float(lo), float(hi), 200001, dtype=torch.float64)
        integral = schedule.log_density(0.5 * (x[1:] + x[:-1])).exp().mean() * (hi - lo)
        assert float(mass) == pytest.approx(float(integral), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("sign", [-1, 1])
def test_mass_keeps_its_digits_in_either_tail(sign: int) -> None:
    """Cosine: t = (2/pi) atan e^(-lambda/2), and c the same of -lambda."""
    edges = sign * torch.tensor([70.0, 80.0], dtype=torch.float64)
    expected = 2 / math.pi * (math.atan(math.exp(-35)) - math.atan(math.exp(-40)))
    assert float(Cosine().mass(edges.sort().values)) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(
    "weighting", [ELBO(), EpsCosine(), Sigmoid(2.0), EDMMonotonic()], ids=lambda w: w.__class__.__name__
)
def test_adapted_leaves_a_tenth_of_the_best_fixed_schedules_variance(weighting: Weighting) -> None:
    """Between noise levels, on an exact mixture, after 100 batches of 256, against the best of five in hindsight.

    Var E[l | lambda]/L^2 = int (w m)^2/p / (int w m)^2 - 1, with m on 200 levels from the same 1000 draws.
    """
    dim = 2
    means = torch.tensor([[-0.9, 0.2], [0.5, 0.7], [0.6, -0.8]], dtype=torch.float64)
    model = GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2]).double(), means, 0.01 * torch.eye(dim).double().expand(3, 2, 2)
    )
    generator = rng(8)

    def data(n: int) -> Tensor:
        of = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, replacement=True, generator=generator)
        return means[of] + 0.1 * torch.randn(n, dim, generator=generator, dtype=torch.float64)

    schedule = Adaptive((LO, HI), weighting, sigma_data=0.7, dim=dim)
    objective = WeightedELBO(weighting, schedule)
    for _ in range(100):
        objective.update(objective(model, data(256), generator=generator))

    x = torch.linspace(LO, HI, 201, dtype=torch.float64)
    x, width = 0.5 * (x[1:] + x[:-1]), (HI - LO) / 200
    held, eps = (
        data(1000).repeat(200, 1),
        torch.randn(1000, dim, generator=generator, dtype=torch.float64).repeat(200, 1),
    )
    m = model.eps_error(held, eps, (-0.5 * x).exp().repeat_interleave(1000)).view(200, 1000).mean(1)
    loss = weighting(x) * m

    def between(p: Schedule) -> float:
        return float((loss**2 / p.log_density(x).exp()).sum() / loss.sum() ** 2 / width) - 1

    assert between(schedule) < 0.1 * min(map(between, FIXED))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_ranks_that_add_their_sums_hold_the_same_density(
    monkeypatch: pytest.MonkeyPatch, importance: Importance
) -> None:
    """Two ranks with half a batch each, all_reduce replaced by the true sum, equal one rank with the whole batch."""
    x = Linear(LO, HI).sample(64, generator=rng(3))
    error, gradient = torch.sigmoid(x) * 5, torch.sigmoid(x) ** 2 * 7

    def fresh() -> Adaptive:
        return Adaptive((LO, HI), Sigmoid(2.0), importance=importance)

    whole = fresh()
    whole.update(x, error, gradient)
    sums: list[Tensor] = []
    recorder, ranks = fresh(), []
    dist = "logsnr.schedules.adaptive.dist"
    monkeypatch.setattr(f"{dist}.is_available", lambda: True)
    monkeypatch.setattr(f"{dist}.is_initialized", lambda: True)
    monkeypatch.setattr(f"{dist}.all_reduce", lambda t: sums.append(t.clone()), raising=False)
    for half in (slice(0, 32), slice(32, 64)):
        recorder.update(x[half], error[half], gradient[half])
    total = sums[0] + sums[1]
    monkeypatch.setattr(f"{dist}.all_reduce", lambda t: t.copy_(total))
    for half in (slice(0, 32), slice(32, 64)):
        rank = fresh()
        rank.update(x[half], error[half], gradient[half])
        ranks.append(rank)
    assert torch.equal(ranks[0].probabilities(), ranks[1].probabilities())
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(ranks[0].state_dict()[name], value, rtol=1e-14, atol=0)
    torch.testing.assert_close(ranks[0].probabilities(), whole.probabilities(), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("initial", "options", "message"),
    [
        (Cosine(), {}, "truncate"),
        ((5.0, -5.0), {}, "increase"),
        ((LO, HI), {"bins": 0}, "bins = 0"),
        ((LO, HI), {"importance": "loss"}, "'loss' is not one of error, gradient"),
        ((LO, HI), {"decay": 1.0}, r"decay = 1\.0"),
        ((LO, HI), {"floor": 0.0}, r"floor = 0\.0"),
        ((LO, HI), {"sigma_data": -1.0}, r"sigma_data = -1\.0"),
    ],
)
def test_bad_input_is_refused(initial: object, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adaptive(initial, ELBO(), **options)  # type: ignore[arg-type]


def test_a_state_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(100,\) bins, this schedule 50"):
        Adaptive((LO, HI), ELBO(), bins=50).load_state_dict(Adaptive((LO, HI), ELBO()).state_dict())


def test_a_state_belongs_to_its_range() -> None:
    state = Adaptive((LO, HI), ELBO()).state_dict()
    with pytest.raises(ValueError, match=r"learned on log-SNR \[-10, 10\], this schedule is of \[-10, 9\]: its"):
        Adaptive((LO, 9.0), ELBO()).load_state_dict(state)
    del state["range"]  # of version 0.1
    Adaptive((LO, 9.0), ELBO()).load_state_dict(state)


def test_states_of_fixed_and_adaptive_schedules_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"holds no error and no visits: it is of a fixed schedule, this one adapts"):
        Adaptive((LO, HI), ELBO()).load_state_dict(Linear(LO, HI).state_dict())
    with pytest.raises(ValueError, match=r"of an adaptive schedule: Linear\(.*\) is fixed; make it adaptive"):
        Linear(LO, HI).load_state_dict(Adaptive((LO, HI), ELBO()).state_dict())


def test_errors_of_an_unknown_unit_have_that_of_the_first_batch() -> None:
    """Whatever the factor, p is what it would be had the dimensions been known; the first batch agrees with it."""
    known, unknown = Adaptive((LO, HI), Sigmoid(2.0), dim=3072), Adaptive((LO, HI), Sigmoid(2.0), dim=None)
    torch.testing.assert_close(known.probabilities(), unknown.probabilities(), rtol=1e-12, atol=0)
    for step in range(3):
        x = Linear(LO, HI).sample(16, generator=rng(step))
        error = 3072 * torch.sigmoid(x)  # that of the closed form, up to the width of a bin
        known.update(x, error)
        unknown.update(x, error)
    torch.testing.assert_close(known.probabilities(), unknown.probabilities(), rtol=0.05, atol=0)
