"""The scheduler classes of diffusers, by name: what each implies that its config does not say, or why it is not ours.

    SUPPORTED     a model and levels that our scheduler takes over; `from_config` of its config
    REFUSED       another kind of model, or another way to go through the levels, with the reason
    HARMLESS      keys of supported classes that choose among solvers, which ours replaces

Everything else in the config of a supported class is an option of ours by the same name.  A test compares the three
with the classes installed: a new one fails it until it has a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Where a scheduler's steps draw noise: always, or where the value of a key begins so."""

    what: str
    key: str = ""
    start: str = ""

    def drawn(self, config: Mapping[str, Any]) -> bool:
        """Whether the steps of a config draw it."""
        return not self.key or str(config.get(self.key)).startswith(self.start)


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What a scheduler class implies.

    Attributes:
        skip_last: whether its linspace and leading spacings are n + 1 timesteps without the last.
        implied: options that it has no key for, or a key that it does not read.
        noise: where its steps draw noise; None if none does.
    """

    skip_last: bool = False
    implied: Mapping[str, Any] = field(default_factory=dict)
    noise: Noise | None = None


_SDE = Noise(what="its steps are those of an SDE")
_SDE_BY_NAME = Noise(what="its steps are those of an SDE", key="algorithm_type", start="sde")
_DDPM = Noise(what="every step draws DDPM's noise")
_ANCESTRAL = Noise(what="every step is ancestral")
_LINSPACE = {"timestep_spacing": "linspace"}
_ABOVE_ZERO = {"final_sigmas_type": "sigma_min"}
_UNCLIPPED = {"clip_sample": False}  # these have the option, and never look at it

SUPPORTED: dict[str, Stock] = {
    "DDIMScheduler": Stock(),
    "DDIMParallelScheduler": Stock(),
    "DDPMScheduler": Stock(noise=_DDPM),
    "DDPMParallelScheduler": Stock(noise=_DDPM),
    "UnCLIPScheduler": Stock(implied=_LINSPACE, noise=_DDPM),
    "CogVideoXDDIMScheduler": Stock(implied=_UNCLIPPED),
    "CogVideoXDPMScheduler": Stock(implied=_UNCLIPPED, noise=_SDE),
    "PNDMScheduler": Stock(),
    "LMSDiscreteScheduler": Stock(),
    "EulerDiscreteScheduler": Stock(),
    "EulerAncestralDiscreteScheduler": Stock(noise=_ANCESTRAL),
    "HeunDiscreteScheduler": Stock(),
    "KDPM2DiscreteScheduler": Stock(),
    "KDPM2AncestralDiscreteScheduler": Stock(noise=_ANCESTRAL),
    "DPMSolverSDEScheduler": Stock(noise=_SDE),
    "DPMSolverMultistepScheduler": Stock(skip_last=True, noise=_SDE_BY_NAME),
    "DPMSolverSinglestepScheduler": Stock(skip_last=True, implied=_LINSPACE, noise=_SDE_BY_NAME),
    "DEISMultistepScheduler": Stock(skip_last=True, implied=_ABOVE_ZERO),
    "UniPCMultistepScheduler": Stock(skip_last=True),
    "SASolverScheduler": Stock(skip_last=True, implied=_ABOVE_ZERO, noise=_SDE),
    "EDMEulerScheduler": Stock(),
    "EDMDPMSolverMultistepScheduler": Stock(noise=_SDE_BY_NAME),
    "FlowMatchEulerDiscreteScheduler": Stock(),
    "FlowMatchHeunDiscreteScheduler": Stock(),
}

_DISTILLED = "made for distilled models, whose every step is a new draw from the network's image"
_CODES = "its samples are tokens or codes, and no noisy images"
_UPWARD = "it runs from an image to noise, which logsnr.sampling inverts by itself"

REFUSED: dict[str, str] = {
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "SCMScheduler": "for trigonometric flows, a path that is none of ours",
    "CMStochasticIterativeScheduler": "for consistency models, whose network is an image at every level",
    "ConsistencyDecoderScheduler": "for consistency models, whose network is an image at every level",
    "FlowMatchLCMScheduler": _DISTILLED,
    "FlowMapEulerDiscreteScheduler": "its network is told where the step ends, and predicts the step itself",
    "PiflowScheduler": "its network predicts a policy for many small steps",
    "HeliosScheduler": "its levels come in stages of growing resolution",
    "HeliosDMDScheduler": "its levels come in stages of growing resolution",
    "MiniMaxH3Scheduler": "its velocity has the other sign",
    "LTXEulerAncestralRFScheduler": "its noise is renewed by rectified flow's own rule, for models distilled with it",
    "IPNDMScheduler": "its levels are a sine's, and its labels are none of a table's",
    "KarrasVeScheduler": "its network is of the variance-exploding kind, with levels of its own",
    "ScoreSdeVeScheduler": "its network is of the variance-exploding kind, with levels of its own",
    "ScoreSdeVpScheduler": "its labels are continuous times of an SDE",
    "CosineDPMSolverMultistepScheduler": "its levels and labels are those of one audio model, a cosine's",
    "DDPMWuerstchenScheduler": "its labels are ratios of a cosine schedule",
    "VQDiffusionScheduler": _CODES,
    "AmusedScheduler": _CODES,
    "BlockRefinementScheduler": _CODES,
    "DiscreteDDIMScheduler": _CODES,
    "EntropyBoundScheduler": _CODES,
    "RFD4ProteinaScheduler": "its samples are proteins, with noise schedules per part",
    "RePaintScheduler": "its steps go back and forth, and take a mask",
    "DDIMInverseScheduler": _UPWARD,
    "DPMSolverMultistepInverseScheduler": _UPWARD,
}

HARMLESS = frozenset(
    {
        *("solver_order", "predictor_order", "corrector_order", "solver_type", "algorithm_type", "tau_func"),
        *("lower_order_final", "euler_at_final", "predict_x0", "disable_corrector", "solver_p", "skip_prk_steps"),
        *("noise_sampler_seed",),
    }
)
"""Keys that choose among solvers; a noisy one is announced (`Stock.noise`)."""

MODEL = frozenset(
    {
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
        *("rescale_betas_zero_snr", "snr_shift_scale", "variance_type"),
    }
)
"""Keys that describe the network: they count even in the config of a class that does not read them."""
