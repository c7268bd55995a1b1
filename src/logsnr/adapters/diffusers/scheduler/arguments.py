"""What pipelines pass beside the usual: arguments that are for other schedulers, each with what it is.

A pipeline asks a scheduler's signature for some of them, and passes others to whatever stands there.  One that says
nothing (None, False, 0) is let through; any other is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from logsnr.adapters.diffusers.scheduler.trajectory import Draw

_CHURN = "noise beside the plan's; give the scheduler mu, or step an eta"
_CODES = "an argument of schedulers for tokens and codes"
_DISTILLED = "an argument of schedulers for distilled models"
_STAGES = "an argument of Helios' schedulers, whose levels come in stages"

# What each is; after a semicolon the fix, where there is a better one than to drop it.
FOREIGN: dict[str, dict[str, str]] = {
    "step": {
        "s_churn": _CHURN,
        "pred_original_sample": "an image that takes the place of the network's, of Cosmos' loop with EDM's scheduler",
        "old_pred_original_sample": "an argument of CogVideoX's DPM scheduler, whose history the pipeline keeps",
        "timestep_back": "an argument of CogVideoX's DPM scheduler, whose history the pipeline keeps",
        "r_timestep": "an argument of flow maps, whose networks are told where a step ends",
        "sample_hat": "an argument of Karras' VE scheduler",
        "original_image": "an argument of RePaint's scheduler",
        "mask": "an argument of RePaint's scheduler",
        "emit_mask": "an argument of a scheduler for proteins",
        "order": "an argument of the linear multistep scheduler; give ours a solver with solver_options={'order': ...}",
        **dict.fromkeys(("starting_mask_ratio", "mask_token_id", "temperature", "top_p", "top_k"), _CODES),
        **dict.fromkeys(("sampling_method", "threshold", "editing_threshold", "minimal_topk", "prompt_mask"), _CODES),
        **dict.fromkeys(("cur_sampling_step", "dmd_noisy_tensor", "dmd_sigmas", "dmd_timesteps"), _STAGES),
        "all_timesteps": _STAGES,
        "entropy_bound": _CODES,
    },
    "set_timesteps": {
        "original_inference_steps": _DISTILLED,
        "strength": _DISTILLED,
        "max_timesteps": "an argument of trigonometric flows",
        "intermediate_timesteps": "an argument of trigonometric flows",
        "is_amplify_first_chunk": _STAGES,
        "stage_index": _STAGES,
        "jump_length": "an argument of RePaint's scheduler",
        "jump_n_sample": "an argument of RePaint's scheduler",
        "start_time": "an argument of a scheduler for proteins",
        "block_length": _CODES,
        "temperature": _CODES,
        "num_train_timesteps": "another number of timesteps than the model's; build the scheduler with it",
    },
    "add_noise": {"generator": _CODES},
}
PRIVATE = {
    "_step_index": "a position, which Cosmos' first pipelines set back; a step's place is its timestep's here",
    "_get_conditioning_c_in": "a factor of Cosmos' first pipelines, whose state is x + sigma eps",
    "_get_variance": "the variance of DDPM's steps, from which pipelines compute noise of their own",
    "model_outputs": "the history of diffusers' solvers, which ChronoEdit cuts when it reasons",
}
"""Parts of diffusers' schedulers that pipelines reach into, and what each is."""
_IDLE = frozenset({"s_tmin", "s_tmax", "s_noise"})
"""What says how to churn, and nothing where nobody does."""


def refuse(method: str, given: Mapping[str, Any]) -> None:
    """Refuse arguments that are for other schedulers.

    Raises:
        ValueError: naming the argument, what it is and the fix.
    """
    for name, value in given.items():
        if name in _IDLE or value is None or (isinstance(value, (bool, int, float)) and value == 0):
            continue
        what = FOREIGN[method].get(name)
        if what is None:
            raise ValueError(f"{method} got {name}, which no scheduler here takes: check its spelling, or drop it")
        told = f" = {value}" if isinstance(value, (bool, int, float, str)) else ""
        fix = "" if ";" in what else "; drop it, or keep the pipeline's own scheduler"
        raise ValueError(f"{method} got {name}{told}: {what}{fix}")


def draws(generator: Any, noise: Tensor | None) -> Draw:
    """Where a step's noise comes from: drawn by the pipeline's generator, or given as `variance_noise`."""

    def draw(like: Tensor) -> Tensor:
        if noise is not None:
            return noise.to(like.device, like.dtype)
        drawn: Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return drawn

    return draw


def check_next(labels: list[float], index: int, following: Any) -> None:
    """Refuse a next timestep, as unCLIP's pipelines pass it, that is not the trajectory's.

    Raises:
        ValueError: naming both.
    """
    if following is None:
        return
    wanted = labels[index + 1] if index + 1 < len(labels) else None
    if wanted is None or abs(float(following) - wanted) > 1e-3:
        raise ValueError(
            f"step got prev_timestep = {float(following):g}, and this run goes to "
            f"{'noise level 0' if wanted is None else f'{wanted:g}'}: pass the next of scheduler.timesteps, or nothing"
        )


def per_token(times: Tensor, levels: list[float], index: int, state: Tensor, velocity: Tensor, moved: Tensor) -> Tensor:
    """A step of a flow whose tokens are at times of their own: cleaner ones go to the next level below theirs.

    Args:
        times: of every token, `[B, tokens]`, at most the step's.
        levels: the run's times, decreasing, its end included.
        index: of the step.
        state: `[B, tokens, channels]`.
        velocity: the network's output, eps - x.
        moved: the state after the step of those at the common level.
    """
    grid = torch.tensor(levels, dtype=torch.float32, device=state.device)
    times = times.to(grid)
    below = torch.where(grid < times[..., None] - 1e-6, grid, 0.0).amax(-1)
    own = state + (below - times)[..., None] * velocity
    return torch.where((times >= levels[index] - 1e-6)[..., None], moved, own).to(moved.dtype)
