"""k-diffusion's conventions: our sampler on its models, its samplers on our models.

The samplers of that library that serve as the reference are written out here.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import logsnr as ls
from logsnr.adapters.kdiffusion import as_kdiffusion, sample_gradient_estimation
from logsnr.denoiser import NetworkDenoiser
from logsnr.noise import flow_time
from logsnr.predictions import EDM, Eps, Flow, V
from logsnr.timesteps import TimestepTable

SHAPE = (2, 4, 4)
SD = TimestepTable.stable_diffusion()


class Network(nn.Module):
    """A small random network that knows its timestep, with an optional condition."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        d = math.prod(SHAPE)
        self.a = nn.Parameter(torch.randn(d, d + 1, generator=generator) / math.sqrt(d))

    def forward(self, x: Tensor, label: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        seen = torch.cat([x.flatten(1), (label / 300).sin().reshape(-1, 1).expand(len(x), 1)], 1)
        return 0.4 * x + 0.7 * torch.tanh(seen @ self.a.T).view_as(x) + shift


def model(prediction=None) -> NetworkDenoiser:
    return NetworkDenoiser(
        Network(), prediction or Eps(label=SD), shape=SHAPE, trained_range=(0.0, math.inf)
    ).requires_grad_(False)


def noise(seed: int = 0, batch: int = 3) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
    assert error <= tolerance, f"{error:.2e}"


GRIDS = {
    "ve": [14.6, 7.0, 3.5, 1.4, 0.5, 0.1, 0.0],
    "stops": [14.6, 7.0, 3.5, 1.4, 0.5, 0.1],
    "flow": [1.0, 0.9, 0.7, 0.4, 0.2, 0.05, 0.0],
}


# the library's samplers, as they are there


@torch.no_grad()
def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        d = (x - denoised) / sigmas[i]
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])
    old_denoised = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        if old_denoised is None or sigmas[i + 1] == 0:
            x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * denoised
        else:
            r = (t + sigmas[i - 1].log()) / h
            denoised_d = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old_denoised
            x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * denoised_d
        old_denoised = denoised
    return x


@torch.no_grad()
def comfy_gradient_estimation(model, x, sigmas, extra_args=None, callback=None, disable=None, ge_gamma=2.0):
    """ComfyUI's sampler (its issue 6554, with the plain last step of 8780)."""
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])
    old_d = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        d = (x - denoised) / sigmas[i]
        dt = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            x = x + d * dt
            if i >= 1:
                x = x + (ge_gamma - 1) * (d - old_d) * dt
        old_d = d
    return x


@torch.no_grad()
def comfy_cfg_pp(model, x, sigmas, extra_args, ge_gamma=None):
    """ComfyUI's Euler (gamma None) and gradient estimation with CFG++: d is of what a post-cfg function is told."""
    told = {}

    def post_cfg_function(args):
        told["uncond"] = args["uncond_denoised"]
        return args["denoised"]

    extra_args = {**extra_args, "model_options": {"sampler_post_cfg_function": [post_cfg_function]}, "seed": 3}
    old_d = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
        d = (x - told["uncond"]) / sigmas[i]
        x = denoised + d * sigmas[i + 1]
        if ge_gamma is not None and i >= 1 and sigmas[i + 1] > 0:
            x = x + (ge_gamma - 1) * (d - old_d) * (sigmas[i + 1] - sigmas[i])
        old_d = d
    return x


class ComfyInpaint:
    """ComfyUI's KSamplerX0Inpaint, around a model that knows no mask."""

    def __init__(self, inner, latent_image, noise, path):
        self.inner, self.latent_image, self.noise, self.path = inner, latent_image, noise, path

    def __call__(self, x, sigma, denoise_mask=None, **extra):
        s = sigma.view(-1, 1, 1, 1)
        noisy = self.latent_image + s * self.noise
        if self.path == "flow":
            noisy = s * self.noise + (1 - s) * self.latent_image
        out = self.inner(x * denoise_mask + noisy * (1 - denoise_mask), sigma, **extra)
        return out * denoise_mask + self.latent_image * (1 - denoise_mask)


# ours on their models


@pytest.mark.parametrize("gamma", [1.0, 2.0, [2.0, 1.5, 1.2, 1.1]])
@pytest.mark.parametrize("name", ["ve", "flow"])
def test_it_is_our_sample(name, gamma):
    denoiser = model(Flow() if name == "flow" else None)
    levels = torch.tensor(GRIDS[name], dtype=torch.float64)
    sigmas = [t / (1 - t) if t < 1 else math.inf for t in levels.tolist()] if name == "flow" else levels.tolist()
    plan = ls.solvers.ge(sigmas, gamma, basis="velocity" if name == "flow" else "eps")
    z = noise()
    x = z * math.hypot(1, sigmas[0]) if name == "ve" else z
    ours = sample_gradient_estimation(as_kdiffusion(denoiser, name), x, levels, gamma=gamma, path=name)
    assert_close(ours, ls.sample(denoiser, plan, noise=z), 1e-6)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 1.3])
@pytest.mark.parametrize("path", ["ve", "flow"])
def test_it_is_comfys(path, gamma):
    """On flows (x - denoised)/t is the velocity, which is what gradient estimation combines there."""
    wrapped = as_kdiffusion(model(V(label="flow")), path)
    sigmas = torch.tensor(GRIDS[path])
    x = noise() * sigmas[0]
    ours = sample_gradient_estimation(wrapped, x, sigmas, gamma=gamma, path=path)
    assert_close(ours, comfy_gradient_estimation(wrapped, x, sigmas, ge_gamma=gamma), 1e-5)


def test_gamma_one_is_euler_also_where_the_grid_stops_above_zero():
    wrapped, sigmas = as_kdiffusion(model()), torch.tensor(GRIDS["stops"])
    x = noise() * sigmas[0]
    ours = sample_gradient_estimation(wrapped, x, sigmas, gamma=1.0)
    assert_close(ours, sample_euler(wrapped, x, sigmas), 1e-5)


def test_the_last_step_is_a_plain_denoise():
    wrapped, last = as_kdiffusion(model()), []

    def keep(x, sigma, **extra):
        last.append(wrapped(x, sigma, **extra))
        return last[-1]

    out = sample_gradient_estimation(keep, noise() * 14.6, GRIDS["ve"])
    assert len(last) == 6
    assert torch.equal(out, last[-1])


def test_the_calling_convention():
    """Positional arguments, sigma times ones, extra_args by keyword, a callback after each evaluation."""
    wrapped, calls, seen = as_kdiffusion(model()), [], []

    def called(x, sigma, **extra):
        calls.append((x, sigma, extra))
        return wrapped(x, sigma, **extra)

    sigmas = torch.tensor(GRIDS["ve"])
    x = noise() * sigmas[0]
    before = x.clone()
    extra = {"shift": torch.full((3, 1, 1, 1), 0.1)}
    out = sample_gradient_estimation(called, x, sigmas, extra, seen.append, True)
    assert torch.equal(x, before)
    assert out.dtype == x.dtype
    assert [c["i"] for c in seen] == list(range(6))
    assert all(set(c) == {"x", "i", "sigma", "sigma_hat", "denoised"} for c in seen)
    for i, ((state, sigma, given), report) in enumerate(zip(calls, seen, strict=True)):
        assert torch.equal(sigma, sigmas[i] * x.new_ones(3))
        assert given["shift"] is extra["shift"]
        torch.testing.assert_close(report["x"], state)
        assert report["sigma"] == report["sigma_hat"] == sigmas[i]
        assert torch.equal(report["denoised"], wrapped(state, sigma, **extra))
    torch.testing.assert_close(calls[0][0], x)


@pytest.mark.parametrize("path", ["ve", "flow"])
def test_any_plan(path):
    denoiser = model(Flow())
    sigmas = [80.0, 9.0, 3.0, 1.0, 0.3, 0.0]
    plan = ls.solvers.dpmpp(sigmas, 2)
    z = noise()
    want = ls.sample(denoiser, plan, noise=z)
    wrapped = as_kdiffusion(denoiser, path)
    x = z * (math.hypot(1, 80.0) if path == "ve" else math.hypot(1, 80.0) / 81)
    assert_close(sample_gradient_estimation(wrapped, x, None, plan=plan, path=path), want, 1e-6)
    levels = torch.tensor([flow_time(sigma) if path == "flow" else sigma for sigma in sigmas])
    assert_close(sample_gradient_estimation(wrapped, x, levels, plan=plan, path=path), want, 1e-6)


def test_a_plan_with_noise_draws_from_its_generator():
    denoiser = model()
    plan = ls.solvers.ddpm(GRIDS["ve"])
    z = noise()
    want = ls.sample(denoiser, plan, noise=z, generator=torch.Generator().manual_seed(5))
    x = z * math.hypot(1, GRIDS["ve"][0])
    generator = torch.Generator().manual_seed(5)
    ours = sample_gradient_estimation(as_kdiffusion(denoiser), x, None, plan=plan, generator=generator)
    assert_close(ours, want, 1e-6)


def test_half_precision_states_are_stepped_in_float32():
    wrapped, dtypes = as_kdiffusion(model()), []

    def called(x, sigma):
        dtypes.append((x.dtype, sigma.dtype))
        return wrapped(x, sigma)

    x = (noise() * 14.6).bfloat16()
    out = sample_gradient_estimation(called, x, GRIDS["ve"])
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}
    assert out.dtype == torch.bfloat16
    want = sample_gradient_estimation(wrapped, x.float(), GRIDS["ve"])
    assert_close(out.float(), want, 3e-2)


# theirs on our models


@pytest.mark.parametrize("prediction", [Eps(label=SD), V(label=SD), EDM(), Flow()])
def test_their_samplers_on_our_denoisers(prediction):
    denoiser = model(prediction)
    wrapped = as_kdiffusion(denoiser)
    sigmas = torch.tensor(GRIDS["ve"])
    z = noise()
    x = z * math.hypot(1, GRIDS["ve"][0])
    levels = sigmas.tolist()
    assert_close(sample_euler(wrapped, x, sigmas), ls.sample(denoiser, ls.solvers.ddim(levels), noise=z), 1e-5)
    ours = ls.sample(denoiser, ls.solvers.dpmpp(levels, 2, form="published"), noise=z)
    assert_close(sample_dpmpp_2m(wrapped, x, sigmas), ours, 1e-5)


def test_their_euler_on_a_flow():
    denoiser = model(Flow())
    z = noise()
    grid = [t / (1 - t) if t < 1 else math.inf for t in GRIDS["flow"]]
    theirs = sample_euler(as_kdiffusion(denoiser, "flow"), z, torch.tensor(GRIDS["flow"]))
    assert_close(theirs, ls.sample(denoiser, ls.solvers.ddim(grid), noise=z), 1e-5)


def test_conditions_and_ranges_reach_them():
    denoiser = NetworkDenoiser(Network(), Eps(label=SD), shape=SHAPE, trained_range=(0.03, 14.6)).requires_grad_(False)
    wrapped = as_kdiffusion(denoiser)
    assert (wrapped.sigma_min, wrapped.sigma_max) == (0.03, 14.6)
    flow = as_kdiffusion(denoiser, "flow")
    assert (flow.sigma_min, flow.sigma_max) == (flow_time(0.03), flow_time(14.6))
    x, sigma = noise() * 2, torch.full((3,), 2.0)
    shift = torch.full((3, 1, 1, 1), 0.5)
    difference = wrapped(x, sigma, shift=shift) - wrapped(x, sigma)
    torch.testing.assert_close(difference, torch.full_like(x, -2.0 * 0.5), atol=1e-5, rtol=0)  # x0 = y - sigma eps
    each = torch.tensor([0.5, 2.0, 9.0])
    rows = torch.cat([wrapped(x[i : i + 1], each[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(wrapped(x, each), rows)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((GRIDS["ve"],), {"path": "vp"}, "path 'vp' is not one of ve, flow"),
        (([3.0, 3.0, 0.0],), {}, r"sigmas\[1\] = 3.0 is not below"),
        (([2.0, 1.0, 0.0],), {"path": "flow"}, "sigmas hold 2: on the path 'flow' they are times"),
        (([math.inf, 1.0, 0.0],), {}, r"sigmas\[0\] = inf: the path 've' has no state there"),
        ((None,), {}, "sigmas is None: give the n . 1 levels, or a plan"),
        (([9.0, 1.0, 0.0],), {"plan": ls.solvers.ddim([8.0, 1.0, 0.0])}, "3 sigmas from 9 to 0 are not the plan's 3"),
        ((GRIDS["ve"],), {"gamma": [2.0]}, "gamma has 1 values: 4 of the 6 steps use one"),
        ((GRIDS["ve"],), {"plan": ls.solvers.ddpm(GRIDS["ve"])}, "generator"),
    ],
)
def test_bad_input_is_one_line(arguments, options, words):
    with pytest.raises(ValueError, match=words) as error:
        sample_gradient_estimation(as_kdiffusion(model()), noise(), *arguments, **options)
    assert "\n" not in str(error.value)


def test_a_progress_bar_where_tqdm_is_installed(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    wrapped = as_kdiffusion(model())
    sample_gradient_estimation(wrapped, noise(), GRIDS["ve"], disable=False)
    assert "6/6" in capsys.readouterr().err
    sample_gradient_estimation(wrapped, noise(), GRIDS["ve"], disable=True)
    monkeypatch.setattr("logsnr.adapters.kdiffusion.find_spec", lambda name: None)
    sample_gradient_estimation(wrapped, noise(), GRIDS["ve"], disable=False)
    assert capsys.readouterr().err == ""


# ComfyUI's habits


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_cfg_plus_plus_both_ways(gamma):
    """Their sampler on our CFG++ denoiser, ours on a model that tells what is unguided, `sample`: one trajectory."""
    guided = ls.guidance.cfgpp(model(), 0.7, {"shift": 0.0})
    wrapped, sigmas, z = as_kdiffusion(guided), torch.tensor(GRIDS["ve"]), noise()
    x, extra = z * math.hypot(1, GRIDS["ve"][0]), {"shift": torch.full((3, 1, 1, 1), 0.2)}
    want = ls.sample(guided, ls.solvers.ge(GRIDS["ve"], gamma), noise=z, cond=extra)
    theirs = comfy_cfg_pp(wrapped, x, sigmas, extra, None if gamma == 1 else gamma)
    ours = sample_gradient_estimation(wrapped, x, sigmas, extra, gamma=gamma, cfg_pp=True)
    assert_close(theirs, want, 2e-5)
    assert_close(ours, want, 2e-5)
    with pytest.raises(ValueError, match=r"a sampler that does not renoise .* take a sampler for CFG\+\+"):
        sample_euler(wrapped, x, sigmas, extra)
    with pytest.raises(ValueError, match="cfg_pp: the model has not called"):
        sample_gradient_estimation(lambda x, s, **_: x, x, sigmas, cfg_pp=True)
    calls = []

    def forgetful(x, sigma, model_options, **extra):
        calls.append(sigma)
        return wrapped(
            x,
            sigma,
            model_options=model_options
            if len(calls) == 1
            else {**model_options, "sampler_post_cfg_function": [lambda told: told["denoised"]]},
            **extra,
        )

    with pytest.raises(ValueError, match="cfg_pp: the model has not called"):
        sample_gradient_estimation(forgetful, x, sigmas, extra, cfg_pp=True)
    assert len(calls) == 2
    asking = {"sampler_post_cfg_function": [lambda told: told["denoised"]]}
    with pytest.raises(ValueError, match="sigma differs within the batch: CFG"):
        wrapped(x, torch.tensor([3.0, 3.0, 2.0]), model_options=asking, **extra)


def test_a_post_cfg_function_has_the_last_word():
    """Plain guidance tells what it denoises as both; whatever a function answers is returned."""
    wrapped, x, sigma, seen = as_kdiffusion(model()), noise() * 3, torch.full((3,), 3.0), []

    def halved(args):
        seen.append(args)
        return args["denoised"] / 2

    out = wrapped(x, sigma, model_options={"sampler_post_cfg_function": [halved]})
    torch.testing.assert_close(out, wrapped(x, sigma) / 2)
    assert torch.equal(seen[0]["uncond_denoised"], seen[0]["denoised"])
    assert seen[0]["input"] is x


@pytest.mark.parametrize("path", ["ve", "flow"])
def test_a_mask_keeps_the_image(path):
    """As ComfyUI's own wrapper does: equal to it, and the image itself where the mask is 0."""
    denoiser, sigmas = model(Flow()), torch.tensor(GRIDS[path])
    image, eps = noise(3), noise(4)
    mask = (noise(5)[:, :1] > 0).float()
    plain, masked = as_kdiffusion(denoiser, path), as_kdiffusion(denoiser, path, latent_image=image, noise=eps)
    x = eps * sigmas[0] if path == "ve" else eps
    extra = {"denoise_mask": mask}
    want = sample_gradient_estimation(ComfyInpaint(plain, image, eps, path), x, sigmas, extra, path=path)
    got = sample_gradient_estimation(masked, x, sigmas, extra, path=path)
    assert_close(got, want, 1e-6)
    kept = (mask == 0).expand_as(image)
    assert torch.equal(got[kept], image[kept])
    with pytest.raises(ValueError, match="denoise_mask without an image to keep"):
        plain(x, sigmas[0], **extra)


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_rising_sigmas_invert(gamma):
    """The library's own loops, flipped; on a Gaussian y grows as sqrt(s^2 + sigma^2), to the order of the steps."""
    wrapped, sigmas, x = as_kdiffusion(model()), torch.tensor(GRIDS["stops"]).flip(0), noise()
    theirs = comfy_gradient_estimation(wrapped, x, sigmas, ge_gamma=gamma)
    seen = []
    ours = sample_gradient_estimation(wrapped, x, sigmas, callback=seen.append, gamma=gamma, invert=True)
    assert_close(ours, theirs, 1e-6)
    assert [c["i"] for c in seen] == list(range(5))
    exact, errors = as_kdiffusion(ls.exact.Gaussian(torch.zeros(32), 0.25 * torch.eye(32))), []
    y = 0.5 * noise().flatten(1)
    grown = y * math.sqrt((0.25 + 100) / (0.25 + 1e-4))
    for n in (50, 100):
        rising = ls.grids.log_linear(n, 10.0, 0.01, last="min")[::-1]
        errors.append(float((sample_gradient_estimation(exact, y, rising, gamma=gamma, invert=True) - grown).norm()))
    assert errors[0] / errors[1] > (1.8 if gamma == 1 else 3.0)
    with pytest.raises(ValueError, match=r"sigmas rise from 0\.1 to 14\.6, a sampler's decrease: invert=True"):
        sample_gradient_estimation(wrapped, x, sigmas)
    for bad in ([0.0, 1.0, 2.0], [], [1.0], [1.0, math.inf], [0.1, math.nan, 1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="give at least 2, finite, that must rise strictly from above 0"):
            sample_gradient_estimation(wrapped, x, bad, invert=True)
    for wrong in ({"cfg_pp": True}, {"plan": ls.solvers.ddim(GRIDS["ve"])}):
        with pytest.raises(ValueError, match="leave plan and cfg_pp out"):
            sample_gradient_estimation(wrapped, x, [2.0, 1.0], invert=True, **wrong)
    for unfit in (math.nan, [math.inf]):
        with pytest.raises(ValueError, match=r"gamma = .*: give finite numbers"):
            sample_gradient_estimation(wrapped, x, [0.1, 1.0, 2.0], gamma=unfit, invert=True)
