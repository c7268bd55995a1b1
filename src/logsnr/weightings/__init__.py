"""Weightings: how much each noise level counts.

An objective is a weighted integral over log-SNR lambda, and w is all that tells one from another:

    L_w = 1/2 int w(lambda) E||eps_hat - eps||^2 dlambda                                  (2303.00848, sec. 3.1)

w = 1 is the ELBO.  If w never increases with lambda, L_w is the ELBO of data with added noise, the noise level drawn
from the mixture  p_w = -w'(lambda)/w(lo) dlambda  +  w(hi)/w(lo) at hi  (Theorem 1); otherwise p_w is signed and
L_w bounds no likelihood.

| weighting         | w(lambda)                                        | never increases |
|-------------------|--------------------------------------------------|-----------------|
| ELBO              | 1                                                | yes             |
| EpsCosine         | sech(lambda/2)                                   | no              |
| EDM               | N(lambda; 2.4, 2.4^2) (e^-lambda + sd^2)         | no              |
| EDMMonotonic      | max of EDM over [lambda, inf)                    | yes             |
| V, Flow           | e^(-lambda/2)                                    | yes             |
| InDI              | e^-lambda sech^2(lambda/4)                       | yes             |
| P2                | sech(lambda/2)/(k + e^lambda)^gamma              | no              |
| MinSNR            | base min(1, gamma e^-lambda)                     | no              |
| SoftMinSNR        | base sigmoid(ln gamma - lambda)                  | no              |
| Debiased          | base e^(-lambda/2)                               | as base has it  |
| Sigmoid           | sigmoid(bias - lambda)                           | yes             |
| LogitNormalFlow   | N(lambda; -2 m, (2 s)^2) (1 + e^(-lambda/2))^2   | no              |
| CosMapFlow        | sech(lambda/2) (1 + e^(-lambda/2))^2             | yes             |
| XCosine           | e^-lambda sech(lambda/2)                         | yes             |
| VShiftedCosine    | sech((lambda - s)/2) (1 + e^-lambda)             | s <= 2 ln 3     |

base is the density of the levels that plain MSE of eps is drawn from, sech(lambda/2) unless given (Debiased is then
sigmoid(-lambda)).  Everything else is
`implied_by(schedule, prediction)`: DDPM's and the VP-SDE's eps-MSE, NCSN (uniform in log-SNR: the ELBO on its range).
`w.shift(s)` is w(lambda - s), our reading of the paper's "-shifted" weightings, which it does not define: s =
2 ln(64/resolution), as schedules are shifted, so that w and the noise that it counts move together.

A constant factor means nothing.  Weightings live in the log domain (e^-lambda leaves half precision at |lambda| 11)
and answer in the dtype they are asked in; ask in float64.
"""

from __future__ import annotations

from collections.abc import Callable

from logsnr.weightings.base import Augmentation, Envelope, Shifted, Weighting
from logsnr.weightings.implied import Implied, implied_by
from logsnr.weightings.published import (
    EDM,
    ELBO,
    P2,
    CosMapFlow,
    Custom,
    Debiased,
    EDMMonotonic,
    EpsCosine,
    Flow,
    InDI,
    LogitNormalFlow,
    MinSNR,
    Sigmoid,
    SoftMinSNR,
    V,
    VShiftedCosine,
    XCosine,
)

__all__ = [
    "EDM",
    "ELBO",
    "P2",
    "WEIGHTINGS",
    "Augmentation",
    "CosMapFlow",
    "Custom",
    "Debiased",
    "EDMMonotonic",
    "Envelope",
    "EpsCosine",
    "Flow",
    "Implied",
    "InDI",
    "LogitNormalFlow",
    "MinSNR",
    "Shifted",
    "Sigmoid",
    "SoftMinSNR",
    "V",
    "VShiftedCosine",
    "Weighting",
    "XCosine",
    "implied_by",
]

WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "elbo": ELBO,
    "eps-cosine": EpsCosine,
    "edm": EDM,
    "v": V,
    "flow": Flow,
    "indi": InDI,
    "p2": P2,
    "min-snr": MinSNR,
    "soft-min-snr": SoftMinSNR,
    "sigmoid": Sigmoid,
    "edm-monotonic": EDMMonotonic,
    "logit-normal-flow": LogitNormalFlow,
    "cosmap-flow": CosMapFlow,
    "x-cosine": XCosine,
    "v-shifted-cosine": VShiftedCosine,
    "debiased": Debiased,
}
"""Weightings by name: what recipes and the command line say."""
