"""Pipelines as denoisers: the same estimates, trajectories and images as the pipelines themselves, family by family.

Components are tiny and random, texts go through real encoders, nothing needs a network.
"""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import logsnr as ls
from logsnr.adapters import networks
from logsnr.adapters.pipelines import PipelineDenoiser, denoiser_from, from_callable
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.noise import alpha_s, flow_time, sigma_from_flow_time
from logsnr.prediction import Eps, Flow, V
from logsnr.timesteps import TimestepTable

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS = 5  # divides 1000: otherwise DDIMScheduler steps to other timesteps than those it visits
SD_TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPT, NEGATIVE = "a red fox", "blurry"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import tiny

    return tiny


def ddim(prediction_type: str = "epsilon", **config):
    options = {**SD_TABLE, "clip_sample": False, "timestep_spacing": "trailing", **config}
    return diffusers.DDIMScheduler(prediction_type=prediction_type, **options)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(seed: int = 0, **config):
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"in_channels": 3, "out_channels": 3, **config},
    ).eval()


def dit(tiny, learned_variance: bool = True, seed: int = 0, **scheduler):
    torch.manual_seed(seed)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if learned_variance else 4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    with torch.no_grad():  # zero at the start otherwise
        transformer.proj_out_2.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    names = {1: "goldfish", 2: "great white shark, white shark"}
    return diffusers.DiTPipeline(transformer.eval(), tiny.vae(), ddim(**scheduler), id2label=names)


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_of(pipe, denoiser: PipelineDenoiser) -> ls.Plan:
    """DDIM on the levels that the pipeline's scheduler has just visited."""
    if isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return ls.solvers.ddim([sigma_from_flow_time(t) for t in pipe.scheduler.sigmas.tolist()])
    table = denoiser.prediction.label
    assert isinstance(table, TimestepTable)
    return ls.solvers.ddim([*(table.sigma(float(t)) for t in pipe.scheduler.timesteps), 0.0])


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert float(b.square().mean()) > 0
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
    assert error <= tolerance, f"{error:.2e}"


# estimates


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("epsilon", {}),
        ("v_prediction", {}),
        ("sample", {}),
        ("v_prediction", {"rescale_betas_zero_snr": True}),
        ("epsilon", {"trained_betas": torch.linspace(1e-3, 0.03, 1000).tolist()}),
        ("epsilon", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_estimates_are_those_of_the_schedulers_step(tiny, kind, config):
    """x0 is `pred_original_sample` of a DDIM step on the pipeline's own network output; eps is what that leaves."""
    scheduler = ddim(kind, **config)
    pipe = tiny.stable_diffusion()
    pipe.scheduler = scheduler
    pipe.unet.train()
    pipe.vae.train()
    denoiser = denoiser_from(pipe, prompt=PROMPT)
    assert (pipe.unet.training, pipe.vae.training) == (False, False)
    embeds = pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0]
    z = noise(2, 4, 8, 8)
    table = denoiser.prediction.label
    torch.testing.assert_close(table.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-6, atol=0)
    assert denoiser.trained_range == table.sigma_range
    scheduler.set_timesteps(1000)
    for t in (999, 750, 400, 20):
        with torch.no_grad():
            out = pipe.unet(z, t, encoder_hidden_states=embeds.expand(2, -1, -1)).sample
            estimate = denoiser(z, table.sigma(float(t)))
        x0 = scheduler.step(out, t, z).pred_original_sample
        assert_close(estimate.x0, x0, 1e-5)
        abar = scheduler.alphas_cumprod.double()[t]
        assert_close(estimate.eps, ((z - abar.sqrt() * x0.double()) / (1 - abar).sqrt()).float(), 1e-5)


def test_estimates_of_a_flow(tiny):
    """At time t the pipeline's state is (1 - t) x + t eps and its label 1000 t, whatever the shift."""
    pipe = tiny.sd3()
    denoiser = denoiser_from(pipe, prompt=PROMPT)
    assert denoiser.finite_at_inf
    assert denoiser.trained_range == (0, math.inf)
    states, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    x = noise(1, 4, 8, 8)
    for sigma in (math.inf, 3.0, 0.2):
        t, (alpha, s) = flow_time(sigma), alpha_s(sigma)
        with torch.no_grad():
            label = torch.tensor([1000 * t])
            v = pipe.transformer(x, states, pooled, label).sample
            estimate = denoiser(x * (alpha + s), sigma)
        assert_close(estimate.x0, x - t * v, 1e-5)
        assert_close(estimate.eps, x + (1 - t) * v, 1e-5)
        assert_close(estimate.velocity, v, 1e-5)


# trajectories


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_stable_diffusion(tiny, kind, guidance):
    pipe = silent(tiny.stable_diffusion())
    pipe.scheduler = ddim(kind)
    latents = noise(2, 4, 8, 8)
    denoiser = denoiser_from(pipe, prompt=PROMPT, negative_prompt=NEGATIVE, guidance=guidance)
    assert denoiser.shape == (4, 8, 8)
    assert denoiser.cost(1.0) == (1 if guidance == 1 else 2)
    theirs = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_images_per_prompt=2,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        latents=latents,
        output_type="latent",
    ).images
    assert_close(ls.sample(denoiser, plan_of(pipe, denoiser), noise=latents), theirs, 2e-5)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sdxl(tiny, guidance, negative):
    """Pooled texts and time ids (height before width) are conditions; without a negative prompt, the null is zeros."""
    pipe = silent(tiny.sdxl())
    pipe.scheduler = ddim()
    latents = noise(1, 4, 12, 8)
    denoiser = denoiser_from(pipe, prompt=PROMPT, negative_prompt=negative, guidance=guidance, size=(24, 16))
    assert denoiser.cond["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]]
    if guidance != 1 and negative is None:
        assert not denoiser.null["encoder_hidden_states"].any()
    theirs = pipe(
        PROMPT,
        negative_prompt=negative,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        height=24,
        width=16,
        latents=latents,
        output_type="latent",
    ).images
    assert_close(ls.sample(denoiser, plan_of(pipe, denoiser), noise=latents), theirs, 2e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("learned_variance", [True, False])
def test_dit(tiny, monkeypatch, guidance, learned_variance):
    pipe = silent(dit(tiny, learned_variance))
    seen = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, *args, **kw: seen.append(z.clone()) or decode(z, *args, **kw))
    pipe([1, 2], guidance_scale=guidance, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    denoiser = denoiser_from(pipe, prompt=["goldfish", "white shark"], guidance=guidance)
    assert torch.equal(denoiser.cond["class_labels"], torch.tensor([1, 2]))
    ours = ls.sample(denoiser, plan_of(pipe, denoiser), noise=noise(2, 4, 8, 8))
    assert_close(ours, seen[0] * pipe.vae.config.scaling_factor, 2e-5)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sd3(tiny, guidance):
    pipe = silent(tiny.sd3())
    latents = noise(1, 4, 8, 8)
    denoiser = denoiser_from(pipe, prompt=PROMPT, negative_prompt=NEGATIVE, guidance=guidance)
    theirs = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        height=16,
        width=16,
        latents=latents,
        output_type="latent",
    ).images
    assert_close(ls.sample(denoiser, plan_of(pipe, denoiser), noise=latents), theirs, 2e-5)


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_flux(tiny, embedded, true_cfg):
    """The denoiser's latents have a height and a width (here not the same); Flux holds them as tokens.

    A guidance-distilled network is told the scale; guidance in two evaluations comes on top, by `guidance.cfg`.
    """
    pipe = silent(tiny.flux(guidance_embeds=embedded))
    latents = noise(1, 4, 12, 8)
    height, width = 24, 16
    scale = 3.5 if embedded else true_cfg
    negative = NEGATIVE if true_cfg != 1 else None
    denoiser = denoiser_from(pipe, prompt=PROMPT, negative_prompt=negative, guidance=scale, size=(height, width))
    assert denoiser.shape == (4, 12, 8)
    assert denoiser.cost(1.0) == (2 if not embedded and true_cfg != 1 else 1)
    guided = ls.guidance.cfg(denoiser, true_cfg, denoiser.null) if embedded and true_cfg != 1 else denoiser
    theirs = pipe(
        PROMPT,
        negative_prompt=negative,
        true_cfg_scale=true_cfg,
        guidance_scale=3.5,
        num_inference_steps=STEPS,
        height=height,
        width=width,
        latents=networks.pack(latents),
        output_type="latent",
    ).images
    ours = ls.sample(guided, plan_of(pipe, denoiser), noise=latents)
    assert_close(networks.pack(ours), theirs, 2e-5)


def test_flux_tokens_are_the_pipelines_own(tiny):
    x = noise(2, 4, 6, 8)
    tokens = diffusers.FluxPipeline._pack_latents(x, 2, 4, 6, 8)
    assert torch.equal(networks.pack(x), tokens)
    assert torch.equal(networks.unpack(tokens, 6, 8), x)
    assert torch.equal(
        networks._places(3, 4, x), diffusers.FluxPipeline._prepare_latent_image_ids(1, 3, 4, "cpu", torch.float32)
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("channels", [3, 6])
def test_unconditional_pixels(kind, channels):
    """DDPMPipeline and DDIMPipeline; six channels are three and a learned variance, which samplers here drop."""
    scheduler = ddim(kind, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", steps_offset=0)
    pipe = silent(diffusers.DDPMPipeline(unet(out_channels=channels), scheduler))
    denoiser = denoiser_from(pipe)
    assert denoiser.sigma_data == 0.5
    assert denoiser.trained_range == pytest.approx((0.0100, 157.4), rel=1e-3)
    if channels == 6:
        whole = pipe.unet
        pipe.register_modules(unet=_Mean(whole))
    theirs = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np").images
    ours = ls.sample(denoiser, plan_of(pipe, denoiser), noise=noise(2, 3, 8, 8))
    assert_close((ours / 2 + 0.5).clamp(0, 1), torch.from_numpy(theirs).permute(0, 3, 1, 2), 2e-5)


class _Mean(torch.nn.Module):
    """A UNet without the variance half of its answer."""

    def __init__(self, whole):
        super().__init__()
        self.whole, self.config = whole, whole.config
        self.dtype, self.device = whole.dtype, whole.device

    def forward(self, x, t):
        out = self.whole(x, t)
        out.sample = out.sample[:, :3]
        return out


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_class_conditional_pixels(guidance):
    scheduler = ddim(beta_schedule="linear")
    pipe = diffusers.DDPMPipeline(unet(num_class_embeds=5), scheduler)
    denoiser = denoiser_from(pipe, prompt=[3, 0], guidance=guidance, null_class=4)
    assert denoiser.card["classes"] == 5
    x = start = noise(2, 3, 8, 8)
    scheduler.set_timesteps(STEPS)
    labels, null = torch.tensor([3, 0]), torch.tensor([4, 4])
    with torch.no_grad():
        for t in scheduler.timesteps:
            out, without = (pipe.unet(x, t, class_labels=c).sample for c in (labels, null))
            x = scheduler.step(without + guidance * (out - without), t, x).prev_sample
    assert_close(ls.sample(denoiser, plan_of(pipe, denoiser), noise=start), x, 2e-5)


# conditions


def test_conditions_by_keyword_replace_the_prompts(tiny):
    pipe = tiny.stable_diffusion()
    asked = denoiser_from(pipe, prompt=["a dog", "a cat"], guidance=3.0)
    other = denoiser_from(pipe, prompt="something else", guidance=3.0)
    bare = denoiser_from(pipe)
    z = noise(2, 4, 8, 8)
    want = asked(z, 1.0).x0
    assert_close(other(z, 1.0, **other.conditions(["a dog", "a cat"])).x0, want, 1e-6)
    assert not torch.allclose(other(z, 1.0).x0, want)
    with pytest.raises(LogsnrError, match=r"needs a prompt: load it with prompt=\.\.\., or pass encoder_hidden_states"):
        bare(z, 1.0)
    plain = denoiser_from(pipe, prompt=["a dog", "a cat"])
    assert_close(bare(z, 1.0, **bare.conditions(["a dog", "a cat"])).x0, plain(z, 1.0).x0, 1e-6)
    with pytest.raises(LogsnrError, match="2 prompts for a batch of 3: give one prompt, or one per sample"):
        asked(noise(3, 4, 8, 8), 1.0)


def test_guidance_with_an_interval_is_composed(tiny):
    """The null condition is at hand, so any guidance of ours goes around the plain denoiser."""
    pipe = tiny.stable_diffusion()
    whole = denoiser_from(pipe, prompt=PROMPT, negative_prompt="", guidance=4.0)
    plain = denoiser_from(pipe, prompt=PROMPT, negative_prompt="")
    z = noise(1, 4, 8, 8)
    composed = ls.guidance.cfg(plain, 4.0, plain.null, interval=(0.5, 2.0))
    assert_close(composed(z, 1.0).x0, whole(z, 1.0).x0, 1e-5)
    assert torch.equal(composed(z, 4.0).x0, plain(z, 4.0).x0)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_scale_of_one_or_less_is_no_guidance_as_in_diffusers(tiny, scale):
    """SDXL Turbo is called with guidance_scale=0, which is not the model without its prompt."""
    pipe = silent(tiny.stable_diffusion())
    pipe.scheduler = ddim()
    latents = noise(1, 4, 8, 8)
    denoiser = denoiser_from(pipe, prompt=PROMPT, guidance=scale)
    assert denoiser.cost(1.0) == 1
    call = {"num_inference_steps": STEPS, "latents": latents, "output_type": "latent"}
    theirs = pipe(PROMPT, guidance_scale=scale, **call).images
    assert_close(ls.sample(denoiser, plan_of(pipe, denoiser), noise=latents), theirs, 2e-5)
    assert torch.equal(denoiser(latents, 1.0).x0, denoiser_from(pipe, prompt=PROMPT)(latents, 1.0).x0)


def test_a_network_that_is_told_its_scale_has_the_pipelines_default(tiny):
    """Flux dev without guidance is the pipeline called without guidance_scale, not at scale 1."""
    pipe = silent(tiny.flux())
    latents = noise(1, 4, 8, 8)
    call = {"num_inference_steps": STEPS, "latents": networks.pack(latents), "output_type": "latent"}
    theirs = pipe(PROMPT, height=16, width=16, **call).images
    denoiser = denoiser_from(pipe, prompt=PROMPT, size=16)
    assert denoiser.guidance == 3.5
    ours = networks.pack(ls.sample(denoiser, plan_of(pipe, denoiser), noise=latents))
    assert_close(ours, theirs, 2e-5)
    one = denoiser_from(pipe, prompt=PROMPT, size=16, guidance=1.0)
    with pytest.raises(AssertionError, match="e-0"):
        assert_close(networks.pack(ls.sample(one, plan_of(pipe, one), noise=latents)), theirs, 2e-5)


def test_losses_of_an_unguided_pipeline_go_through_f_targets(tiny):
    denoiser = denoiser_from(tiny.stable_diffusion(), prompt=PROMPT)
    x, eps = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    sigma = torch.tensor([0.1, 5.0])
    cond = {key: value.expand(2, *value.shape[1:]) for key, value in denoiser.cond.items()}
    assert torch.equal(denoiser.eps_error(x, eps, sigma), denoiser.plain.eps_error(x, eps, sigma, **cond))
    guided = denoiser_from(denoiser.pipeline, prompt=PROMPT, guidance=2.0)
    assert guided.eps_error(x, eps, 1.0).shape == (2,)


def test_a_guidance_embedding_of_a_text_unet(tiny):
    """LCM-like networks are told the scale: one evaluation, another answer."""
    pipe = tiny.stable_diffusion()
    torch.manual_seed(1)
    pipe.register_modules(unet=tiny._text_unet(cross_attention_dim=16, time_cond_proj_dim=8))
    pipe.scheduler = ddim()
    low, high = (denoiser_from(pipe, prompt=PROMPT, guidance=g) for g in (2.0, 8.0))
    latents = noise(1, 4, 8, 8)
    silent(pipe)
    theirs = pipe(PROMPT, guidance_scale=8.0, num_inference_steps=STEPS, latents=latents, output_type="latent").images
    assert_close(ls.sample(high, plan_of(pipe, high), noise=latents), theirs, 2e-5)
    assert high.cost(1.0) == 1
    assert not torch.equal(low(latents, 1.0).x0, high(latents, 1.0).x0)


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
        torch.testing.assert_close(denoiser.decode(x), pipe.vae.decode(latents).sample)
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
        assert torch.equal(denoiser.decode(x), pipe.vae.decode(x).sample)


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
    ours = denoiser.decode(ls.sample(denoiser, plan_of(pipe, denoiser), noise=latents))
    assert_close((ours / 2 + 0.5).clamp(0, 1), torch.from_numpy(theirs).permute(0, 3, 1, 2), 2e-5)


def test_a_half_precision_vae_that_overflows_runs_in_float32(tiny, monkeypatch, caplog):
    pipe = tiny.stable_diffusion()
    images = noise(1, 3, 16, 16)
    pipe.vae.half()
    assert pipe.vae.config.force_upcast
    denoiser = denoiser_from(pipe, prompt=PROMPT)
    x = denoiser.encode(images)
    assert pipe.vae.dtype == torch.float16
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    assert denoiser.decode(x).dtype == torch.float32
    assert not [r for r in caplog.records if r.name.startswith("diffusers")]  # diffusers' own cast warns every time
    with torch.no_grad():
        want = pipe.vae.float().encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(x, want)


def test_pixel_models_denoise_the_images_themselves():
    denoiser = denoiser_from(diffusers.DDPMPipeline(unet(), ddim()))
    images = noise(1, 3, 8, 8)
    assert torch.equal(denoiser.encode(images), images)
    assert torch.equal(denoiser.decode(images), images)
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
    assert moved == [("cpu",)]
    x0 = half(z, 1.0).x0
    assert x0.dtype == torch.float32
    assert_close(x0, want(z, 1.0).x0, 2e-2)
    # sampling goes on in float32, a plan at the resolution asked for
    wide = ls.load(tmp_path / "sd", prompt=PROMPT, size=(16, 32))
    plan = ls.solvers.ge(ls.grids.log_linear(4, *wide.sampling_range[::-1]))
    x = ls.sample(wide, plan, batch=2, generator=torch.Generator().manual_seed(0))
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
        monkeypatch.setattr("logsnr.adapters.pipelines.find_spec", lambda name: None)
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
