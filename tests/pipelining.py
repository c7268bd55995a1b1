"""Tiny pipelines of diffusers, and what comparing with them takes."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor

import logsnr as ls
from logsnr.adapters.diffusers.pipelines import PipelineDenoiser
from logsnr.noise import sigma_from_flow_time
from logsnr.timesteps import TimestepTable

STEPS = 5  # divides 1000: otherwise DDIMScheduler steps to other timesteps than those it visits
SD_TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPT, NEGATIVE = "a red fox", "blurry"


def ddim(prediction_type: str = "epsilon", **config):
    options = {**SD_TABLE, "clip_sample": False, "timestep_spacing": "trailing", **config}
    return diffusers.DDIMScheduler(prediction_type=prediction_type, **options)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(seed: int = 0, **config):
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"in_channels": 3, "out_channels": 3, **config},
    ).eval()


def dit(tiny, learned_variance: bool = True, seed: int = 0, **scheduler):
    torch.manual_seed(seed)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if learned_variance else 4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    with torch.no_grad():  # zero at the start otherwise
        transformer.proj_out_2.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    names = {1: "goldfish", 2: "great white shark, white shark"}
    return diffusers.DiTPipeline(transformer.eval(), tiny.vae(), ddim(**scheduler), id2label=names)


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_of(pipe, denoiser: PipelineDenoiser) -> ls.Plan:
    """DDIM on the levels that the pipeline's scheduler has just visited."""
    if isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return ls.solvers.ddim([sigma_from_flow_time(t) for t in pipe.scheduler.sigmas.tolist()])
    table = denoiser.prediction.label
    assert isinstance(table, TimestepTable)
    return ls.solvers.ddim([*(table.sigma(float(t)) for t in pipe.scheduler.timesteps), 0.0])


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert float(b.square().mean()) > 0
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
    assert error <= tolerance, f"{error:.2e}"
