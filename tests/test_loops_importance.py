"""Importances in other people's loops: what p follows, and that it changes neither the objective nor the script."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logsnr.adapters.diffusers.loops import Draw, LoopObjective
from logsnr.adapters.diffusers.loops.timesteps import b2_of
from logsnr.errors import LogsnrError
from logsnr.gradients import OutputLayer
from logsnr.objectives import WeightedELBO
from logsnr.schedules import Linear
from logsnr.schedules.adaptive import IMPORTANCES, Adaptive
from logsnr.weightings import ELBO, Sigmoid

SD = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
FLUX = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
LOOPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eps on SD's table": (SD, {"target": "epsilon"}),
    "v on SD's table, scaled": (SD, {"target": "v_prediction", "scaled": True}),
    "a flow's table": (FLUX, {}),
    "a flow's continuous times": (FLUX, {"continuous": True}),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Script(nn.Module):
    """A network that knows its level: o = W tanh(V z) + b, of `[B, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 7), nn.Linear(7, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(generator=rng(9))

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(torch.cat([z, logsnr[:, None].float() / 4], 1))))


def make(kind: str, importance: str, network: nn.Module | None = None, objective: Any = None) -> LoopObjective:
    config, options = LOOPS[kind]
    objective = objective or WeightedELBO(Sigmoid(2.0), Linear(-5, 6))
    watched = {"network": network} if importance == "gradient" and network is not None else {}
    return LoopObjective(objective, config, adaptive=True, importance=importance, **options, **watched)


def step(loop: LoopObjective, script: Script, generator: torch.Generator, n: int = 64) -> tuple[Draw, Tensor]:
    """A step of a script, up to backward: the draw, and its squared errors `[B]`, averaged over dimensions."""
    draw = loop.draw(n, generator=generator)
    z, target = torch.randn(2, n, 4, generator=generator)
    output = script(z, draw.logsnr)
    loop.loss(draw, output, target).backward()
    return draw, (output - target).square().mean(1).detach()


def table(loop: LoopObjective) -> tuple[Tensor, Tensor]:
    """Of all that can be drawn: probabilities, and what the mean loss is made of."""
    if not loop.continuous:
        cells = loop.model.levels.cells(*loop.objective.schedule.range, torch.device("cpu"))
        return loop.probabilities(), loop.weights() * mean_loss(cells.logsnr, cells.per_eps)
    lo, hi = loop.objective.schedule.range
    x = lo + (hi - lo) * (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    p, factor = loop.objective.schedule.log_density(x).exp(), b2_of(loop.model.target, x)
    return p * (hi - lo) / 20000, 0.5 * loop.objective.weighting(x) / p * factor * mean_loss(x, factor)


def mean_loss(logsnr: Tensor, factor: Tensor) -> Tensor:
    """Of the script, where that of eps is sigmoid(lambda)(2 + sin lambda)."""
    return torch.sigmoid(logsnr) * (2 + torch.sin(logsnr)) / factor


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", LOOPS)
def test_what_a_fixed_histogram_estimates(kind: str, importance: str) -> None:
    """With any history: exactly the same sum over levels, and its Monte Carlo mean within 4 standard errors."""
    script = Script()
    loop, fresh = make(kind, importance, script), make(kind, importance)
    generator = rng(1)
    for _ in range(40):
        step(loop, script, generator)
    (p, worth), (before, same) = table(loop), table(fresh)
    assert 0.5 * float((p - before).abs().sum()) > 0.01  # it did move
    exact = float((p * worth).sum())
    assert exact == pytest.approx(float((before * same).sum()), rel=1e-9)
    means = []
    for _ in range(100):
        draw = loop.draw(200, generator=generator)
        noise = 0.5 + torch.rand(200, generator=generator, dtype=torch.float64)
        means.append((draw.weight.double() * mean_loss(draw.logsnr, draw.eps_factor) * noise).mean() / loop._unit)
    mean, stderr = float(torch.stack(means).mean()), float(torch.stack(means).std()) / 10
    assert mean == pytest.approx(exact, abs=4 * stderr)
    assert stderr < 0.005 * exact


@pytest.mark.parametrize("kind", LOOPS)
def test_losses_teach_the_schedule_the_errors_of_eps(kind: str) -> None:
    script, generator = Script(), rng(2)
    loop, bare = make(kind, "error"), make(kind, "error")
    schedule = bare.objective.schedule
    for _ in range(5):
        draw, losses = step(loop, script, generator)
        schedule.update(draw.logsnr, losses.double() * b2_of(loop.model.target, draw.logsnr))
    torch.testing.assert_close(loop.objective.schedule.probabilities(), schedule.probabilities(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", LOOPS)
def test_gradients_are_read_off_the_last_layer_in_the_scripts_own_loss(kind: str) -> None:
    """Norms of d(E/2)/d(last layer) by autograd, one sample at a time, with neither weight nor target in them."""
    script = Script()
    loop, direct = make(kind, "gradient", script), make(kind, "gradient")
    schedule = direct.objective.schedule
    generator = rng(3)
    for _ in range(3):
        draw = loop.draw(32, generator=generator)
        z, target = torch.randn(2, 32, 4, generator=generator)
        half = 0.5 * (script(z, draw.logsnr) - target).square().mean(1).double()
        half = half * b2_of(loop.model.target, draw.logsnr)
        norms = [
            sum(
                g.double().square().sum()
                for g in torch.autograd.grad(one, [*script.leave.parameters()], retain_graph=True)
            )
            for one in half
        ]
        loop.loss(draw, script(z, draw.logsnr), target).backward()
        schedule.update(draw.logsnr, 2 * half.detach(), torch.stack(norms))
    torch.testing.assert_close(loop.objective.schedule.probabilities(), schedule.probabilities(), rtol=1e-4, atol=0)


def test_watching_leaves_the_script_alone() -> None:
    """The same loss and gradients as without, and no hook between loss and draw."""
    script, found = Script(), []
    for importance in ("error", "gradient"):
        loop = make("v on SD's table, scaled", importance, script)
        script.zero_grad()
        draw, losses = step(loop, script, rng(4))
        found.append((draw.timesteps, losses, *(p.grad.clone() for p in script.parameters() if p.grad is not None)))
        assert not script.leave._forward_hooks
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    # Validation teaches nothing and leaves nothing.
    start = loop.state_dict()
    with torch.no_grad():
        draw = loop.draw(8, generator=rng())
        loop.loss(draw, script(torch.zeros(8, 4), draw.logsnr), torch.ones(8, 4))
    assert all(torch.equal(start[name], value) for name, value in loop.state_dict().items())
    assert not script.leave._forward_hooks


def test_a_loop_that_forms_its_own_losses() -> None:
    """`update` before backward reads the gradients off; norms of one's own take their place."""
    script = Script()
    loops = [make("a flow's continuous times", "gradient", script), make("a flow's continuous times", "gradient")]
    for loop in loops:
        draw = loop.draw(32, generator=rng(5))
        layer = OutputLayer(script)
        with layer:
            losses = script(torch.ones(32, 4), draw.logsnr).square().sum(1)
        if loop is loops[0]:
            losses = script(torch.ones(32, 4), draw.logsnr).square().sum(1)
            loop.update(draw, losses)
            (draw.weight * losses).mean().backward()
        else:
            loop.update(draw, losses.detach(), layer.squared_norms(draw.weight * losses))
    one, two = (loop.objective.schedule.probabilities() for loop in loops)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_restored_state_goes_on_bit_for_bit(importance: str) -> None:
    """Two loops, one of them from the other's state: the same draws, and the same after another batch."""
    kind, script = "v on SD's table, scaled", Script()
    one, two = make(kind, importance, script), make(kind, importance, script)
    for seed in range(3):
        step(one, script, rng(seed))
    two.load_state_dict(one.state_dict())
    for seed in (7, 8):
        draws = [step(loop, script, rng(seed))[0] for loop in (one, two)]
        assert torch.equal(draws[0].timesteps, draws[1].timesteps)
        assert torch.equal(draws[0].weight, draws[1].weight)
    assert torch.equal(one.probabilities(), two.probabilities())
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_error_is_a_mean_on_a_table() -> None:
    """Losses of mean 1 that scatter at low log-SNR alone leave p uniform: their second moment does not count."""
    loop = make("eps on SD's table", "error", objective=WeightedELBO(ELBO(), Linear(-5, 6)))
    generator = rng(6)
    for _ in range(400):
        draw = loop.draw(128, generator=generator)
        scattered = torch.where(torch.rand(128, generator=generator) < 0.25, 4.0, 0.0)
        loop.update(draw, torch.where(draw.logsnr < 0, scattered, torch.ones(128)))
    noisy = loop.model.levels.logsnr < 0
    assert float(loop.probabilities()[noisy].sum()) == pytest.approx(5 / 11, abs=0.03)


GRADIENT = WeightedELBO(ELBO(), Adaptive((-5, 6), ELBO(), importance="gradient"))


def unseen() -> None:
    """The network runs before draw."""
    script = Script()
    loop = LoopObjective(GRADIENT, SD, network=script)
    script(torch.zeros(4, 4), torch.zeros(4))
    loop.loss(loop.draw(4, generator=rng()), torch.zeros(4, 4, requires_grad=True), torch.zeros(4, 4))


def detached() -> None:
    script = Script()
    loop = LoopObjective(GRADIENT, SD, network=script)
    draw = loop.draw(4, generator=rng())
    loop.update(draw, script(torch.zeros(4, 4), draw.logsnr).square().sum(1).detach())


def in_parts() -> None:
    script = Script()
    loop = LoopObjective(GRADIENT, SD, network=script)
    draw = loop.draw(4, generator=rng())
    output = script(torch.zeros(4, 4), draw.logsnr)
    try:
        loop.loss(draw[:2], output[:2], torch.zeros(2, 4))
    finally:
        assert not script.leave._forward_hooks


def too_late() -> None:
    script = Script()
    loop = LoopObjective(GRADIENT, SD, network=script)
    draw = loop.draw(4, generator=rng())
    losses = script(torch.zeros(4, 4), draw.logsnr).square().sum(1)
    losses.sum().backward()
    loop.update(draw, losses)


def without() -> None:
    loop = LoopObjective("vdm", SD, adaptive=True, importance="gradient")
    loop.loss(loop.draw(4, generator=rng()), torch.zeros(4, 2), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoopObjective("edm", SD, adaptive=True, importance="gradent"), ["did you mean 'gradient'", "error"]),
        (lambda: LoopObjective("edm", SD, importance="error"), ["adaptive=True"]),
        (lambda: LoopObjective(GRADIENT, SD, importance="gradient"), ["adaptive=True", "already"]),
        (lambda: LoopObjective("edm", SD, adaptive=True, network=Script()), ["importance='gradient'"]),
        (lambda: LoopObjective("edm", SD, network=Script()), ["importance='gradient'"]),
        (lambda: LoopObjective(GRADIENT, SD, network=nn.Tanh()), ["no linear layer", "OutputLayer(network, layer)"]),
        (without, ["has no gradients", "network=", "gradient="]),
        (unseen, ["between draw() and loss()"]),
        (detached, ["undetached"]),
        (too_late, ["before backward()"]),
        (in_parts, ["all 4 samples", "these are 2", "loop.update(draw, losses) once"]),
    ],
)
def test_bad_input_is_one_clear_line(make: Any, words: list[str]) -> None:
    with pytest.raises(LogsnrError) as error:
        make()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
