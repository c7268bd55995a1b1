"""Networks: widths and shapes that fit, F = 0 at the start, the null class, Fourier features."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from logsnr.errors import LogsnrError, require
from logsnr.models import UNetConfig, build_network


def tiny(**changes):
    return UNetConfig(**{"channels": (8,), "layers_per_block": 1, "mid_attention": False, "norm_groups": 4, **changes})


def built(config, shape=(1, 4, 4), seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(config, shape)


def awake(network):
    """The same network with a last convolution that says something."""
    with torch.no_grad():
        network.unet.conv_out.weight.copy_(
            torch.linspace(-1, 1, network.unet.conv_out.weight.numel()).view_as(network.unet.conv_out.weight)
        )
    return network.eval()


def test_the_network_starts_as_zero_and_trains_from_there():
    network = built(tiny(channels=(8, 16), attention=(False, True), head_dim=4, mid_attention=True), (1, 8, 8))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = network(x, torch.tensor([0.0, 500.0, 1000.0]))
    assert torch.equal(out, torch.zeros_like(x))
    (out - 1).square().mean().backward()
    assert network.unet.conv_out.weight.grad.abs().max() > 0


def test_it_hears_the_noise_level_across_the_whole_range_of_labels():
    network = awake(built(tiny()))
    x = torch.ones(4, 1, 4, 4)
    with torch.no_grad():
        out = network(x, torch.tensor([0.0, 7.0, 500.0, 1000.0])).flatten(1)
    assert (torch.cdist(out, out) + 10 * torch.eye(4)).min() > 1e-3


def test_a_missing_label_is_the_null_class():
    network = awake(built(tiny(classes=3)))
    x, t = torch.ones(2, 1, 4, 4), torch.full((2,), 100.0)
    assert network.config.null_class == 3
    with torch.no_grad():
        null = network(x, t, class_labels=torch.tensor([3, 3]))
        assert torch.equal(network(x, t), null)
        assert not torch.allclose(network(x, t, class_labels=torch.tensor([0, 0])), null)


def test_labels_for_an_unconditional_network_are_refused():
    with pytest.raises(LogsnrError, match="without classes: leave them out"):
        built(tiny())(torch.ones(1, 1, 4, 4), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.long))


def test_fourier_features_are_vdms_waves_of_the_input():
    network = built(tiny(fourier=(2, 3)), (3, 4, 4))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    seen = network._features(x)
    assert seen.shape == (2, 15, 4, 4)
    assert torch.equal(seen[:, :3], x)
    for i, n in enumerate((2, 3)):
        for j, wave in enumerate((torch.sin, torch.cos)):
            part = seen[:, 3 + 6 * i + 3 * j : 6 + 6 * i + 3 * j]
            torch.testing.assert_close(part, wave(2**n * math.pi * x), rtol=0, atol=1e-5)


def test_the_labels_frequencies_rise_to_what_is_asked():
    """sin and cos of label * 4^(i/(half - 1)), i = 0 ... half - 1; without, of the usual 10000^(-i/half)."""
    label = torch.tensor([-0.7, 0.3])
    for asked, frequencies in ((4.0, 4.0 ** (torch.arange(16) / 15)), (None, 1e4 ** (-torch.arange(16) / 16))):
        unet = built(tiny(channels=(32,), label_frequency=asked)).unet
        phase = label[:, None] * frequencies
        expected = torch.cat([phase.cos(), phase.sin()], 1)  # the shift is a whole number: 4 is 3.96 or so
        torch.testing.assert_close(unet.time_proj(label), expected, rtol=0, atol=0.02)


def test_building_is_deterministic_in_the_global_seed():
    first, again, other = (built(tiny(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((4, 4), (8,), r"shape \(4, 4\).*give \(channels, height, width\)"),
        ((1, 6, 6), (8, 8, 8), r"6 x 6 with 3 levels.*multiples of 4; use fewer levels or resize"),
    ],
)
def test_shapes_that_do_not_fit(shape, channels, message):
    with pytest.raises(LogsnrError, match=message):
        build_network(tiny(channels=channels), shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (10,)}, "channels 10 with norm_groups 4: every width must be a multiple of 4"),
        ({"attention": (True, False)}, "attention has 2 flags for 1 levels"),
        ({"mid_attention": True, "head_dim": 5}, "channels 8 with head_dim 5.*change head_dim or switch attention off"),
        ({"attention": True, "head_dim": 3}, "channels 8 with head_dim 3"),
        ({"dropout": 1.0}, "less than 1"),
        ({"chanels": (8,)}, "Extra inputs are not permitted"),
    ],
)
def test_configs_that_do_not_fit(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny(**changes)


def test_attention_off_means_off():
    names = [name for name, _ in built(tiny(channels=(8, 8)), (1, 8, 8)).named_parameters()]
    assert not any("attention" in name for name in names)
    with_attention = built(tiny(channels=(8, 8), attention=(False, True), head_dim=4), (1, 8, 8))
    attending = {name.split(".attentions")[0] for name, _ in with_attention.named_parameters() if "attentions" in name}
    assert attending == {"unet.down_blocks.1", "unet.up_blocks.0"}


def test_a_missing_extra_is_named():
    with pytest.raises(LogsnrError, match=r"a demo needs logsnr_missing_module.*pip install 'logsnr\[train\]'"):
        require("logsnr_missing_module.part", extra="train", purpose="a demo")


def test_patches_are_the_pixels_of_a_square_as_channels():
    """The network of a patch of 2 is the same U-Net, seeing four shifted half-size images."""
    network = built(tiny(patch=2), (1, 8, 8))
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([10.0, 900.0])
    torch.nn.init.normal_(network.unet.conv_out.weight, generator=torch.Generator().manual_seed(2))
    quarters = torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
    with torch.no_grad():
        answer, expected = network(x, t), network.unet(quarters, t, return_dict=False)[0]
    for k, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        torch.testing.assert_close(answer[:, 0, i::2, j::2], expected[:, k], rtol=0, atol=0)
