"""Networks that others trained: read as their conventions say, and sampled as diffusers would."""

import hashlib

import pytest
import torch

pytest.importorskip("diffusers")
from foreign import MODELS, ROOT, foreign, scheduler

from logsnr.adapters import GradientEstimationScheduler
from logsnr.noise import alpha_s, flow_time
from logsnr.sampling import sample, solvers

SIGMA = 1.3


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def cond(name):
    return {"class_labels": torch.tensor([3, 10])} if MODELS[name]["classes"] else {}


def level(name):
    """A level that the network has a name for: a timestep of its table, or SIGMA."""
    table = getattr(scheduler(name), "alphas_cumprod", None)
    return 400 if table is not None else None, SIGMA if table is None else float((1 / table[400].double() - 1).sqrt())


def own(name, network, noise):
    """(x0, eps) at 0.3 + sigma noise, from the network's own state, label and answer."""
    t, sigma = level(name)
    y = 0.3 + sigma * noise
    if t is not None:
        alpha = 1 / (1 + sigma**2) ** 0.5
        z = alpha * y
        answer = network(z, torch.full((2,), t)).sample
        eps = answer if MODELS[name]["target"] == "eps" else alpha * answer + alpha * sigma * z
    elif name == "ve-score":
        eps = -sigma * network(y, torch.full((2,), sigma)).sample
    else:
        time = flow_time(sigma)
        answer = network((1 - time) * y, torch.full((2,), 1000 * time), **cond(name)).sample
        eps = (y - answer) / sigma if MODELS[name]["target"] == "x" else (1 - time) * y + (1 - time) * answer
    return y - sigma * eps, eps


@pytest.mark.parametrize("name", MODELS)
def test_an_estimate_is_what_the_networks_convention_says(name, noise):
    model = foreign(name)
    _, sigma = level(name)
    x0, eps = own(name, model.network, noise)
    estimate = model(alpha_s(sigma)[0] * (0.3 + sigma * noise), sigma, **cond(name))
    torch.testing.assert_close(estimate.x0, x0, rtol=0, atol=2e-5 * sigma)
    torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ve-score"])
def test_a_scheduler_of_its_config_samples_as_the_denoiser_does(name, noise):
    """The pipelines' loop on the raw network, and our own on the denoiser, end at the same images."""
    model = foreign(name)
    kind = {"prediction_type": "sample"} if name == "flow-x0-classes" else {}
    ours = GradientEstimationScheduler.from_config(scheduler(name).config, gamma=1.5, clip_sample=False, **kind)
    ours.set_timesteps(3)
    z = noise
    for t in ours.timesteps:
        z = ours.step(model.network(z, t, **cond(name)).sample, t, z).prev_sample
    plan = solvers.ge(ours.plan.sigmas, 1.5, ours.plan.basis)
    torch.testing.assert_close(z, sample(model, plan, noise=noise, cond=cond(name), check=False), rtol=0, atol=1e-3)


def test_the_weights_are_those_that_were_described():
    for about in MODELS.values():
        assert hashlib.sha256((ROOT / about["file"]).read_bytes()).hexdigest() == about["sha256"]
