"""The coordinate: conversions, both ends, broadcasting."""

from __future__ import annotations

import math

import pytest
import torch

from logsnr import noise

LOGSNR = torch.linspace(-40, 40, 161, dtype=torch.float64)


def test_amplitudes_are_the_sigmoids_of_logsnr() -> None:
    alpha, s = noise.alpha_s(noise.sigma_from_logsnr(LOGSNR))
    torch.testing.assert_close(alpha**2, torch.sigmoid(LOGSNR), rtol=1e-13, atol=0)
    torch.testing.assert_close(s**2, torch.sigmoid(-LOGSNR), rtol=1e-13, atol=0)
    direct = noise.alpha_s_from_logsnr(LOGSNR)
    torch.testing.assert_close(direct, (alpha, s), rtol=1e-13, atol=0)


def test_float32_keeps_relative_accuracy_of_the_small_amplitude() -> None:
    exact = noise.alpha_s(noise.sigma_from_logsnr(LOGSNR))
    single = noise.alpha_s(noise.sigma_from_logsnr(LOGSNR).float())
    for a, b in zip(single, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-7, atol=0)


def test_logsnr_and_sigma_are_inverse() -> None:
    torch.testing.assert_close(noise.logsnr_from_sigma(noise.sigma_from_logsnr(LOGSNR)), LOGSNR, rtol=1e-14, atol=1e-15)
    for value in (-30.0, 0.0, 12.5):
        assert noise.logsnr_from_sigma(noise.sigma_from_logsnr(value)) == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize("sigma", [0.0, 1e-300, 1e-3, 0.7, 1.0, 157.0, 1e300, math.inf])
def test_floats_and_tensors_agree_at_every_level(sigma: float) -> None:
    tensor = torch.tensor(sigma, dtype=torch.float64)
    assert list(noise.alpha_s(sigma)) == pytest.approx([float(v) for v in noise.alpha_s(tensor)], rel=1e-15, abs=0)
    assert noise.logsnr_from_sigma(sigma) == pytest.approx(float(noise.logsnr_from_sigma(tensor)), rel=1e-15)
    assert noise.flow_time(sigma) == pytest.approx(float(noise.flow_time(tensor)), rel=1e-15)


def test_the_two_ends_are_exact() -> None:
    for kind in (float, lambda v: torch.tensor(v, dtype=torch.float64)):
        clean, pure = kind(0.0), kind(math.inf)
        assert [float(v) for v in noise.alpha_s(clean)] == [1, 0]
        assert [float(v) for v in noise.alpha_s(pure)] == [0, 1]
        assert float(noise.logsnr_from_sigma(clean)) == math.inf
        assert float(noise.logsnr_from_sigma(pure)) == -math.inf
        assert float(noise.sigma_from_logsnr(kind(math.inf))) == 0
        assert float(noise.sigma_from_logsnr(kind(-math.inf))) == math.inf
        assert float(noise.flow_time(clean)) == 0
        assert float(noise.flow_time(pure)) == 1
        assert float(noise.sigma_from_flow_time(kind(1.0))) == math.inf


@pytest.mark.parametrize("path", noise.PATHS)
def test_path_scales_turn_z_into_the_papers_states(path: str) -> None:
    """k alpha and k s are the signal and noise amplitudes that each path is known by."""
    sigma = noise.sigma_from_logsnr(LOGSNR[40:-40])
    alpha, s = noise.alpha_s(sigma)
    k = noise.path_scale(path, alpha, s)  # type: ignore[arg-type]
    t = sigma / (1 + sigma)
    signal, amplitude = {"vp": (alpha, s), "ve": (torch.ones_like(s), sigma), "flow": (1 - t, t)}[path]
    torch.testing.assert_close(k * alpha, signal, rtol=1e-12, atol=0)
    torch.testing.assert_close(k * s, amplitude, rtol=1e-12, atol=0)
    assert noise.path_scale(path, 0.6, 0.8) == pytest.approx({"vp": 1, "ve": 1 / 0.6, "flow": 1 / 1.4}[path])  # type: ignore[arg-type]


def test_flow_time_round_trip() -> None:
    t = torch.linspace(0, 0.999, 100, dtype=torch.float64)
    torch.testing.assert_close(noise.flow_time(noise.sigma_from_flow_time(t)), t, rtol=1e-13, atol=0)


def test_per_sample_levels_scale_their_own_sample() -> None:
    z = torch.ones(3, 2, 2)
    levels = torch.tensor([1.0, 2.0, 3.0])
    assert (noise.per_sample(levels, z) * z).sum((1, 2)).tolist() == [4, 8, 12]
    assert noise.per_sample(2.5, z) == 2.5
    assert (noise.per_sample(torch.tensor([2.0]), z) * z).sum().item() == 24
    with pytest.raises(ValueError, match=r"shape \(2,\) does not fit a batch of 3"):
        noise.per_sample(levels[:2], z)
    with pytest.raises(ValueError, match="does not fit"):
        noise.per_sample(levels[:, None], z)
