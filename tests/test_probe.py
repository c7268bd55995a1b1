"""The probe: exact denoisers are of use everywhere, and a fault of known size is found where it begins to matter."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logsnr as ls
from logsnr.denoiser import Around, Denoiser, Estimate
from logsnr.exact import Gaussian, GaussianMixture
from logsnr.sampling.counted import Counted
from logsnr.sampling.default import auto_plan

D = 64
FLAT = Gaussian(0.4 * torch.ones(D), torch.diag(torch.cat([2 * torch.ones(D // 2), torch.zeros(D // 2)])))
"""Half of the directions hold all variance: at faint noise an ideal denoiser's eps is off by half of its squares."""


class Faulty(Around):
    """A denoiser whose x0 is off by `fault(sigma)` per number, in a direction that depends on the state."""

    def __init__(self, denoiser: Denoiser, fault: Callable[[float], float]) -> None:
        super().__init__(denoiser)
        self.fault = fault

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        level = float(torch.as_tensor(sigma).reshape(-1)[0])
        exact = self.denoiser(z, sigma, **cond)
        off = self.fault(level) * torch.sign(torch.sin(1e4 * z))
        return Estimate(exact.x0 + off, exact.eps - off / level)


def far(a: float, b: float) -> float:
    return max(a / b, b / a)


@pytest.mark.parametrize(
    "model",
    [
        FLAT,
        Gaussian(torch.tensor([3.0, -1.0]), torch.tensor([[1.0, 0.5], [0.5, 0.5]])),
        GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [[[0.04, 0.0], [0.0, 0.04]]] * 2),
    ],
    ids=["half-flat", "gaussian", "mixture"],
)
def test_an_exact_denoiser_is_of_use_everywhere(model):
    for seed in range(4):
        counted = Counted(model)
        found = ls.probe(counted, seed=seed)
        assert found.sigma_range == found.inside == model.sampling_range
        assert found.evaluations == counted.passes == 12 * 15
        assert all(level.good for level in found.evidence)
    low, high = model.sampling_range
    assert repr(found) == f"Probe(all of sigma {low:.3g} ... {high:.3g}, 180 evaluations, seed 3)"
    assert ls.probe(model, seed=3) == found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("off", [0.02, 0.1, 0.3])
def test_an_eps_network_that_is_off_is_of_use_to_sigma_data_over_it(off, seed):
    """eps off by `off` is x0 off by off sigma: as much as the data vary, at sigma = sigma_data / off."""
    counted = Counted(Faulty(FLAT, lambda sigma: off * sigma))
    found = ls.probe(counted, seed=seed)
    assert far(found.high, FLAT.sigma_data / off) < 1.5
    assert found.low == found.inside[0]
    assert found.evaluations == counted.passes <= 400


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("off", [0.01, 0.04, 0.2])
def test_an_x0_that_is_off_is_of_use_down_to_that_noise(off, seed):
    """|eps_hat - eps|^2 / |eps|^2 = 1/2 + c (off / sigma)^2, c between 1 and 2 as the samples are off too.

    That is 1.1 between sigma = 1.3 off and 1.8 off.
    """
    found = ls.probe(Faulty(FLAT, lambda sigma: off), seed=seed)
    assert far(found.low, 1.54 * off) < 1.5
    assert found.high == found.inside[1]
    for level in found.evidence:
        if level.end == "low" and level.sigma < min(off, FLAT.sigma_data / 4):
            assert 0.8 < (level.error - 0.5) / (off / level.sigma) ** 2 < 2.2


@pytest.mark.parametrize("edge", [3.0, 20.0, 90.0])
def test_the_levels_that_a_network_never_saw_are_left_out(edge):
    """Nonsense as long as ten data above a level, and nonsense of half a standard deviation below another."""
    wide = Faulty(FLAT, lambda sigma: 10.0 if sigma > edge else 0.5 if sigma < 0.1 else 0.0)
    found = ls.probe(wide)
    assert 1 <= edge / found.high < 1.5
    assert 1 <= found.low / 0.1 < 1.5
    assert found.evaluations <= 400
    assert [level.sigma for level in found.evidence] == sorted((e.sigma for e in found.evidence), reverse=True)


def test_calibrate_stays_where_the_probe_says(monkeypatch):
    model = Faulty(FLAT, lambda sigma: 0.1 * sigma)

    def trial(denoiser, settings, *args, **kwargs):
        raise RuntimeError(settings.sigma_range)

    monkeypatch.setattr(importlib.import_module("logsnr.calibration.run"), "Trial", trial)
    with pytest.raises(RuntimeError) as stop:
        ls.calibrate(model, 4, sigma_range="probe", seed=5)
    assert stop.value.args[0] == ls.probe(model, seed=5).sigma_range != model.sampling_range


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ls.probe(FLAT, sigma_range=(1.0, 0.1)), "needs 0 < smallest < largest"),
        (lambda: ls.probe(Faulty(FLAT, lambda sigma: 30.0)), "no level of sigma .* is it trained"),
        (lambda: ls.probe(Faulty(FLAT, lambda sigma: math.nan)), "samples from sigma .* are not finite"),
        (lambda: ls.probe(FLAT, cond={"a": torch.zeros(2), "b": torch.zeros(3)}), "different numbers of rows"),
        (lambda: ls.calibrate(FLAT, 4, sigma_range="prob"), "did you mean 'probe'"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ls.LogsnrError, match=message):
        call()


def test_the_command_line_takes_the_range_that_it_finds(run, tmp_path):
    code, out, _ = run("probe", "zoo:digits", "--json")
    assert code == 0
    found = json.loads(out)
    expected = ls.probe(ls.load("zoo:digits"), cond={"class_labels": torch.arange(12) % 10})
    assert (found["low"], found["high"]) == expected.sigma_range
    assert expected.sigma_range == expected.inside
    where = tmp_path / "x.npy"
    code, out, err = run("sample", "zoo:digits", "--nfe", 3, "-n", 2, "--range", "probe", "--out", where, "--json")
    assert code == 0, err
    unit = ls.load("zoo:digits").sigma_data
    visited = auto_plan(3, *expected.sigma_range, sigma_data=unit).sigmas[:-1]
    assert json.loads(out)["sigmas"] == pytest.approx([visited[0], visited[-1]])
    code, out, err = run("sample", "zoo:digits", "--nfe", 3, "-n", 2, "--range", "0.1,9", "--out", where, "--json")
    visited = auto_plan(3, 0.1, 9.0, sigma_data=unit).sigmas[:-1]
    assert json.loads(out)["sigmas"] == pytest.approx([9, visited[-1]])
    for wrong, message in (("low", "give probe, or two levels"), ("1,900", "within the model's 0.01832 ... 54.6")):
        code, _, err = run("calibrate", "zoo:digits", "--range", wrong)
        assert code == 2
        assert message in err
