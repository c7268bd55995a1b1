"""Tiny random components that tests/families.py and examples/tiny.py do not have."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from families import filled


def tiny() -> Any:
    """examples/tiny.py."""
    examples = str(Path(__file__).parents[2] / "examples")
    if examples not in sys.path:
        sys.path.insert(0, examples)
    import tiny

    return tiny


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{**tiny().STABLE_DIFFUSION, "clip_sample": False, **config})


def pixel_unet() -> Any:
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    return model.eval()


def dit() -> dict[str, Any]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        norm_num_groups=4,
    )  # fmt: skip
    return {"transformer": filled(model), "vae": tiny().vae(), "scheduler": diffusers.DDIMScheduler(clip_sample=False)}


def processor(kind: str) -> Any:
    """The class that prepares images without torchvision, which early releases of transformers call otherwise."""
    return getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")


def siglip() -> dict[str, Any]:
    """SigLIP's image encoder and what prepares its images."""
    config = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    extractor = processor("Siglip")(size={"height": 16, "width": 16})
    return {"image_encoder": transformers.SiglipVisionModel(config).eval(), "feature_extractor": extractor}


def vision(width: int = 16, size: int = 16) -> dict[str, Any]:
    """CLIP's image encoder and what prepares its images."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=16, projection_dim=width, num_hidden_layers=1, num_attention_heads=2,
        image_size=size, patch_size=8,
    )  # fmt: skip
    extractor = processor("CLIP")(crop_size={"height": size, "width": size}, size={"shortest_edge": size})
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    return {"image_encoder": model, "feature_extractor": extractor, "image_processor": extractor}


def text_unet(**config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{"out_channels": 4, **config},
    ).eval()  # fmt: skip


def controlnet(unet: Any, kind: Any = None) -> Any:
    """A ControlNet of a UNet, that says something."""
    if kind is not None:
        narrow = {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
        takes = inspect.signature(kind.__init__).parameters
        config = {key: value for key, value in unet.config.items() if key in takes}
        return filled(kind(**config, **narrow, conditioning_embedding_out_channels=(8, 8)))
    made = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 8), load_weights_from_unet=False
    )
    return filled(made)


def stable_diffusion(**config: Any) -> dict[str, Any]:
    parts = dict(tiny().stable_diffusion().components)
    parts["unet"] = text_unet(cross_attention_dim=16, **config)
    parts |= {"scheduler": ddim(), "requires_safety_checker": False}
    if not config:
        parts |= {"controlnet": controlnet(parts["unet"])}
    return parts


def adapted(parts: dict[str, Any]) -> dict[str, Any]:
    """The same with a UNet whose blocks halve the image last, as adapters expect it, and an adapter."""
    config = {**parts["unet"].config}
    for key in ("down_block_types", "up_block_types"):
        config[key] = config[key][::-1]
    return {**parts, "unet": diffusers.UNet2DConditionModel.from_config(config).eval(), "adapter": adapter()}


def adapter() -> Any:
    return filled(diffusers.T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2))


def sdxl(union: bool = False, **config: Any) -> dict[str, Any]:
    parts = dict(tiny().sdxl().components)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
    }
    parts["unet"] = text_unet(cross_attention_dim=32, **added, **config)
    parts |= {"scheduler": ddim(), "add_watermarker": False}
    if not config:
        kind = diffusers.ControlNetUnionModel if union else None
        parts |= {"controlnet": controlnet(parts["unet"], kind)}
    return parts


def animated(**config: Any) -> dict[str, Any]:
    parts = stable_diffusion(**config)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    return {**parts, "motion_adapter": filled(adapter)}


def text_to_video() -> dict[str, Any]:
    unet = diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    )  # fmt: skip
    return {**stable_diffusion(), "unet": filled(unet)}


def svd() -> dict[str, Any]:
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, num_attention_heads=(2, 2), in_channels=8,
        cross_attention_dim=16, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, sample_size=16
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    return {"unet": unet.eval(), "vae": vae.eval(), "scheduler": scheduler, **vision(size=224)}


def sd3(extra: int = 0) -> dict[str, Any]:
    parts = dict(tiny().sd3().components)
    net = diffusers.SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=8,
        extra_conditioning_channels=extra,
    )  # fmt: skip
    return {**parts, "controlnet": filled(net), "pag_applied_layers": ["blocks.0"]}


def flux(**config: Any) -> dict[str, Any]:
    parts = dict(tiny().flux().components)
    dims = {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }  # fmt: skip
    torch.manual_seed(0)
    parts["transformer"] = filled(diffusers.FluxTransformer2DModel(**{**dims, **config}))
    if not config:
        parts["controlnet"] = filled(diffusers.FluxControlNetModel(**dims))
    return parts
