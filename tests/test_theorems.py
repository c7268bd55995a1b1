"""2303.00848 as numbers: what a weighting promises of augmented data, and what a schedule costs in variance."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from logsnr import predictions
from logsnr.exact import GaussianMixture
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
    WEIGHTINGS,
    CosMapFlow,
    Debiased,
    EDMMonotonic,
    EpsCosine,
    MinSNR,
    Sigmoid,
    SoftMinSNR,
    V,
    VShiftedCosine,
    Weighting,
    XCosine,
    implied_by,
)

LO, HI = -9.0, 9.0
KINKS = [-3.3077774, math.log(5), math.log(1000)]
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]).double(),
    torch.tensor([[-1.1], [0.6]]).double(),
    torch.tensor([[[0.04]], [[0.3]]]).double(),
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_entropy(logsnr: Tensor) -> Tensor:
    """h(q(z|x)) in one dimension."""
    return 0.5 * (math.log(2 * math.pi * math.e) + torch.nn.functional.logsigmoid(-logsnr))


def entropy_and_mmse(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(E[-log p(z)], E||eps_hat - eps||^2) of MIXTURE, by the trapezium rule in z (spectrally accurate)."""
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    out = []
    for level in logsnr.tolist():
        sigma = math.exp(-level / 2)
        log_p = MIXTURE.log_density(z[:, None], sigma)
        p = log_p.exp() * (z[1] - z[0])
        out.append((-(p * log_p).sum(), 1 - (p * MIXTURE(z[:, None], sigma).eps[:, 0] ** 2).sum()))
    return torch.stack([h for h, _ in out]), torch.stack([m for _, m in out])


Curves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def curves() -> Curves:
    """Nodes and weights on [LO, HI], panels ending at every kink; the two curves there; the entropy at the ends."""
    at, share = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))
    edges = torch.tensor(sorted([*np.linspace(LO, HI, 25), *KINKS]), dtype=torch.float64)
    half = 0.5 * edges.diff()[:, None]
    x, weights = (edges[:-1, None] + half + half * at).flatten(), (half * share).flatten()
    return x, weights, *entropy_and_mmse(x), entropy_and_mmse(torch.tensor([LO, HI], dtype=torch.float64))[0]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_objective_is_maximum_likelihood_of_augmented_data(name: str, curves: Curves) -> None:
    """DistAug: prior + 1/2 int w mmse + entropy of the noise = E_{p_w}[-log p(z)], signed where w rises, to 1e-9.

    The exact model attains its bound, so the left side (the loss) and the right (the likelihood of noisy data, which
    knows of no weighting and no denoiser) are one number.
    """
    x, weights, entropy, mmse, ends = curves
    weighting = WEIGHTINGS[name]()
    mixture = weighting.augmentation(LO, HI)
    w = (weighting.log(x) - weighting.log(LO)).exp()
    lo = torch.tensor(LO).double()
    prior = ends[0] - noise_entropy(lo)  # I(x; z_lo): the mean KL to the exact p(z_lo)
    added = noise_entropy(lo) - 0.5 * (weights * w * torch.sigmoid(x)).sum()
    loss = prior + 0.5 * (weights * w * mmse).sum() + added
    likelihood = (weights * mixture.density(x) * entropy).sum() + mixture.atom * ends[1]
    assert float(loss) == pytest.approx(float(likelihood), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_signed_mixture(name: str, curves: Curves) -> None:
    """Its two masses, exactly by the rises and falls of w, differ by 1; draws with signs integrate as it does."""
    x, weights, entropy, _, ends = curves
    mixture = WEIGHTINGS[name]().augmentation(LO, HI)
    density = mixture.density(x)
    assert mixture.positive - mixture.negative == pytest.approx(1, abs=1e-12)
    # Quadrature of |density| has a kink where w turns, which no panel ends at.
    size = float((weights * density.abs()).sum()) + mixture.atom
    assert mixture.positive + mixture.negative == pytest.approx(size, rel=3e-3)
    assert (mixture.negative < 1e-12) is mixture.is_distribution
    if not mixture.is_distribution:
        peak = float(WEIGHTINGS[name]().envelope()(LO)) / float(WEIGHTINGS[name]()(LO))
        assert mixture.negative == pytest.approx(peak - 1, rel=1e-6)  # one peak: it rises from 1 to it
    n = 20000
    logsnr, sign = mixture.sample(n, generator=rng(1))
    assert set(sign.tolist()) <= ({1.0} if mixture.is_distribution else {1.0, -1.0})
    value = torch.from_numpy(np.interp(logsnr.numpy(), x.numpy(), entropy.numpy()))
    value = torch.where(logsnr >= HI, ends[1], value) * sign * (mixture.positive + mixture.negative)
    exact = float((weights * density * entropy).sum()) + mixture.atom * float(ends[1])
    assert float(value.mean()) == pytest.approx(exact, abs=4 * float(value.std()) / math.sqrt(n) + 1e-3)
    tenth = torch.linspace(LO, HI, 11, dtype=torch.float64)
    w = (WEIGHTINGS[name]().log(tenth) - WEIGHTINGS[name]().log(LO)).exp()
    drawn = torch.stack([sign[(logsnr >= a) & (logsnr < b)].sum() for a, b in pairwise(tenth.tolist())])
    total = mixture.positive + mixture.negative
    assert float((drawn / n * total + w.diff()).abs().max()) <= 4 * total / n  # stratified


def test_the_atom_is_drawn_at_the_cleanest_level() -> None:
    logsnr, sign = ELBO().augmentation(-5, 7).sample(50, generator=rng())
    assert logsnr.tolist() == [7.0] * 50
    assert sign.tolist() == [1.0] * 50
    logsnr, _ = Sigmoid(2.0).augmentation(-5, 2).sample(20000, generator=rng())
    atom = Sigmoid(2.0).augmentation(-5, 2).atom
    assert float((logsnr == 2).double().mean()) == pytest.approx(atom, abs=2e-4)


# ------------------------------------------------------------------------------- every row of the published tables

GRID = torch.linspace(-12, 12, 601, dtype=torch.float64)
DDPM, SD = Discrete(TimestepTable.ddpm()), Discrete(TimestepTable.stable_diffusion())

ROWS: dict[str, tuple[Weighting, Weighting, float]] = {
    "x-MSE, cosine": (XCosine(), implied_by(Cosine(), predictions.X0()), 1 / (2 * math.pi)),
    "v-MSE, shifted": (
        VShiftedCosine(2 * math.log(64 / 256)),
        implied_by(Cosine(2 * math.log(64 / 256)), predictions.V()),
        1 / (2 * math.pi),
    ),
    "v-MSE, not shifted": (VShiftedCosine(), V(), 0.5),
    "rf/cosmap": (CosMapFlow(), implied_by(CosMap(), predictions.Flow()), 1 / (2 * math.pi)),
    "NCSN": (ELBO(), implied_by(Linear(-12, 12), predictions.Eps(path="ve")), 1 / 24),
    "EDM2 at its start": (EDM(-0.4, 1.0), implied_by(EDMTraining(-0.4, 1.0), predictions.EDM()), 4.0),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_beyond_the_table(name: str) -> None:
    weighting, implied, constant = ROWS[name]
    ratio = implied.log(GRID) - weighting.log(GRID)
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.log(constant)), rtol=0, atol=1e-11)


def test_factors_on_any_density() -> None:
    """Min-SNR on EDM, soft-min-SNR with k-diffusion's density, debiased estimation with SD's, in closed form."""
    edm = EDM()
    expected = edm(GRID) * (5 * torch.exp(-GRID)).clamp(max=1)
    torch.testing.assert_close(MinSNR(5, base=edm)(GRID), expected, rtol=1e-12, atol=0)
    p = EDMTraining(-1.1, 1.3)
    soft = SoftMinSNR(1 / 0.5**2, base=implied_by(p, predictions.Eps()))
    # k-diffusion's factor on F-MSE: sigma^2 sd^2/(sigma^2 + sd^2)^2.
    s2, d2 = torch.exp(-GRID), 0.25
    on_f = p.log_density(GRID).exp() * s2 * d2 / (s2 + d2) ** 2
    per_eps = on_f / predictions.EDM().eps_row(torch.sigmoid(GRID).sqrt(), torch.sigmoid(-GRID).sqrt())[1] ** 2
    ratio = (soft(GRID) / per_eps).log()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=0, atol=1e-11)
    inside = GRID[(GRID > SD.range[0]) & (GRID < SD.range[1])]
    snr = inside.exp().clamp(max=1000)
    debiased = Debiased(base=implied_by(SD, predictions.Eps()))
    torch.testing.assert_close(debiased(inside), SD.log_density(inside).exp() / snr.sqrt(), rtol=1e-12, atol=0)
    ddpm, t = implied_by(VPLinear(), predictions.Eps()), torch.linspace(0.05, 1, 20, dtype=torch.float64)
    beta, B = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
    torch.testing.assert_close(ddpm(-torch.expm1(B).log()), -torch.expm1(-B) / beta, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="base = 3"):
        MinSNR(5, base=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weighting", "monotone"),
    [
        (XCosine(), True),
        (CosMapFlow(), True),
        (VShiftedCosine(2.19), True),
        (VShiftedCosine(2.20), False),
        (MinSNR(5, base=EDM()), False),
        (SoftMinSNR(base=implied_by(EDMTraining(), predictions.Eps())), False),
        (Debiased(), True),  # on the cosine schedule it is sigmoid(-l)
        (Debiased(base=implied_by(EDMTraining(), predictions.Eps())), False),
    ],
)
def test_monotone_flags_of_the_rows_beyond(weighting: Weighting, monotone: bool) -> None:
    assert weighting.is_monotone(-10, 15) is monotone


def test_shifting_moves_weighting_and_data_together() -> None:
    """ "-shifted": data x at SNR e^l looks like data e^(-s/2) x at e^(l + s); w.shift(s) then asks the same of it.

    For Gaussian data of deviation d, int w(l - s) sigmoid(l + 2 ln d) does not change if d -> d e^(-s/2).
    """
    x = torch.linspace(-60, 60, 240001, dtype=torch.float64)

    def loss(weighting: Weighting, d: float) -> float:
        return float(torch.trapezoid(weighting(x) * torch.sigmoid(x + 2 * math.log(d)), x))

    s = 2 * math.log(64 / 256)
    for weighting in (Sigmoid(2.0), EDMMonotonic()):
        shifted = loss(weighting.shift(s), 0.5 * math.exp(-s / 2))
        assert shifted == pytest.approx(loss(weighting, 0.5), rel=1e-9)


# ------------------------------------------------------- section 5: relative variance of one draw, by Monte Carlo

VARIANCES: dict[str, tuple[Weighting, list[float]]] = {
    "elbo": (ELBO(), [0.80002, 8.1476, 5.1505, 7.0396, 35.054, 5627.7]),
    "sech": (EpsCosine(), [1.7485, 0.49567, 0.4899, 0.14238, 3.9881, 19.851]),
    "sigmoid": (Sigmoid(2.0), [2.1314, 0.32893, 0.45982, 0.40489, 2.9368, 0.31471]),
    "edm": (EDM(), [1.2429, 0.26044, 0.2411, 0.23502, 2.9295, 3.1952]),
    "edm-monotonic": (EDMMonotonic(), [1.2305, 0.25398, 0.23457, 0.25328, 2.9074, 3.1764]),
    "v": (V(), [1.0615, 0.0, 0.040306, 19.045, 1.1043, 9.6421]),
}
SCHEDULES: list[Schedule] = [
    Linear(-10, 10),
    Cosine().truncate(-10, 10),
    FlowUniform().truncate(-10, 10),
    EDMTraining().truncate(-10, 10),
    Cosine(2 * math.log(64 / 256)).truncate(-10, 10),
    LogitNormal().truncate(-10, 10),
]


WIDE = torch.linspace(-10, 10, 200001, dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANCES)
def test_variance_table_by_monte_carlo(name: str) -> None:
    """Sheet's var/mean^2 of one draw for D -> inf, and for D = 8 as (1 + V)(1 + 2/D) - 1: within 4 standard errors.

    Tested are the cells that 200,000 draws resolve to 5 % of 1 + V, by the fourth moment in closed form; the others
    rest on draws that no such sample holds (ELBO under logit-normal, V = 5627.7), and on quadrature (test_adaptive.py).
    """
    weighting, table = VARIANCES[name]
    n, dim, generator, resolved = 200000, 8, rng(2), 0
    curve = weighting(WIDE) * torch.sigmoid(WIDE)
    mean = float(torch.trapezoid(curve, WIDE))
    # E[(chi2_D / D)^k] for k = 2, 4.
    square, fourth = 1 + 2 / dim, (dim + 2) * (dim + 4) * (dim + 6) / dim**3
    for schedule, V_ in zip(SCHEDULES, table, strict=True):
        log_p = schedule.log_density(WIDE)
        tail = float(torch.trapezoid((4 * (curve / mean).log() - 3 * log_p).exp(), WIDE)) * fourth
        stderr = math.sqrt(tail / n)
        if stderr > 0.05 * (1 + V_):
            continue
        resolved += 1
        x = schedule.sample(n, generator=generator, method="iid")
        loss = (weighting.log(x) - schedule.log_density(x)).exp() * torch.sigmoid(x) / mean
        assert float(loss.square().mean()) - 1 == pytest.approx(V_, abs=4 * stderr + 1e-4)
        chi2 = torch.randn(n, dim, generator=generator).double().square().mean(1)
        exact = (1 + V_) * square - 1
        assert float((loss * chi2).square().mean()) - 1 == pytest.approx(exact, abs=4 * stderr)
    assert resolved >= 3
    # Adapted (its start is the exact error of this model): what bins and the uniform 1 % leave, against 0.
    adapted = Adaptive((-10.0, 10.0), weighting)
    x = adapted.sample(n, generator=generator, method="iid")
    loss = (weighting.log(x) - adapted.log_density(x)).exp() * torch.sigmoid(x) / mean
    assert float(loss.var()) < 0.013
