"""Families of pipelines that fewer people use; each answers with its components and the arguments of its call."""

from __future__ import annotations

from typing import Any

import diffusers
from families import WIDTH, filled, flow, gemma, t5
from pipelining import noise

from compatibility import components as made
from compatibility.pipelines import asked, family, hole, of_case, picture


def embeds(width: int = WIDTH, **more: Any) -> dict[str, Any]:
    """Random embeddings of a prompt and a negative one, and no texts."""
    words = {"prompt_embeds": noise(1, 5, width, seed=1), "negative_prompt_embeds": noise(1, 5, width, seed=2)}
    mask = {f"{sign}prompt_attention_mask": noise(1, 5).isfinite().long() for sign in ("", "negative_")}
    return {**words, **mask, "prompt": None, "negative_prompt": None, **more}


def wan_vae() -> Any:
    return of_case("wan")[0]["vae"]


@family("Mochi")
def mochi() -> Any:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=1, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": vae.eval(), "scheduler": flow(shift=1.0), **t5(made.tiny())}
    return parts, {**asked(frames=7), "max_sequence_length": 16}


@family("Allegro")
def allegro() -> Any:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=WIDTH,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    vae.enable_tiling()
    return {"transformer": filled(model), "vae": vae.eval(), "scheduler": made.ddim(), **t5(made.tiny())}, {
        **asked(frames=8),
        "max_sequence_length": 16,
    }


@family("Latte")
def latte() -> Any:
    model = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, norm_type="ada_norm_single",
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": made.tiny().vae(), "scheduler": made.ddim(), **t5(made.tiny())}
    return parts, {**asked(), "video_length": 1}


@family("CogView3Plus")
def cogview3() -> Any:
    model = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(clip_sample=False)
    parts = {"transformer": filled(model), "vae": made.tiny().vae(), "scheduler": scheduler, **t5(made.tiny())}
    return parts, {**asked(), "max_sequence_length": 16}


@family("CogView4Control")
def cogview4_control() -> Any:
    parts, call = of_case("cogview4")
    model = diffusers.CogView4Transformer2DModel.from_config({**parts["transformer"].config, "in_channels": 8})
    return {**parts, "transformer": filled(model)}, {**call, **embeds()}


@family("CogVideoXImageToVideo", "CogVideoXFunControl")
def cogvideox_of_images() -> Any:
    parts, call = of_case("cogvideox")
    model = diffusers.CogVideoXTransformer3DModel.from_config({**parts["transformer"].config, "in_channels": 8})
    film = [picture(16, 32, seed) for seed in range(5)]
    return {**parts, "transformer": filled(model)}, {**call, "control_video": film}


def hunyuan_dit_model(kind: Any, **more: Any) -> Any:
    return filled(
        kind(
            sample_size=8, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
            cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, hidden_size=24,
            activation_fn="gelu-approximate", text_len=5, text_len_t5=5, **more,
        )
    )  # fmt: skip


@family("HunyuanDiT(PAG|ControlNet)?")
def hunyuan_dit() -> Any:
    model = hunyuan_dit_model(diffusers.HunyuanDiT2DModel, num_layers=2)
    net = hunyuan_dit_model(diffusers.HunyuanDiT2DControlNetModel, transformer_num_layers=2)
    two = {f"{sign}prompt_embeds_2": noise(1, 5, WIDTH, seed=3) for sign in ("", "negative_")}
    masks = {f"{sign}prompt_attention_mask_2": noise(1, 5).isfinite().long() for sign in ("", "negative_")}
    parts = {"transformer": model, "vae": made.tiny().vae(), "scheduler": made.ddim(), "controlnet": net}
    parts |= {"requires_safety_checker": False, "pag_applied_layers": ["blocks.1"]}
    return parts, {**asked(), **embeds(), **two, **masks}


@family("Bria")
def bria() -> Any:
    model = diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    vae = made.tiny().vae(shift_factor=0.0)
    parts = {"transformer": filled(model), "vae": vae, "scheduler": flow(shift=1.0), **t5(made.tiny())}
    return parts, {**asked(), "max_sequence_length": 16, "negative_prompt": "blurry"}


@family("SanaVideo", "SanaImageToVideo")
def sana_video() -> Any:
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH,
        sample_size=8, patch_size=(1, 2, 2), norm_elementwise_affine=False, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": wan_vae(), "scheduler": flow(), **gemma(made.tiny())}
    return parts, {**asked(32, 32), "frames": 9, "complex_human_instruction": [], "max_sequence_length": 16}


@family("SanaControlNet")
def sana_control() -> Any:
    parts, call = of_case("sana")
    net = diffusers.SanaControlNetModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
    )  # fmt: skip
    return {**parts, "controlnet": filled(net)}, {**call, "control_image": picture(32, 32)}


@family("SkyReelsV2")
def skyreels() -> Any:
    model = diffusers.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=1, disable_corrector=list(range(9)), flow_shift=8.0, use_flow_sigmas=True,
        prediction_type="flow_prediction",
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": wan_vae(), "scheduler": scheduler}
    return parts, {**asked(16, 32), **embeds()}


@family("WanImageToVideo")
def wan_of_images() -> Any:
    parts, call = of_case("wan")
    config = {**parts["transformer"].config, "in_channels": 10, "image_dim": 16}
    model = diffusers.WanTransformer3DModel.from_config(config)
    return {**parts, **made.vision(), "transformer": filled(model)}, {**call, **embeds(), "image": picture(16, 32)}


@family("WanVideoToVideo")
def wan_of_videos() -> Any:
    parts, call = of_case("wan")
    return parts, {**call, **embeds(), "video": [picture(16, 32, seed) for seed in range(5)]}


@family("WanVACE")
def wan_vace() -> Any:
    parts, call = of_case("wan")
    config = {**parts["transformer"].config, "num_layers": 2, "vace_layers": [0], "vace_in_channels": 12}
    model = diffusers.WanVACETransformer3DModel.from_config(config)
    film = [picture(16, 32, seed) for seed in range(5)]
    return {**parts, "transformer": filled(model)}, {**call, **embeds(), "video": film, "mask": [hole(16, 32)] * 5}


def kandinsky_unet(in_channels: int = 4, **more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        in_channels=in_channels, out_channels=8, layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(32, 64),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=WIDTH,
        cross_attention_dim=WIDTH, resnet_time_scale_shift="scale_shift",
        **{"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", **more},
    ).eval()  # fmt: skip


def movq() -> Any:
    return diffusers.VQModel(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], latent_channels=4, layers_per_block=1,
        norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    ).eval()  # fmt: skip


def kandinsky(in_channels: int = 4, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    words = {"image_embeds": noise(1, WIDTH, seed=1), "negative_image_embeds": noise(1, WIDTH, seed=2)}
    parts = {"unet": kandinsky_unet(in_channels, **more), "movq": movq(), "scheduler": scheduler}
    return parts, {**asked(64, 64), **words, "hint": noise(1, 3, 256, 256, seed=3)}


@family("KandinskyV22", "KandinskyV22Img2Img")
def kandinsky22() -> Any:
    return kandinsky()


@family("KandinskyV22Inpaint")
def kandinsky22_inpaint() -> Any:
    return kandinsky(9)


@family("KandinskyV22Controlnet(Img2Img)?")
def kandinsky22_controlled() -> Any:
    return kandinsky(8, addition_embed_type="image_hint")


@family("Kandinsky(V22)?Prior", "KandinskyV22PriorEmb2Emb")
def kandinsky_prior() -> Any:
    tiny = made.tiny()
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1, num_embeddings=77
    )
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
    )
    parts = {"prior": filled(prior), "text_encoder": tiny._clip(16, projection=True), "tokenizer": tiny.tokenizer()}
    return {**parts, **made.vision(), "scheduler": scheduler}, asked()


@family("Kandinsky3(Img2Img)?")
def kandinsky3() -> Any:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=WIDTH,
    )  # fmt: skip
    return {"unet": unet.eval(), "movq": movq(), "scheduler": made.ddim(), **t5(made.tiny())}, asked()


@family("IF", "IF(Img2Img|Inpainting)")
def deep_floyd() -> Any:
    return floyd(3)


@family("IFSuperResolution", "IF(Img2Img|Inpainting)SuperResolution")
def deep_floyd_larger() -> Any:
    parts, call = floyd(6, class_embed_type="timestep")
    noisier = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    shot = {"original_image": picture(16, 16, 3), "image": picture(16, 16, 4)}
    return {**parts, "image_noising_scheduler": noisier}, {**call, **shot}


def floyd(in_channels: int, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), in_channels=in_channels, out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=WIDTH,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=WIDTH, addition_embed_type="text",
        addition_embed_type_num_heads=2, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        act_fn="gelu", **more,
    ).eval()  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=1, beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range"
    )
    parts = {"unet": unet, "scheduler": scheduler, "requires_safety_checker": False, **t5(made.tiny())}
    return parts, {**asked(), "clean_caption": False}


@family("Marigold(Depth|Normals)")
def marigold() -> Any:
    parts = {**made.stable_diffusion(in_channels=8), "prediction_type": "depth"}
    return parts, {**asked(), "processing_resolution": 0, "match_input_resolution": False}


@family("PaintByExample")
def by_example() -> Any:
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    config = made.vision()["image_encoder"].config
    parts = {**made.stable_diffusion(in_channels=9), **made.vision()}
    example = {"example_image": picture(16, 16, 9)}
    return {**parts, "image_encoder": PaintByExampleImageEncoder(config, proj_size=16).eval()}, {**asked(), **example}


@family("StableDiffusionImageVariation")
def variation() -> Any:
    return {**made.stable_diffusion(), **made.vision()}, asked()


@family("StableDiffusionDepth2Img")
def with_depth() -> Any:
    return made.stable_diffusion(in_channels=5), {**asked(), "depth_map": noise(1, 16, 16).abs()}


@family("ZImageControlNet")
def z_image_control() -> Any:
    parts, call = of_case("z-image")
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=4, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    return {**parts, "controlnet": filled(net)}, {**call, "control_image": picture(24, 16)}


@family("QwenImageControlNet")
def qwen_control(more: int = 0) -> Any:
    parts, call = of_case("qwen-image")
    net = diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), extra_condition_channels=more,
    )  # fmt: skip
    return {**parts, "controlnet": filled(net)}, {**call, "control_image": picture(24, 16)}


@family("QwenImageControlNetInpaint")
def qwen_control_inpaint() -> Any:
    parts, call = qwen_control(4)
    return parts, {**call, "control_mask": hole(24, 16)}


@family("Lumina")
def lumina() -> Any:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, learn_sigma=True, qk_norm=True,
        cross_attention_dim=WIDTH, scaling_factor=1.0,
    )  # fmt: skip
    parts = {"transformer": filled(model), "vae": made.tiny().vae(), "scheduler": flow(), **gemma(made.tiny())}
    return parts, {**asked(), "max_sequence_length": 16}


@family("LDMTextToImage")
def ldm_text() -> Any:
    tiny = made.tiny()
    parts = made.stable_diffusion()
    return {**parts, "vqvae": tiny.vae(), "bert": tiny._clip(16)}, asked()


@family("LDMSuperResolution")
def ldm_larger() -> Any:
    vq = diffusers.VQModel(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, in_channels=6, out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    return {"vqvae": vq.eval(), "unet": unet.eval(), "scheduler": made.ddim()}, {**asked(), "image": picture(32, 32)}
