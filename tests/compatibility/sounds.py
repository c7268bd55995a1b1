"""Families of pipelines that make sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from families import WIDTH, filled, flow, t5
from pipelining import noise

from compatibility import components as made
from compatibility.pipelines import asked, family
from compatibility.rarer import embeds


def vocoder() -> Any:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7], normalize_before=False,
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
    )  # fmt: skip
    return transformers.SpeechT5HifiGan(config).eval()


def spectrograms(unet: Any) -> dict[str, Any]:
    """A network, an autoencoder of spectrograms half their size, and a vocoder."""
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    texts = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"))
    return {"unet": filled(unet), "vae": vae.eval(), "scheduler": made.ddim(), "vocoder": vocoder(), **texts}


LONG = 64 * 4 / 16000
"""Seconds of 64 frames of a spectrogram."""


def heard(**more: Any) -> dict[str, Any]:
    return {**asked(), "audio_length_in_s": LONG, "negative_prompt": None, **more}


@family("AudioLDM2")
def audio_ldm2() -> Any:
    from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel

    unet = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=32, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=(8, 16), attention_head_dim=4,
    )  # fmt: skip
    words: dict[str, Any] = {"prompt": None}
    for i, sign in enumerate(("", "negative_")):
        words[f"{sign}prompt_embeds"] = noise(1, 5, 16, seed=i)
        words[f"{sign}generated_prompt_embeds"] = noise(1, 4, 16, seed=2 + i)
        words[f"{sign}attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    config = transformers.GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=64, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    text = t5(made.tiny())
    parts = {**spectrograms(unet), **text, "text_encoder_2": text["text_encoder"], "language_model": model}
    return parts, heard(**words)


@family("AudioLDM", "MusicLDM")
def audio_ldm() -> Any:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=32, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=(8, 16),
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=16, class_embeddings_concat=True,
    )  # fmt: skip
    words = {"prompt_embeds": noise(1, 16, seed=1), "negative_prompt_embeds": noise(1, 16, seed=2), "prompt": None}
    clap = transformers.ClapTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16,
    )  # fmt: skip
    model = transformers.ClapTextModelWithProjection(clap).eval()
    return {**spectrograms(unet), "text_encoder": model}, heard(**words)


@family("StableAudio3")
def stable_audio3() -> Any:
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    model = diffusers.StableAudio3DiTModel(
        io_channels=8, patch_size=1, embed_dim=32, depth=1, num_heads=4, cond_token_dim=WIDTH, global_cond_dim=WIDTH,
        local_add_cond_dim=9, timestep_features_dim=16, ff_mult=2, num_memory_tokens=3,
        use_differential_attention=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderSAME(
        audio_channels=2, patch_size=2, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,),
        encoder_transformer_depths=(1,), latent_dim=8, use_differential_attention=False, dim_heads=4, ff_mult=2,
        sampling_rate=16,
    )  # fmt: skip
    scheduler = flow(shift=1.0, num_train_timesteps=1)
    parts = {"transformer": filled(model), "vae": vae.eval(), "scheduler": scheduler}
    parts |= {"duration_embedder": filled(StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16))}
    words = {f"{sign}encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool) for sign in ("", "negative_")}
    return {**parts, **t5(made.tiny())}, {**asked(), **embeds(), **words, "duration": 2.0}


@family("LongCatAudioDiT")
def longcat_audio() -> Any:
    model = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=1, dit_heads=4, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        in_channels=1, channels=16, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16,
        downsampling_ratio=2, sample_rate=240,
    )  # fmt: skip
    config = transformers.UMT5Config(d_model=WIDTH, num_layers=1, num_heads=4, d_ff=16, vocab_size=64, d_kv=8)
    parts = {"transformer": filled(model), "vae": vae.eval(), "scheduler": flow(shift=1.0, invert_sigmas=True)}
    parts |= {"text_encoder": transformers.UMT5EncoderModel(config).eval(), "tokenizer": made.tiny()._t5_tokenizer()}
    return parts, {**asked(), "audio_duration_s": 0.2}
