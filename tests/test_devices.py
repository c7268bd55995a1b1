"""Devices: what runs on the CPU runs on an accelerator, and gives the same.

The accelerator is a pretended one (pretended.py), so that a tensor left on the CPU fails without a GPU.  On a real one
`make test-device` runs.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pretended import DEVICE, Elsewhere, Pretended
from torch import Tensor

import logsnr as ls
from logsnr import objectives
from logsnr.adapters import GradientEstimationScheduler, LoopObjective
from logsnr.denoiser import NetworkDenoiser
from logsnr.devices import find_device, find_dtype, on
from logsnr.errors import LogsnrError
from logsnr.evaluation.compare import measure
from logsnr.evaluation.compare.entries import ours
from logsnr.evaluation.error_model import consistency
from logsnr.evaluation.passport import examination, examine
from logsnr.gradients import OutputLayer
from logsnr.likelihood import augmented_elbo
from logsnr.likelihood.control import Pilot
from logsnr.models.networks import build_network
from logsnr.models.unet import UNetConfig
from logsnr.predictions import EDM, Eps, Flow, V
from logsnr.sampling import GaussianStart
from logsnr.schedules import Adaptive
from logsnr.training import ema
from logsnr.weightings import Sigmoid

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(there: Any, here: Any, **changes: float) -> None:
    """The tensor of the device against the CPU's."""
    assert isinstance(there, Elsewhere)
    torch.testing.assert_close(there.cpu(), here, **{**CLOSE, **changes})


class Small(torch.nn.Module):
    """A network of few operators, each of which the pretended device takes a while for."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.filter.weight.data = torch.randn(1, 1, 3, 3, generator=generator(5)) / 9
        self.classes = torch.nn.Parameter(torch.randn(4, 1, 1, 1, generator=generator(6)) / 4)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor) -> Tensor:
        level = torch.tanh(label)[:, None, None, None].to(x)
        return self.filter(x) + level * self.classes[class_labels]


def around(network: torch.nn.Module, row: Any) -> NetworkDenoiser:
    denoiser = NetworkDenoiser(
        network.requires_grad_(False), row, shape=(1, 8, 8), pixels=ls.Pixels(17), trained_range=(0.02, 50)
    )
    denoiser.card = {"classes": 4}
    return denoiser.eval()


@pytest.fixture(scope="module")
def here() -> NetworkDenoiser:
    """A small network of 8 x 8 images with four classes."""
    return around(Small(), EDM(sigma_data=0.5))


@pytest.fixture
def machine():
    with Pretended() as machine:
        yield machine


@pytest.fixture
def there(here, machine):
    return copy.deepcopy(here).to(DEVICE)


CLASSES = {"class_labels": torch.tensor([0, 3, 1, 2, 0, 1])}
NOISE = torch.randn(6, 1, 8, 8, generator=generator())
IMAGES = torch.randint(17, (32, 1, 8, 8), generator=generator(1), dtype=torch.uint8)
LABELS = {"class_labels": torch.arange(32) % 4}


def test_the_pretended_device_refuses_what_a_real_one_does(machine):
    x = torch.randn(3, 4)
    y = x.to(DEVICE)
    assert y.device == DEVICE
    assert torch.equal((2 * y + 1).cpu(), 2 * x + 1)
    for wrong in (lambda: x + y, lambda: torch.cat([x, y]), lambda: y.add_(x), lambda: y[torch.tensor([0, 1])]):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=DEVICE, generator=generator())
    with pytest.raises(TypeError, match="numpy"):
        y.numpy()
    before = machine.reads
    assert float(y.sum()) == float(x.sum())
    assert y.tolist() == x.tolist()
    assert machine.reads == before + 2


@pytest.mark.parametrize("solver", ["ddim", "ge", "adams_bashforth", "ipndm", "dpmpp", "deis", "unipc", "ddpm"])
def test_every_solver_with_one_read(solver, here, there, machine):
    """From noise and conditions that were left on the CPU; one value is read back, whether all is finite."""
    grid = ls.grids.log_linear(5, 40.0, 0.03)
    plan = getattr(ls.solvers, solver)(grid)
    wanted = ls.sample(here, plan, noise=NOISE, cond=CLASSES, generator=generator(2))
    machine.reads = 0
    found = ls.sample(there, plan, noise=NOISE, cond=CLASSES, generator=generator(2), chunk=4)
    assert machine.reads <= 2  # and whether every label is a class
    close(found, wanted)


def test_a_unet(machine):
    config = UNetConfig(channels=[8], layers_per_block=1, mid_attention=True, head_dim=8, norm_groups=4, classes=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(config, (1, 8, 8))
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
    own = around(network, Flow())
    wanted = ls.sample(own, 3, noise=NOISE, cond=CLASSES)
    close(ls.sample(copy.deepcopy(own).to(DEVICE), 3, noise=NOISE, cond=CLASSES), wanted)


def test_draws_are_those_of_the_cpu(here, there):
    """n samples of a generator, and those of a Heun run that stirs: the same on every device."""
    close(ls.sample(there, 4, n=6, cond=CLASSES, generator=generator()), ls.sample(here, 4, noise=NOISE, cond=CLASSES))
    grid = ls.grids.karras(4, 40.0, 0.03)
    options = {"noise": NOISE, "cond": CLASSES}
    close(ls.heun(there, grid, **options), ls.heun(here, grid, **options))


def test_guidance_starts_and_trajectories(here, there):
    def guided(denoiser: NetworkDenoiser) -> ls.Denoiser:
        return ls.guidance.cfg(denoiser, 2.0, {"class_labels": torch.tensor([3])}, rescale=0.5)

    close(ls.sample(guided(there), 5, noise=NOISE, cond=CLASSES), ls.sample(guided(here), 5, noise=NOISE, cond=CLASSES))
    start = GaussianStart.fit(here.encode(IMAGES), labels=LABELS["class_labels"])
    plan = ls.solvers.ge(ls.grids.flow_range(4, 8.0, 0.03, "min"), 1.5)
    options = {"noise": NOISE, "cond": CLASSES, "start": start}
    close(ls.sample(there, plan, **options), ls.sample(here, plan, **options))
    path, own = (ls.trajectory(d, 4, noise=NOISE, cond=CLASSES) for d in (there, here))
    close(path.z[-1], own.z[-1])
    close(path.x0[0], own.x0[0])


@pytest.mark.heavy
def test_likelihoods(here, there, monkeypatch):
    """Images may lie on either side."""
    options = {"evaluations_per_image": 8, "cond": LABELS}
    wanted, found = (
        ls.bits_per_dim(d, images, generator=generator(), train=IMAGES.repeat(2, 1, 1, 1), **options)
        for d, images in ((here, IMAGES), (there, IMAGES))
    )
    assert found.bits_per_dim == pytest.approx(wanted.bits_per_dim, abs=1e-4)
    monkeypatch.setattr(Pilot, "after", lambda self, *draws: self)  # what it learns was learnt above
    own, other = (
        augmented_elbo(d, x, Sigmoid(2.0), logsnr_range=(-6, 6), generator=generator(), **options)
        for d, x in ((here, here.encode(IMAGES)), (there, here.encode(IMAGES).to(DEVICE)))
    )
    assert str(other) == str(own)


def test_examinations(here, there):
    x = here.encode(IMAGES)
    own, other = (consistency(d, x, (0.1, 1.0), generator=generator(), cond=LABELS) for d in (here, there))
    assert [level.change.mean for level in other] == pytest.approx([level.change.mean for level in own], rel=1e-3)


@pytest.mark.parametrize("row", [EDM(sigma_data=0.5), Eps(), V(), Flow()])
def test_a_step_of_training(row, here, machine):
    """Forward, loss, last-layer gradients, the density that learns, optimizer and average: no value is read."""
    own = NetworkDenoiser(copy.deepcopy(here.network), row, shape=here.shape).requires_grad_()
    other = copy.deepcopy(own).to(DEVICE)
    weighting, results = Sigmoid(2.0), []
    for denoiser, device in ((own, torch.device("cpu")), (other, DEVICE)):
        schedule = Adaptive((-6.0, 6.0), weighting, importance="gradient", sigma_data=0.5, dim=64)
        objective = objectives.WeightedELBO(weighting, schedule)
        average = ema.EMA([p.detach().clone() for p in denoiser.parameters()], decay=0.9)
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
        x = here.encode(IMAGES).to(device)
        machine.reads = 0
        with OutputLayer(denoiser) as layer:
            output = objective(denoiser, x, cond=on(LABELS, device), generator=generator(3))
            norms = layer.squared_norms(output.loss)
        output.loss.mean().backward()
        objective.update(output, norms)
        if device == DEVICE:
            assert machine.reads == 0
        optimizer.step()
        average.update(denoiser.parameters(), 0)
        results.append((output.loss.detach(), schedule.log_density(torch.linspace(-5, 5, 9)), average.average[0]))
    for there_, here_ in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(there_.cpu(), here_, rtol=1e-3, atol=1e-4)


def test_the_scheduler_reads_nothing(here, machine):
    scheduler = GradientEstimationScheduler(prediction_type="v_prediction")
    states = []
    for device in (torch.device("cpu"), DEVICE):
        z = NOISE.to(device)
        scheduler.set_timesteps(6, device=device)
        timesteps = list(scheduler.timesteps)
        machine.reads = 0
        for t in timesteps:
            z = scheduler.step(0.3 * z, t, scheduler.scale_model_input(z, t), return_dict=False)[0]
        states.append(z)
    assert machine.reads == 0
    close(states[1], states[0])


def test_a_loop_of_others(machine):
    """`LoopObjective` beside a model on the device: timesteps, states, targets and losses are there."""
    from diffusers import DDPMScheduler

    losses = []
    for device in (torch.device("cpu"), DEVICE):
        objective = LoopObjective("vdm++/sigmoid", DDPMScheduler(), adaptive=True)
        x, eps = NOISE.to(device), 0.5 * NOISE.flip(0).to(device)
        draw = objective.draw(len(x), generator=generator(4), device=device)
        loss = objective.loss(draw, 0.2 * x, eps, reduction="none")
        objective.update(draw, loss)
        losses.append(loss)
    close(losses[1], losses[0])


@pytest.mark.heavy
def test_a_search_and_a_comparison(here, there):
    """The same plan of the same measurements; the same rows."""
    plans = [ls.calibrate(d, 2, n=4, rollouts=40, cond=CLASSES) for d in (here, there)]
    assert plans[1].sigmas == pytest.approx(plans[0].sigmas, rel=1e-3)
    rows = [measure(d, ours(d, [3])[::9], n=4, teacher_steps=16, cond=CLASSES).rows for d in (here, there)]
    assert [r.rmse.value for r in rows[1]] == pytest.approx([r.rmse.value for r in rows[0]], rel=1e-2, abs=1e-5)


@pytest.mark.heavy
def test_a_passport(here, there, monkeypatch):
    monkeypatch.setattr(examination, "half_precision", lambda *rest: ())  # autocast knows no pretended device
    x = here.encode(IMAGES.repeat(2, 1, 1, 1))
    options = {"cond": {"class_labels": torch.arange(64) % 4}, "images": 32, "trajectories": 2, "levels": 5}
    own, other = (examine(d, x, **options) for d in (here, there))
    assert [f.kind for f in other.findings] == [f.kind for f in own.findings]
    assert other.start.kl == pytest.approx(own.start.kl, rel=1e-3)


# Names


def test_names(monkeypatch):
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    assert find_device(None) == find_device("cpu") == torch.device("cpu")
    assert find_dtype("bf16") == find_dtype(torch.bfloat16) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 0)
    for rank, index in (("1", 1), ("2", 0)):  # of three processes on two GPUs
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert find_device("auto") == find_device("cuda") == torch.device("cuda", index)
        assert find_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.delenv("LOCAL_RANK")
    for name, words in (
        ("cuda:2", "this machine has 2 CUDA devices; give auto, cpu or cuda:0 or cuda:1"),
        ("gpu", "none"),
    ):
        with pytest.raises(LogsnrError, match=words):
            find_device(name)
    for dtype, words in (("bfloat", "bf16"), (torch.int8, "floating-point")):
        with pytest.raises(LogsnrError, match=words):
            find_dtype(dtype)


def test_apples_gpus_are_not_asked_for_float64(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto") == find_device("mps") == torch.device("mps")
    assert find_device("auto", float64=True) == torch.device("cpu")
    with pytest.raises(LogsnrError, match="no float64"):
        find_device("mps", float64=True)


def test_a_model_without_numbers_leaves_states_where_they_are():
    class Nothing(ls.Denoiser):
        shape, sigma_data, trained_range = (3,), 1.0, (0.01, 10.0)

        def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Any:
            raise NotImplementedError

    assert Nothing().device == torch.device("cpu")
