"""Learning rates, optimizers of torch by name, and averages of several half-lives: closed forms and exact resume."""

from __future__ import annotations

import math

import pytest
import torch

import logsnr as ls
from logsnr.errors import LogsnrError
from logsnr.files import read_pair
from logsnr.training import load_data, recipe_from, train
from logsnr.training.config import DataConfig, OptimizerConfig
from logsnr.training.optimizers import build_optimizer, learning_rate
from logsnr.training.processes import own_accelerator
from logsnr.training.run import Run

NETWORK = {"channels": [8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4}


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig())


def recipe(**changes):
    base = {"network": NETWORK, "samples": {"every": 0}, "batch": 8, "steps": 6, "device": "cpu", "checkpoint_every": 3}
    return recipe_from({**base, **changes})


def rates(n, **options):
    return [learning_rate(OptimizerConfig(lr=2.0, **options), step, n) for step in range(n)]


def test_learning_rates_are_their_closed_forms():
    warm = [min(1, (n + 1) / 10) for n in range(100)]
    forms = {
        "constant": lambda n: 1,
        "linear": lambda n: 1 - n / 100,
        "cosine": lambda n: (1 + math.cos(math.pi * n / 100)) / 2,
        "inverse-sqrt": lambda n: min(1, (10 / (n + 1)) ** 0.5),
    }
    for decay, form in forms.items():
        expected = [2 * w * form(n) for n, w in enumerate(warm)]
        assert rates(100, warmup=10, decay=decay) == pytest.approx(expected, rel=1e-14), decay
    # EDM2's: constant up to t_ref, then its square root; it halves from t to 4 t.
    later = rates(400, warmup=0, decay="inverse-sqrt", after=50)
    assert later[:50] == [2.0] * 50
    assert later[399] == pytest.approx(later[99] / 2, rel=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"decay": "cosine"}, "steps": None, "max_seconds": 1}, r"'cosine' falls to zero .* give steps"),
        ({"optimizer": {"decay": "linear", "after": 4}}, r"after = 4 is of decay: inverse-sqrt"),
        ({"optimizer": {"name": "torch.optim:SGD", "betas": [0.9, 0.95]}}, r"betas is of adamw: .* under settings"),
        ({"optimizer": {"settings": {"momentum": 0.9}}}, r"settings are of other optimizers"),
        ({"ema": {"decay": 0.9, "half_life": 100}}, r"half_life = 100 stands in place of decay"),
        ({"ema": {"others": {"../x": 10}}}, r"ema.others"),
        ({"ema": {"others": {"x": 0}}}, r"ema.others.x = 0: input should be greater than 0"),
    ],
)
def test_recipes_that_contradict_themselves(changes, message):
    with pytest.raises(LogsnrError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "torch.optim:Adm"}, r"optimizer.name 'torch.optim:Adm' .*did you mean 'torch.optim:Adam'"),
        ({"name": "os:system"}, r"optimizer.name 'os:system' is not one of"),
        ({"name": "torch.optim:Optimizer"}, r"is not one of"),
        ({"name": "torch.optim:LBFGS"}, r"is not one of"),
        ({"name": "torch.optim:SGD", "settings": {"momentun": 0.9}}, r"momentun.* did you mean 'momentum'"),
        ({"name": "torch.optim:SGD", "settings": {"lr": 0.9}}, r"setting of optimizer torch.optim:SGD 'lr' is not one"),
        ({"name": "torch.optim:SGD", "settings": {"momentum": -1}}, r"Invalid momentum value"),
    ],
)  # fmt: skip
def test_optimizers_that_are_none(options, message):
    with pytest.raises(LogsnrError, match=message) as caught:
        build_optimizer(OptimizerConfig(**options), [{"params": [torch.zeros(2, requires_grad=True)]}], fused=False)
    assert "\n" not in str(caught.value)


def tensors(out):
    return read_pair(out / "state", "state")[1]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("Adam", {"betas": [0.8, 0.9], "weight_decay": 0.1}),
        ("RMSprop", {}),
    ],
)
def test_a_run_by_any_optimizer_is_that_of_the_class_and_resumes_exactly(tmp_path, digits, name, settings):
    options = {"name": f"torch.optim:{name}", "settings": settings, "lr": 1e-3, "warmup": 0}
    with own_accelerator():
        run = Run(recipe(optimizer=options), digits)
        kind, own = type(run.optimizer.optimizer), run.optimizer.param_groups[0]
        assert kind is getattr(torch.optim, name)
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        assert given.items() <= own.items()
    train(recipe(optimizer=options), tmp_path / "whole", data=digits, progress=False)
    train(recipe(optimizer=options, steps=3), tmp_path / "cut", data=digits, progress=False)
    train(recipe(optimizer=options), tmp_path / "cut", resume=True, data=digits, progress=False)
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_averages_of_several_half_lives_are_sums_of_the_weights(digits):
    """a_n = beta a_(n-1) + (1 - beta) theta_n with beta = 2^(-batch/half_life), for each on its own."""
    lives = {"short": 16.0, "long": 160.0}
    with own_accelerator():
        run = Run(recipe(ema={"half_life": 40, "ramp": False, "others": lives}), digits)
        theta = [torch.cat([p.detach().flatten() for p in run.parameters]).double()]
        for _ in range(4):
            run.advance()
            theta.append(torch.cat([p.detach().flatten() for p in run.parameters]).double())
        for name, life in {"": 40.0, **lives}.items():
            beta = 2 ** (-8 / life)
            weights = [beta**4, *((1 - beta) * beta ** (4 - k) for k in range(1, 5))]
            expected = sum(w * t for w, t in zip(weights, theta, strict=True))
            average = run.averages.get(name, run.average)
            found = torch.cat([p.flatten() for p in average.network.parameters()])
            torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-7)
    assert 2 ** (-40 / 40) == pytest.approx((2 ** (-8 / 40)) ** 5)  # after 40 images an old weight counts half


def test_other_averages_lie_beside_the_model_and_resume_with_it(tmp_path, digits):
    options = {"ema": {"others": {"short": 2}}, "conditional": True}
    train(recipe(**options), tmp_path / "whole", data=digits, progress=False)
    train(recipe(**options, steps=3), tmp_path / "cut", data=digits, progress=False)
    train(recipe(**options), tmp_path / "cut", resume=True, data=digits, progress=False)
    for place in ("whole", "cut"):
        assert sorted(p.name for p in (tmp_path / place / "averages").iterdir()) == ["short"]
    models = [ls.load(tmp_path / place / "averages" / "short") for place in ("whole", "cut")]
    state, own = models[0].network.state_dict(), ls.load(tmp_path / "whole").network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in models[1].network.state_dict().items())
    assert any(not torch.equal(state[key], own[key]) for key in own)
    assert models[0].card["class_names"] == list("0123456789")
    # A model alone is what it is without the others.
    train(recipe(conditional=True), tmp_path / "alone", data=digits, progress=False)
    alone = ls.load(tmp_path / "alone").network.state_dict()
    assert all(torch.equal(alone[key], own[key]) for key in own)
    train(recipe(conditional=True), tmp_path / "whole", data=digits, progress=False, overwrite=True)
    assert not list((tmp_path / "whole").glob("averages/*/*.json"))
