"""Likelihood: how many bits the model needs for an image, and what its weighted objective promises.

    bits_per_dim        a variational bound in bits per dimension (bound.py)
    ode_bits_per_dim    the same question to the probability flow, `ode_log_likelihood` of dequantised images (ode.py)
    information         at which noise levels the bits lie (bits.py)
    augmented_elbo      the ELBO of noise-augmented data that a monotone weighting stands for (augmented.py)

Every number carries its range of noise levels and the standard error of its own noise.  The estimator that they share
is integral.py: one integral over log-SNR, with levels and control variates from a pilot (control.py).
"""

from logsnr.likelihood.augmented import AugmentedELBO, augmented_elbo
from logsnr.likelihood.bits import Information, information
from logsnr.likelihood.bound import Likelihood, bits_per_dim
from logsnr.likelihood.control import Controls, GaussianControl, Pilot
from logsnr.likelihood.integral import REPLICATES
from logsnr.likelihood.ode import OdeBitsPerDim, OdeLogLikelihood, ode_bits_per_dim, ode_log_likelihood
from logsnr.likelihood.parts import bits_per_dim_in_parts, merged
from logsnr.likelihood.terms import (
    default_logsnr_range,
    expected_reconstruction_nats,
    prior_nats,
    reconstruction_nats,
)

__all__ = [
    "REPLICATES",
    "AugmentedELBO",
    "Controls",
    "GaussianControl",
    "Information",
    "Likelihood",
    "OdeBitsPerDim",
    "OdeLogLikelihood",
    "Pilot",
    "augmented_elbo",
    "bits_per_dim",
    "bits_per_dim_in_parts",
    "default_logsnr_range",
    "expected_reconstruction_nats",
    "information",
    "merged",
    "ode_bits_per_dim",
    "ode_log_likelihood",
    "prior_nats",
    "reconstruction_nats",
]
