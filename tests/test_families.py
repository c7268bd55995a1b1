"""One pipeline of each kind of family; all of them are in families_checks.py.  And what `load` refuses."""

from __future__ import annotations

import pytest

from logsnr.adapters.diffusers.pipelines import denoiser_from
from logsnr.errors import LogsnrError

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from families import embedded
from families_checks import (  # noqa: F401
    made,
    test_guided_latents_are_the_pipelines,
    test_images_are_the_pipelines,
    test_latents_are_the_pipelines,
)
from pipelining import noise

KINDS = ("pixart-alpha", "cogview4", "z-image", "qwen-image", "flux2-klein", "wan-2.2", "cogvideox")
"""A size and a variance; labels before a shift; lists and a sign; norms; patches; two experts; frames first."""


@pytest.fixture(params=KINDS)
def case(request, tiny):
    return made(request.param, tiny)


def test_videos_and_embeddings_are_checked(tiny):
    wan, image = made("wan", tiny).pipe, made("pixart-sigma", tiny).pipe
    bad = [
        (lambda: denoiser_from(wan, frames=4, size=16), r"frames = 4: give 1 more than a multiple of 2"),
        (lambda: denoiser_from(wan, frames=5, size=18), r"size = \(18, 18\): .* multiples of 4 pixels"),
        (lambda: denoiser_from(image, frames=5), r"frames = 5: PixArtSigmaPipeline makes images; leave it out"),
        (lambda: denoiser_from(made("z-image", tiny).pipe, prompt=["a", 3]), r"this model is told a text"),
        (
            lambda: denoiser_from(wan, prompt={"prompt_embed": noise(1, 3, 32)}),
            r"prompt has 'prompt_embed': WanPipeline encodes a text, or prompt_embeds, negative_prompt_embeds",
        ),
    ]
    for call, words in bad:
        with pytest.raises(LogsnrError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"videos of shape \(1, 3, 16, 16\).*give \[B, 3, F, H, W\]"):
        denoiser_from(wan, frames=5, size=16).encode(noise(1, 3, 16, 16))


def test_a_pipelines_own_sizes(tiny):
    """Left out, a size is what the pipeline's call has by default."""
    assert denoiser_from(made("wan", tiny).pipe).shape == (4, 41, 240, 416)
    assert denoiser_from(made("cogvideox", tiny).pipe).shape == (3, 4, 8, 16)
    assert denoiser_from(made("z-image", tiny).pipe).shape == (4, 512, 512)
    assert denoiser_from(made("flux2", tiny).pipe).shape == (16, 64, 64)
    assert denoiser_from(made("aura-flow", tiny).pipe).shape == (4, 8, 8)


def test_a_pipeline_told_an_image_is_refused(tiny):
    case = made("qwen-image", tiny)
    pipe = case.pipe

    def encode_prompt(prompt, image=None):
        raise AssertionError

    pipe.encode_prompt = encode_prompt
    with pytest.raises(LogsnrError, match="makes its conditions of an image as well as a text"):
        denoiser_from(pipe, prompt=embedded(3, 2)["prompt"])
