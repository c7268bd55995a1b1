"""EDM2's learned uncertainty: what u becomes, and what it makes of the weighting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from logsnr.objectives import WeightedELBO
from logsnr.schedules import EDMTraining
from logsnr.uncertainty import Uncertainty
from logsnr.weightings import EDM, EpsCosine, Sigmoid, Weighting

SCHEDULE = EDMTraining(-0.4, 1.0).truncate(-4, 6)
GRID = torch.linspace(-2.5, 4, 200, dtype=torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(logsnr: Tensor) -> Tensor:
    """E||eps_hat - eps||^2 of a network that does not learn: anything."""
    return 3 * torch.sigmoid(logsnr) * (2 + torch.sin(logsnr))


def trained(weighting: Weighting) -> Uncertainty:
    """The head that minimises the mean of l' over the schedule's quantiles, l' being linear in l."""
    head = Uncertainty(64, generator=rng())
    x = SCHEDULE.logsnr((torch.arange(256, dtype=torch.float64) + 0.5) / 256)
    loss = 0.5 * (weighting.log(x) - SCHEDULE.log_density(x)).exp() * error(x)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = head.weigh(loss, x).mean()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return head


def test_at_its_optimum_the_weighting_is_p_over_the_error_whatever_w_was() -> None:
    found = []
    for weighting in (EDM(-0.4, 1.0), Sigmoid(2.0)):
        head = trained(weighting)
        expected = (weighting.log(GRID) - SCHEDULE.log_density(GRID)).exp() * 0.5 * error(GRID)
        with torch.no_grad():
            assert float((head(GRID).double() - expected.log()).abs().max()) < 0.02
        effective = head.weighting(weighting).log(GRID)
        best = SCHEDULE.log_density(GRID) + math.log(2) - error(GRID).log()
        assert float((effective - best).abs().max()) < 0.02
        found.append(effective)
    # The two weightings themselves differ by a factor of 5 over this range.
    w = EDM(-0.4, 1.0).log(GRID) - Sigmoid(2.0).log(GRID)
    assert float(w.max() - w.min()) > 1.6
    assert float((found[0] - found[1]).abs().max()) < 0.03


def test_the_network_sees_the_loss_divided() -> None:
    head = Uncertainty(16, generator=rng())
    x = torch.linspace(-4, 6, 32, dtype=torch.float64)
    loss = (1 + x.square()).requires_grad_()
    torch.testing.assert_close(head.weigh(loss, x), loss)  # u = 0 at the start
    with torch.no_grad():
        head.linear.weight.normal_(generator=rng(1))
    (gradient,) = torch.autograd.grad(head.weigh(loss, x).sum(), loss)
    objective = WeightedELBO(head.weighting(EpsCosine()), SCHEDULE)
    ratio = objective.weighting(x) / EpsCosine()(x)
    torch.testing.assert_close(gradient, ratio, rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio.log(), -head(x).double(), rtol=1e-6, atol=1e-6)


def test_features_have_unit_magnitude() -> None:
    """EDM2's magnitude-preserving embedding: the mean square of sqrt(2) cos over random phases is 1 at every level."""
    head = Uncertainty(100_000, generator=rng())
    for level in (-10.0, 0.0, 7.0):
        (features,) = torch.autograd.grad(head(torch.tensor(level)), head.linear.weight)
        assert float(features.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(0.5 / 100_000))


@pytest.mark.parametrize("options", [{"channels": 0}, {"bandwidth": 0.0}])
def test_bad_input(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Uncertainty(generator=rng(), **options)  # type: ignore[arg-type]
