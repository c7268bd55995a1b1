"""Families of newer pipelines that make videos, some with sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from families import NO_TEXT, WIDTH, filled, flow, t5
from pipelining import noise

from compatibility import components as made
from compatibility.pipelines import asked, family, of_case, picture
from compatibility.rarer import embeds, wan_vae


def film(height: int, width: int, frames: int = 5) -> list[Any]:
    return [picture(height, width, seed) for seed in range(frames)]


def masked(width: int = WIDTH, second: int = 0, **more: Any) -> dict[str, Any]:
    """Embeddings of a prompt and a negative one with their masks, as later pipelines name these; and second ones."""
    out = embeds(width, **more)
    for sign in ("", "negative_"):
        out[f"{sign}prompt_embeds_mask"] = torch.ones(1, 5, dtype=torch.long)
        if second:
            out[f"{sign}prompt_embeds_2"] = noise(1, 5, second, seed=3)
            out[f"{sign}prompt_embeds_mask_2"] = torch.ones(1, 5, dtype=torch.long)
    return out


class Harmless(torch.nn.Module):
    """A guardrail that lets everything pass."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


@family("LTX2(ImageToVideo|Condition|InContext|HDR)?")
def ltx2() -> Any:
    """Sound beside the pictures: its scheduler is copied for the second of two states."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=WIDTH,
        rope_double_precision=False, rope_type="split",
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=2, video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_theta=10000.0,
        rope_double_precision=False, causal_temporal_positioning=False, rope_type="split",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2,
        resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", dropout=0.0,
        mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    parts = {"transformer": filled(model), "connectors": filled(connectors), "vae": vae.eval(), **NO_TEXT}
    parts |= {"audio_vae": sound.eval(), "vocoder": vocoder.eval(), "scheduler": flow()}
    call = {"spatio_temporal_guidance_blocks": [1], "frame_rate": 25.0, "max_sequence_length": 16, "image_crf": 0}
    return parts, {**asked(32, 32), **embeds(2 * WIDTH), **call}


@family("HunyuanVideo15(ImageToVideo)?")
def hunyuan15() -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=16,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": vae.eval(), "scheduler": flow(shift=7.0), **t5(made.tiny())}
    parts |= {"guider": ClassifierFreeGuidance(guidance_scale=3.0)}
    parts |= made.siglip()
    return parts, {**asked(16, 16), **masked(second=WIDTH)}


def hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, layers_per_block=1, norm_num_groups=4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, scaling_factor=0.5,
        spatial_compression_ratio=8, temporal_compression_ratio=4, mid_block_add_attention=True,
    ).eval()  # fmt: skip


def hunyuan(kind: Any, **config: Any) -> dict[str, Any]:
    dims = {
        "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": WIDTH,
        "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
    }  # fmt: skip
    texts = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    return {
        "transformer": filled(kind(**{**dims, **config})), "vae": hunyuan_vae(), "scheduler": flow(shift=7.0),
        **t5(made.tiny()), **texts,
    }  # fmt: skip


def pooled(width: int = 8) -> dict[str, Any]:
    return {f"{sign}pooled_prompt_embeds": noise(1, width, seed=i) for i, sign in enumerate(("", "negative_"))}


@family("HunyuanVideoImageToVideo")
def hunyuan_of_images() -> Any:
    """One image token stands for the picture."""
    parts = hunyuan(
        diffusers.HunyuanVideoTransformer3DModel, in_channels=9, guidance_embeds=False,
        image_condition_type="latent_concat",
    )  # fmt: skip
    return parts, {**asked(16, 16, 9), **embeds(), **pooled(), "num_frames": 9}


@family("HunyuanSkyreelsImageToVideo")
def hunyuan_skyreels() -> Any:
    parts = hunyuan(diffusers.HunyuanVideoTransformer3DModel, in_channels=8, guidance_embeds=True)
    return parts, {**asked(16, 16, 9), **embeds(), **pooled(), "num_frames": 9}


@family("HunyuanVideoFramepack")
def framepack() -> Any:
    parts = hunyuan(
        diffusers.HunyuanVideoFramepackTransformer3DModel, in_channels=4, patch_size=2, guidance_embeds=True,
        image_condition_type=None, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True,
    )  # fmt: skip
    parts |= made.siglip()
    return parts, {**asked(32, 32, 9), **embeds(), **pooled(), "num_frames": 9, "latent_window_size": 3}


@family("Kandinsky5T2V")
def kandinsky5_videos(cond: bool = False) -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=[8, 8, 8, 8], down_block_types=["HunyuanVideoDownBlock3D"] * 4, latent_channels=4,
        up_block_types=["HunyuanVideoUpBlock3D"] * 4, layers_per_block=1, mid_block_add_attention=False,
        norm_num_groups=4, spatial_compression_ratio=8, temporal_compression_ratio=4,
    )  # fmt: skip
    return kandinsky5(vae.eval(), 32, cond)


@family("Kandinsky5I2V")
def kandinsky5_of_images() -> Any:
    parts, call = kandinsky5_videos(cond=True)
    return parts, {**call, "num_frames": 17}  # of which all but the first are made alike: two are too few


def kandinsky5(vae: Any, size: int, cond: bool = False) -> Any:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=16, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(1, 1, 2), visual_cond=cond,
        attention_type="regular",
    )  # fmt: skip
    words: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    for i, sign in enumerate(("", "negative_")):
        words[f"{sign}prompt_embeds_qwen"] = noise(1, 5, WIDTH, seed=i)
        words[f"{sign}prompt_embeds_clip"] = noise(1, 16, seed=2 + i)
        words[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, 5], dtype=torch.int32)
    texts = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    parts = {"transformer": filled(model), "vae": vae, "scheduler": flow(shift=7.0), **NO_TEXT, **texts}
    return {**parts, "attributes": {"resolutions": [(size, size)]}}, {**asked(size, size), **words}


def cosmos(vae: Any, scheduler: Any, channels: int, frames: int = 9) -> Any:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(8, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False, extra_pos_embed_type="learnable",
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": vae, "scheduler": scheduler, "safety_checker": Harmless()}
    call = {**asked(32, 32, frames), **embeds(), "video": None, "max_sequence_length": 16}
    return {**parts, **t5(made.tiny())}, call


def cosmos_of_diffusion(channels: int) -> Any:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, patch_type="haar", scaling_factor=1.0,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    return cosmos(vae.eval(), scheduler, channels)


@family("CosmosTextToWorld")
def cosmos_text() -> Any:
    return cosmos_of_diffusion(4)


@family("CosmosVideoToWorld")
def cosmos_video() -> Any:
    return cosmos_of_diffusion(5)


@family("Cosmos2TextToImage")
def cosmos2_text() -> Any:
    return cosmos(wan_vae(), flow(use_karras_sigmas=True), 4)


@family("Cosmos2VideoToWorld")
def cosmos2_video() -> Any:
    return cosmos(wan_vae(), flow(use_karras_sigmas=True), 5)


@family("Cosmos2_5_PredictBase")
def cosmos25() -> Any:
    parts, call = cosmos(wan_vae(), unipc(use_karras_sigmas=True, flow_shift=1.0), 5)
    return parts, {**call, "image": None}


def unipc(**config: Any) -> Any:
    """UniPC of order 1, without its corrector, of a flow."""
    plain = {"solver_order": 1, "disable_corrector": list(range(9)), "flow_shift": 8.0, "use_flow_sigmas": True}
    return diffusers.UniPCMultistepScheduler(**{**plain, "prediction_type": "flow_prediction", **config})


def skyreels_model(**more: Any) -> Any:
    return filled(
        diffusers.SkyReelsV2Transformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, out_channels=4, text_dim=WIDTH,
            freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32, **{"in_channels": 4, **more},
        )
    )  # fmt: skip


@family("SkyReelsV2DiffusionForcing(ImageToVideo|VideoToVideo)?")
def skyreels_forcing() -> Any:
    parts = {"transformer": skyreels_model(), "vae": wan_vae(), "scheduler": unipc(), **NO_TEXT}
    more = {"base_num_frames": 5, "overlap_history": 3, "fps": 24}
    return parts, {**asked(16, 32), **embeds(), "video": film(16, 32), **more}


@family("SkyReelsV2ImageToVideo")
def skyreels_of_images() -> Any:
    parts = {"transformer": skyreels_model(in_channels=10, image_dim=16), "vae": wan_vae(), "scheduler": unipc()}
    return {**parts, **NO_TEXT, **made.vision()}, {**asked(16, 32), **embeds()}


@family("ChronoEdit")
def chrono() -> Any:
    model = diffusers.ChronoEditTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=10, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32, image_dim=16,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": wan_vae(), "scheduler": flow(shift=7.0), **NO_TEXT, **made.vision()}
    return parts, {**asked(16, 32), **embeds()}


@family("LucyEdit")
def lucy() -> Any:
    parts, call = of_case("wan")
    model = diffusers.WanTransformer3DModel.from_config({**parts["transformer"].config, "in_channels": 8})
    return {**parts, "transformer": filled(model)}, {**call, **embeds(), "video": film(16, 32)}


@family("EasyAnimate", "EasyAnimateControl")
def easy(in_channels: int = 4) -> Any:
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=in_channels, out_channels=4, time_embed_dim=2,
        text_embed_dim=WIDTH, num_layers=1, sample_width=16, sample_height=16, patch_size=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3), latent_channels=4,
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3), block_out_channels=(8,) * 4,
        layers_per_block=1, norm_num_groups=2, spatial_group_norm=False,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": vae.eval(), "scheduler": flow(), **t5(made.tiny())}
    return parts, {**asked(16, 16), **embeds()}


@family("EasyAnimateInpaint")
def easy_inpaint() -> Any:
    parts, call = easy(9)
    film = noise(1, 3, 5, 16, 16, seed=3).sigmoid()
    return parts, {**call, "video": film, "mask_video": 255 * (film[:, :1] > 0.5).float()}


@family("MotifVideo")
def motif() -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        patch_size=1, patch_size_t=1, qk_norm="rms_norm", text_embed_dim=WIDTH, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": wan_vae(), "scheduler": flow(shift=7.0), **t5(made.tiny())}
    return {**parts, "guider": ClassifierFreeGuidance(guidance_scale=3.0)}, {**asked(16, 16), **embeds()}
