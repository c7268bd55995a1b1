"""Families of pipelines: the denoiser in each makes the pipeline's latents, and its codec the pipeline's images.

Components are tiny and random, nothing needs a network.  All of them: `pytest tests/families_checks.py`; `make test`
has one of each kind (test_families.py).
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import logsnr as ls
from logsnr.adapters.diffusers.pipelines import denoiser_from

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from families import CASES, Case  # noqa: E402
from pipelining import STEPS, assert_close, noise, plan_of, silent  # noqa: E402

SCALE, TOLD = 3.0, 7.0


def made(name: str, tiny) -> Case:
    torch.manual_seed(0)
    out = CASES[name](tiny)
    silent(out.pipe)
    return out


@pytest.fixture(params=CASES)
def case(request, tiny):
    return made(request.param, tiny)


def theirs(case: Case, latents: Tensor, *, scale: float | None = None, **call):
    """What the pipeline makes of latents; guided if there is a scale."""
    given = {**case.prompt} if isinstance(case.prompt, dict) else {"prompt": case.prompt}
    if case.scale_name is not None:
        given[case.scale_name] = case.none if scale is None else scale
    if scale is not None and isinstance(case.negative, dict):
        given |= {f"negative_{name}": value for name, value in case.negative.items()}
    elif scale is not None:
        given["negative_prompt"] = case.negative
    call = {"output_type": "latent", "num_inference_steps": STEPS, **case.asked, **given, **call}
    return case.pipe(latents=case.theirs(latents.clone()), return_dict=False, **call)[0]


def test_latents_are_the_pipelines(case):
    """Euler or DDIM on the stock scheduler's own levels, without guidance; a scale that a network is told is passed."""
    told = {"guidance_scale": TOLD} if case.told else {}
    denoiser = denoiser_from(case.pipe, prompt=case.prompt, guidance=TOLD if told else None, **case.options)
    assert denoiser.shape == case.shape
    assert denoiser.cost(1.0) == 1
    latents = noise(len(denoiser.cond["encoder_hidden_states"]), *case.shape)
    want = case.ours(theirs(case, latents, **told))
    assert_close(ls.sample(denoiser, plan_of(case.pipe, denoiser), noise=latents), want, 2e-6)
    if told:
        default = case.ours(theirs(case, latents))
        own = denoiser_from(case.pipe, prompt=case.prompt, **case.options)
        assert_close(ls.sample(own, plan_of(case.pipe, own), noise=latents), default, 2e-6)
        assert not torch.equal(default, want)


def test_guided_latents_are_the_pipelines(case):
    """Guidance as each pipeline has it: Z-Image adds to the condition, Qwen-Image and Lumina 2 keep norms."""
    if case.scale_name is None:
        pytest.skip("the network is told its scale")
    scale = None if case.told else SCALE
    denoiser = denoiser_from(
        case.pipe, prompt=case.prompt, negative_prompt=case.negative, guidance=scale, **case.options
    )
    guided = ls.guidance.cfg(denoiser, SCALE, denoiser.null) if case.told else denoiser
    assert guided.cost(1.0) == 2
    latents = noise(len(denoiser.cond["encoder_hidden_states"]), *case.shape)
    want = case.ours(theirs(case, latents, scale=SCALE))
    got = ls.sample(guided, plan_of(case.pipe, denoiser), noise=latents)
    assert_close(got, want, 2e-6)


def test_images_are_the_pipelines(case):
    """`decode_float` is the pipeline's last step, and `encode` answers with latents of the denoiser's shape."""
    denoiser = denoiser_from(case.pipe, prompt=case.prompt, **case.options)
    latents = noise(len(denoiser.cond["encoder_hidden_states"]), *case.shape)
    want = torch.as_tensor(theirs(case, latents, output_type="pt"))
    x = ls.sample(denoiser, plan_of(case.pipe, denoiser), noise=latents)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of attributes of a VAE that moved to its config
        got = denoiser.decode_float(x)
    assert got.shape[1:] == case.images
    got = (got / 2 + 0.5).clamp(0, 1)
    assert_close(got if got.ndim == 4 else got.transpose(1, 2), want, 1e-4)
    codec = denoiser._latents
    assert_close(codec._scaled(codec._unscaled(codec._scaled(latents))), codec._scaled(latents), 1e-5)
    images = noise(1, *case.images, seed=3).clamp(-1, 1)
    x = denoiser.encode(images)
    assert x.shape == (1, *case.shape)
    grey = ((images / 2 + 0.5) * 255).round().to(torch.uint8)
    assert_close(denoiser.encode(grey), denoiser.encode((grey.float() + 0.5) * (2 / 256) - 1), 1e-6)
