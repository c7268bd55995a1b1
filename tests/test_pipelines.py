"""Pipelines as denoisers: the same estimates and trajectories as the pipelines themselves, family by family.

Components are tiny and random, texts go through real encoders, nothing needs a network.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

import logsnr as ls
from logsnr.adapters import GradientEstimationScheduler
from logsnr.adapters.diffusers.pipelines import denoiser_from, networks
from logsnr.errors import LogsnrError
from logsnr.noise import alpha_s, flow_time

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from pipelining import NEGATIVE, PROMPT, STEPS, assert_close, ddim, dit, noise, plan_of, silent, unet  # noqa: E402
from scheduling import SD  # noqa: E402

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
        networks.places(3, 4, x), diffusers.FluxPipeline._prepare_latent_image_ids(1, 3, 4, "cpu", torch.float32)
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


@pytest.mark.parametrize(("family", "path"), [("stable_diffusion", "vp"), ("sd3", "flow")])
def test_a_gaussian_start_makes_a_pipelines_latents(tiny, family, path):
    """A plan that begins at sigma 6, in a pipeline from `start(noise, 6)`: what `sample(start=)` gives."""
    pipe = silent(getattr(tiny, family)())
    options = {"guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
    denoiser = denoiser_from(pipe, prompt=PROMPT, guidance=1.0)
    start = ls.GaussianStart.fit(0.8 * noise(40, 4, 8, 8, seed=3) + 0.3)
    plan = ls.solvers.ge(ls.grids.log_linear(4, 6.0, 0.1), 1.5)
    pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, plan=plan)
    z = noise(2, 4, 8, 8)
    latents = start(z, plan.sigmas[0], sigma_from=denoiser.sampling_range[1], path=path)
    theirs = pipe(PROMPT, num_images_per_prompt=2, num_inference_steps=4, latents=latents.clone(), **options).images
    assert_close(ls.sample(denoiser, plan, noise=z, start=start), theirs, 2e-5)
    assert float((ls.sample(denoiser, plan, noise=z) - theirs).abs().max()) > 1e-2


def test_a_plan_of_a_flow_is_told_from_one_of_a_table() -> None:
    """A flow's config does not say its prediction, nor has it betas; what a plan records of it does."""
    stock = {"flow": diffusers.FlowMatchEulerDiscreteScheduler(), "table": diffusers.DDIMScheduler(**SD)}
    denoiser = denoiser_from(diffusers.DDIMPipeline(unet=unet(), scheduler=stock["table"]))
    for theirs, other in (("flow", "table"), ("table", "flow")):
        denoiser.pipeline.scheduler = stock[theirs]
        plan = replace(ls.solvers.ddim((9.0, 5.0, 1.0, 0.0)), meta={"about": denoiser.about})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GradientEstimationScheduler.from_config(stock[theirs].config, plan=plan)
        with pytest.warns(UserWarning, match="calibrated on a pipeline with .*prediction_type '"):
            GradientEstimationScheduler.from_config(stock[other].config, plan=plan)
    denoiser.pipeline.scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0)
    assert denoiser.about["scheduler"]["snr_shift_scale"] == 3.0
