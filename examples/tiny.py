"""Tiny random pipelines, built on the spot: the examples run on them with --tiny, offline and in seconds.

Their pictures mean nothing.  Everything else is real: text encoders, VAE, guidance, schedulers.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def options(what: str, out: str) -> argparse.Namespace:
    """The command line that all examples share."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--tiny", action="store_true", help="a tiny random pipeline instead of the real one")
    parser.add_argument("--out", default=out, help="the picture")
    return parser.parse_args()


def training_options(what: str, steps: int) -> argparse.Namespace:
    """The command line that the training examples share."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--tiny", action="store_true", help="a tiny network on drawn pictures instead of real ones")
    parser.add_argument("--data", help="pictures: an .npy file of uint8 [N, height, width, 3]")
    parser.add_argument("--steps", type=int, default=steps)
    return parser.parse_args()


def pictures(path: str | None, count: int = 256, size: int = 8) -> torch.Tensor:
    """Pictures in [-1, 1], `[N, 3, height, width]`: a file's, or disks of random place and colour."""
    if path is not None:
        import numpy as np

        return torch.from_numpy(np.load(path)).permute(0, 3, 1, 2).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    x, y, radius = (torch.rand(3, count, 1, 1, generator=generator) * size).unbind()
    grid = torch.arange(size) + 0.5
    inside = (grid - x).square() + (grid[:, None] - y).square() < (1 + radius / 3).square()
    colour = 2 * torch.rand(count, 3, 1, 1, generator=generator) - 1
    return torch.where(inside[:, None], colour, torch.full_like(colour, -0.8))


def stable_diffusion(**scheduler: Any) -> Any:
    """`StableDiffusionPipeline`, 16 x 16 pixels."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=_clip(16),
        tokenizer=tokenizer(),
        unet=_text_unet(cross_attention_dim=16),
        scheduler=diffusers.PNDMScheduler(**{**STABLE_DIFFUSION, "skip_prk_steps": True, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(**scheduler: Any) -> Any:
    """`StableDiffusionXLPipeline`, 16 x 16 pixels."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=_clip(16),
        text_encoder_2=_clip(16, projection=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=_text_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**{**STABLE_DIFFUSION, **scheduler}),
    )


def sd3(**scheduler: Any) -> Any:
    """`StableDiffusion3Pipeline`, 16 x 16 pixels."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(shift_factor=0.06),
        text_encoder=_clip(16, projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=_clip(16, projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
    )


def flux(guidance_embeds: bool = True, **scheduler: Any) -> Any:
    """`FluxPipeline`; 16 x 16 pixels, which have to be asked for."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}
        ),
        vae=vae(shift_factor=0.1),
        text_encoder=_clip(16),
        tokenizer=tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )


STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def vae(**config: Any) -> Any:
    """An autoencoder of 4 channels, half the image's size."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **{"scaling_factor": 0.18215, **config},
    ).eval()


def _text_unet(**config: Any) -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    ).eval()


def _clip(width: int, projection: bool = False) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def _t5() -> Any:
    import transformers

    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, relative_attention_num_buckets=8
    )
    return transformers.T5EncoderModel(config).eval()


def tokenizer() -> Any:
    """CLIP's tokenizer without merges: 256 bytes, twice, and two marks."""
    import transformers

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5_tokenizer() -> Any:
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in "▁" + LETTERS)]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)
