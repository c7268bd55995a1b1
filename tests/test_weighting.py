"""Weightings: the published table, monotone envelopes, augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from logsnr import predictions
from logsnr.errors import LogsnrError
from logsnr.exact import GaussianMixture
from logsnr.noise import alpha_s_from_logsnr
from logsnr.objectives import WeightedELBO
from logsnr.predictions import Prediction
from logsnr.schedules import (
    Adaptive,
    Cosine,
    CosMap,
    Discrete,
    EDMTraining,
    FlowUniform,
    Linear,
    LogitNormal,
    Schedule,
    VPLinear,
)
from logsnr.timesteps import TimestepTable
from logsnr.weightings import (
    EDM,
    ELBO,
    P2,
    WEIGHTINGS,
    Custom,
    Debiased,
    EDMMonotonic,
    EpsCosine,
    Flow,
    Implied,
    InDI,
    LogitNormalFlow,
    MinSNR,
    Sigmoid,
    SoftMinSNR,
    V,
    Weighting,
    implied_by,
)

LEVELS = torch.tensor([-10, -5, -2, 0, 2, 5, 10], dtype=torch.float64)
GRID = torch.linspace(-20, 20, 2001, dtype=torch.float64)
PEAK = -3.3077775  # EDM's, log-SNR

TABLE: dict[str, tuple[Weighting, str]] = {
    "sech": (EpsCosine(), ".013475282 .16307123 .64805427 1 .64805427 .16307123 .013475282"),
    "edm": (EDM(), ".0058482188 .21305681 .23652798 .12602642 .063169252 .023732444 .00027619348"),
    "edm-mono": (EDMMonotonic(), ".27102716 .27102716 .23652798 .12602642 .063169252 .023732444 .00027619348"),
    "v": (V(), "148.41316 12.182494 2.7182818 1 .36787944 .082084999 .006737947"),
    "flow": (Flow(), "148.41316 12.182494 2.7182818 1 .36787944 .082084999 .006737947"),
    "indi": (InDI(), "585.73277 41.617256 5.8111064 1 .10643413 .0018894205 1.2072852e-6"),
    "p2-1": (P2(1.0), ".01347467 .16197982 .57080431 .5 .077249963 .0010914114 6.1174909e-7"),
    "p2-half": (P2(0.5), ".013474976 .16252461 .60820406 .70710678 .22374577 .013340832 9.0793676e-5"),
    "min-snr-5": (MinSNR(5.0), ".013475282 .16307123 .64805427 1 .43852304 .0054938266 3.0588843e-6"),
    "sigmoid-2": (Sigmoid(2.0), ".99999386 .99908895 .98201379 .88079708 .5 .047425873 .00033535013"),
    "elbo": (ELBO(), "1 1 1 1 1 1 1"),
}


@pytest.mark.parametrize(("weighting", "printed"), TABLE.values(), ids=TABLE.keys())
def test_seven_point_table(weighting: Weighting, printed: str) -> None:
    assert weighting(LEVELS).tolist() == pytest.approx([float(v) for v in printed.split()], rel=1e-6)


def test_landmarks() -> None:
    peak = EDM().envelope().places  # type: ignore[attr-defined]
    assert peak == pytest.approx([PEAK], abs=1e-7)
    assert float(EDM()(PEAK)) == pytest.approx(0.27102716, abs=5e-9)
    assert math.exp(-PEAK / 2) == pytest.approx(5.2273, abs=5e-5)
    relative = EDMMonotonic()(torch.tensor([-2.0, 0, 2, 4, 6, 10], dtype=torch.float64)) / 0.27102716
    assert relative.tolist() == pytest.approx([0.872710, 0.464996, 0.233074, 0.131772, 0.050272, 0.001019], abs=6e-7)
    for weighting, peak_at in ((EpsCosine(), 0), (P2(0.5), -0.693), (P2(1.0), -1.099), (SoftMinSNR(4.0), -0.527)):
        assert weighting.envelope().places == pytest.approx([peak_at], abs=6e-4)  # type: ignore[attr-defined]


IMPLIED: list[tuple[Schedule, Prediction, Weighting, float]] = [
    (Cosine(), predictions.Eps(), EpsCosine(), 1 / (2 * math.pi)),
    (Cosine(), predictions.V(), V(), 1 / math.pi),
    (FlowUniform(), predictions.Flow(), Flow(), 1 / 2),
    (FlowUniform(), predictions.X0(), InDI(), 1 / 8),
    (EDMTraining(), predictions.EDM(), EDM(), 4.0),
    (LogitNormal(0.3, 1.2), predictions.Flow(), LogitNormalFlow(0.3, 1.2), 1.0),
    (Linear(-20, 20), predictions.Eps(), ELBO(), 1 / 40),
]


@pytest.mark.parametrize(("schedule", "prediction", "weighting", "constant"), IMPLIED)
def test_plain_mse_implies_the_published_weighting(
    schedule: Schedule, prediction: Prediction, weighting: Weighting, constant: float
) -> None:
    ratio = (implied_by(schedule, prediction).log(GRID) - weighting.log(GRID)).exp()
    assert ratio.tolist() == pytest.approx([constant] * len(GRID), rel=1e-12)


def test_sd3_weightings_in_flow_time() -> None:
    """w = t/(1-t) pi(t): 2403.03206, sec. 3.1, for cosmap with pi = 2/(pi - 2 pi t + 2 pi t^2)."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    logsnr = 2 * ((1 - t) / t).log()
    pi = 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)
    # Per unit of t a velocity error counts pi(t); dt = t (1 - t)/2 dlambda, and ||u - u_hat||^2 = E / (1 - t)^2.
    expected = pi * t * (1 - t) / 2 / (1 - t) ** 2
    torch.testing.assert_close(implied_by(CosMap(), predictions.Flow())(logsnr), expected, rtol=1e-11, atol=0)


def test_sigmoid_is_a_weighting_of_x_and_v_too() -> None:
    """sigmoid(b - l) on the MSE of eps = e^b sigmoid(l - b) on that of x = sigmoid(b - l)/(1 + e^-l) on that of v."""
    b, x = 2.0, GRID
    alpha_s = alpha_s_from_logsnr(x)
    for prediction, weight in (
        (predictions.X0(), math.exp(b) * torch.sigmoid(x - b)),
        (predictions.V(), torch.sigmoid(b - x) / (1 + torch.exp(-x))),
    ):
        per_eps = weight / prediction.eps_row(*alpha_s)[1] ** 2
        torch.testing.assert_close(Sigmoid(b)(x), per_eps, rtol=1e-12, atol=0)


MONOTONE: list[tuple[Weighting, bool]] = [
    (ELBO(), True),
    (EpsCosine(), False),
    (EDM(), False),
    (V(), True),
    (Flow(), True),
    (InDI(), True),
    (P2(1.0), False),
    (P2(0.5), False),
    (MinSNR(5.0), False),
    (SoftMinSNR(4.0), False),
    *[(Sigmoid(float(b)), True) for b in (1, 2, 3, 4, 5)],
    (EDMMonotonic(), True),
    (LogitNormalFlow(), False),
    (implied_by(VPLinear(), predictions.Eps()), False),
    (implied_by(CosMap(), predictions.Flow()), True),
    (implied_by(Cosine(), predictions.X0()), True),
    (implied_by(EDMTraining(-0.4, 1.0), predictions.EDM()), False),
    (implied_by(Cosine(2.19), predictions.V()), True),
    (implied_by(Cosine(2.20), predictions.V()), False),  # monotone up to 2 ln 3 = 2.197
    (implied_by(Cosine(2 * math.log(64 / 256)), predictions.V()), True),
]


@pytest.mark.parametrize(("weighting", "expected"), MONOTONE)
def test_monotone_flags(weighting: Weighting, expected: bool) -> None:
    assert weighting.is_monotone(-10, 15) is expected


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_envelope_is_the_running_maximum_from_the_right(name: str) -> None:
    weighting = WEIGHTINGS[name]()
    envelope = weighting.envelope()
    x = torch.linspace(-25, 25, 100001, dtype=torch.float64)
    w, mono = weighting.log(x), envelope.log(x)
    running = w.flip(0).cummax(0).values.flip(0)
    assert (mono >= w).all()
    # The grid misses a smooth maximum by at most curvature h^2 / 8.
    torch.testing.assert_close(mono, running, rtol=0, atol=1e-7)
    assert envelope.is_monotone(-25, 25)
    torch.testing.assert_close(Custom(envelope.log, in_log=True).envelope().log(x), mono, rtol=0, atol=0)
    if weighting.is_monotone(-60, 60):
        assert torch.equal(mono, w)


def test_envelope_of_several_peaks() -> None:
    def bumps(x: Tensor) -> Tensor:
        return torch.exp(-((x + 5) ** 2)) + 0.5 * torch.exp(-(x**2)) + 0.75 * torch.exp(-((x - 6) ** 2)) + 1e-9

    x = torch.linspace(-12, 12, 100001, dtype=torch.float64)
    running = bumps(x).flip(0).cummax(0).values.flip(0)
    torch.testing.assert_close(Custom(bumps).envelope()(x), running, rtol=0, atol=1e-7)


def test_edm_monotonic_is_the_clamp_at_the_peak() -> None:
    assert torch.equal(EDMMonotonic().log(GRID), EDM().envelope().log(GRID))
    torch.testing.assert_close(EDMMonotonic()(GRID), EDM()(GRID.clamp(min=PEAK)), rtol=1e-12, atol=0)


def test_shift() -> None:
    assert torch.equal(Sigmoid(2.0).shift(1.5)(GRID), Sigmoid(2.0)(GRID - 1.5))
    # Sheet 4, row "v-MSE shifted cosine": not e^(-lambda/2), whose two ends it reweights by (d/64)^2.
    for d, ratio in ((128, 4), (256, 16), (512, 64)):
        implied = implied_by(Cosine(2 * math.log(64 / d)), predictions.V())
        over_v = implied.log(torch.tensor([-60.0, 60.0], dtype=torch.float64)) + torch.tensor([-30.0, 30.0]).double()
        assert math.exp(float(over_v[0] - over_v[1])) == pytest.approx(ratio, rel=1e-9)


def quadrature(lo: float, hi: float, *kinks: float, panels: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes and weights of composite 16-point Gauss-Legendre, with panels that end at the kinks."""
    k = torch.arange(1, 16, dtype=torch.float64)
    b = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(b, 1) + torch.diag(b, -1))
    edges = torch.linspace(lo, hi, panels + 1, dtype=torch.float64)
    edges = torch.cat([edges, torch.tensor(kinks, dtype=torch.float64)]).sort().values
    half = 0.5 * edges.diff()[:, None]
    return (edges[:-1, None] + half + half * nodes).flatten(), (half * 2 * vectors[0] ** 2).flatten()


def gauss(f: Callable[[Tensor], Tensor], lo: float, hi: float, *kinks: float, panels: int = 40) -> float:
    x, weights = quadrature(lo, hi, *kinks, panels=panels)
    return float((weights * f(x)).sum())


GAUSSIAN_OPTIMA: list[tuple[Weighting, float, float]] = [
    (EpsCosine(), 1.0, math.pi),
    (V(), 1.0, math.pi),
    (implied_by(Cosine(), predictions.Eps()), 1.0, 0.5),
    (implied_by(Cosine(), predictions.V()), 1.0, 1.0),
    (implied_by(VPLinear(), predictions.V()), 1.0, 1.0),
    (implied_by(FlowUniform(), predictions.Flow()), 1.0, math.pi / 2),
    (implied_by(FlowUniform(), predictions.Flow()), 0.7, 0.7 * math.pi / 2),
    (implied_by(FlowUniform(), predictions.X0()), 1.0, 0.5),
    (implied_by(EDMTraining(), predictions.EDM(sigma_data=0.6)), 0.6, 1.0),
    (Sigmoid(2.0), 1.0, 2 / (1 - math.exp(-2))),
    (Sigmoid(3.0), 0.7, (3 + 2 * math.log(0.7)) / (1 - math.exp(-3 - 2 * math.log(0.7)))),
]


@pytest.mark.parametrize(("weighting", "s", "value"), GAUSSIAN_OPTIMA)
def test_loss_of_the_exact_gaussian_denoiser(weighting: Weighting, s: float, value: float) -> None:
    """int w r with r = sigmoid(lambda + 2 ln s), the error of eps per dimension for N(0, s^2) data."""

    def integrand(x: Tensor) -> Tensor:
        return (weighting.log(x) + torch.nn.functional.logsigmoid(x + 2 * math.log(s))).exp()

    lo = max(-90.0, weighting.schedule.range[0]) if isinstance(weighting, Implied) else -90.0
    assert gauss(integrand, lo, 90, panels=300) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("weighting", "value"),
    [
        (ELBO(), 5.0),
        (EpsCosine(), 1.55732064),
        (V(), 1.55732064),
        (Sigmoid(2.0), 1.15632724),
        (EDMMonotonic(), 0.2040233),
    ],
)
def test_gaussian_loss_on_plus_minus_ten(weighting: Weighting, value: float) -> None:
    total = 0.5 * gauss(lambda x: weighting(x) * torch.sigmoid(x), -10, 10, PEAK)
    assert total == pytest.approx(value, rel=3e-8)


def test_edm_loss_of_unit_targets_is_one_at_every_level() -> None:
    s = 0.6
    per_level = torch.sigmoid(GRID + 2 * math.log(s)) * (torch.exp(-GRID) / s**2 + 1)
    torch.testing.assert_close(per_level, torch.ones_like(GRID), rtol=1e-12, atol=0)
    ratio = implied_by(EDMTraining(), predictions.EDM(sigma_data=s)).log(GRID) - EDMTraining().log_density(GRID)
    torch.testing.assert_close(ratio.exp(), 1 / torch.sigmoid(GRID + 2 * math.log(s)), rtol=1e-12, atol=0)


def test_flow_matching_is_v_with_cosine_for_any_denoiser() -> None:
    """E_t ||u - u_hat||^2 = (pi/2) E_t ||v - v_hat||^2, whatever the error curve; truncated: times own t1 - t0."""
    flow, cosine = FlowUniform(), Cosine()

    def curve(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * (1.5 + torch.sin(x))

    def loss(schedule: Schedule, prediction: Prediction) -> float:
        return gauss(lambda x: implied_by(schedule, prediction)(x) * curve(x), -12, 12, panels=100)

    assert loss(flow, predictions.Flow()) == pytest.approx(math.pi / 2 * loss(cosine, predictions.V()), rel=1e-12)
    kept = [float(k.time(-12.0) - k.time(12.0)) for k in (flow, cosine)]
    flow_cut = loss(flow.truncate(-12, 12), predictions.Flow()) * kept[0]
    cosine_cut = loss(cosine.truncate(-12, 12), predictions.V()) * kept[1]
    assert flow_cut == pytest.approx(math.pi / 2 * cosine_cut, rel=1e-12)


MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]).double(),
    torch.tensor([[-1.1], [0.6]]).double(),
    torch.tensor([[[0.04]], [[0.3]]]).double(),
)
LO, HI = -9.0, 9.0


def information(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(I(x; z), mmse of eps) of MIXTURE at each level, by the trapezium rule in z (spectrally accurate)."""
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    info, mmse = [], []
    for level in logsnr.flatten().tolist():
        sigma = math.exp(-level / 2)
        log_p = MIXTURE.log_density(z[:, None], sigma)
        p = log_p.exp() * (z[1] - z[0])
        s2 = sigma**2 / (1 + sigma**2)
        info.append(-(p * log_p).sum() - 0.5 * math.log(2 * math.pi * math.e * s2))
        mmse.append(1 - (p * MIXTURE(z[:, None], sigma).eps[:, 0] ** 2).sum())
    return torch.stack(info).reshape(logsnr.shape), torch.stack(mmse).reshape(logsnr.shape)


@pytest.fixture(scope="module")
def curves() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quadrature nodes and weights on [LO, HI] with panels that end at every kink, and the two curves there."""
    x, weights = quadrature(LO, HI, PEAK, math.log(5), math.log(1000), panels=24)
    return x, weights, *information(x)


def test_information_grows_by_half_the_mmse(curves: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, weights, _, mmse = curves
    ends = information(torch.tensor([LO, HI], dtype=torch.float64))[0]
    assert float(ends[1] - ends[0]) == pytest.approx(0.5 * float((weights * mmse).sum()), rel=1e-9)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weighted_loss_is_the_elbo_of_augmented_data(name: str, curves: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """1/2 int w mmse = w(lo) (int density I + atom I(hi) - I(lo)), the weighted-ELBO identity, total mass 1."""
    x, weights, info, mmse = curves
    weighting = WEIGHTINGS[name]()
    mixture = weighting.augmentation(LO, HI)
    ends = information(torch.tensor([LO, HI], dtype=torch.float64))[0]
    density = mixture.density(x)
    right = float((weights * density * info).sum() + mixture.atom * ends[1] - ends[0]) * float(weighting(LO))
    assert 0.5 * float((weights * weighting(x) * mmse).sum()) == pytest.approx(right, rel=1e-9)
    assert float((weights * density).sum()) + mixture.atom == pytest.approx(1, abs=1e-9)
    assert mixture.is_distribution is weighting.is_monotone(LO, HI)
    assert bool((density >= -1e-15).all()) is mixture.is_distribution


@pytest.mark.parametrize(
    ("weighting", "lo", "hi", "atom"),
    [
        (Sigmoid(2.0), -10, 10, 3.35e-4),
        (Sigmoid(2.0), -5, 13.3, 1.24e-5),
        (V(), -10, 10, 4.54e-5),
        (EDMMonotonic(), -10, 10, 1.02e-3),
        (ELBO(), -10, 10, 1.0),
    ],
)
def test_share_of_clean_data(weighting: Weighting, lo: float, hi: float, atom: float) -> None:
    assert weighting.augmentation(lo, hi).atom == pytest.approx(atom, rel=5e-3)


def test_weightings_answer_in_the_dtype_they_are_asked_in() -> None:
    for make in WEIGHTINGS.values():
        exact = make().log(LEVELS)
        half = make().log(LEVELS.float())
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(0), "gamma = 0"),
        (lambda: P2(1.0, 0.0), "k = 0"),
        (lambda: EDM(sigma_data=-1), "sigma_data = -1"),
        (lambda: LogitNormalFlow(0, 0), "s = 0"),
        (lambda: Custom(torch.exp).envelope(), "no finite envelope"),
        (lambda: V().augmentation(3, -3), "increase"),
        (lambda: implied_by(Linear(-5, 5), predictions.Eps()).augmentation(-6, 5), "move lo"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


NO_WEIGHTINGS = {
    "negative": (lambda l: -torch.ones_like(l), r"negative or not a number at log-SNR -5.00: .* on all of \[-5, 6\]"),
    "negative somewhere": (lambda l: 3.0 - l, r"negative or not a number at log-SNR 3"),
    "zero everywhere": (lambda l: 0 * l, r"zero everywhere on \[-5, 6\]: there is nothing to learn"),
    "not a number": (lambda l: torch.full_like(l, math.nan), "negative or not a number at log-SNR -5.00"),
    "not a number somewhere": (lambda l: torch.where(l > 3, math.nan, 1.0), "negative or not a number at log-SNR 3"),
    "infinite": (lambda l: torch.where(l > 3, math.inf, 1.0), "infinite at log-SNR 3"),
}


@pytest.mark.parametrize(("fn", "message"), NO_WEIGHTINGS.values(), ids=list(NO_WEIGHTINGS))
def test_what_is_no_weighting_is_refused_wherever_one_goes(fn: Callable[[Tensor], Tensor], message: str) -> None:
    """With the place, the range and the fix in one line: never as a loss of nan or 0."""
    w = Custom(fn)
    for make in (
        lambda: WeightedELBO(w, Linear(-5, 6)),
        lambda: Adaptive((-5, 6), w),
        lambda: w.check(-5, 6),
    ):
        with pytest.raises(LogsnrError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    at_lo = float(w.log(-5.0))
    with pytest.raises(ValueError, match=message if math.isfinite(at_lo) else "no finite, positive w at lo = -5"):
        w.augmentation(-5, 6)
    with pytest.raises(ValueError, match=r"negative or not|infinite|zero everywhere"):
        w.envelope()
    if "not a number" in message:
        with pytest.raises(LogsnrError, match=message):
            w.is_monotone(-5, 6)


def test_a_weighting_may_be_zero_in_places_and_large_in_others() -> None:
    """What is refused above is not these: no weight outside a table, 4e4 at one end, levels from -inf to inf."""
    for weighting, schedule in (
        (implied_by(Linear(-2, 2), predictions.Eps()), Linear(-5, 6)),
        (V(), Cosine()),
        (InDI(), FlowUniform()),
        (implied_by(Discrete(TimestepTable.ddpm()), predictions.Eps()), Cosine()),
    ):
        weighting.check(*schedule.range)
        WeightedELBO(weighting, schedule)


def test_debiased_estimation_cuts_the_snr_as_the_scripts_do() -> None:
    """SNR^(-1/2) up to the limit and limit^(-1/2) beyond, where kohya's scripts clamp it."""
    snr = torch.tensor([1e-3, 1.0, 10.0, 999.0, 1001.0, 1e6], dtype=torch.float64)
    for weighting, limit in ((Debiased(), 1000.0), (Debiased(limit=20.0), 20.0)):
        factor = weighting(snr.log()) / EpsCosine()(snr.log())
        torch.testing.assert_close(factor, snr.clamp(max=limit) ** -0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 3.0), (2.0, 0.1)])
def test_perception_prioritised_weighting_of_eps_errors(gamma: float, k: float) -> None:
    """1/(k + SNR)^gamma on the cosine schedule's eps-MSE (2204.00227, eq. 8)."""
    snr = torch.logspace(-4, 4, 17, dtype=torch.float64)
    factor = P2(gamma, k)(snr.log()) / EpsCosine()(snr.log())
    torch.testing.assert_close(factor, (k + snr) ** -gamma, rtol=1e-12, atol=0)
