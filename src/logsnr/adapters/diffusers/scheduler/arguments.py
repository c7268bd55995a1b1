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
_CODES = "of schedulers for tokens and codes"
_DISTILLED = "of schedulers for distilled models"
_STAGES = "of Helios' schedulers, whose levels come in stages"

FOREIGN: dict[str, dict[str, str]] = {
    "step": {
        "s_churn": _CHURN,
        "pred_original_sample": "an image that takes the place of the network's, of Cosmos' loop with EDM's scheduler",
        "old_pred_original_sample": "of CogVideoX's DPM scheduler, whose history the pipeline keeps",
        "timestep_back": "of CogVideoX's DPM scheduler, whose history the pipeline keeps",
        "r_timestep": "of flow maps, whose networks are told where a step ends",
        "sample_hat": "of Karras' VE scheduler",
        "original_image": "of RePaint's scheduler",
        "mask": "of RePaint's scheduler",
        "emit_mask": "of a scheduler for proteins",
        "order": "of the linear multistep scheduler; give ours a solver with solver_options={'order': ...}",
        **dict.fromkeys(("starting_mask_ratio", "mask_token_id", "temperature", "top_p", "top_k"), _CODES),
        **dict.fromkeys(("sampling_method", "threshold", "editing_threshold", "minimal_topk", "prompt_mask"), _CODES),
        **dict.fromkeys(("cur_sampling_step", "dmd_noisy_tensor", "dmd_sigmas", "dmd_timesteps"), _STAGES),
        "all_timesteps": _STAGES,
        "entropy_bound": _CODES,
    },
    "set_timesteps": {
        "original_inference_steps": _DISTILLED,
        "strength": _DISTILLED,
        "max_timesteps": "of trigonometric flows",
        "intermediate_timesteps": "of trigonometric flows",
        "is_amplify_first_chunk": _STAGES,
        "stage_index": _STAGES,
        "jump_length": "of RePaint's scheduler",
        "jump_n_sample": "of RePaint's scheduler",
        "start_time": "of a scheduler for proteins",
        "block_length": _CODES,
        "temperature": _CODES,
        "num_train_timesteps": "another number of timesteps than the model's; build the scheduler with it",
    },
    "add_noise": {"generator": _CODES},
}
_IDLE = frozenset({"s_tmin", "s_tmax", "s_noise"})
"""What says how to churn, and nothing where nobody does."""


def refuse(method: str, given: Mapping[str, Any]) -> None:
    """Refuse arguments that are for other schedulers.

    Raises:
        ValueError: naming the argument and what it is.
    """
    for name, value in given.items():
        if name in _IDLE or value is None or (isinstance(value, (bool, int, float)) and value == 0):
            continue
        what = FOREIGN[method].get(name, "none that a stock scheduler has")
        raise ValueError(f"{method} got {name}: an argument {what}; this pipeline needs its own scheduler")


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
