"""Pipelines as denoisers: images and latents, folders on disk, refusals, and networks that are no pipeline."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch

import logsnr as ls
from logsnr.adapters.diffusers.pipelines import PipelineDenoiser, denoiser_from, from_callable
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.noise import alpha_s
from logsnr.pixels import Pixels
from logsnr.predictions import Eps, Flow, V
from logsnr.timesteps import TimestepTable

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from pipelining import PROMPT, STEPS, assert_close, ddim, dit, noise, plan_of, silent, unet  # noqa: E402

# images


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "sd3", "flux"])
def test_codec_is_the_pipelines_vae_with_its_scaling(tiny, family):
    pipe = getattr(tiny, family)()
    if family == "sdxl":
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    denoiser = denoiser_from(pipe, prompt=PROMPT)
    images = noise(2, 3, 16, 16).clamp(-1, 1)
    config = pipe.vae.config
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
    shift, scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    x = denoiser.encode(images)
    if family == "sdxl":
        mean, std = (torch.tensor(v).reshape(1, 4, 1, 1) for v in (config.latents_mean, config.latents_std))
        want = (posterior.mode() - mean) * scale / std  # StableDiffusionXLImg2ImgPipeline
        latents = x * std / scale + mean
    else:
        want = (posterior.mode() - shift) * scale
        latents = x / scale + shift
    torch.testing.assert_close(x, want)
    with torch.no_grad():
        torch.testing.assert_close(denoiser.decode_float(x), pipe.vae.decode(latents).sample)
    drawn = denoiser.encode(images, generator=torch.Generator().manual_seed(0))
    again = denoiser.encode(images, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, x)
    grey = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(denoiser.encode(grey), denoiser.encode((grey.float() + 0.5) * (2 / 256) - 1))


def test_a_vae_without_a_posterior(tiny):
    """TAESD answers with latents: nothing to draw from."""
    pipe = tiny.stable_diffusion()
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pipe.register_modules(vae=diffusers.AutoencoderTiny(**channels, **blocks).eval())
    denoiser = denoiser_from(pipe, prompt=PROMPT)
    images = noise(1, 3, 16, 16).clamp(-1, 1)
    x = denoiser.encode(images, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(x, pipe.vae.encode(images).latents)
        assert torch.equal(denoiser.decode_float(x), pipe.vae.decode(x).sample)


def test_latents_are_as_small_as_the_vae_says(tiny):
    pipe = tiny.stable_diffusion()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    pipe.register_modules(
        vae=diffusers.AutoencoderKL(block_out_channels=(4, 4, 4), norm_num_groups=4, latent_channels=4, **blocks).eval()
    )
    denoiser = denoiser_from(pipe, prompt=PROMPT, size=(16, 32))
    assert denoiser.encode(noise(1, 3, 16, 32)).shape == (1, *denoiser.shape) == (1, 4, 4, 8)
    with pytest.raises(LogsnrError, match="multiples of 4 pixels"):
        denoiser_from(pipe, prompt=PROMPT, size=18)


def test_decoded_images_are_the_pipelines(tiny):
    pipe = silent(tiny.stable_diffusion())
    pipe.scheduler = ddim()
    latents = noise(1, 4, 8, 8)
    theirs = pipe(PROMPT, guidance_scale=1.0, num_inference_steps=STEPS, latents=latents, output_type="np").images
    denoiser = denoiser_from(pipe, prompt=PROMPT)
    ours = denoiser.decode_float(ls.sample(denoiser, plan_of(pipe, denoiser), noise=latents))
    assert_close((ours / 2 + 0.5).clamp(0, 1), torch.from_numpy(theirs).permute(0, 3, 1, 2), 2e-5)
    stored = denoiser.decode(ls.sample(denoiser, plan_of(pipe, denoiser), noise=latents))
    assert stored.dtype == torch.uint8
    bytes_ = (torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255).round()
    assert float((stored - bytes_).abs().max()) <= 1
    assert denoiser.pixels is None
    guided = ls.guidance.cfg(denoiser, 2.0, {})
    assert torch.equal(guided.decode(latents), denoiser.decode(latents))


def test_a_half_precision_vae_that_overflows_runs_in_float32(tiny, monkeypatch, caplog):
    pipe = tiny.stable_diffusion()
    images = noise(1, 3, 16, 16)
    pipe.vae.half()
    assert pipe.vae.config.force_upcast
    denoiser = denoiser_from(pipe, prompt=PROMPT)
    x = denoiser.encode(images)
    assert pipe.vae.dtype == torch.float16
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    assert denoiser.decode_float(x).dtype == torch.float32
    assert not [r for r in caplog.records if r.name.startswith("diffusers")]  # diffusers' own cast warns every time
    with torch.no_grad():
        want = pipe.vae.float().encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(x, want)


def test_pixel_models_denoise_the_images_themselves():
    denoiser = denoiser_from(diffusers.DDPMPipeline(unet(), ddim()))
    images = noise(1, 3, 8, 8)
    assert torch.equal(denoiser.encode(images), images)
    assert torch.equal(denoiser.decode_float(images), images)
    stored = torch.arange(192, dtype=torch.uint8).reshape(1, 3, 8, 8)
    assert torch.equal(denoiser.decode(denoiser.encode(stored)), stored)
    assert denoiser.pixels == Pixels(256)
    with pytest.raises(ValueError, match=r"images of shape \(1, 1, 8, 8\).*give \[B, 3, H, W\] in \[-1, 1\]"):
        denoiser.encode(images[:, :1])


# from disk


def test_a_folder_is_the_pipeline(tiny, tmp_path, monkeypatch):
    pipe = tiny.stable_diffusion(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "sd")
    denoiser = ls.load(tmp_path / "sd", prompt=PROMPT, guidance=2.0)
    assert isinstance(denoiser, PipelineDenoiser)
    assert denoiser.card == {
        "pipeline": "StableDiffusionPipeline",
        "network": "UNet2DConditionModel",
        "prediction": "v",
        "classes": 0,
        "null_class": None,
    }
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    z = noise(1, 4, 8, 8)
    want = denoiser_from(pipe, prompt=PROMPT, guidance=2.0)
    assert torch.equal(denoiser(z, 1.0).x0, want(z, 1.0).x0)
    to, moved = diffusers.DiffusionPipeline.to, []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda self, *where: moved.append(where) or to(self, *where))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # diffusers has renamed torch_dtype
        half = ls.load(str(tmp_path / "sd"), prompt=PROMPT, guidance=2.0, dtype=torch.bfloat16, device="cpu")
    assert moved == [(torch.device("cpu"),)]
    x0 = half(z, 1.0).x0
    assert x0.dtype == torch.float32
    assert_close(x0, want(z, 1.0).x0, 2e-2)
    # sampling goes on in float32, a plan at the resolution asked for
    wide = ls.load(tmp_path / "sd", prompt=PROMPT, size=(16, 32))
    plan = ls.solvers.ge(ls.grids.log_linear(4, *wide.sampling_range[::-1]))
    x = ls.sample(wide, plan, n=2, generator=torch.Generator().manual_seed(0))
    assert wide.decode(x).shape == (2, 3, 16, 32)


def test_a_pipeline_with_our_scheduler_still_says_what_its_model_is(tiny, tmp_path):
    from logsnr.adapters import GradientEstimationScheduler

    pipe = tiny.sd3()
    want = denoiser_from(pipe, prompt=PROMPT)
    pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, gamma=1.5)
    pipe.save_pretrained(tmp_path)
    z = noise(1, 4, 8, 8)
    assert torch.equal(ls.load(tmp_path, prompt=PROMPT)(z, 2.0).x0, want(z, 2.0).x0)


# refusals


@pytest.mark.parametrize("installed", [True, False])
def test_a_folder_that_cannot_be_loaded(tmp_path, monkeypatch, installed):
    """Without transformers diffusers fails in words that do not name it."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "X"]}')
    if not installed:
        monkeypatch.setattr("logsnr.adapters.diffusers.pipelines.denoiser.find_spec", lambda name: None)
    with pytest.raises(LogsnrError, match="cannot be loaded as a diffusers pipeline") as error:
        ls.load(tmp_path)
    assert ("pip install 'logsnr[diffusers]'" in str(error.value)) == (not installed)
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line(tiny, tmp_path):
    sd = tiny.stable_diffusion()
    classes = diffusers.DDPMPipeline(unet(num_class_embeds=5), ddim())
    bad = [
        (lambda: denoiser_from(sd, prompt=3), r"prompt 3: this model is told a text"),
        (lambda: denoiser_from(sd, prompt=[]), r"prompt \[\]: this model is told a text"),
        (lambda: denoiser_from(sd, prompt="x", guidance=math.nan), r"guidance = nan: must be finite; 1 is none"),
        (lambda: denoiser_from(sd, prompt="x", size=15), r"size = \(15, 15\): .* multiples of 2 pixels"),
        (lambda: denoiser_from(tiny.flux(), size=(16, 18)), r"size = \(16, 18\): .* multiples of 4 pixels"),
        (lambda: denoiser_from(sd, null_class=3), r"null_class = 3: only class-conditional"),
        (lambda: denoiser_from(classes, prompt=5), r"class 5: this model has classes 0 \.\.\. 4"),
        (lambda: denoiser_from(classes, prompt="cat"), r"prompt 'cat': this model is told a class: give a number"),
        (lambda: denoiser_from(classes, prompt=1, guidance=2.0), r"give null_class \(often the last, 4\)"),
        (lambda: denoiser_from(classes, null_class=9), r"null_class = 9: .* 0 \.\.\. 4"),
        (lambda: denoiser_from(classes)(noise(1, 3, 8, 8), 1.0), r"needs a class: load it with prompt=\.\.\."),
        (lambda: denoiser_from(dit(tiny), prompt="dog"), r"'dog': .* one of its 3 names \(pipeline.labels\)"),
        (lambda: denoiser_from(diffusers.DDPMPipeline(unet(), ddim()), prompt="x"), r"unconditional; leave prompt out"),
        (lambda: denoiser_from(diffusers.DDPMPipeline(unet(), ddim()), guidance=2.0), r"nothing to guide"),
        (lambda: denoiser_from(object()), r"object has neither a unet nor a transformer"),
    ]
    for call, words in bad:
        with pytest.raises(LogsnrError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_models_that_take_more_than_a_prompt_are_refused(tiny):
    pipe = tiny.stable_diffusion()
    torch.manual_seed(0)
    pipe.register_modules(unet=tiny._text_unet(cross_attention_dim=16, in_channels=9))
    with pytest.raises(LogsnrError, match=r"takes 9 channels and answers 4, for latents of 4: it also takes a mask"):
        denoiser_from(pipe)
    pipe.register_modules(unet=torch.nn.Linear(1, 1))
    with pytest.raises(LogsnrError, match=r"class Linear, which load does not know \(UNet2DModel, .*from_callable"):
        denoiser_from(pipe)


def test_an_epsilon_model_with_zero_terminal_snr_is_refused(tiny):
    pipe = tiny.stable_diffusion()
    pipe.scheduler = ddim("epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        denoiser_from(pipe, prompt=PROMPT)


# anything else


@pytest.mark.parametrize("kind", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_a_model_is_read_without_a_word_of_how_it_is_sampled(kind):
    """What a stock scheduler's steps draw is no matter of the denoiser."""
    config = {"_class_name": kind, "beta_schedule": "linear", "prediction_type": "epsilon"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_callable(lambda x, t: x, config, shape=(2,))
    assert model.trained_range == pytest.approx((0.0100, 157.4), rel=1e-3)


def test_from_callable_is_a_network_denoiser():
    """The meaning may be a Prediction of ours, or the config of a diffusers scheduler."""
    table = TimestepTable.stable_diffusion()
    calls = []

    def function(x, label, *, shift):
        calls.append(label)
        return 0.3 * x + shift

    ours = from_callable(function, V(label=table), shape=(2, 3))
    theirs = from_callable(function, ddim("v_prediction").config, shape=(2, 3))
    assert isinstance(ours, NetworkDenoiser)
    assert ours.trained_range == table.sigma_range
    z, shift = noise(4, 2, 3), torch.ones(4, 1, 1)
    sigma = table.sigma(500.0)
    alpha, s = alpha_s(sigma)
    assert_close(ours(z, sigma, shift=shift).x0, alpha * z - s * (0.3 * z + 1), 1e-6)
    assert_close(theirs(z, sigma, shift=shift).x0, alpha * z - s * (0.3 * z + 1), 1e-6)
    assert calls[0].tolist() == [500.0] * 4
    assert from_callable(torch.nn.Identity(), Flow(), shape=(2,)).trained_range == (0.002, 157.0)
    assert from_callable(function, Eps(label="ddpm"), shape=(2,), trained_range=(0.1, 5)).trained_range == (0.1, 5)
    assert from_callable(function, ddim().config, shape=(2,), trained_range=(0.1, 5)).trained_range == (0.1, 5)
    with pytest.raises(ValueError, match=r"int is no function: give function\(x, label"):
        from_callable(3, V(), shape=(2,))


def test_from_callable_feeds_a_network_of_flow_sigmas_with_the_flows_state():
    """An epsilon network on a flow path (`use_flow_sigmas`): the state is (1 - t) x + t eps, the label 1000 t."""
    stock = diffusers.UniPCMultistepScheduler(prediction_type="epsilon", use_flow_sigmas=True)
    calls = []
    denoiser = from_callable(lambda x, label: calls.append((x, label)) or x, stock.config, shape=(2, 3))
    z, (alpha, s) = noise(4, 2, 3), alpha_s(3.0)
    estimate = denoiser(z, 3.0)
    assert_close(estimate.eps, z / (alpha + s), 1e-6)
    assert_close(calls[0][0], z / (alpha + s), 1e-6)
    assert calls[0][1].tolist() == [750.0] * 4
