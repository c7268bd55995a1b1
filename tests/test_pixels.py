"""The codec between stored grey levels and the box."""

from __future__ import annotations

import math

import pytest
import torch

import logsnr as ls
from logsnr.adapters import from_callable
from logsnr.denoiser import NetworkDenoiser
from logsnr.models import UNetConfig, build_network
from logsnr.models.card import save_denoiser
from logsnr.pixels import Pixels
from logsnr.predictions import X0


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_decode_inverts_encode_within_half_a_spacing(levels: int) -> None:
    pixels = Pixels(levels)
    v = torch.arange(levels, dtype=torch.uint8)
    x = pixels.encode(v)
    assert torch.equal(pixels.decode(x), v)
    for nudge in (-0.499, 0.499):
        assert torch.equal(pixels.decode(x + nudge * pixels.spacing), v)


def test_encoding_is_vdms() -> None:
    """2 (v + .5)/256 - 1 (2107.00630, app. A): cell centres, symmetric about 0."""
    v = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(Pixels().encode(v).double(), 2 * (v.double() + 0.5) / 256 - 1, rtol=0, atol=1e-7)
    assert torch.equal(Pixels().encode(v), -Pixels().encode(v).flip(0))


def test_values_outside_the_box_clamp() -> None:
    assert Pixels(17).decode(torch.tensor([-3.0, -1.0, 1.0, 9.0])).tolist() == [0, 0, 16, 16]


def test_display_spans_all_of_8_bits() -> None:
    assert Pixels(17).display(torch.tensor([0, 8, 16], dtype=torch.uint8)).tolist() == [0, 128, 255]
    v = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(Pixels().display(v), v)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="grey_levels = 1"):
        Pixels(1)
    with pytest.raises(ValueError, match="grey_levels = 257"):
        Pixels(257)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        Pixels().encode(torch.zeros(2))
    with pytest.raises(ValueError, match="pixel value 17 with grey_levels = 17"):
        Pixels(17).encode(torch.tensor([17], dtype=torch.uint8))


@pytest.mark.parametrize("box", [(0.0, 1.0), (-0.5, 0.5), (-1.0, 1.0)])
@pytest.mark.parametrize("grey_levels", [2, 17, 256])
def test_other_boxes_hold_the_same_cells(grey_levels, box):
    """Centres lie half a spacing inside the box; every cell decodes to its level, and what lies outside to the ends."""
    pixels, low, high = ls.Pixels(grey_levels, box), *box
    stored = torch.arange(grey_levels, dtype=torch.uint8)
    assert pixels.spacing == pytest.approx((high - low) / grey_levels)
    torch.testing.assert_close(pixels.centres, low + (high - low) * (stored + 0.5) / grey_levels, rtol=0, atol=1e-6)
    assert torch.equal(pixels.decode(pixels.encode(stored)), stored)
    assert pixels.decode(torch.tensor([low - 1, high + 1])).tolist() == [0, grey_levels - 1]
    with pytest.raises(ValueError, match=r"box = \(1.0, 0.0\): give \(low, high\)"):
        ls.Pixels(box=(1.0, 0.0))


def test_the_bound_knows_no_box():
    """x in [0, 1] is half of x in [-1, 1] and more: at half the noise the same cells cost the same bits."""
    g = torch.Generator().manual_seed(0)
    mean, root = 0.3 * torch.randn(4, generator=g), 0.4 * torch.randn(4, 4, generator=g)
    cov = root @ root.T + 0.05 * torch.eye(4)
    wide, half = ls.exact.Gaussian(mean, cov), ls.exact.Gaussian((mean + 1) / 2, cov / 4)
    half.pixels, wide.pixels = ls.Pixels(256, (0.0, 1.0)), ls.Pixels(256)
    images = wide.decode(wide.sample(16, generator=g))
    assert torch.equal(half.decode(half.encode(images)), images)

    def bits(model):
        return ls.bits_per_dim(model, images, generator=torch.Generator().manual_seed(1))

    a, b = bits(wide), bits(half)
    assert b.logsnr_range == pytest.approx([end + 2 * math.log(2) for end in a.logsnr_range])
    assert b.diffusion == pytest.approx(a.diffusion, rel=1e-4)
    assert b.reconstruction == pytest.approx(a.reconstruction, rel=1e-4)


def test_a_card_keeps_the_box(tmp_path):
    network = build_network(
        UNetConfig(channels=(8,), layers_per_block=1, norm_groups=4, mid_attention=False), (1, 4, 4)
    )
    for pixels in (ls.Pixels(256, (0.0, 1.0)), ls.Pixels(17)):
        model = NetworkDenoiser(network, ls.predictions.V(), shape=(1, 4, 4), pixels=pixels)
        save_denoiser(model, tmp_path / str(pixels.grey_levels))
        assert ls.load(tmp_path / str(pixels.grey_levels)).pixels == pixels


def test_a_flow_network_that_predicts_x1():
    """Flow matching's usual convention: x_t = t x1 + (1 - t) noise, the network is told t and answers x1, in [0, 1]."""
    exact = ls.exact.Gaussian(torch.tensor([0.5, 0.2]), torch.tensor([[0.05, 0.01], [0.01, 0.02]]))

    def network(x, t):
        sigma = float((1 - t[0]) / t[0])
        return exact(x / (t[0] * math.hypot(1, sigma)), sigma).x0

    x1 = X0(path="flow", label=lambda sigma: 1 / (1 + sigma))
    model = from_callable(
        network, x1, shape=(2,), pixels=ls.Pixels(256, (0, 1)), sigma_data=exact.sigma_data, trained_range=(0.002, 500)
    )
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for sigma in (0.1, 1.0, 20.0):
        torch.testing.assert_close(model(z, sigma).x0, exact(z, sigma).x0)
        torch.testing.assert_close(model(z, sigma).eps, exact(z, sigma).eps, rtol=1e-4, atol=1e-4)
