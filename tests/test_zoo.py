"""The zoo: published models load offline by name, and are what their cards say."""

import math

import pytest
import torch

import logsnr as ls
from logsnr import zoo
from logsnr.calibration.ledger import fingerprint
from logsnr.errors import LogsnrError
from logsnr.sampling.counted import rmse
from logsnr.training.config import DataConfig
from logsnr.training.data import load_data

MODELS = zoo.names()


def test_there_are_models():
    assert MODELS == ["digits", "fashion-mnist", "fashion-mnist-classes"]


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(
        LogsnrError,
        match=r"'zoo:digts' is not one of zoo:digits, zoo:fashion-mnist, .*: did you mean 'zoo:digits'\?",
    ):
        ls.load("zoo:digts")


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_half_precision_and_small(name):
    (path,) = (zoo.FOLDER / name).glob("*.safetensors")
    assert path.stat().st_size <= 6e6
    denoiser = ls.load(f"zoo:{name}")
    parameters = sum(p.numel() for p in denoiser.parameters())
    assert path.stat().st_size < 2.2 * parameters
    assert all(torch.equal(p, p.half().float()) for p in denoiser.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_cards_say_how_the_model_was_made_and_what_it_does(name):
    card = ls.load(f"zoo:{name}").card
    assert card["training"]["steps"] == card["step"]
    assert "/" not in card["training"]["data"]["source"]
    measured = card["measured"]
    assert 0 < measured["bound"]["stderr"] < 0.05 * measured["bound"]["bits_per_dim"]
    text = (zoo.FOLDER / name / "README.md").read_text()
    for fact in (f"{measured['bound']['bits_per_dim']:.3f}", measured["machine"], f"zoo:{name}", str(card["step"])):
        assert fact in text


def test_the_bound_on_the_card_needs_no_telling():
    """The codec comes with the model: read as 8-bit images, its 17 grey levels cost 10.40 bits/dim."""
    denoiser, data = ls.load("zoo:digits"), load_data(DataConfig())
    found = ls.bits_per_dim(
        denoiser,
        data.test_images[:160],
        cond={"class_labels": data.test_labels[:160]},
        generator=torch.Generator().manual_seed(1),
        evaluations_per_image=8,
    )
    card = denoiser.card["measured"]["bound"]
    assert found.stderr < 0.03
    assert abs(found.bits_per_dim - card["given_label"]) < 4 * math.hypot(found.stderr, card["given_label_stderr"])


@pytest.mark.parametrize("name", MODELS)
def test_plans_belong_to_the_weights(name):
    plans, denoiser = ls.load_plans(f"zoo:{name}"), ls.load(f"zoo:{name}")
    assert set(plans) == {4, 5, 6, 8, 10}
    low, high = denoiser.sampling_range
    for nfe, plan in plans.items():
        assert plan.nfe == nfe
        assert plan.meta["model"] == fingerprint(denoiser)
        assert low * (1 - 1e-9) <= min(s for s in plan.sigmas if s > 0)
        assert plan.sigmas[0] <= high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("digits", 24),
        pytest.param("fashion-mnist", 12, marks=pytest.mark.heavy),
        pytest.param("fashion-mnist-classes", 10, marks=pytest.mark.heavy),
    ],
)
def test_plans_beat_gradient_estimation(name, count):
    """End-point RMSE from fresh noise, classes in turn, against 32 UniPC steps."""
    denoiser, plans = ls.load(f"zoo:{name}"), ls.load_plans(f"zoo:{name}")
    low, high = denoiser.sampling_range
    noise = torch.randn(count, *denoiser.shape, generator=torch.Generator().manual_seed(99))
    cond = {"class_labels": torch.arange(count) % 10} if denoiser.card["classes"] else {}
    teacher = ls.sample(denoiser, ls.solvers.unipc(ls.grids.log_linear(32, high, low), 3), noise=noise, cond=cond)
    for nfe in (5, 8):
        stock = ls.solvers.ge(ls.grids.log_linear(nfe, high, low), gamma=2.0)
        own, ge = (rmse(ls.sample(denoiser, p, noise=noise, cond=cond), teacher) for p in (plans[nfe], stock))
        assert own < 0.8 * ge
