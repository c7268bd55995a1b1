"""Passports of trained networks: the zoo's, and one trained here; each has the findings of its fault and no others.

zoo:digits has none on the digits that it was trained on, so that is where its labels are put off.  The others are
judged on held-out digits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import logsnr as ls
from logsnr import zoo
from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.passport import Passport, examine, labels
from logsnr.predictions import LABELS
from logsnr.training import Dataset, load_data, load_recipe, train
from logsnr.training.config import DataConfig

FEW = {"images": 64, "trajectories": 2, "levels": 5}


# Findings of these faults rest on the loss; what else is measured is there to raise no other.
pytestmark = pytest.mark.usefixtures("short_passports")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data(DataConfig())


def trained(folder, logsnr: tuple[float, float], steps: int) -> NetworkDenoiser:
    """The digits recipe with a quarter of its network, in fewer and smaller steps."""
    recipe = load_recipe("digits", {
        "objective.logsnr": list(logsnr), "steps": steps, "batch": 64, "network.channels": [32],
        "optimizer.lr": 3e-3, "optimizer.warmup": 20, "ema.decay": 0.96, "samples.every": 0, "max_seconds": None,
    })  # fmt: skip
    train(recipe, folder, progress=False)
    denoiser = ls.load(folder)
    assert isinstance(denoiser, NetworkDenoiser)
    return denoiser


def told(denoiser: NetworkDenoiser, c: float = 1.0, high: float = math.inf) -> NetworkDenoiser:
    """The same network, its label made of c sigma, declared up to no more than `high`."""
    prediction = denoiser.prediction
    label = LABELS[prediction.label] if isinstance(prediction.label, str) else prediction.label
    low, top = denoiser.trained_range
    return NetworkDenoiser(
        denoiser.network,
        replace(prediction, label=lambda sigma: label(c * sigma)),
        shape=denoiser.shape,
        pixels=denoiser.pixels,
        sigma_data=denoiser.sigma_data,
        trained_range=(low, min(top, high)),
    )


def held_out(denoiser: NetworkDenoiser, data: Dataset) -> tuple[Tensor, dict[str, Tensor]]:
    assert data.test_labels is not None
    return denoiser.encode(data.test_images), {"class_labels": data.test_labels}


def kinds(passport: Passport) -> list[str]:
    return [f.kind for f in passport.troubles]


@pytest.mark.heavy
def test_an_overfitted_network_is_not_taken_for_one_with_wrong_labels(digits, monkeypatch):
    """The zoo's digits model saw each of 1,500 digits 200 times: right about them, too sure about others."""
    model = ls.load("zoo:digits")
    monkeypatch.setattr(labels, "LEVELS", 6)
    x, cond = held_out(model, digits)
    passport = examine(model, x, cond=cond, **{**FEW, "images": 128})
    assert kinds(passport) == ["misfit"]
    scan = passport.labels
    by_sigma = dict(zip(scan.sigmas, scan.per_level, strict=True))
    assert max(by_sigma.values()) > 1.2  # where detail decides
    assert all(abs(c - 1) < 0.05 for sigma, c in by_sigma.items() if sigma > 0.8)


@pytest.mark.heavy
@pytest.mark.parametrize("c", [1.1, 0.9])
def test_a_trained_network_whose_label_is_off_by_ten_percent(digits, c):
    model = told(ls.load("zoo:digits"), c)
    x = model.encode(digits.train_images[:297])
    passport = examine(model, x, cond={"class_labels": digits.train_labels[:297]}, **FEW)
    assert kinds(passport) == ["labels"], [f.text for f in passport.troubles]
    scan = passport.labels
    assert scan.way == "label"
    assert math.log(scan.factor / c) == pytest.approx(0, abs=3 * scan.stderr)
    assert passport.finding("labels").value == scan.factor
    # judged with its labels put right, it is usable everywhere
    assert passport.sampling_range == passport.declared_range


@pytest.mark.heavy
def test_a_network_of_too_short_a_range(digits):
    """Good up to sigma e, and no further."""
    short = told(ls.load("zoo:digits"), high=math.e)
    x, cond = short.encode(digits.train_images[:297]), {"class_labels": digits.train_labels[:297]}
    passport = examine(short, x, cond=cond, **{**FEW, "trajectories": 16})
    assert kinds(passport) == ["short"], [f.text for f in passport.troubles]
    (found,) = passport.troubles
    assert found.sigmas == pytest.approx((math.e, math.e))
    assert found.severity == "error"
    # KL(N(alpha m, alpha^2 C + s^2) || N(0, 1)) of the digits' own moments
    flat = x.double().flatten(1)
    alpha = 1 / math.hypot(1, math.e)
    eigenvalues = 1 + alpha**2 * (torch.linalg.eigvalsh(flat.T.cov()) - 1)
    kl = 0.5 * float((eigenvalues - 1 - eigenvalues.log()).sum() + alpha**2 * flat.mean(0).square().sum())
    assert found.value == passport.start.kl == pytest.approx(kl, rel=0.15)


@pytest.mark.heavy
def test_a_network_that_was_hardly_trained(tmp_path, digits):
    model = trained(tmp_path, (-8.0, 8.0), 8)
    x, cond = held_out(model, digits)
    passport = examine(model, x, cond=cond, **FEW)
    assert kinds(passport) == ["undertrained"], [f.text for f in passport.troubles]
    assert passport.troubles[0].severity == "error"


@pytest.mark.parametrize(
    "name", [name if name == "digits" else pytest.param(name, marks=pytest.mark.heavy) for name in zoo.names()]
)
def test_models_of_the_zoo_have_no_trouble_with_what_they_draw(name):
    """Their data need not be at hand: each draws its own samples, all classes in turn."""
    model = ls.load(f"zoo:{name}")
    classes = model.card["classes"]
    cond = {"class_labels": torch.arange(classes)} if classes else None
    passport = examine(model, cond=cond, **{**FEW, "images": 32})
    assert passport.source == "model"
    assert kinds(passport) == [], [f.text for f in passport.troubles]
    assert passport.sampling_range == passport.declared_range == model.sampling_range
