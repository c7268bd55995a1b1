"""Tiny random pipelines of every family that `load` knows beside those in examples/tiny.py.

Where a tokenizer can be made on the spot the prompt is a text; elsewhere it is the pipeline's own embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from pipelining import NEGATIVE, PROMPT, noise
from torch import Tensor

WIDTH = 32
"""Of the text encoders."""
NO_TEXT = {"text_encoder": None, "tokenizer": None}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline, and what it takes to compare it with the denoiser in it.

    Attributes:
        pipe: the pipeline.
        shape: of a latent, as the denoiser has it.
        prompt: as the denoiser takes it; a mapping goes to the pipeline by keyword.
        negative: the same, for guidance.
        asked: more of the pipeline's call.
        options: more of `denoiser_from`.
        scale_name: of the guidance that takes two evaluations, in the pipeline's call; None where there is none.
        none: the scale at which there is no guidance.
        told: whether the network is told a scale too.
        theirs: latents as the pipeline holds them, from the denoiser's.
        ours: the inverse, of what it answers.
        images: shape of an image or video.
    """

    pipe: Any
    shape: tuple[int, ...]
    prompt: Any = PROMPT
    negative: Any = NEGATIVE
    asked: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    scale_name: str | None = "guidance_scale"
    none: float = 1.0
    told: bool = False
    theirs: Callable[[Tensor], Tensor] = lambda x: x
    ours: Callable[[Tensor], Tensor] = lambda x: x
    images: tuple[int, ...] = (3, 16, 16)


def filled(module: Any, seed: int = 0) -> Any:
    """A network whose layers that start at zero do not, nor as whatever lay in memory (Z-Image's tokens, of before)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("pad_token") or not parameter.abs().sum():
                parameter.normal_(std=0.1, generator=generator)
    return module.eval()


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def embedded(words: int, negative_words: int, width: int = WIDTH, **more: Any) -> dict[str, Any]:
    """Random embeddings of a prompt and of a negative one, of other lengths."""
    return {
        "prompt": {"prompt_embeds": noise(1, words, width, seed=1), **more},
        "negative": {"prompt_embeds": noise(1, negative_words, width, seed=2), **more},
    }


def sized(height: int, width: int, **asked: Any) -> dict[str, Any]:
    """A size in pixels, as the pipeline's call, `denoiser_from` and the images have it."""
    return {
        "asked": {"height": height, "width": width, **asked},
        "options": {"size": (height, width)},
        "images": (3, height, width),
    }


def t5(tiny: Any) -> dict[str, Any]:
    return {"text_encoder": tiny._t5(), "tokenizer": tiny._t5_tokenizer()}


def gemma(tiny: Any) -> dict[str, Any]:
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return {"text_encoder": transformers.Gemma2Model(config).eval(), "tokenizer": tiny._t5_tokenizer()}


def pixart(tiny: Any, alpha: bool) -> Case:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        caption_channels=WIDTH,
        use_additional_conditions=alpha,
    )
    if alpha:  # only the one of 1024 pixels is told its size
        model.register_to_config(sample_size=128)
    kind = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = kind(transformer=filled(model), vae=tiny.vae(), scheduler=scheduler, **t5(tiny))
    asked = sized(24, 16, use_resolution_binning=False, clean_caption=False)
    return Case(pipe=pipe, shape=(4, 12, 8), **asked)


def sana(tiny: Any) -> Case:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        timestep_scale=0.5,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.4,
    )
    pipe = diffusers.SanaPipeline(transformer=filled(model), vae=vae.eval(), scheduler=flow(), **gemma(tiny))
    asked = sized(32, 32, use_resolution_binning=False, max_sequence_length=300)
    return Case(pipe=pipe, shape=(4, 16, 16), **asked)


def aura_flow(tiny: Any) -> Case:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    pipe = diffusers.AuraFlowPipeline(transformer=filled(model), vae=tiny.vae(), scheduler=flow(shift=1.73), **t5(tiny))
    return Case(pipe=pipe, shape=(4, 8, 8), asked={"height": 16, "width": 16})


def cogview4(tiny: Any) -> Case:
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    scheduler = flow(shift=1.0, use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75)
    pipe = diffusers.CogView4Pipeline(transformer=filled(model), vae=tiny.vae(), scheduler=scheduler, **NO_TEXT)
    return Case(
        pipe=pipe,
        shape=(4, 16, 8),
        **sized(32, 16),
        **embedded(5, 3),
    )


def lumina2(tiny: Any) -> Case:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(400, 32, 32),
        cap_feat_dim=WIDTH,
    )
    scheduler = flow(use_dynamic_shifting=True)
    pipe = diffusers.Lumina2Pipeline(
        transformer=filled(model), vae=tiny.vae(shift_factor=0.1), scheduler=scheduler, **gemma(tiny)
    )
    # Its pipeline takes a latent for 8 pixels, whatever the VAE.
    return Case(pipe=pipe, shape=(4, 8, 8), asked={"height": 64, "width": 64}, options={"size": 16})


def z_image(tiny: Any) -> Case:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipe = diffusers.ZImagePipeline(
        transformer=filled(model), vae=tiny.vae(shift_factor=0.1), scheduler=flow(), **NO_TEXT
    )
    return Case(
        pipe=pipe,
        shape=(4, 12, 8),
        **sized(24, 16),
        prompt={"prompt_embeds": [noise(5, WIDTH, seed=1), noise(3, WIDTH, seed=3)]},
        negative={"prompt_embeds": [noise(4, WIDTH, seed=2), noise(2, WIDTH, seed=4)]},
        none=0.0,
    )


def packed(height: int, width: int) -> dict[str, Any]:
    from logsnr.adapters.diffusers.pipelines.tokens import pack, unpack

    return {"theirs": pack, "ours": lambda x: unpack(x, height, width)}


def chroma(tiny: Any) -> Case:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(
        transformer=filled(model), vae=tiny.vae(shift_factor=0.1), scheduler=flow(), **t5(tiny)
    )
    return Case(
        pipe=pipe,
        shape=(4, 12, 8),
        **sized(24, 16),
        **packed(12, 8),
    )


def qwen_image(tiny: Any) -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    scheduler = flow(use_dynamic_shifting=True, shift_terminal=0.02)
    pipe = diffusers.QwenImagePipeline(transformer=filled(model), vae=vae.eval(), scheduler=scheduler, **NO_TEXT)
    return Case(
        pipe=pipe,
        shape=(4, 12, 8),
        **sized(24, 16),
        scale_name="true_cfg_scale",
        **packed(12, 8),
        **embedded(6, 4),
    )


def flux2(tiny: Any, klein: bool) -> Case:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    vae.bn.running_mean.copy_(noise(16, seed=5))
    vae.bn.running_var.copy_(noise(16, seed=6).square() + 0.5)
    kind = diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline
    pipe = kind(
        transformer=filled(model), vae=vae.eval(), scheduler=flow(shift=1.0, use_dynamic_shifting=True), **NO_TEXT
    )
    height, width = 6, 4

    def ours(x: Tensor) -> Tensor:
        if not klein:
            return x.transpose(1, 2).reshape(-1, 16, height, width)
        x = pipe._patchify_latents(x)  # its "latent" is what the VAE decodes
        mean, var = (v.reshape(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var))
        return (x - mean) / (var + vae.config.batch_norm_eps).sqrt()

    return Case(
        pipe=pipe,
        shape=(16, height, width),
        **sized(24, 16),
        ours=ours,
        told=not klein,
        scale_name="guidance_scale" if klein else None,
        **embedded(5, 3),
    )


VIDEO = {"height": 16, "width": 32, "num_frames": 5}
MOVING = {"asked": VIDEO, "options": {"size": (16, 32), "frames": 5}, "images": (3, 5, 16, 32)}


def ltx(tiny: Any) -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        patch_size=2,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.latents_mean.copy_(noise(4, seed=5))
    vae.latents_std.copy_(noise(4, seed=6).square() + 0.5)
    scheduler = flow(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.1)
    pipe = diffusers.LTXPipeline(transformer=filled(model), vae=vae.eval(), scheduler=scheduler, **t5(tiny))
    shape = (4, 3, 8, 16)
    return Case(
        pipe=pipe,
        shape=shape,
        theirs=lambda x: pipe._pack_latents(x),
        ours=lambda x: pipe._unpack_latents(x, *shape[1:]),
        asked={"height": 32, "width": 64, "num_frames": 5},
        options={"size": (32, 64), "frames": 5},
        images=(3, 5, 32, 64),
    )


def wan(tiny: Any, experts: bool = False, expanded: bool = False) -> Case:
    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return filled(
            diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=WIDTH,
                freq_dim=16,
                ffn_dim=16,
                num_layers=1,
                rope_max_seq_len=32,
            )
        )

    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    pipe = diffusers.WanPipeline(
        transformer=model(0),
        transformer_2=model(1) if experts else None,
        boundary_ratio=0.7 if experts else None,
        expand_timesteps=expanded,
        vae=vae.eval(),
        scheduler=flow(),
        **t5(tiny),
    )
    return Case(pipe=pipe, shape=(4, 3, 8, 16), **MOVING)


def hunyuan_video(tiny: Any) -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=filled(model),
        vae=vae.eval(),
        scheduler=flow(shift=7.0),
        **NO_TEXT,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    mask = torch.tensor([[1, 1, 1, 0]])
    given = embedded(4, 4, prompt_attention_mask=mask, pooled_prompt_embeds=noise(1, 8, seed=7))
    return Case(pipe=pipe, shape=(4, 2, 4, 8), scale_name="true_cfg_scale", told=True, **MOVING, **given)


def cogvideox(tiny: Any, patched: bool = False) -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=16,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=2,
        use_rotary_positional_embeddings=True,
        patch_size_t=2 if patched else None,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
        scaling_factor=0.7,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipe = diffusers.CogVideoXPipeline(transformer=filled(model), vae=vae.eval(), scheduler=scheduler, **t5(tiny))
    return Case(pipe=pipe, shape=(4 if patched else 3, 4, 8, 16), **MOVING)  # 1.5 fills the last patch


CASES: dict[str, Callable[[Any], Case]] = {
    "pixart-alpha": lambda tiny: pixart(tiny, alpha=True),
    "pixart-sigma": lambda tiny: pixart(tiny, alpha=False),
    "sana": sana,
    "aura-flow": aura_flow,
    "cogview4": cogview4,
    "lumina2": lumina2,
    "z-image": z_image,
    "chroma": chroma,
    "qwen-image": qwen_image,
    "flux2": lambda tiny: flux2(tiny, klein=False),
    "flux2-klein": lambda tiny: flux2(tiny, klein=True),
    "ltx": ltx,
    "wan": wan,
    "wan-2.2": lambda tiny: wan(tiny, experts=True),
    "wan-2.2-5b": lambda tiny: wan(tiny, expanded=True),
    "hunyuan-video": hunyuan_video,
    "cogvideox": cogvideox,
    "cogvideox-1.5": lambda tiny: cogvideox(tiny, patched=True),
}
