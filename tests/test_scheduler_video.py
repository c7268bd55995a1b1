"""A whole video pipeline (5-D states), and pipelines that keep their generator to themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import logsnr as ls
from logsnr.adapters import GradientEstimationScheduler, from_callable

diffusers = pytest.importorskip("diffusers", minversion="0.37")

STEPS = 5
TEXT = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wan():
    """Wan (text to video) on random components: 2 latent frames of 4 x 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.WanTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=8,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=16,
        ).eval()
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    stock = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=stock, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe, seed: int = 0) -> Tensor:
    size = {"height": 32, "width": 32, "num_frames": 5}
    return pipe(
        prompt_embeds=TEXT,
        guidance_scale=1.0,
        num_inference_steps=STEPS,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **size,
    ).frames


@pytest.mark.parametrize("gamma", [1.0, 2.0, [1.5, 2.0, 1.2]])
def test_a_video_pipeline_does_what_sample_does(wan, gamma):
    config = wan.scheduler.config
    wan.scheduler = GradientEstimationScheduler.from_config(config, gamma=gamma)
    found = video(wan)
    assert found.shape == (1, 4, 2, 4, 4)

    def network(x: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            return wan.transformer(x, label, TEXT.expand(len(x), -1, -1), return_dict=False)[0]

    denoiser = from_callable(network, config, shape=(4, 2, 4, 4))
    assert isinstance(denoiser.prediction, ls.predictions.Flow)
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = ls.sample(denoiser, wan.scheduler.plan, noise=noise)
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert error <= 1e-5
    assert wan.scheduler.plan.sigmas == pytest.approx(ls.grids.flow(STEPS, 3.0))


def test_noise_of_a_pipeline_that_keeps_its_generator_is_torchs_own(wan):
    """Wan, SD3 and Flux call step without their generator: mu > 0 draws from torch's global one, seeded by the user."""
    wan.scheduler = GradientEstimationScheduler.from_config(wan.scheduler.config, gamma=2.0, mu=0.4)
    runs = []
    with torch.random.fork_rng(devices=[]):
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            runs.append(video(wan))
    assert torch.equal(runs[0], runs[1])
    assert float((runs[0] - runs[2]).abs().max()) > 1e-3
