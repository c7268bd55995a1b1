"""Tiny random diffusers pipelines, how each is called, and its network with guidance as F(state, label)."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logsnr as ls

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


TOLERANCE = 1e-4
STEPS = 5
DIM = 16
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


@functools.cache
def vae(channels: int = 4) -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=8, shift_factor=0.0
        )
    )


@functools.cache
def unet(channels: int = 4, xl: bool = False) -> Any:
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + DIM,
        }
        if xl
        else {}
    )
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=DIM,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **extra,
        )
    )


@functools.cache
def ddpm_unet() -> Any:
    return seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        )
    )


@functools.cache
def dit() -> Any:
    return seeded(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8
        )
    )


@functools.cache
def sd3() -> Any:
    return seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=DIM,
            joint_attention_dim=DIM,
            pooled_projection_dim=DIM,
            out_channels=4,
            pos_embed_max_size=16,
        )
    )


@functools.cache
def flux() -> Any:
    return seeded(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=DIM,
            pooled_projection_dim=DIM,
            axes_dims_rope=(4, 4, 8),
        )
    )


@dataclass
class Case:
    """A pipeline, how to call it, and its network with guidance as F(state, label)."""

    pipe: Any
    call: dict[str, Any]
    network: Callable[[Tensor, Tensor], Tensor]


def cfg(call: Callable[[Tensor, Tensor], Tensor], scale: float = 3.0, uncond_first: bool = True):
    """F of a network called on two halves, in diffusers' convention: 1 is no guidance."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        out = call(torch.cat([x, x]), torch.cat([t, t]))
        first, second = out.chunk(2)
        null, cond = (first, second) if uncond_first else (second, first)
        return null + scale * (cond - null)

    return network


EMBEDS = {"prompt_embeds": draw(1, 3, DIM, seed=1), "negative_prompt_embeds": draw(1, 3, DIM, seed=2)}
POOLED = {"pooled_prompt_embeds": draw(1, DIM, seed=3), "negative_pooled_prompt_embeds": draw(1, DIM, seed=4)}
BOTH = torch.cat([EMBEDS["negative_prompt_embeds"], EMBEDS["prompt_embeds"]])
BOTH_POOLED = torch.cat([POOLED["negative_pooled_prompt_embeds"], POOLED["pooled_prompt_embeds"]])
LATENT = {"num_inference_steps": STEPS, "output_type": "latent"}
SIZE = {"height": 8, "width": 8}
PARTS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
NO_TEXT = {"text_encoder": None, "tokenizer": None}


def ddpm() -> Case:
    pipe = diffusers.DDPMPipeline(unet=ddpm_unet(), scheduler=diffusers.DDPMScheduler(clip_sample=False))
    call = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "np"}
    return Case(pipe, call, lambda x, t: ddpm_unet()(x, t).sample)


def sd_network(x: Tensor, t: Tensor) -> Tensor:
    return unet()(x, t, encoder_hidden_states=BOTH).sample


def sd_stock() -> Any:
    return diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)


def sd() -> Case:
    pipe = diffusers.StableDiffusionPipeline(vae=vae(), unet=unet(), scheduler=sd_stock(), **NO_TEXT, **PARTS)
    return Case(pipe, {**EMBEDS, **LATENT, **SIZE, "guidance_scale": 3.0}, cfg(sd_network))


def sd_img2img() -> Case:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(vae=vae(), unet=unet(), scheduler=sd_stock(), **NO_TEXT, **PARTS)
    image = draw(1, 3, 8, 8, seed=5).clamp(-1, 1)
    call = {**EMBEDS, **LATENT, "guidance_scale": 3.0, "image": image, "strength": 0.6}
    return Case(pipe, call, cfg(sd_network))


def sd_inpaint(channels: int = 9) -> Case:
    """The inpainting model: the mask and the masked image are part of the network's input."""
    model = unet(channels)
    pipe = diffusers.StableDiffusionInpaintPipeline(vae=vae(), unet=model, scheduler=sd_stock(), **NO_TEXT, **PARTS)
    image, mask = draw(1, 3, 8, 8, seed=5).clamp(-1, 1), (draw(1, 1, 8, 8, seed=6) > 0).float()
    extra: list[Tensor] = []

    def spy(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        extra[:] = [arguments[0][:1, 4:].clone()]

    def call(x: Tensor, t: Tensor) -> Tensor:
        return model(torch.cat([x, extra[0].expand(2, -1, -1, -1)], 1), t, encoder_hidden_states=BOTH).sample

    if not model._forward_pre_hooks:
        model.register_forward_pre_hook(spy)
    else:
        spy_of = next(iter(model._forward_pre_hooks.values()))
        extra = inspect.getclosurevars(spy_of).nonlocals["extra"]
    arguments = {**EMBEDS, **LATENT, **SIZE, "guidance_scale": 3.0, "image": image, "mask_image": mask, "strength": 0.6}
    return Case(pipe, arguments, cfg(call))


def sdxl() -> Case:
    model = unet(4, True)
    scheduler = diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1)
    names = {"text_encoder_2": None, "tokenizer_2": None}
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=model, scheduler=scheduler, **NO_TEXT, **names, add_watermarker=False
    )
    ids = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(2, 1)

    def call(x: Tensor, t: Tensor) -> Tensor:
        extra = {"text_embeds": BOTH_POOLED, "time_ids": ids}
        return model(x, t, encoder_hidden_states=BOTH, added_cond_kwargs=extra).sample

    return Case(pipe, {**EMBEDS, **POOLED, **LATENT, **SIZE, "guidance_scale": 3.0}, cfg(call))


def dit_case() -> Case:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer=dit(), vae=vae(), scheduler=scheduler)
    labels = torch.tensor([3, 1000])

    def call(x: Tensor, t: Tensor) -> Tensor:
        return dit()(x, timestep=t, class_labels=labels).sample[:, :4]

    arguments = {"class_labels": [3], "guidance_scale": 3.0, "num_inference_steps": STEPS, "output_type": "np"}
    return Case(pipe, arguments, cfg(call, uncond_first=False))


def sd3_parts() -> dict[str, Any]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"transformer": sd3(), "vae": vae(), "scheduler": scheduler, **dict.fromkeys(names)}


def sd3_network(x: Tensor, t: Tensor) -> Tensor:
    return sd3()(hidden_states=x, timestep=t, encoder_hidden_states=BOTH, pooled_projections=BOTH_POOLED).sample


def sd3_case() -> Case:
    pipe = diffusers.StableDiffusion3Pipeline(**sd3_parts())
    return Case(pipe, {**EMBEDS, **POOLED, **LATENT, **SIZE, "guidance_scale": 3.0}, cfg(sd3_network))


def sd3_img2img() -> Case:
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**sd3_parts())
    image = draw(1, 3, 8, 8, seed=5).clamp(-1, 1)
    call = {**EMBEDS, **POOLED, **LATENT, **SIZE, "guidance_scale": 3.0, "image": image, "strength": 0.6}
    return Case(pipe, call, cfg(sd3_network))


def flux_case(image: Tensor | None = None) -> Case:
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    kind = diffusers.FluxPipeline if image is None else diffusers.FluxImg2ImgPipeline
    pipe = kind(transformer=flux(), vae=vae(), scheduler=scheduler, **dict.fromkeys(names))
    txt, img = torch.zeros(3, 3), pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return flux()(
            hidden_states=x,
            timestep=t / 1000,
            pooled_projections=POOLED["pooled_prompt_embeds"],
            encoder_hidden_states=EMBEDS["prompt_embeds"],
            txt_ids=txt,
            img_ids=img,
        ).sample

    call = {
        "prompt_embeds": EMBEDS["prompt_embeds"],
        "pooled_prompt_embeds": POOLED["pooled_prompt_embeds"],
        **LATENT,
        **SIZE,
        **({} if image is None else {"image": image, "strength": 0.6}),
    }
    return Case(pipe, call, network)


def flux_img2img() -> Case:
    return flux_case(draw(1, 3, 8, 8, seed=5).clamp(-1, 1))


CASES: dict[str, Callable[[], Case]] = {
    "ddpm": ddpm,
    "sd": sd,
    "sd-img2img": sd_img2img,
    "sd-inpaint": sd_inpaint,
    "sdxl": sdxl,
    "dit": dit_case,
    "sd3": sd3_case,
    "sd3-img2img": sd3_img2img,
    "flux": flux_case,
    "flux-img2img": flux_img2img,
}
FLOWS = ("sd3", "sd3-img2img", "flux", "flux-img2img")
LATE = ("sd-img2img", "sd-inpaint", "sd3-img2img", "flux-img2img")
"""Those that start from a noisy image: three of the steps."""
MATRIX = [
    (case, kind)
    for case in CASES
    for kind in (("flow_prediction",) if case in FLOWS else ("epsilon", "v_prediction", "sample"))
]


def run(case: Case, **call: Any) -> list[Tensor]:
    """Every state of a pipeline's loop: what it gave the first step, then what each step returned."""
    scheduler, states = case.pipe.scheduler, []
    step = scheduler.step

    @functools.wraps(step)
    def recording(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not states:
            states.append(sample.clone())
        out = step(model_output, timestep, sample, *args, **kwargs)
        states.append(out[0].clone())
        return out

    scheduler.step = recording
    case.pipe.set_progress_bar_config(disable=True)
    try:
        case.pipe(**{"generator": torch.Generator().manual_seed(7), **case.call, **call})
    finally:
        del scheduler.step
    return states


class Guided(nn.Module):
    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.network(x, label)


def expected(case: Case, states: list[Tensor]) -> list[Tensor]:
    """The states of `sample` from the pipeline's first, on its network: `plan.tail(k)` where it began late."""
    scheduler = case.pipe.scheduler
    plan, model = scheduler.plan, scheduler.model
    plan = plan.tail(plan.nfe - (len(states) - 1))
    if case.pipe.__class__.__name__ == "DiTPipeline":
        states = [state[:1] for state in states]
    scales = [model.scale(sigma) for sigma in plan.sigmas]
    first = states[0]
    denoiser = ls.NetworkDenoiser(
        Guided(case.network), model.prediction, shape=tuple(first.shape[1:]), trained_range=(0.0, math.inf)
    )
    out: list[Tensor] = []
    ls.sample(denoiser, plan, noise=first / scales[0], callback=lambda step: out.append(step.z.clone()))
    return [z * k for z, k in zip(out, scales, strict=True)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(wanted)
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        x = x[: len(y)].float()
        error = float((x - y).square().mean().sqrt() / y.square().mean().sqrt())
        assert error <= tolerance, f"state {i}: {error:.2e}"
