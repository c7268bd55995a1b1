"""Guidance on exact class-conditional mixtures: what is a combination of scores is one, and no guidance is none."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
from logsnr.exact import GaussianMixture
from logsnr.guidance import autoguidance, cfg, cfgpp
from logsnr.noise import alpha_s, sigma_from_logsnr
from logsnr.pixels import Pixels
from logsnr.predictions import EDM, Eps, Flow, V
from logsnr.sampling import Step, evaluations, grids, heun, sample, solve, solvers
from logsnr.sampling.counted import Counted

F64 = torch.float64
GRID = grids.log_linear(9, 30.0, 0.02)
NULL = {"label": 3}
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0])
LEVELS = (0.03, 0.5, 3.0, 40.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


class ByClass(Denoiser):
    """A mixture whose class selects components: label 3 is all of it. Exact for every class."""

    def __init__(self, seed: int = 9, widen: float = 0.0) -> None:
        super().__init__()
        covs = torch.stack([0.05 * torch.eye(2), 0.2 * torch.eye(2), torch.tensor([[0.3, 0.1], [0.1, 0.1]])]).double()
        covs = covs + widen * torch.eye(2, dtype=F64)
        means, weights = 1.5 * randn(3, 2, seed=seed), torch.tensor([0.5, 0.3, 0.2], dtype=F64)
        one = torch.ones(1, dtype=F64)
        self.parts = nn.ModuleList(GaussianMixture(one, means[k : k + 1], covs[k : k + 1]) for k in range(3))
        self.parts.append(GaussianMixture(weights, means, covs))
        self.shape, self.sigma_data, self.trained_range = (2,), 1.0, (0.0, math.inf)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        answers = [part(z, sigma) for part in self.parts]
        rows = torch.arange(len(z))
        return Estimate(
            lambda: torch.stack([a.x0 for a in answers])[cond["label"], rows],
            lambda: torch.stack([a.eps for a in answers])[cond["label"], rows],
        )

    def score(self, z: Tensor, sigma: float, label: Tensor) -> Tensor:
        return torch.stack([part.score(z, sigma) for part in self.parts])[label, torch.arange(len(z))]


class Oracle(nn.Module):
    """A network of any prediction that knows the mixture; counts calls and samples."""

    def __init__(self, prediction: Any, exact: Denoiser) -> None:
        super().__init__()
        self.prediction, self.exact, self.evaluations, self.rows = prediction, exact, 0, 0

    def forward(self, scaled: Tensor, level: Tensor, **cond: Any) -> Tensor:
        self.evaluations, self.rows = self.evaluations + 1, self.rows + len(scaled)
        sigma = float(sigma_from_logsnr(float(level[0])))
        alpha, s = alpha_s(sigma)
        answer = self.exact(scaled / self.prediction.c_in(alpha, s), sigma, **cond)
        t_x, t_e = self.prediction.target_row(alpha, s)
        return t_x * answer.x0 + t_e * answer.eps


def network(prediction: Any = None, exact: Denoiser | None = None) -> NetworkDenoiser:
    prediction = prediction or V()
    return NetworkDenoiser(Oracle(prediction, exact or ByClass()), prediction, shape=(2,))


def states(sigma: float) -> Tensor:
    alpha, s = alpha_s(sigma)
    return alpha * randn(8, 2, seed=3) + s * randn(8, 2, seed=4)


# combinations of scores


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.7, 1.0, 2.0, 7.5])
def test_the_guided_score_is_the_combination_of_scores(scale: float, sigma: float) -> None:
    model, z = ByClass(), states(sigma)
    alpha, s = alpha_s(sigma)
    null = torch.full_like(LABELS, 3)
    expected = (1 - scale) * model.score(z, sigma, null) + scale * model.score(z, sigma, LABELS)
    for raw in (model, network(), network(Eps()), network(Flow(label="logsnr")), network(EDM(label="logsnr"))):
        estimate = cfg(raw, scale, NULL)(z, sigma, label=LABELS)
        torch.testing.assert_close(-estimate.eps / s, expected, rtol=1e-10, atol=1e-10 * (1 + 1 / s))
        torch.testing.assert_close(alpha * estimate.x0 + s * estimate.eps, z, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(estimate.velocity, estimate.eps - estimate.x0, rtol=1e-9, atol=1e-9)
        assert estimate.state is None


@pytest.mark.parametrize("sigma", LEVELS)
def test_no_guidance_is_the_conditional_model_bit_for_bit(sigma: float) -> None:
    z = states(sigma)
    for scale, label in ((1.0, LABELS), (0.0, torch.full_like(LABELS, 3))):
        raw = network()
        expected = raw(z, sigma, label=label)
        raw.network.rows = 0
        for guided in (cfg(raw, scale, NULL), cfg(raw, scale, NULL, interval=(0.0, 100.0))):
            actual = guided(z, sigma, label=LABELS)
            assert torch.equal(actual.x0, expected.x0)
            assert torch.equal(actual.eps, expected.eps)
            assert guided.cost(sigma) == 1
        assert raw.network.rows == 2 * 8
    rescaled = cfg(raw, 1.0, NULL, rescale=0.7)(z, sigma, label=LABELS)
    assert torch.equal(rescaled.x0, raw(z, sigma, label=LABELS).x0)


def test_autoguidance_extrapolates_away_from_the_worse_model() -> None:
    good, bad = ByClass(), ByClass(widen=0.3)
    for sigma in LEVELS:
        z = states(sigma)
        a, b = good(z, sigma, label=LABELS), bad(z, sigma, label=LABELS)
        estimate = autoguidance(good, bad, 2.5)(z, sigma, label=LABELS)
        torch.testing.assert_close(estimate.eps, b.eps + 2.5 * (a.eps - b.eps), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(estimate.x0, b.x0 + 2.5 * (a.x0 - b.x0), rtol=1e-12, atol=1e-12)
        assert torch.equal(autoguidance(good, bad, 1.0)(z, sigma, label=LABELS).x0, a.x0)
        assert torch.equal(autoguidance(good, bad, 0.0)(z, sigma, label=LABELS).x0, b.x0)
    bad.trained_range = (0.1, 50.0)
    assert autoguidance(good, bad, 2.0).trained_range == (0.1, 50.0)


# what it costs


@pytest.mark.parametrize("name", ["cfg", "cfgpp", "autoguidance"])
def test_evaluations_are_counted_on_the_network(name: str) -> None:
    raw, bad = network(), network(exact=ByClass(widen=0.2))
    interval = (0.1, 5.0)
    guided = {
        "cfg": lambda: cfg(raw, 3.0, NULL, interval=interval),
        "cfgpp": lambda: cfgpp(raw, 0.6, NULL, interval=interval),
        "autoguidance": lambda: autoguidance(raw, bad, 2.0, interval=interval),
    }[name]()
    plan = solvers.ge(GRID)
    inside = sum(0.1 < sigma <= 5.0 for sigma in GRID[:-1])
    assert 0 < inside < plan.nfe
    sample(guided, plan, noise=randn(8, 2), cond={"label": LABELS})
    assert raw.network.rows + bad.network.rows == 8 * evaluations(guided, plan) == 8 * (plan.nfe + inside)
    assert raw.network.evaluations == plan.nfe  # one call, of double batch where both are needed


def test_the_interval_is_open_below_and_closed_above() -> None:
    raw, z = ByClass(), states(1.0)
    guided = cfg(raw, 3.0, NULL, interval=(0.5, 2.0))
    for sigma, acts in ((0.4, False), (0.5, False), (0.50001, True), (2.0, True), (2.00001, False)):
        same = torch.equal(guided(z, sigma, label=LABELS).x0, raw(z, sigma, label=LABELS).x0)
        assert same is not acts
        assert guided.cost(sigma) == 1 + acts
    # a level per sample: each is guided by its own
    levels = torch.tensor([0.4, 0.5, 0.6, 1.0, 2.0, 2.1, 3.0, 0.7], dtype=F64)
    together = guided(z, levels, label=LABELS).x0
    for i, sigma in enumerate(levels.tolist()):
        alone = guided(z[i : i + 1], sigma, label=LABELS[i : i + 1]).x0
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


class Listener(nn.Module):
    """Remembers the batch and conditions of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations: list[tuple[int, dict[str, Any]]] = []

    def forward(self, z: Tensor, level: Tensor, **cond: Any) -> Tensor:
        self.evaluations.append((len(z), cond))
        return torch.sin(z)


@pytest.mark.parametrize(
    ("cond", "null", "batches"),
    [
        ({"y": torch.arange(3)}, {"y": 10}, [6]),
        ({"y": torch.arange(3)}, {"y": torch.tensor(10)}, [6]),
        ({"y": torch.arange(3)}, {"y": torch.full((3,), 10)}, [6]),
        ({"text": torch.ones(3, 7, 4)}, {"text": torch.zeros(1, 7, 4)}, [6]),
        ({"text": torch.ones(3, 7, 4)}, {"text": torch.zeros(7, 4)}, [6]),
        ({"text": torch.ones(3, 7, 4), "size": torch.ones(3, 2)}, {"text": torch.zeros(1, 7, 4)}, [6]),
        ({"added": {"a": torch.ones(3, 2), "b": torch.ones(3)}}, {"added": {"a": torch.zeros(1, 2)}}, [6]),
        ({"y": torch.arange(3), "flag": True}, {"y": 10}, [6]),
        ({"text": torch.ones(3, 7, 4)}, {"text": torch.zeros(3, 5, 4)}, [3, 3]),  # another length
        ({"text": torch.ones(3, 7, 4)}, {"text": None}, [3, 3]),
        ({}, {"y": torch.full((3,), 10)}, [3, 3]),  # a condition that only the null has
        ({"y": torch.arange(3), "mode": "draft"}, {"y": 10, "mode": "full"}, [3, 3]),
    ],
)
def test_conditions_are_joined_where_they_can_be(
    cond: dict[str, Any], null: dict[str, Any], batches: list[int]
) -> None:
    listener = Listener()
    model = NetworkDenoiser(listener, V(), shape=(2,))
    cfg(model, 3.0, null)(randn(3, 2), 1.0, **cond).x0  # noqa: B018
    assert [n for n, _ in listener.evaluations] == batches
    if batches == [6] and "y" in cond:
        assert listener.evaluations[0][1]["y"].tolist() == [0, 1, 2, 10, 10, 10]
    if batches == [6] and "text" in cond:
        assert listener.evaluations[0][1]["text"].flatten(1).mean(1).tolist() == [1, 1, 1, 0, 0, 0]
    if "added" in cond:
        assert listener.evaluations[0][1]["added"]["a"].tolist() == [[1, 1]] * 3 + [[0, 0]] * 3
        assert listener.evaluations[0][1]["added"]["b"].tolist() == [1] * 6


def test_one_call_or_two_is_the_same_guidance() -> None:
    z = states(1.0)

    class Stubborn(ByClass):
        def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
            assert len(z) == 8
            return super().forward(z, sigma, label=cond["label"] if cond["mode"] == "on" else torch.full((8,), 3))

    together = cfg(ByClass(), 2.0, NULL)(z, 1.0, label=LABELS)
    apart = cfg(Stubborn(), 2.0, {"mode": "off"})(z, 1.0, label=LABELS, mode="on")
    torch.testing.assert_close(together.eps, apart.eps, rtol=1e-12, atol=1e-12)


# rescale


@pytest.mark.parametrize("sigma", LEVELS)
def test_rescale_brings_back_the_standard_deviation(sigma: float) -> None:
    model, z = ByClass(), states(sigma)
    alpha, s = alpha_s(sigma)
    plain = cfg(model, 4.0, NULL)(z, sigma, label=LABELS)
    whole = cfg(model, 4.0, NULL, rescale=1.0)(z, sigma, label=LABELS)
    target = model(z, sigma, label=LABELS).x0.std(1)
    torch.testing.assert_close(whole.x0.std(1), target, rtol=1e-12, atol=1e-14)
    some = cfg(model, 4.0, NULL, rescale=0.7)(z, sigma, label=LABELS)
    torch.testing.assert_close(some.x0, 0.7 * whole.x0 + 0.3 * plain.x0, rtol=1e-12, atol=1e-14)
    for estimate in (whole, some):
        torch.testing.assert_close(alpha * estimate.x0 + s * estimate.eps, z, rtol=1e-12, atol=1e-12)
    none = cfg(model, 4.0, NULL, rescale=0.0)(z, sigma, label=LABELS)
    assert torch.equal(none.x0, plain.x0)


def test_rescale_is_that_of_diffusers_on_the_same_output() -> None:
    module = pytest.importorskip("diffusers.guiders.guider_utils")
    model, z, null = ByClass(), states(1.0), torch.full_like(LABELS, 3)
    cond, uncond = model(z, 1.0, label=LABELS).x0, model(z, 1.0, label=null).x0
    expected = module.rescale_noise_cfg(uncond + 5.0 * (cond - uncond), cond, guidance_rescale=0.7)
    actual = cfg(model, 5.0, NULL, rescale=0.7)(z, 1.0, label=LABELS).x0
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# CFG++


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_a_cfgpp_step_renoises_the_guided_sample_with_the_unconditional_noise(lam: float) -> None:
    model, noise, null = ByClass(), randn(8, 2), torch.full_like(LABELS, 3)
    z = noise
    for sigma, target in pairwise(GRID):
        alpha, s = alpha_s(target)
        cond, uncond = model(z, sigma, label=LABELS), model(z, sigma, label=null)
        z = alpha * (uncond.x0 + lam * (cond.x0 - uncond.x0)) + s * uncond.eps
    actual = sample(cfgpp(model, lam, NULL), solvers.ddim(GRID), noise=noise, cond={"label": LABELS})
    torch.testing.assert_close(actual, z, rtol=1e-10, atol=1e-10)


def test_cfgpp_without_weight_is_the_unconditional_model() -> None:
    noise, null = randn(8, 2), torch.full_like(LABELS, 3)
    for plan in (solvers.ddim(GRID), solvers.ge(GRID), solvers.ge(GRID, 1.5, basis="x0"), solvers.ddpm(GRID)):
        a = sample(cfgpp(ByClass(), 0.0, NULL), plan, noise=noise, cond={"label": LABELS}, generator=generator())
        b = sample(ByClass(), plan, noise=noise, cond={"label": null}, generator=generator())
        assert torch.equal(a, b)


def test_a_cfgpp_step_is_a_cfg_step_of_larger_scale() -> None:
    """By DDIM: lambda of CFG++ is scale lambda sigma/(sigma - sigma') of CFG (equal at the last step, to sigma 0)."""
    model, lam = ByClass(), 0.6
    for sigma, target in ((3.0, 2.0), (1.0, 0.25), (0.5, 0.0)):
        z, plan = states(sigma), solvers.ddim((sigma, target))
        actual = sample(cfgpp(model, lam, NULL), plan, noise=z, cond={"label": LABELS})
        expected = sample(cfg(model, lam * sigma / (sigma - target), NULL), plan, noise=z, cond={"label": LABELS})
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_gradient_estimation_with_cfgpp_is_comfyuis() -> None:
    """y' = x0_guided + sigma' d + (gamma - 1)(sigma' - sigma)(d - d_previous), d the unconditional noise."""
    model, noise, null, gamma = ByClass(), randn(8, 2), torch.full_like(LABELS, 3), 2.0
    y, previous = noise * math.hypot(1, GRID[0]), None
    for sigma, target in pairwise(GRID):
        z = y / math.hypot(1, sigma)
        cond, uncond = model(z, sigma, label=LABELS), model(z, sigma, label=null)
        denoised = uncond.x0 + 0.5 * (cond.x0 - uncond.x0)
        d = (y - uncond.x0) / sigma
        y = denoised + d * target
        if previous is not None and target > 0:
            y = y + (gamma - 1) * (d - previous) * (target - sigma)
        previous = d
    actual = sample(cfgpp(model, 0.5, NULL), solvers.ge(GRID, gamma), noise=noise, cond={"label": LABELS})
    torch.testing.assert_close(actual, y, rtol=1e-9, atol=1e-9)


def test_cfgpp_has_no_trajectory_and_no_batched_levels() -> None:
    guided, z = cfgpp(ByClass(), 0.5, NULL), randn(8, 2)
    with pytest.raises(ValueError, match="moves the state"):
        heun(guided, GRID, noise=z, cond={"label": LABELS})
    with pytest.raises(ValueError, match="moves the state"):
        solve(guided, 10.0, 0.1, z, cond={"label": LABELS})
    with pytest.raises(ValueError, match="one sigma for the batch"):
        guided(z, torch.ones(8, dtype=F64), label=LABELS)
    assert [guided.cost(1.0), cfgpp(ByClass(), 1.0, NULL).cost(1.0), cfgpp(ByClass(), 0.0, NULL).cost(1.0)] == [2, 2, 1]


# everything downstream


@pytest.mark.parametrize("kind", ["cfg", "rescaled", "cfgpp"])
def test_a_guided_run_compiles_as_one_graph(kind: str) -> None:
    class Network(nn.Module):
        def forward(self, z: Tensor, level: Tensor, label: Tensor) -> Tensor:
            return torch.tanh(z + level[:, None] / 10 + label[:, None])

    raw, noise, cond = NetworkDenoiser(Network(), V(), shape=(2,)), randn(8, 2), {"label": LABELS}
    guided = {
        "cfg": cfg(raw, 2.0, NULL, interval=(0.1, 5.0)),
        "rescaled": cfg(raw, 2.0, NULL, rescale=0.7),
        "cfgpp": cfgpp(raw, 0.5, NULL),
    }[kind]
    plan = solvers.ge(grids.log_linear(4, 30.0, 0.02))
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: sample(guided, plan, noise=z, cond=cond), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(noise), sample(guided, plan, noise=noise, cond=cond))


def test_samplers_take_guided_denoisers_as_any_other() -> None:
    noise, cond = randn(64, 2), {"label": torch.arange(64) % 3}
    counted = Counted(ByClass())
    guided = cfg(counted, 1.5, NULL)
    exact = solve(guided, 30.0, 0.02, noise, rtol=1e-9, atol=1e-9, cond=cond)
    assert exact.evaluations == 2 * counted.evaluations
    coarse = sample(guided, solvers.ge(grids.log_linear(160, 30.0, 0.02, last="min"), 1.5), noise=noise, cond=cond)
    fine = heun(guided, grids.log_linear(160, 30.0, 0.02, last="min"), noise=noise, cond=cond)
    assert float((coarse - exact.z).square().mean().sqrt()) < 0.01
    assert float((fine - exact.z).square().mean().sqrt()) < 0.01
    steps: list[Step] = []
    sample(guided, solvers.ddim(GRID), noise=noise, cond=cond, callback=steps.append)
    assert len(steps) == 10


def test_guidance_sharpens_classes() -> None:
    """More guidance, fewer samples nearer to another class."""
    model, cond = ByClass(), {"label": torch.zeros(2000, dtype=torch.long)}
    z = randn(2000, 2)
    strays = []
    for scale in (0.0, 1.0, 3.0):
        x = sample(cfg(model, scale, NULL), solvers.ge(GRID, 1.5), noise=z, cond=cond)
        own = model.parts[0].log_density(x, 0.02)
        others = torch.stack([model.parts[k].log_density(x, 0.02) for k in (1, 2)]).amax(0)
        strays.append(float((others > own).double().mean()))
    assert strays[0] > 0.3 > 0.1 > strays[1] >= strays[2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: cfg(m, math.nan, NULL), "scale = nan: must be finite; 1 is no guidance"),
        (lambda m: cfg(m, 2.0, NULL, interval=(2.0, 1.0)), r"interval = \(2.0, 1.0\): give \(low, high\)"),
        (lambda m: cfg(m, 2.0, NULL, interval=(-1.0, 1.0)), "interval = "),
        (lambda m: cfg(m, 2.0, NULL, rescale=1.5), r"rescale = 1.5: must be in \[0, 1\]"),
        (lambda m: cfgpp(m, math.inf, NULL), "scale = inf"),
        (lambda m: autoguidance(m, GaussianMixture([1.0], [[0.0]], [[[1.0]]]), 2.0), r"shape \(1,\), the model \(2,\)"),
    ],
)
def test_what_guidance_refuses(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(ByClass())


def test_guidance_knows_no_more_of_pure_noise_than_its_models() -> None:
    eps, v = network(Eps()), network(V())
    for guided in (cfg(eps, 2.0, NULL), cfgpp(eps, 0.5, NULL), autoguidance(v, eps, 2.0), autoguidance(eps, v, 2.0)):
        assert not guided.finite_at_inf
        with pytest.raises(ValueError, match="zero terminal SNR"):
            sample(guided, solvers.ddim((math.inf, 1.0)), noise=randn(8, 2), cond={"label": LABELS})
    flow = NetworkDenoiser(Listener(), Flow(), shape=(2,))
    for guided in (cfg(flow, 2.0, NULL), cfgpp(flow, 0.5, NULL), autoguidance(flow, flow, 2.0)):
        out = sample(guided, solvers.ge(grids.flow(4)), noise=randn(8, 2), cond={"label": LABELS})
        assert out.isfinite().all()


def test_ranges_that_do_not_meet_are_refused() -> None:
    bad = ByClass()
    good = ByClass()
    bad.trained_range, good.trained_range = (0.0, 1.0), (2.0, 3.0)
    with pytest.raises(ValueError, match="the two ranges must overlap"):
        autoguidance(good, bad, 2.0)


@pytest.mark.parametrize("guide", [cfg, cfgpp, lambda d, scale, null: autoguidance(d, d, scale)])
def test_guided_denoisers_have_the_codec_of_what_they_guide(guide):
    model = network()
    with pytest.raises(ValueError, match="no pixel codec"):
        guide(model, 2.0, NULL).decode(torch.zeros(1, 2))
    model.pixels = Pixels(17)
    guided = guide(model, 2.0, NULL)
    stored = torch.randint(17, (5, 2), generator=generator(), dtype=torch.uint8)
    assert guided.pixels == Pixels(17)
    assert torch.equal(guided.encode(stored), model.encode(stored))
    assert torch.equal(guided.decode(guided.encode(stored)), stored)


@pytest.mark.parametrize("interval", [None, (0.5, 2.0)])
def test_a_batch_of_scales_is_each_sample_under_its_own(interval):
    model, z, scales = ByClass(), randn(4, 2, seed=3), torch.tensor([0.0, 1.0, 2.5, 7.0], dtype=F64)
    each = cfg(model, None, NULL, interval)
    for sigma in (1.0, 3.0, torch.tensor([1.0, 3.0, 1.5, 0.2], dtype=F64)):
        together = each(z, sigma, label=LABELS[:4], guidance_scale=scales)
        for i in range(4):
            level = sigma if isinstance(sigma, float) else float(sigma[i])
            alone = cfg(model, float(scales[i]), NULL, interval)(z[i : i + 1], level, label=LABELS[i : i + 1])
            for name in ("x0", "eps"):
                assert torch.allclose(getattr(together, name)[i], getattr(alone, name)[0], atol=1e-12)
    assert (each.cost(1.0), each.cost(3.0)) == (2, 2 if interval is None else 1)
    plan = solvers.ddim(grids.log_linear(3, 5.0, 0.1))
    with pytest.raises(ValueError, match="give the condition guidance_scale="):
        sample(each, plan, noise=z, cond={"label": LABELS[:4]})
    ends = sample(each, plan, noise=z, cond={"label": LABELS[:4], "guidance_scale": scales}, chunk=3)
    own = sample(cfg(model, 7.0, NULL, interval), plan, noise=z[3:], cond={"label": LABELS[3:4]})
    assert torch.allclose(ends[3:], own, atol=1e-12)
