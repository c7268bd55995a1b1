"""Families of newer pipelines that make or edit pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from families import WIDTH, filled, flow, t5
from pipelining import noise

from compatibility import components as made
from compatibility.pipelines import asked, family, of_case, picture
from compatibility.rarer import embeds, kandinsky_unet, movq, wan_vae
from compatibility.videos import kandinsky5, masked


def vae8(**config: Any) -> Any:
    """An autoencoder of 4 channels, an eighth of the image's size."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, sample_size=16,
        **{"scaling_factor": 0.4, "shift_factor": 0.1, **config},
    ).eval()  # fmt: skip


def vae16() -> Any:
    """An autoencoder of 16 channels, half the image's size."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=16, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, scaling_factor=0.4, shift_factor=0.1,
    ).eval()  # fmt: skip


@family("Kandinsky5(T2I)")
def kandinsky5_images(cond: bool = False) -> Any:
    return kandinsky5(vae8(), 32, cond)


@family("Kandinsky5(I2I)")
def kandinsky5_edited() -> Any:
    return kandinsky5_images(cond=True)


@family("HiDreamImage")
def hidream() -> Any:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[WIDTH, 16], text_emb_dim=16, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
    )  # fmt: skip
    words: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    for i, sign in enumerate(("", "negative_")):
        words[f"{sign}prompt_embeds_t5"] = noise(1, 5, WIDTH, seed=i)
        words[f"{sign}prompt_embeds_llama3"] = noise(2, 1, 5, 16, seed=2 + i)
        words[f"{sign}pooled_prompt_embeds"] = noise(1, 16, seed=4 + i)
    parts = {"transformer": filled(model), "vae": made.tiny().vae(shift_factor=0.1), "scheduler": flow()}
    return {**parts, "attributes": {"default_sample_size": 8}}, {**asked(16, 16), **words}


@family("HunyuanImage")
def hunyuan_image() -> Any:
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=False, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32,) * 4, layers_per_block=1,
        scaling_factor=0.5, spatial_compression_ratio=8, sample_size=16,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": vae.eval(), "scheduler": flow(shift=7.0), **t5(made.tiny())}
    return parts, {**asked(16, 16), **masked(second=WIDTH)}


@family("OvisImage")
def ovis() -> Any:
    model = diffusers.OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": made.tiny().vae(shift_factor=0.1), "scheduler": flow()}
    return {**parts, **t5(made.tiny())}, {**asked(16, 16), **embeds(), "max_sequence_length": 16}


@family("LongCatImage")
def longcat() -> Any:
    model = diffusers.LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": vae16(), "scheduler": flow(use_dynamic_shifting=True)}
    return {**parts, **t5(made.tiny())}, {**asked(16, 16), **embeds(), "enable_prompt_rewrite": False}


@family("PRX")
def prx() -> Any:
    model = diffusers.PRXTransformer2DModel(
        patch_size=1, in_channels=4, context_in_dim=WIDTH, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[2, 2],
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": made.tiny().vae(shift_factor=0.1), "scheduler": flow()}
    return {**parts, **t5(made.tiny())}, {**asked(16, 16), **masks_of(embeds())}


def masks_of(words: dict[str, Any]) -> dict[str, Any]:
    """The same with masks of truth values."""
    return {key: value.bool() if key.endswith("mask") else value for key, value in words.items()}


@family("PRXPixel")
def prx_pixel() -> Any:
    model = diffusers.PRXTransformer2DModel(
        patch_size=1, in_channels=3, context_in_dim=WIDTH, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[2, 2], bottleneck_size=8, resolution_embeds=True,
    )  # fmt: skip
    parts = {"transformer": filled(model), "scheduler": flow(), **t5(made.tiny())}
    return parts, {**asked(16, 16), **masks_of(embeds())}


@family("Krea2")
def krea() -> Any:
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
    )  # fmt: skip
    words = masked(16)
    for i, sign in enumerate(("", "negative_")):
        words[f"{sign}prompt_embeds"] = noise(1, 5, 3, 16, seed=i)
        words[f"{sign}prompt_embeds_mask"] = torch.ones(1, 5, dtype=torch.bool)
    vae = of_case("qwen-image")[0]["vae"]
    scheduler = flow(use_dynamic_shifting=True)
    return {"transformer": filled(model), "vae": vae, "scheduler": scheduler}, {**asked(16, 16), **words}


@family("NucleusMoEImage")
def nucleus() -> Any:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4), moe_enabled=False, capacity_factors=[8.0, 8.0],
    )  # fmt: skip
    vae = of_case("qwen-image")[0]["vae"]
    return {"transformer": filled(model), "vae": vae, "scheduler": flow()}, {**asked(16, 16), **masked()}


@family("OmniGen")
def omnigen() -> Any:
    model = diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=1,
        in_channels=4, time_step_dim=4, rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )  # fmt: skip
    scheduler = flow(shift=1.0, invert_sigmas=True, num_train_timesteps=1)
    parts = {"transformer": filled(model), "vae": made.tiny().vae(), "scheduler": scheduler}
    return {**parts, "tokenizer": made.tiny()._t5_tokenizer()}, asked(16, 16)


@family("BriaFibo")
def fibo() -> Any:
    model = diffusers.BriaFiboTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    config = transformers.SmolLM3Config(
        hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": wan_vae(), "scheduler": flow()}
    parts |= {"text_encoder": transformers.SmolLM3ForCausalLM(config).eval()}
    return {**parts, "tokenizer": made.tiny()._t5_tokenizer()}, {
        **asked(32, 32),
        "negative_prompt": "ugly",
        "max_sequence_length": 32,
    }


@family("StableDiffusion3Inpaint")
def sd3_inpaint() -> Any:
    parts = made.sd3()
    config = {**parts["transformer"].config, "in_channels": 16, "out_channels": 16}
    model = diffusers.SD3Transformer2DModel.from_config(config)
    return {**parts, "transformer": filled(model), "vae": vae16()}, asked()


@family("AnimateDiffSDXL")
def animated_sdxl() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2, use_motion_mid_block=False,
    )  # fmt: skip
    return {**made.sdxl(), "motion_adapter": filled(adapter)}, {**asked(), "num_frames": 4}


@family("ZImageControlNetInpaint")
def z_image_control_inpaint() -> Any:
    parts, call = of_case("z-image")
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=9, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    words = {f"{sign}prompt_embeds": [noise(5, WIDTH, seed=i)] for i, sign in enumerate(("", "negative_"))}
    return {**parts, "controlnet": filled(net)}, {**call, **words, "control_image": picture(24, 16)}


@family("VisualClozeGeneration")
def cloze() -> Any:
    parts = made.flux(in_channels=48, out_channels=16)
    shots = [[picture(16, 16, 1), picture(16, 16, 2)], [picture(16, 16, 3), None]]
    words = {"task_prompt": "from a map to a fox", "content_prompt": "a red fox"}
    return {**parts, "resolution": 16}, {**asked(), **words, "image": shots}


@family("QwenImageEdit(Plus|Inpaint)?")
def qwen_edit() -> Any:
    """At a few pixels, where they ask for a million."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint as inpaint
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    edit.calculate_dimensions = inpaint.calculate_dimensions = lambda area, ratio: (32, 32, None)
    plus.CONDITION_IMAGE_SIZE = plus.VAE_IMAGE_SIZE = 32 * 32
    parts, call = of_case("qwen-image")
    return parts, {**call, **masked(), "image": picture(32, 32), "height": 32, "width": 32}


@family("Kandinsky(Img2Img)?")
def kandinsky1() -> Any:
    return kandinsky_of_texts(4)


@family("KandinskyInpaint")
def kandinsky1_inpaint() -> Any:
    return kandinsky_of_texts(9)


def kandinsky_of_texts(in_channels: int) -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=WIDTH, transformerDimensions=WIDTH, hidden_size=WIDTH, intermediate_size=16, num_attention_heads=2,
        num_hidden_layers=1, vocab_size=64,
    )  # fmt: skip
    unet = kandinsky_unet(
        in_channels, addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj",
        addition_embed_type_num_heads=2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    words = {"image_embeds": noise(1, WIDTH, seed=1), "negative_image_embeds": noise(1, WIDTH, seed=2)}
    parts = {"unet": unet, "movq": movq(), "scheduler": scheduler}
    parts |= {"text_encoder": MultilingualCLIP(config).eval(), "tokenizer": made.tiny()._t5_tokenizer()}
    return parts, {**asked(64, 64), **words}


@family("StableDiffusion(AttendAndExcite|Paradigms)", "SemanticStableDiffusion", "CycleDiffusion")
def stable_diffusions() -> Any:
    more = {"token_indices": [1], "max_iter_to_alter": 0, "attn_res": (4, 4), "source_prompt": "a fox", "parallel": 5}
    return made.stable_diffusion(), {**asked(), **more}


@family("TextToVideoZero")
def zero() -> Any:
    return made.stable_diffusion(), {**asked(), "video_length": 2, "t0": 1, "t1": 3}


@family("StableDiffusionLatentUpscale")
def latent_upscale() -> Any:
    parts = made.stable_diffusion(in_channels=8, out_channels=5, time_cond_proj_dim=136)
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    words = {f"{sign}pooled_prompt_embeds": noise(1, 8, seed=i) for i, sign in enumerate(("", "negative_"))}
    return {**parts, "scheduler": scheduler}, {**asked(), **embeds(16), **words}


@family("ShapE")
def shap_e() -> Any:
    tiny = made.tiny()
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_embeddings=8, num_layers=1,
        embedding_proj_dim=16, time_embed_dim=32, clip_embed_dim=32, additional_embeddings=0, time_embed_act_fn="gelu",
        norm_in_type="layer", embedding_proj_norm_type=None, encoder_hid_proj_type=None, added_emb_type=None,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False)
    parts = {"prior": filled(prior), "text_encoder": tiny._clip(16, projection=True), "tokenizer": tiny.tokenizer()}
    return {**parts, "scheduler": scheduler}, asked()
